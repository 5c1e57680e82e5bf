"""`make gpu`, rehearsed on a CPU: every step runs, and one that fails or hangs does not end the rest."""

import importlib.util
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, run_python

SCRIPT = ROOT / "scripts" / "measure_gpu.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def session(script, tmp_path):
    (tmp_path / "work").mkdir()
    return script.Session(tmp_path / "output", tmp_path / "work", "cpu", seconds=60)


def test_what_fails_or_hangs_is_noted(session):
    """Breaks when a step that fails, or takes too long, ends the others, keeps its time, or is said to be done."""
    figures = session.work / "good.json"
    assert not session.step("bad", 30, "-c", "print('what it said'); raise SystemExit(3)")
    assert not session.step("slow", 2, "-c", "import time; time.sleep(100)")
    assert session.step("good", 30, "-c", f"open({str(figures)!r}, 'w').write('[1]')")
    session.end = 0
    assert not session.step("late", 30, "-c", "pass")
    report = json.loads((session.output / "report.json").read_text())
    assert [step["status"] for step in report["steps"].values()] == [3, "stopped after 2 s", 0, "no time was left"]
    assert report["steps"]["slow"]["seconds"] < 10 and report["good"] == [1]
    assert "what it said" in (session.output / "log.txt").read_text()
    assert str(session.work) not in (session.output / "report.json").read_text()


def write_images(path, count=12):
    """Write JPEGs of noise in the layout of CIFAR-10 (JPEG), two classes."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w:xz") as archive:
        for name in (f"train/{label}/{i:04}.jpg" for label in ("cat", "dog") for i in range(count)):
            file = io.BytesIO()
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)


def test_images_that_are_not_there_or_damaged_are_digits(script, tmp_path, capsys):
    """Breaks when a missing or damaged archive, or wheel, ends everything."""
    work, images = tmp_path / "work", tmp_path / "cifar10_jpeg.tar.xz"
    assert script.unpack_images(tmp_path, work) == ["--dataset=digits"]
    write_images(images)
    assert f"--data_path={work / 'cifar10' / 'train'}" in script.unpack_images(tmp_path, work)
    assert len(list((work / "cifar10" / "train").glob("*/*.jpg"))) == 24
    images.write_bytes(images.read_bytes()[: images.stat().st_size // 2])
    assert script.unpack_images(tmp_path, work) == ["--dataset=digits"]
    assert capsys.readouterr().out.count("cannot be read") == 2
    (tmp_path / "torchebm-1.whl").write_bytes(b"no archive")
    script.unpack_wheels(tmp_path, work)
    assert "torchebm is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Breaks when a step does not run as it is called, leaves no figures, or a file lies elsewhere."""
    write_images(tmp_path / "cifar10_jpeg.tar.xz")
    words = ["--device=cpu", f"--output={tmp_path / 'gpu'}", f"--data={tmp_path}"]
    result = run_python(SCRIPT, *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + (tmp_path / "gpu" / "log.txt").read_text()
    names = {path.name for path in (tmp_path / "gpu").iterdir()}
    assert names == {"report.json", "log.txt", "curves.png", "samples.png"}
    report = json.loads((tmp_path / "gpu" / "report.json").read_text())
    benchmarks = {"machine", "resnet32", "large", "small", "iteration", "iteration_large", "kernels", "resnet128"}
    assert set(report["steps"]) == benchmarks | {"tests", "training", "resume", "one_rank"}
    assert all(report[name]["rows"] for name in benchmarks)
    assert {path.name for path in tmp_path.iterdir()} == {"cifar10_jpeg.tar.xz", "gpu"}

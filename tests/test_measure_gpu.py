"""`make gpu`, rehearsed on a CPU: every step runs, and one that fails or hangs does not end the rest."""

import importlib.util
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import ROOT, run_python
from ebm.support import cli

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
    return script.Session(tmp_path / "output", tmp_path / "work", "cuda", seconds=60)


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
    """Write JPEGs of noise in the layout of CIFAR-10 (JPEG), of two classes: reddish and bluish ones."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w:xz") as archive:
        for label, colour in (("cat", 0), ("dog", 2)):
            for i in range(count):
                pixels = generator.integers(128, size=(32, 32, 3), dtype=np.uint8)
                pixels[..., colour] += 128
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                member = tarfile.TarInfo(f"train/{label}/{i:04}.jpg")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)


def test_images_that_are_not_there_or_damaged_are_digits(script, tmp_path, capsys):
    """Breaks when a missing or damaged archive, or wheel, ends everything."""
    work, images = tmp_path / "work", tmp_path / "cifar10_jpeg.tar.xz"
    assert script.unpack_images(tmp_path, work) == ["--dataset=digits"]
    write_images(images)
    assert script.unpack_images(tmp_path, work) == ["--dataset=cifar10", f"--datadir={work / 'data'}"]
    dataset = data.load_dataset("cifar10", root=work / "data")
    assert dataset.class_names == ("cat", "dog") and dataset.labels.bincount().tolist() == [12, 12]
    red, _, blue = dataset.raw(torch.arange(24)).float().mean((2, 3)).T
    assert ((red > blue) == (dataset.labels == 0)).all()
    images.write_bytes(images.read_bytes()[: images.stat().st_size // 2])
    assert script.unpack_images(tmp_path, work) == ["--dataset=digits"]
    assert capsys.readouterr().out.count("cannot be read") == 2
    (tmp_path / "torchebm-1.whl").write_bytes(b"no archive")
    script.unpack_wheels(tmp_path, work)
    assert "torchebm is left out" in capsys.readouterr().out


def test_comparisons_on_a_gpu(script, monkeypatch):
    """Breaks when a call that the rehearsal leaves out, because it takes long, is refused by its script."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for comparison in script.GPU.comparisons.values():
        benchmark = importlib.import_module(comparison.script.removesuffix(".py"))
        words = [*comparison.flags.split(), "--device=cuda"]
        words += [f"--train_flags={comparison.train_flags}"] if comparison.train_flags else []
        calls = list(benchmark.plan_calls(cli.parse(["", *words], benchmark.Settings)))
        of_a_seed = [call.read_settings() for call in calls[: len(calls) // 6]]
        assert {settings.seed for settings in of_a_seed} == {0} and len(calls) == 6 * len(of_a_seed)
        precisions = [settings.precision for settings in of_a_seed]
        assert precisions[:3] == ["float32", "bf16", "fp16"] and {settings.device for settings in of_a_seed} == {"cuda"}


def test_benchmarks_on_the_cpu(script, session, monkeypatch):
    """Breaks when benchmarks on the CPU share cores, with all else, too, or oneDNN's limits do not reach them."""
    cores, started = {*range(16)}, {}

    def start(name, path, *words, **environment):
        started[name] = (*cores,), environment["ONEDNN_MAX_CPU_ISA"]
        assert cli.parse(["", *words], importlib.import_module("langevin").Settings).device == "cpu"

    def pin(_, numbers):
        cores.clear()
        cores.update(numbers)

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda _: {*cores})
    monkeypatch.setattr(script.os, "sched_setaffinity", pin)
    monkeypatch.setattr(session, "start", start)
    script.start_on_cpu(session)
    limits = {"cpu_amx": "DEFAULT", "cpu_avx512_bf16": "AVX512_CORE_BF16", "cpu_avx512": "AVX512_CORE"}
    assert {name: limit for name, (_, limit) in started.items()} == limits
    assert sorted(core for taken, _ in started.values() for core in taken) == [*range(10, 16)]
    assert cores == {*range(10)}
    script.start_on_cpu(session)  # with ten cores nothing more happens
    assert len(started) == 3 and cores == {*range(10)}


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
    benchmarks = {"machine", "resnet32", "networks", "iteration", "kernels", "compare_colour", "compare_evaluations"}
    others = {"tests", "training", "resume", "one_rank", "compile_training"}
    assert set(report["steps"]) == benchmarks | others
    assert all(report[name]["rows"] for name in benchmarks)
    for name in ("compare_colour", "compare_evaluations"):  # both number types of both seeds came to their end
        assert {row["seed"] for row in report[name]["rows"]} == {0, 1}
        assert [row["precision" if "precision" in row else "recipe"] for row in report[name]["settings"]["compared"]]
    assert {path.name for path in tmp_path.iterdir()} == {"cifar10_jpeg.tar.xz", "gpu"}

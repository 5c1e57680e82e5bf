"""scripts/reproduce.py: the files of a row are checked, its command is run, and docs/reproduce.md has the same rows."""

import hashlib
import importlib
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import typing

import pytest

import reproduce
from conftest import (
    ENVIRONMENT,
    GOLDEN,
    ROOT,
    flip_bit,
    run_python,
    write_checkpoint,
    write_colour_sets,
    write_random_inception,
)
from ebm.support import cli
from ebm.support.errors import UsageError

SCRIPT = ROOT / "scripts/reproduce.py"
PAGE = (ROOT / "docs/reproduce.md").read_text()
PUBLISHED = GOLDEN / "tf_checkpoints" / "cifar10_cond"  # two files in the format of the authors' checkpoints
SMALL = {  # flags by which a row that needs no download ends in seconds
    "ais_gauss": "--pdist=10,1000 --gauss_dim=2 --batch_size=2",
    "digits_label": "--limit=20",
    "digits_quality": "--im_number=40 --batch_size=40",
    "mnist_noise": "--limit=5",
    "sprites_labels": "--limit=2 --num_steps=1",
    "sprites_combined": "--limit=2 --num_steps=1 --precision=float32",
}


def check(name, **settings):
    """Run a row in this process, up to its command."""
    reproduce.main(reproduce.Settings(row=name, **{"dry_run": True} | settings))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A copy of a published checkpoint and small CIFAR-10 files, whose hashes are the recorded ones; their folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PUBLISHED, "cachedir/cifar10_cond")
    write_colour_sets(pathlib.Path("data"), count=2)
    pathlib.Path("weights.pth").write_bytes(b"weights")
    known = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in pathlib.Path("data").rglob("*_batch*")}
    listed = reproduce.list_data_files

    def list_small_files(name, settings):
        return [each._replace(known=known.get(each.path.name, "")) for each in listed(name, settings)]

    monkeypatch.setattr(reproduce, "list_data_files", list_small_files)
    return tmp_path


def test_whole_files(files, capsys):
    """Breaks when whole files are refused, or their hashes, of which no record exists yet, are not printed."""
    check("cifar10_cond", inception_weights="weights.pth")
    printed = capsys.readouterr().out
    for path in [*(files / "cachedir/cifar10_cond").iterdir(), files / "data/cifar-10-batches-py/data_batch_5"]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in printed
    assert "command: python eval_inception.py" in printed and "ResNet32 with 8 filters, labels of width 10" in printed
    assert printed.count("no hash of it is recorded") == 4 and printed.count("as recorded") == 6


@pytest.mark.parametrize("name", ["model_74700.index", "model_74700.data-00000-of-00001"])
def test_damaged_checkpoint(files, name):
    """Breaks when a flipped bit in a download gives a figure instead of the name of the file."""
    flip_bit(files / "cachedir/cifar10_cond" / name, 1000)
    with pytest.raises(UsageError, match=rf"cachedir/cifar10_cond/{name} is damaged"):
        check("cifar10_cond", inception_weights="weights.pth")


def test_damaged_data(files):
    """Breaks when a figure is measured on other data than everybody's."""
    flip_bit(files / "data/cifar-10-batches-py/data_batch_3", 500)
    with pytest.raises(UsageError, match=r"data_batch_3 has the MD5 .* instead of .* damaged or another file"):
        check("cifar10_cond", inception_weights="weights.pth")


def test_missing_files(files, capsys):
    """Breaks when only some of the missing files are named, or data that the command downloads end a measurement."""
    shutil.rmtree("data")
    with pytest.raises(UsageError, match=r"data_batch_1 and 6 more, listed above, are missing"):
        check("cifar10_cond", inception_weights="weights.pth")
    assert "batches.meta: missing" in capsys.readouterr().out
    row, settings = reproduce.ROWS["cifar10_cond"], reproduce.Settings(inception_weights="weights.pth")
    reproduce.check_files([pathlib.Path("cachedir/cifar10_cond/model_74700")], row, settings)
    assert "batches.meta: missing; the command downloads it" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"model_121200.index and \d+ more"):  # one of ten is no ensemble
        check("cifar10_uncond_ensemble")
    assert "model_118500.index: missing" in capsys.readouterr().out


def test_other_model_than_recorded(files):
    """Breaks when another model in the place of a shipped one passes for it."""
    write_checkpoint(files / "mine/model_500.pt")
    with pytest.raises(UsageError, match=r"mine/model_500.pt has the SHA-256 .* instead of 66412d3ca1b0939f"):
        check("digits_label", checkpoint="mine/model_500.pt")


def test_checkpoint_elsewhere(files, capsys):
    """Breaks when a checkpoint outside cachedir/ is checked, but another one is measured."""
    shutil.move("cachedir/cifar10_cond", "my files")
    for name in ("model_74700", "model_74700.meta", "model_74700.data-00000-of-00001"):
        check("cifar10_cond", checkpoint=f"my files/{name}", inception_weights="weights.pth")
        command = re.search("^command: (.*)", capsys.readouterr().out, re.MULTILINE)[1]
        assert command.endswith(
            f"--resume_iter=74700 '--exp=my files' --modeldir={files} --inception_weights=weights.pth"
        )
        assert "--exp=cifar10_cond" not in command
    with pytest.raises(UsageError, match=r"not called model_<iteration>"):
        check("cifar10_cond", checkpoint="my files/weights.index")
    with pytest.raises(UsageError, match=r"takes no single checkpoint"):
        check("sprites_labels", checkpoint="my files/model_74700")
    with pytest.raises(UsageError, match=r"no source tells the iteration"):
        check("imagenet32_cond")
    with pytest.raises(UsageError, match=r"this row needs `imagenet_path`"):
        check("imagenet32_cond", checkpoint="my files/model_74700")


def test_shipped_hashes():
    """Breaks when a shipped model is replaced and its recorded hash is not."""
    for name, known in reproduce.HASHES.items():
        assert reproduce.hash_file(ROOT / "pretrained" / name) == known
    shipped = {
        f"{name}.pt" for row in reproduce.ROWS.values() if "pretrained" in row.command for name in row.checkpoints
    }
    assert shipped == set(reproduce.HASHES)


def run(*words, **settings):
    return run_python(SCRIPT, *words, **settings)


def test_digits_from_file_to_figure(tmp_path):
    """Breaks when a row that needs no download no longer measures the figure that is expected."""
    result = run("digits_label", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^clean +0\.98\d\d +0\.989$", result.stdout, re.MULTILINE)
    assert re.search(r"^calibration error, clean +0\.03\d\d +0\.034$", result.stdout, re.MULTILINE)
    assert (tmp_path / "sandbox_cachedir/digits_cond/label/label.json").exists()


def test_unknown_row():
    """Breaks when a mistyped row is a traceback, or the rows there are remain unknown."""
    result = run("digits_labels")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: there is no row 'digits_labels'; did")
    assert all(name in result.stderr for name in reproduce.ROWS)


def test_command_that_fails(tmp_path):
    """Breaks when the row's command fails and the exit status says that a figure was measured."""
    result = run("digits_label", "--call_flags=--limit=0", cwd=tmp_path)
    assert result.returncode == 2 and "error: ebm_sandbox.py ended with the exit status 2" in result.stderr
    assert "measured" not in result.stdout


@pytest.mark.slow
def test_stopped(tmp_path):
    """Breaks when a signal leaves the row's command behind, or keeps it from writing what it has."""
    words = [sys.executable, SCRIPT, "ais_gauss", "--call_flags=--pdist=10,100000"]
    with subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("HMC move"):
                break
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM and "stopped early: these are the results so far" in rest


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_figures_are_found(tmp_path, name):
    """Breaks when a report calls a figure otherwise than its row does, so that nothing stands beside the expected."""
    result = run(name, f"--call_flags={SMALL[name]}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout.rpartition("measured")[2].splitlines()[1:-2]  # two lines follow it
    assert len(table) == len(reproduce.ROWS[name].expected) and not any(" –  " in line for line in table), table


@pytest.mark.slow
def test_published_checkpoint_from_file_to_figure(files, capfd):
    """Breaks when the row of a TensorFlow checkpoint does not end in FID and Inception score."""
    write_random_inception(pathlib.Path("weights.pth"))
    small = "--num_steps=1 --im_number=4 --repeat_scale=1 --inception_sha256="
    small += hashlib.sha256(pathlib.Path("weights.pth").read_bytes()).hexdigest()
    check("cifar10_cond", inception_weights="weights.pth", call_flags=small, dry_run=False)
    printed = capfd.readouterr().out
    assert re.search(r"^FID +\d+\.\d+ +37\.9\nInception score +\d+\.\d+ +8\.30$", printed, re.MULTILINE)


# ---- the rows, their commands and the page ----


@pytest.mark.parametrize("name", reproduce.ROWS)
def test_commands_are_taken(name, capsys):
    """Breaks when a row has a flag that its script does not know or that has no effect, or names another checkpoint."""
    row = reproduce.ROWS[name]
    script, *words = row.command.split()
    kind = typing.get_type_hints(importlib.import_module(script.removesuffix(".py")).main)["settings"]
    settings = cli.parse([script, *words], kind)
    assert "note:" not in capsys.readouterr().out
    if len(row.checkpoints) == 1 or name == "cifar10_uncond_ensemble":
        exp, model = row.checkpoints[0].split("/")
        assert settings.exp == exp and settings.resume_iter in (model.removeprefix("model_"), "latest")
        assert getattr(settings, "ensemble", 1) == len(row.checkpoints)


def document_row(name, row):
    """Return the lines of a row in the two tables of docs/reproduce.md."""
    ends = row.checkpoints[:: len(row.checkpoints) - 1] if len(row.checkpoints) > 4 else row.checkpoints
    models = (" … " if len(row.checkpoints) > 4 else ", ").join(f"`{each}`" for each in ends)
    cells = [
        f"`{name}`",
        row.what,
        reproduce.describe_expected(row),
        row.source,
        models,
        ", ".join(row.data),
        row.was_run,
    ]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |"), f"| `{name}` | `python {row.command}` |"


def test_page_has_the_rows():
    """Breaks when docs/reproduce.md and the script disagree about a figure, a file or a command."""
    lines = [line for name, row in reproduce.ROWS.items() for line in document_row(name, row)]
    assert [line for line in PAGE.splitlines() if line.startswith("| `")] == sorted(
        lines, key=lambda line: "`python" in line
    )

"""Full disks and others that keep fewer promises: nothing is half written, nobody learns of it after the work."""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import resource
import stat
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import checkpoint
import data
import ebm_combine
import ebm_sandbox
from conftest import ROOT, make_run, make_state
from ebm.settings import AisSettings, DemoSettings, InceptionSettings, SampleSettings
from ebm.support import files, pictures
from ebm.support.errors import UsageError
from ebm.support.files import RecordFile, WriteError, prepare_file, prepare_folder, write_file
from ebm.support.logs import RunLog, read_log
from ebm.support.reports import write_json
from ebm.support.streams import DroppingFile
from ebm.training.distributed import work_alone
from ebm.training.ownership import own_folder
from train import train

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def limit_file_size(size):
    """Let no file grow beyond so many bytes: the system then writes a part, and next an error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail(*arguments, **settings):
    raise FULL


# ---- the one writer ----

NOISE = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)


def draw_figure():
    figure = Figure(figsize=(1, 1), dpi=40)
    figure.subplots().imshow(NOISE)
    return figure


WRITERS = {
    "checkpoint": lambda path: checkpoint.save(path, {"noise": [torch.randn(400) for _ in range(20)]}),
    "json": lambda path: write_json(path, {"noise": NOISE.tolist()}),
    "png": lambda path: pictures.save_pixels(NOISE, path.with_suffix(".png")),
    "gif": lambda path: pictures.save_gif([NOISE, NOISE[::-1]], path),
    "npz": lambda path: write_file(path, lambda file: np.savez_compressed(file, noise=NOISE, again=NOISE)),
    "npy": lambda path: write_file(path, lambda file: np.save(file, NOISE)),
    "plot": lambda path: pictures.save_figure(draw_figure(), path.with_suffix(".png")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_at_every_size(tmp_path, name):
    """Breaks when a disk that fills in the middle of a file gives another error, half a file, or loses the earlier."""
    WRITERS[name](tmp_path / "result")
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    path.write_bytes(b"earlier")
    for limit in range(0, size, max(1, size // 9)):
        with limit_file_size(limit), pytest.raises(WriteError, match=r"result.* cannot be written \(File too large\)"):
            WRITERS[name](tmp_path / "result")
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]
    WRITERS[name](tmp_path / "result")
    assert path.stat().st_size > len(b"earlier") and len(list(tmp_path.iterdir())) == 1


def break_sync(monkeypatch, code, *, of_folders):
    """Let fsync fail with this error for folders, or for files."""
    sync = os.fsync

    def fail_to_sync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_to_sync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
@pytest.mark.parametrize("of_folders", [True, False])
def test_file_systems_that_cannot_sync(tmp_path, monkeypatch, code, of_folders):
    """Breaks when a save fails on CIFS or FUSE, where fsync of a folder or of a file may be no valid call."""
    break_sync(monkeypatch, code, of_folders=of_folders)
    assert write_file(tmp_path / "a", lambda file: file.write(b"whole")).read_bytes() == b"whole"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_errors_that_only_fsync_tells(tmp_path, monkeypatch, code):
    """Breaks when what the system could not bring to the disk counts as saved: a quota, a full server, a bad device."""
    (tmp_path / "a").write_bytes(b"earlier")
    break_sync(monkeypatch, code, of_folders=False)
    with pytest.raises(WriteError) as caught:
        write_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert caught.value.errno == code and caught.value.strerror == os.strerror(code)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_rename_that_fails(tmp_path, monkeypatch, code):
    """Breaks when a failure after the last byte leaves the temporary file behind."""
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(WriteError):
        write_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    """Breaks when a mistake in the program, or Ctrl-C, is taken for a full disk, or leaves a piece."""
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error):
            write_file(tmp_path / "a", lambda file, error=error: (_ for _ in ()).throw(error))
    assert not list(tmp_path.iterdir())


def test_two_that_write_one_file(tmp_path):
    """Breaks when two processes share a temporary name and the file becomes a mixture of both."""

    def write_slowly(file):
        file.write(b"first, ")
        file.flush()
        write_file(tmp_path / "a", lambda other: other.write(b"second, whole"))
        assert (tmp_path / "a").read_bytes() == b"second, whole"
        file.write(b"whole")

    write_file(tmp_path / "a", write_slowly)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first, whole"]


def test_what_is_no_file_stays(tmp_path):
    """Breaks when a result replaces a device such as /dev/null, or a pipe, for all who use it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteError, match="no file"):
        write_file(tmp_path / "pipe", lambda file: file.write(b"new"))
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(UsageError, match=r"`output`: .*pipe is not a file"):
        prepare_file(tmp_path / "pipe", "output")


def test_json_of_names_that_are_no_text(tmp_path):
    """Breaks when a file name in another encoding, which Python holds as surrogates, ends a report."""
    assert json.loads(write_json(tmp_path / "a.json", {"name": "é\udcff"}).read_text()) == {"name": "é\udcff"}


def test_one_way_to_the_disk():
    """Breaks when a module writes a file past the one writer, which is then half a file on a full disk."""
    direct = re.compile(
        r"\.write_(text|bytes)\(|(np|torch)\.savez?(_compressed)?\((?!file\b|\w+, file\))|\.savefig\((?!file\b)"
        r"|open\((?!os.devnull)[^)]*[\"'][wx]b?[\"']"
    )
    for path in [*ROOT.glob("*.py"), *(ROOT / "ebm").rglob("*.py"), *(ROOT / "scripts").glob("*_checkpoint.py")]:
        if path.name != "files.py":
            assert not direct.search(path.read_text()), path


# ---- folders for results ----


def test_folders_that_cannot_be_written(tmp_path):
    """Breaks when a file in the way, a place without folders or a full disk is found after the work, or unnamed."""
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"`logdir`: cannot make .*is not a folder"):
            prepare_folder(folder, "logdir")
    with pytest.raises(UsageError, match="`logdir`: cannot make /proc/nowhere"):
        prepare_folder(ROOT / "/proc/nowhere/below", "logdir")
    with limit_file_size(100), pytest.raises(UsageError, match=r"`logdir`: cannot write .*File too large"):
        prepare_folder(tmp_path, "logdir")
    assert prepare_folder(tmp_path / "a" / "b", "logdir").is_dir()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file"]


NOWHERE = "/proc/nowhere"
SHIPPED: dict[str, Any] = {"exp": "digits_cond"}
# Each script: its settings, and the module's function that begins the slow work.
EVALUATIONS = {
    "sample": (SampleSettings(logdir=NOWHERE, **SHIPPED), "draw_fresh_images"),
    "ais": (AisSettings(logdir=NOWHERE, **SHIPPED), "load_target"),
    "ais gauss": (AisSettings(logdir=NOWHERE, dataset="gauss"), "build_gauss"),
    "ebm_sandbox": (ebm_sandbox.Settings(logdir=NOWHERE, **SHIPPED), "Report"),
    "eval_inception": (InceptionSettings(logdir=NOWHERE, **SHIPPED), "load_reference"),
    "imagenet_demo": (
        DemoSettings(savedir=NOWHERE, **SHIPPED),
        "record_frames",
    ),
    "ebm_combine": (ebm_combine.Settings(savedir=NOWHERE), "load_all_sprites"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_results_have_a_place_before_the_work(monkeypatch, name):
    """Breaks when a script samples or reads data for hours and only then finds that it cannot keep the results."""
    settings, work = EVALUATIONS[name]
    module = importlib.import_module(name.split()[0])
    monkeypatch.setattr(module, work, lambda *arguments, **options: pytest.fail("the work has begun"))
    setting = "savedir" if settings.__dict__.get("savedir") == NOWHERE else "logdir"
    with pytest.raises(UsageError, match=f"`{setting}`: cannot write {NOWHERE}"):
        module.main(settings)


# ---- the log ----


def read_records(path):
    """Return the contents of TensorBoard's records in a file; raise AssertionError if the last one is torn."""
    contents, records = path.read_bytes(), []
    while contents:
        size = int.from_bytes(contents[:8], "little")
        assert len(contents) >= size + 16
        records.append(contents[12 : 12 + size])
        contents = contents[size + 16 :]
    return records


@pytest.mark.parametrize("room", range(10))
def test_records_are_whole_when_there_is_room_again(tmp_path, room):
    """Breaks when a record that did not fit leaves its first bytes, at any number of bytes that did fit."""
    file = RecordFile(tmp_path / "log")
    file.append(b"first\n")
    with limit_file_size(6 + room), pytest.raises(WriteError):
        file.append(b"second one\n")
    assert file.path.read_bytes() == b"first\n"
    file.append(b"third\n")
    assert file.path.read_bytes() == b"first\nthird\n"


def test_a_torn_record_that_cannot_be_removed_at_once(tmp_path, monkeypatch):
    """Breaks when half a record stays in the middle of the log, because shortening a file needs room on some disks."""

    class FullFile(io.FileIO):
        def write(self, data):
            if self.seek(0, os.SEEK_END) > 9:
                raise FULL
            return super().write(data[:4])

        truncate = fail

    file = RecordFile(tmp_path / "log")
    file.append(b"first\n")
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda path, mode, buffering: FullFile(path, "a"), raising=False)
        with pytest.raises(WriteError):
            file.append(b"second\n")
    assert file.path.read_bytes() == b"first\nseco"
    file.append(b"third\n")
    assert file.path.read_bytes() == b"first\nthird\n"


def test_log_on_a_full_disk(tmp_path):
    """Breaks when entries without room end the run, are told each time, or TensorBoard shows nothing afterwards."""
    said: list[str] = []
    log = RunLog(tmp_path, say=said.append)
    log.write_scalars(1, {"e_pos": 1.0})
    path = pictures.save_pixels(NOISE, tmp_path / "noise.png")
    with limit_file_size(10):
        for iteration in (2, 3, 4):
            log.write_scalars(iteration, {"e_pos": 2.0, "a name that needs more bytes": 0.0})
            log.write_histogram(iteration, "energies", np.arange(3.0), np.arange(4.0))
            log.write_picture(iteration, "noise", path)
    assert [line.split(" (")[0] for line in said] == [
        f"could not write {log.lines.path}",
        f"could not write {log.board.path}",
    ]
    log.write_scalars(5, {"e_pos": 3.0})
    log.write_picture(5, "noise", path)
    log.write_histogram(5, "energies", np.array([0.5, 2.0, 2.5]), np.arange(4.0))
    assert [line["iteration"] for line in read_log(tmp_path)] == [1, 5]
    assert said[2:] == [f"{file.path} can be written again" for file in (log.lines, log.board)]
    assert len(read_records(log.board.path)) == 2 + 1 + 3


def test_tensorboard_shows_the_log(tmp_path):
    """Breaks when TensorBoard cannot read the records, or shows what an earlier run logged after this one's start."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        log = RunLog(tmp_path, 1)
        log.write_scalars(2, {"e_pos": value})
        log.write_scalars(int(value), {"e_neg": value})
    log.write_picture(3, "noise", pictures.save_pixels(NOISE, tmp_path / "noise.png"))
    log.write_histogram(3, "energies", np.array([0.5, 2.0, 2.5]), np.arange(4.0))
    log.write_table(3, "settings", {"lr": 0.1, "exp": "a|b"})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.SummaryMetadata("settings").plugin_data.plugin_name == "text"
    (text,) = board.Tensors("settings")[0].tensor_proto.string_val
    assert text.decode().split("\n")[2:] == ["| lr | 0.1 |", "| exp | a\\|b |"]
    assert [(event.step, event.value) for event in board.Scalars("e_pos")] == [(2, 2.0)]
    (picture,) = board.Images("noise")
    assert (picture.width, picture.height) == (60, 60)
    assert np.array_equal(Image.open(io.BytesIO(picture.encoded_image_string)), NOISE)
    histogram = board.Histograms("energies")[0].histogram_value
    assert list(histogram.bucket) == [0, 1, 0, 2] and list(histogram.bucket_limit) == [0, 1, 2, 3]
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (0.5, 2.5, 3, 5.0)


# ---- training ----


def make_small_run(folder, said, **settings):
    """Return a run of six iterations that saves every second one."""
    folder.mkdir(exist_ok=True)
    chosen = {"max_iter": 6, "save_interval": 2, "test_interval": 100, "log_interval": 1, "zero_kl": True}
    run = make_run(make_state(), folder, **(chosen | {"batch_size": 8, "cclass": True} | settings))
    run.state.batches = data.Batches(len(run.dataset), 8, seed=0)
    run.say = said.append
    return run


@pytest.mark.parametrize("room", [20_000, 100_000, 180_000])
def test_training_on_a_full_disk(tmp_path, room):
    """Breaks when a checkpoint that fits in part ends the run with a traceback, at once, or destroys another one."""
    said: list[str] = []
    run = make_small_run(tmp_path / "full", said, save_interval=1)
    (run.settings.folder / "model_0.pt").write_bytes(b"earlier")
    with limit_file_size(room), pytest.raises(UsageError, match=r"model_3.*: 3 saves in a row failed \(File too large"):
        train(run)
    assert len(said) == 3 and all("could not save" in line and "the next save retries" in line for line in said)
    assert [path.read_bytes() for path in run.settings.folder.glob("*model_*")] == [b"earlier"]


def test_one_save_that_fails(tmp_path, monkeypatch):
    """Breaks when a disk that is full for a while costs more than one checkpoint."""
    said: list[str] = []
    run, save = make_small_run(tmp_path / "while", said), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: fail() if "model_4" in path.name else save(path, state))
    train(run)
    run.finish()
    assert sorted(path.name for path in run.settings.folder.glob("model_*")) == ["model_2.pt", "model_6.pt"]


def test_the_last_save(tmp_path, monkeypatch):
    """Breaks when the last state is lost with exit status 0 or the promise of a next save, or is not tried again."""
    said: list[str] = []
    run, save = make_small_run(tmp_path / "last", said), checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda path, state: fail() if "model_6" in path.name else save(path, state))
        train(run)
        assert "retries" not in next(line for line in said if "could not save" in line)
        with pytest.raises(UsageError, match=r"model_6\.pt: the last state could not be saved \(No space left"):
            run.finish()
    run.finish()  # there is room again
    assert checkpoint.load(run.settings.folder / "model_6.pt")["iteration"] == 6


def test_a_report_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Breaks when one picture without room ends the report, or the exit status does not tell."""
    run = make_run(make_state(), tmp_path / "report")
    plotted = []
    monkeypatch.setattr(pictures, "save_grid", fail)
    monkeypatch.setattr(pictures, "plot_lines", lambda curves, path, **settings: plotted.append(path))
    run.report()
    assert "could not write the picture of samples (No space left on device)" in capsys.readouterr().out
    assert plotted == [run.settings.folder / "curves.png"]
    with pytest.raises(UsageError, match="the picture of samples could not be written"):
        run.finish()


def test_a_folder_that_vanished(tmp_path):
    """Breaks when a folder that somebody moved ends the run: from then on a new one holds its files."""
    said: list[str] = []
    run = make_small_run(tmp_path / "moved", said)
    train(run)
    run.settings.folder.rename(tmp_path / "elsewhere")
    run.stop = 8
    train(run)
    assert (run.settings.folder / "model_8.pt").exists() and (tmp_path / "elsewhere" / "model_6.pt").exists()


def test_full_at_the_start(tmp_path):
    """Breaks when a run finds out at its first save, or in a traceback, that there is no room."""
    with limit_file_size(100), pytest.raises(UsageError, match=r"`logdir`: cannot write .*new \(File too large"):
        own_folder(tmp_path / "new", work_alone()).__enter__()
    with limit_file_size(0), pytest.raises(UsageError, match=r"tensorboard.* cannot be written"):
        RunLog(tmp_path)


# ---- standard output ----

PROGRAM = """
import dataclasses, errno, os, pathlib, sys
sys.path.insert(0, {root!r})
from ebm.support import cli
from ebm.support.files import WriteError
full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
@dataclasses.dataclass(frozen=True)
class Settings:
    '''Test'''
    how: str = cli.flag("go on", "what happens")
def main(settings):
    for _ in range(10_000):
        print("a line of the output", flush=_ % 2 == 0)
    print("the end", file=sys.stderr)
    if settings.how == "WriteError":
        raise WriteError(pathlib.Path("result.npz"), full)
    if settings.how == "OSError":
        raise full
cli.run(main, Settings, "")
"""


@pytest.mark.parametrize(
    ("how", "status", "error"),
    [
        ("go on", 0, "note: lines of the output are missing (No space left on device)"),
        ("WriteError", 2, "error: result.npz cannot be written (No space left on device); make room or choose"),
        ("OSError", 2, "error: no room (No space left on device); make room"),
    ],
)
def test_output_on_a_full_disk(how, status, error):
    """Breaks when a print ends the work, or Python leaves with a traceback and status 120."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), f"--how={how}"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    lines = result.stderr.splitlines()
    assert result.returncode == status and lines[0] == "the end" and lines[1].startswith(error) and len(lines) == 2


def test_a_terminal_that_was_closed():
    """Breaks when a print after the loss of the terminal, on which SIGHUP follows, ends a run before it has saved."""
    terminal, end = os.openpty()
    os.close(terminal)
    with DroppingFile(end, "w") as file, io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True) as stream:
        print("saved model_1.pt", file=stream)
    assert file.failure is not None and file.failure.errno == errno.EIO

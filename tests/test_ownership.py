"""Whose an experiment's folder is: names that lead elsewhere, the lock, runs and branches that are set aside."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import io
import json
import os
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import checkpoint
import ebm_combine
import eval_inception
import imagenet_demo
from conftest import draw_bytes, is_same_state, load_state, make_run, make_state, write_checkpoint
from data import Batches, StoredImages
from ebm.settings import (
    CombineSettings,
    DemoSettings,
    InceptionSettings,
    SampleSettings,
    SandboxSettings,
    TrainSettings,
)
from ebm.support.errors import UsageError
from ebm.support.experiments import find_experiment
from ebm.support.logs import LOG_NAME, RunLog, copy_log, read_log, read_series
from ebm.tasks.concept_models import find_models
from ebm.tasks.trained_models import find_checkpoint
from ebm.training import ownership
from ebm.training.distributed import Workers, join_workers, work_alone
from ebm.training.ownership import check_new_folder, list_branch_files, own_folder, set_aside_branch
from ebm.training.setup import open_dataset
from ebm.training.state import Step
from models import PreparedEnergy
from train import open_run, train

WORKERS = join_workers("none", "cpu")
LIVING = {"dataset": "digits", "cclass": True, "num_filters": 4, "batch_size": 8, "num_steps": 1, "zero_kl": True}


def list_files(folder):
    """Return the contents of all files below a folder, by path; None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# ---- names ----

BAD_NAMES = [
    "",
    " ",
    ".",
    "./",
    "..",
    "../mine",
    "a/../..",
    "a/../../b",
    "/tmp/mine",
    "~",
    "~/mine",
    "a\nb",
    "a\0b",
    "\x7f",
]
BAD_NAMES += ["x" * 201, "a/" + "ü" * 101, "a/" * 600]


def test_names(tmp_path):
    """Breaks when a name leads to the folder of all experiments or out of it, or a name that worked is refused."""
    for name in BAD_NAMES:
        with pytest.raises(UsageError, match="`exp`=") as caught:
            find_experiment(tmp_path, name)
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 250
    for name in ["digits", "a/b", "a b", ".hidden", "ä", "a/", "./a", "-1", "a.1", "x" * 200, "\udcff"]:
        assert find_experiment(tmp_path, name).is_relative_to(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "../mine", "/tmp/mine"])
def test_every_script_checks_names(name, tmp_path, monkeypatch):
    """Breaks when a script makes a path out of a name that is none."""
    monkeypatch.chdir(tmp_path)
    refused = {
        "train": lambda: TrainSettings(exp=name).folder,
        "sample": lambda: find_checkpoint(SampleSettings(exp=name)),
        "sandbox, ais": lambda: find_checkpoint(SandboxSettings(exp=name)),
        "imagenet_demo": lambda: imagenet_demo.main(DemoSettings(exp=name)),
        "eval_inception": lambda: eval_inception.main(InceptionSettings(exp=name)),
        "results of combine": lambda: ebm_combine.find_task_folder(ebm_combine.Settings(exp=name)),
        "models of combine": lambda: find_models(CombineSettings(exp_pos=name), ["pos"]),
        "further models": lambda: find_models(CombineSettings(models=(f"x={name or '.'}",)), ["x"]),
    }
    for script, make_path in refused.items():
        with pytest.raises(UsageError, match="give an experiment a name"):
            make_path()
            pytest.fail(script)
    assert not list(tmp_path.iterdir())


# ---- the lock ----


@contextlib.contextmanager
def other_owner(folder):
    """Let another process own a folder inside the block; yield its number."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with own_folder(folder, WORKERS):
            os.write(writer, b"owned")
            time.sleep(1000)
        os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 5) == b"owned"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_one_owner_at_a_time(tmp_path):
    """Breaks when a second run gets the folder of a living one, does not say whose it is, or changes something; when a
    killed owner leaves its lock behind.
    """
    folder = tmp_path / "x"
    write_checkpoint(folder / "model_1.pt")
    with other_owner(folder) as pid:
        before = list_files(tmp_path)
        with (
            pytest.raises(UsageError, match=f"x is in use by process {pid} on {socket.gethostname()} since "),
            own_folder(folder, WORKERS),
        ):
            pytest.fail("owned twice")
        assert list_files(tmp_path) == before
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with own_folder(folder, WORKERS):
            assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert set(list_files(folder)) == {"model_1.pt"}


def test_without_locks_of_the_system(tmp_path, monkeypatch):
    """Breaks when a file system without locks stops a run, protects nobody, or protects a dead owner for ever."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(ownership, "BEAT", 0.01)
    folder, long_ago = tmp_path / "x", time.time() - 1000
    with other_owner(folder) as pid:
        os.utime(folder / ".lock", (long_ago, long_ago))
        time.sleep(0.3)  # the owner touches it again
        with pytest.raises(UsageError, match=f"process {pid}"), own_folder(folder, WORKERS):
            pytest.fail("owned twice")
    os.utime(folder / ".lock", (long_ago, long_ago))
    with own_folder(folder, WORKERS) as owner:
        owner.confirm()
        (folder / ".lock").write_text("another's, while this process was suspended")
        os.utime(folder / ".lock")
        with pytest.raises(UsageError, match="in use"):
            owner.confirm()
    assert (folder / ".lock").read_text().startswith("another")


def test_a_folder_that_is_renamed_before_it_is_locked(tmp_path, monkeypatch):
    """Breaks when a run owns a folder that has just been set aside, and writes into the one that took its place."""
    folder, whole = tmp_path / "x", fcntl.lockf
    folder.mkdir()

    def rename_first(*arguments):
        monkeypatch.setattr(fcntl, "lockf", whole)
        folder.rename(tmp_path / "x.1")
        whole(*arguments)

    monkeypatch.setattr(fcntl, "lockf", rename_first)
    with own_folder(folder, WORKERS) as owner:
        assert (folder / ".lock").exists() and not list_files(tmp_path / "x.1")[".lock"]
        (folder / ".lock").unlink()
        folder.rename(tmp_path / "x.2")
        owner.confirm()  # the folder has vanished: it is made and owned again
        assert (folder / ".lock").read_text()


def test_a_folder_that_is_away_for_a_while(tmp_path):
    """Breaks when a run that could not take its folder again writes there later without owning it."""
    folder = tmp_path / "x"
    with own_folder(folder, WORKERS) as owner:
        (folder / ".lock").unlink()
        folder.rmdir()
        folder.write_text("as if its disk were gone")
        with pytest.raises(OSError, match="exists"):
            owner.confirm()
        folder.unlink()
        with other_owner(folder), pytest.raises(UsageError, match="x is in use by"):
            owner.confirm()
        assert owner.confirm() and not owner.confirm()
        assert (folder / ".lock").read_text()
        said = []
        run = make_run(make_state(), folder, said)
        run.owner, run.say = owner, said.append
        run.save()
        folder.rename(tmp_path / "y")
        run.save()
        assert [line for line in said if "lock in" in line] == said[1:2]


def test_a_link_in_place_of_a_lock(tmp_path):
    """Breaks when the folder of a stranger leads a run to overwrite a file elsewhere."""
    (tmp_path / "precious").write_text("mine")
    write_checkpoint(tmp_path / "x" / "y" / "model_1.pt")
    (tmp_path / "x" / "y" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"cannot write .*y .*symbolic links"), own_folder(tmp_path / "x/y", WORKERS):
        pytest.fail("took a link for a lock")
    (tmp_path / "x" / "config.json").write_text("{}")
    check = functools.partial(check_new_folder, tmp_path / "x")
    with pytest.raises(UsageError, match="symbolic links"), own_folder(tmp_path / "x", WORKERS, check):
        pytest.fail("followed a link to a lock")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_full_disk(tmp_path, monkeypatch):
    """Breaks when a folder that cannot be written ends in a traceback, or leaves something behind."""

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    message = "`logdir`: cannot write .*x .No space left on device"
    with pytest.raises(UsageError, match=message), own_folder(tmp_path / "x", WORKERS):
        pytest.fail("owned a folder that cannot be written")
    assert not list(tmp_path.iterdir())


def test_all_workers_are_refused():
    """Breaks when only rank 0 learns that its folder is another's, and the other workers wait for it."""

    def refuse():
        raise UsageError("x is in use")

    for rank, shared in ((0, lambda problem: [problem, ""]), (1, lambda problem: ["x is in use", problem])):
        with pytest.raises(UsageError, match="x is in use"):
            Workers.call_first(SimpleNamespace(rank=rank, share=shared), refuse)  # type: ignore[arg-type]
    Workers.call_first(SimpleNamespace(rank=1, share=lambda problem: ["", ""]), refuse)  # type: ignore[arg-type]


def test_what_is_refused_changes_nothing(tmp_path):
    """Breaks when a run that is refused after it had the folder leaves a folder, a lock, or an earlier run moved."""
    with contextlib.suppress(UsageError), own_folder(tmp_path / "logs" / "x", WORKERS):
        raise UsageError("no such data")
    assert not list(tmp_path.iterdir())
    write_checkpoint(tmp_path / "x" / "model_1.pt")
    before = list_files(tmp_path)
    with contextlib.suppress(UsageError), own_folder(tmp_path / "x", WORKERS):
        raise UsageError("no such data")
    assert list_files(tmp_path) == before


def test_an_earlier_run_is_set_aside(tmp_path, capsys):
    """Breaks when a new run destroys an earlier one, takes a name in use, or does not own the new folder."""
    folder = tmp_path / "x"
    write_checkpoint(folder / "model_1.pt")
    (tmp_path / "x.1").symlink_to("nowhere")
    with own_folder(folder, WORKERS) as owner:
        owner.start_afresh()
        owner.start_afresh()  # an empty folder stays
        owner.confirm()
        assert set(list_files(folder)) == {".lock"} and set(list_files(tmp_path / "x.2")) == {"model_1.pt"}
    assert capsys.readouterr().out.count("x held an earlier run; it is now") == 1
    assert not folder.exists()


def test_folders_that_are_no_runs(tmp_path):
    """Breaks when a new run moves a foreign folder, or one with a living run further inside; or refuses a dead run."""
    (tmp_path / "data").mkdir()
    check_new_folder(tmp_path / "data")
    check_new_folder(tmp_path / "none")
    (tmp_path / "data" / "notes.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"data is not the folder of a run, it holds notes\.txt"):
        check_new_folder(tmp_path / "data")
    (tmp_path / "data" / "config.json").write_text("{}")
    check_new_folder(tmp_path / "data")
    with other_owner(tmp_path / "data" / "deep" / "inside"), pytest.raises(UsageError, match="inside is in use by"):
        check_new_folder(tmp_path / "data")
    check_new_folder(tmp_path / "data")


def test_a_new_run_gets_an_empty_folder(tmp_path, monkeypatch):
    """Breaks when a new run begins among the files of an earlier one, resuming sets them aside, or a run that only
    samples replaces the settings of the training.
    """
    settings = TrainSettings(**LIVING | {"logdir": str(tmp_path), "exp": "x", "cclass": False, "max_iter": 0})
    images = StoredImages("toy", draw_bytes(24, 1, 28, 28), None)
    monkeypatch.setattr("ebm.training.setup.open_dataset", lambda *arguments: images)
    state = make_state(label_size=0)
    checkpoint.save(tmp_path / "x" / "model_1.pt", state.get_shared_state())
    for resume_iter, expected in (("1", {"model_1.pt", "config.json"}), ("-1", {"config.json"})):
        chosen = dataclasses.replace(settings, resume_iter=resume_iter)
        with own_folder(settings.folder, WORKERS) as owner:
            open_run(chosen, WORKERS, owner)
        assert set(list_files(tmp_path / "x")) == expected
    assert set(list_files(tmp_path / "x.1")) == {"model_1.pt", "config.json"}
    chosen = dataclasses.replace(settings, resume_iter="1", train=False, exp="x.1", lr=1.0)
    before = list_files(tmp_path / "x.1")
    with own_folder(chosen.folder, WORKERS) as owner:
        open_run(chosen, WORKERS, owner)
    assert list_files(tmp_path / "x.1") == before


@pytest.mark.parametrize("changes", [{"resume_iter": "latest"}, {"quality": True, "dataset": "folder"}], ids=str)
def test_checks_come_before_effects(tmp_path, changes, monkeypatch):
    """Breaks when a damaged checkpoint, or samples that cannot be measured, are found after a folder has changed."""
    settings = TrainSettings(**LIVING | {"logdir": str(tmp_path), "exp": "x", "cclass": False} | changes)
    write_checkpoint(tmp_path / "x" / "model_1.pt", iteration=1)
    contents = bytearray((tmp_path / "x" / "model_1.pt").read_bytes())
    contents[len(contents) // 2] ^= 255
    (tmp_path / "x" / "model_1.pt").write_bytes(contents)
    images = StoredImages("folder", draw_bytes(24, 1, 28, 28), None)
    monkeypatch.setattr("ebm.training.setup.open_dataset", lambda *arguments: images)
    before = list_files(tmp_path)
    with pytest.raises(UsageError), own_folder(settings.folder, WORKERS) as owner:
        open_run(settings, WORKERS, owner)
    assert list_files(tmp_path) == before


# ---- branches ----


def go_on(folder, iteration, last, **settings):
    """Train from a checkpoint, or from the beginning, to this iteration, with a checkpoint after every other one."""
    state = make_state()
    state.batches = Batches(24, 3, seed=0)
    run = make_run(
        state, folder, **{"max_iter": last, "save_interval": 2, "log_interval": 1, "zero_kl": True} | settings
    )
    if iteration is not None:
        run.resume(checkpoint.find(folder, iteration))
    with own_folder(folder, run.workers) as owner:
        run.owner = owner
        train(run)
    return run


def test_an_earlier_iteration_is_resumed(tmp_path, monkeypatch, capsys):
    """Breaks when the checkpoints of a branch that was given up count as newer; when they, the log or the best model
    are lost; when a run that fails before it saves has moved something.
    """
    monkeypatch.setattr(checkpoint, "KEEP", 2)
    folder = tmp_path / "x"
    go_on(folder, None, 10)
    write_checkpoint(folder / "model_best.pt", iteration=5)
    for name in ("samples_10.png", "quality_2.json"):
        (folder / name).write_text("")
    assert checkpoint.list_iterations(folder) == [2, 8, 10]
    old = list_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go_on(folder, "2", 6, lr=1e-4)
    assert "abandoned_1" in list_files(folder)  # the first save was near
    for path in (folder / "abandoned_1").iterdir():
        path.rename(folder / path.name)
    (folder / "abandoned_1").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr("ebm.training.run.read_batch", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            go_on(folder, "2", 6, lr=1e-4)
    now = list_files(folder)
    assert {name: now[name] for name in old if "tensorboard" not in name} == {
        name: text for name, text in old.items() if "tensorboard" not in name
    }
    capsys.readouterr()
    go_on(folder, "2", 6, lr=1e-4)
    assert capsys.readouterr().out.count("went on from iteration 2; its later files are now in") == 1
    assert checkpoint.list_iterations(folder) == [2, 4, 6] and not (folder / "model_best.pt").exists()
    assert load_state(checkpoint.find(folder, "latest"))["flags"]["lr"] == 1e-4
    names = {"model_8.pt", "model_10.pt", "model_best.pt", "samples_10.png", LOG_NAME}
    assert list_files(folder / "abandoned_1") == {name: old[name] for name in names}
    assert read_series(folder, "e_pos")[0] == [1, 2, 3, 4, 5, 6]
    assert old[LOG_NAME].startswith(b"".join((folder / LOG_NAME).read_bytes().splitlines(True)[:2]))
    assert (folder / "quality_2.json").exists() and not list(folder.glob(".*"))


def test_a_branch_is_the_same_bit_for_bit(tmp_path):
    """Breaks when setting a branch aside changes what the resumed run learns or logs."""
    one, other = tmp_path / "one", tmp_path / "other"
    go_on(one, None, 6)
    go_on(other, None, 6)
    go_on(other, "2", 6)
    assert is_same_state(load_state(one / "model_6.pt"), load_state(other / "model_6.pt"))
    assert (one / LOG_NAME).read_bytes() == (other / LOG_NAME).read_bytes()
    assert set(list_files(other / "abandoned_1")) == {"model_4.pt", "model_6.pt", LOG_NAME}


def make_step(state, figure):
    images, zero = torch.rand(4, 1, 28, 28), torch.zeros(())
    energies = torch.full((4,), figure)
    energy = PreparedEnergy(state.model, state.model.prepare())
    return Step(
        images, images, images, None, None, energy, energies, energies, None, zero, zero, zero, zero, None, None
    )


def test_a_signal_saves_no_diverged_weights(tmp_path):
    """Breaks when a signal between two checks of the guard saves what has diverged, and the newest checkpoint is not
    that of the state that the run has returned to.
    """
    state = make_state()
    run = make_run(state, tmp_path / "x", max_iter=100)
    run.guard.remember(state)
    for iteration in (15, 30):
        state.iteration = iteration
        run.save()
    state.iteration = 34
    with torch.no_grad():
        state.model.stages["c1"].weight.fill_(float("nan"))
    run.signal = signal.SIGTERM
    with pytest.raises(SystemExit, match="143"):
        run.after(make_step(state, 0.1))
    newest = checkpoint.find(run.settings.folder, "latest")
    assert newest.name == "model_0.pt" and load_state(newest)["rollbacks"] == 1
    assert all(tensor.isfinite().all() for tensor in load_state(newest)["model"].values())
    assert set(list_files(tmp_path / "x" / "abandoned_1")) == {"model_15.pt", "model_30.pt"}


def test_a_signal_does_not_change_the_guard(tmp_path):
    """Breaks when the check before a save that a signal asks for becomes part of what the guard has seen."""
    state = make_state()
    run = make_run(state, tmp_path / "x", max_iter=100)
    before = dataclasses.replace(run.guard)
    state.iteration, run.signal = 34, signal.SIGTERM
    with pytest.raises(SystemExit):
        run.after(make_step(state, 0.1))
    assert run.guard == before and checkpoint.list_iterations(tmp_path / "x") == [34]


def test_branch_files(tmp_path):
    """Breaks when files of another kind, of TensorFlow's format or of an earlier iteration are taken or left."""
    names = [
        "model_5.pt",
        "model_7.pt",
        "model_7.index",
        "model_7.data-00000-of-00001",
        "model_7.meta",
        "model_best.pt",
    ]
    names += [
        "model_1000.pt",
        "samples_7.png",
        "quality_7.json",
        "config.json",
        "model_7",
        "train_gen_7.png",
        "model_x.pt",
    ]
    for name in names:
        (tmp_path / name).write_text("")
    later = {"model_7.pt", "model_7.index", "model_7.data-00000-of-00001", "model_7.meta", "model_1000.pt"}
    assert {path.name for path in list_branch_files(tmp_path, 6)} == later | {"samples_7.png", "quality_7.json"}
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "8").write_text("elsewhere")
    (tmp_path / "model_8.pt").symlink_to("store/8")
    (tmp_path / "abandoned_1").symlink_to("nowhere")
    assert set_aside_branch(tmp_path, 6, is_resumed=True) == tmp_path / "abandoned_2"
    assert (tmp_path / "abandoned_2" / "model_8.pt").read_text() == "elsewhere"
    assert set_aside_branch(tmp_path, 6, is_resumed=True) is None


# ---- the log ----

FOREIGN = [b"null", b"5", b"NaN", b"[1]", b'"text"', b'{"a": 1}', b'{"iteration": "x"}', b'{"iteration": null}', b""]
FOREIGN += [
    b'{"iteration": 2.5}',
    b'{"iteration": true}',
    b'{"iteration": -1}',
    b'{"iteration": 1e999}',
    b"\xff\xfe",
    b"\0",
]
FOREIGN += [b'{"iteration": 11, "e_p', b"[" * 100_000, b"7" * 10_000, b'{"iteration": ' + b"9" * 30 + b"}", b" \t "]
FOREIGN += [
    b"x" * (1 << 20) + b'{"iteration": 9}',
    b"x" * ((1 << 20) - 1),
    b'{"e_pos": 1, "iteration": 1' + b" " * (2 << 20),
]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[:20]))
def test_lines_that_are_none(tmp_path, line):
    """Breaks when a line that is no entry ends a run, is lost, or takes others with it."""
    path = tmp_path / LOG_NAME
    entries = [json.dumps({"iteration": n, "e_pos": n / 2}).encode() for n in range(6)]
    path.write_bytes(b"\n".join([*entries[:2], line, *entries[2:5], line, entries[5], b'{"iterat']))
    assert read_series(tmp_path, "e_pos") == ([0, 1, 2, 3, 4, 5], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    copy = io.BytesIO()
    copy_log(path, copy, 3)
    assert copy.getvalue() == b"\n".join([*entries[:2], line, *entries[2:4], line, b""])
    assert [entry["iteration"] for entry in read_log(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_values_that_are_no_numbers(tmp_path):
    """Breaks when a value of another type reaches a curve, or `nan`, which a diverged run logs, ends one."""
    values = ["1.5", "NaN", "null", '"x"', "[1]", "true", "9" * 400, "-Infinity", "2"]
    (tmp_path / LOG_NAME).write_text("".join(f'{{"iteration": {n}, "e": {v}}}\n' for n, v in enumerate(values)))
    assert read_series(tmp_path, "e")[0] == [0, 1, 7, 8]
    assert read_series(tmp_path / "none", "e") == ([], [])


def test_the_log_goes_on(tmp_path):
    """Breaks when an entry without its newline is lost or joined with the next, or a roll-back's history is cut out."""
    path = tmp_path / LOG_NAME
    lines = [f'{{"iteration": {n}}}\n' for n in (1, 2, 3, 0, 1, 2)]
    path.write_text("".join(lines)[:-1])
    log = RunLog(tmp_path, 2)
    log.write_event(3, {"a": 1})
    assert path.read_text() == "".join(lines) + '{"iteration": 3, "a": 1}\n'


# ---- other data than a run was started with ----


def test_other_classes(tmp_path):
    """Breaks when a conditional run goes on with the labels of other classes, or in another order than it knows."""
    for number, name in enumerate(("cat", "dog", "cat")):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("L", (28, 28), number).save(tmp_path / name / f"{number}.png")
    settings = TrainSettings(dataset="folder", data_path=str(tmp_path), cclass=True, data_workers=1)
    dataset = open_dataset(settings, work_alone(), ["dog", "bird", "cat"])
    assert dataset.labels is not None and dataset.labels.tolist() == [2, 2, 0] and dataset.label_size == 3
    with pytest.raises(UsageError, match="has the class 'dog', which is not one of cat, bird"):
        open_dataset(settings, work_alone(), ["cat", "bird"])
    assert open_dataset(dataclasses.replace(settings, cclass=False), work_alone(), ["bird"]).class_names == (
        "cat",
        "dog",
    )


def test_other_images(tmp_path):
    """Breaks when a run goes on with a data set that has lost images, or gained some, without a word."""
    said = []
    run = make_run(make_state(), tmp_path / "x", said)
    run.save()
    run.resume(tmp_path / "x" / "model_0.pt")
    assert not said
    run.dataset = StoredImages("toy", draw_bytes(20, 1, 28, 28), None)
    run.resume(tmp_path / "x" / "model_0.pt")
    assert said == [f"note: {tmp_path}/x/model_0.pt was trained on 24 images, and the data set has 20 now"]

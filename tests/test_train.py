"""train.py as a user runs it: every README spelling, resume bit for bit, bad input in one line, nothing overwritten."""

import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from conftest import ENVIRONMENT, GOLDEN, ROOT, SMALL_RUN, is_same_state, load_state, run_commands, run_python
from ebm.readers.tensorflow import read_tf_checkpoint
from ebm.support.experiments import SHIPPED


def train(logdir, *flags):
    return train_with(logdir, *SMALL_RUN, *flags)


def train_with(logdir, *flags):
    return run_python(ROOT / "train.py", f"--logdir={logdir}", *flags, cwd=logdir, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One uninterrupted run of 24 iterations, with everything it writes."""
    logdir = tmp_path_factory.mktemp("run")
    result = train(logdir, "--exp=whole", "--max_iter=24", "--save_interval=8", "--test_interval=12")
    assert result.returncode == 0, result.stderr
    return logdir, result.stdout


def test_what_a_run_leaves_behind(run):
    """Breaks when an output is missing, unnamed on the console, or lands outside the experiment's folder."""
    logdir, printed = run
    folder = logdir / "whole"
    assert [path.name for path in logdir.iterdir()] == ["whole"]
    for name in ("model_8.pt", "model_24.pt", "config.json", "log.jsonl"):
        assert (folder / name).exists()
    for name in ("samples_24.png", "curves.png", "pictures/train_gen_12.png", "pictures/val_gen_12.png"):
        assert (folder / name).stat().st_size > 1000
        assert str(folder / name) in printed
    assert "MnistNet" in printed
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "e_pos" in line]
    assert [line["iteration"] for line in steps] == [10, 20]
    assert {"e_pos", "e_neg", "loss_total", "x_grad", "x_off", "x_moved", "max_grad/c1/cweight"} <= set(steps[-1])
    histograms = {line["iteration"]: line["energy_histogram"] for line in lines if "energy_histogram" in line}
    assert set(histograms) == {12, 24}
    counts = {name: sum(values) for name, values in histograms[24].items() if name != "edges"}
    assert counts == {"data": 16, "negatives": 16, "long_chains": 20} and len(histograms[24]["edges"]) == 41
    assert sum("long_chain_e" in line and "long_chain_moved" in line for line in lines) == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["lr"] == 1e-3 and config["network"]["label_size"] == 10


def test_tensorboard_shows_the_run(run):
    """Breaks when TensorBoard lacks the settings of a run, or the pictures of a test or of the end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logdir, _ = run
    board = EventAccumulator(str(logdir / "whole/tensorboard"))
    board.Reload()
    assert "| batch_size | 16 |" in board.Tensors("settings")[0].tensor_proto.string_val[0].decode().split("\n")
    shown = {name: [event.step for event in board.Images(name)] for name in board.Tags()["images"]}
    assert shown == {"train_gen": [12, 24], "val_gen": [12, 24], "samples": [24]}
    last = (logdir / "whole/samples_24.png").read_bytes()
    assert board.Images("samples")[0].encoded_image_string == last


def test_resume_is_bit_for_bit(run):
    """Breaks when any setting, random stream, the optimizer, the buffer, the place in the epoch or the log is lost."""
    logdir, _ = run
    shutil.copytree(logdir / "whole", logdir / "halves")
    for name in ("model_16.pt", "model_24.pt"):
        (logdir / "halves" / name).unlink()
    resumed = train_with(logdir, "--exp=halves", "--resume_iter=latest")
    assert resumed.returncode == 0, resumed.stderr
    assert f"goes on from {logdir}/halves/model_8.pt with its settings\n" in resumed.stdout
    assert is_same_state(load_state(logdir / "whole" / "model_24.pt"), load_state(logdir / "halves" / "model_24.pt"))
    assert (logdir / "whole" / "log.jsonl").read_text() == (logdir / "halves" / "log.jsonl").read_text()


def test_classification_in_a_run(tmp_path):
    """Breaks when a joint training does not test, log and plot, or does not resume bit for bit with its settings."""
    flags = ["--classify=0.1", "--classify_scale=50", "--max_iter=20", "--save_interval=10", "--test_interval=10"]
    result = train(tmp_path, "--exp=joint", *flags)
    assert result.returncode == 0, result.stderr
    assert "iteration 20: 179 test images: accuracy " in result.stdout
    folder = tmp_path / "joint"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if {"loss_classify", "accuracy"} <= set(line)] == [10, 20]
    assert [line["iteration"] for line in lines if {"test_accuracy", "test_calibration_error"} <= set(line)] == [10, 20]
    log = (folder / "log.jsonl").read_text()
    whole = load_state(folder / "model_20.pt")
    (folder / "model_20.pt").unlink()
    resumed = train_with(tmp_path, "--exp=joint", "--resume_iter=latest")
    assert resumed.returncode == 0, resumed.stderr
    assert is_same_state(whole, load_state(folder / "model_20.pt")) and (folder / "log.jsonl").read_text() == log


def test_resume_on_another_kind_of_device(run, tmp_path):
    """Breaks when a GPU's checkpoint, whose generators have states of another size, does not go on on a CPU."""
    logdir, _ = run
    contents = load_state(logdir / "whole" / "model_24.pt")
    contents["workers"][0] |= {name: torch.zeros(16, dtype=torch.uint8) for name in ("generator", "cuda_generator")}
    (tmp_path / "gpu").mkdir()
    torch.save(contents, tmp_path / "gpu" / "model_24.pt")
    result = train(tmp_path, "--exp=gpu", "--max_iter=25", "--resume_iter=latest")
    assert result.returncode == 0, result.stderr
    assert "written on another kind of device: the noise starts anew" in result.stdout
    last = load_state(tmp_path / "gpu" / "model_25.pt")
    assert torch.equal(last["workers"][0]["buffer"]["images"][:384], contents["workers"][0]["buffer"]["images"])


def test_sample_only(run):
    """Breaks when --train=False trains on, does not sample, or takes longer chains than the run was given."""
    logdir, _ = run
    before = sorted((logdir / "whole").glob("model_*"))
    result = train_with(logdir, "--exp=whole", "--train=False", "--resume_iter=latest")
    assert result.returncode == 0, result.stderr
    assert "2 Langevin steps: " in result.stdout
    written = re.findall(r"^wrote (\S+)", result.stdout, re.MULTILINE)
    assert [path.rstrip("/").rpartition("/")[2] for path in written] == ["samples_24.png", "curves.png", "whole"]
    assert sorted((logdir / "whole").glob("model_*")) == before


@pytest.mark.slow
def test_quality(tmp_path):
    """Breaks when samples are not measured before, during and after training, or the best model is not kept."""
    result = train(tmp_path, "--exp=q", "--max_iter=4", "--test_interval=2", "--quality")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "q" / "log.jsonl").read_text().splitlines()]
    measured = {line["iteration"]: line["feature_distance"] for line in lines if "feature_distance" in line}
    assert set(measured) == {0, 2, 4}
    best = load_state(tmp_path / "q" / "model_best.pt")
    assert best["iteration"] == min(measured, key=measured.get) and best["best"] == {
        "classifier": min(measured.values())
    }
    assert "before training" in result.stdout and "other real images" in result.stdout
    for name in ("feature_precision", "feature_recall", "patch_distance", "tone_distance"):
        assert [line["iteration"] for line in lines if name in line] == [0, 2, 4]


def test_it_says_what_it_computes_in(run, tmp_path):
    """Breaks when energies are computed in another number type than a run says."""
    logdir, printed = run
    said = re.search(r"energies in (\w+)", printed)[1]
    for precision in ("float32", "bf16"):
        result = train(tmp_path, f"--exp={precision}", "--max_iter=8", f"--precision={precision}")
        assert result.returncode == 0 and f"energies in {precision}" in result.stdout, result.stderr
        same = is_same_state(
            load_state(logdir / "whole" / "model_8.pt")["model"],
            load_state(tmp_path / precision / "model_8.pt")["model"],
        )
        assert same == (precision == said)


def test_a_new_run_moves_the_old_one_aside(run):
    """Breaks when a second run with the same name destroys what the first one learnt."""
    logdir, _ = run
    (logdir / "twice").mkdir()
    (logdir / "twice" / "model_1.pt").write_bytes(b"precious")
    result = train(logdir, "--exp=twice", "--max_iter=1")
    assert result.returncode == 0, result.stderr
    assert (logdir / "twice.1" / "model_1.pt").read_bytes() == b"precious"
    assert "twice.1" in result.stdout


MISTAKES = {
    "--dataset=imagenot": "--dataset",
    "--cond_pos": "--cond_pos is for --dataset=dsprites",
    "--dataset=dsprites --cond_pos --cond_size": "exclude each other",
    "--dataset=dsprites --dpos_only --dsize_only": "exclude each other",
    "--large_model": "--large_model is for colour images",
    "--batch_size=5000": "batch",
    "--hmc --nozero_kl": "--hmc needs --zero_kl",
    "--cuda_graph --nozero_kl": "--cuda_graph is for Langevin steps alone",
    "--cuda_graph --device=cpu": "--cuda_graph needs a GPU",
    "--mismatch=1 --nocclass": "--mismatch contrasts labels",
    "--classify=1 --nocclass": "--classify needs classes",
    "--classify=1 --model_cclass": "--classify needs the classes of the data",
    "--classify=1 --dataset=dsprites --cond_pos": "--classify is for classes, and these labels of dsprites are quant",
    "--num_chains=300": "--num_chains=300 is more than the images of a --batch_size",
    "--dataset=folder": "--data_path",
    "--dataset=mnist --datadir=nothing --nodownload": "nothing",
    "--train=False": "--resume_iter",
    "--resume_iter=latest --exp=none": "no experiment folder",
    "--resume_iter=latest --exp=digits_cond": "digits_cond is a shipped model, weights without the state of a run",
    f"--logdir={SHIPPED}": "is kept for the shipped models",
}


def test_bad_input(tmp_path):
    """Breaks when a mistake is not answered by a line that names it, or leaves a file."""
    commands = {flags: [*SMALL_RUN, f"--logdir={tmp_path}", *flags.split()] for flags in MISTAKES}
    for flags, (_, error) in run_commands("train", commands, env=ENVIRONMENT).items():
        assert error is not None and MISTAKES[flags] in error and "\n" not in error, (flags, error)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line(tmp_path):
    """Breaks when a mistake ends in a traceback or in exit status 0."""
    result = train(tmp_path, "--cond_pos")
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_logdir_that_cannot_be_written(tmp_path):
    """Breaks when a run finds out after an hour that it cannot save."""
    (tmp_path / "file").write_text("")
    result = train(tmp_path, f"--logdir={tmp_path / 'file'}", "--max_iter=1")
    assert result.returncode == 2 and "--logdir" in result.stderr and result.stderr.count("\n") == 1


def test_resuming_another_network(run):
    """Breaks when the fields that differ are not named, or the checkpoint is loaded in part."""
    logdir, _ = run
    result = train(logdir, "--exp=whole", "--resume_iter=24", "--swish_act", "--num_filters=8")
    assert result.returncode == 2
    assert "num_filters: 4 → 8; swish_act: False → True; leave out --num_filters and --swish_act" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(tmp_path, number):
    """Breaks when a signal loses the iterations since the last save, or leaves with another status than usual."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--logdir={tmp_path}",
        *SMALL_RUN,
        "--exp=s",
        "--max_iter=100000",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as process:
        log = tmp_path / "s" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, printed
    (saved,) = (tmp_path / "s").glob("model_*.pt")
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert f"stopped by {name}; go on with --exp=s --logdir={tmp_path} --resume_iter=latest" in printed
    assert load_state(saved)["iteration"] >= 10


def test_no_space_left(tmp_path):
    """Breaks when a save that fails kills the run at once, or never; the earlier checkpoint must stay."""
    program = f"""
import errno, os, sys
sys.path.insert(0, {str(ROOT)!r})
import checkpoint
from ebm.support import cli
import train
from ebm.settings import TrainSettings
whole = checkpoint.save
def full(path, state):
    if "model_4" in path.name or state["iteration"] > 6:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    whole(path, state)
checkpoint.save = full
cli.run(train.main, TrainSettings, "")
"""
    flags = [f"--logdir={tmp_path}", "--exp=full", "--max_iter=40", "--save_interval=2", *SMALL_RUN]
    result = run_python("-c", program, *flags)
    assert result.returncode == 2
    assert "could not save" in result.stdout and "3 saves in a row failed" in result.stderr
    assert sorted(path.name for path in (tmp_path / "full").glob("model*")) == ["model_2.pt", "model_6.pt"]


def test_goes_on_from_a_published_checkpoint(tmp_path):
    """Breaks when a run does not start from a TF1 checkpoint's weights and iteration: Adam moves them a little."""
    shutil.copytree(GOLDEN / "tf_checkpoints/dsprites_cond_pos", tmp_path / "tf")
    flags = ["--exp=tf", "--dataset=dsprites", "--cond_pos", "--swish_act", "--num_filters=8", "--resume_iter=latest"]
    result = train(tmp_path, *flags, "--max_iter=8002", "--log_interval=1")
    assert result.returncode == 0, result.stderr
    assert "iterations: 8000 to 8002" in result.stdout
    kernel = read_tf_checkpoint(tmp_path / "tf" / "model_8000")["context_0/c1/cweight"]
    moved = load_state(tmp_path / "tf" / "model_8002.pt")["model"]["stages.c1.weight"] - kernel.transpose(3, 2, 0, 1)
    assert 0 < moved.abs().max() < 0.1 < kernel.std()
    result = train(tmp_path, *flags, "--max_iter=8002", "--noswish_act", "--num_filters=16", "--resume_iter=8000")
    assert result.returncode == 2 and "num_filters is 8 there and 16 here" in result.stderr


def diverge(tmp_path, *flags):
    result = train(tmp_path, "--exp=d", "--max_iter=150", "--lr=30", *flags)
    lines = [json.loads(line) for line in (tmp_path / "d" / "log.jsonl").read_text().splitlines()]
    return result, lines


@pytest.mark.slow
def test_guard_survives_a_learning_rate_that_diverges(tmp_path):
    """Breaks when a run that really blows up is not brought back, as with --noguard."""
    result, lines = diverge(tmp_path)
    assert result.returncode == 0, result.stderr
    assert any("rollback_from" in line for line in lines)
    assert abs(lines[-1]["e_pos"]) < 100
    (tmp_path / "d").rename(tmp_path / "guarded")
    _, lines = diverge(tmp_path, "--noguard")
    energies = [abs(line["e_pos"]) for line in lines if "e_pos" in line]
    assert max(energies) > 1e4 and statistics.median(energies) > 100


def test_guard_changes_nothing_in_a_healthy_run(run):
    """Breaks when watching draws random numbers or touches the weights."""
    logdir, _ = run
    result = train(logdir, "--exp=free", "--max_iter=24", "--save_interval=8", "--test_interval=12", "--noguard")
    assert result.returncode == 0, result.stderr
    watched, free = (load_state(logdir / name / "model_24.pt") for name in ("whole", "free"))
    assert watched["workers"][0].pop("guard")["suspicious"] == 0
    assert is_same_state(watched, free)


def test_injected_nan_is_rolled_back(tmp_path):
    """Breaks when one poisoned weight ends a run, or gets into a checkpoint."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from ebm.support import cli
import train
from ebm.settings import TrainSettings
step = train.train_step
def poisoned(state, *arguments):
    result = step(state, *arguments)
    if state.iteration == 15 and not hasattr(poisoned, "done"):
        poisoned.done = True
        with torch.no_grad():
            state.model.stages["c1"].weight[0] = float("nan")
    return result
train.train_step = poisoned
cli.run(train.main, TrainSettings, "")
"""
    flags = [f"--logdir={tmp_path}", "--exp=nan", "--max_iter=30", "--save_interval=16", *SMALL_RUN]
    result = run_python("-c", program, *flags)
    assert result.returncode == 0, result.stderr
    assert "diverged at iteration 16: weights not finite; back to iteration 0" in result.stdout
    for path in (tmp_path / "nan").glob("model_*.pt"):
        assert all(tensor.isfinite().all() for tensor in load_state(path)["model"].values())


def test_fp16_that_nobody_asked_for_is_given_up_first(tmp_path):
    """Breaks when a run that overflows in the fp16 it chose itself is slowed down, or goes on in fp16 for ever."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from ebm.support import cli
import train
import ebm.training.setup
from ebm.training.acceleration import Acceleration
from ebm.settings import TrainSettings
ebm.training.setup.choose_acceleration = lambda *arguments: Acceleration("fp16", asked=frozenset())
step = train.train_step
def overflown(state, *arguments):
    result = step(state, *arguments)
    return result._replace(e_neg=torch.full((1,), torch.inf)) if state.acceleration.precision == "fp16" else result
train.train_step = overflown
cli.run(train.main, TrainSettings, "")
"""
    flags = [f"--logdir={tmp_path}", "--exp=fp16", "--max_iter=12", *SMALL_RUN]
    result = run_python("-c", program, *flags)
    assert result.returncode == 0, result.stderr
    assert "energies in fp16" in result.stdout and "going on as with precision=tf32" in result.stdout
    assert "e_neg not finite; back to iteration 0, learning rate 0.001" in result.stdout
    assert load_state(tmp_path / "fp16" / "model_12.pt")["rollbacks"] == 0

"""What a run says before its first iteration, and what a signal does to an iteration."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import signal
from typing import Any

import pytest
import torch

import checkpoint
import sampling
from conftest import CONFIG, is_same_state, load_state, make_run, make_state
from data import Batches
from ebm.presets import PRESETS
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.training import estimate, setup
from ebm.training.acceleration import Acceleration
from ebm.training.distributed import work_alone
from ebm.training.estimate import MemoryHistory, check_cost, estimate_cost
from ebm.training.run import Run
from ebm.training.state import State
from train import train, train_step
from utils import ReplayBuffer

COLOUR: dict[str, Any] = {"network": "ResNet32Large", "image_shape": (3, 32, 32), "num_filters": 2}  # it has dropout


def make_colour_state() -> State:
    """Return the state of a run on 24 colour images, with a network that draws from torch's own generator."""
    torch.manual_seed(0)
    state = make_state(**COLOUR)
    state.batches, state.buffer = Batches(24, 4, seed=0), ReplayBuffer(100, COLOUR["image_shape"])
    return state


# ---- memory and time ----


def test_memory_history():
    """Breaks when memory is not counted while autograd keeps it, or counted twice or after it was freed."""
    with MemoryHistory() as history:
        x = torch.zeros(1000, requires_grad=True)  # 4 kB
        y = x.sin().view(10, 100).exp()  # sin and its view are one storage
        del y
        loss = x.cos().square().sum()  # square keeps cos
        peak = max(history.sizes)
        loss.backward()
    assert history.sizes[:4] == [0, 4000, 8000, 8000] and peak == 12_004  # x, its cosine, the square of that, the sum


@pytest.mark.parametrize("settings", [{"zero_kl": True}, {"num_steps": 4}, {"zero_kl": True, "num_chains": 3}])
def test_estimate_of_memory(settings):
    """Breaks when the memory of an iteration is not that of its tensors at their peak, to a tenth."""
    state, chosen = make_state(label_size=0), TrainSettings(batch_size=48, guard=False, **settings)
    expected = estimate_cost(train_step, state, chosen).memory
    images = torch.rand(48, 1, 28, 28)
    with MemoryHistory() as history:
        train_step(state, chosen, images, None, images[: chosen.num_chains].clone(), lambda: None)
    found = estimate.estimate_heap(chosen) * max(history.sizes)
    assert found == pytest.approx(expected, rel=0.1)


def test_estimate_of_classification():
    """Breaks when the estimate leaves out the energies of data under all classes, which a joint training computes."""
    chosen = TrainSettings(batch_size=48, guard=False, zero_kl=True, cclass=True, classify=1.0)
    expected = estimate_cost(train_step, make_state(), chosen).memory
    state, images, labels = make_state(), torch.rand(48, 1, 28, 28), torch.eye(3).repeat(16, 1)
    with MemoryHistory() as history:
        train_step(state, chosen, images, labels, images.clone(), lambda: None)
    assert estimate.estimate_heap(chosen) * max(history.sizes) == pytest.approx(expected, rel=0.1)
    plain = estimate_cost(train_step, make_state(), dataclasses.replace(chosen, classify=0.0)).memory
    assert expected > 1.5 * plain


def test_estimate_of_steps_that_differ():
    """Breaks when an operation that not every step has, such as the check of the first chain in fp16, ends the run."""
    chosen = TrainSettings(batch_size=48, guard=False, zero_kl=True)

    def step_unevenly(state, settings, images, *arguments):
        extra = [images.clone() for _ in range(4 - len(images))]
        return extra, train_step(state, settings, images, *arguments)

    expected = estimate_cost(train_step, make_state(label_size=0), chosen).memory
    state = make_state(label_size=0)
    assert estimate_cost(step_unevenly, state, chosen).memory == pytest.approx(expected, rel=0.3)
    state.acceleration = Acceleration("fp16", asked=frozenset())
    assert estimate_cost(train_step, state, chosen).memory == pytest.approx(expected, rel=0.1)


def test_estimate_of_time(monkeypatch):
    """Breaks when the time of a step on a few chains is extended wrongly to all chains and steps, or to the loss."""
    state, settings = make_state(), TrainSettings(batch_size=64, num_steps=10)
    trial = estimate.Trial(train_step, state, settings)
    # 0.1 s, 0.01 s for each chain in the loss and 0.02 s for each in a step
    monkeypatch.setattr(trial, "step", lambda chains, num_steps: 0.1 + chains * (0.01 + 0.02 * num_steps))
    for seconds in (0.01, 1.0, 100.0):  # from two chains to all of them
        monkeypatch.setattr(estimate, "TIMED", seconds)
        assert trial.estimate_seconds() == pytest.approx(0.1 + 64 * (0.01 + 0.02 * 10))


def test_estimate_changes_nothing():
    """Breaks when the estimate draws from a generator of the run, moves weights or vectors, or leaves gradients."""
    state = make_colour_state()
    before = [state.get_shared_state(), state.get_worker_state()]
    expected = [*(tensor.clone() for tensor in estimate.list_tensors(before))]
    estimate_cost(train_step, state, TrainSettings(batch_size=4, num_steps=2))
    found = estimate.list_tensors([state.get_shared_state(), state.get_worker_state()])
    assert all(map(torch.equal, expected, found)) and len(found) == len(expected)
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_remedies(monkeypatch):
    """Breaks when what does not fit is not refused in one line, or when a remedy is named that changes nothing.

    It also breaks when the time of a run whose steps will be compiled is said as if it were theirs.
    """
    check = functools.partial(check_cost, train_step, workers=work_alone(), stop=7)
    monkeypatch.setattr(estimate, "estimate_cost", lambda *words: estimate.Cost(100.0, 3_000_000_000))
    monkeypatch.setattr(estimate, "find_free_memory", lambda: 10**10)
    state, large, small = make_colour_state(), TrainSettings(), TrainSettings(zero_kl=True, batch_size=16, num_steps=5)
    lines = check(state, large, is_new=True).splitlines()
    assert lines[0] == "one iteration: about 2 min and 3 GB of memory; 7 iterations: about 12 min"
    assert lines[1].startswith("note: less time and memory: --preset=colour_cpu (")
    assert "--zero_kl (" in lines[1] and "--batch_size below 256" in lines[1]
    state.acceleration.compiled = True
    assert "(timed step by step and uncompiled" in check(state, large, is_new=True).splitlines()[0]
    assert "--preset" not in check(state, large, is_new=False)
    assert "zero_kl" not in check(state, small, is_new=True) and "batch_size" not in check(state, small, is_new=True)
    assert len(check(state, small, is_new=False).splitlines()) == 1
    monkeypatch.setattr(estimate, "find_free_memory", lambda: 2 * 10**9)
    with pytest.raises(
        UsageError, match=r"takes about 3 GB of memory, and 2 GB are free; try `preset`=colour_cpu.* or `zero_kl`.* or "
    ):
        check(state, large, is_new=True)
    with pytest.raises(UsageError, match=r"2 GB are free; a machine with more memory would hold it$"):
        check(state, small, is_new=False)
    state.iteration = 7
    assert check(state, large, is_new=False) == ""


# ---- settings and labels ----


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--preset=colour_cpu", "--lr=3e-4", "--noreplay_batch"],  # the defaults, over the preset's
        ["--noguard", "--data_path=my pictures/a", "--dataset=folder", "--compile"],
    ],
)
def test_printed_settings_make_the_same_run(words):
    """Breaks when the settings that a run prints, pasted as a command, are those of another run."""
    settings = cli.parse(["train.py", *words], TrainSettings)
    printed = cli.write_flags(settings)
    assert cli.parse(["train.py", *shlex.split(printed)], TrainSettings) == settings
    assert (printed == "") == (not words)


def test_labels_are_said():
    """Breaks when names of classes fill the screen, or their number is not told."""
    assert setup.list_some(("circle", "square")) == "circle, square"
    assert setup.list_some([f"class {k}" for k in range(1000)]).endswith("class 8, class 9, … (1,000 in all)")


# ---- signals ----


def train_colour(folder, last: int, number: int | None = None, step: int = 0, **settings) -> Run:
    """Train to an iteration, from the newest checkpoint if there is one; raise a signal at this Langevin step."""
    state = make_colour_state()
    chosen = {"num_steps": 5, "step_lr": 10.0, "replay_batch": True, "batch_size": 4, "save_interval": 100}
    run = make_run(state, folder, max_iter=last, **chosen | settings)
    if folder.exists():
        run.resume(checkpoint.find(folder, "latest"))
    steps, draw = 0, sampling.draw_noise

    def draw_and_raise(*words):
        nonlocal steps
        steps += 1
        if steps == step and number is not None:
            signal.raise_signal(number)
        return draw(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "draw_noise", draw_and_raise)
        train(run)
    return run


@pytest.mark.parametrize("settings", [{"zero_kl": True}, {}])
def test_a_signal_breaks_off_an_iteration(tmp_path, capfd, settings):
    """Breaks when a chain goes on after a signal, or when what it had drawn or moved stays in the state that is saved.

    The network draws from torch's own generator (dropout) and has vectors of the power iteration.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_colour(whole, 4, **settings)
    with pytest.raises(SystemExit, match="143"):
        train_colour(broken, 4, signal.SIGTERM, 5 + 5 + 3, **settings)
    assert checkpoint.list_iterations(broken) == [2]
    line = "SIGTERM: the run breaks off and undoes this iteration, saves and ends; SIGTERM again ends it at once\n"
    assert capfd.readouterr().err == line
    with pytest.raises(SystemExit, match="130"):
        train_colour(broken, 4, signal.SIGINT, 1, **settings)
    train_colour(broken, 4, **settings)
    assert is_same_state(*(load_state(folder / "model_4.pt") for folder in (whole, broken)))


def test_a_signal_while_the_weights_change(tmp_path, capfd):
    """Breaks when an iteration is broken off after its update has begun, or a signal before it is forgotten."""
    run = make_run(make_state(), tmp_path / "x", max_iter=9, batch_size=8)
    step = run.state.optimizer.step
    run.state.batches = Batches(24, 8, seed=0)
    run.state.optimizer.step = lambda: (signal.raise_signal(signal.SIGTERM), step())
    with pytest.raises(SystemExit, match="143"):
        train(run)
    assert checkpoint.list_iterations(tmp_path / "x") == [1] and "finishes this iteration" in capfd.readouterr().err


def test_a_broken_iteration_follows_a_diverged_one(tmp_path):
    """Breaks when the weights that are saved after a break were never checked."""
    run = make_run(make_state(), tmp_path / "x", max_iter=9, batch_size=8, zero_kl=True)
    run.state.batches, after = Batches(24, 8, seed=0), run.after

    def diverge(step):
        after(step)
        with torch.no_grad():
            run.state.model.stages["c1"].weight.fill_(float("nan"))
        run.signal = signal.SIGTERM

    run.after = diverge
    with pytest.raises(SystemExit, match="143"):
        train(run)
    assert load_state(checkpoint.find(tmp_path / "x", "latest"))["rollbacks"] == 1


def test_an_iteration_without_memory(tmp_path):
    """Breaks when a lack of memory in the middle of a training is a traceback, or names no remedy."""
    run = make_run(make_state(), tmp_path / "x", max_iter=9, batch_size=8)

    def fail():
        raise RuntimeError("could not create a primitive")

    run.state.batches, run.state.optimizer.step = Batches(24, 8, seed=0), fail
    with pytest.raises(UsageError, match="the memory does not hold iteration 1; try `zero_kl`"):
        train(run)


def test_presets_of_cpus_are_small():
    """Breaks when a preset for CPUs has the gradient through the chains, a wide network, or many chains."""
    for name in filter(lambda name: name.endswith("_cpu"), PRESETS):
        settings = cli.parse(["train.py", f"--preset={name}"], TrainSettings)
        chains = settings.num_chains or settings.batch_size
        assert settings.zero_kl and (settings.num_filters or CONFIG.num_filters) <= 64 and chains <= 32

"""The divergence guard: what it takes for a divergence, what it lets pass, and what it goes back to."""

import copy

import pytest
import torch

from conftest import SHAPE, make_model, make_state
from ebm.training.guard import USUAL, DivergenceGuard
from ebm.training.state import Step
from models import PreparedEnergy


def make_step(e_pos=0.1, e_neg=-0.1, samples=None, images=None):
    some = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(())
    e_pos, e_neg = torch.full((4,), float(e_pos)), torch.full((4,), float(e_neg))
    samples, images = some if samples is None else samples, some if images is None else images
    energy = PreparedEnergy(make_model(), {})
    return Step(
        images, some, samples, None, None, energy, e_pos, e_neg, None, zero, zero, e_pos.mean(), zero, None, None
    )


BOUNDS = (0.0, 1.0)
SATURATED = torch.ones(4, *SHAPE)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (make_step(e_pos=float("nan")), "e_pos not finite"),
        (make_step(e_neg=float("inf")), "e_neg not finite"),
        (make_step(e_pos=2e4, e_neg=2e4), "energies of"),
        (make_step(e_pos=200), "a gap"),
        (make_step(samples=SATURATED), "at the bounds"),
    ],
    ids=["nan", "inf", "energy", "gap", "saturated"],
)
def test_what_counts(step, words):
    """Breaks when one of the signs of divergence is not seen, or a passing one counts at once."""
    state, guard = make_state(), DivergenceGuard()
    causes = [guard.find_cause(state, step, BOUNDS) for _ in range(guard.patience)]
    assert words in causes[-1]
    if "finite" not in words:
        assert causes[:-1] == [None] * (guard.patience - 1)


def test_what_does_not_count():
    """Breaks when healthy figures, short excursions, or sprites (whose pixels are all at the bounds) set it off."""
    state, guard = make_state(), DivergenceGuard()
    for _ in range(10):
        assert guard.find_cause(state, make_step(), BOUNDS) is None
        assert guard.find_cause(state, make_step(samples=SATURATED, images=SATURATED), BOUNDS) is None
        assert guard.find_cause(state, make_step(samples=SATURATED), BOUNDS) is None


@pytest.mark.parametrize(
    ("usual", "then", "word"),
    [
        (make_step(0.2, 0.0), make_step(1.0001, 1.0), "flat"),
        (make_step(1e-3, 0.0), make_step(0.1001, 0.1), None),
        (make_step(0.1, 0.0), make_step(5.0, 4.9), "before"),
        (make_step(0.01, 0.0), make_step(0.9, 0.8), None),
        (make_step(9.0, 8.0), make_step(90.0, 80.0), None),
    ],
    ids=["flat", "always flat", "jump", "small", "always large"],
)
def test_what_is_usual(usual, then, word):
    """Breaks when a sudden jump of the energies, or their going flat, passes; or when a run's own habits do not count.

    Both were seen: sprites at a learning rate of 3e-2 jumped from 0.05 to 6 at iteration 1150, and were flat at 1200.
    """
    state, guard = make_state(), DivergenceGuard()
    assert guard.find_cause(state, then, BOUNDS) is None  # nothing is usual yet
    for _ in range(USUAL):
        assert guard.find_cause(state, usual, BOUNDS) is None
    causes = [guard.find_cause(state, then, BOUNDS) for _ in range(guard.patience)]
    assert causes[-1] is None if word is None else word in causes[-1]
    assert (causes[0] is not None) == (word == "before")  # a jump may be over by the next check, its harm stays


def test_weights_are_looked_at():
    """Breaks when a weight that is not finite stays unseen while the energies still look well."""
    state, guard = make_state(), DivergenceGuard()
    with torch.no_grad():
        state.model.stages["c1"].weight[0, 0, 0, 0] = float("nan")
    assert guard.find_cause(state, make_step(), BOUNDS) == "weights not finite"


def test_roll_back_restores_and_goes_further_back_each_time():
    """Breaks when a rollback leaves something of the diverged state, or returns to the same bad snapshot for ever."""
    state, guard = make_state(), DivergenceGuard()
    states = []
    for iteration in range(4):
        with torch.no_grad():
            state.model.stages["fc5"].b.fill_(iteration)
        state.buffer.push(torch.full((1, *SHAPE), iteration / 4))
        state.iteration = iteration
        guard.remember(state)
        states.append(copy.deepcopy(state.get_worker_state()["buffer"]["images"]))
    for expected in (3, 2, 1, 1):
        with torch.no_grad():
            state.model.stages["fc5"].b.fill_(float("nan"))
        state.buffer.push(torch.rand(3, *SHAPE))
        guard.roll_back(state)
        assert state.iteration == expected == state.model.stages["fc5"].b.item()
        assert torch.equal(state.get_worker_state()["buffer"]["images"], states[expected])

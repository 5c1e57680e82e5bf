"""MALA, and whether chains mix: Gaussians, a slope in a box, processes and samplers that are known."""

import json
import math

import numpy as np
import pytest
import torch

import sampling
from conftest import Planted, make_generator, make_sandbox, make_sandbox_run
from ebm.support import metrics
from ebm.support.errors import UsageError
from ebm.tasks import mixing
from ebm.tasks.examined_model import ExaminedModel
from models import ModelConfig

WIDE = (-9.0, 9.0)  # bounds that a chain of a narrow Gaussian never meets


def quadratic(curvature, centre=0.0):
    return lambda x: 0.5 * curvature * (x - centre).square().flatten(1).sum(1)


def run_mala(energy, x, steps, *, scale=1.0, **settings):
    """Return the images after each of so many moves, (steps, N, ...), and the share of accepted moves."""
    state, generator, places, accepted = sampling.evaluate_mala_state(energy, x), make_generator(), [], []
    for _ in range(steps):
        numbers = sampling.draw_hmc_move(x, generator)
        state, is_accepted = sampling.make_mala_move(energy, state, *numbers, scale=scale, **settings)
        places.append(state.x)
        accepted.append(is_accepted.double().mean())
    return torch.stack(places), torch.stack(accepted).mean().item()


def compute_acceptance(step):
    """The share of accepted moves of MALA with step size `step` on N(0, 1), by summation over a fine grid."""
    x = np.linspace(-7, 7, 1201)[:, None]
    y = x.T

    def propose(start, end):
        return np.exp(-((end - (1 - step / 2) * start) ** 2) / (2 * step)) / np.sqrt(2 * np.pi * step)

    there, back = np.exp(-(x**2) / 2) * propose(x, y), np.exp(-(y**2) / 2) * propose(y, x)
    cell = (x[1, 0] - x[0, 0]) ** 2
    return np.minimum(there, back).sum() * cell / np.sqrt(2 * np.pi)


# ---- MALA ----


@pytest.mark.parametrize("step", [0.1, 1.0, 2.5])
def test_mala_is_exact_where_langevin_steps_are_not(step):
    """Breaks when a proposal is weighed wrongly, so that a large step changes the variance, or too few are accepted.

    On N(0, 1), unadjusted steps of size h have the variance 1 / (1 − h/4): for h = 2.5 that is 2.67.
    """
    x = torch.randn(20_000, 1, generator=make_generator(1), dtype=torch.float64)
    settings = {"step_lr": step / 2, "noise_std": step**0.5}
    places, accepted = run_mala(quadratic(1.0), x, 40, bounds=(-60.0, 60.0), **settings)
    end = places[-1]
    assert end.mean().item() == pytest.approx(0, abs=0.03) and end.var().item() == pytest.approx(1, rel=0.04)
    assert (end**4).mean().item() == pytest.approx(3, rel=0.12)
    assert accepted == pytest.approx(compute_acceptance(step), abs=0.004)
    free = sampling.langevin(
        quadratic(1.0),
        x,
        num_steps=60,
        bounds=(-60.0, 60.0),
        gradient_first=True,
        generator=make_generator(),
        **settings,
    )
    assert free.var().item() == pytest.approx(1 / (1 - step / 4), rel=0.06)


def test_step_size_is_no_temperature():
    """Breaks when the factor of the step size, here another one for each chain, changes the density."""
    x, scale = torch.zeros(3, 4000, dtype=torch.float64), torch.tensor([0.25, 1.0, 2.0])
    # step_lr / noise_std² as for a temperature of 1/3: the variance is 1 / (3·2)
    places, _ = run_mala(
        lambda x: x.square().sum(1), x[:, :1], 4000, scale=scale, step_lr=0.15, noise_std=0.1**0.5, bounds=WIDE
    )
    for chain in places[500:, :, 0].T:
        assert chain.var().item() == pytest.approx(1 / 6, rel=0.15)


@pytest.mark.parametrize("slope", [0.0, 8.0])
def test_mala_in_a_box(slope):
    """Breaks when a chain leaves its box, or reflection at the walls is forgotten in the probability of a proposal.

    The density is proportional to exp(−slope·x) in [0, 1]; most of it is within a noise's reach of the wall.
    """
    x = torch.rand(20_000, 1, generator=make_generator(1), dtype=torch.float64)
    places, accepted = run_mala(lambda x: slope * x.sum(1), x, 60, step_lr=0.02, noise_std=0.2)
    assert places.min() >= 0 and places.max() <= 1 and accepted > 0.6
    edges = np.linspace(0, 1, 11)
    expected = np.diff(edges if slope == 0 else (1 - np.exp(-slope * edges)) / (1 - math.exp(-slope)))
    shares = np.histogram(places[-1].numpy(), edges)[0] / len(x)
    assert np.abs(shares - expected).max() < 0.012


def test_reflection():
    """Breaks when a value far outside does not come back, or mirror images are missing from the density.

    The density of reflected noise integrates to that of noise that nothing reflects.
    """
    values = torch.tensor([-0.1, 0.4, 1.3, 2.3, -1.6], dtype=torch.float64)
    expected = torch.tensor([0.1, 0.4, 0.7, 0.3, 0.4], dtype=torch.float64)
    torch.testing.assert_close(sampling.reflect_at_bounds(values, (0.0, 1.0)), expected)
    torch.testing.assert_close(sampling.reflect_at_bounds(3 * values - 1, (-1.0, 2.0)), 3 * expected - 1)
    y = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    std = torch.tensor(0.2, dtype=torch.float64)
    for mean in (0.0, 0.05, 0.5, 1.0):
        density = sampling.compute_reflected_density(y, torch.full_like(y, mean), std, (0.0, 1.0)).exp()
        assert torch.trapezoid(density, y[:, 0]).item() == pytest.approx(0.2 * math.sqrt(2 * math.pi), rel=1e-6)


# ---- figures of chains ----


def draw_process(rho, chains=4, draws=20_000):
    """Draw stationary chains of the process x' = rho·x + √(1 − rho²)·N(0, 1)."""
    rng = np.random.default_rng(0)
    x = np.empty((draws, chains))
    x[0] = rng.normal(size=chains)
    for k in range(1, draws):
        x[k] = rho * x[k - 1] + math.sqrt(1 - rho**2) * rng.normal(size=chains)
    return x.T


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.9])
def test_figures_of_a_process_that_is_known(rho):
    """Breaks when chains and draws are mixed up: N·(1 − rho)/(1 + rho) effective samples, a correlation of rho^lag."""
    values = draw_process(rho)
    figures = metrics.measure_chains(values)
    known = values.size * (1 - rho) / (1 + rho)
    assert figures.ess == pytest.approx(known, rel=0.1) and figures.tau == pytest.approx(values.size / known, rel=0.1)
    assert figures.rhat == pytest.approx(1, abs=0.005)
    correlation = metrics.compute_autocorrelation(values)
    assert correlation.shape == (20_000,) and correlation[0] == 1
    np.testing.assert_allclose(correlation[1:12], rho ** np.arange(1, 12.0), atol=0.03)


def test_chains_that_stay_apart():
    """Breaks when only the variance within chains counts: apart by 3 standard deviations, they are 4 samples or so."""
    values = draw_process(0.0, draws=1000) + 3 * np.arange(4)[:, None]
    figures = metrics.measure_chains(values)
    assert figures.rhat > 1.5 and figures.ess < 10
    # The variance of all is 1 + 9·var(0, 1, 2, 3), of which the latter part remains at every lag.
    assert metrics.compute_autocorrelation(values)[500] == pytest.approx(15 / 16, abs=0.03)
    halves = np.concatenate([np.zeros(500), np.full(500, 5.0)]) + draw_process(0.0, draws=1000)
    assert metrics.measure_chains(halves).rhat > 1.5
    still = np.arange(4.0)[:, None] + np.zeros((4, 50))
    assert metrics.measure_chains(still) == (None, None, None)
    assert (metrics.compute_autocorrelation(still) == 1).all()


# ---- the task ----


def make_run(energy, folder, *, step_lr, shape=(1, 4, 4), **settings):
    model = Planted(energy, ModelConfig("MnistNet", shape, 1, 0))
    box = ExaminedModel(model, make_generator(), step_lr=step_lr)
    return make_sandbox_run(box, folder, classes=0, chain_steps=2000, **settings)


@pytest.mark.parametrize("sampler", ["langevin", "mala"])
def test_a_sampler_that_mixes(sampler, tmp_path):
    """Breaks when the task judges a chain that mixes to be stuck, or samples another density than it says.

    The density exp(−800·E), 800 = 2·1 / 0.05², is a Gaussian of standard deviation 0.05 in the middle of the box.
    """
    run = make_run(lambda x, y: quadratic(0.5, 0.5)(x), tmp_path, step_lr=1.0, sampler=sampler, noise_scale=0.05)
    figures = mixing.measure_mixing(run).figures
    assert figures["verdict"].startswith("mixes: R-hat 1.00") and figures["factor of the energy"] == pytest.approx(800)
    row = figures["energy"]
    assert row["R-hat"] < 1.01 and row["effective samples"] > 400
    # A mean energy of half the temperature for each of 16 pixels. Langevin steps have a third of this here: one takes
    # half the way to the middle, so that the variance is 0.05²·0.5² / (1 − 0.5²).
    bias = 1 if sampler == "mala" else 1 / 3
    for place in ("from starts", "from images"):
        assert row[place] == pytest.approx(16 / 2 / 800 * bias, rel=0.05)
        assert figures["mean pixel"][place] == pytest.approx(0.5, abs=0.005)
    if sampler == "mala":
        assert figures["accepted"] == pytest.approx(mixing.WISHED_RATE, abs=0.08)
    assert np.load(tmp_path / "traces.npy").shape == (16, 2001, 5)
    assert {path.name for path in run.results.files} == {"traces.npy", "mixing.png", "images.png"}


@pytest.mark.parametrize("sampler", ["langevin", "mala"])
def test_a_sampler_that_is_stuck(sampler, tmp_path):
    """Breaks when chains that stay in the wells where they started are said to mix.

    Every pixel has wells at 0, 0.25, 0.5, 0.75 and 1, with walls of 100 times the temperature in between.
    """
    run = make_run(
        lambda x, y: 0.01 * torch.cos(8 * math.pi * (x - 0.125)).flatten(1).sum(1),
        tmp_path,
        step_lr=0.1,
        sampler=sampler,
        noise_scale=0.0064,
    )
    figures = mixing.measure_mixing(run).figures
    assert figures["verdict"].startswith("stuck: R-hat")
    assert figures["projection 1"]["R-hat"] > 1.5 and figures["projection 1"]["effective samples"] < 40


def test_verdicts():
    """Breaks when the worst quantity does not decide, or the limits are others than those of the literature."""

    def judge(*pairs):
        return mixing.judge_mixing({str(k): metrics.ChainFigures(*pair, 1.0) for k, pair in enumerate(pairs)}, 10_000)

    assert judge((1.004, 900.0), (1.0, 2345.0)) == "mixes: R-hat 1.004, 900 effective samples of 10,000"
    assert judge((1.0, 5000.0), (1.05, 900.0)).startswith("not mixed yet: R-hat 1.050, 900 ")
    assert judge((1.0, 5000.0), (1.0, 300.0)).startswith("not mixed yet: R-hat 1.000, 300 ")
    assert judge((None, None), (None, None)) == "stuck: the chains do not move"
    assert judge((None, None), (1.0, 5000.0)).startswith("mixes")  # a constant energy says nothing
    assert judge((3.2, 1.4), (1.0, 5000.0)) == "stuck: R-hat 3.20, 1.4 effective samples of 10,000"


def test_chains_of_one_class(tmp_path):
    """Breaks when chains of different classes, whose densities differ, are compared, or another class is taken."""
    box = make_sandbox("MnistNet", (1, 12, 12), 3)
    run = make_sandbox_run(box, tmp_path, chain_steps=60, limit=5, label="class 2")
    labels, images = mixing.choose_condition(run, 5)
    assert labels.tolist() == [[0, 0, 1]] * 5
    dataset = run.load("test")
    of_class = dataset.raw((dataset.labels == 2).nonzero()[:, 0])
    assert all((image == of_class).flatten(1).all(1).any() for image in (256 * images).floor())
    assert json.dumps(mixing.measure_mixing(run).figures, allow_nan=False)
    with pytest.raises(UsageError, match="`label`"):
        mixing.choose_condition(make_sandbox_run(box, tmp_path, label="horse"), 5)
    with pytest.raises(UsageError, match="not conditioned on classes"):
        free = make_sandbox("MnistNet", (1, 12, 12))
        mixing.choose_condition(make_sandbox_run(free, tmp_path, classes=0, label="horse"), 5)

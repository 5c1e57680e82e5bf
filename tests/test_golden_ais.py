"""Annealed importance sampling, with the random numbers of the reference: its weights, moves and end points."""

import numpy as np
import pytest
import torch

import models
from ebm.settings import AisSettings
from ebm.tasks import likelihood
from golden_cases import build_network, compute_share_of_rows, load_task

CASE, CONFIG, VARIABLES, _ = load_task("ais")
LEAST_SHARE = 0.75  # of the chains: rounding may decide about the acceptance of a move, after which a chain is another


class ReferenceDraws:
    """The random numbers of all moves of a case; it remembers the images before each move."""

    def __init__(self):
        self.velocities, self.uniforms = (np.random.RandomState(k + CONFIG["seed"]) for k in (5000, 6000))
        self.images = []

    def __call__(self, x):
        self.images.append(x)
        drawn = self.velocities.standard_normal(x.shape), self.uniforms.uniform(0, 1, len(x))
        return tuple(torch.from_numpy(array).float() for array in drawn)


def build_energy(run):
    """Return the energy of a run and the shape of an image: that of the script's Gaussian, or of a network."""
    if run["dataset"] == "gauss":
        settings = AisSettings(dataset="gauss", gauss_dim=run["gauss_dim"], temperature=run["temperature"])
        return likelihood.build_gauss(settings, torch.device("cpu")).energies["gauss"], (run["gauss_dim"],)
    network = build_network(CONFIG["net"], VARIABLES, **CONFIG["kw"])
    return models.freeze_energy(network, temperature=run["temperature"]), network.config.image_shape


def assert_numbers_agree(actual, expected):
    """Compare a number of each chain, relative to the largest."""
    close = np.abs(actual.numpy() - expected) <= 1e-4 * np.abs(expected).max()
    assert close.shape == expected.shape and close.mean() >= LEAST_SHARE


@pytest.mark.parametrize("run", CONFIG["runs"])
def test_annealing_is_that_of_the_reference(run):
    """Breaks when a weight, the step size of a move, its density or its order differ, in either direction."""
    settings, draws = CONFIG["runs"][run], ReferenceDraws()
    energy, shape = build_energy(settings)
    start = np.random.RandomState(7000 + CONFIG["seed"]).uniform(0, 1, CASE[f"{run}_x_rows"].shape[1:2] + shape)
    number = settings["pdist"]
    moves = {"num_distributions": number, "step_size": settings["alr"], "num_steps": CONFIG["hmc_steps"]}
    forward = likelihood.anneal(energy, torch.from_numpy(start).float(), draw=draws, **moves)
    back = likelihood.anneal(energy, forward.x, reverse=True, draw=draws, **moves)

    ends, rows = [*draws.images[1:], back.x], CASE[f"{run}_x_rows"]
    assert len(ends) == len(rows) == 2 * number
    for x, expected in zip(ends, rows, strict=True):
        images = x if x.dim() == 4 else x[:, None, None]
        assert compute_share_of_rows(images, expected, tolerance=1e-4) >= LEAST_SHARE
    shares = torch.cat([forward.acceptance, back.acceptance.flip(0)])
    assert np.abs(shares.numpy() - CASE[f"{run}_accepted"].mean(1)).max() <= 1 - LEAST_SHARE

    # The reference's Gaussian is normalised: its log density lacks this at alpha = 1.
    constant = shape[0] * np.log(2 * np.pi / settings["temperature"]) / 2 if settings["dataset"] == "gauss" else 0
    assert_numbers_agree(forward.log_weights, CASE[f"{run}_log_z_forward"] + constant)
    assert_numbers_agree(back.log_weights, CASE[f"{run}_log_z_reverse"] + constant)

"""Bounds of log Z and of the log-likelihood: densities whose integral is known, and the script on both kinds."""

import itertools
import json
import math

import pytest
import torch

import ais
import models
from conftest import make_model, run_commands, write_checkpoint
from ebm.tasks.likelihood import (
    SPILL,
    LogZBounds,
    Target,
    anneal,
    bound_log_z,
    compute_figures,
    compute_gauss_log_z,
    compute_wall_energy,
    draw_box_images,
    draw_gauss_samples,
    find_refuted_bounds,
)


def gaussian(precision, rescale):
    return lambda x: 0.5 * precision * (x - rescale / 2).square().sum(1)


def integrate(energy, rescale):
    """∫ exp(−E − walls) over one dimension, by summation over a fine grid."""
    x = torch.linspace(-0.1, rescale + 0.1, 400_001, dtype=torch.float64)[:, None]
    return (-energy(x) - compute_wall_energy(x, (0.0, rescale))).exp().sum().item() * (x[1] - x[0]).item()


@pytest.mark.parametrize(("precision", "rescale"), [(1.0, 1.0), (400.0, 0.1), (1e5, 1.0), (0.5, 8.0)])
def test_the_gaussian_is_known(precision, rescale):
    """Breaks when its closed form forgets a wall, or its exact samples are of another density."""
    energy = gaussian(precision, rescale)
    whole = integrate(energy, rescale)
    assert compute_gauss_log_z(3, precision, rescale) == pytest.approx(3 * math.log(whole), abs=1e-4)
    samples = draw_gauss_samples((100_000, 1), precision, rescale, torch.Generator().manual_seed(0))
    mean_energy = integrate(lambda x: energy(x) - energy(x).log(), rescale) / whole
    assert energy(samples).mean().item() == pytest.approx(mean_energy, rel=0.02)


def test_samples_of_the_box():
    """Breaks when chains do not start in the density whose volume the bounds count from."""
    assert integrate(lambda x: 0 * x[:, 0], 2.0) == pytest.approx(2 + SPILL, rel=1e-6)
    x = draw_box_images((400_000,), (0.0, 2.0), torch.Generator().manual_seed(0))
    for outside in (x[x < 0], 2 - x[x > 2]):
        assert len(outside) / len(x) == pytest.approx(SPILL / 2 / (2 + SPILL), rel=0.05)
        assert outside.square().mean().item() == pytest.approx(1 / (2 * 100**2), rel=0.05)
    assert x[(x > 0) & (x < 2)].var().item() == pytest.approx(4 / 12, rel=0.01)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_constant_energy_is_weighed_exactly(reverse):
    """Breaks when the weights do not telescope: exp(−c) integrates to exp(−c) times the volume, whatever the path."""
    x, counted = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), []
    annealed = anneal(
        lambda x: 0 * x.sum(1) + 7.0, x, num_distributions=4, step_size=0.005, reverse=reverse,
        progress=lambda: counted.append(1),
    )  # fmt: skip
    torch.testing.assert_close(annealed.log_weights, torch.full((3,), -7.0, dtype=torch.float64))
    assert len(counted) == 4 and annealed.acceptance.shape == (4,) and not torch.equal(annealed.x, x)


@pytest.mark.parametrize(
    ("precision", "numbers", "exact"),
    [(300.0, (10, 30, 90), True), (1e4, (50, 150), False)],
    ids=["from exact samples", "from where the chains end"],
)
def test_the_bounds_bracket_a_gaussian_and_close(precision, numbers, exact):
    """Breaks when a bound is on the wrong side of the known answer, or more distributions do not tighten it.

    A narrow Gaussian is reached by the chains in so many moves: then the reverse run may start where they end.
    """
    shape = (32, 12)
    known, gaps = compute_gauss_log_z(12, precision, 1.0), []
    samples = draw_gauss_samples(shape, precision, 1.0, torch.Generator().manual_seed(1)) if exact else None
    for number in numbers:
        bounds_of_class = bound_log_z(
            gaussian(precision, 1.0), shape, num_distributions=number, step_size=0.012, samples=samples,
            seed=0, device=torch.device("cpu"),
        )  # fmt: skip
        assert (
            bounds_of_class.lower + bounds_of_class.lower_error
            < known
            < bounds_of_class.upper - bounds_of_class.upper_error
        )
        assert bounds_of_class.acceptance.mean() > 0.8 and bounds_of_class.reverse_acceptance.mean() > 0.8
        gaps.append(bounds_of_class.upper - bounds_of_class.lower)
    assert all(wide > 1.5 * narrow for wide, narrow in itertools.pairwise(gaps))


def test_parts_draw_the_same_numbers():
    """Breaks when chains that are shared out to workers draw other numbers, so that a figure depends on the workers."""
    settings = {"num_distributions": 3, "step_size": 0.012, "seed": 5, "device": torch.device("cpu")}
    samples = draw_gauss_samples((7, 4), 300.0, 1.0, torch.Generator().manual_seed(1))
    whole, parts = (bound_log_z(gaussian(300.0, 1.0), (7, 4), parts=n, samples=samples, **settings) for n in (1, 3))
    assert (parts.lower, parts.upper_error) == pytest.approx((whole.lower, whole.upper_error), rel=1e-5)
    torch.testing.assert_close(parts.acceptance, whole.acceptance)
    torch.testing.assert_close(parts.reverse_acceptance, whole.reverse_acceptance)


def test_bits_per_dimension_in_closed_form():
    """Breaks when rescale or the 256 values of a byte enter wrongly: a uniform density has 8 bits, and the walls' few.

    A class with an energy lower by log 2 has twice the integral; the figures are means over the images.
    """
    uniform = 5 * math.log(2 + SPILL)
    bounds_by_class = {
        f"class {c}": LogZBounds(
            uniform + c * math.log(2), 3.0, uniform + c * math.log(2) + 5, 1.0, *2 * (torch.ones(2),)
        )
        for c in (0, 1)
    }
    values = torch.tensor([0.0, -math.log(2), -math.log(2), -math.log(2)])
    share = {"class 0": 0.25, "class 1": 0.75}
    figures = compute_figures(Target({}, (5,), share, values, None, 2.0, 0.01, {}), bounds_by_class)
    expected = 8 + math.log2(1 + SPILL / 2)
    assert figures["bits/dim ≥"] == pytest.approx(expected)
    assert figures["bits/dim ≤"] == pytest.approx(expected + 1 / math.log(2))
    assert figures["log Z ≥"] == pytest.approx(uniform + 0.75 * math.log(2))
    assert figures["error"] == pytest.approx(3 * math.hypot(0.25, 0.75)) and figures["accepted"] == 1


def run_ais(folder, commands):
    """Run ais.py with the words of each command in one process; return the report of each by the folder's name."""
    common = [f"--logdir={folder}/out", f"--modeldir={folder}"]
    done = run_commands("ais", {name: [*common, *words.split()] for name, words in commands.items()})
    assert not [error for _, error in done.values() if error]
    return {
        name: (printed, json.loads((folder / "out" / name / "ais/ais.json").read_text()))
        for name, (printed, _) in done.items()
    }


def test_script_on_gaussians(tmp_path):
    """Breaks when a known density wants a model, its dimensions or step size are others, or figures are not found."""
    density = "--temperature=300 --pdist=3,9"
    done = run_ais(tmp_path, {"gauss": f"--dataset=gauss --gauss_dim=7 {density}", "2d": f"--dataset=2d {density}"})
    for name, dimensions, alr in [("gauss", 7, 0.0085), ("2d", 2, 0.0045)]:
        printed, found = done[name]
        assert found["log Z"] == pytest.approx(compute_gauss_log_z(dimensions, 300.0, 1.0)) and found["alr"] == alr
        assert set(found["bounds"]) == {"pdist 3", "pdist 9"}
        assert all(row["log Z ≥"] < found["log Z"] < row["log Z ≤"] for row in found["bounds"].values())
        assert found["files"] == ["ais.json", "ais.png"] and found["complete"]
        assert (tmp_path / f"out/{name}/ais/ais.png").exists() and f"{name}/ais/ais.png" in printed


def test_script_on_a_model(tmp_path):
    """Breaks when the range or temperature of training is forgotten, or classes share one log Z.

    The network's last layer is 0 but for a bias: at temperature 3 the energy is 3·0.5 for every image and class.
    """
    model = make_model(models.ModelConfig("MnistNet", (1, 28, 28), num_filters=4, label_size=10))
    with torch.no_grad():
        model.stages["fc5"].weight.zero_()
        model.stages["fc5"].b.fill_(0.5)
    flags = {"dataset": "digits", "temperature": 3.0, "rescale": 2.0}
    write_checkpoint(tmp_path / "digits" / "model_1.pt", model, flags=flags)
    common = "--exp=digits --batch_size=2"
    _, found = run_ais(tmp_path, {"digits": f"{common} --pdist=2 --limit=3"})["digits"]
    assert found["−T·E of test images"] == pytest.approx(-1.5) and found["rescale"] == 2 and found["alr"] == 0.0065
    bounds, exact = found["bounds"]["pdist 2"], 8 + math.log2(1 + SPILL / 2)
    assert bounds["bits/dim ≥"] == pytest.approx(exact, abs=1e-6) == bounds["bits/dim ≤"]
    assert 1 < len(found["by class"]["pdist 2"]) <= 3
    printed, found = run_ais(tmp_path, {"digits": f"{common} --pdist=1,2 --label=4 --limit=5"})["digits"]
    assert found["images"].endswith("test images of digits, class 4") and "5 of " in printed
    assert all(set(by_class) == {"class 4"} for by_class in found["by class"].values())
    assert found["bounds"]["pdist 1"]["bits/dim ≥"] == pytest.approx(exact, abs=1e-6)
    wrong = run_commands(
        "ais", {"wrong": [f"--logdir={tmp_path}/out", f"--modeldir={tmp_path}", "--exp=digits", "--label=x"]}
    )
    assert "`label`" not in wrong["wrong"][1] and "--label" in wrong["wrong"][1]


def test_refuted_bounds():
    """Breaks when an upper bound that another row's lower bound exceeds, by more than the errors, is not noticed."""

    def row(lower, upper, error):
        return {"log Z ≥": lower, "log Z ≤": upper, "error": error}

    rows = {"pdist 1": row(-9.0, -7.5, 0.4), "pdist 2": row(-8.0, -6.5, 0.4), "pdist 3": row(-6.0, -5.0, 0.3)}
    assert find_refuted_bounds(rows) == ["pdist 1"]
    assert find_refuted_bounds({"pdist 1": row(-9.0, -10.0, 1.0)}) == []


def test_the_plot_shows_how_the_bounds_close(tmp_path, monkeypatch):
    """Breaks when bits per dimension are missing from the plot of a model, or bounds are swapped."""
    panels = {}
    monkeypatch.setattr(ais.pictures, "plot_lines", lambda found, *_, **__: panels.update(found))
    names = ("log Z ≥", "log Z ≤", "bits/dim ≥", "bits/dim ≤", "accepted", "accepted back")
    rows = {f"pdist {n}": dict(zip(names, (-9.0, 9.0 / n, 1.0, 5.0 / n, 0.9, 0.8), strict=True)) for n in (1, 3)}
    ais.plot_bounds({"bounds": rows}, [1, 3], tmp_path / "ais.png")
    assert list(panels) == ["log Z / nats", "bits per dimension", "share of accepted moves"]
    assert panels["bits per dimension"] == {
        "upper bound": ([1, 3], [5.0, 5.0 / 3]),
        "lower bound": ([1, 3], [1.0, 1.0]),
    }
    assert panels["log Z / nats"]["upper bound"] == ([1, 3], [9.0, 3.0])

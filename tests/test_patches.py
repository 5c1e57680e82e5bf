"""The distances of patches and tones against closed forms, and their ranking of degraded images."""

import importlib
import math

import pytest
import torch

import data
from conftest import ROOT, draw_bytes, make_generator
from ebm.measures import features, patches
from ebm.measures.features import RealImages
from ebm.measures.patches import build_pyramid, compute_patch_statistics, compute_tones, measure_patches
from ebm.support import metrics


def test_quantiles_by_hand():
    """Breaks when a level or a column is lost: of 1, 2, 3, 4 the levels 1/4 and 3/4 are 2 and 4, whatever the order."""
    values = torch.tensor([[3.0, 30], [1, 40], [4, 10], [2, 20]])
    assert metrics.compute_quantiles(values, 2).tolist() == [[2, 20], [4, 40]]
    assert metrics.compute_quantiles(values, 8)[:, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_wasserstein_distance_of_two_gaussians():
    """Breaks when quantiles are not at the middle of their intervals: W1 of N(0, 1) and N(1, 1) is 1, of N(0, 1) and
    N(0, 2²) it is √(2/π).
    """
    points = torch.randn(200_000, 1, generator=make_generator(), dtype=torch.float64)
    quantiles = [metrics.compute_quantiles(part, 512) for part in (points, points + 1, 2 * points)]
    assert (quantiles[1] - quantiles[0]).abs().mean().item() == pytest.approx(1)
    assert (quantiles[2] - quantiles[0]).abs().mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)


def test_total_variation_by_hand():
    """Breaks when the sum is not halved: half of the mass moves, then all of it."""
    first = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    second = torch.tensor([[0.5, 0.25, 0.25], [0, 0, 1]])
    assert metrics.total_variation(first, second).tolist() == [0.5, 1]


def test_tones_are_equal_bins_of_bytes():
    """Breaks when a tone is no range of 8 bytes, or channels are mixed."""
    images = torch.tensor([7, 8, 255, 0], dtype=torch.uint8).view(1, 2, 1, 2)
    tones = compute_tones(images)
    assert tones.shape == (2, 32) and tones.sum(1).tolist() == [1, 1]
    assert [tones[0, 0], tones[0, 1], tones[1, 31], tones[1, 0]] == [0.5] * 4


@pytest.mark.parametrize("shape", [(1, 7, 7), (1, 28, 28), (3, 32, 45), (3, 128, 100)])
def test_equal_sets_are_at_distance_0(shape):
    """Breaks when the order of images counts, a size breaks the pyramid, or floats become other bytes than the data."""
    images = draw_bytes(6, *shape)
    real = compute_patch_statistics(images)
    assert len(real.filters) == {7: 1, 28: 3, 32: 3, 128: 4}[shape[1]]
    assert measure_patches(images.flip(0), real) == pytest.approx({"patch_distance": 0, "tone_distance": 0}, abs=1e-6)
    assert measure_patches((images + 0.5) / 256, real)["tone_distance"] == 0


def test_pyramid_adds_up():
    """Breaks when a level loses what no other one has: enlarged and added, the levels are the images."""
    images = torch.rand(2, 3, 28, 45, generator=make_generator())
    first, second, last = build_pyramid(images)
    assert first.shape == images.shape and second.shape[2:] == (14, 23) and last.shape[2:] == (7, 12)
    for level in (second, first):
        last = level + torch.nn.functional.interpolate(last, level.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(last, images)


def test_patch_distance_of_shifted_images():
    """Breaks when directions are not unit vectors or the level's deviation does not divide: a patch of 49 pixels that
    are all c brighter moves by 7c along its mean; along a random direction by 7c·E|w₁| = 7c·Γ(49/2) / (√π Γ(25)).
    """
    images = draw_bytes(400, 1, 7, 7) // 2
    real, deviation = compute_patch_statistics(images), (images / 255).std(correction=0).item()
    along = math.exp(math.lgamma(49 / 2) - math.lgamma(25)) / math.sqrt(math.pi)
    expected = 7 * (51 / 255) * along / deviation
    assert measure_patches(images + 51, real)["patch_distance"] == pytest.approx(expected, rel=0.15)


def test_contrast_counts():
    """Breaks when each set is divided by its own deviation, as in the paper: half the contrast is then no difference.

    A filter's responses to (x + 255/2)/2 are half as far from their mean, so that the distance is half their mean size.
    """
    images = draw_bytes(500, 1, 7, 7)
    real = compute_patch_statistics(images)
    (responses,) = real.quantiles
    expected = (responses - responses.mean(0)).abs().mean().item() / 2
    assert measure_patches(images / 510 + 0.25, real)["patch_distance"] == pytest.approx(expected, rel=0.05)


def test_constant_images_are_measured():
    """Breaks when a level without any variation divides by 0."""
    black = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    figures = measure_patches(black + 255, compute_patch_statistics(black))
    assert math.isfinite(figures["patch_distance"]) and figures["patch_distance"] > 10
    assert figures["tone_distance"] == 1


def make_reference(images):
    return RealImages.choose("toy", "train", [data.StoredImages("toy", images, None)], 100)


def test_patch_statistics_are_computed_once(tmp_path, monkeypatch, capsys):
    """Breaks when they are computed again, taken from a file of other choices, or a damaged file is fatal."""
    reference = make_reference(draw_bytes(20, 1, 14, 14))
    first = features.load_or_compute_patches(reference, tmp_path, most=10)
    monkeypatch.setattr(features, "compute_patch_statistics", lambda images: pytest.fail("it was stored"))
    again = features.load_or_compute_patches(reference, tmp_path, most=10)
    assert measure_patches(reference.take(10), again) == measure_patches(reference.take(10), first)
    monkeypatch.undo()

    monkeypatch.setitem(patches.CHOICES, "directions", 3)
    assert len(features.load_or_compute_patches(reference, tmp_path, most=10).filters[0]) == 3
    monkeypatch.undo()
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    capsys.readouterr()
    assert torch.equal(features.load_or_compute_patches(reference, tmp_path, most=10).tones, first.tones)
    assert "is damaged and is computed again" in capsys.readouterr().out


def test_other_real_images_are_others():
    """Breaks when the images of a reference that are measured are among those of its statistics."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    reference = make_reference(images)
    parts = [reference.take(15), reference.take(15, start=15), reference.take(15, start=30)]
    assert torch.equal(torch.cat(parts).flatten().sort().values, images.flatten()) and len(parts[2]) == 10


@pytest.mark.slow
def test_degraded_images_are_ranked(monkeypatch, tmp_path):
    """Breaks when a stronger degradation of digits is nearer to the data, real digits are not the nearest, or noise
    fitted to the classifier's features, which its distance takes for digits, is nearer than mild degradations.
    """
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    measures = importlib.import_module("measures")
    settings = measures.Settings(dataset="digits", samples=200, fit_steps=(60,), logdir=str(tmp_path))
    rows, _ = measures.measure_sets(settings, data.load_dataset("digits"))
    verdicts = measures.judge_measures(rows)
    assert verdicts["patch_distance"]["wrong"] == []
    assert verdicts["feature_distance"]["wrong"] != []

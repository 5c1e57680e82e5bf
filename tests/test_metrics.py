"""Metrics against closed forms and sums done by hand, and the classifier distance on digits."""

import math

import numpy as np
import pytest
import torch

import data
from conftest import draw_sides
from ebm.measures.classifier import train_feature_classifier
from ebm.measures.features import Classifier, prepare_distance
from ebm.support import metrics
from ebm.support.errors import UsageError
from ebm.support.metrics import frechet_distance, mean_and_covariance


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance_of(one: torch.Tensor, other: torch.Tensor) -> float:
    return frechet_distance(*mean_and_covariance(one), *mean_and_covariance(other))


def test_frechet_distance_of_diagonal_gaussians() -> None:
    """Red if a term is lost: here it is |mean|² + Σ (σ_a - σ_b)²."""
    sigma_a, sigma_b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.5, 1.0])
    shift = torch.tensor([1.0, -2.0, 0.5])
    distance = frechet_distance(torch.zeros(3), sigma_a.square().diag(), shift, sigma_b.square().diag())
    assert distance == pytest.approx(1 + 4 + 0.25 + 4 + 2.25 + 1)


def test_frechet_distance_where_the_covariances_do_not_commute() -> None:
    """Red if the root of AB is replaced by one of a product taken elementwise or of the traces; 2x2 closed form."""
    a = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    trace_of_root = math.sqrt((a @ b).trace() + 2 * math.sqrt(a.det() * b.det()))  # Cayley-Hamilton for 2x2
    distance = frechet_distance(torch.zeros(2), a, torch.zeros(2), b)
    assert distance == pytest.approx(4 + 5 - 2 * trace_of_root, rel=1e-12)


def test_frechet_distance_with_fewer_samples_than_features() -> None:
    """Red if singular covariances break the root: a copy is at 0, a shifted copy at the square of the shift."""
    features = normal(10, 64)
    assert distance_of(features, features) == pytest.approx(0, abs=1e-6)
    assert distance_of(features, features + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)


def test_frechet_distance_uses_the_unbiased_covariance() -> None:
    """Red if the covariance divides by N: the variances are 2 and 8, of (-1, 1) and (-2, 2)."""
    distance = distance_of(torch.tensor([[-1.0], [1.0]]), torch.tensor([[-2.0], [2.0]]))
    assert distance == pytest.approx(2)


def test_mean_and_covariance_of_many_features() -> None:
    """Red if a block of them is lost or centred by a mean of its own; against numpy."""
    features = (normal(10_003, 3) + torch.linspace(0, 5, 10_003)[:, None]).float()
    mean, covariance = mean_and_covariance(features)
    assert mean.numpy() == pytest.approx(features.double().mean(0).numpy())
    assert covariance.numpy() == pytest.approx(np.cov(features.double().numpy(), rowvar=False))


def test_frechet_distance_of_diverged_features_is_nan() -> None:
    """Red if a NaN stops the training loop that prints the distance, or becomes a number."""
    features = normal(8, 3)
    assert math.isnan(distance_of(features, features.where(features < 1, math.nan)))


def test_kernel_distance_by_hand() -> None:
    """Red if the kernel, its diagonal or the weights are wrong; D = 1, so k(x, y) = (xy + 1)³."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    within_a, within_b, across = 1, 27, (1 + 1 + 8 + 27) / 4
    assert metrics.kernel_distance(a, b, block=1) == pytest.approx(within_a + within_b - 2 * across)


def test_kernel_distance_divides_by_the_dimension_and_ignores_the_block_size() -> None:
    """Red if x·y is not divided by D, or if a block is lost."""
    a, b = normal(7, 4), normal(5, 4, seed=1)
    repeated = metrics.kernel_distance(a.repeat(1, 3), b.repeat(1, 3), block=3)
    assert repeated == pytest.approx(metrics.kernel_distance(a, b), rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    """Red if the diagonal is counted: the mean over many small pairs of sets is then far above 0."""
    values = [metrics.kernel_distance(normal(10, 3, seed=s), normal(10, 3, seed=s + 500)) for s in range(500)]
    standard_error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error < 0.2


def test_precision_and_recall_by_hand() -> None:
    """Red if a point counts as its own neighbour, or if the two are swapped; k = 1 on a line.

    Real balls: 0 ± 1, 1 ± 1, 3 ± 2 cover [-1, 5]; fake balls: 2 ± 0.5, 2.5 ± 0.5, 9 ± 6.5 cover [1.5, 15.5].
    """
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.0], [2.5], [9.0]])
    for block in (1, 1024):
        assert metrics.precision_recall(real, fake, k=1, block=block) == pytest.approx((2 / 3, 1 / 3))


def test_precision_and_recall_of_fewer_points_than_neighbours() -> None:
    """Red if a test of two samples ends a training run: the ball of 0 reaches to 2, its farthest neighbour."""
    assert metrics.precision_recall(torch.tensor([[0.0], [2.0]]), torch.tensor([[-1.5], [7.0]])) == (0.5, 1)


def test_precision_and_recall_of_far_and_equal_sets() -> None:
    """Red if the radius is not the set's own: far sets share nothing, a set covers itself."""
    features = normal(50, 8)
    assert metrics.precision_recall(features, features + 100) == (0, 0)
    assert metrics.precision_recall(features, features) == (1, 1)


def test_inception_score_of_planted_predictions() -> None:
    """Red if 0·log 0 is not 0 or the marginal is wrong: K for sure and even predictions, 1 for constant ones."""
    sure = torch.eye(10).repeat(20, 1)
    assert metrics.inception_score(sure, splits=4) == pytest.approx((10, 0))
    assert metrics.inception_score(torch.full((40, 10), 0.1), splits=2) == pytest.approx((1, 0))


def test_inception_score_splits_are_consecutive() -> None:
    """Red if the marginal is taken over all splits: one class each gives 1, two classes give 2, mean 1.5, std 0.5."""
    one, two = torch.eye(4)[[0, 0, 0, 0]], torch.eye(4)[[0, 1, 0, 1]]
    assert metrics.inception_score(torch.cat([one, two]), splits=2) == pytest.approx((1.5, 0.5))


def test_detection_by_hand() -> None:
    """Red if in and out are swapped: of 3·2 pairs the in-score wins 3 and ties 1; the precisions are 1, 2/3, 3/5."""
    inside, outside = [3.0, 2.0, 1.0], [1.0, 2.5]
    assert metrics.auroc(inside, outside) == pytest.approx(3.5 / 6)
    assert metrics.aupr(inside, outside) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_fpr_at_95_tpr() -> None:
    """Red if the threshold keeps 94 or 96 of 100 in-scores: keeping 95 means >= 5, where 3 of 4 out-scores pass."""
    assert metrics.fpr_at_95_tpr(np.arange(100.0), [4.5, 5.0, 5.5, 200.0]) == pytest.approx(0.75)
    assert metrics.fpr_at_95_tpr([2.0, 3.0], [0.0, 1.0]) == 0


def test_scores_that_are_not_finite_are_named() -> None:
    """Red if a diverged model's energies reach scikit-learn, whose error says nothing of the model."""
    with pytest.raises(UsageError, match="diverged"):
        metrics.auroc([1.0, math.nan], [0.0])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 20), (3, 70, 65)])
def test_classifier_learns_any_size_and_colour(shape: tuple[int, int, int]) -> None:
    """Red if a size breaks the stages, or if training does not learn a plain difference."""
    classifier = train_feature_classifier(*draw_sides(200, shape))
    assert classifier.accuracy == 1
    assert Classifier(classifier)(torch.rand(600, *shape))[0].shape == (600, 64)


def write_logits(confidences: list[float]) -> torch.Tensor:
    """Return the logits (N, 2) of predictions of class 0 with these confidences."""
    return torch.tensor([[math.log(p / (1 - p)), 0.0] for p in confidences], dtype=torch.float64)


def test_calibration_error_by_hand() -> None:
    """Red if a bin is not weighted by its predictions, if errors of two bins cancel, or a bin is taken for another."""
    logits = write_logits([0.75, 0.75, 0.78, 0.7, 0.61, 0.63])
    classes = torch.tensor([0, 1, 0, 0, 1, 1])
    found = metrics.measure_reliability(logits, classes)
    assert found.confidence.tolist() == pytest.approx([0.62, 0.7, 0.76])
    assert found.accuracy.tolist() == pytest.approx([0, 1, 2 / 3]) and found.share.tolist() == [2 / 6, 1 / 6, 3 / 6]
    assert found.expected_error == pytest.approx((2 * 0.62 + 0.3 + (2.28 - 2)) / 6)
    one_bin = metrics.measure_reliability(logits, classes, bins=1)
    assert one_bin.expected_error == pytest.approx(4.22 / 6 - 3 / 6)


def test_calibration_error_of_extremes() -> None:
    """Red if certain predictions fall out of the bins, or if 0 is not the error of those that are always right."""
    certain = torch.tensor([[1000.0, 0, 0], [0, 1000.0, 0]])
    assert metrics.measure_reliability(certain, torch.tensor([0, 1])).expected_error == 0
    assert metrics.measure_reliability(certain, torch.tensor([1, 0])).expected_error == 1
    guess = torch.zeros(9, 3)
    assert metrics.measure_reliability(guess, torch.arange(9) % 3).expected_error == pytest.approx(0)


def test_classifier_follows_from_the_seed_alone() -> None:
    """Red if training draws from the global generator, moves it, or ignores the seed."""
    images, labels = draw_sides(100, (1, 8, 8))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = train_feature_classifier(images, labels, seed=3).embed(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(train_feature_classifier(images, labels, seed=3).embed(images), first)
    assert not torch.equal(train_feature_classifier(images, labels, seed=4).embed(images), first)


def test_accuracy_is_of_images_held_out() -> None:
    """Red if accuracy is measured on trained images: these labels are coin flips, learnt by heart but not guessed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (400, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 2, (400,), generator=generator)
    classifier = train_feature_classifier(images, labels)
    known = (classifier(images).argmax(1) == labels).double().mean()
    assert 0.35 < classifier.accuracy < 0.65 < known


def test_what_the_classifier_cannot_learn_from_is_named() -> None:
    """Red if one class or tiny images fail deep inside training, or train to nothing."""
    with pytest.raises(UsageError, match="two classes"):
        train_feature_classifier(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20).long())
    with pytest.raises(UsageError, match="8x8"):
        train_feature_classifier(*draw_sides(20, (1, 7, 8)))


def test_classifier_distance_on_digits(tmp_path, capsys) -> None:
    """Red if the distance does not rise from real digits over noisy ones to noise, or if storing it changes it."""
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(digits * (255 / 16)).to(torch.uint8).reshape(-1, 1, 8, 8)
    dataset = data.StoredImages("digits", images, torch.from_numpy(labels))
    distance = prepare_distance(dataset, 500, tmp_path)
    assert isinstance(distance.extractor, Classifier)
    assert distance.extractor.network.accuracy > 0.9

    half, rest = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    held = images[rest] / 255
    noisy = (held + 0.1 * normal(*held.shape).float()).clamp(0, 1)
    noise = torch.rand(held.shape, generator=torch.Generator().manual_seed(0))

    def measure(images):
        return distance.get_key_figure(distance.measure(images))

    real, worse, worst = map(measure, (held, noisy, noise))
    assert real < worse / 2 < worst / 8
    assert measure(images[half]) == pytest.approx(0, abs=1e-6)
    assert distance.of_real_images == distance.measure(images[rest[:500]])

    assert "training" in capsys.readouterr().out
    stored = prepare_distance(dataset, 500, tmp_path)
    assert "training" not in capsys.readouterr().out
    figures = stored.measure(noisy)
    names = ["feature_distance", "feature_precision", "feature_recall", "patch_distance", "tone_distance"]
    assert list(figures) == names and figures == distance.measure(noisy) and figures["feature_distance"] == worse
    assert all(map(math.isnan, stored.measure(noisy * math.nan).values()))
    assert isinstance(stored.extractor, Classifier)
    assert stored.extractor.network.accuracy == distance.extractor.network.accuracy

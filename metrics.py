"""Figures of merit: how far samples are from data, how well a score tells two sets apart, and the small classifier
in whose features samples are compared where Inception does not apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from errors import UsageError

# ---- distances between two sets of features ----


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64, of features (N, D) with N >= 2."""
    mean = features.mean(0, dtype=torch.float64)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for rows in features.split(10_000):  # many features fit into memory only once
        centred = rows - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians: |mean_a - mean_b|² + tr(A + B - 2 (AB)^½).

    Means (D,), covariances (D, D), of any rank. `nan` if anything is not finite. In Inception features this is the
    FID (Heusel et al. 2017, equation 6). tr (AB)^½ is the sum of the singular values of A^½ B^½, which needs no root
    of the unsymmetric AB and stays accurate where few samples leave the covariances singular.
    """
    if not all(part.isfinite().all() for part in (mean_a, cov_a, mean_b, cov_b)):
        return float("nan")
    cov_a, cov_b = cov_a.double(), cov_b.double()
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float((shift + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0))


def frechet_distance_of(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (N, D) and (M, D); few samples bias it upwards."""
    return frechet_distance(*mean_and_covariance(features_a), *mean_and_covariance(features_b))


def kernel_distance(features_a: Tensor, features_b: Tensor, *, block: int = 1024) -> float:
    """Squared MMD, unbiased, with the kernel (x·y / D + 1)³ over all pairs of features (N, D) and (M, D).

    In Inception features this is the KID (Bińkowski et al. 2018). It is near 0, of either sign, for equal
    distributions whatever N and M. `block` rows of the kernel matrix are held at a time.
    """
    a, b = features_a.double(), features_b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([kernel(rows, y).sum() for rows in x.split(block)]).sum()

    def mean_of_other_pairs(x: Tensor) -> Tensor:
        itself = (x.square().mean(1) + 1) ** 3
        return (total(x, x) - itself.sum()) / (len(x) * (len(x) - 1))

    return float(mean_of_other_pairs(a) + mean_of_other_pairs(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Share of fake features on the manifold of the real ones, and the reverse (Kynkäänniemi et al. 2019).

    Features (N, D) and (M, D), N and M > k. The manifold of a set is the union of the balls around its points that
    reach to the k-th nearest other point. `block` rows of distances are held at a time.
    """
    real, fake = real.double(), fake.double()

    def radii(points: Tensor) -> Tensor:  # k + 1: the nearest point of the set is the point itself
        return torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(block)])

    def covered(queries: Tensor, points: Tensor) -> float:
        reach = radii(points)
        inside = [(torch.cdist(rows, points) <= reach).any(1) for rows in queries.split(block)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real), covered(real, fake)


def inception_score(probabilities: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016).

    `probabilities` (N, K) are a classifier's predictions, rows summing to one. Splits are consecutive; the score is
    in [1, K].
    """
    scores = []
    for part in probabilities.double().tensor_split(splits):
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


# ---- out-of-distribution detection: a higher score means "more like the data", as -E does ----


def _labelled(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both sets in one array, and 1 for those of the data, 0 for the others."""
    inside, outside = np.asarray(in_scores), np.asarray(out_scores)
    scores = np.concatenate([inside, outside])
    if not np.isfinite(scores).all():
        raise UsageError("some scores are not finite: the model has diverged; load an earlier checkpoint")
    return np.concatenate([np.ones(len(inside)), np.zeros(len(outside))]), scores


def roc_curve(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, rising from (0, 0) to (1, 1), over all thresholds; positive: in the data."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(*_labelled(in_scores, out_scores), drop_intermediate=False)
    return fpr, tpr


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Chance that a random in-score exceeds a random out-score (ties count half): 1 separates, 0.5 is blind."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled(in_scores, out_scores)))


def aupr(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Average precision of calling the higher scores "in the data"; blind guessing gets the share of in-scores."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_labelled(in_scores, out_scores)))


def fpr_at_95_tpr(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Share of out-scores accepted at the highest threshold that accepts at least 95 % of the in-scores."""
    fpr, tpr = roc_curve(in_scores, out_scores)
    return float(fpr[tpr >= 0.95].min())


# ---- the classifier Fréchet distance (CFD), where Inception does not apply: its values compare with no FID ----


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class FeatureClassifier(nn.Module):
    """A small convolutional classifier of images (C, H, W), sides >= 8, whose last hidden layer gives 64 features.

    Images are float in [0, 1] or uint8, on any device. Large ones are averaged down to a shorter side of 32 to 63.
    `accuracy` is its share of right answers on images held out from training.
    """

    def __init__(self, image_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        side = min(height, width)
        if side < 8:
            raise UsageError(f"the feature classifier takes images of at least 8x8 pixels; these are {height}x{width}")
        self.image_shape = tuple(image_shape)
        self.classes = classes
        self.accuracy = float("nan")
        self.shrink = max(1, side // 32)
        widths = [channels, 32, 64] if side < 16 else [channels, 32, 64, 64]
        self.stages = nn.Sequential(*[_stage(*pair) for pair in pairwise(widths)])
        self.output = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def embed(self, images: Tensor) -> Tensor:
        """Features (N, 64) of one batch."""
        images = images.to(self.output.weight.device)
        images = images / 255 if images.dtype == torch.uint8 else images
        return self.stages(F.avg_pool2d(images, self.shrink)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of one batch."""
        return self.output(self.embed(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) of any number of images, a batch at a time."""
        return torch.cat([self.embed(batch) for batch in images.split(500)])


def train_feature_classifier(
    images: Tensor, labels: Tensor, *, seed: int = 0, device: torch.device | str = "cpu"
) -> FeatureClassifier:
    """Train a classifier by a fixed recipe; it returns in eval mode.

    `images` uint8 (N, C, H, W), `labels` (N,) int64 from 0. A fifth, at most 5,000, is held out for `accuracy`. Adam
    sees the rest 25 times in batches of 128, for at most 1,000 steps: at 28x28 about 15 s of CPU time for 1,797 digits
    and a minute for 60,000 images. The same data and seed give the same classifier on the same machine with the same
    number of threads. Global random state stays as it was.
    """
    if labels.unique().numel() < 2:
        raise UsageError("the feature classifier needs a data set with labels of at least two classes")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # a layer draws its first weights from the CPU's global generator
        torch.default_generator.manual_seed(seed)
        classifier = FeatureClassifier(images.shape[1:], int(labels.max()) + 1).to(device)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    held_out, rest = order.tensor_split([min(len(images) // 5, 5000)])
    batch_size = min(128, len(rest))
    steps = min(1000, 25 * len(rest) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for _ in range(steps):
            batch = rest[torch.randint(len(rest), (batch_size,), generator=generator).to(images.device)]
            loss = F.cross_entropy(classifier(images[batch]), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    with torch.no_grad():
        right = [classifier(images[batch]).argmax(1) == labels[batch].to(device) for batch in held_out.split(500)]
    classifier.accuracy = float(torch.cat(right).double().mean())
    return classifier


class ClassifierDistance:
    """Fréchet distance, in a classifier's features, from images to a fixed set of real ones (CFD).

    Few images bias it upwards: compare values for equal numbers of images only. It keeps the classifier and the mean
    (64,) and covariance (64, 64) of the real images' features.
    """

    def __init__(self, classifier: FeatureClassifier, mean: Tensor, covariance: Tensor) -> None:
        self.classifier = classifier
        self.mean = mean
        self.covariance = covariance

    @classmethod
    def from_images(cls, classifier: FeatureClassifier, images: Tensor) -> ClassifierDistance:
        """The distance to these images, float in [0, 1] or uint8 (N, C, H, W)."""
        return cls(classifier, *mean_and_covariance(classifier.features(images)))

    def distance(self, images: Tensor) -> float:
        """How far images, float in [0, 1] or uint8 (N, C, H, W), are from the real ones: 0 is equal, `nan` diverged."""
        mean, covariance = mean_and_covariance(self.classifier.features(images))
        return frechet_distance(mean, covariance, self.mean, self.covariance)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state_dict` takes."""
        return {
            "image_shape": self.classifier.image_shape,
            "classes": self.classifier.classes,
            "accuracy": self.classifier.accuracy,
            "classifier": self.classifier.state_dict(),
            "mean": self.mean,
            "covariance": self.covariance,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ClassifierDistance:
        """Rebuild what `state_dict` described, on the device of its tensors."""
        classifier = FeatureClassifier(state["image_shape"], state["classes"]).to(state["mean"].device)
        classifier.load_state_dict(state["classifier"])
        classifier.accuracy = state["accuracy"]
        return cls(classifier.eval(), state["mean"], state["covariance"])

"""Quality measures: distances between samples and data, how well a score separates two sets, and how chains mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ebm.support.errors import UsageError
from ebm.support.progress import SHORT, Progress

# ---- distances between two sets of features ----


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the unbiased covariance (D, D) of features (N, D), in float64; N >= 2."""
    mean = features.mean(0, dtype=torch.float64)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for rows in features.split(10_000):  # in parts, because memory may not hold a second copy
        centred = rows - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def compute_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (D, D); eigenvalues below zero, from rounding, count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians: |mean_a - mean_b|² + tr(A + B - 2 (AB)^½).

    Means are (D,), covariances (D, D) of any rank. Returns `nan` if a value is not finite. In Inception features this
    is the FID (Heusel et al. 2017, equation 6). tr (AB)^½ is computed as the sum of the singular values of A^½ B^½,
    which needs no root of the unsymmetric AB and stays accurate for singular covariances of few samples.
    """
    if not all(part.isfinite().all() for part in (mean_a, cov_a, mean_b, cov_b)):
        return float("nan")
    cov_a, cov_b = cov_a.double(), cov_b.double()
    cross = torch.linalg.svdvals(compute_root(cov_a) @ compute_root(cov_b)).sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return float((shift + cov_a.trace() + cov_b.trace() - 2 * cross).clamp(min=0))


def kernel_distance(features_a: Tensor, features_b: Tensor, *, block: int = 1024) -> float:
    """Return the unbiased squared MMD of features (N, D) and (M, D) with the kernel (x·y / D + 1)³.

    In Inception features this is the KID (Bińkowski et al. 2018). For equal distributions it is near 0, of either sign,
    for any N and M. Memory holds `block` rows of the kernel matrix at a time.
    """
    a, b = features_a.double(), features_b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def total(x: Tensor, y: Tensor) -> Tensor:
        sums = []
        for rows in x.split(block):
            sums.append(kernel(rows, y).sum())
            progress.advance(len(rows))
        return torch.stack(sums).sum()

    def mean_of_other_pairs(x: Tensor) -> Tensor:
        itself = (x.square().mean(1) + 1) ** 3
        return (total(x, x) - itself.sum()) / (len(x) * (len(x) - 1))

    with Progress(2 * len(a) + len(b), what="kernel distance, row", patience=SHORT) as progress:
        return float(mean_of_other_pairs(a) + mean_of_other_pairs(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Return precision and recall of fake features with respect to real ones (Kynkäänniemi et al. 2019).

    Precision is the share of the fake features (M, D) on the manifold of the real ones (N, D), recall the share of the
    real features on the manifold of the fake ones. The manifold of a set is the union of the balls around its points
    that reach to the k-th nearest other point, or to the farthest if there are fewer. Memory holds `block` rows of
    distances at a time.
    """
    real, fake = real.double(), fake.double()

    def reduce_distances(queries: Tensor, points: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        parts = []
        for rows in queries.split(block):
            parts.append(reduce(torch.cdist(rows, points)))
            progress.advance(len(rows))
        return torch.cat(parts)

    def radii(points: Tensor) -> Tensor:
        rank = min(k + 1, len(points))  # the nearest point of the set is the point itself
        return reduce_distances(points, points, lambda rows: rows.topk(rank, largest=False).values[:, -1])

    def covered(queries: Tensor, points: Tensor) -> float:
        reach = radii(points)
        return float(reduce_distances(queries, points, lambda rows: (rows <= reach).any(1)).double().mean())

    with Progress(2 * (len(real) + len(fake)), what="precision and recall, row", patience=SHORT) as progress:
        return covered(fake, real), covered(real, fake)


def compute_quantiles(values: Tensor, number: int) -> Tensor:
    """Return quantiles (number, D) of each column of values (N, D), at the levels (k + ½) / number.

    The mean size of the difference of two sets' quantiles is the 1-Wasserstein distance of their columns.
    """
    index = ((torch.arange(number) + 0.5) * len(values) / number).long().to(values.device)
    return values.T.contiguous().sort().values[:, index].T  # contiguous rows are sorted in less time


def total_variation(histograms_a: Tensor, histograms_b: Tensor) -> Tensor:
    """Return the total variation distances (...,) of histograms (..., bins) that sum to 1: from 0, equal, to 1."""
    return (histograms_a - histograms_b).abs().sum(-1) / 2


def inception_score(probabilities: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Return the Inception score, exp(mean KL(p(y|x) || p(y))), as its mean and standard deviation over splits.

    Salimans et al. 2016. probabilities: a classifier's predictions (N, K), whose rows sum to one. Splits are parts of
    consecutive images; the score is in [1, K].
    """
    scores, ends = [], [len(probabilities) * k // splits for k in range(1, splits)]
    for part in probabilities.double().tensor_split(ends):
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean()), float(torch.stack(scores).std(correction=0))


# ---- classification ----


class Reliability(NamedTuple):
    """How often predictions of about equal confidence are right, for each bin of confidences that holds any."""

    confidence: Tensor  # the mean confidence of the predictions in a bin (bins,)
    accuracy: Tensor  # the share of them that are right (bins,)
    share: Tensor  # the share of all predictions that are in the bin (bins,)

    @property
    def total_accuracy(self) -> float:
        """The share of all predictions that are right."""
        return float((self.share * self.accuracy).sum())

    @property
    def expected_error(self) -> float:
        """The expected calibration error, in [0, 1]: the mean of |accuracy − confidence| over all predictions."""
        return float((self.share * (self.accuracy - self.confidence).abs()).sum())


def measure_reliability(logits: Tensor, classes: Tensor, *, bins: int = 15) -> Reliability:
    """Return the reliability of the predictions softmax(logits), of which the largest is the confidence.

    Guo et al. 2017, "On calibration of modern neural networks": equally wide bins, each with its upper edge. logits:
    (N, K), classes: the true ones (N,), N >= 1. The result is on the CPU, whose sums are the same in every call.
    """
    confidence, predicted = logits.double().cpu().softmax(1).max(1)
    is_right = (predicted == classes.cpu()).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    _, place = torch.bucketize(confidence, edges).unique(return_inverse=True)  # without the empty bins
    number = place.bincount().double()
    return Reliability(place.bincount(confidence) / number, place.bincount(is_right) / number, number / len(place))


# ---- out-of-distribution detection: a higher score means "more like the data", as -E does ----


def join_scores(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the true labels and the scores of both sets, each (N + M,): label 1 for in_scores, 0 for out_scores.

    Raises UsageError if a score is not finite.
    """
    in_array, out_array = np.asarray(in_scores), np.asarray(out_scores)
    scores = np.concatenate([in_array, out_array])
    if not np.isfinite(scores).all():
        raise UsageError("some scores are not finite: the model has diverged; load an earlier checkpoint")
    return np.concatenate([np.ones(len(in_array)), np.zeros(len(out_array))]), scores


def roc_curve(in_scores: ArrayLike, out_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the false and the true positive rates over all thresholds, which rise from (0, 0) to (1, 1).

    A positive is an image that the score accepts as data.
    """
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(*join_scores(in_scores, out_scores), drop_intermediate=False)
    return fpr, tpr


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Return the area under the ROC curve: 1 for perfect separation, 0.5 for guessing.

    It is the chance that a random in-score exceeds a random out-score; ties count half.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*join_scores(in_scores, out_scores)))


def aupr(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Return the area under the precision-recall curve (average precision), with in_scores as the positive class.

    Guessing gets the share of in-scores.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*join_scores(in_scores, out_scores)))


def fpr_at_95_tpr(in_scores: ArrayLike, out_scores: ArrayLike) -> float:
    """Return the share of out-scores above the highest threshold that accepts at least 95 % of the in-scores."""
    fpr, tpr = roc_curve(in_scores, out_scores)
    return float(fpr[tpr >= 0.95].min())


# ---- Markov chains: whether they have forgotten where they started ----


class ChainFigures(NamedTuple):
    """How well chains of a number mix; the figures are None if no chain has moved."""

    rhat: float | None  # 1 if chains, and their halves, have the same distribution; more if they stay apart
    ess: float | None  # effective sample size: so many independent draws would tell as much about the mean
    tau: float | None  # integrated autocorrelation time: draws per effective one


def measure_chains(values: ArrayLike) -> ChainFigures:
    """Return R-hat, the effective sample size and the autocorrelation time of chains of a number (chains, draws).

    There must be two chains and eight draws at least. R-hat and the effective sample size are those of split chains and
    ranks (Vehtari et al. 2021), which need no finite variance; they are computed by arviz-stats.
    """
    from arviz_stats.base import array_stats  # imported here because it is slow and few runs need it

    draws = np.asarray(values, dtype=np.float64)
    if (draws == draws[:, :1]).all():
        return ChainFigures(None, None, None)
    ess = float(array_stats.ess(draws, method="bulk"))
    return ChainFigures(float(array_stats.rhat(draws, method="rank")), ess, draws.size / ess)


def compute_autocorrelation(values: ArrayLike) -> np.ndarray:
    """Return the autocorrelation of chains of a number (chains, draws) at every lag from 0, (draws,).

    The mean and the variance are those of all chains together, so that chains that stay apart remain correlated at
    every lag (Vehtari et al. 2021, equation 10). 1 at all lags if no chain has moved.
    """
    from arviz_stats.base import array_stats

    draws = np.asarray(values, dtype=np.float64)
    number = draws.shape[1]
    covariance = np.asarray(array_stats.autocov(draws, axis=1)).mean(0)
    within = covariance[0] * number / (number - 1)
    total = covariance[0] + (draws.mean(1).var(ddof=1) if len(draws) > 1 else 0.0)
    if covariance[0] == 0:
        return np.ones(number)
    return np.concatenate([[1.0], 1 - (within - covariance[1:]) / total])

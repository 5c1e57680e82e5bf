"""Rank degraded images by every measure of samples: is what looks worse measured as worse?

    python benchmarks/measures.py --dataset=digits --output=benchmarks/measures_digits.json
    python benchmarks/measures.py --dataset=fashion_mnist --datadir=data --output=benchmarks/measures_fashion.json

Real images of one half of the data are degraded in several ways and strengths, and compared with the other half as
train.py --quality compares samples. Some orders are known: real images are the best, and a stronger degradation is
worse than a weaker one. The last two sets are noise and texture whose features in the classifier that measures are
fitted to those of real images by gradient descent, as chains might do. They look like no image, so that they are worse
than every mild degradation. The JSON file of --output lists the orders that each measure gets wrong; a plot of the
two distances and a picture of examples are written beside it.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
import timing
from ebm.measures.features import (
    CLASSIFIER_FIGURES,
    PATCH_FIGURES,
    Classifier,
    prepare_distance,
    split_halves,
)
from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.progress import show_waiting
from ebm.support.reports import format_table, print_written

SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "folder")
FIGURES = CLASSIFIER_FIGURES | PATCH_FIGURES
SHARES = ("feature_precision", "feature_recall")  # the larger, the better; distances are the opposite
KNOWN = 4_000  # largest number of images of the other half that degraded images are made of
EXAMPLES = 12  # images of each set in the picture
REAL = "real images"


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    dataset: str = flag("digits", "the data set", choices=SETS)
    datadir: str = flag("data", "folder of torchvision's data sets", is_path=True)
    data_path: str | None = flag(
        None, "folder of images for --dataset=folder", only_with="dataset=folder", is_path=True
    )
    samples: int = flag(500, "images of each set, at most half of the data", at_least=10)
    fit_steps: tuple[int, ...] = flag((30, 200), "steps that fit noise and texture to features", at_least=1)
    logdir: str = flag("cachedir/measures", "folder of classifiers and statistics", is_path=True)


# ---- degradations ----


@dataclasses.dataclass(frozen=True)
class Source:
    """What degraded images are made of.

    images: real ones (N, C, H, W) in [0, 1]. labels: their classes (N,). known: images of the half that samples are
    compared with. classifier: the one that measures.
    """

    images: Tensor
    labels: Tensor
    known: Tensor
    classifier: Classifier

    def make_generator(self) -> torch.Generator:
        """Return the generator of a degradation, so that strengths differ in nothing else."""
        return torch.Generator().manual_seed(1)


Degrade = Callable[[Source, float], Tensor]  # what images are made of, strength -> degraded images


def add_noise(source: Source, deviation: float) -> Tensor:
    """Return images with Gaussian noise."""
    return source.images + deviation * torch.randn(source.images.shape, generator=source.make_generator())


def blur(source: Source, deviation: float) -> Tensor:
    """Return images blurred by a Gaussian kernel. deviation: in pixels."""
    reach = math.ceil(3 * deviation)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * deviation**2))
    rows = F.pad(source.images, (reach,) * 4, mode="reflect").flatten(0, 1)[:, None]
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(rows, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(source.images)


def average_blocks(source: Source, side: float) -> Tensor:
    """Return images whose blocks of side x side pixels have one value."""
    averaged = F.avg_pool2d(source.images, int(side), ceil_mode=True)
    height, width = source.images.shape[2:]
    return averaged.repeat_interleave(int(side), 2).repeat_interleave(int(side), 3)[:, :, :height, :width]


def shuffle_blocks(source: Source, blocks: float) -> Tensor:
    """Return images cut into blocks x blocks parts, which are shuffled in each image; what is left over stays."""
    images, number = source.images.clone(), int(blocks)
    height, width = (side // number for side in images.shape[2:])
    inner = images[:, :, : number * height, : number * width]
    parts = F.unfold(inner, (height, width), stride=(height, width))  # (N, C·height·width, blocks²)
    order = torch.rand(len(parts), parts.shape[2], generator=source.make_generator()).argsort(1)
    parts = parts.gather(2, order[:, None].expand_as(parts))
    images[:, :, : number * height, : number * width] = F.fold(
        parts, inner.shape[2:], (height, width), stride=(height, width)
    )
    return images


def add_salt_and_pepper(source: Source, share: float) -> Tensor:
    """Return images in which a share of the pixels is white or black."""
    drawn = torch.rand(source.images[:, :1].shape, generator=source.make_generator())
    return source.images.where(drawn > share, (drawn < share / 2).float())


def raise_contrast(source: Source, factor: float) -> Tensor:
    """Return images whose contrast is raised, up to black and white."""
    return 0.5 + factor * (source.images - 0.5)


def repeat_images(source: Source, distinct: float) -> Tensor:
    """Return images of which only a few of each class are distinct."""
    images = source.images.clone()
    for place in (source.labels == label for label in source.labels.unique()):
        members = place.nonzero().flatten()
        images[members] = source.images[members[torch.arange(len(members)) % int(distinct)]]
    return images


def draw_gaussians(source: Source, share: float) -> Tensor:
    """Return images of which a share is replaced by samples of a Gaussian with the covariance of real images."""
    known, mean = source.known.flatten(1), source.known.flatten(1).mean(0)
    weights = torch.randn(len(source.images), len(known), generator=source.make_generator()) / math.sqrt(len(known))
    drawn = (mean + weights @ (known - mean)).view_as(source.images)
    return torch.cat([drawn[: round(share * len(drawn))], source.images[round(share * len(drawn)) :]])


def randomise_phases(source: Source, share: float) -> Tensor:
    """Return images whose Fourier phases are turned by a share of random angles; the amplitudes stay."""
    noise = torch.randn(source.images[:, :1].shape, generator=source.make_generator())
    angles = torch.angle(torch.fft.fft2(noise))
    angles[..., 0, 0] = 0  # the mean brightness
    return torch.fft.ifft2(torch.fft.fft2(source.images) * torch.exp(1j * share * angles)).real


def fit_features(source: Source, start: Tensor, steps: int) -> Tensor:
    """Return images whose features in the classifier are fitted to those of real images by Adam, each to one image."""
    network, ends = source.classifier.network, []
    for batch, known in zip(start.clamp(0, 1).split(250), source.known[: len(start)].split(250), strict=True):
        images = batch.clone().requires_grad_()
        with torch.no_grad():
            wanted = network.embed(known)
        optimizer = torch.optim.Adam([images], lr=0.03)
        for _ in range(steps):
            (images.grad,) = torch.autograd.grad((network.embed(images) - wanted).square().sum(1).mean(), images)
            optimizer.step()
            images.data.clamp_(0, 1)
        ends.append(images.detach())
    return torch.cat(ends)


def fit_noise(source: Source, steps: float) -> Tensor:
    """Return uniform noise whose features are fitted."""
    noise = torch.rand(source.images.shape, generator=source.make_generator())
    return fit_features(source, noise, int(steps))


def fit_texture(source: Source, steps: float) -> Tensor:
    """Return images of random phases whose features are fitted."""
    return fit_features(source, randomise_phases(source, 1), int(steps))


# Name -> what degrades, and its strengths from the mildest on.
DEGRADATIONS: dict[str, tuple[Degrade, tuple[float, ...]]] = {
    "noise, std": (add_noise, (0.05, 0.1, 0.2, 0.4)),
    "blur, pixels": (blur, (0.5, 1, 2)),
    "blocks of one value, pixels": (average_blocks, (2, 4, 7)),
    "shuffled blocks, across": (shuffle_blocks, (2, 4, 7)),
    "salt and pepper, share": (add_salt_and_pepper, (0.01, 0.05, 0.2)),
    "contrast, factor": (raise_contrast, (1.5, 3, 100)),
    "copies, distinct per class": (repeat_images, (10, 3, 1)),
    "Gaussian of the data, share": (draw_gaussians, (0.5, 1)),
    "random phases, share": (randomise_phases, (0.2, 0.5, 1)),
}
FITTED: dict[str, Degrade] = {"fitted noise, steps": fit_noise, "fitted texture, steps": fit_texture}


# ---- measuring and judging ----


def measure_sets(settings: Settings, dataset: data.Dataset) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return a row of figures for real images and each degraded set, and some images of each (EXAMPLES, C, H, W)."""
    half, others = split_halves(dataset)
    others = others[: settings.samples]
    measure = prepare_distance(dataset, settings.samples, pathlib.Path(settings.logdir) / settings.dataset)
    assert isinstance(measure.extractor, Classifier) and dataset.labels is not None, "it was trained on labels"
    images, known = dataset.raw(others) / 255, dataset.raw(half[:KNOWN]) / 255
    source = Source(images, dataset.labels[others], known, measure.extractor)
    plan = DEGRADATIONS | {name: (degrade, settings.fit_steps) for name, degrade in FITTED.items()}
    rows: list[dict[str, Any]] = [{"set": REAL, "strength": 0.0} | dict(measure.of_real_images)]
    examples = [images[:EXAMPLES]]
    for name, (degrade, strengths) in plan.items():
        for strength in strengths:
            with show_waiting(f"making images: {name} {strength:g}"):
                degraded = degrade(source, strength).clamp(0, 1)
            rows.append({"set": name, "strength": float(strength)} | measure.measure(degraded))
            examples.append(degraded[:EXAMPLES])
            print(name_set(rows[-1]), *(f"{FIGURES[key]} {rows[-1][key]:.4g}" for key in FIGURES), sep="; ", flush=True)
    return rows, examples


def name_set(row: Mapping[str, Any]) -> str:
    """Return the name of a set of images with its strength."""
    return REAL if row["set"] == REAL else f"{row['set']} {row['strength']:g}"


def list_orders(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the pairs of sets of which the first is known to be nearer to the data.

    Sets that are fitted in more steps are not ordered, but worse than every mildest degradation.
    """
    mildest = {row["set"]: row for row in reversed(rows) if row["set"] in DEGRADATIONS}
    orders = [(rows[0], row) for row in rows[1:]]
    orders += [(a, b) for a, b in pairwise(rows[1:]) if a["set"] == b["set"] and a["set"] in DEGRADATIONS]
    return orders + [(mild, row) for row in rows if row["set"] in FITTED for mild in mildest.values()]


def judge_measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each measure, of how many pairs the order is known, and the pairs that it gets wrong, in words."""
    orders, verdicts = list_orders(rows), {}
    for key in FIGURES:
        sign = -1 if key in SHARES else 1
        wrong = [f"{name_set(b)} before {name_set(a)}" for a, b in orders if not sign * a[key] < sign * b[key]]
        verdicts[key] = {"measure": FIGURES[key], "orders": len(orders), "wrong": wrong}
    return verdicts


def plot_sets(rows: Sequence[Mapping[str, Any]], path: pathlib.Path, title: str) -> pathlib.Path:
    """Plot the two distances of all sets, a line over the strengths of each degradation; return the file's path."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        x, y = lines.setdefault(row["set"], ([], []))
        x.append(row["feature_distance"])
        y.append(row["patch_distance"])
    xlabel, ylabel = FIGURES["feature_distance"], FIGURES["patch_distance"]
    return pictures.plot_lines({ylabel: lines}, path, xlabel=xlabel, title=title, log=(xlabel, ylabel))


def write_results(settings: Settings, rows: list[dict[str, Any]], examples: list[Tensor], **described: object) -> None:
    """Write the figures as JSON, a plot of the two distances, and a picture of the sets."""
    path = timing.write_rows(settings, rows, **described)
    plot = plot_sets(rows, path.with_suffix(".png"), f"{settings.samples} images of {settings.dataset} a set")
    stages = {str(i + 1): column for i, column in enumerate(torch.stack(examples, 1))}
    picture = pictures.save_panel(stages, path.with_name(f"{path.stem}_sets.png"), rows=list(map(name_set, rows)))
    print_written([path, plot, picture])


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    if settings.dataset == "folder" and not settings.data_path:
        raise UsageError("`dataset`=folder needs `data_path`, the folder of images")
    path = settings.data_path if settings.dataset == "folder" else None
    dataset = data.load_dataset(settings.dataset, root=settings.datadir, path=path)
    if 2 * settings.samples > len(dataset):
        raise UsageError(f"`samples`={settings.samples} is more than half of the {len(dataset):,} images; lower it")
    rows, examples = measure_sets(settings, dataset)
    verdicts = judge_measures(rows)
    print(format_table({name_set(row): {FIGURES[key]: row[key] for key in FIGURES} for row in rows}))
    for verdict in verdicts.values():
        print(f"{verdict['measure']}: {len(verdict['wrong'])} of {verdict['orders']} orders wrong")
    if settings.output:
        write_results(settings, rows, examples, verdicts=verdicts)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

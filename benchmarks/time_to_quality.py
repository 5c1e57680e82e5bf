"""Train an energy of MNIST with this project and with other libraries for the same time, and compare what they learnt.

    pip install torchebm ebmkit
    python benchmarks/time_to_quality.py --output=benchmarks/time_to_quality.json    # a plot and samples beside it

All train MnistNet without labels, each in a process of its own, from the same images and by persistent contrastive
divergence: this project by train.py, torchebm by the loop of its README, ebmkit by its trainer. The clock starts before
the first iteration and stands still while weights are kept. Samples come from noise, by each library's own sampler and
averaged weights, in chains five times as long as those of training: so ebmkit's MNIST example does it. Their classifier
Fréchet distance is that of train.py --quality. An AUROC tells how well −E separates test images of MNIST from others:
the same images rotated by 90 degrees, scikit-learn's digits, Fashion-MNIST.

The others' network is MnistNet in plain PyTorch with PyTorch's spectral norm, which ebmkit's example has, too. Their
recipes are that example's, with images in [-1, 1], a buffer of 10,000 images and the energies' regulariser at 1. It is
made for GPUs, so chains of 20 steps, batches of 32 and an average of decay 0.99 replace 60, 128 and 0.999, as in this
project's preset. torchebm's documentation has no settings for images. Its buffer is not warmed up by 100 steps for each
image, its default. Steps are not clipped: with ebmkit's example, step 10 clipped at 0.01, the distance was 521 after 49
iterations with 16 filters, where step 100 gave 169. Without a spectral norm torchebm's was 1567 after 51.

Learning rate and step size were then tried for five minutes of one core, two runs at a time. An image in [-1, 1] moves
a quarter as far with the same step size, so that this project's step 30 is about the others' step 100. torchebm with lr
1e-3 was ended before it had figures. The classifier Fréchet distance of 200 samples, and the AUROC of rotated images,
after 1.5, 3 and 5 minutes:

    project   lr 3e-3, step 30     23    11.9  11.2    0.87  0.90  0.89    taken
              lr 3e-3, step 100    30    10.9  10.9    0.83  0.93  0.91    diverged and rolled back after 330 iterations
              lr 1e-3, step 100    582   31    26      0.71  0.80  0.88
    ebmkit    lr 1e-3, step 100    20    6.6   7.8     0.86  0.83  0.81    taken
              lr 3e-3, step 100    19    15    8.6     0.69  0.69  0.71
              lr 3e-3, step 30     33    41    10.1    0.57  0.60  0.65
    torchebm  lr 3e-3, step 100    221   63    31      0.59  0.60  0.62    taken
              lr 1e-2, step 100    125   90    32      0.64  0.66  0.69
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
import learners
import timing
from ebm.measures.features import DISTANCE, SampleMeasure, prepare_distance
from ebm.support import cli, metrics, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.progress import show_waiting
from ebm.support.reports import print_written

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATED = 1_000  # images of each set whose energies are compared
OUTLIERS = ("rotated", "digits", "fashion_mnist")
COLUMNS = 16  # samples of each network in the picture


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    libraries: tuple[str, ...] = flag(tuple(learners.LEARNERS), "what to compare", choices=tuple(learners.LEARNERS))
    minutes: tuple[float, ...] = flag(
        (0.5, 1, 2, 3, 5, 7, 10), "minutes of training after which a network is kept; it ends at the last", at_least=0
    )
    clock: str = flag("wall", "what counts the minutes; cpu if others use the machine", choices=tuple(learners.CLOCKS))
    threads: int = flag(2, "threads of each library", at_least=1)
    samples: int = flag(250, "images that are sampled from each network", at_least=2)
    outliers: tuple[str, ...] = flag(("rotated", "digits"), "sets of images to tell from MNIST", choices=OUTLIERS)
    num_filters: int = flag(64, "width of the network", at_least=1)
    train_flags: str = flag(
        "--dataset=mnist --zero_kl --replay_batch --batch_size=32 --ema_decay=0.99 --lr=3e-3 --step_lr=30",
        "the other flags of train.py for this project",
    )
    seed: int = flag(0, "seed of all libraries", at_least=0)
    data: str = flag("data", "folder of MNIST, and of Fashion-MNIST if it is among the outliers", is_path=True)
    logdir: str = flag("cachedir/time_to_quality", "folder of this project's runs and of the classifier", is_path=True)


def read_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of the other libraries by name; raise UsageError if one is not installed."""
    others = [name for name in libraries if name != "project"]
    try:
        return {name: importlib.metadata.version(name) for name in others}
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(f"`libraries`={error.name} is not installed; pip install {' '.join(others)}") from None


def load_outliers(name: str, root: str, digits: Tensor) -> Tensor:
    """Return images of no digits of MNIST, or of digits that are not upright, uint8 (N, 1, 28, 28).

    digits: images of MNIST, which "rotated" turns by 90 degrees.
    """
    if name == "rotated":
        return digits.rot90(1, (2, 3))
    dataset = data.load_dataset(name, split="train" if name == "digits" else "test", root=root)
    return dataset.raw(torch.arange(min(RATED, len(dataset))))


def run_learner(settings: Settings, library: str, job: learners.Job) -> list[dict[str, Any]]:
    """Let a library do the job in a process of its own, and return its rows; raise UsageError if it fails."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(settings.threads))
    if library == "project":
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / name for name in ("job.pt", "rows.pt")]
        torch.save(vars(job), paths[0])
        command = [sys.executable, learners.__file__, library, *map(str, paths)]
        with show_waiting(f"training with {library}", f"{max(settings.minutes):g} minutes, then samples"):
            status = subprocess.run(command, env=environment, check=False).returncode
        if status:
            raise UsageError(f"training with {library} ended with status {status}, see above")
        return torch.load(paths[1])


def compute_figures(row: Mapping[str, Any], measure: SampleMeasure) -> dict[str, Any]:
    """Return what a library has learnt after some minutes, by name: the quality of its samples, and its AUROCs.

    A network whose energies are not finite tells no images apart: its AUROC is nan.
    """
    figures = {f"{clock} minutes": row[clock] for clock in learners.CLOCKS} | {"iterations": row["iterations"]}
    figures[DISTANCE] = measure.measure(row["samples"])["feature_distance"]
    inliers, *outliers = row["energies"].items()
    for name, energies in outliers:
        is_finite = bool(torch.cat([inliers[1], energies]).isfinite().all())
        figures[f"AUROC, {name}"] = metrics.auroc(-inliers[1], -energies) if is_finite else math.nan
    return figures


def write_results(
    settings: Settings, rows: list[dict[str, Any]], samples: list[Tensor], **described: object
) -> list[pathlib.Path]:
    """Write the figures as JSON, a plot of them, and a picture of the first samples of every network; return paths."""
    path = timing.write_rows(settings, rows, **described, **timing.describe_machine("cpu"))
    libraries: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        libraries.setdefault(row["library"], []).append(row)
    minutes = f"{settings.clock} minutes"
    panels = {
        figure: {
            name: ([row[minutes] for row in part], [row[figure] for row in part]) for name, part in libraries.items()
        }
        for figure in [DISTANCE, *(f"AUROC, {name}" for name in settings.outliers)]
    }
    title = f"MnistNet with {settings.num_filters} filters on MNIST, threads: {settings.threads}"
    xlabel = f"{minutes} of training"
    plot = pictures.plot_lines(panels, path.with_suffix(".png"), xlabel=xlabel, title=title, log=[DISTANCE])
    titles = [f"{row['library']}, {row[minutes]:.2g} min" for row in rows]
    columns = torch.stack([images[:COLUMNS] for images in samples], 1)  # (COLUMNS, rows, 1, 28, 28)
    stages = {str(i + 1): column for i, column in enumerate(columns)}
    picture = pictures.save_panel(stages, path.with_name(f"{path.stem}_samples.png"), rows=titles)
    return [path, plot, picture]


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    versions = read_versions(settings.libraries)
    torch.set_num_threads(settings.threads)
    images, held_out = (data.load_dataset("mnist", split=split, root=settings.data) for split in ("train", "test"))
    digits = held_out.raw(torch.arange(min(RATED, len(held_out))))
    rated = {"mnist": digits} | {name: load_outliers(name, settings.data, digits) for name in settings.outliers}
    measure = prepare_distance(images, settings.samples, pathlib.Path(settings.logdir))
    real = measure.of_real_images["feature_distance"]
    print(f"{DISTANCE} of {settings.samples} real images: {real:.2f}", flush=True)
    job = learners.Job(
        minutes=sorted(settings.minutes),
        clock=settings.clock,
        images=images.raw(torch.arange(len(images))),
        rated=rated,
        samples=settings.samples,
        num_filters=settings.num_filters,
        seed=settings.seed,
        train_flags=[f"--datadir={settings.data}", *shlex.split(settings.train_flags)],
        folder=str(pathlib.Path(settings.logdir) / "run"),
    )
    rows: list[dict[str, Any]] = []
    samples: list[Tensor] = []
    written = [pathlib.Path(settings.logdir)]
    for library in settings.libraries:
        for row in run_learner(settings, library, job):
            figures = compute_figures(row, measure)
            rows.append({"library": library} | figures)
            samples.append(row["samples"])
            words = [f"{name} {value:.4g}" for name, value in figures.items()]
            print(f"{library}: {', '.join(words)}", flush=True)
        if settings.output:
            others = {"torchebm": learners.TORCHEBM, "ebmkit": learners.EBMKIT}
            described = {"versions": versions, "others": others, "real": real}
            written[:-1] = write_results(settings, rows, samples, **described)
    print_written(written)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

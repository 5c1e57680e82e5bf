"""The sandbox tasks that tell out-of-distribution images from those of the model's data set: mixenergy and ood."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Dataset
from ebm.support import metrics, pictures
from ebm.support.errors import UsageError
from ebm.support.files import write_file
from ebm.support.interruption import Interruption
from ebm.support.progress import show_waiting
from ebm.support.sharing import fold_seed
from ebm.tasks.analysis import average_with_next, fit_images
from ebm.tasks.examined_model import EnergyTraits
from ebm.tasks.sandbox_run import Report, SandboxRun

# The AUROC of an unconditional model in the paper, for CIFAR-10, as later papers quote it. "?": not verified.
PAPER_AUROC = {
    "svhn": "0.63",
    "textures": "0.48",
    "cifar100": "0.50",
    "interpolation": "0.70",
    "random": "1.0 ? (uniform noise)",
}

# Sets of images that task ood looks for, and which of them are near a data set. For MNIST and CIFAR-10 these are the
# lists of OpenOOD (Zhang et al. 2023), as far as torchvision has the sets, and other grey sets. The others are far.
LOOKED_FOR = ("mnist", "fashion_mnist", "kmnist", "digits", "cifar10", "cifar100", "svhn", "textures", "celeba")
GREY = ("mnist", "fashion_mnist", "kmnist", "digits", "notmnist")  # the last one, no data set here, as a folder
NEAR = dict.fromkeys(GREY, GREY) | {"cifar10": ("cifar100",), "cifar100": ("cifar10",)}

# Sets that are made of the test images (N, C, H, W), and need no files.
MADE: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "uniform noise": lambda x, generator: torch.rand(x.shape, generator=generator, device=x.device),
    "Gaussian noise": lambda x, generator: draw_gaussian_noise(x, generator).clamp(0, 1),
    "constant": lambda x, generator: torch.rand(*x.shape[:2], 1, 1, generator=generator, device=x.device).expand_as(x),
    "interpolation": lambda x, generator: average_with_next(x),
    "blurred": lambda x, generator: blur_images(x),
    "shuffled": lambda x, generator: shuffle_pixels(x, generator),
}

OWN = "test images"
LEFT_OUT = "left out"  # the group of a class that training has left out, and the beginning of its name

# Scores by name, each larger for images that are more like the data, as functions of the traits of images and of
# training images.
SCORES: dict[str, Callable[[EnergyTraits, EnergyTraits], np.ndarray]] = {
    "−E": lambda found, train: -found.energy,
    "−|∂E/∂x|": lambda found, train: -found.slope,  # approximate mass, Grathwohl et al. 2020
    "fall of E": lambda found, train: found.end - found.energy,  # far from the data a chain falls deep
    "typicality": lambda found, train: -np.abs(found.energy - train.energy.mean()),  # Nalisnick et al. 2019, one image
    "density": lambda found, train: estimate_log_density(join_energies(found), join_energies(train)),
    "features": lambda found, train: -measure_feature_distance(found, train),
}
TRAINING_IMAGES = 5_000  # at most, with which a score compares images
COMPONENTS = 20  # normal distributions in the density of the figures of training images, at most
IMAGES_PER_COMPONENT = 50

Scores = dict[str, np.ndarray]  # of one set: name of the score -> (N,)
Measures = dict[tuple[str, str, str], list[float]]  # set, score, measure -> its value in each repeat

# How well a score separates two sets, by name; the arguments are the scores of the data and of the outliers.
MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "AUROC": metrics.auroc,
    "AUPR in": metrics.aupr,
    "AUPR out": lambda inside, outside: metrics.aupr(-outside, -inside),
    "FPR at 95 % TPR": metrics.fpr_at_95_tpr,
}


def join_energies(traits: EnergyTraits) -> np.ndarray:
    """Return all energies and gradients of images, (N, 3 + classes)."""
    return np.column_stack([traits.energy, traits.slope, traits.end, traits.energies])


def estimate_log_density(found: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return the log density (N,) of figures of images (N, D) among those of training images (M, D).

    This is the density of states estimation of Morningstar et al. 2021, here by a mixture of normal distributions: what
    is unusual in any figure, or in several together, has a low density.
    """
    from sklearn.mixture import GaussianMixture

    mean, spread = train.mean(0), train.std(0).clip(1e-12)
    components = max(1, min(COMPONENTS, len(train) // IMAGES_PER_COMPONENT))
    mixture = GaussianMixture(components, reg_covar=1e-3, random_state=0).fit((train - mean) / spread)
    return mixture.score_samples((found - mean) / spread)


def measure_feature_distance(found: EnergyTraits, train: EnergyTraits) -> np.ndarray:
    """Return the squared Mahalanobis distance (N,) of the features of images from the mean of their class.

    Lee et al. 2018, with the features of the last layer: means of the classes, which are those of lowest energy, and
    one covariance for all, with the shrinkage of Ledoit and Wolf 2004.
    """
    from sklearn.covariance import LedoitWolf

    number = train.energies.shape[1]
    of_train, of_found = (
        traits.energies.argmin(1) if number else np.zeros(len(traits.energy), int) for traits in (train, found)
    )
    centres = np.tile(train.features.mean(0), (max(number, 1), 1))  # also for classes that no training image is in
    for k in np.unique(of_train):
        centres[k] = train.features[of_train == k].mean(0)
    covariance = LedoitWolf(assume_centered=True).fit(train.features - centres[of_train])
    return covariance.mahalanobis(found.features - centres[of_found])


def draw_gaussian_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise 0.5 + 0.5·N(0, 1), shaped like images."""
    return 0.5 + 0.5 * torch.randn(images.shape, generator=generator, device=images.device)


def blur_images(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) blurred by a Gaussian of a fourteenth of their height, 2 pixels of 28."""
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(images.cpu().numpy(), images.shape[2] / 14, axes=(2, 3))
    return torch.from_numpy(blurred).to(images)


def shuffle_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) whose pixels have changed places, in each image differently, all channels alike."""
    n, channels, height, width = images.shape
    order = torch.rand(n, height * width, generator=generator, device=images.device).argsort(1)
    return images.flatten(2).gather(2, order[:, None].expand(-1, channels, -1)).view(images.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Task mixenergy, as published


def detect_outliers(run: SandboxRun) -> Report:
    """Detect out-of-distribution images by −E (of a conditional model: under the class of lowest energy)."""
    if run.model.classes:
        run.require_class_names("mixenergy")
    images = run.draw_examples("test", run.choose_number()).images
    classes = f", under each of {run.model.classes} classes" if run.model.classes else ""
    others = f"as many for comparison ({', '.join(run.mixes)})"
    run.announce(f"energies of {len(images):,} test images and {others}{classes}")
    in_scores = run.write_array("scores_in_distribution", run.model.compute_scores(images, progress="scores of test"))
    scores: dict[str, np.ndarray] = {}
    with contextlib.suppress(Interruption):
        for name, outsiders in load_outliers(run, images):
            found = run.model.compute_scores(outsiders, progress=f"scores of {name}")
            scores[name] = run.write_array(f"scores_{name}", found)
    run.results.workers.note_part("data sets", len(scores), len(run.mixes))
    figures = {
        name: {
            "images": len(out_scores),
            "AUROC": metrics.auroc(in_scores, out_scores),
            "AUPR": metrics.aupr(in_scores, out_scores),
            "FPR at 95 % TPR": metrics.fpr_at_95_tpr(in_scores, out_scores),
        }
        for name, out_scores in scores.items()
    }
    xlabel = "score −E (higher: more like the data of training)"
    pictures.plot_histograms({"in distribution": in_scores, **scores}, run.add_file("scores.png"), xlabel=xlabel)
    if scores:
        curves = {name: (in_scores, out_scores) for name, out_scores in scores.items()}
        pictures.plot_roc(curves, run.add_file("roc.png"))
    return Report(figures, run.get_published({} if run.model.classes else PAPER_AUROC))


def load_outliers(run: SandboxRun, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the images (M, C, H, W) of each out-of-distribution set.

    The images are converted to the shape of the test images.
    """
    for name in run.mixes:
        if name == "interpolation":
            yield name, average_with_next(images)
        elif name == "random":
            yield name, draw_gaussian_noise(images, run.model.generator)
        else:
            dataset = run.load_mix(name)
            yield dataset.name, draw_from_set(run, dataset)


def draw_from_set(run: SandboxRun, dataset: Dataset) -> Tensor:
    """Return random images of an out-of-distribution set, converted to the shape (N, C, H, W) of the model's images."""
    outsiders, _ = dataset.batch(run.draw_index(dataset, run.choose_number(), dataset.name), run.model.generator)
    return fit_images(outsiders, run.config.image_shape)


# ---------------------------------------------------------------------------------------------------------------------
# Task ood


class OutlierSet(NamedTuple):
    """A set of outliers: its group ("left out", "near", "far" or "made"), and a function that draws its images."""

    group: str
    draw: Callable[[SandboxRun, Tensor], Tensor]


def find_outlier_sets(run: SandboxRun) -> dict[str, OutlierSet]:
    """Return the sets to compare with by name: a class left out of training, data sets, folders, and those in MADE.

    Without the setting `mixset`, data sets are those of LOOKED_FOR whose files are there; a note names the others.
    """
    settings, own = run.settings, run.load("test").name
    loaded, missing = [run.load_left_out()] if run.load_left_out else [], []
    for name in (*(settings.mixset or LOOKED_FOR), *settings.mixfolder):
        is_asked = name in settings.mixset or name in settings.mixfolder
        if name == own and is_asked:
            raise UsageError(f"`mixset`={name}: the model is of this data set; leave it out")
        try:
            loaded += [] if name == own else [run.load_mix(name, download=is_asked)]
        except UsageError:
            if is_asked:
                raise
            missing.append(name)
    if missing:
        print(
            f"note: not in {settings.datadir}: {', '.join(missing)}; to download and compare some, name them in mixset"
        )
    if reserved := next((each.name for each in loaded if each.name in (OWN, *MADE)), None):
        raise UsageError(f"`mixfolder`: task ood itself makes a set called {reserved}; rename the folder")
    sets = {each.name: OutlierSet(find_group(each.name, own), draw_from(each)) for each in loaded}
    return sets | {name: OutlierSet("made", make_from_test_images(make)) for name, make in MADE.items()}


def find_group(name: str, own: str) -> str:
    """Return the group of a set of images of this name, for a model of the data set `own`."""
    if name.startswith(LEFT_OUT):
        return LEFT_OUT
    return "near" if name.lower().startswith(NEAR.get(own, ())) else "far"


def draw_from(dataset: Dataset) -> Callable[[SandboxRun, Tensor], Tensor]:
    """Return a function that draws from a data set, see `draw_from_set`."""
    return lambda run, images: draw_from_set(run, dataset)


def make_from_test_images(make: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[SandboxRun, Tensor], Tensor]:
    """Return a function that makes outliers of test images."""
    return lambda run, images: make(images, run.model.generator)


def compare_scores(run: SandboxRun) -> Report:
    """Detect outliers of many kinds, several times, by six scores that a trained energy gives."""
    if run.model.classes:
        run.require_class_names("ood")
    if not run.model.num_steps:
        raise UsageError("`num_steps`=0: task ood also looks at what a chain does to an image; give at least 1")
    if min(run.count_images(split, run.choose_number()) for split in ("train", "test")) < 2:
        raise UsageError("task ood compares images with several of training; take more than one")
    sets, repeats = find_outlier_sets(run), run.settings.repeats
    number = run.count_images("test", run.choose_number())
    run.announce(f"{number:,} test images and as many of each of {len(sets)} sets, {repeats} times", 1)
    scored: list[dict[str, Scores]] = []
    with contextlib.suppress(Interruption):
        for repeat in range(repeats):
            scored.append({})
            for title, scores in score_sets(run.with_seed(fold_seed(run.settings.seed + repeat)), sets):
                scored[-1][title] = scores
    run.results.workers.note_part("sets", sum(len(each) for each in scored), repeats * (len(sets) + 1))
    with show_waiting("measuring how well the scores separate the sets"):
        measures = measure_scores(scored)
    if not measures:
        run.model.require_all()
    write_measures(run, sets, measures)
    with show_waiting("plotting the scores"):
        pictures.plot_scores(transpose_scores(scored[0]), OWN, run.add_file("scores.png"))
    return Report(tabulate_auroc(sets, scored[0], measures))


def score_sets(run: SandboxRun, sets: Mapping[str, OutlierSet]) -> Iterator[tuple[str, Scores]]:
    """Yield the name and the scores of the test images, then of each set of outliers; after a signal Interruption."""

    def measure(images: Tensor, title: str) -> EnergyTraits:
        traits = run.model.measure_traits(images, progress=title)
        run.model.require_all()
        return traits

    number = min(run.choose_number(), TRAINING_IMAGES)
    train = measure(run.draw_examples("train", number).images, "training images")
    test = run.draw_examples("test", run.choose_number()).images
    for title, images in itertools.chain([(OWN, test)], ((name, each.draw(run, test)) for name, each in sets.items())):
        found = measure(images, title)
        with show_waiting(f"comparing {title} with training images"):
            scores = {name: score(found, train) for name, score in SCORES.items()}
        yield title, scores


def measure_scores(scored: Sequence[Mapping[str, Scores]]) -> Measures:
    """Return how well each score separates each set from the test images: (set, score, measure) -> one for a repeat."""
    measures: Measures = {}
    for sets in scored:
        for title, scores in sets.items():
            if title == OWN:
                continue
            for (name, outside), (measure, separate) in itertools.product(scores.items(), MEASURES.items()):
                measures.setdefault((title, name, measure), []).append(separate(sets[OWN][name], outside))
    return measures


def transpose_scores(scored: Mapping[str, Scores]) -> dict[str, dict[str, np.ndarray]]:
    """Return the scores of sets by the name of the score: score -> set -> values."""
    return {name: {title: scores[name] for title, scores in scored.items()} for name in SCORES}


def write_measures(run: SandboxRun, sets: Mapping[str, OutlierSet], measures: Measures) -> None:
    """Write all measures, their mean and standard deviation over the repeats, to the table measures.csv."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["set", "group", "score", "measure", "repeats", "mean", "standard deviation"])
    for (title, score, measure), values in measures.items():
        deviation = statistics.stdev(values) if len(values) > 1 else ""
        table.writerow([title, sets[title].group, score, measure, len(values), statistics.fmean(values), deviation])
    write_file(run.add_file("measures.csv"), lambda file: file.write(text.getvalue().encode()))


def tabulate_auroc(
    sets: Mapping[str, OutlierSet], scored: Mapping[str, Scores], measures: Measures
) -> dict[str, dict[str, object]]:
    """Return rows of AUROCs, one for each set and one for the mean of the near and of the far sets.

    A cell is the mean of the repeats ± their standard deviation. scored: the scores of one repeat.
    """

    def format_cell(values: Sequence[float]) -> str:
        return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")

    images = {title: len(next(iter(scores.values()))) for title, scores in scored.items()}
    rows: dict[str, dict[str, object]] = {}
    for title, (group, _) in sets.items():
        if title in scored:
            cells = {score: format_cell(measures[title, score, "AUROC"]) for score in SCORES}
            rows[title] = {"group": group, "images": images[title]} | cells
    for group in ("near", "far"):
        members = [title for title, each in sets.items() if title in scored and each.group == group]
        if len(members) > 1:
            # The repeats that a signal has left out of some sets are left out of all.
            columns = {score: [measures[title, score, "AUROC"] for title in members] for score in SCORES}
            means = {
                score: [statistics.fmean(row) for row in zip(*each, strict=False)] for score, each in columns.items()
            }
            cells = {score: format_cell(values) for score, values in means.items()}
            total = sum(images[title] for title in members)
            rows[f"mean of the {group} sets"] = {"group": group, "images": total} | cells
    return rows

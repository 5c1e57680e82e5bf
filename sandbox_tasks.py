"""The tasks of ebm_sandbox.py: each examines a model, writes pictures, plots and arrays, and returns its figures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import metrics
import pictures
from data import Dataset
from ebm.settings import SandboxSettings
from errors import UsageError
from sandbox import (
    Attack,
    Sandbox,
    feature_directions,
    fitted,
    hessian_directions,
    in_lower_half,
    nearest,
    read_images,
    salt_and_pepper,
    within_ball,
)
from training import noise_images
from utils import Progress

MOST = 50_000  # images a task looks at, unless `limit` says otherwise,
MOST_PIXELS = 500_000_000  # and their pixels: 2 GB as floats
ROWS = 20  # of a picture
LONG = 50  # rounds of a long chain, 1,000 steps by default
SHADES = 255  # `lival`, `l2val` and `refine` are in units of 1/255
DIRECTIONS = 3  # along which task latent moves an image
LATENT_STEP = 4.0  # length of a move, in units of images, L2

# The paper's figures for CIFAR-10, of a conditional and of an unconditional model, as later papers quote them.
# "?": not verified.
PAPER_ACCURACY = "0.491"
PAPER_AUROC = {
    "svhn": "0.63",
    "textures": "0.48",
    "cifar100": "0.50",
    "interpolation": "0.70",
    "random": "1.0 ? (uniform noise)",
}


class Examples(NamedTuple):
    """Images of a data set with the labels that the model is conditioned on."""

    images: Tensor  # (N, C, H, W) in [0, 1]
    labels: Tensor  # (N, label_size), of width 0 where there are none

    @property
    def classes(self) -> Tensor:
        """The classes (N,) of one-hot labels."""
        return self.labels.argmax(1)

    def first(self, number: int) -> Examples:
        return Examples(self.images[:number], self.labels[:number])


class Report(NamedTuple):
    """What a task found: figures by name, or rows of them by name; `paper` holds published ones under these names."""

    figures: Mapping[str, Any]
    paper: Mapping[str, str] = {}


@dataclasses.dataclass
class Run:
    """One task on one model: where its images come from, where its files go.

    load: the model's data set by its split, "train" or "test". mixes: names of out-of-distribution sets, "random",
    "interpolation" or what load_mix takes. folder: takes the files, which `files` lists. names: of the classes, as the
    checkpoint has them; without them those of the data set. used: what was looked at.
    """

    sandbox: Sandbox
    settings: SandboxSettings
    load: Callable[[str], Dataset]
    load_mix: Callable[[str], Dataset]
    mixes: Sequence[str]
    folder: Path
    names: tuple[str, ...] = ()
    files: list[Path] = dataclasses.field(default_factory=list)
    used: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def refine(self) -> float:
        """Radius of the L∞ ball in which Langevin dynamics refines an image to be classified."""
        return self.settings.refine / SHADES

    def rows(self, number: int) -> int:
        """Return how many images to look at: `limit`, or this number."""
        return self.settings.most_images or number

    def all(self) -> int:
        """Return how many images to look at where all would be best: `limit`, or as many as memory surely holds."""
        return self.rows(min(MOST, MOST_PIXELS // math.prod(self.sandbox.model.config.image_shape)))

    def pick(self, dataset: Dataset, number: int, what: str) -> Tensor:
        """Return the indices of `number` images, in random order: the same for the same seed."""
        number = min(number, len(dataset))
        self.used[what] = f"{number} of {len(dataset)} images of {dataset.name}, dequantisation: {dataset.noise}"
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.settings.seed))
        return order[:number].to(self.sandbox.device)

    def examples(self, split: str, number: int) -> Examples:
        """Return images of the model's data set, dequantised as in training, as the reference does."""
        dataset = self.load(split)
        images, labels = dataset.batch(self.pick(dataset, number, split), self.sandbox.generator)
        return Examples(images, images.new_zeros(len(images), 0) if labels is None else labels)

    def known_names(self) -> tuple[str, ...]:
        """Return the names of the classes that the model is conditioned on, none where its labels are no classes."""
        return (self.names or self.load("test").class_names) if self.sandbox.classes else ()

    def class_names(self, needed_by: str) -> tuple[str, ...]:
        """Return the names of the classes; raise UsageError where the model is not conditioned on classes."""
        names = self.known_names()
        if not names:
            given = "on labels that are no classes" if self.sandbox.classes else "on nothing"
            raise UsageError(
                f"`task`={needed_by} needs a model conditioned on classes, this one is conditioned {given}"
            )
        return names

    def sample_labels(self, number: int) -> Tensor:
        """Return labels (number, label_size) of images to sample: the classes in order, else labels of real images."""
        place = torch.arange(number, device=self.sandbox.device)
        if not self.sandbox.classes:
            return torch.zeros(number, 0, device=self.sandbox.device)
        if self.known_names():
            return torch.eye(self.sandbox.classes, device=self.sandbox.device)[place * self.sandbox.classes // number]
        labels = self.examples("test", number).labels
        return labels[place % len(labels)]

    def noise(self, number: int) -> Tensor:
        """Return images of noise to start chains from."""
        config = self.sandbox.model.config
        return noise_images((number, *config.image_shape), self.sandbox.generator, network=config.network)

    def paper(self, figures: Mapping[str, str]) -> Mapping[str, str]:
        """Return these published figures where they compare: they were measured on CIFAR-10."""
        return figures if self.load("test").name == "cifar10" else {}

    # ------------------------------------------------------------------------------------------ files

    def path(self, name: str) -> Path:
        """Return the path of a file of this task, and list it."""
        self.files.append(self.folder / name)
        return self.files[-1]

    def panel(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Write a picture of named columns, a row per image, small images enlarged."""
        width = self.sandbox.model.config.image_shape[2]
        scale = max(1, min(96, 1800 // len(columns)) // width)
        pictures.save_panel(columns, self.path(f"{name}.png"), scale=scale)

    def array(self, name: str, values: Tensor | list[float]) -> np.ndarray:
        """Write numbers as .npy and return them."""
        array = torch.as_tensor(values).cpu().numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.path(f"{name}.npy"), array)
        return array


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def label(run: Run) -> Report:
    """Classify test images by −E(x, y), attacked if asked; with `labelgrid` attacked in balls of growing radius."""
    run.class_names("label")
    return label_grid(run) if run.settings.labelgrid else classification(run)


def labelfinetune(run: Run) -> Report:
    """Train one epoch on the cross-entropy of the class logits, or load what was so trained, then classify."""
    run.class_names("labelfinetune")
    sandbox, path = run.sandbox, run.folder / "model_supervised.pt"
    if not run.settings.train:
        if not path.exists():
            raise UsageError(f"`train`=False classifies with {path}, which is missing; run once with `train`")
        run.sandbox = dataclasses.replace(sandbox, model=checkpoint.load_energy(path, device=sandbox.device))
        run.sandbox.bias = checkpoint.load(path)["bias"].to(sandbox.device)
        return classification(run)
    loss = sandbox.finetune(*run.examples("train", run.all()))
    contents = {"config": dataclasses.asdict(sandbox.model.config), "model": sandbox.model.state_dict()}
    checkpoint.save(run.path(path.name), contents | {"bias": sandbox.bias, "iteration": 0})
    return Report({"mean loss of the epoch": loss, **classification(run).figures})


def classification(run: Run) -> Report:
    """Accuracy on test images by −E(x, y), as they are and refined; the same on attacked images."""
    examples = run.examples("test", run.all())
    images, classes = examples.images, examples.classes
    attack = attack_of(run.settings)
    attacked = run.sandbox.attack(images, classes, attack, run.refine)
    figures: dict[str, object] = {"attack": str(attack), "refinement": refinement(run)}
    figures |= accuracies(run, "clean", images, classes)
    if attack.steps:
        figures |= accuracies(run, "attacked", attacked, classes)

    shown, moved = examples.first(ROWS), attacked[:ROWS]
    ball = functools.partial(within_ball, radius=run.refine)
    refined = run.sandbox.chain(moved, shown.labels, rounds=1, restrict=ball, progress="images to show")
    change = refined - shown.images
    contrast = 0.5 + 0.5 * change / change.abs().amax().clamp(min=1e-12)
    columns = {"real": shown.images} | ({"attacked": moved} if attack.steps else {})
    run.panel("images", columns | {"refined": refined, "change": contrast})
    return Report(figures, run.paper({"clean": PAPER_ACCURACY}))


def label_grid(run: Run) -> Report:
    """Accuracy on attacked images over the radius of the ball: L∞ 0 … 30/255, or L2 0 … 95/255."""
    if not run.settings.pgd:
        raise UsageError("`labelgrid` needs an attack; give its number of steps with `pgd`")
    examples = run.examples("test", run.all())
    images, classes = examples.images, examples.classes
    radii = list(range(31) if run.settings.lnorm == "-1" else range(0, 100, 5))
    passes = 3 if run.sandbox.num_steps else 2
    progress = Progress(passes * len(radii) * len(images), what="grid")
    rows = {}
    for radius in radii:
        attacked = run.sandbox.attack(images, classes, attack_of(run.settings, radius), run.refine, progress=progress)
        rows[f"{radius}/255"] = accuracies(run, "attacked", attacked, classes, progress)
    curves = {name: [row[name] for row in rows.values()] for name in rows["0/255"]}
    run.array("accuracies", torch.tensor([radii, *curves.values()]))
    lines = {name: (radii, values) for name, values in curves.items()}
    xlabel = f"radius of the {'L∞' if run.settings.lnorm == '-1' else 'L2'} ball / (1/255)"
    pictures.plot_lines({"accuracy": lines}, run.path("accuracies.png"), xlabel=xlabel)
    largest = {"attack in the largest ball": str(attack_of(run.settings, radii[-1]))}
    return Report({**largest, "refinement": refinement(run), **rows})


def attack_of(settings: SandboxSettings, radius: float | None = None) -> Attack:
    """Return the attack that the flags describe, or the same in a ball of another radius, in units of 1/255."""
    norm, usual = ("li", settings.lival) if settings.lnorm == "-1" else ("l2", settings.l2val)
    return Attack(norm, (usual if radius is None else radius) / SHADES, settings.pgd, settings.adaptive)


def refinement(run: Run) -> str:
    """Return in words how images are refined before they are classified."""
    steps = run.sandbox.num_steps
    return f"{steps} Langevin steps under each class, L∞ ball of {run.settings.refine:g}/255" if steps else "none"


def accuracies(
    run: Run, name: str, images: Tensor, classes: Tensor, progress: Progress | None = None
) -> dict[str, float]:
    """Return the accuracy on images of these classes (N,), and the one on refined images where they are refined."""
    refined = f"{name}, refined"
    logits = {name: run.sandbox.logits(images, progress=progress or f"classify {name}")}
    if run.sandbox.num_steps:
        logits[refined] = run.sandbox.logits(images, run.refine, progress=progress or f"classify {refined}")
    return {name: (found.argmax(1) == classes).double().mean().item() for name, found in logits.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Energies


def energyeval(run: Run) -> Report:
    """Energies of training and of test images: a model that generalises does not tell them apart."""
    energies: dict[str, np.ndarray] = {}
    figures: dict[str, object] = {}
    for split in ("train", "test"):
        found = run.sandbox.energies(*run.examples(split, run.all()), progress=f"energies of {split}")
        energies[split] = run.array(f"energies_{split}", found)
        figures |= {f"{split} mean": found.mean().item(), f"{split} std": found.std(correction=0).item()}
    auroc, verdict = memorised(run, -energies["train"], -energies["test"])
    pictures.plot_histograms(energies, run.path("energies.png"), xlabel="energy", title=verdict)
    return Report({**figures, "AUROC train/test": auroc, "verdict": verdict})


def memorised(run: Run, train_scores: np.ndarray, test_scores: np.ndarray) -> tuple[float | None, str]:
    """Return how well scores, higher like training, tell training from test images: as AUROC, and in words."""
    if have_same_images(run.load("train"), run.load("test")):
        return None, "train and test are the same images: this data set has no split"
    auroc = metrics.auroc(train_scores, test_scores)
    return auroc, f"AUROC of train against test {auroc:.3f} (0.5: alike, 1: memorised)"


def have_same_images(one: Dataset, other: Dataset) -> bool:
    """Return whether two data sets are the same images, by a thousand of them."""
    if len(one) != len(other):
        return False
    some = torch.arange(0, len(one), max(1, len(one) // 1_000))
    return torch.equal(one.raw(some), other.raw(some))


def diagnose(run: Run) -> Report:
    """Energies along chains of 50 rounds from noise and from test images, beside those of the data, and their way."""
    sandbox, examples = run.sandbox, run.examples("test", run.rows(100))
    starts = {"noise": run.noise(len(examples.images)), "images": examples.images}
    rounds = [0, 1, LONG // 10, LONG // 2, LONG]
    steps = [k * sandbox.num_steps for k in range(LONG + 1)]
    energies: dict[str, Tensor] = {}  # (LONG + 1, N)
    moved: dict[str, list[float]] = {}
    shown: dict[str, Tensor] = {}
    quiet = Progress(0, what="energies", quiet=True)
    for name, start in starts.items():
        found, moved[name] = [], []
        stages = sandbox.stages(start, examples.labels, rounds=LONG, progress=f"chains from {name}")
        for k, x in enumerate(stages):
            found.append(sandbox.energies(x, examples.labels, progress=quiet))
            moved[name].append((x - start).abs().mean().item())
            if k in rounds:
                shown[f"{name}, {steps[k]}"] = x[:ROWS]
        energies[name] = torch.stack(found)
        run.array(f"energies_from_{name}", energies[name])
    data_energies = energies["images"][0]
    low, high = data_energies.quantile(torch.tensor([0.05, 0.95], device=sandbox.device)).tolist()
    within = ((low <= energies["noise"]) & (energies["noise"] <= high)).double().mean(1).tolist()

    lines = {f"from {name}": (steps, found.mean(1).cpu()) for name, found in energies.items()}
    band = {"data, 5 %": (steps, [low] * len(steps)), "data, 95 %": (steps, [high] * len(steps))}
    ways = {f"from {name}": (steps, way) for name, way in moved.items()}
    panels: dict[str, Any] = {
        "mean energy": lines | band,
        "mean |x − start|": ways,
        "share within": {"from noise": (steps, within)},
    }
    pictures.plot_lines(panels, run.path("chains.png"), xlabel="Langevin steps")
    ends = {f"noise, {steps[k]} steps": energies["noise"][k].cpu() for k in (1, LONG)}
    pictures.plot_histograms({"data": data_energies.cpu(), **ends}, run.path("energies.png"), xlabel="energy")
    run.panel("images", shown)
    rows = {
        f"step {steps[k]}": {
            **{f"E from {name}": found[k].mean().item() for name, found in energies.items()},
            "within data": within[k],
            **{f"moved from {name}": way[k] for name, way in moved.items()},
        }
        for k in rounds
    }
    verdict = f"{within[-1]:.0%} of the chains from noise end within the middle 90 % of the data's energies"
    return Report({"data mean": data_energies.mean().item(), "verdict": verdict, **rows})


def mixenergy(run: Run) -> Report:
    """Tell test images from out-of-distribution ones by −E, under the class of lowest energy if there are classes."""
    if run.sandbox.classes:
        run.class_names("mixenergy")
    images = run.examples("test", run.all()).images
    inside = run.array("scores_in_distribution", run.sandbox.scores(images, progress="scores of test"))
    scores, figures = {}, {}
    for name, outsiders in outside(run, images):
        scores[name] = run.array(f"scores_{name}", run.sandbox.scores(outsiders, progress=f"scores of {name}"))
        figures[name] = {
            "images": len(outsiders),
            "AUROC": metrics.auroc(inside, scores[name]),
            "AUPR": metrics.aupr(inside, scores[name]),
            "FPR at 95 % TPR": metrics.fpr_at_95_tpr(inside, scores[name]),
        }
    pictures.plot_histograms({"in distribution": inside, **scores}, run.path("scores.png"), xlabel="−E")
    pictures.plot_roc({name: (inside, found) for name, found in scores.items()}, run.path("roc.png"))
    return Report(figures, run.paper({} if run.sandbox.classes else PAPER_AUROC))


def outside(run: Run, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and images (M, C, H, W) of each out-of-distribution set, in the shape of the test images."""
    generator = run.sandbox.generator
    for name in run.mixes:
        if name == "interpolation":
            yield name, (images + images.roll(-1, 0)) / 2
        elif name == "random":
            yield name, 0.5 + 0.5 * torch.randn(images.shape, generator=generator, device=images.device)
        else:
            dataset = run.load_mix(name)
            outsiders, _ = dataset.batch(run.pick(dataset, run.all(), dataset.name), generator)
            yield dataset.name, fitted(outsiders, run.sandbox.model.config.image_shape)


# ---------------------------------------------------------------------------------------------------------------------
# Restoring images


def mean_square(images: Tensor, real: Tensor) -> Tensor:
    """Return the mean squared error of each image, (N,)."""
    return (images - real).square().flatten(1).mean(1)


def anticorrupt(run: Run) -> Report:
    """Remove salt-and-pepper noise: 5 rounds of Langevin dynamics from the corrupt image."""
    real, labels = run.examples("test", run.rows(ROWS))
    corrupt = salt_and_pepper(real, run.sandbox.generator)
    restored = run.sandbox.chain(corrupt, labels, rounds=5, progress="anticorrupt")
    columns = {"corrupt": corrupt, "restored": restored, "real": real}
    run.panel("restored", {name: images[:ROWS] for name, images in columns.items()})
    return Report({f"MSE {name}": mean_square(columns[name], real).mean().item() for name in ("corrupt", "restored")})


def boxcorrupt(run: Run) -> Report:
    """Inpaint the lower half: were training images restored better than test images, the model would memorise."""
    errors: dict[str, np.ndarray] = {}
    columns: dict[str, Tensor] = {}
    figures: dict[str, object] = {}
    for split in ("train", "test"):
        real, labels = run.examples(split, run.rows(10_000))
        half = real.shape[2] // 2
        corrupt = torch.cat([real[:, :, :half], run.noise(len(real))[:, :, half:]], 2)
        restored = run.sandbox.chain(corrupt, labels, rounds=10, restrict=in_lower_half, progress=f"inpaint {split}")
        found = mean_square(restored[:, :, half:], real[:, :, half:])
        errors[split] = run.array(f"mse_{split}", found)
        figures |= {f"{split} MSE mean": found.mean().item(), f"{split} MSE std": found.std(correction=0).item()}
        shown = {"start": corrupt, "restored": restored, "real": real}
        columns |= {f"{split} {name}": images[:ROWS] for name, images in shown.items()}
    auroc, verdict = memorised(run, -errors["train"], -errors["test"])
    pictures.plot_histograms(errors, run.path("mse.png"), xlabel="MSE of the lower half", title=verdict)
    run.panel("restored", columns)
    return Report({**figures, "AUROC train/test": auroc, "verdict": verdict})


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def recognised(run: Run, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of images whose class of lowest energy is the one of their label, where labels are classes."""
    if not run.known_names():
        return {}
    found = run.sandbox.logits(images, progress="recognise").argmax(1)
    return {"recognised as the class": (found == labels.argmax(1)).double().mean().item()}


def crossclass(run: Run) -> Report:
    """Turn images of one class into another: 10 rounds of Langevin dynamics under the other class."""
    run.class_names("crossclass")
    pool = run.examples("test", 1000)
    target = pool.first(run.rows(ROWS))
    differs = (target.classes[:, None] != pool.classes).float()
    if not differs.any(1).all():
        raise UsageError("`task`=crossclass needs images of at least two classes; use another `dataset`")
    start = pool.images[differs.multinomial(1, generator=run.sandbox.generator)[:, 0]]
    stages = list(run.sandbox.stages(start, target.labels, rounds=10, progress="crossclass"))
    run.panel("crossclass", numbered(run, stages) | {"class": target.images})
    return Report(recognised(run, stages[-1], target.labels))


def numbered(run: Run, stages: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the stages of a chain as columns, named by the number of steps done."""
    return {str(i * run.sandbox.num_steps) if i else "start": stage for i, stage in enumerate(stages)}


def cycleclass(run: Run) -> Report:
    """Sample from noise, 20 rounds of Langevin dynamics, and show every one."""
    rows = run.rows(100)
    labels = run.sample_labels(rows)
    stages = list(run.sandbox.stages(run.noise(rows), labels, rounds=20, progress="cycleclass"))
    run.panel("cycleclass", numbered(run, stages))
    return Report(recognised(run, stages[-1], labels))


def democlass(run: Run) -> Report:
    """Sample 5 images of each class from noise, 10 rounds of Langevin dynamics; of 10 classes where there are more."""
    names = run.class_names("democlass")
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(run.settings.seed))[:10].sort().values
    labels = torch.eye(len(names))[chosen.repeat_interleave(5)].to(run.sandbox.device)
    samples = run.sandbox.chain(run.noise(len(labels)), labels, rounds=10, progress="democlass")
    run.panel("democlass", {names[k]: five for k, five in zip(chosen.tolist(), samples.split(5), strict=True)})
    return Report(recognised(run, samples, labels))


def nearestneighbor(run: Run) -> Report:
    """Sample 10 images and show the 5 training images nearest to each in L2; test images are measured beside them."""
    train, rows = run.load("train"), run.rows(10)
    samples = run.sandbox.chain(run.noise(rows), run.sample_labels(rows), rounds=10, progress="nearestneighbor")
    distances, indices = nearest(torch.cat([samples, run.examples("test", rows).images]), train, 5)
    neighbours = read_images(train, indices[:rows].flatten()).view(rows, -1, *train.image_shape)
    columns = {f"nearest {k + 1}": neighbours[:, k] for k in range(neighbours.shape[1])}
    run.panel("neighbours", {"sample": samples, **columns})
    closest = {"samples": distances[:rows, 0], "test images": distances[rows:, 0]}
    return Report({f"L2 distance of {name} to the nearest": value.mean().item() for name, value in closest.items()})


def latent(run: Run) -> Report:
    """Move images back and forth along the directions in which the energy varies most, 6 moves with a round each."""
    sandbox, moves = run.sandbox, 6
    images, labels = run.examples("test", run.rows(3))
    found = [directions(run, images[i], labels[i : i + 1]) for i in range(len(images))]
    rows = torch.arange(len(images), device=images.device).repeat_interleave(DIRECTIONS).repeat(2)
    step = LATENT_STEP * torch.cat([vectors for _, vectors in found])
    step, x = torch.cat([-step, step]), images[rows]
    backwards, columns = {}, {"0": x[: len(x) // 2]}
    progress = Progress(moves * len(x), what="latent")
    for move in range(1, moves + 1):
        x = sandbox.chain(x + step, labels[rows], rounds=1, pull=4.0, progress=progress)
        backwards[f"-{move}"], columns[f"+{move}"] = x.tensor_split(2)
    run.panel("traversals", dict(reversed(backwards.items())) | columns)
    values = {f"image {i + 1}": values.tolist() for i, (values, _) in enumerate(found)}
    return Report({name: {f"value {k + 1}": v for k, v in enumerate(row)} for name, row in values.items()})


def directions(run: Run, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (3,) and directions (3, C, H, W) of the energy's Hessian, or of the features."""
    sandbox = run.sandbox
    if run.settings.hessian:
        energy = functools.partial(sandbox.energy, labels=label)
        return hessian_directions(energy, image, DIRECTIONS, sandbox.generator)
    return feature_directions(functools.partial(sandbox.features, labels=label), image, DIRECTIONS)


TASKS: dict[str, Callable[[Run], Report]] = {
    "label": label,
    "labelfinetune": labelfinetune,
    "energyeval": energyeval,
    "diagnose": diagnose,
    "mixenergy": mixenergy,
    "anticorrupt": anticorrupt,
    "boxcorrupt": boxcorrupt,
    "crossclass": crossclass,
    "cycleclass": cycleclass,
    "democlass": democlass,
    "nearestneighbor": nearestneighbor,
    "latent": latent,
}

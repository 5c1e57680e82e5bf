"""The tasks of ebm_sandbox.py: each examines a model, writes pictures, plots and arrays, and returns its figures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
from data import Dataset
from ebm.settings import SandboxSettings
from ebm.support import metrics, pictures
from ebm.support.errors import UsageError
from ebm.support.files import write_file
from ebm.support.progress import Progress
from ebm.tasks.analysis import (
    add_salt_and_pepper,
    average_with_next,
    find_feature_directions,
    find_hessian_directions,
    find_neighbours,
    fit_images,
    read_images,
)
from ebm.tasks.attacks import SHADES, Attack, restrict_to_ball, restrict_to_lower_half
from ebm.tasks.examined_model import ExaminedModel, count_most_images
from ebm.training.ownership import own_folder
from models import ModelConfig, draw_noise_images

ROWS = 20  # rows of a picture
LONG = 50  # rounds of a long chain, 1,000 steps by default
SHOWN_ROUNDS = (0, 1, LONG // 10, LONG // 2, LONG)  # rounds after which figures and pictures are reported
ROUNDS = {"anticorrupt": 5, "boxcorrupt": 10, "crossclass": 10, "cycleclass": 20, "democlass": 1, "nearestneighbor": 10}
DIRECTIONS = 3  # number of directions in which task latent moves an image
MOVES = 7  # of task latent: from the image itself, then six from where the last one led

# The paper's figures for CIFAR-10, as later papers quote them: the accuracy of a conditional model, and the AUROC of an
# unconditional one. "?": not verified.
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
    labels: Tensor  # (N, label_size), of width 0 for an unconditional model

    @property
    def classes(self) -> Tensor:
        """The classes (N,) of one-hot labels."""
        return self.labels.argmax(1)

    def first(self, number: int) -> Examples:
        """Return the first `number` images with their labels."""
        return Examples(self.images[:number], self.labels[:number])


class Report(NamedTuple):
    """The result of a task: figures, or rows of figures, by name; `paper` holds the published ones of these names."""

    figures: Mapping[str, Any]
    paper: Mapping[str, str] = {}


@dataclasses.dataclass
class SandboxRun:
    """One task on one model, with its data sets and the folder for its files.

    load: returns the model's data set for a split, "train" or "test". mixes: names of out-of-distribution sets:
    "random", "interpolation", or a name that load_mix accepts. folder: for files, which `files` lists. names: of the
    classes, from the checkpoint; if empty, the names come from the data set. used: a description of the images that
    the task has examined.
    """

    model: ExaminedModel
    settings: SandboxSettings
    load: Callable[[str], Dataset]
    load_mix: Callable[[str], Dataset]
    mixes: Sequence[str]
    folder: Path
    names: tuple[str, ...] = ()
    files: list[Path] = dataclasses.field(default_factory=list)
    used: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model's network."""
        return self.model.model.config

    @property
    def refine(self) -> float:
        """The radius of the L∞ ball within which Langevin steps refine an image before it is classified."""
        return self.settings.refine / SHADES

    def choose_number(self, usual: int | None = None) -> int:
        """Return how many images to use: `limit` if it is set, else the usual number of a task.

        usual: None stands for as many as possible, up to a number that memory surely holds.
        """
        if self.settings.most_images:
            return self.settings.most_images
        return count_most_images(self.config.image_shape) if usual is None else usual

    def draw_index(self, dataset: Dataset, number: int, what: str) -> Tensor:
        """Return the indices of `number` random images; the same seed gives the same indices.

        what: the name of the images in the report.
        """
        number = min(number, len(dataset))
        self.used[what] = f"{number} of {len(dataset)} images of {dataset.name}, dequantisation: {dataset.noise}"
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.settings.seed))
        return order[:number].to(self.model.device)

    def draw_examples(self, split: str, number: int) -> Examples:
        """Return random images of the model's data set with their labels."""
        dataset = self.load(split)
        images, labels = dataset.batch(self.draw_index(dataset, number, split), self.model.generator)
        return Examples(images, images.new_zeros(len(images), 0) if labels is None else labels)

    def find_class_names(self) -> tuple[str, ...]:
        """Return the names of the classes that the model is conditioned on; none if its labels are not classes."""
        return (self.names or self.load("test").class_names) if self.model.classes else ()

    def require_class_names(self, needed_by: str) -> tuple[str, ...]:
        """Return the names of the classes; raise UsageError if the model is not conditioned on classes.

        needed_by: the task, for the message.
        """
        names = self.find_class_names()
        if not names:
            kind = "conditioned on other labels" if self.model.classes else "unconditional"
            raise UsageError(f"`task`={needed_by} needs a model conditioned on classes, this one is {kind}")
        return names

    def sample_labels(self, number: int) -> Tensor:
        """Return labels (number, label_size) for samples: the classes in order, or labels of real images.

        The latter are used if the model is conditioned on labels that are not classes.
        """
        place = torch.arange(number, device=self.model.device)
        if not self.model.classes:
            return torch.zeros(number, 0, device=self.model.device)
        if self.find_class_names():
            return torch.eye(self.model.classes, device=self.model.device)[place * self.model.classes // number]
        labels = self.draw_examples("test", number).labels
        return labels[place % len(labels)]

    def draw_noise(self, number: int) -> Tensor:
        """Return images of noise, from which chains start."""
        return draw_noise_images(self.config, number, self.model.generator)

    def get_published(self, figures: Mapping[str, str]) -> Mapping[str, str]:
        """Return the published figures if the data set is CIFAR-10, on which they were measured; else none."""
        return figures if self.load("test").name == "cifar10" else {}

    # ------------------------------------------------------------------------------------------ files

    def add_file(self, name: str) -> Path:
        """Return the path of a file in the task's folder, and add it to `files`."""
        self.files.append(self.model.workers.choose_folder(self.folder) / name)
        return self.files[-1]

    def write_panel(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Write a picture with a titled column per batch of images and a row per image; small images are enlarged."""
        side = max(self.config.image_shape[1:])
        scale = max(1, min(96, 1800 // len(columns)) // side)
        pictures.save_panel(columns, self.add_file(f"{name}.png"), scale=scale)

    def write_array(self, name: str, values: Tensor | list[float]) -> np.ndarray:
        """Write numbers to an .npy file and return them as an array."""
        array = torch.as_tensor(values).cpu().numpy()
        write_file(self.add_file(f"{name}.npy"), lambda file: np.save(file, array))
        return array


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def classify_images(run: SandboxRun) -> Report:
    """Classify test images by −E(x, y), also after an attack (`pgd`), or attacks of growing radius (`labelgrid`)."""
    run.require_class_names("label")
    if run.settings.labelgrid:
        return classify_in_balls(run)
    name = "lival" if run.settings.lnorm == "-1" else "l2val"
    value, usual = getattr(run.settings, name), getattr(SandboxSettings, name)
    if run.settings.pgd and value != usual:
        print(f"note: {name}={value:g} takes effect; the reference attacks with {usual:g}, except in a grid")
    return classify_test_images(run)


def finetune_classifier(run: SandboxRun) -> Report:
    """Train the model for one epoch as a classifier, or load it with `train`=False, then classify as task label."""
    run.require_class_names("labelfinetune")
    model, path = run.model, run.folder / "model_supervised.pt"
    if not run.settings.train:
        if not path.exists():
            raise UsageError(f"`train`=False loads {path}, which is missing; run once with `train`")
        if "bias" in checkpoint.load(path):
            raise UsageError(f"{path} is of an earlier version, which trained a bias, too; run again with `train`")
        finetuned = checkpoint.load_energy(path, device=model.device)
        checkpoint.check_config(finetuned.config, model.model.config, path)
        run.model = dataclasses.replace(model, model=finetuned)
        return classify_test_images(run)
    with own_folder(run.folder, model.workers):
        loss = model.finetune(*run.draw_examples("train", run.choose_number()))
        contents = {"config": dataclasses.asdict(model.model.config), "model": model.model.state_dict(), "iteration": 0}
        checkpoint.save(run.add_file(path.name), contents)
    return Report({"mean loss of the epoch": loss, **classify_test_images(run).figures})


def classify_test_images(run: SandboxRun) -> Report:
    """Measure the accuracy on test images, with and without refinement, and the same after the attack."""
    examples = run.draw_examples("test", run.choose_number())
    images, classes = examples.images, examples.classes
    attack = choose_attack(run.settings)
    attacked = run.model.attack(images, classes, attack, run.refine)
    figures: dict[str, object] = {"attack": str(attack), "refinement": describe_refinement(run)}
    figures |= measure_accuracies(run, "clean", images, classes)
    if attack.steps:
        figures |= measure_accuracies(run, "attacked", attacked, classes)

    rows, moved = examples.first(ROWS), attacked[:ROWS]
    ball = functools.partial(restrict_to_ball, radius=run.refine)
    refined = run.model.run_chain(moved, rows.labels, rounds=1, restrict=ball, progress="images to show")
    change = refined - rows.images
    contrast = 0.5 + 0.5 * change / change.abs().amax().clamp(min=1e-12)
    columns = {"real": rows.images} | ({"attacked": moved} if attack.steps else {})
    run.write_panel("images", columns | {"refined": refined, "change": contrast})
    return Report(figures, run.get_published({"clean": PAPER_ACCURACY}))


def classify_in_balls(run: SandboxRun) -> Report:
    """Measure the accuracy on attacked images as a function of the radius: L∞ 0 … 30/255, or L2 0 … 95/255."""
    if not run.settings.pgd:
        raise UsageError("`labelgrid` needs an attack; give its number of steps with `pgd`")
    examples = run.draw_examples("test", run.choose_number())
    images, classes = examples.images, examples.classes
    radii = list(range(31) if run.settings.lnorm == "-1" else range(0, 100, 5))
    passes = 3 if run.model.num_steps else 2
    progress = Progress(passes * len(radii) * len(images), what="grid")
    rows = {}
    for radius in radii:
        attacked = run.model.attack(images, classes, choose_attack(run.settings, radius), run.refine, progress=progress)
        rows[f"{radius}/255"] = measure_accuracies(run, "attacked", attacked, classes, progress)
    curves = {name: [row[name] for row in rows.values()] for name in rows["0/255"]}
    run.write_array("accuracies", torch.tensor([radii, *curves.values()]))
    lines = {name: (radii, values) for name, values in curves.items()}
    xlabel = f"radius of the {'L∞' if run.settings.lnorm == '-1' else 'L2'} ball / (1/255)"
    pictures.plot_lines({"accuracy": lines}, run.add_file("accuracies.png"), xlabel=xlabel)
    largest = {"attack in the largest ball": str(choose_attack(run.settings, radii[-1]))}
    return Report({**largest, "refinement": describe_refinement(run), **rows})


def choose_attack(settings: SandboxSettings, radius: float | None = None) -> Attack:
    """Return the attack that the settings describe. radius: replaces that of the settings, in units of 1/255."""
    norm, usual = ("li", settings.lival) if settings.lnorm == "-1" else ("l2", settings.l2val)
    if settings.l2_per_step and norm == "li":
        raise UsageError("`l2_per_step` needs an L2 attack, `lnorm`=2")
    radius = (usual if radius is None else radius) / SHADES
    return Attack(norm, radius, settings.pgd, settings.adaptive, settings.l2_per_step)


def describe_refinement(run: SandboxRun) -> str:
    """Return a description of the refinement before classification."""
    steps = run.model.num_steps
    return f"{steps} Langevin steps under each class, L∞ ball of {run.settings.refine:g}/255" if steps else "none"


def measure_accuracies(
    run: SandboxRun, name: str, images: Tensor, classes: Tensor, progress: Progress | None = None
) -> dict[str, float]:
    """Return the accuracy on images of these classes (N,), and that after refinement if `num_steps` is not 0.

    name: of the images, which is the key of the result.
    """
    refined = f"{name}, refined"
    logits = {name: run.model.compute_logits(images, progress=progress or f"classify {name}")}
    if run.model.num_steps:
        logits[refined] = run.model.compute_logits(images, run.refine, progress=progress or f"classify {refined}")
    return {name: (values.argmax(1) == classes).double().mean().item() for name, values in logits.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Energies


def compare_energies(run: SandboxRun) -> Report:
    """Compare the energies of training and test images: a model that generalises does not separate them."""
    energies: dict[str, np.ndarray] = {}
    figures: dict[str, object] = {}
    for split in ("train", "test"):
        values = run.model.compute_energies(
            *run.draw_examples(split, run.choose_number()), progress=f"energies of {split}"
        )
        energies[split] = run.write_array(f"energies_{split}", values)
        figures |= {f"{split} mean": values.mean().item(), f"{split} std": values.std(correction=0).item()}
    auroc, verdict = measure_memorisation(run, -energies["train"], -energies["test"])
    pictures.plot_histograms(energies, run.add_file("energies.png"), xlabel="energy", title=verdict)
    return Report({**figures, "AUROC train/test": auroc, "verdict": verdict})


def measure_memorisation(
    run: SandboxRun, train_scores: np.ndarray, test_scores: np.ndarray
) -> tuple[float | None, str]:
    """Return how well scores separate training from test images, as an AUROC and in words.

    A high score means that an image resembles the training images. The AUROC is None if both splits are the same.
    """
    if have_same_images(run.load("train"), run.load("test")):
        return None, "train and test are the same images: this data set has no split"
    auroc = metrics.auroc(train_scores, test_scores)
    return auroc, f"AUROC of train against test {auroc:.3f} (0.5: alike, 1: memorised)"


def have_same_images(one: Dataset, other: Dataset) -> bool:
    """Return whether two data sets hold the same images; a thousand of them are compared."""
    if len(one) != len(other):
        return False
    some = torch.arange(0, len(one), max(1, len(one) // 1_000))
    return torch.equal(one.raw(some), other.raw(some))


class ChainRecord(NamedTuple):
    """Energies, distances and images along chains of LONG rounds."""

    energies: Tensor  # (LONG + 1, N), after each round
    moved: list[float]  # mean distance of a pixel from its start, after each round
    shown: dict[int, Tensor]  # round of SHOWN_ROUNDS -> the first images (ROWS, C, H, W) after it


def follow_chains(run: SandboxRun, start: Tensor, labels: Tensor, name: str) -> ChainRecord:
    """Run chains of LONG rounds from images (N, C, H, W) and record them. name: of the start, for the progress bar."""
    energies, moved, shown = [], [], {}
    quiet = Progress(0, what="energies", quiet=True)
    for k, x in enumerate(run.model.run_stages(start, labels, rounds=LONG, progress=f"chains from {name}")):
        energies.append(run.model.compute_energies(x, labels, progress=quiet))
        moved.append((x - start).abs().mean().item())
        if k in SHOWN_ROUNDS:
            shown[k] = x[:ROWS]
    return ChainRecord(torch.stack(energies), moved, shown)


def diagnose_chains(run: SandboxRun) -> Report:
    """Follow chains of 50 rounds from noise and from test images: their energies, and how far they move."""
    examples = run.draw_examples("test", run.choose_number(100))
    starts = {"noise": run.draw_noise(len(examples.images)), "images": examples.images}
    chains = {name: follow_chains(run, start, examples.labels, name) for name, start in starts.items()}
    for name, followed in chains.items():
        run.write_array(f"energies_from_{name}", followed.energies)
    of_data = chains["images"].energies[0]
    low, high = of_data.quantile(torch.tensor([0.05, 0.95], device=of_data.device)).tolist()
    of_noise = chains["noise"].energies
    within = ((low <= of_noise) & (of_noise <= high)).double().mean(1).tolist()
    plot_chains(run, chains, (low, high), within)
    rows = {
        f"step {k * run.model.num_steps}": {
            **{f"E from {name}": followed.energies[k].mean().item() for name, followed in chains.items()},
            "within data": within[k],
            **{f"moved from {name}": followed.moved[k] for name, followed in chains.items()},
        }
        for k in SHOWN_ROUNDS
    }
    verdict = f"{within[-1]:.0%} of the chains from noise end within the middle 90 % of the data's energies"
    return Report({"data mean": of_data.mean().item(), "verdict": verdict, **rows})


def plot_chains(
    run: SandboxRun, chains: Mapping[str, ChainRecord], data_range: tuple[float, float], within: Sequence[float]
) -> None:
    """Plot energies and distances over Langevin steps, and histograms of energies; draw the images.

    data_range: the middle 90 % of the data's energies. within: share of the chains from noise inside this range, after
    each round.
    """
    steps = [k * run.model.num_steps for k in range(LONG + 1)]
    lines = {f"from {name}": (steps, followed.energies.mean(1).cpu()) for name, followed in chains.items()}
    band = {
        f"data, {name}": (steps, [edge] * len(steps)) for name, edge in zip(("5 %", "95 %"), data_range, strict=True)
    }
    panels: dict[str, Any] = {
        "mean energy": lines | band,
        "mean |x − start|": {f"from {name}": (steps, followed.moved) for name, followed in chains.items()},
        "share within": {"from noise": (steps, within)},
    }
    pictures.plot_lines(panels, run.add_file("chains.png"), xlabel="Langevin steps")
    ends = {f"noise, {steps[k]} steps": chains["noise"].energies[k].cpu() for k in (1, LONG)}
    of_data = chains["images"].energies[0].cpu()
    pictures.plot_histograms({"data": of_data, **ends}, run.add_file("energies.png"), xlabel="energy")
    columns = {f"{name}, {steps[k]}": x for name, followed in chains.items() for k, x in followed.shown.items()}
    run.write_panel("images", columns)


def detect_outliers(run: SandboxRun) -> Report:
    """Detect out-of-distribution images by −E (of a conditional model: under the class of lowest energy)."""
    if run.model.classes:
        run.require_class_names("mixenergy")
    images = run.draw_examples("test", run.choose_number()).images
    in_scores = run.write_array("scores_in_distribution", run.model.compute_scores(images, progress="scores of test"))
    scores, figures = {}, {}
    for name, outsiders in load_outliers(run, images):
        scores[name] = run.write_array(
            f"scores_{name}", run.model.compute_scores(outsiders, progress=f"scores of {name}")
        )
        figures[name] = {
            "images": len(outsiders),
            "AUROC": metrics.auroc(in_scores, scores[name]),
            "AUPR": metrics.aupr(in_scores, scores[name]),
            "FPR at 95 % TPR": metrics.fpr_at_95_tpr(in_scores, scores[name]),
        }
    pictures.plot_histograms({"in distribution": in_scores, **scores}, run.add_file("scores.png"), xlabel="−E")
    pictures.plot_roc({name: (in_scores, out_scores) for name, out_scores in scores.items()}, run.add_file("roc.png"))
    return Report(figures, run.get_published({} if run.model.classes else PAPER_AUROC))


def load_outliers(run: SandboxRun, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the images (M, C, H, W) of each out-of-distribution set.

    The images are converted to the shape of the test images.
    """
    generator = run.model.generator
    for name in run.mixes:
        if name == "interpolation":
            yield name, average_with_next(images)
        elif name == "random":
            yield name, 0.5 + 0.5 * torch.randn(images.shape, generator=generator, device=images.device)
        else:
            dataset = run.load_mix(name)
            outsiders, _ = dataset.batch(run.draw_index(dataset, run.choose_number(), dataset.name), generator)
            yield dataset.name, fit_images(outsiders, run.config.image_shape)


# ---------------------------------------------------------------------------------------------------------------------
# Restoring images


def measure_mean_squares(images: Tensor, real: Tensor) -> Tensor:
    """Return the mean squared error of each image to the real one, (N,)."""
    return (images - real).square().flatten(1).mean(1)


def denoise_images(run: SandboxRun) -> Report:
    """Remove salt-and-pepper noise from test images by 5 rounds of Langevin steps."""
    real, labels = run.draw_examples("test", run.choose_number(ROWS))
    corrupt = add_salt_and_pepper(real, run.model.generator)
    restored = run.model.run_chain(corrupt, labels, rounds=ROUNDS["anticorrupt"], progress="anticorrupt")
    columns = {"corrupt": corrupt, "restored": restored, "real": real}
    run.write_panel("restored", {name: images[:ROWS] for name, images in columns.items()})
    return Report(
        {f"MSE {name}": measure_mean_squares(columns[name], real).mean().item() for name in ("corrupt", "restored")}
    )


def inpaint_images(run: SandboxRun) -> Report:
    """Inpaint the lower half of images; smaller errors on training than on test images would show memorisation.

    As in the reference, errors are means over the whole image, of which the upper half is kept.
    """
    errors: dict[str, np.ndarray] = {}
    columns: dict[str, Tensor] = {}
    figures: dict[str, object] = {}
    for split in ("train", "test"):
        real, labels = run.draw_examples(split, run.choose_number(10_000))
        half = real.shape[2] // 2
        is_lower = (torch.arange(real.shape[2], device=real.device) >= half).float()[:, None]
        corrupt = torch.cat([real[:, :, :half], run.draw_noise(len(real))[:, :, half:]], 2)
        restored = run.model.run_chain(
            corrupt,
            labels,
            rounds=ROUNDS["boxcorrupt"],
            restrict=restrict_to_lower_half,
            noise=is_lower,  # as in the reference, gradients are taken at the upper half as it is
            progress=f"inpaint {split}",
        )
        values = measure_mean_squares(restored, real)
        errors[split] = run.write_array(f"mse_{split}", values)
        figures |= {f"{split} MSE mean": values.mean().item(), f"{split} MSE std": values.std(correction=0).item()}
        lower = measure_mean_squares(restored[:, :, half:], real[:, :, half:])
        figures[f"{split} MSE of the lower half"] = lower.mean().item()
        batches = {"start": corrupt, "restored": restored, "real": real}
        columns |= {f"{split} {name}": images[:ROWS] for name, images in batches.items()}
    auroc, verdict = measure_memorisation(run, -errors["train"], -errors["test"])
    pictures.plot_histograms(errors, run.add_file("mse.png"), xlabel="MSE", title=verdict)
    run.write_panel("restored", columns)
    return Report({**figures, "AUROC train/test": auroc, "verdict": verdict})


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def measure_recognition(run: SandboxRun, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of images whose class of lowest energy is that of their label.

    Returns no figure if the model is not conditioned on classes.
    """
    if not run.find_class_names():
        return {}
    classes = run.model.compute_logits(images, progress="recognise").argmax(1)
    return {"recognised as the class": (classes == labels.argmax(1)).double().mean().item()}


def change_classes(run: SandboxRun) -> Report:
    """Turn test images into another class: 10 rounds of Langevin steps from one image under the label of the next."""
    run.require_class_names("crossclass")
    target = run.draw_examples("test", run.choose_number(ROWS))
    start = target.images.roll(1, 0)
    stages = list(run.model.run_stages(start, target.labels, rounds=ROUNDS["crossclass"], progress="crossclass"))
    run.write_panel("crossclass", number_stages(run, stages) | {"class": target.images})
    return Report(measure_recognition(run, stages[-1], target.labels))


def number_stages(run: SandboxRun, stages: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the stages of a chain by title: the number of Langevin steps before each stage."""
    return {str(i * run.model.num_steps) if i else "start": stage for i, stage in enumerate(stages)}


def sample_stages(run: SandboxRun) -> Report:
    """Sample from noise by 20 rounds of Langevin steps under the labels of test images; show all rounds and images."""
    real = run.draw_examples("test", run.choose_number(100))
    start = run.draw_noise(len(real.images))
    stages = list(run.model.run_stages(start, real.labels, rounds=ROUNDS["cycleclass"], progress="cycleclass"))
    run.write_panel("cycleclass", number_stages(run, stages) | {"real": real.images})
    return Report(measure_recognition(run, stages[-1], real.labels))


def sample_classes(run: SandboxRun) -> Report:
    """Sample 5 images of each class, of at most 10 random classes, from noise by a round of Langevin steps."""
    names = run.require_class_names("democlass")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(run.settings.seed))
    classes = order[:10].sort().values
    labels = torch.eye(len(names))[classes.repeat_interleave(5)].to(run.model.device)
    noise = run.draw_noise(len(labels))
    samples = run.model.run_chain(noise, labels, rounds=ROUNDS["democlass"], progress="democlass")
    run.write_panel("democlass", {names[k]: five for k, five in zip(classes.tolist(), samples.split(5), strict=True)})
    return Report(measure_recognition(run, samples, labels))


def find_training_neighbours(run: SandboxRun) -> Report:
    """Sample 10 images and find the 5 nearest training images of each in L2; do the same for test images."""
    train, rows = run.load("train"), run.choose_number(10)
    noise, labels = run.draw_noise(rows), run.sample_labels(rows)
    samples = run.model.run_chain(noise, labels, rounds=ROUNDS["nearestneighbor"], progress="nearestneighbor")
    distances, indices = find_neighbours(torch.cat([samples, run.draw_examples("test", rows).images]), train, 5)
    neighbours = read_images(train, indices[:rows].flatten()).view(rows, -1, *train.image_shape)
    columns = {f"nearest {k + 1}": neighbours[:, k] for k in range(neighbours.shape[1])}
    run.write_panel("neighbours", {"sample": samples, **columns})
    closest = {"samples": distances[:rows, 0], "test images": distances[rows:, 0]}
    return Report({f"L2 distance of {name} to the nearest": value.mean().item() for name, value in closest.items()})


def traverse_directions(run: SandboxRun) -> Report:
    """Move an image along the directions in which its energy curves most downwards: 7 moves, each followed by a round.

    Each of three directions has a row that goes backwards along it and one that goes forwards. After each round every
    row takes its direction anew, at the image where it is.
    """
    images, labels = run.draw_examples("test", run.choose_number(1))
    x, labels = images.repeat_interleave(2 * DIRECTIONS, 0), labels.repeat_interleave(2 * DIRECTIONS, 0)
    progress = Progress(len(images) + (2 * MOVES - 1) * len(x), what="latent")
    values, vectors = find_directions(run, images, labels[:: 2 * DIRECTIONS], progress)
    directions = vectors.repeat_interleave(2, 1).flatten(0, 1)  # (N, 3, C, H, W) -> (6·N, C, H, W)
    columns = {"0": x, "1": move_images(run, x, labels, directions, progress)}
    rows = torch.arange(len(x), device=x.device)
    for move in range(2, MOVES + 1):
        x = columns[str(move - 1)]
        _, vectors = find_directions(run, x, labels, progress)
        directions = align_signs(vectors[rows, rows // 2 % DIRECTIONS], directions)
        columns[str(move)] = move_images(run, x, labels, directions, progress, bounded=True)
    run.write_panel("traversals", columns)
    figures = {
        f"image {i + 1}": {f"value {k + 1}": v for k, v in enumerate(row)} for i, row in enumerate(values.tolist())
    }
    return Report(figures)


def find_directions(run: SandboxRun, images: Tensor, labels: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
    """Return 3 directions (N, 3, C, H, W) of length 1 at each image (N, C, H, W), and their values (N, 3).

    They are eigenvectors and eigenvalues of the energy's Hessian, smallest first, or singular vectors and values of the
    features' Jacobian, largest first, with `hessian`=False.
    """
    model = run.model

    def find(part: slice) -> Tensor:
        rows = []
        for image, label in zip(images[part], labels[part].split(1), strict=True):
            if run.settings.hessian:
                energy = model.energy.under(label)
                values, vectors = find_hessian_directions(energy, image, DIRECTIONS, model.generator)
            else:
                features = functools.partial(model.compute_features, labels=label)
                values, vectors = find_feature_directions(features, image, DIRECTIONS)
            rows.append(torch.cat([values[:, None], vectors.flatten(1)], 1))
        return torch.stack(rows)

    found = model.compute_in_batches(find, len(images), progress, each=1000)  # one image at a time
    return found[..., 0], found[..., 1:].reshape(-1, DIRECTIONS, *images.shape[1:])


def align_signs(vectors: Tensor, reference: Tensor) -> Tensor:
    """Return vectors (N, ...), each with the sign, which is arbitrary, that takes it nearer to its reference."""
    backwards = (vectors * reference).flatten(1).sum(1) < 0
    return torch.where(backwards.view(-1, *[1] * (vectors.dim() - 1)), -vectors, vectors)


def move_images(
    run: SandboxRun, x: Tensor, labels: Tensor, directions: Tensor, progress: Progress, *, bounded: bool = False
) -> Tensor:
    """Return images (N, C, H, W) after a move along directions of the same shape, and a round of 4 times the step size.

    Images move backwards and forwards by turns. bounded: clip them to [0, 1] before the round, as the reference does
    after each move but the first.
    """
    signs = torch.tensor([-1.0, 1.0], device=x.device).repeat(len(x) // 2).view(-1, 1, 1, 1)
    start = x + signs * directions
    return run.model.run_chain(start.clamp(0, 1) if bounded else start, labels, rounds=1, pull=4.0, progress=progress)


TASKS: dict[str, Callable[[SandboxRun], Report]] = {
    "label": classify_images,
    "labelfinetune": finetune_classifier,
    "energyeval": compare_energies,
    "diagnose": diagnose_chains,
    "mixenergy": detect_outliers,
    "anticorrupt": denoise_images,
    "boxcorrupt": inpaint_images,
    "crossclass": change_classes,
    "cycleclass": sample_stages,
    "democlass": sample_classes,
    "nearestneighbor": find_training_neighbours,
    "latent": traverse_directions,
}

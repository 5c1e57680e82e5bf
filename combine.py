"""The tasks of ebm_combine.py on concept models of sprites, and how right the concepts in their images are.

    figures = combine_concepts(Run(settings, models, labels, weights, sprites, generator, folder))

A concept is a latent of dSprites that a model is conditioned on: size, shape, pos or rot. What an image shows is read
off the nearest of all sprites, `dsprites.nearest`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import composition
import dsprites
import pictures
from acceleration import products_in
from composition import Expression, Joined, Name, Weighted
from concept_models import ConceptModel, split_name
from dsprites import CONCEPTS
from ebm.settings import CombineSettings
from errors import UsageError
from sampling import Energy, input_gradient
from training import label_energies, noise_images
from utils import Progress

SAME_AFTER = (90.0, 180.0, 360.0)  # degrees by which a square, ellipse or heart turns into itself
LABEL_NOISE = 0.03
ROWS = 10  # of a picture
TRIED = 16  # images at once whose energies under all labels are compared

Figures = dict[str, Any]  # by name, or rows of them by name


# ---------------------------------------------------------------------------------------------------------------------
# How right the concepts in images are


def measure_errors(found: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return how far latents (N, 5) of images are from their targets: for each concept (N,), in its unit.

    A rotation counts modulo the symmetry of the shape found: an image of a square cannot show more of it.
    """
    difference = found - targets
    period = found.new_tensor(SAME_AFTER)[found[:, 0].long() - 1]
    turned = difference[:, 2].rad2deg().remainder(period)
    return {
        "size": difference[:, 1].abs() / 0.1,
        "shape": (difference[:, 0] != 0).float(),
        "pos": dsprites.SIDE / 2 * difference[:, 3:].norm(dim=1),
        "rot": torch.minimum(turned, period - turned),
    }


def judge_latents(found: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return whether each concept of latents (N, 5) is within its tolerance of the target's, (N,)."""
    return {name: is_tolerable(error, name) for name, error in measure_errors(found, targets).items()}


def is_tolerable(error: Tensor, condition: str) -> Tensor:
    """Return whether errors (N,) of a concept, in its unit, count as right."""
    return error <= CONCEPTS[condition].tolerance + 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Concept models, and the targets that name their labels


def read_label(name: str, condition: str, text: str) -> dict[int, float]:
    """Return the latents, by column, that a label of `labels` fixes: heart · 0.7 · 0.2,0.8 · 90 (degrees)."""
    values = text.split(",")
    if condition == "shape" and text in dsprites.SHAPES:
        return {0: dsprites.SHAPES.index(text) + 1.0}
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    concept = CONCEPTS[condition]
    low, high = concept.label_range if condition != "rot" else (-math.inf, math.inf)
    is_inside = all(low <= number <= high for number in numbers)
    if condition == "shape" or len(numbers) != len(concept.columns) or not is_inside:
        raise UsageError(f"`labels`={name}={text}: expected {concept.example}")
    if condition == "rot":
        numbers = [math.radians(numbers[0] % 360)]
    return dict(zip(concept.columns, numbers, strict=True))


@dataclasses.dataclass
class Run:
    """One task: its models by name, where its images come from, where its files go.

    sprites: all of dSprites in the published order, drawn or read from the file. folder: takes the files.
    """

    settings: CombineSettings
    concepts: Mapping[str, ConceptModel]
    given_labels: Mapping[str, str]  # by name, as people write them
    weights: Mapping[str, float]  # of energies, by name
    sprites: dsprites.Sprites
    generator: torch.Generator
    folder: Path
    files: list[Path] = dataclasses.field(default_factory=list)

    def path(self, name: str) -> Path:
        """Return the path of a file of this task, and list it."""
        self.files.append(self.folder / name)
        return self.files[-1]

    def images(self, index: Tensor) -> Tensor:
        """Return the sprites (N, 1, 64, 64) of an index (N,), in [0, 1]."""
        return self.sprites[index].float() / 255

    @functools.cached_property
    def draws(self) -> torch.Generator:
        """What chooses sprites: the same ones on every device."""
        return torch.Generator().manual_seed(self.settings.seed)

    def choose(self, candidates: Tensor, number: int) -> Tensor:
        """Return this many of the candidates (M,), drawn evenly with repetition."""
        return candidates[torch.randint(len(candidates), (number,), generator=self.draws).to(candidates.device)]

    def targets(self, count: int, number: int) -> Tensor:
        """Return the sprites (count, number), as indices, whose latents are the labels of names 1, 2, … of a concept.

        Drawn from all sprites, but for the latents that `labels` fixes, to the nearest on dSprites' grid.
        """
        chosen = []
        for place in range(1, count + 1):
            latents = self.sprites.latents
            allowed = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
            for name, text in self.given_labels.items():
                condition = self.condition(name)
                if condition and split_name(name)[1] == place:
                    for column, value in read_label(name, condition, text).items():
                        distance = (latents[:, column] - value).abs()
                        allowed &= distance < distance.min() + 1e-4
            chosen.append(self.choose(allowed.nonzero()[:, 0], number))
        return torch.stack(chosen)

    def condition(self, name: str) -> str | None:
        """Return the concept that labels of this name tell, None where they are plain numbers or classes."""
        if name in self.concepts:
            return self.concepts[name].condition
        base = split_name(name)[0]
        if base not in CONCEPTS:
            raise UsageError(f"`labels`={name}=…: no model of this name; there are {', '.join(self.concepts)}")
        return base

    def labels(self, name: str, targets: Tensor) -> Tensor | None:
        """Return the labels (N, label_size) of a name, given latents (count, N, 5); None: it takes no labels."""
        concept, given = self.concepts[name], self.given_labels.get(name)
        size = concept.model.config.label_size
        if concept.condition:
            return dsprites.label_vectors(targets[split_name(name)[1] - 1], concept.condition)
        if not size:
            return None
        try:
            numbers = [float(value) for value in (given or "").split(",")]
            row = torch.eye(size)[int(numbers[0])] if len(numbers) == 1 < size else torch.tensor(numbers)
        except (ValueError, IndexError):
            row = torch.empty(0)
        if len(row) != size:
            raise UsageError(f"`labels`={name}={given or '…'}: give a class below {size}, or {size} numbers by commas")
        return row.to(targets.device).expand(targets.shape[1], -1)

    def energy(self, expression: Expression, targets: Tensor) -> Energy:
        """Return the energy that an expression describes, under the labels of latents (count, N, 5)."""
        labels = {name: self.labels(name, targets) for name in expression.names}
        return lambda x: expression.energy({name: self.concepts[name].energy(x, y) for name, y in labels.items()})

    def generate(self, expressions: Sequence[Expression], targets: Tensor, progress: Progress) -> Tensor:
        """Return images (N, C, H, W) under latents (count, N, 5), by chains from noise that visit the expressions.

        Of each image's chains, `restarts` of them, that with the lowest energy is taken, the sum over the expressions.
        """
        images = []
        for part in targets.split(self.settings.batch_size, 1):
            energies = [self.energy(expression, part) for expression in expressions]
            chains = torch.stack([self.chain(energies, part.shape[1], progress) for _ in range(self.settings.restarts)])
            with torch.no_grad():
                totals = torch.stack([torch.stack([energy(chain) for energy in energies]).sum(0) for chain in chains])
            images.append(chains[totals.argmin(0), torch.arange(part.shape[1], device=chains.device)])
        return torch.cat(images)

    def chain(self, energies: Sequence[Energy], number: int, progress: Progress) -> Tensor:
        """Return where chains from noise end that visit the energies in turn: this many images (N, C, H, W)."""
        config = next(iter(self.concepts.values())).model.config
        noise = noise_images((number, *config.image_shape), self.generator, network=config.network)
        with products_in(self.settings.precision):
            end = composition.chain(
                energies,
                noise,
                num_steps=self.settings.num_steps,
                step_lr=self.settings.step_lr,
                first_noise_std=self.settings.first_noise,
                first_step_lr=self.settings.first_step_lr,
                generator=self.generator,
                progress=progress,
            )
        return check_finite(end)


def check_finite(x: Tensor) -> Tensor:
    """Return what a chain gave; raise UsageError where it is not finite."""
    if not x.isfinite().all():
        raise UsageError("the chain diverged, its values are not finite; lower `step_lr`")
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Combination


def build_plans(combine: str, names: list[str], weights: Mapping[str, float]) -> dict[str, list[Expression]]:
    """Return by title what chains follow: energies that they visit in turn. What `combine` asks for comes first.

    For alternate and sum the first two concepts follow, the first three and so on, and each concept alone; weights, by
    name, multiply their energies.
    """
    if combine not in ("alternate", "sum"):
        return {combine: [composition.parse(combine)]}
    groups = [names] + [names[:k] for k in range(2, len(names))] + [[name] for name in names]
    energies = {name: Weighted(weights.get(name, 1.0), Name(name)) for name in names}
    alternating: dict[str, list[Expression]] = {
        " & ".join(group): [energies[name] for name in group] for group in groups
    }
    if combine == "alternate":
        return alternating
    return {title: [Joined("&", tuple(plan))] for title, plan in alternating.items()}


def combine_concepts(run: Run) -> Figures:
    """Sample from noise under several concepts at once; each concept alone and the first ones together beside them."""
    plans = build_plans(run.settings.combine, list(run.concepts), run.weights)
    number = run.settings.limit or run.settings.batch_size
    index = run.targets(max(split_name(name)[1] for name in run.concepts), number)
    targets = run.sprites.latents[index]  # (count, N, 5)

    parts = -(-number // run.settings.batch_size)
    rounds = run.settings.num_steps * run.settings.restarts * parts * len(plans)
    progress = Progress(rounds, what="rounds of the chains")
    samples = {title: run.generate(plan, targets, progress) for title, plan in plans.items()}
    generated = next(iter(samples.values()))
    aims = [run.images(aim[:ROWS]) for aim in index]
    sprites = any(concept.condition for concept in run.concepts.values())
    columns = {"target" if k == 0 else f"target {k + 1}": aim for k, aim in enumerate(aims) if sprites}
    pictures.save_panel({"generated": generated[:ROWS]} | columns, run.path(name_picture(run)), scale=2)
    if not sprites:
        return {"images": number}
    return accuracies(run, samples, plans, targets, run.images(index[0]))


def name_picture(run: Run) -> str:
    """Return the name of the picture: the reference's for its concepts, else after the expression."""
    if run.settings.combine in ("alternate", "sum"):
        return "_".join(["im", *("condscale" if name == "size" else f"cond{name}" for name in run.concepts)]) + ".png"
    return f"im_{re.sub(r'[^A-Za-z0-9_]+', '_', run.settings.combine).strip('_')}.png"


def accuracies(
    run: Run,
    samples: Mapping[str, Tensor],
    plans: Mapping[str, Sequence[Expression]],
    targets: Tensor,
    real: Tensor,
) -> Figures:
    """Return how right the concepts in samples are, by name and jointly, and plot it over the number of concepts.

    samples, plans: the images (N, 1, 64, 64), and what their chains followed, by title, all concepts first. targets:
    latents (count, N, 5). real: the sprites of the first target, measured like the samples. "off sprites" is the mean
    squared error to the nearest sprite: noise can be right, too, but it is off.
    """
    latents, distances = dsprites.nearest(torch.cat([*samples.values(), real]))
    found = latents.split(len(real))
    off = [part.square().mean().item() / dsprites.SIDE**2 for part in distances.split(len(real))]
    known = {name: concept.condition for name, concept in run.concepts.items() if concept.condition}
    aims = {name: targets[split_name(name)[1] - 1] for name in known}

    def truths(latents: Tensor) -> dict[str, Tensor]:
        return {name: judge_latents(latents, aims[name])[condition] for name, condition in known.items()}

    def fulfil(plan: Sequence[Expression], latents: Tensor) -> Tensor | None:
        """Return which images fulfil the expressions, (N,); None where a name says nothing about sprites."""
        if not {name for expression in plan for name in expression.names} <= set(known):
            return None
        return torch.stack([expression.holds(truths(latents)) for expression in plan]).all(0)

    def jointly(plan: Sequence[Expression], latents: Tensor) -> float | None:
        fulfilled = fulfil(plan, latents)
        return None if fulfilled is None else compute_share(fulfilled)

    plan = next(iter(plans.values()))
    by_chance = found[0].roll(1, 0)  # what other images show: how often a target is met unseen
    figures: Figures = {}
    for name, condition in known.items():
        error = measure_errors(found[0], aims[name])[condition]
        figures[f"{name} / {CONCEPTS[condition].unit}"] = {
            "mean error": error.mean().item(),
            "median": error.median().item(),
            "right": compute_share(truths(found[0])[name]),
            "by chance": compute_share(truths(by_chance)[name]),
        }
    figures["jointly"] = {
        "mean error": None,
        "median": None,
        "right": jointly(plan, found[0]),
        "by chance": jointly(plan, by_chance),
    }
    for place, (title, plan) in enumerate(plans.items()):
        taken = {name for expression in plan for name in expression.names}
        row = {name: compute_share(truth) if name in taken else None for name, truth in truths(found[place]).items()}
        figures[f"right, {title}"] = row | {"jointly": jointly(plan, found[place]), "off sprites": off[place]}
    if len(targets) == 1:
        row = {name: compute_share(truth) for name, truth in truths(found[-1]).items()}
        plan = next(iter(plans.values()))
        figures["right, real sprites"] = row | {"jointly": jointly(plan, found[-1]), "off sprites": off[-1]}
        if (fulfilled := fulfil(plan, found[0])) is not None:
            figures["jointly, by the target's shape"] = split_by_shape(fulfilled, targets[0])
    if len(plans) > 1:
        plot_joint(run, figures)
    return figures


def compute_share(truths: Tensor) -> float:
    """Return the share of true values."""
    return truths.double().mean().item()


def split_by_shape(truths: Tensor, latents: Tensor) -> dict[str, float | None]:
    """Return the share of true values (N,) among the latents (N, 5) of each shape, None where there are none."""
    parts = {name: truths[latents[:, 0] == k] for k, name in enumerate(dsprites.SHAPES, 1)}
    return {name: compute_share(part) if len(part) else None for name, part in parts.items()}


def plot_joint(run: Run, figures: Figures) -> None:
    """Plot how many images are right over the number of concepts combined; 1 is each concept alone, 2 the first two."""
    names = list(run.concepts)
    lines = {}
    for column, entered in ({name: k for k, name in enumerate(names, 1)} | {"jointly": 1}).items():
        counts = sorted({1, *range(entered, len(names) + 1)})
        titles = [" & ".join(names[:count]) if count > 1 or column == "jointly" else column for count in counts]
        lines[column] = counts, [figures[f"right, {title}"][column] for title in titles]
    xlabel = f"concepts combined: {', '.join(names)}"
    pictures.plot_lines({"share right": lines}, run.path("accuracy.png"), xlabel=xlabel)


# ---------------------------------------------------------------------------------------------------------------------
# Labels of images


def discover_labels(run: Run) -> Figures:
    """Infer labels of real images: noise and gradient steps on the label, from anywhere in its range.

    Beside that the labels of lowest energy, of all that sprites have, but for positions, which are too many to try.
    """
    number = run.settings.limit or 30 * run.settings.batch_size
    index = run.targets(1, number)[0]
    latents = run.sprites.latents[index]
    steps = run.settings.num_steps
    searches = sum(concept.condition != "pos" for concept in run.concepts.values())
    progress = Progress((len(run.concepts) + searches) * number, what="labels")
    figures, judged, panels = {}, {}, {}
    for name, concept in run.concepts.items():
        condition = concept.condition
        assert condition, "main takes concepts only"
        true = dsprites.label_vectors(latents, condition)
        low, high = CONCEPTS[condition].label_range
        stages = []  # per part the labels before and after every step, (steps + 1, n, label_size)
        for part in index.split(run.settings.batch_size):
            energy = functools.partial(concept.energy, run.images(part))
            uniform = torch.rand((len(part), true.shape[1]), generator=run.generator, device=true.device)
            label = low + (high - low) * uniform
            stages.append([label])
            for _ in range(steps):
                label = label + LABEL_NOISE * torch.randn(label.shape, generator=run.generator, device=label.device)
                gradient = input_gradient(energy, label)
                label = check_finite((label - run.settings.label_lr * gradient).clamp(low, high))
                stages[-1].append(label)
            progress.update(progress.done + len(label))
        labels = [torch.cat(stage) for stage in zip(*stages, strict=True)]
        trace = [measure_label_errors(label, latents, condition) for label in labels]
        figures[f"{name} / {CONCEPTS[condition].unit}"] = {
            "mean error": trace[-1].mean().item(),
            "at the start": trace[0].mean().item(),
            "right": compute_share(is_tolerable(trace[-1], condition)),
            "error of the label": (labels[-1] - true).abs().mean().item(),  # the reference's figure
        }
        if condition != "pos":
            lowest = find_lowest_labels(run, concept, index, progress)
            truths = is_tolerable(measure_label_errors(lowest, latents, condition), condition)
            judged[f"{name}, lowest energy"] = {"right": compute_share(truths), **split_by_shape(truths, latents)}
        panels[f"{name} / {CONCEPTS[condition].unit}"] = {
            name: (range(steps + 1), [error.mean().item() for error in trace])
        }
    pictures.plot_lines(panels, run.path("errors.png"), xlabel="steps on the label")
    return figures | judged


def find_lowest_labels(run: Run, concept: ConceptModel, index: Tensor, progress: Progress) -> Tensor:
    """Return the labels (N, label_size) under which sprites (N,) have the lowest energy, of all that sprites have.

    concept: conditioned on one latent, that is not on positions. progress: counts sprites.
    """
    assert concept.condition, "main takes concepts only"
    column = CONCEPTS[concept.condition].columns[0]
    values = torch.tensor(list(dsprites.LATENTS.values())[column], device=index.device)
    latents = values.new_ones(len(values), len(dsprites.LATENTS))
    latents[:, column] = values
    labels = dsprites.label_vectors(latents, concept.condition)
    lowest = []
    for part in index.split(TRIED):
        with torch.no_grad():
            lowest.append(label_energies(concept.energy, run.images(part), labels).argmin(1))
        progress.update(progress.done + len(part))
    return labels[torch.cat(lowest)]


def measure_label_errors(labels: Tensor, latents: Tensor, condition: str) -> Tensor:
    """Return how far labels (N, label_size) are from those of latents (N, 5), (N,), as `measure_errors` counts."""
    found = latents.clone()
    if condition == "shape":
        labels = labels.argmax(1, keepdim=True) + 1.0
    elif condition == "rot":
        labels = torch.atan2(labels[:, 1:], labels[:, :1])
    found[:, list(CONCEPTS[condition].columns)] = labels
    return measure_errors(found, latents)[condition]

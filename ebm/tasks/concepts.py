"""Tasks of ebm_combine.py: sample images from combined models of sprites, infer labels, and measure the errors.

    figures = combine_concepts(ConceptRun(settings, models, labels, weights, sprites, generator, results))

A concept is a latent of dSprites that a model is conditioned on: size, shape, pos or rot. The latents of an image are
those of the nearest of all sprites, see `dsprites.find_nearest_sprites`. An image that overlaps it too little is no
sprite, and shows no concept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm.readers import dsprites
from ebm.readers.dsprites import CONCEPTS, LEAST_OVERLAP, NearestSprites
from ebm.settings import NOISE_UNIT, CombineSettings
from ebm.support import pictures
from ebm.support.errors import UsageError
from ebm.support.interruption import keep_what_is_done
from ebm.support.progress import Progress
from ebm.support.sharing import fold_seed
from ebm.tasks.concept_models import ConceptModel, split_name
from ebm.tasks.expressions import Expression, Joined, Name, Weighted, parse_expression
from ebm.tasks.results import Results
from ebm.training.acceleration import Acceleration, accelerate_chains
from ebm.training.distributed import Workers
from models import draw_noise_images
from sampling import Energy, Schedule, check_finite, langevin

SAME_AFTER = (90.0, 180.0, 360.0)  # symmetry of square, ellipse and heart: degrees of rotation that change nothing
LABEL_NOISE = 0.03  # standard deviation of the noise in a Langevin step on a label
ROWS = 10  # rows of a picture
LABEL_BATCH = 16  # images whose energies under all labels are computed at once
CHANCE_PAIRS = 1 << 20  # pairs of a target and a random sprite, of which the share that is right by chance is counted

Figures = dict[str, Any]  # figures, or rows of figures, by name


# ---------------------------------------------------------------------------------------------------------------------
# Errors of the concepts in images


def measure_errors(found: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the errors of latents (N, 5) with respect to target latents: concept -> (N,), in the concept's unit.

    found: the latents of the images. The error of a rotation is taken modulo the symmetry of the image's shape, because
    a square, for example, looks the same after 90 degrees.
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


def judge_concepts(nearest: NearestSprites, targets: Tensor) -> dict[str, Tensor]:
    """Return which images show each concept of their targets: concept -> (N,) bool.

    They must be sprites, and the concept within its tolerance. nearest: the sprites nearest to the images. targets: the
    wanted latents (N, 5).
    """
    errors = measure_errors(nearest.latents, targets)
    return {name: nearest.is_sprite & is_within_tolerance(error, name) for name, error in errors.items()}


def is_within_tolerance(error: Tensor, condition: str) -> Tensor:
    """Return which errors (N,) of a concept, in its unit, are within its tolerance."""
    return error <= CONCEPTS[condition].tolerance + 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The state of a task: models, labels, targets, chains


def read_label(name: str, condition: str, text: str) -> dict[int, float]:
    """Return the latents, by column, that a user's label fixes, such as heart, 0.7, "0.2,0.8" or 90 (degrees).

    name: of the model. condition: its concept. Raises UsageError if the text is not a label of this concept.
    """
    values = text.split(",")
    if condition == "shape" and text in dsprites.SHAPES:
        return {0: dsprites.SHAPES.index(text) + 1.0}
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    concept = CONCEPTS[condition]
    low, high = concept.label_range if condition != "rot" else (-math.inf, math.inf)
    is_inside = all(low <= number <= high and math.isfinite(number) for number in numbers)
    if condition == "shape" or len(numbers) != len(concept.columns) or not is_inside:
        raise UsageError(f"`labels`={name}={text}: expected {concept.example}")
    if condition == "rot":
        numbers = [math.radians(numbers[0] % 360)]
    return dict(zip(concept.columns, numbers, strict=True))


@dataclasses.dataclass
class ConceptRun:
    """One task, with its models, the sprites that it uses and its results.

    concepts: the models by name. sprites: all of dSprites in the published order. results: the files. noise_std,
    label_noise: standard deviation of the noise in a Langevin step on images, and on labels.
    """

    settings: CombineSettings
    concepts: Mapping[str, ConceptModel]
    label_texts: Mapping[str, str]  # name of a model -> its label as the user wrote it
    weights: Mapping[str, float]  # name of a model -> factor of its energy
    sprites: dsprites.Sprites
    generator: torch.Generator
    results: Results
    noise_std: float = NOISE_UNIT
    label_noise: float = LABEL_NOISE

    @property
    def workers(self) -> Workers:
        """Those that share the parts of the images."""
        return self.results.workers

    def add_file(self, name: str) -> Path:
        """Return the path of a file of the results, which is about to be written."""
        return self.results.add_file(name)

    def share_parts(self, parts: Sequence[Any], compute: Callable[[Any], Tensor]) -> list[Tensor]:
        """Return compute(part) for all parts, or for the first ones after a signal; the workers share them.

        Each part draws random numbers of its own from `generator`, so that they do not depend on the other parts.
        """

        def compute_part(number: int) -> Tensor:
            # Part 0 draws as a single part would.
            self.generator.manual_seed(fold_seed(self.settings.seed + 1_000_003 * number))
            return compute(parts[number])

        results = self.workers.share_out(range(len(parts)), compute_part)
        return [result.to(self.generator.device) for result in results]

    def render_images(self, index: Tensor) -> Tensor:
        """Return the sprites (N, 1, 64, 64) of an index (N,), in [0, 1]."""
        return self.sprites[index].float() / 255

    @functools.cached_property
    def acceleration(self) -> Acceleration:
        """The means by which chains on images are computed."""
        return accelerate_chains(self.settings)

    @functools.cached_property
    def sprite_generator(self) -> torch.Generator:
        """A CPU generator, so that the same sprites are drawn on every device."""
        return torch.Generator().manual_seed(self.settings.seed)

    def draw_candidates(self, candidates: Tensor, number: int) -> Tensor:
        """Draw `number` of the candidates (M,) at random, uniformly and with repetition."""
        return candidates[
            torch.randint(len(candidates), (number,), generator=self.sprite_generator).to(candidates.device)
        ]

    def draw_by_chance(self, number: int) -> Tensor:
        """Draw the latents (M, 5) of random sprites: as few as make CHANCE_PAIRS, a multiple M of `number` targets."""
        index = torch.arange(len(self.sprites), device=self.sprites.device)
        return self.sprites.latents[self.draw_candidates(index, number * -(-CHANCE_PAIRS // number))]

    def draw_targets(self, count: int, number: int) -> Tensor:
        """Draw the target sprites, whose latents become the labels of the models: their indices (count, number).

        Row k holds the targets of the names with number k, such as pos2 for k = 2. Sprites are drawn at random, but
        latents that the setting `labels` fixes have the nearest value on the grid of dSprites.
        """
        rows = []
        for place in range(1, count + 1):
            latents = self.sprites.latents
            allowed = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
            for name, text in self.label_texts.items():
                condition = self.get_condition(name)
                if condition and split_name(name)[1] == place:
                    for column, value in read_label(name, condition, text).items():
                        distance = (latents[:, column] - value).abs()
                        allowed &= distance < distance.min() + 1e-4
            rows.append(self.draw_candidates(allowed.nonzero()[:, 0], number))
        return torch.stack(rows)

    def get_condition(self, name: str) -> str | None:
        """Return the concept that labels of this name describe; None if they are plain numbers or classes.

        Raises UsageError if neither a model nor a concept has this name.
        """
        if name in self.concepts:
            return self.concepts[name].condition
        base = split_name(name)[0]
        if base not in CONCEPTS:
            raise UsageError(f"`labels`={name}=…: there is no model {name}, only {', '.join(self.concepts)}")
        return base

    def compute_labels(self, name: str, targets: Tensor) -> Tensor | None:
        """Return the labels (N, label_size) of the model of this name; None if it is unconditional.

        targets: latents (count, N, 5), from which labels of concepts are computed. Other labels, numbers or a class,
        come from the setting `labels`.
        """
        concept, text = self.concepts[name], self.label_texts.get(name)
        size = concept.config.label_size
        if concept.condition:
            return dsprites.compute_labels(targets[split_name(name)[1] - 1], concept.condition)
        if not size:
            return None
        try:
            numbers = [float(value) for value in (text or "").split(",")]
            if len(numbers) == 1 < size:
                numbers = torch.eye(size)[[float(k) for k in range(size)].index(numbers[0])].tolist()
        except ValueError:
            numbers = []
        if len(numbers) != size or not all(map(math.isfinite, numbers)):
            raise UsageError(
                f"`labels`={name}={text or '…'}: give a class below {size}, or {size} numbers separated by commas"
            )
        return torch.tensor(numbers, device=targets.device).expand(targets.shape[1], -1)

    def build_energy(self, expression: Expression, targets: Tensor) -> Energy:
        """Return the energy of an expression as a function of images. targets: latents (count, N, 5) of the labels."""
        labels = {name: self.compute_labels(name, targets) for name in expression.names}
        return lambda x: expression.energy({name: self.concepts[name].energy(x, y) for name, y in labels.items()})

    def sample_images(self, expressions: Sequence[Expression], targets: Tensor, progress: Progress) -> Tensor:
        """Sample images (N, C, H, W) by chains from noise that descend the expressions' energies in turn.

        targets: latents (count, N, 5). `restarts` chains run for each image, and the one with the lowest energy, summed
        over the expressions, is returned.
        """
        number, config = targets.shape[1], next(iter(self.concepts.values())).config
        energies = [self.build_energy(expression, targets) for expression in expressions]
        draw_start = functools.partial(draw_noise_images, config, number, self.generator)
        chains = torch.stack([self.run_chain(energies, draw_start(), progress) for _ in range(self.settings.restarts)])
        if len(chains) == 1:
            return chains[0]
        with torch.no_grad():
            totals = torch.stack([torch.stack([energy(chain) for energy in energies]).sum(0) for chain in chains])
        return chains[totals.argmin(0), torch.arange(number, device=chains.device)]

    def run_chain(self, energies: Sequence[Energy], start: Tensor, progress: Progress) -> Tensor:
        """Run chains that descend the energies in turn; return their end points, shaped like `start` (N, C, H, W)."""
        settings = self.settings
        end = self.acceleration.descend(
            energies,
            start,
            num_steps=settings.num_steps,
            step_lr=anneal_linearly(settings.first_step_lr, settings.step_lr, settings.num_steps),
            noise_std=anneal_linearly(settings.first_noise, self.noise_std, settings.num_steps),
            generator=self.generator,
            gradient_first=True,  # as in the reference's combination
            after_step=lambda _: progress.advance(),
        )
        return check_finite(end, "lower `step_lr`")


def anneal_linearly(first: float, last: float, num_steps: int) -> Schedule:
    """Return a schedule that falls linearly from `first` towards 0 at four fifths of the steps, but not below `last`.

    It anneals noise and step size, so that chains can leave the first mode that they reach. A `first` below `last` has
    no effect.
    """
    return lambda k: max(last, first * (1 - k / (0.8 * num_steps)))


# ---------------------------------------------------------------------------------------------------------------------
# Combination


def build_plans(combine: str, names: list[str], weights: Mapping[str, float]) -> dict[str, list[Expression]]:
    """Return the plans to sample from: title -> the energies that chains descend in turn.

    The first plan is that of the setting `combine`. For alternate and sum it is followed by plans for the first two
    concepts, the first three and so on, and for each concept alone. weights: name -> factor of an energy.
    """
    if combine not in ("alternate", "sum"):
        return {combine: [parse_expression(combine)]}
    groups = [names] + [names[:k] for k in range(2, len(names))] + [[name] for name in names]
    energies = {name: Weighted(weights.get(name, 1.0), Name(name)) for name in names}
    alternating: dict[str, list[Expression]] = {
        " & ".join(group): [energies[name] for name in group] for group in groups
    }
    if combine == "alternate":
        return alternating
    return {title: [Joined("&", tuple(plan))] for title, plan in alternating.items()}


def combine_concepts(run: ConceptRun) -> Figures:
    """Sample images under several concepts at once; for comparison also under fewer concepts and under each alone."""
    plans = build_plans(run.settings.combine, list(run.concepts), run.weights)
    number = run.settings.limit or run.settings.batch_size
    index = run.draw_targets(max(split_name(name)[1] for name in run.concepts), number)
    targets = run.sprites.latents[index]  # (count, N, 5)

    parts = list(itertools.product(plans.values(), targets.split(run.settings.batch_size, 1)))
    rounds = run.settings.num_steps * run.settings.restarts * run.workers.count_share(len(parts))
    steps = f"{run.settings.num_steps} Langevin steps" + f", {run.settings.restarts} times" * (
        run.settings.restarts > 1
    )
    combinations = f"{len(plans)} combination{'s' * (len(plans) > 1)} of concepts"
    print(f"work: {combinations}, {number:,} images of each, {steps}", flush=True)
    progress = Progress(rounds, what="Langevin step")
    with progress:
        images = torch.cat(run.share_parts(parts, lambda part: run.sample_images(part[0], part[1], progress)))
    run.workers.note_part("images of the first combination", len(images), number)
    number = min(number, len(images))
    index, targets = index[:, :number], targets[:, :number]
    run.workers.note_part("combinations", len(images) // number, len(plans))
    samples = dict(zip(plans, images.split(number), strict=False))
    samples = {title: batch for title, batch in samples.items() if len(batch) == number}
    generated = next(iter(samples.values()))
    if not any(concept.condition for concept in run.concepts.values()):
        pictures.save_panel({"generated": generated[:ROWS]}, run.add_file(name_picture(run)))
        return {"images": number}
    real = run.render_images(index[0])
    found = dsprites.find_nearest_sprites(torch.cat([*samples.values(), real]))
    nearest = {title: found[place * number : (place + 1) * number] for place, title in enumerate(samples)}
    judge, first = build_judge(run, targets), next(iter(plans))
    draw_verdicts(run, generated[:ROWS], index, judge.name_verdicts(plans[first], nearest[first]))
    return judge_samples(run, judge, nearest, plans, targets, found[-number:])


def draw_verdicts(run: ConceptRun, images: Tensor, index: Tensor, verdicts: Sequence[str]) -> None:
    """Draw images (N, 1, 64, 64) beside their targets, with what they were to show and whether they do.

    index: the targets (count, M), of which the first N are drawn. verdicts: in words, for M images.
    """
    index = index[:, : len(images)]
    columns = {"target" if k == 0 else f"target {k + 1}": run.render_images(row) for k, row in enumerate(index)}
    wanted = describe_targets(run, run.sprites.latents[index])
    rows = [f"{verdict}: {words}" for words, verdict in zip(wanted, verdicts, strict=False)]
    note = f"no sprite: less than {LEAST_OVERLAP:.0%} overlap with the nearest sprite"
    pictures.save_panel({"generated": images} | columns, run.add_file(name_picture(run)), rows=rows, note=note)


def describe_targets(run: ConceptRun, targets: Tensor) -> list[str]:
    """Return in words what each sample is to show.

    targets: latents (count, N, 5).
    """
    words = [
        dsprites.describe_sprite_labels(labels, concept.condition)
        for name, concept in run.concepts.items()
        if concept.condition and (labels := run.compute_labels(name, targets)) is not None
    ]
    return [", ".join(row) for row in zip(*words, strict=True)]


def name_picture(run: ConceptRun) -> str:
    """Return the file name of the picture: as in the reference for concepts, else made from the expression."""
    if run.settings.combine in ("alternate", "sum"):
        return "_".join(["im", *("condscale" if name == "size" else f"cond{name}" for name in run.concepts)]) + ".png"
    return f"im_{re.sub(r'[^A-Za-z0-9_]+', '_', run.settings.combine).strip('_')}.png"


@dataclasses.dataclass(frozen=True)
class Judge:
    """The targets of the names in an expression, with which the sprites nearest to images are compared.

    conditions: name -> its concept; names without a concept are left out. targets: name -> the wanted latents (N, 5).
    """

    conditions: Mapping[str, str]
    targets: Mapping[str, Tensor]

    def repeat(self, times: int) -> Judge:
        """Return a judge of `times` as many images, with the same targets again and again."""
        return Judge(self.conditions, {name: latents.repeat(times, 1) for name, latents in self.targets.items()})

    def judge_names(self, nearest: NearestSprites) -> dict[str, Tensor]:
        """Return which images show the target of each name: name -> (N,) bool. nearest: to the N images."""
        return {
            name: judge_concepts(nearest, self.targets[name])[condition] for name, condition in self.conditions.items()
        }

    def judge_plan(self, plan: Sequence[Expression], nearest: NearestSprites) -> Tensor | None:
        """Return which images fulfil all expressions of a plan, (N,) bool; no other than a sprite does.

        Returns None if a name in them has no concept. nearest: the sprites nearest to the N images.
        """
        if not {name for expression in plan for name in expression.names} <= set(self.conditions):
            return None
        truths = self.judge_names(nearest)
        # Without the sprites themselves, whatever is no sprite would fulfil ~shape.
        return torch.stack([nearest.is_sprite, *(expression.is_fulfilled(truths) for expression in plan)]).all(0)

    def share_of_plan(self, plan: Sequence[Expression], nearest: NearestSprites) -> float | None:
        """Return the share of images that fulfil all expressions of a plan; None as in `judge_plan`."""
        fulfilled = self.judge_plan(plan, nearest)
        return None if fulfilled is None else compute_share(fulfilled)

    def name_verdicts(self, plan: Sequence[Expression], nearest: NearestSprites) -> list[str]:
        """Return for each image "right", "wrong" or "no sprite"; "a sprite" if the plan cannot be judged."""
        fulfilled = self.judge_plan(plan, nearest)
        words = ["a sprite"] * len(nearest)
        if fulfilled is not None:
            words = ["right" if is_right else "wrong" for is_right in fulfilled.tolist()]
        return [
            word if is_sprite else "no sprite"
            for word, is_sprite in zip(words, nearest.is_sprite.tolist(), strict=True)
        ]


def build_judge(run: ConceptRun, targets: Tensor) -> Judge:
    """Return the judge of the run's models. targets: latents (count, N, 5)."""
    conditions = {name: concept.condition for name, concept in run.concepts.items() if concept.condition}
    return Judge(conditions, {name: targets[split_name(name)[1] - 1] for name in conditions})


def judge_samples(
    run: ConceptRun,
    judge: Judge,
    nearest: Mapping[str, NearestSprites],
    plans: Mapping[str, Sequence[Expression]],
    targets: Tensor,
    nearest_to_real: NearestSprites,
) -> Figures:
    """Return the share of samples that show their targets, by concept and jointly; plot it over the number of concepts.

    nearest: title -> the sprites nearest to the samples, perhaps not of all plans. plans: title -> the plan that they
    were sampled from, that of all concepts first. targets: latents (count, N, 5). nearest_to_real: the sprites nearest
    to those of the first target, which are measured like the samples.
    """
    first = next(iter(plans.values()))
    figures = tabulate_errors(judge, first, next(iter(nearest.values())), run.draw_by_chance(targets.shape[1]))
    by_shape = {}
    for title, found in nearest.items():
        figures[f"right, {title}"] = tabulate_shares(judge, plans[title], found)
        if len(targets) == 1 and (fulfilled := judge.judge_plan(plans[title], found)) is not None:
            by_shape[f"right by shape, {title}"] = split_by_shape(fulfilled, targets[0])
            by_shape[f"no sprite by shape, {title}"] = split_by_shape(~found.is_sprite, targets[0])
    if len(targets) == 1:
        figures["right, real sprites"] = tabulate_shares(judge, first, nearest_to_real)
    if len(nearest) == len(plans) > 1:
        plot_joint(run, figures)
    return figures | by_shape


def tabulate_shares(judge: Judge, plan: Sequence[Expression], nearest: NearestSprites) -> Figures:
    """Return the share of images that show each name of a plan, and all of it, and how well sprites fit them.

    The column "by nearest" is the share that would show all of the plan if every image counted as its nearest sprite,
    blobs as well; "no sprite" is the share that overlaps its nearest sprite too little to show anything; "MSE to
    sprite" is the mean squared error to it. nearest: the sprites nearest to the images.
    """
    names = {name for expression in plan for name in expression.names}
    truths = judge.judge_names(nearest)
    return {name: compute_share(truth) if name in names else None for name, truth in truths.items()} | {
        "jointly": judge.share_of_plan(plan, nearest),
        "by nearest": judge.share_of_plan(plan, NearestSprites.of_sprites(nearest.latents)),
        "no sprite": compute_share(~nearest.is_sprite),
        "MSE to sprite": nearest.distances.square().mean().item() / dsprites.SIDE**2,
    }


def tabulate_errors(judge: Judge, plan: Sequence[Expression], nearest: NearestSprites, drawn: Tensor) -> Figures:
    """Return a row of errors for each concept of images, and a row for the whole plan.

    nearest: the sprites nearest to the N images; images that are no sprites have no error, and are not right. drawn:
    latents (M, 5) of random sprites, N or a multiple of it. The column "by chance" is the share of them that is right
    for the same targets.
    """
    figures: Figures = {}
    chance = judge.repeat(len(drawn) // len(nearest))
    random = NearestSprites.of_sprites(drawn)
    truths, by_chance = judge.judge_names(nearest), chance.judge_names(random)
    has_sprites = bool(nearest.is_sprite.any())
    for name, condition in judge.conditions.items():
        error = measure_errors(nearest.latents, judge.targets[name])[condition][nearest.is_sprite]
        figures[f"{name} / {CONCEPTS[condition].unit}"] = {
            "mean error": error.mean().item() if has_sprites else None,
            "median": error.median().item() if has_sprites else None,
            "right": compute_share(truths[name]),
            "by chance": compute_share(by_chance[name]),
        }
    joint = {"right": judge.share_of_plan(plan, nearest), "by chance": chance.share_of_plan(plan, random)}
    return figures | {"jointly": {"mean error": None, "median": None} | joint}


def compute_share(truths: Tensor) -> float:
    """Return the share of true values."""
    return truths.double().mean().item()


def split_by_shape(truths: Tensor, latents: Tensor) -> dict[str, float | None]:
    """Return the share of true values (N,) for each shape in the latents (N, 5); None if a shape does not occur."""
    parts = {name: truths[latents[:, 0] == k] for k, name in enumerate(dsprites.SHAPES, 1)}
    return {name: compute_share(part) if len(part) else None for name, part in parts.items()}


def plot_joint(run: ConceptRun, figures: Figures) -> None:
    """Plot the share of images that are right, and of those that are no sprites, over the number of combined concepts.

    1 is each concept alone, 2 the first two, and so on.
    """
    names = list(run.concepts)
    lines = {}
    for column, entered in ({name: k for k, name in enumerate(names, 1)} | {"jointly": 1, "no sprite": 1}).items():
        counts = sorted({1, *range(entered, len(names) + 1)})
        titles = [" & ".join(names[:count]) if count > 1 or entered == 1 else column for count in counts]
        lines[column] = counts, [figures[f"right, {title}"][column] for title in titles]
    xlabel, share = f"concepts combined: {', '.join(names)}", "share of images"
    pictures.plot_lines({share: lines}, run.add_file("accuracy.png"), xlabel=xlabel, shares=[share])


# ---------------------------------------------------------------------------------------------------------------------
# Labels of images


def discover_labels(run: ConceptRun) -> Figures:
    """Infer labels of real images by Langevin steps on the label, from a random start in its range.

    For comparison, also find the label of lowest energy among all labels of sprites, except for positions, which are
    too many to try.
    """
    number = run.settings.limit or 30 * run.settings.batch_size
    index = run.draw_targets(1, number)[0]
    latents = run.sprites.latents[index]
    searches = sum(concept.condition != "pos" for concept in run.concepts.values())
    steps = f"{run.settings.num_steps} Langevin steps on the label for each of {len(run.concepts)} concepts"
    print(f"work: {number:,} images, {steps}; a search of all labels for {searches} of them", flush=True)
    progress = Progress((len(run.concepts) + searches) * number, what="labels")
    figures: Figures = {}
    judged, panels = {}, {}
    with keep_what_is_done(figures), progress:
        for name, concept in run.concepts.items():
            condition = concept.condition
            assert condition, "main takes concepts only"
            labels = trace_labels(run, concept, index, progress)
            done = latents[: len(labels[0])]
            errors = [measure_label_errors(label, done, condition) for label in labels]
            true = dsprites.compute_labels(done, condition)
            title = f"{name} / {CONCEPTS[condition].unit}"
            ylabel = f"mean error of the inferred\n{title}"
            panels[ylabel] = {ylabel: (range(len(errors)), [error.mean().item() for error in errors])}
            figures[title] = {
                "mean error": errors[-1].mean().item(),
                "at the start": errors[0].mean().item(),
                "right": compute_share(is_within_tolerance(errors[-1], condition)),
                "by chance": measure_chance(run, done, condition),
                "error of the label": (labels[-1] - true).abs().mean().item(),  # the reference's figure
            }
            run.workers.note_part(f"labels of {name}", len(done), number)
            if condition != "pos":
                lowest = find_lowest_labels(run, concept, index, progress)
                done = latents[: len(lowest)]
                truths = is_within_tolerance(measure_label_errors(lowest, done, condition), condition)
                judged[f"{name}, lowest energy"] = {"right": compute_share(truths), **split_by_shape(truths, done)}
                run.workers.note_part(f"search for labels of {name}", len(done), number)
    pictures.plot_lines(panels, run.add_file("errors.png"), xlabel="Langevin steps on the label")
    return figures | judged


def trace_labels(run: ConceptRun, concept: ConceptModel, index: Tensor, progress: Progress) -> list[Tensor]:
    """Infer labels of sprites from random starts; return the labels (N, label_size) at the start and after each step.

    Labels start uniformly in their range. index: the sprites (N,). concept: a model conditioned on one concept.
    progress: counts sprites.
    """
    assert concept.condition, "main takes concepts only"
    (low, high), label_size = CONCEPTS[concept.condition].label_range, CONCEPTS[concept.condition].label_size

    def trace_part(part: Tensor) -> Tensor:
        uniform = torch.rand((len(part), label_size), generator=run.generator, device=index.device)
        labels = descend_labels(run, concept, run.render_images(part), low + (high - low) * uniform)
        progress.advance(len(part) * run.workers.size)
        return torch.stack(labels)

    return list(torch.cat(run.share_parts(index.split(run.settings.batch_size), trace_part), 1))


def descend_labels(run: ConceptRun, concept: ConceptModel, images: Tensor, start: Tensor) -> list[Tensor]:
    """Take Langevin steps on the labels of images; return the labels (N, label_size) at the start and after each step.

    images: (N, 1, 64, 64). start: labels (N, label_size). concept: a model conditioned on one concept, in the range of
    whose labels they are kept.
    """
    assert concept.condition, "main takes concepts only"
    labels = [start]
    end = langevin(
        concept.energy.at(images),
        start,
        num_steps=run.settings.num_steps,
        step_lr=run.settings.label_lr,
        noise_std=run.label_noise,
        bounds=CONCEPTS[concept.condition].label_range,
        generator=run.generator,
        after_step=labels.append,
    )
    check_finite(end, "lower `label_lr`")
    return labels


def find_lowest_labels(run: ConceptRun, concept: ConceptModel, index: Tensor, progress: Progress) -> Tensor:
    """Return the labels (N, label_size) of lowest energy for sprites, among all labels that sprites can have.

    index: the sprites (N,). concept: a model conditioned on size, shape or rotation. progress: counts sprites.
    """
    assert concept.condition, "main takes concepts only"
    column = CONCEPTS[concept.condition].columns[0]
    values = torch.tensor(list(dsprites.LATENTS.values())[column], device=index.device)
    latents = values.new_ones(len(values), len(dsprites.LATENTS))
    latents[:, column] = values
    labels = dsprites.compute_labels(latents, concept.condition)

    @torch.no_grad()
    def search_part(part: Tensor) -> Tensor:
        energies = concept.energy.at(run.render_images(part))(labels.repeat(len(part), 1))
        progress.advance(len(part) * run.workers.size)
        return energies.view(len(part), -1).argmin(1)

    return labels[torch.cat(run.share_parts(index.split(LABEL_BATCH), search_part))]


def measure_label_errors(labels: Tensor, latents: Tensor, condition: str) -> Tensor:
    """Return the errors (N,) of labels (N, label_size) of a concept with respect to latents (N, 5).

    The unit is that of `measure_errors`.
    """
    inferred = latents.clone()
    if condition == "shape":
        labels = labels.argmax(1, keepdim=True) + 1.0
    elif condition == "rot":
        labels = torch.atan2(labels[:, 1:], labels[:, :1])
    inferred[:, list(CONCEPTS[condition].columns)] = labels
    return measure_errors(inferred, latents)[condition]


def measure_chance(run: ConceptRun, latents: Tensor, condition: str) -> float:
    """Return the share of random sprites whose label of a concept is right for the latents (N, 5) of others."""
    drawn = run.draw_by_chance(len(latents))
    targets = latents.repeat(len(drawn) // len(latents), 1)
    errors = measure_label_errors(dsprites.compute_labels(drawn, condition), targets, condition)
    return compute_share(is_within_tolerance(errors, condition))

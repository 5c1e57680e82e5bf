"""Robust accuracy: AutoAttack's attacks on the plain and on the refined classifier, and whether they can be trusted.

The checks are those of Athalye et al. 2018 and Carlini et al. 2019: other random starts and more steps change little, a
large ball leaves no image right, and neither an attack without gradients nor one on another classifier misleads images
that the attacks with gradients leave right. Where they fail, gradients are masked, and the accuracy under attack says
nothing about robustness.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ebm.support import pictures
from ebm.support.interruption import keep_what_is_done
from ebm.support.progress import Progress
from ebm.tasks.attacks import SHADES
from ebm.tasks.autoattack import (
    FAB,
    FIRST,
    LARGEST,
    LONGER,
    RESTART,
    SQUARE,
    AttackCost,
    AttackPlan,
    ClassLogits,
    attack_in_ball,
    count_evaluations,
    import_torchattacks,
    measure_lengths,
    plan_attacks,
)
from ebm.tasks.sandbox_run import ROWS, Examples, Report, SandboxRun

USUAL_NUMBER = 100  # images to attack, since each takes thousands of evaluations
TOLERANCE = 0.05  # share of images, at least one, by which the results of a check may differ
CLEAN, TRANSFER = "no attack", "transfer of APGD-CE"

# Row of the report -> classifier -> whether it finds the true class of each image, (N,).
Judgements = dict[str, dict[str, Tensor]]


class AttackProgress:
    """Moves a progress bar at every call of a classifier, so that it goes on during an attack.

    workers: the number of those that attack at the same time.
    """

    def __init__(self, bar: Progress, workers: int):
        self.bar, self.workers = bar, workers
        self.cost, self.last = AttackCost(0, 0, 0), bar.done

    def begin(self, cost: AttackCost, number: int) -> None:
        """Begin an attack on so many images; the last evaluation of each is left to the caller."""
        self.cost, self.last = cost, self.bar.done + number * cost.total * self.workers

    def note_call(self, number: int) -> None:
        """Add a call of the classifier with so many images."""
        each = self.cost.differentiable_call if torch.is_grad_enabled() else self.cost.plain_call
        self.bar.update(max(self.bar.done, min(self.bar.done + number * each * self.workers, self.last)))

    def end(self) -> None:
        """End the attack, which may have taken fewer calls than expected."""
        self.bar.update(max(self.bar.done, self.last))


@dataclasses.dataclass
class AttackedImages:
    """Test images under one attack after the other, and the classifiers, which are those of a model.

    costs: of the plans. progress: of all of them.
    """

    run: SandboxRun
    examples: Examples
    classifiers: Mapping[str, ClassLogits]
    costs: Mapping[tuple[str, AttackPlan], AttackCost]
    progress: AttackProgress

    def attack(self, name: str, plan: AttackPlan, judges: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return all images after an attack on a classifier, and whether each of the judges is right, (judges, N).

        name, judges: names of classifiers. Raises Interruption after a signal.
        """
        model, (images, _), classes = self.run.model, self.examples, self.examples.classes
        cost = self.costs[name, plan]

        def examine(part: slice) -> Tensor:
            self.progress.begin(cost, part.stop - part.start)
            seed = int(torch.randint(2**31, (), generator=model.generator, device=model.device))
            attacked = attack_in_ball(self.classifiers[name], images[part], classes[part], plan, seed=seed)
            self.progress.end()
            return torch.cat([attacked.flatten(1), self.judge(attacked, classes[part], judges)], 1)

        bar = self.progress.bar
        found = model.compute_in_batches(examine, len(images), bar, each=model.classes, rounds=cost.total + 1)
        model.require_all()
        attacked, is_right = found.split([images[0].numel(), len(judges)], 1)
        return attacked.view_as(images), is_right.bool().T

    def judge_clean(self) -> Tensor:
        """Return whether each of the classifiers is right about each image without attack, (classifiers, N)."""
        model, (images, _), classes = self.run.model, self.examples, self.examples.classes

        def examine(part: slice) -> Tensor:
            return self.judge(images[part], classes[part], list(self.classifiers))

        found = model.compute_in_batches(examine, len(images), self.progress.bar, each=model.classes)
        model.require_all()
        return found.bool().T

    @torch.no_grad()
    def judge(self, images: Tensor, classes: Tensor, judges: Sequence[str]) -> Tensor:
        """Return whether classifiers are right about a batch, (n, judges) as numbers."""
        self.progress.cost = AttackCost(0, 0, 0)  # the caller counts these calls
        found = [self.classifiers[name](images).argmax(1) == classes for name in judges]
        return torch.stack(found, 1).float()


def measure_robustness(run: SandboxRun, scale: float) -> Report:
    """Measure the accuracy of the plain and of the refined classifier under AutoAttack's attacks, and check these.

    scale: the factor of the logits. Robust accuracy is the share of images that a classifier gets right after each of
    the attacks within the ball, that on the other classifier included. The refined one draws new noise for each.
    """
    model, settings = run.model, run.settings
    import_torchattacks()  # before any work, if it is missing
    plans = plan_attacks(settings, run.config.image_shape, model.classes, model.num_steps)
    examples = run.draw_examples("test", run.choose_number(USUAL_NUMBER))
    number, ball = sum(map(len, plans.values())), plans[FIRST]["plain"].describe_ball()
    words = f"AutoAttack, {ball}, images in [0, 1], {settings.attack_steps} steps, {settings.attack_queries} queries"
    if model.num_steps:
        adaptive = f"through the refinement, mean of {settings.adaptive} draws"
        words += f", gradient {adaptive if settings.adaptive else 'not through the refinement'}"
    what = f"{number} attacks on {len(examples.images):,} test images, under each of {model.classes} classes"
    run.announce(f"{what}; {words}; refinement: {run.describe_refinement()}")
    if model.num_steps and not settings.adaptive:
        print("note: without `adaptive` no attack goes through the refinement; its robust accuracy is not measured")

    chains = {"plain": 0} | ({"refined": model.num_steps} if model.num_steps else {})
    costs = {
        (name, plan): count_evaluations(plan, model.classes, chains[name])
        for columns in plans.values()
        for name, plan in columns.items()
    }
    total = sum(costs[pair].total + 1 for columns in plans.values() for pair in columns.items())
    bar = Progress(len(examples.images) * (1 + total), what="evaluations under attack")
    progress = AttackProgress(bar, model.workers.size)
    classifiers = {
        name: ClassLogits(model, scale, run.refine if chain else None, progress.note_call)
        for name, chain in chains.items()
    }
    attacked_images = AttackedImages(run, examples, classifiers, costs, progress)

    judgements: Judgements = {}
    lengths: Tensor | None = None
    columns = {"real": examples.images[:ROWS]}
    done = 0
    with keep_what_is_done(judgements):
        judgements[CLEAN] = dict(zip(classifiers, attacked_images.judge_clean(), strict=True))
        for row, name, plan in ((row, *pair) for row, pairs in plans.items() for pair in pairs.items()):
            bar.text = f"{row}, {name}"
            judges = [name, *(other for other in classifiers if other != name and row == FIRST)]
            attacked, (is_right, *others) = attacked_images.attack(name, plan, judges)
            if row == FAB:
                lengths = measure_lengths(attacked - examples.images, plan.norm).masked_fill(is_right, math.inf)
                is_right = lengths > plan.radius
            judgements.setdefault(row, {})[name] = is_right
            for other, values in zip(judges[1:], others, strict=True):
                judgements.setdefault(TRANSFER, {})[other] = values
            if row == FIRST:
                columns[f"{row}, {name}"] = attacked[:ROWS]
            done += 1
    bar.close()
    run.results.workers.note_part("attacks", done, number)
    run.write_panel("images", columns, run.describe_labels(examples.labels[:ROWS]))
    figures = summarise_attacks(judgements, list(classifiers))
    draw_accuracies(run, figures, lengths, plans[FIRST]["plain"])
    head = {"attack": words, "large ball": plans[LARGEST]["plain"].describe_ball()}
    return Report({**head, "refinement": run.describe_refinement(), "images": len(examples.images), **figures})


# ---------------------------------------------------------------------------------------------------------------------
# The report


def summarise_attacks(judgements: Judgements, names: Sequence[str]) -> dict[str, object]:
    """Return rows of accuracies, the robust accuracy, the checks and a verdict in words.

    names: of the classifiers. One that no attack knows has accuracies, but neither a robust accuracy nor checks.
    """

    def make_row(values: Mapping[str, object]) -> dict[str, object]:
        return {name: values.get(name) for name in names}

    figures: dict[str, object] = {
        row: make_row({name: measure_share(is_right) for name, is_right in columns.items()})
        for row, columns in judgements.items()
    }
    robust = {}
    for name in names:
        rows = {row: columns[name] for row, columns in judgements.items() if name in columns}
        if FIRST in rows:  # of the attacks on a classifier this one comes first
            robust[name] = measure_share(torch.stack([rows[row] for row in rows if row != LARGEST]).all(0))
    figures["robust accuracy"] = make_row(robust)
    checks = {name: check_attacks(judgements, name) for name in names}
    for check in checks[names[0]]:
        results = {name: found[check] for name, found in checks.items()}
        words = {name: "passed" if result else "failed" for name, result in results.items() if result is not None}
        figures[f"check: {check}"] = make_row(words)
    failed = [
        f"{check} ({name})" for name, found in checks.items() for check, result in found.items() if result is False
    ]
    made = sum(result is not None for found in checks.values() for result in found.values())
    verdict = f"no check failed, of {made} that were made" if made else "no check was made"
    if failed:
        remedy = "take more steps, or look for masked gradients"
        verdict = f"failed: {', '.join(failed)}; do not trust the robust accuracy: {remedy}"
    return figures | {"verdict": verdict}


def measure_share(values: Tensor) -> float:
    """Return the share of true values."""
    return values.double().mean().item()


def check_attacks(judgements: Judgements, name: str) -> dict[str, bool | None]:
    """Return which checks of the attacks on a classifier pass; None stands for one whose attacks were not run."""
    rows = {row: columns[name] for row, columns in judgements.items() if name in columns}
    survived = torch.stack([rows[row] for row in rows if row not in (TRANSFER, SQUARE, LARGEST)]).all(0)
    share = {row: measure_share(is_right) for row, is_right in rows.items()}
    missed = {row: measure_share(survived & ~is_right) for row, is_right in rows.items()}  # by attacks with gradients
    limit = max(TOLERANCE, 1 / len(survived)) + 1e-9  # shares are rounded
    checks = {
        "another start": (RESTART, lambda: abs(share[FIRST] - share[RESTART]) <= limit),
        "more steps": (LONGER, lambda: share[FIRST] - share[LONGER] <= limit),
        "large ball": (LARGEST, lambda: share[LARGEST] == 0),
        "no gradients": (SQUARE, lambda: missed[SQUARE] <= limit),
        "transfer": (TRANSFER, lambda: missed[TRANSFER] <= limit),
    }
    return {check: passes() if row in rows and FIRST in rows else None for check, (row, passes) in checks.items()}


def draw_accuracies(run: SandboxRun, figures: Mapping[str, object], lengths: Tensor | None, plan: AttackPlan) -> None:
    """Plot accuracy over the ball's radius.

    lengths: of FAB's changes to the images (N,), the least that it found to mislead the plain classifier.
    """
    lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if lengths is not None:
        radii = np.linspace(0, 4 * plan.radius, 101)
        lines["plain, FAB alone"] = (SHADES * radii, (lengths.cpu().numpy() > radii[:, None]).mean(1))
    robust = figures["robust accuracy"]
    assert isinstance(robust, Mapping), "a row of the classifiers"
    for name, value in robust.items():
        if value is not None:
            lines[f"{name}, all attacks"] = (np.array([SHADES * plan.radius]), np.array([value]))
    xlabel = f"radius of the {'L∞' if plan.norm == 'Linf' else 'L2'} ball / (1/{SHADES})"
    if lines:
        pictures.plot_lines({"accuracy": lines}, run.add_file("accuracies.png"), xlabel=xlabel, shares=["accuracy"])

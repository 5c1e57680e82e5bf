"""The attacks of AutoAttack (Croce & Hein 2020) on an energy model's classifiers, through the package torchattacks.

    classifier = ClassLogits(examined, refine=8 / 255)
    plan = AttackPlan("APGD-CE", "Linf", radius=8 / 255, steps=100, draws=20)
    attacked = attack_in_ball(classifier, images, classes, plan, seed=0)

torchattacks takes any `torch.nn.Module` that returns logits, keeps images in [0, 1], and averages gradients over the
draws of a noisy classifier. The adversarial-robustness-toolbox lacks FAB and passes images through NumPy, foolbox lacks
APGD, FAB and Square. Its own class AutoAttack runs APGD and FAB with 10 steps in place of 100, and does not tell what
each attack achieves: here its attacks are run one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm.settings import SandboxSettings
from ebm.support.errors import UsageError
from ebm.tasks.attacks import SHADES
from ebm.tasks.examined_model import ExaminedModel

TARGETS = 9  # classes that APGD-T aims at, the most probable ones besides the true one, as in AutoAttack
LARGE = 128  # radius of a ball, in shades, that holds one grey image around every image, which has one class

# Rows of the report: attacks, and what checks them.
FIRST, TARGETED, DLR, FAB, SQUARE = "APGD-CE", "APGD-T", "APGD-DLR", "FAB", "Square"
RESTART, LONGER, LARGEST = "APGD-CE, another start", "APGD-CE, twice the steps", "APGD-CE, large ball"


@dataclasses.dataclass(frozen=True)
class AttackPlan:
    """One attack.

    method: "APGD-CE", "APGD-DLR", "APGD-T" (with the targeted DLR loss), "FAB" or "Square". norm: of the ball, "Linf"
    or "L2". radius: of the ball, for images in [0, 1]; FAB ignores it and looks for the nearest misclassified image.
    steps: gradient steps, or queries of Square. draws: noise draws over which APGD-CE and APGD-DLR average gradients.
    """

    method: str
    norm: str
    radius: float
    steps: int
    draws: int = 1

    def describe_ball(self) -> str:
        """Return the ball in words."""
        return f"{'L∞' if self.norm == 'Linf' else 'L2'} ball of {self.radius * SHADES:g}/{SHADES}"


class AttackCost(NamedTuple):
    """About how many evaluations of the network for each class an attack on an image takes; a gradient counts as one.

    differentiable_call, plain_call: those of a call of the classifier, with gradients and without. total: of all calls.
    """

    differentiable_call: int
    plain_call: int
    total: int


class ClassLogits(torch.nn.Module):
    """The class logits −scale · E(x, y) of images x, as a module.

    refine: refine the images first, within an L∞ ball of this radius; each call draws its noise anew, and gradients
    flow through the Langevin steps. note_call: is told the number of images of each call.
    """

    def __init__(
        self,
        examined: ExaminedModel,
        scale: float = 1.0,
        refine: float | None = None,
        note_call: Callable[[int], None] | None = None,
    ):
        super().__init__()
        self.examined, self.scale, self.refine, self.note_call = examined, scale, refine, note_call
        self.place = torch.nn.Parameter(torch.empty(0, device=examined.device))  # tells torchattacks the device

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        if self.note_call is not None:
            self.note_call(len(images))
        logits = self.examined.classify_batch(images, self.refine, differentiable=torch.is_grad_enabled())
        return self.scale * logits


def import_torchattacks() -> Any:
    """Return the package torchattacks; raise UsageError if it is not installed."""
    try:
        import torchattacks
    except ImportError as error:
        raise UsageError(f"`attack`=autoattack needs {error.name}; pip install -e '.[attacks]'") from None
    return torchattacks


@torch.no_grad()
def attack_in_ball(
    classifier: torch.nn.Module, images: Tensor, classes: Tensor, plan: AttackPlan, *, seed: int
) -> Tensor:
    """Return attacked images (N, C, H, W) in [0, 1], within the ball unless the attack is FAB.

    classifier: images -> logits (N, classes). classes: the true ones (N,). seed: of the attack's random numbers, for
    which PyTorch's own generators are not moved on. For an image that they never saw misclassified APGD-CE and APGD-DLR
    return the one of the largest loss, which may mislead another classifier, and other attacks the image itself.
    """
    library, device = import_torchattacks(), images.device
    common = {"norm": plan.norm, "seed": seed, "steps": plan.steps}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if plan.method in (FIRST, DLR):
            loss = "ce" if plan.method == FIRST else "dlr"
            attack = library.APGD(classifier, eps=plan.radius, loss=loss, eot_iter=plan.draws, **common)
            strongest, is_right, _, misleading = attack.attack_single_run(images, classes)
            return torch.where(is_right.bool().view(-1, 1, 1, 1), strongest, misleading)
        if plan.method == TARGETED:
            number = min(classifier(images[:1]).shape[1], TARGETS + 1)
            attack = library.APGDT(classifier, eps=plan.radius, n_classes=number, **common)
        elif plan.method == FAB:
            attack = library.FAB(classifier, eps=math.inf, **common)
        else:
            attack = library.Square(classifier, norm=plan.norm, eps=plan.radius, n_queries=plan.steps, seed=seed)
        return attack(images, classes)


def measure_lengths(offsets: Tensor, norm: str) -> Tensor:
    """Return the norms (N,) of offsets (N, C, H, W), "Linf" or "L2"."""
    return offsets.flatten(1).norm(dim=1, p=math.inf if norm == "Linf" else 2)


def plan_attacks(
    settings: SandboxSettings, shape: tuple[int, int, int], classes: int, chain: int
) -> dict[str, dict[str, AttackPlan]]:
    """Return the attacks of a task in their order: {row of the report: {name of the classifier: plan}}.

    shape: of an image. classes: of the model. chain: Langevin steps of the refinement. The classifiers are "plain" and
    "refined". As in AutoAttack, four methods attack the plain one, and APGD with mean gradients the refined one, which
    is noisy; that is, if `adaptive` is set, because an attack that ignores the refinement tells little about it.
    """
    norm, value = ("Linf", settings.lival) if settings.lnorm == "-1" else ("L2", settings.l2val)
    radius, steps = value / SHADES, settings.attack_steps
    large = LARGE / SHADES * (1 if norm == "Linf" else math.prod(shape) ** 0.5)
    plain = AttackPlan(FIRST, norm, radius, steps)
    firsts = {"plain": plain}
    if settings.adaptive and chain:
        firsts["refined"] = dataclasses.replace(plain, draws=settings.adaptive)

    def vary(only: str = "", **changes: Any) -> dict[str, AttackPlan]:
        return {name: dataclasses.replace(plan, **changes) for name, plan in firsts.items() if only in (name, "")}

    plans = {
        FIRST: firsts,
        TARGETED: vary("plain", method=TARGETED) if classes > 3 else {},  # its loss compares four classes
        DLR: vary("refined", method=DLR) if classes > 2 else {},  # and this one three
        FAB: vary("plain", method=FAB),
        SQUARE: vary("plain", method=SQUARE, steps=settings.attack_queries),
        RESTART: firsts,
        LONGER: vary(steps=2 * steps),
        LARGEST: vary(radius=large),
    }
    return {row: columns for row, columns in plans.items() if columns}


def count_evaluations(plan: AttackPlan, classes: int, chain: int) -> AttackCost:
    """Return the cost of an attack on an image. chain: Langevin steps of the refinement, each of them a gradient."""
    steps, targets = plan.steps, min(classes - 1, TARGETS)
    differentiable, plain = {
        TARGETED: (targets * (steps + 1), targets + 2),
        FAB: (steps, steps + 2),
        SQUARE: (0, steps + 2),
    }.get(plan.method, (plan.draws * (steps + 1), 0))
    call = 1 + 2 * chain
    differentiable_call = call + (classes if plan.method == FAB else 1)  # FAB computes a gradient for each class
    return AttackCost(differentiable_call, call, differentiable * differentiable_call + plain * call)

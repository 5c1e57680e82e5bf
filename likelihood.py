"""Log-likelihood of densities exp(−E) over images, bounded from both sides by annealed importance sampling.

    bracket = log_z(energy, (16, 1, 28, 28), num_distributions=1000, step_size=0.0065, generator=generator)
    # −E(x) − bracket.upper ≤ log p(x) ≤ −E(x) − bracket.lower, in nats

Images lie in a box whose walls are steep, not hard: the density is exp(−E(x) − sampling.beyond(x)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampling import SPILL, WALL, Energy, anneal, beyond, box_images

MOVES = ("acceptance", "reverse_acceptance")


class Bracket(NamedTuple):
    """Bounds of log ∫ exp(−E) in nats, each a mean over chains with its standard error, and accepted moves."""

    lower: float
    lower_error: float
    upper: float
    upper_error: float
    acceptance: Tensor  # (num_distributions,) of the forward run
    reverse_acceptance: Tensor  # (num_distributions,), in the same order


class Target(NamedTuple):
    """A density exp(−E) over images in [0, rescale], one under each class of a conditional model."""

    energies: dict[str, Energy]
    shape: tuple[int, ...]  # of an image
    share: dict[str, float]  # of the test images that are of this class
    values: Tensor | None  # (n,), E of the test images
    samples: Tensor | None  # (batch_size, ...), exact ones, where there are any
    rescale: float
    alr: float
    about: dict[str, Any]


def log_z(
    energy: Energy,
    shape: tuple[int, ...],
    *,
    num_distributions: int,
    step_size: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    samples: Tensor | None = None,
    generator: torch.Generator,
    progress: Callable[[], object] = lambda: None,
) -> Bracket:
    """Bound log ∫ exp(−E − beyond) from both sides with chains of this shape (N, ...), see `anneal`.

    samples: exact ones of the energy, from which the reverse run starts. Without them it starts where the forward
    chains end, and the upper bound holds as far as those are samples of the energy (Grosse et al. 2015).
    """
    settings: dict[str, Any] = {"num_distributions": num_distributions, "step_size": step_size, "bounds": bounds}
    settings |= {"generator": generator, "progress": progress}
    forward = anneal(energy, box_images(shape, bounds, generator), **settings)
    back = anneal(energy, forward.x if samples is None else samples, reverse=True, **settings)
    box = math.prod(shape[1:]) * math.log(bounds[1] - bounds[0] + SPILL)
    (lower, lower_error), (upper, upper_error) = (
        (box + w.mean().item(), (w.std() / len(w) ** 0.5).item()) for w in (forward.log_weights, back.log_weights)
    )
    return Bracket(lower, lower_error, upper, upper_error, forward.acceptance, back.acceptance)


def figures_of(target: Target, brackets: dict[str, Bracket]) -> dict[str, float]:
    """Return the bounds in nats and, of test images, in bits per dimension; of several classes the mean over images."""

    def mean(field: str) -> float:
        return sum(part * getattr(brackets[name], field) for name, part in target.share.items())

    def error(field: str) -> float:
        return math.sqrt(sum((part * getattr(brackets[name], field)) ** 2 for name, part in target.share.items()))

    low, high = mean("lower"), mean("upper")
    figures = {"log Z ≥": low, "log Z ≤": high, "error": max(error("lower_error"), error("upper_error"))}
    if target.values is not None:
        energy, dimensions = target.values.double().mean().item(), math.prod(target.shape)
        per_image = {"log p ≥": -energy - high, "log p ≤": -energy - low}
        # The density on [0, rescale]ᵈ is rescale⁻ᵈ of that on [0, 1]ᵈ, and a byte is 1/256 of that range.
        bits = [8 - (p / dimensions + math.log(target.rescale)) / math.log(2) for p in per_image.values()]
        figures |= per_image | {"bits/dim ≥": bits[1], "bits/dim ≤": bits[0]}
    accepted = [sum(getattr(b, name).mean().item() for b in brackets.values()) / len(brackets) for name in MOVES]
    return figures | dict(zip(("accepted", "back"), accepted, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# A density whose log Z is known: a Gaussian around the middle of the box [0, rescale]ᵈ


def gauss_log_z(dimensions: int, precision: float, rescale: float) -> float:
    """Return log ∫ exp(−precision·|x − centre|²/2 − Σ (100·distance to the box)²) dx in closed form."""
    half = rescale / 2
    inside = 0.5 * math.log(2 * math.pi / precision) + math.log(math.erf(half * math.sqrt(precision / 2)))
    # Beyond a wall ∫ exp(−precision·(half + u)²/2 − (WALL·u)²) du, a Gaussian's tail with this curvature
    curvature = precision / 2 + WALL**2
    z = precision * half / (2 * math.sqrt(curvature))
    tail = torch.special.log_ndtr(torch.tensor(-math.sqrt(2) * z, dtype=torch.float64)).item()
    tail += z**2 - precision * half**2 / 2 + 0.5 * math.log(math.pi / curvature)
    return dimensions * (inside + math.log1p(math.exp(math.log(2) + tail - inside)))


def gauss_samples(shape: tuple[int, ...], precision: float, rescale: float, generator: torch.Generator) -> Tensor:
    """Return exact samples of that Gaussian between its walls: normal ones, of which the walls reject some."""
    number = math.prod(shape)
    kept = torch.empty(0, device=generator.device)
    while len(kept) < number:
        x = torch.randn(number, generator=generator, device=generator.device) / precision**0.5 + rescale / 2
        allowed = (-beyond(x[:, None], (0.0, rescale))).exp()
        kept = torch.cat([kept, x[torch.rand(number, generator=generator, device=generator.device) < allowed]])
    return kept[:number].view(shape)

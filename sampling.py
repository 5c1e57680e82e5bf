"""Markov chains on images, as pure functions of an energy, plain numbers and a generator.

images = langevin(lambda x: model.energy(weights, x, labels), start, num_steps=60, step_lr=10.0)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Energy = Callable[[Tensor], Tensor]  # (N, ...) -> (N,)

PROJ_NORM_TYPES = ("li", "l2")


def input_gradient(energy: Energy, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return dΣE/dx, shaped like x: the gradient to the images, never to the weights."""
    with torch.enable_grad():
        if not (create_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)[0]


def clip_gradient(gradient: Tensor, proj_norm: float, proj_norm_type: str) -> Tensor:
    """Clip elementwise to ±proj_norm ("li"), or to that L2 norm over the whole tensor ("l2"); 0 leaves it alone."""
    if proj_norm_type not in PROJ_NORM_TYPES:
        raise ValueError(f"proj_norm_type is {proj_norm_type!r}, must be one of {PROJ_NORM_TYPES}")
    if proj_norm <= 0:
        return gradient
    if proj_norm_type == "li":
        return gradient.clamp(-proj_norm, proj_norm)
    return gradient * (proj_norm / gradient.norm().clamp(min=1e-12)).clamp(max=1.0)


def langevin_step(
    energy: Energy,
    x: Tensor,
    noise: Tensor,
    step_lr: float,
    clip: Callable[[Tensor], Tensor],
    restrict: Callable[[Tensor], Tensor],
    gradient: Callable[[Energy, Tensor], Tensor] = input_gradient,
) -> Tensor:
    """Add the noise, descend the energy by its clipped gradient *at the noised point*, restrict the images."""
    x = x + noise
    return restrict(x - step_lr * clip(gradient(energy, x)))


class CannotCompile(Exception):
    """A Langevin step that cannot be compiled here, for the reason given."""


@functools.cache
def compiled_step() -> Callable[..., Tensor]:
    """Return `langevin_step` as one compiled function, the gradient inside it; slow at its first call on a shape.

    It raises CannotCompile where that fails, for some shape and device.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit  # slow to import, and few need it

    def gradient(energy: Energy, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: energy(x).sum())(x)

    compiled = torch.compile(functools.partial(langevin_step, gradient=gradient), fullgraph=True, dynamic=False)

    def step(*arguments: object) -> Tensor:
        try:
            return compiled(*arguments)
        except FailOnRecompileLimitHit:
            raise CannotCompile("too many shapes of images or networks in one process") from None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any type; where the energy itself is at fault, the plain step will say so
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise  # it is the recording that failed
            raise CannotCompile(" ".join(str(error).split())[:200]) from None

    return step


def langevin(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    step_lr: float,
    noise_std: float = 0.005,
    proj_norm: float = 0.0,
    proj_norm_type: str = "li",
    bounds: tuple[float, float] = (0.0, 1.0),
    project: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    differentiable: bool = False,
    compiled: bool = False,
) -> Tensor:
    """Run Langevin dynamics on images (N, ...) and return the end points (paper, section 3.2).

    Each step adds noise N(0, noise_std²), takes the gradient of the energy at the noised point, clips it
    (`clip_gradient`), descends by step_lr times it and clips the images to `bounds`.

    project: maps images to allowed ones in place of `bounds`, into a ball, say, or back to some known pixels.
    generator: where the noise comes from; None is torch's own. `energy` may close over frozen weights only, unless
    differentiable: then the result carries the graph of the whole chain to the weights and to x, and each step is
    computed again in the backward pass, so that memory holds the images of every step but the activations of one.
    compiled: run each step as one compiled function, equal to rounding; not for a chain that is differentiable. Raises
    CannotCompile where there is no way to.
    """
    gradient = functools.partial(input_gradient, create_graph=differentiable)
    step = compiled_step() if compiled else functools.partial(langevin_step, gradient=gradient)
    clip = functools.partial(clip_gradient, proj_norm=proj_norm, proj_norm_type=proj_norm_type)
    restrict = project or functools.partial(torch.clamp, min=bounds[0], max=bounds[1])
    for _ in range(num_steps):
        noise = noise_std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        arguments = energy, x, noise, step_lr, clip, restrict
        x = checkpoint(step, *arguments, use_reentrant=False) if differentiable else step(*arguments)
    return x


def leapfrog(energy: Energy, x: Tensor, velocity: Tensor, *, step_size: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Integrate Hamilton's equations; return position and velocity, both shaped (N, ...).

    As in the reference: half a step of velocity, one of position, then num_steps of both, half a step of velocity.
    """
    velocity = velocity - 0.5 * step_size * input_gradient(energy, x)
    x = x + step_size * velocity
    for _ in range(num_steps):
        velocity = velocity - step_size * input_gradient(energy, x)
        x = x + step_size * velocity
    return x, velocity - 0.5 * step_size * input_gradient(energy, x)


def hamiltonian(energy: Energy, x: Tensor, velocity: Tensor) -> Tensor:
    """Return E(x) + |v|²/2, (N,)."""
    with torch.no_grad():
        return energy(x) + 0.5 * velocity.square().flatten(1).sum(1)


def hmc(
    energy: Energy, x: Tensor, *, step_size: float, num_steps: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Make one Hamiltonian Monte Carlo move per image; return the images (N, ...) and which were accepted, (N,)."""
    velocity = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    proposal, end_velocity = leapfrog(energy, x, velocity, step_size=step_size, num_steps=num_steps)
    change = hamiltonian(energy, x, velocity) - hamiltonian(energy, proposal, end_velocity)
    uniform = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    accepted = uniform < change.exp()
    return torch.where(accepted.view(-1, *[1] * (x.dim() - 1)), proposal, x), accepted


# ---------------------------------------------------------------------------------------------------------------------
# Annealed importance sampling (Neal 2001) between a box of images and an energy

WALL = 100.0  # beyond the bounds the energy grows by (WALL · distance)²
SPILL = math.sqrt(math.pi) / WALL  # by which that widens the box: ∫ exp(−(WALL·u)²) du


class Annealed(NamedTuple):
    x: Tensor  # (N, ...), where the chains ended
    log_weights: Tensor  # (N,) float64, nats
    acceptance: Tensor  # (num_distributions,), share of accepted moves, from the box to the energy


def beyond(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return the energy of the walls (N,), Σ (WALL · distance to the bounds)²: 0 for images within them."""
    return (WALL * (x - x.clamp(*bounds))).square().flatten(1).sum(1)


def box_images(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Return exact samples of the density exp(−beyond(x)): uniform within the bounds, Gaussian outside."""
    lower, upper = bounds
    x = lower + (upper - lower + SPILL) * torch.rand(shape, generator=generator, device=generator.device)
    distance = torch.randn(shape, generator=generator, device=generator.device) / (WALL * math.sqrt(2))
    return torch.where(x < upper, x, torch.where(distance > 0, upper, lower) + distance)


def anneal(
    energy: Energy,
    x: Tensor,
    *,
    num_distributions: int,
    step_size: float,
    num_steps: int = 10,
    bounds: tuple[float, float] = (0.0, 1.0),
    reverse: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Annealed:
    """Carry images (N, ...) from the box to the density exp(−E), or back, by one HMC move at each density between.

    Density k is exp(−alpha·E − beyond), alpha = k / num_distributions; its moves have steps of
    step_size·5^(−2.5·alpha), as in the reference. From samples of the box the expected log weight is at most
    log ∫ exp(−E − beyond) − log ∫ exp(−beyond); in reverse, from samples of the energy, it is at least that.
    progress: called after each move.
    """
    log_weights = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    acceptance = torch.zeros(num_distributions, device=x.device)

    def weigh(x: Tensor) -> None:
        with torch.no_grad():
            log_weights.sub_(energy(x).double(), alpha=1 / num_distributions)

    def density(alpha: float) -> Energy:
        return lambda x: alpha * energy(x) + beyond(x, bounds)

    for k in range(num_distributions, 0, -1) if reverse else range(1, num_distributions + 1):
        if not reverse:
            weigh(x)
        alpha = k / num_distributions
        step = step_size * 5 ** (-2.5 * alpha)
        x, accepted = hmc(density(alpha), x, step_size=step, num_steps=num_steps, generator=generator)
        acceptance[k - 1] = accepted.float().mean()
        if reverse:
            weigh(x)
        progress()
    return Annealed(x, log_weights, acceptance)

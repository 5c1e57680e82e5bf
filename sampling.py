"""Markov chains on images, as pure functions of an energy, plain numbers and a generator.

images = langevin(lambda x: model.energy(weights, x, labels), start, num_steps=60, step_lr=10.0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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


@functools.cache
def compiled_step() -> Callable[..., Tensor]:
    """Return `langevin_step` as one compiled function, the gradient inside it; slow at its first call on a shape."""

    def gradient(energy: Energy, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: energy(x).sum())(x)

    return torch.compile(functools.partial(langevin_step, gradient=gradient), fullgraph=True, dynamic=False)


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
    compiled: run each step as one compiled function, equal to rounding; a chain that is differentiable cannot.
    """
    step = functools.partial(langevin_step, gradient=functools.partial(input_gradient, create_graph=differentiable))
    if compiled and not differentiable:
        step = compiled_step()
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

"""Markov chains on images, as pure functions of an energy, plain numbers and a generator.

images = langevin(energy, start, num_steps=60, step_lr=10.0)  # energy(images) -> (N,)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from ebm.support.errors import UsageError

Energy = Callable[[Tensor], Tensor]  # (N, ...) -> (N,)
Schedule = float | Tensor | Callable[[int], float]  # a number, numbers for the pixels, or its value at each step from 0
# One generator for all images, one for each image, or None for torch's own.
Generator = torch.Generator | Sequence[torch.Generator] | None

PROJ_NORM_TYPES = ("li", "l2")


def compute_input_gradient(energy: Energy, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient dΣE/dx of the energy for images x, shaped like x. Weights receive no gradient."""
    with torch.enable_grad():
        if not (create_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)[0]


def clip_gradient(gradient: Tensor, proj_norm: float, proj_norm_type: str) -> Tensor:
    """Return a gradient clipped to ±proj_norm elementwise ("li"), or to L2 norm proj_norm over the whole tensor ("l2").

    A proj_norm of 0 leaves the gradient unchanged.
    """
    if proj_norm_type not in PROJ_NORM_TYPES:
        raise ValueError(f"proj_norm_type is {proj_norm_type!r}, must be one of {PROJ_NORM_TYPES}")
    if proj_norm <= 0:
        return gradient
    if proj_norm_type == "li":
        return gradient.clamp(-proj_norm, proj_norm)
    return gradient * (proj_norm / gradient.norm().clamp(min=1e-12)).clamp(max=1.0)


def draw_noise(x: Tensor, generator: Generator) -> Tensor:
    """Return noise N(0, 1) shaped like images x (N, ...), from one generator or from one for each image."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    noise = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    for image, image_generator in zip(noise, generator, strict=True):
        image.normal_(generator=image_generator)
    return noise


def check_finite(images: Tensor, remedy: str) -> Tensor:
    """Return the images of a chain unchanged; raise UsageError, with the remedy, if they are not finite."""
    if not images.isfinite().all():
        raise UsageError(f"the chains diverged, their values are not finite; {remedy}")
    return images


def langevin_step(
    energy: Energy,
    x: Tensor,
    noise: Tensor,
    step_lr: float,
    clip: Callable[[Tensor], Tensor],
    restrict: Callable[[Tensor], Tensor],
    gradient_first: bool = False,
    gradient: Callable[[Energy, Tensor], Tensor] = compute_input_gradient,
) -> Tensor:
    """Return the images after one Langevin step: add the noise, descend along the clipped gradient, restrict.

    The gradient is taken at the noised images, or with gradient_first at the images before the noise. clip: maps a
    gradient to its clipped form. restrict: maps images to allowed ones.
    """
    noised = x + noise
    return restrict(noised - step_lr * clip(gradient(energy, x if gradient_first else noised)))


class RecomputedStep(torch.autograd.Function):
    """A Langevin step that remembers its images and noise for the backward pass, and computes all else again there.

    step: the end of the step as a function of images, noise, and whether it carries a graph. tensors: those inside it
    that receive gradients. PyTorch's own checkpoint would evaluate the network a third time, because the step itself
    contains a backward pass.
    """

    @staticmethod
    def forward(ctx: Any, step: Callable[[Tensor, Tensor, bool], Tensor], x: Tensor, noise: Tensor, *tensors: Tensor):
        ctx.step = step
        ctx.save_for_backward(x, noise, *tensors)
        ctx.random_state, ctx.device_states = torch.get_rng_state(), get_device_states(x)  # dropout draws from these
        return step(x, noise, False)

    @staticmethod
    def backward(ctx: Any, end_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, noise, *tensors = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(ctx.device_states[0]):
            torch.set_rng_state(ctx.random_state)
            set_device_states(*ctx.device_states)
            end = ctx.step(x, noise, True)
        x_gradient, *gradients = torch.autograd.grad(end, (x, *tensors), end_gradient, allow_unused=True)
        return None, x_gradient, None, *gradients


def make_recomputed_step(tensors: Sequence[Tensor], energy: Energy, x: Tensor, noise: Tensor, *rest: Any) -> Tensor:
    """Return the images after one `langevin_step`, with the autograd graph to x and to tensors inside the step."""

    def step(x: Tensor, noise: Tensor, create_graph: bool) -> Tensor:
        gradient = functools.partial(compute_input_gradient, create_graph=create_graph)
        return functools.partial(langevin_step, gradient=gradient)(energy, x, noise, *rest)

    return RecomputedStep.apply(step, x, noise, *(tensor for tensor in tensors if tensor.requires_grad))


class CannotCompile(Exception):
    """The error of a Langevin step that cannot be compiled on this machine; its message says why."""


@functools.cache
def compile_step() -> Callable[..., Tensor]:
    """Return `langevin_step`, its gradient included, as one compiled function.

    The first call for each shape is slow, because it compiles. A call raises CannotCompile if its shape or device
    cannot be compiled for.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit  # imported here because it is slow and few runs need it

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
        except Exception as error:  # of any type; an error of the energy itself will be raised again by the plain step
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise  # the recording of a CUDA graph failed, not the compilation
            raise CannotCompile(" ".join(str(error).split())[:200]) from None

    return step


def langevin(
    energy: Energy | Sequence[Energy],
    x: Tensor,
    *,
    num_steps: int,
    step_lr: Schedule,
    noise_std: Schedule = 0.005,
    proj_norm: float = 0.0,
    proj_norm_type: str = "li",
    bounds: tuple[float, float] = (0.0, 1.0),
    project: Callable[[Tensor], Tensor] | None = None,
    generator: Generator = None,
    gradient_first: bool = False,
    after_step: Callable[[Tensor], object] | None = None,
    differentiable_in: Iterable[Tensor] | None = None,
    compiled: bool = False,
) -> Tensor:
    """Run Langevin dynamics on images (N, ...) and return the end points (paper, section 3.2).

    Each step adds noise N(0, noise_std²), takes the gradient of the energy at the noised images, clips it
    (`clip_gradient`), descends by step_lr times this gradient and clips the images to `bounds`. With several energies,
    each step does so for one energy after the other.

    noise_std, step_lr: may differ between pixels, as a tensor, or between steps, as a function of the step's number.
    project: maps images to allowed ones and replaces the clipping to `bounds`, for example into a ball or back to known
    pixels. generator: the source of the noise. gradient_first: take the gradient before the noise is added.
    after_step: called with the images after each step.
    differentiable_in: all tensors inside `energy` and `project` that shall receive gradients, such as weights. The end
    points then carry the autograd graph of the whole chain, to these tensors and to x. Each step is computed again in
    the backward pass, so that memory holds the images of every step but the activations of one.
    compiled: run each step as one compiled function, with equal results up to rounding; not for a differentiable chain.
    Raises CannotCompile if the step cannot be compiled.
    """
    if differentiable_in is not None:
        step: Callable[..., Tensor] = functools.partial(make_recomputed_step, list(differentiable_in))
    else:
        step = compile_step() if compiled else langevin_step
    clip = functools.partial(clip_gradient, proj_norm=proj_norm, proj_norm_type=proj_norm_type)
    restrict = project or functools.partial(torch.clamp, min=bounds[0], max=bounds[1])
    energies = [energy] if callable(energy) else energy
    for k in range(num_steps):
        std, rate = (value(k) if callable(value) else value for value in (noise_std, step_lr))
        if compiled and callable(step_lr):
            rate = torch.tensor(rate, device=x.device)  # a number would be compiled in, again for each step
        for step_energy in energies:
            x = step(step_energy, x, std * draw_noise(x, generator), rate, clip, restrict, gradient_first)
        if after_step is not None:
            after_step(x)
    return x


def leapfrog(energy: Energy, x: Tensor, velocity: Tensor, *, step_size: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Integrate Hamilton's equations by leapfrog steps; return position and velocity, both shaped (N, ...).

    As in the reference, it makes half a step of velocity and one of position, then num_steps of both, then half a step
    of velocity.
    """
    velocity = velocity - 0.5 * step_size * compute_input_gradient(energy, x)
    x = x + step_size * velocity
    for _ in range(num_steps):
        velocity = velocity - step_size * compute_input_gradient(energy, x)
        x = x + step_size * velocity
    return x, velocity - 0.5 * step_size * compute_input_gradient(energy, x)


def compute_hamiltonian(energy: Energy, x: Tensor, velocity: Tensor) -> Tensor:
    """Return the Hamiltonian E(x) + |v|²/2 of every image, (N,)."""
    with torch.no_grad():
        return energy(x) + 0.5 * velocity.square().flatten(1).sum(1)


def draw_hmc_move(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return the random numbers of a move of images x (N, ...): N(0, 1) shaped like x, and U(0, 1), (N,).

    They are those of a `make_hmc_move` or a `make_mala_move`.
    """
    velocity = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return velocity, torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)


def make_hmc_move(
    energy: Energy, x: Tensor, velocity: Tensor, uniform: Tensor, *, step_size: float, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Make one Hamiltonian Monte Carlo move per image; return the images (N, ...) and whether each moved, bool (N,).

    velocity: the start of the leapfrog steps, shaped like the images x. uniform: (N,), an image moves if its number is
    below the probability of acceptance.
    """
    proposal, end_velocity = leapfrog(energy, x, velocity, step_size=step_size, num_steps=num_steps)
    change = compute_hamiltonian(energy, x, velocity) - compute_hamiltonian(energy, proposal, end_velocity)
    is_accepted = uniform < change.exp()
    return torch.where(is_accepted.view(-1, *[1] * (x.dim() - 1)), proposal, x), is_accepted


def hmc(
    energy: Energy, x: Tensor, *, step_size: float, num_steps: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw random numbers and make one Hamiltonian Monte Carlo move with them, see `make_hmc_move`."""
    return make_hmc_move(energy, x, *draw_hmc_move(x, generator), step_size=step_size, num_steps=num_steps)


# ---- MALA: Langevin steps that are accepted or rejected, in a box ----


class MalaState(NamedTuple):
    """The images of a MALA chain, with the energies and gradients that its next move needs."""

    x: Tensor  # (N, ...)
    energy: Tensor  # (N,)
    gradient: Tensor  # dE/dx, (N, ...)


def evaluate_mala_state(energy: Energy, x: Tensor) -> MalaState:
    """Return the state of a MALA chain at images x (N, ...), from one evaluation of the energy and its gradient."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = energy(x)
        gradient = torch.autograd.grad(values.sum(), x)[0]
    return MalaState(x.detach(), values.detach(), gradient)


def reflect_at_bounds(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return x within the bounds: a value outside is mirrored at the nearer bound, again and again if need be."""
    lower, upper = bounds
    width = upper - lower
    return lower + (width - ((x - lower).remainder(2 * width) - width).abs())


def compute_reflected_density(y: Tensor, mean: Tensor, std: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return the log density (N,), float64, of y (N, ...) under reflected normal noise around a mean inside the bounds.

    It lacks a constant that depends on std only. A pixel is reached directly or from its mirror images. Those that are
    left out are at least twice the box's width from the mean, which no noise reaches whose std is a fifth of the width.
    """
    lower, upper = bounds
    width = upper - lower
    images = torch.stack([y, 2 * lower - y, 2 * upper - y, y - 2 * width, y + 2 * width])
    exponents = -(((images - mean) / std).square() / 2)
    return exponents.logsumexp(0).flatten(1).sum(1, dtype=torch.float64)


def make_mala_move(
    energy: Energy,
    state: MalaState,
    noise: Tensor,
    uniform: Tensor,
    *,
    step_lr: float,
    noise_std: float,
    scale: Tensor | float = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[MalaState, Tensor]:
    """Make one move of the Metropolis-adjusted Langevin algorithm; return the state and whether each image moved, (N,).

    The density, exp(−E · 2·step_lr / noise_std²) within the bounds, is kept exactly, whatever the step size (Roberts &
    Tweedie 1996). It is the one that Langevin steps of this step size and noise sample approximately. A proposal is a
    Langevin step, x − step_lr·gradient, put back into the bounds, plus noise that is reflected at the bounds. (If
    proposals outside were rejected, images with many black pixels would never move.)

    noise: N(0, 1), shaped like the images. uniform: U(0, 1), (N,). scale: a factor, or one for each image (N,), of
    step_lr and noise_std²; it leaves the density as it is. noise_std·√scale: at most a fifth of the width of the box,
    see `compute_reflected_density`.
    """
    scale = torch.as_tensor(scale, device=noise.device, dtype=noise.dtype).expand(len(noise))
    scale = scale.view(-1, *[1] * (noise.dim() - 1))
    rate, std = step_lr * scale, noise_std * scale.sqrt()

    def find_mean(place: MalaState) -> Tensor:
        return (place.x - rate * place.gradient).clamp(*bounds)

    mean = find_mean(state)
    proposal = evaluate_mala_state(energy, reflect_at_bounds(mean + std * noise, bounds))
    change = (proposal.energy.double() - state.energy.double()) * (2 * step_lr / noise_std**2)
    back = compute_reflected_density(state.x, find_mean(proposal), std, bounds)
    is_accepted = uniform.log() < back - compute_reflected_density(proposal.x, mean, std, bounds) - change
    chosen = (
        torch.where(is_accepted.view(-1, *[1] * (old.dim() - 1)), new, old)
        for new, old in zip(proposal, state, strict=True)
    )
    return MalaState(*chosen), is_accepted

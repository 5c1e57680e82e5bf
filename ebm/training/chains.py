"""The Markov chains of training: Langevin steps or HMC moves, with or without the KL term, compiled, captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm.settings import TrainSettings
from ebm.support.hardware import PRECISIONS
from ebm.training.acceleration import Chain
from ebm.training.state import State
from models import EnergyNetwork, PreparedEnergy, Weights, cast, compute_class_logits
from sampling import Energy, hmc, langevin

HMC_STEP_SIZE = 15.0
HMC_STEPS = 10  # leapfrog steps per move


def run_chains(
    state: State, settings: TrainSettings, energy: PreparedEnergy, start: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the end points (N, C, H, W) of this iteration's chains, and the share of HMC moves that were accepted.

    energy: with frozen weights if `zero_kl` is set, else with weights that receive the gradient through the chain. The
    chains descend `temperature` times this energy.
    """
    if settings.hmc:
        weights = cast(energy.weights, PRECISIONS[state.acceleration.precision])
        tempered = PreparedEnergy(energy.model, weights, temperature=settings.temperature)
        return run_hmc_chain(tempered.under(labels), start, settings, state.generator)
    if not settings.zero_kl:
        tempered = PreparedEnergy(energy.model, energy.weights, temperature=settings.temperature)
        bound, through = tempered.under(labels), energy.weights.values()
        return run_langevin_chain(bound, start, settings, state.generator, differentiable_in=through), None
    chain = bind_chain(energy.model, settings, state.generator)
    return state.acceleration.run(chain, energy.weights, start, labels, state.generator, repeated=True), None


def bind_chain(
    model: EnergyNetwork,
    settings: TrainSettings,
    generator: torch.Generator,
    after_step: Callable[[Tensor], object] | None = None,
) -> Chain:
    """Return the chain of a run as a function of weights, start and labels, which does not hold the run's state.

    after_step: called with the images after each step.
    """

    def chain(weights: Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
        energy = PreparedEnergy(model, weights, temperature=settings.temperature).under(labels)
        if settings.hmc:
            return run_hmc_chain(energy, x, settings, generator, after_step)[0]
        return run_langevin_chain(energy, x, settings, generator, after_step=after_step, compiled=compiled)

    return chain


def run_langevin_chain(
    energy: Energy,
    start: Tensor,
    settings: TrainSettings,
    generator: torch.Generator,
    differentiable_in: Iterable[Tensor] | None = None,
    after_step: Callable[[Tensor], object] | None = None,
    compiled: bool = False,
) -> Tensor:
    """Return the end points of Langevin chains with the settings of a run; images are in [0, rescale]."""
    return langevin(
        energy,
        start,
        num_steps=settings.num_steps,
        step_lr=settings.step_lr * settings.rescale,
        noise_std=settings.noise_std,
        proj_norm=settings.proj_norm,
        proj_norm_type=settings.proj_norm_type,
        bounds=settings.bounds,
        generator=generator,
        after_step=after_step,
        differentiable_in=differentiable_in,
        compiled=compiled,
    )


def run_hmc_chain(
    energy: Energy,
    x: Tensor,
    settings: TrainSettings,
    generator: torch.Generator,
    after_step: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the end points of HMC chains, and the share of the moves that were accepted.

    Each of the `num_steps` steps adds noise, then makes one HMC move. Without steps the share is None.
    """
    shares = []
    for _ in range(settings.num_steps):
        x = x + settings.noise_std * torch.randn(x.shape, generator=generator, device=x.device)
        x, is_accepted = hmc(energy, x, step_size=HMC_STEP_SIZE, num_steps=HMC_STEPS, generator=generator)
        x = x.clamp(*settings.bounds)
        shares.append(is_accepted.float().mean())
        if after_step is not None:
            after_step(x)
    return x, torch.stack(shares).mean() if shares else None


@torch.no_grad()
def infer_labels(state: State, energy: PreparedEnergy, images: Tensor) -> Tensor:
    """Return a class for each image (N, C, H, W), drawn from softmax(−E) over the classes, one-hot (N, classes)."""
    logits = compute_class_logits(energy, images, energy.model.config.label_size)
    uniform = torch.rand(logits.shape, generator=state.generator, device=logits.device)
    return draw_classes(logits, uniform)


def draw_classes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return one-hot classes (N, classes) drawn from softmax(logits) by the Gumbel-max trick.

    uniform: draws from U(0, 1), shaped like the logits (N, classes).
    """
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    return F.one_hot((logits + gumbel).argmax(1), logits.shape[1]).to(logits.dtype)

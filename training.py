"""The training of an energy model: Langevin negatives from a replay buffer, one Adam step (paper, algorithm 1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import data
import models
from acceleration import LOSS_PRECISIONS, PRECISIONS, Acceleration, Chain
from checkpoint import to_tf_name
from ebm.settings import TrainSettings
from optimizer import ClippedAdam
from sampling import Energy, hmc, input_gradient, langevin
from utils import ReplayBuffer

REPLAY_SIZE = 10_000  # images a buffer holds


@dataclasses.dataclass
class State:
    """One worker's part of a run: all that changes from iteration to iteration."""

    model: models.EnergyNetwork
    optimizer: ClippedAdam
    buffer: ReplayBuffer
    batches: data.Batches
    generator: torch.Generator
    previous: Tensor | None = None  # the last end points, where `pcd` starts from them
    ema: models.EnergyNetwork | None = None  # the moving average of the weights, with `ema_decay`
    acceleration: Acceleration = dataclasses.field(default_factory=Acceleration)
    iteration: int = 0

    @property
    def sampled_model(self) -> models.EnergyNetwork:
        """The network that samples are drawn from: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema

    def start_ema(self, weights: dict[str, Tensor] | None = None) -> None:
        """Begin the average, where there is one, with these weights or the current ones."""
        if self.ema is not None:
            self.ema.load_state_dict(weights or self.model.state_dict())

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the averaged weights towards the current ones; at iteration t, decay is at most (1 + t)/(10 + t).

        So the initial weights are soon forgotten, as in TensorFlow's ExponentialMovingAverage.
        """
        if self.ema is not None:
            decay = min(decay, (1 + self.iteration) / (10 + self.iteration))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
            for mine, current in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                mine.copy_(current)  # the power iterations' vectors are estimates, which no average improves

    def shared(self) -> dict[str, Any]:
        """What is the same on every worker, as tensors and plain values."""
        return {
            "config": dataclasses.asdict(self.model.config),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "iteration": self.iteration,
        }

    def own(self) -> dict[str, Any]:
        """What this worker alone has: its chains and generators."""
        return {
            "buffer": self.buffer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),  # dropout draws from torch's own generators
            "cuda_generator": torch.cuda.get_rng_state() if self.generator.device.type == "cuda" else None,
            "previous": self.previous,
        }

    def load_shared(self, state: dict[str, Any]) -> None:
        """Take over `shared`; a converted TF1 checkpoint has no place in an epoch, and not always an optimizer."""
        self.model.load_state_dict(state["model"])
        self.start_ema(state.get("ema"))
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if "batches" in state:
            self.batches.load_state_dict(state["batches"])
        self.iteration = state["iteration"]

    def load_own(self, state: dict[str, Any]) -> bool:
        """Take over `own`; return whether its generators fitted: they cannot move between CPU and GPU."""
        self.buffer.load_state_dict(state["buffer"])
        previous = state["previous"]
        self.previous = None if previous is None else previous.to(self.buffer.images.device)
        if state["generator"].shape != self.generator.get_state().shape:
            return False
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if self.generator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"])
        return True


class Step(NamedTuple):
    """What one iteration saw of the images with a chain, N of the batch, on the device: nothing here was read back."""

    images: Tensor  # x⁺ (N, C, H, W)
    start: Tensor  # x⁰
    samples: Tensor  # xᴷ
    labels: Tensor | None  # (N, label_size)
    frozen: models.Weights
    e_pos: Tensor  # (N,)
    e_neg: Tensor  # (N,)
    e_wrong: Tensor | None  # (batch_size,), of images under the labels of others
    loss_ml: Tensor
    loss_kl: Tensor
    loss: Tensor
    label_entropy: Tensor | None
    acceptance: Tensor | None  # share of the HMC moves that were accepted


def train_step(state: State, settings: TrainSettings, images: Tensor, labels: Tensor | None, average: Callable) -> Step:
    """Make one training iteration on images (batch_size, C, H, W) and labels (batch_size, label_size) or None.

    average() makes the gradients of all workers their mean.
    """
    # The weights are normalised once: the chain, the loss and the update all see the same ones.
    weights = state.model.prepare(update_u=not settings.spec_eval)
    frozen = models.detach(weights)
    learned = models.cast(weights, LOSS_PRECISIONS[state.acceleration.precision])

    # Negatives: chains from noise or from the replay buffer, down the energy. With the KL term the gradient flows
    # back through the whole chain into the weights that made it.
    chains = slice(settings.num_chains)
    chain_labels = None if labels is None else labels[chains]
    start = chain_start(state, settings, images[chains])
    samples, acceptance = draw_negatives(state, settings, frozen if settings.zero_kl else learned, start, chain_labels)
    remember(state, settings, samples.detach())

    # Loss: energy down on data, up on negatives; the KL term moves the chain's end points down the frozen energy.
    positive_labels, label_entropy = labels, None
    if settings.model_cclass:
        positive_labels, label_entropy = infer_labels(state.model, frozen, images, state.generator)
    e_data = energy_under(state.model, settings, learned, positive_labels)(images)
    e_pos, e_neg = e_data[chains], energy_under(state.model, settings, learned, chain_labels)(samples.detach())
    contrast = functools.partial(
        contrastive_loss, objective=settings.objective, ml_coeff=settings.ml_coeff, l2_coeff=settings.l2_coeff
    )
    loss_ml, regulariser = contrast(e_pos, e_neg)
    loss_kl = loss_ml.new_zeros(())
    if not settings.zero_kl:
        loss_kl = state.model.energy(models.detach(learned), samples, chain_labels).mean()
    loss = loss_ml + regulariser + loss_kl
    e_wrong = None
    if settings.mismatch:  # images under the labels of others are negatives, too (Reed et al. 2016, section 4.2)
        e_wrong = energy_under(state.model, settings, learned, labels)(images.roll(1, 0))
        loss = loss + settings.mismatch * sum(contrast(e_data, e_wrong))

    # Update
    state.optimizer.zero_grad()
    loss.backward()
    average()
    state.optimizer.step()
    state.iteration += 1
    state.update_ema(settings.ema_decay)
    return Step(
        images=images[chains],
        start=start,
        samples=samples.detach(),
        labels=chain_labels,
        frozen=frozen,
        e_pos=e_pos.detach(),
        e_neg=e_neg.detach(),
        e_wrong=None if e_wrong is None else e_wrong.detach(),
        loss_ml=loss_ml.detach(),
        loss_kl=loss_kl.detach(),
        loss=loss.detach(),
        label_entropy=label_entropy,
        acceptance=acceptance,
    )


def energy_under(
    model: models.EnergyNetwork, settings: TrainSettings, weights: models.Weights, labels: Tensor | None
) -> Energy:
    """Return the energy that chains descend and that the loss contrasts, of images under these labels."""
    return lambda x: settings.temperature * model.energy(weights, x, labels)


def contrastive_loss(
    e_pos: Tensor, e_neg: Tensor, *, objective: str = "cd", ml_coeff: float = 1.0, l2_coeff: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return (likelihood term, regulariser) of energies (N,) of data and of negatives, both scalars.

    cd: ml_coeff · (mean E⁺ − mean E⁻), contrastive divergence (paper, equation 2).
    logsumexp: the negatives weighted by softmax(−E⁻), through which no gradient flows.
    softplus: ml_coeff · softplus(E⁺ − E⁻). The regulariser is l2_coeff · (mean E⁺² + mean E⁻²).
    """
    if objective == "cd":
        likelihood = e_pos.mean() - e_neg.mean()
    elif objective == "logsumexp":
        weights = (-(e_neg - e_neg.min())).exp().detach()
        likelihood = e_pos.mean() - (weights / (weights.sum() + 1e-4) * e_neg).sum()
    elif objective == "softplus":
        likelihood = F.softplus(e_pos - e_neg).mean()
    else:
        raise ValueError(f"unknown objective {objective!r}")
    return ml_coeff * likelihood, l2_coeff * (e_pos.square().mean() + e_neg.square().mean())


def noise_images(shape: tuple[int, ...], generator: torch.Generator, *, network: str, rescale: float = 1.0) -> Tensor:
    """Return images of noise to start chains from: uniform in [0, rescale], for sprites 0.5 + 0.5·N(0, 1)."""
    if network == "DspritesNet":
        return 0.5 + 0.5 * torch.randn(shape, generator=generator, device=generator.device)
    return rescale * torch.rand(shape, generator=generator, device=generator.device)


def chain_start(state: State, settings: TrainSettings, images: Tensor) -> Tensor:
    """Return where this iteration's chains start, shaped like the batch of data."""
    generator = state.generator
    if settings.pcd and state.previous is not None:
        return state.previous
    near = {"random": 0, "default": len(images), "both": len(images) // 2}[settings.datasource]
    starts = []
    if near:
        starts.append(images[:near] + 0.3 * torch.randn(images[:near].shape, generator=generator, device=images.device))
    if near < len(images):
        shape, network = (len(images) - near, *images.shape[1:]), state.model.config.network
        starts.append(noise_images(shape, generator, network=network, rescale=settings.rescale))
    start = torch.cat(starts)
    if settings.replay_batch and len(state.buffer) > len(images):
        stored = state.buffer.sample(len(images), generator, settings.rescale)
        replayed = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < settings.replay_rate
        start = torch.where(replayed, stored, start)
    return start


def draw_negatives(
    state: State, settings: TrainSettings, weights: models.Weights, start: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the end points of this iteration's chains, and the share of HMC moves that were accepted, or None.

    weights: where `zero_kl` is off, those that the gradient through the chain flows back into.
    """
    if settings.zero_kl and not settings.hmc:
        chain = langevin_chain(state.model, settings, state.generator)
        return state.acceleration.run(chain, weights, start, labels, state.generator, repeated=True), None
    if settings.hmc:
        weights = models.cast(weights, PRECISIONS[state.acceleration.precision])
    return run_chain(energy_under(state.model, settings, weights, labels), start, settings, state.generator)


def langevin_chain(model: models.EnergyNetwork, settings: TrainSettings, generator: torch.Generator) -> Chain:
    """Return the chain of a run as a function of its weights, start and labels; it holds no part of the run's state."""

    def chain(weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
        return run_chain(energy_under(model, settings, weights, labels), x, settings, generator, compiled)[0]

    return chain


def run_chain(
    energy: Energy, x: Tensor, settings: TrainSettings, generator: torch.Generator, compiled: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the end points of the chains that training uses, by Langevin steps, or noise and HMC moves.

    With them comes the share of HMC moves that were accepted, or None. compiled: Langevin steps are.
    """
    if settings.hmc:
        accepted = []
        for _ in range(settings.num_steps):
            x = x + settings.noise_std * torch.randn(x.shape, generator=generator, device=x.device)
            x, moved = hmc(energy, x, step_size=15.0, num_steps=10, generator=generator)
            x = x.clamp(*settings.bounds)
            accepted.append(moved.float().mean())
        return x, torch.stack(accepted).mean() if accepted else None
    end = langevin(
        energy,
        x,
        num_steps=settings.num_steps,
        step_lr=settings.step_lr * settings.rescale,
        noise_std=settings.noise_std,
        proj_norm=settings.proj_norm,
        proj_norm_type=settings.proj_norm_type,
        bounds=settings.bounds,
        generator=generator,
        differentiable=not settings.zero_kl,
        compiled=compiled,
    )
    return end, None


def remember(state: State, settings: TrainSettings, samples: Tensor) -> None:
    """Keep the end points for the chains of later iterations."""
    if settings.replay_batch:
        state.buffer.push(samples, settings.rescale)
    if settings.pcd:
        state.previous = samples


def infer_labels(
    model: models.EnergyNetwork, weights: models.Weights, images: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample a class per image from softmax(−E); return one-hot labels (N, classes) and the mean entropy in nats."""
    with torch.no_grad():
        log_p = class_logits(lambda x, y: model.energy(weights, x, y), images, model.config.label_size).log_softmax(1)
        uniform = torch.rand(log_p.shape, generator=generator, device=log_p.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        labels = F.one_hot((log_p + gumbel).argmax(1), log_p.shape[1]).to(images.dtype)
        return labels, -(log_p.exp() * log_p).sum(1).mean()


def class_logits(energy: Callable[[Tensor, Tensor], Tensor], images: Tensor, classes: int) -> Tensor:
    """Return −E(x, y) of every image under every class, (N, classes)."""
    return -label_energies(energy, images, torch.eye(classes, device=images.device, dtype=images.dtype))


def label_energies(energy: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Return E(x, y) of every image (N, C, H, W) under every label (M, label_size), (N, M)."""
    n, m = len(images), len(labels)
    return energy(images.repeat_interleave(m, 0), labels.repeat(n, 1)).view(n, m)


def next_batch(state: State, settings: TrainSettings, dataset: data.Dataset) -> tuple[Tensor, Tensor | None]:
    """Return the next images (N, C, H, W) in [0, rescale] and labels (N, label_size) or None."""
    index = state.batches.next()
    if settings.single:
        index = torch.zeros_like(index)
    else:
        dataset.prefetch(state.batches.following())
    images, labels = dataset.batch(index, state.generator, settings.rescale)
    if settings.augment:
        images = data.augment(images, state.generator)
    if settings.cutout:
        images = data.cutout(
            images,
            state.generator,
            probability=settings.cutout_prob,
            size=settings.cutout_mask_size,
            inside=settings.cutout_inside,
        )
    if settings.mixup:
        images = data.mixup(images, state.generator)
    return images, labels if state.model.config.label_size else None


def statistics(state: State, settings: TrainSettings, step: Step) -> dict[str, float]:
    """Return the figures of an iteration under the reference's names; this reads values back from the device."""
    energy = energy_under(state.model, settings, step.frozen, step.labels)
    figures = {
        "e_pos": step.e_pos.mean(),
        "e_pos_std": step.e_pos.std(correction=0),
        "e_neg": step.e_neg.mean(),
        "e_neg_std": step.e_neg.std(correction=0),
        "e_diff": step.e_pos.mean() - step.e_neg.mean(),
        "loss_e": step.loss_kl,
        "loss_ml": step.loss_ml,
        "loss_total": step.loss,
        "x_grad": input_gradient(energy, step.samples).abs().mean(),
        "x_grad_first": input_gradient(energy, step.start).abs().mean(),
        "x_off": (step.samples - step.images).abs().mean(),
        "x_moved": (step.samples - step.start).abs().mean(),
    }
    if step.e_wrong is not None:
        figures["e_wrong"] = step.e_wrong.mean()
    if step.label_entropy is not None:
        figures["label_ent"] = step.label_entropy
    if step.acceptance is not None:
        figures["hmc_acceptance"] = step.acceptance
    if "atten.gamma" in step.frozen:
        figures["gamma"] = step.frozen["atten.gamma"].squeeze()
    for name, parameter in state.model.named_parameters():
        if parameter.grad is not None:
            figures[f"max_grad/{to_tf_name(name).removeprefix('context_0/')}"] = parameter.grad.abs().max()
    values = torch.stack(list(figures.values())).tolist()  # one transfer
    return dict(zip(figures, values, strict=True)) | {"temp": float(settings.temperature)}

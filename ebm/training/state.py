"""The state of one worker of a run, and the tensors of one iteration."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

import data
from ebm.training.acceleration import Acceleration
from models import EnergyNetwork, PreparedEnergy
from utils import ClippedAdam, ReplayBuffer


@dataclasses.dataclass
class State:
    """The state of one worker of a run: all that changes from iteration to iteration."""

    model: EnergyNetwork
    optimizer: ClippedAdam
    buffer: ReplayBuffer
    batches: data.Batches
    generator: torch.Generator
    previous: Tensor | None = None  # the last end points, for `pcd`
    ema: EnergyNetwork | None = None  # the moving average of the weights, for `ema_decay`
    acceleration: Acceleration = dataclasses.field(default_factory=Acceleration)
    iteration: int = 0

    @property
    def sampled_model(self) -> EnergyNetwork:
        """The network that samples are drawn from: the averaged one with `ema_decay`, else the trained one."""
        return self.model if self.ema is None else self.ema

    def start_ema(self, weights: dict[str, Tensor] | None = None) -> None:
        """Set the averaged weights to these, or to the current ones; do nothing without `ema_decay`."""
        if self.ema is not None:
            self.ema.load_state_dict(weights or self.model.state_dict())

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the averaged weights towards the current ones; do nothing without `ema_decay`.

        At iteration t, decay is at most (1 + t)/(10 + t), as in TensorFlow's ExponentialMovingAverage, so that the
        initial weights are soon forgotten.
        """
        if self.ema is not None:
            decay = min(decay, (1 + self.iteration) / (10 + self.iteration))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
            # The buffers of stages are the power iterations' vectors, estimates that an average would not improve.
            for averaged, current in zip(self.ema.stages.buffers(), self.model.stages.buffers(), strict=True):
                averaged.copy_(current)

    def get_shared_state(self) -> dict[str, Any]:
        """Return the part of the state that is the same on every worker, as tensors and plain values."""
        return {
            "config": dataclasses.asdict(self.model.config),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "iteration": self.iteration,
        }

    def get_worker_state(self) -> dict[str, Any]:
        """Return the part of the state that differs between workers: replay buffer, chains and generators."""
        return {"buffer": self.buffer.state_dict(), **self.get_generators(), "previous": self.previous}

    def get_generators(self) -> dict[str, Any]:
        """Return the states of the generators that the run draws from."""
        return {
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),  # dropout draws from torch's own generators
            "cuda_generator": torch.cuda.get_rng_state() if self.generator.device.type == "cuda" else None,
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Load what `get_shared_state` returned; converted TF1 checkpoints lack "batches", and may lack "optimizer"."""
        self.model.load_state_dict(state["model"])
        self.start_ema(state.get("ema"))
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        if "batches" in state:
            self.batches.load_state_dict(state["batches"])
        self.iteration = state["iteration"]

    def load_worker_state(self, state: dict[str, Any]) -> bool:
        """Load what `get_worker_state` returned; return whether its generators fit.

        They cannot move between a CPU and a GPU.
        """
        self.buffer.load_state_dict(state["buffer"])
        previous = state["previous"]
        is_batch = previous is not None and len(previous) == self.batches.batch_size
        self.previous = previous.to(self.buffer.images.device) if is_batch else None  # for a batch of another size
        if state["generator"].shape != self.generator.get_state().shape:
            return False
        self.set_generators(state)
        return True

    def set_generators(self, state: dict[str, Any]) -> None:
        """Set the generators to what `get_generators` returned."""
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if self.generator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_generator"])

    def get_draws(self) -> dict[str, Any]:
        """Return what an iteration changes before it updates the weights, a few small tensors.

        These are the generators, the place in the data and the vectors of the power iterations.
        """
        vectors = [vector.clone() for vector in self.model.stages.buffers()]
        return self.get_generators() | {"batches": self.batches.state_dict(), "vectors": vectors}

    def undo_draws(self, draws: dict[str, Any]) -> None:
        """Set back what an iteration has changed before it updated the weights. draws: of `get_draws` before it."""
        self.set_generators(draws)
        self.batches.load_state_dict(draws["batches"])
        for vector, before in zip(self.model.stages.buffers(), draws["vectors"], strict=True):
            vector.copy_(before)
        self.optimizer.zero_grad()


class Step(NamedTuple):
    """The tensors of one iteration, on the device, for the N chains and the images of the batch beside them."""

    images: Tensor  # the data x⁺ (N, C, H, W)
    start: Tensor  # the chains' starts x⁰ (N, C, H, W)
    samples: Tensor  # the chains' end points xᴷ (N, C, H, W)
    labels: Tensor | None  # the labels of the images (N, label_size)
    chain_labels: Tensor | None  # the labels of the chains (N, label_size), with `model_cclass` inferred ones
    energy: PreparedEnergy  # the energy before the update, with frozen weights
    e_pos: Tensor  # the energies of images, (N,), or under every class with `model_cclass`, (N, classes)
    e_neg: Tensor  # the energies of samples, (N,)
    e_wrong: Tensor | None  # the energies of images under the labels of others, (batch_size,)
    loss_ml: Tensor
    loss_kl: Tensor
    loss: Tensor
    loss_classify: Tensor  # the cross-entropy of the classes, 0 without `classify`
    is_recognised: Tensor | None  # whether the true class of an image has its lowest energy, (batch_size,)
    acceptance: Tensor | None  # the share of the HMC moves that were accepted

    def detach(self) -> Step:
        """Return the same step with tensors that have no autograd graph."""
        tensors: dict[str, Any] = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**{name: tensor.detach() for name, tensor in tensors.items()})

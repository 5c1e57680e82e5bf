"""Fresh chains from noise during a run: the samples of its model at each test and at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import data
from ebm.settings import TrainSettings
from ebm.training.chains import bind_chain
from ebm.training.state import State
from models import PreparedEnergy, draw_noise_images, freeze_energy

CHAINS = 250  # chains that run at once, unless the step is compiled for another number


class FreshChains(NamedTuple):
    """Chains from noise, `sample_steps` long."""

    iteration: int
    images: Tensor  # the end points (N, C, H, W) in [0, 1]
    energies: Tensor  # the energies (N,) of the end points
    moved: float  # the mean distance of a pixel from its start, in [0, 1]


class Sampler:
    """A source of fresh chains under the averaged weights of a run, or under the current ones without `ema_decay`.

    Every draw has the same noise and labels, from the run's seed. Classes take turns; labels that are not classes are
    those of random data. Chains have the acceleration of training; their energies are computed in float32.
    """

    def __init__(self, state: State, settings: TrainSettings, dataset: data.Dataset):
        self.state, self.settings, self.dataset = state, settings, dataset
        self.latest: FreshChains | None = None

    @property
    def num_steps(self) -> int:
        """The number of Langevin steps of a chain."""
        settings = self.settings
        return 10 * settings.num_steps if settings.sample_steps is None else settings.sample_steps

    def draw_chains(self, number: int) -> FreshChains:
        """Return fresh chains under the weights of this iteration; a second call returns the same ones.

        number: how many chains.
        """
        state, settings = self.state, self.settings
        if self.latest is not None and (self.latest.iteration, len(self.latest.images)) == (state.iteration, number):
            return self.latest
        size, total = CHAINS, number
        # A compiled step is compiled for training's batches: run whole batches and return the first `number` chains.
        if state.acceleration.compiled:
            size = settings.num_chains or settings.batch_size
            total = math.ceil(number / size) * size
        generator = torch.Generator(state.generator.device).manual_seed(settings.seed + 1_000_003)
        labels = self.choose_labels(total, generator)
        noise = draw_noise_images(state.model.config, total, generator, settings.rescale)
        settings = dataclasses.replace(settings, num_steps=self.num_steps, zero_kl=True)
        ends: list[Tensor] = []
        energies: list[Tensor] = []
        with self.freeze_model() as energy:
            chain = bind_chain(energy.model, settings, generator)
            for start in noise.split(size):
                batch_labels = None if labels is None else labels[len(ends) * size :][: len(start)]
                end = state.acceleration.run(chain, energy.weights, start, batch_labels, generator, repeated=False)
                ends.append(end)
                with torch.no_grad():
                    energies.append(energy(end, batch_labels))
        images = torch.cat(ends)[:number] / settings.rescale
        moved = (images - noise[:number] / settings.rescale).abs().mean().item()
        self.latest = FreshChains(state.iteration, images, torch.cat(energies)[:number], moved)
        return self.latest

    def choose_labels(self, number: int, generator: torch.Generator) -> Tensor | None:
        """Return labels (number, label_size) to sample under, or None for an unconditional model."""
        label_size, classes = self.state.model.config.label_size, len(self.dataset.class_names)
        if not label_size:
            return None
        if classes:
            return F.one_hot(torch.arange(number, device=generator.device) % classes, label_size).float()
        index = torch.randint(len(self.dataset), (number,), generator=generator, device=generator.device)
        return self.dataset.batch(index, generator)[1]

    @contextlib.contextmanager
    def freeze_model(self) -> Iterator[PreparedEnergy]:
        """Yield the frozen energy of the network that samples are drawn from; dropout is off inside the block."""
        model = self.state.sampled_model
        was_training = model.training
        try:
            yield freeze_energy(model.eval())
        finally:
            model.train(was_training)

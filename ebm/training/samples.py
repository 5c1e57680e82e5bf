"""Fresh chains during a run, none of them replayed: the samples of its model at each test and at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import data
from ebm.measures.features import (
    DISTANCE,
    INCEPTION_URL,
    MAX_REAL_IMAGES,
    Inception,
    RealImages,
    SampleMeasure,
    locate_inception,
    prepare_distance,
    prepare_inception,
    read_inception,
    require_classes,
)
from ebm.settings import TrainSettings
from ebm.support.errors import UsageError
from ebm.support.pixels import to_bytes
from ebm.support.progress import SHORT, Progress
from ebm.support.sharing import fold_seed
from ebm.training.chains import bind_chain
from ebm.training.distributed import Workers
from ebm.training.state import State
from models import PreparedEnergy, draw_starts, freeze_energy

CHAINS = 250  # chains that run at once, unless the step is compiled for another number
PART = 1_000  # images of one draw, if there are more
MEASURED_SETS = ("cifar10", "imagenet", "imagenetfull")  # data sets whose samples the reference measures
TEST_SAMPLES = 1_000  # images that a test measures by Inception


class FreshChains(NamedTuple):
    """Chains from new starts, `sample_steps` long."""

    iteration: int
    part: int  # the number of the draw
    labels: Tensor | None  # (N, label_size), None for an unconditional model
    start: Tensor  # what the chains start from, (N, C, H, W) in [0, 1]
    images: Tensor  # the end points (N, C, H, W) in [0, 1]
    energies: Tensor  # the energies (N,) of the end points
    moved: float  # the mean distance of a pixel from its start, in [0, 1]


class Sampler:
    """A source of fresh chains under the averaged weights of a run, or under the current ones without `ema_decay`.

    Every draw of the same number has the same noise and labels, from the run's seed. Classes take turns; labels that
    are not classes are those of random data. Chains have the acceleration of training; their energies are computed in
    float32.
    """

    def __init__(self, state: State, settings: TrainSettings, dataset: data.Dataset):
        self.state, self.settings, self.dataset = state, settings, dataset
        self.latest: FreshChains | None = None

    @property
    def num_steps(self) -> int:
        """The number of Langevin steps of a chain."""
        settings = self.settings
        return 10 * settings.num_steps if settings.sample_steps is None else settings.sample_steps

    def split_chains(self, number: int) -> tuple[int, int]:
        """Return how many chains run at once, and how many in all so that at least `number` do.

        A compiled step is compiled for training's batches: whole batches of these run then.
        """
        if not self.state.acceleration.compiled:
            return CHAINS, number
        size = self.settings.num_chains or self.settings.batch_size
        return size, math.ceil(number / size) * size

    def count_steps(self, number: int) -> int:
        """Return the number of Langevin steps, each of all chains that run at once, that so many chains take."""
        size, total = self.split_chains(number)
        return math.ceil(total / size) * self.num_steps

    def draw_chains(self, number: int, part: int = 0, progress: Progress | None = None) -> FreshChains:
        """Return fresh chains under the weights of this iteration; a second call returns the same ones.

        number: how many chains. part: the number of the draw; draws of other numbers have other noise. progress: counts
        the Langevin steps, see `count_steps`; None makes one.
        """
        state, settings = self.state, self.settings
        latest, wanted = self.latest, (state.iteration, part, number)
        if latest is not None and (latest.iteration, latest.part, len(latest.images)) == wanted:
            return latest
        if progress is None:
            what = f"Langevin step of {number:,} fresh chains"
            with Progress(self.count_steps(number), what=what, patience=SHORT) as progress:
                return self.draw_chains(number, part, progress)
        size, total = self.split_chains(number)
        generator = torch.Generator(state.generator.device).manual_seed(
            fold_seed(settings.seed + 1_000_003 * (1 + part))
        )
        labels = self.choose_labels(total, generator)
        noise = draw_starts(state.model, total, labels, generator, settings.rescale)
        settings = dataclasses.replace(settings, num_steps=self.num_steps, zero_kl=True)
        ends: list[Tensor] = []
        energies: list[Tensor] = []
        done, steps = progress.done, settings.num_steps

        def count_step(_: Tensor) -> None:  # a chain may be run again, in another number type
            progress.update(min(progress.done + 1, done + (len(ends) + 1) * steps))

        with self.freeze_model() as energy:
            chain = bind_chain(energy.model, settings, generator, count_step)
            for start in noise.split(size):
                batch_labels = None if labels is None else labels[len(ends) * size :][: len(start)]
                end = state.acceleration.run(chain, energy.weights, start, batch_labels, generator, repeated=False)
                ends.append(end)
                with torch.no_grad():
                    energies.append(energy(end, batch_labels))
        images, start = torch.cat(ends)[:number] / settings.rescale, noise[:number] / settings.rescale
        moved = (images - start).abs().mean().item()
        labels = None if labels is None else labels[:number]
        self.latest = FreshChains(state.iteration, part, labels, start, images, torch.cat(energies)[:number], moved)
        return self.latest

    def draw_bytes(self, number: int, workers: Workers) -> Tensor:
        """Return the images of many fresh chains, uint8 (number, C, H, W) on the CPU; all workers draw their share."""
        sizes = [min(PART, number - start) for start in range(0, number, PART)]
        total = sum(map(self.count_steps, sizes[workers.rank :: workers.size]))  # of this worker
        what = f"Langevin step of {number:,} samples"
        with Progress(total, what=what, quiet=workers.rank > 0) as progress:

            def draw_part(part: int) -> Tensor:
                return to_bytes(self.draw_chains(sizes[part], part, progress).images).cpu()

            return torch.cat(workers.share_out(range(len(sizes)), draw_part))

    def choose_labels(self, number: int, generator: torch.Generator) -> Tensor | None:
        """Return labels (number, label_size) to sample under, or None for an unconditional model."""
        label_size, classes = self.state.model.config.label_size, len(self.dataset.class_names)
        if not label_size:
            return None
        if classes:
            return F.one_hot(torch.arange(number, device=generator.device) % classes, label_size).float()
        index = torch.randint(len(self.dataset), (number,), generator=generator, device=generator.device)
        return self.dataset.batch(index, generator)[1]

    def describe_labels(self, number: int) -> list[str]:
        """Return the labels of the first `number` images of the latest draw in words; [] for an unconditional model."""
        names = self.dataset.class_names
        if self.state.model.config.label_size and names:
            return data.name_classes([place % len(names) for place in range(number)], names)
        labels = None if self.latest is None else self.latest.labels
        return data.describe_labels(None if labels is None else labels[:number], self.dataset)

    @contextlib.contextmanager
    def freeze_model(self) -> Iterator[PreparedEnergy]:
        """Yield the frozen energy of the network that samples are drawn from; dropout is off inside the block."""
        model = self.state.sampled_model
        was_training = model.training
        try:
            yield freeze_energy(model.eval())
        finally:
            model.train(was_training)


# ---- how samples are measured, and how many ----


def choose_measure(
    settings: TrainSettings, dataset: data.Dataset, device: torch.device
) -> Callable[[], SampleMeasure] | None:
    """Return a function that makes the measure of samples, or None if samples are not to be measured.

    Samples are measured by Inception if its weights are at hand, else by a classifier. A line says that the classifier
    stands in for Inception, or why nothing is measured. Raises UsageError if `quality` is set and neither can be used,
    or if given weights cannot be. Nothing is written before the measure is made.
    """
    is_asked = settings.quality or settings.inception_weights
    if settings.quality is False or not (is_asked or settings.dataset in MEASURED_SETS):
        return None
    is_colour, path = dataset.image_shape[0] == 3, pathlib.Path(settings.inception_weights or locate_inception())
    if settings.inception_weights and not is_colour:
        raise UsageError(f"`inception_weights` is for colour images, not {dataset.name}; leave it out")
    reason = ""
    if is_colour:
        try:
            inception = Inception(*read_inception(path, settings.inception_sha256), device=device)
            return functools.partial(prepare_inception, dataset, inception, settings.folder)
        except UsageError as error:
            if settings.inception_weights:
                raise
            reason = str(error).replace("`", "") if path.exists() else f"put {INCEPTION_URL} into {path.parent}"
    try:
        require_classes(RealImages.choose(dataset.name, "train", [dataset], MAX_REAL_IMAGES))
    except UsageError as error:
        if settings.quality:
            raise UsageError(f"{error}; leave out `quality`") from None
        print(f"note: samples are not measured: {error}; Inception needs its weights: {reason}")
        return None
    if reason:
        print(f"note: the {DISTANCE} stands in for Inception score and FID, which need Inception's weights: {reason}")
    number = choose_number(settings, has_inception=False)
    return functools.partial(prepare_distance, dataset, number, settings.folder)


def choose_number(settings: TrainSettings, has_inception: bool) -> int:
    """Return how many images to sample at the end of a run."""
    return settings.num_samples or (50_000 if has_inception else 100)


def choose_test_number(settings: TrainSettings, measure: SampleMeasure) -> int:
    """Return how many images to measure at a test."""
    number = choose_number(settings, measure.has_inception)
    return min(number, TEST_SAMPLES) if measure.has_inception else number

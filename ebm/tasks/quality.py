"""Samples of a trained model: from persistent pools of chains as in the release, or from one new chain per image."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoint
from ebm.measures.features import (
    Classifier,
    Inception,
    RealImages,
    find_or_download_inception,
    load_or_train_classifier,
    read_inception,
)
from ebm.settings import InceptionSettings, PoolSettings
from ebm.support.errors import UsageError
from ebm.support.hardware import allow_tf32
from ebm.support.pixels import to_bytes
from ebm.support.progress import Progress
from ebm.support.sharing import ShareOut, compute_all
from ebm.tasks.examined_model import is_out_of_memory
from ebm.tasks.trained_models import TrainedModel, load_split
from models import ModelConfig, PreparedEnergy, draw_noise_images, freeze_energy
from sampling import check_finite, langevin

DIVERGED = "this model has diverged: use an earlier checkpoint"
POOL = 1_000  # number of chains in a pool
RESTART_SHARE = 0.01  # share of a batch that restarts from noise
RELABEL_SHARE = 0.1  # share of a batch that gets a new label
SPACING = 300  # iterations between the checkpoints of the reference's ensemble


def draw_from_pools(run: Callable[[int], Tensor], number: int) -> Tensor:
    """Return this many images, uint8 (number, C, H, W) on the CPU, from consecutive pools of 1,000 chains.

    run: runs one pool of a given size, see `run_pool`. Raises UsageError if a chain diverges.
    """
    sizes = [min(POOL, number - start) for start in range(0, number, POOL)]
    return torch.cat([to_bytes(check_finite(run(size), DIVERGED)).cpu() for size in sizes])


def run_pool(
    energies: Sequence[PreparedEnergy],
    size: int,
    config: ModelConfig,
    settings: PoolSettings,
    *,
    step_lr: float,
    proj_norm: float,
    generator: torch.Generator,
    progress: Progress,
) -> Tensor:
    """Run a pool of persistent chains for all its rounds and return their images (size, C, H, W) in [0, 1].

    energies: those of the ensemble, as functions of images in [0, 1]. config: that of its networks. step_lr, proj_norm:
    step size and clip of the gradients of these energies. progress: counts rounds.

    As in the reference, each round draws a batch of chains without repetition, continues them under the next energy of
    the ensemble and writes them back. In all but the last `nomix` rounds a share of the batch restarts from noise, and
    a share gets a new label.
    """
    device, classes = generator.device, config.label_size

    def draw_labels(n: int) -> Tensor:
        if not classes:
            return torch.zeros(n, 0, device=device)
        return F.one_hot(torch.randint(classes, (n,), generator=generator, device=device), classes).float()

    images, labels = draw_noise_images(config, size, generator), draw_labels(size)
    batch_size = min(settings.batch_size, size)
    for round_ in range(settings.rounds):
        index = torch.randperm(size, generator=generator, device=device)[:batch_size]
        x, y = images[index], labels[index]
        if round_ < settings.rounds - settings.nomix:
            chance = torch.rand(2, batch_size, generator=generator, device=device)
            x = torch.where(
                (chance[0] < RESTART_SHARE).view(-1, 1, 1, 1), draw_noise_images(config, batch_size, generator), x
            )
            y = torch.where((chance[1] < RELABEL_SHARE).view(-1, 1), draw_labels(batch_size), y)
        images[index] = langevin(
            energies[round_ % len(energies)].under(y),
            x,
            num_steps=settings.num_steps,
            step_lr=step_lr,
            noise_std=settings.noise_scale,
            proj_norm=proj_norm,
            generator=generator,
        )
        labels[index] = y
        progress.advance()
    return images


def draw_fresh_images(
    energy: PreparedEnergy,
    labels: Tensor,
    config: ModelConfig,
    *,
    num_steps: int,
    step_lr: float,
    noise_std: float = 0.005,
    proj_norm: float = 0.0,
    seed: int = 0,
    batch_size: int = 100,
    progress: Progress,
    share_out: ShareOut = compute_all,
) -> Tensor:
    """Return one image per row of labels (N, classes), each from a Langevin chain that starts from noise.

    The result is uint8 (N, C, H, W) on the CPU. The chain of image i draws its start and its noise from a generator of
    its own, seeded by (seed, i) on the device of the labels. On one kind of device the noise of an image therefore does
    not depend on the batch size and the number of images, and its pixels differ by rounding only. progress: counts the
    Langevin steps of each batch. share_out: distributes the batches.
    """

    def draw_batch(numbers: Tensor) -> Tensor:
        seeds = [(seed * 1_000_003 + i) % 2**32 for i in numbers.tolist()]
        generators = [torch.Generator(labels.device).manual_seed(each) for each in seeds]
        images = langevin(
            energy.under(labels[numbers.to(labels.device)]),
            torch.cat([draw_noise_images(config, 1, generator) for generator in generators]),
            num_steps=num_steps,
            step_lr=step_lr,
            noise_std=noise_std,
            proj_norm=proj_norm,
            generator=generators,
            after_step=lambda _: progress.advance(),
        )
        return to_bytes(check_finite(images, DIVERGED)).cpu()

    return torch.cat(share_out(torch.arange(len(labels)).split(batch_size), draw_batch))


@contextlib.contextmanager
def report_memory_shortage(batch_size: int) -> Iterator[None]:
    """Raise UsageError, which names `batch_size`, if the block inside runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"memory cannot hold chains of `batch_size`={batch_size}; lower it") from None


# ---- parts of eval_inception.py: an ensemble of checkpoints, real images, the network that compares ----


def choose_iterations(settings: InceptionSettings, folder: pathlib.Path) -> list[str]:
    """Return the iterations to measure, in the form that `checkpoint.find` accepts.

    folder: of the experiment. Raises UsageError for anything but numbers and "all".
    """
    if settings.iterations == ("all",):
        return [str(iteration) for iteration in checkpoint.list_iterations(folder)] or ["latest"]
    for word in settings.iterations:
        if not word.isdecimal():
            raise UsageError(f"`iterations`={word} is no iteration; give numbers separated by commas, or all")
    return list(settings.iterations) or [settings.resume_iter]


def find_ensemble(folder: pathlib.Path, resume_iter: str, number: int) -> list[pathlib.Path]:
    """Return the checkpoints of an ensemble, newest first: 300 iterations apart if all of these exist, else the newest.

    folder: of the experiment. resume_iter: the newest checkpoint to use; for "best" the ensemble is that checkpoint
    alone. number: the largest number of checkpoints.
    """
    newest = checkpoint.find(folder, resume_iter)
    name = newest.stem.removeprefix("model_")
    if not name.isdecimal():
        return [newest]
    existing = [iteration for iteration in checkpoint.list_iterations(folder) if iteration <= int(name)]
    spaced = [int(name) - SPACING * k for k in range(number)]
    iterations = spaced if set(spaced) <= set(existing) else existing[::-1][:number]
    return [checkpoint.find(folder, str(iteration)) for iteration in iterations]


def load_reference(settings: InceptionSettings, trained: TrainedModel, device: torch.device) -> RealImages:
    """Return the real images to compare samples with; raise UsageError if they do not fit the model."""
    name = settings.dataset or trained.flags.get("dataset", "cifar10")
    choice = settings.reference or ("both" if name == "cifar10" else "train")
    splits = ("train", "test") if choice == "both" else (choice,)
    datasets = [load_split(split, trained, settings, device) for split in splits]
    return RealImages.choose(name, choice, datasets, settings.real_number)


def load_extractor(
    settings: InceptionSettings, reference: RealImages, cache: pathlib.Path, device: torch.device
) -> Inception | Classifier:
    """Return the feature extractor: Inception for colour images if its weights are available, else a classifier.

    The classifier is trained on the reference images, see `load_or_train_classifier`. cache: its folder. Raises
    UsageError if the settings demand Inception and it cannot be used, or if the classifier has no classes to learn.
    """
    colour = reference.datasets[0].image_shape[0] == 3
    if settings.features == "inception" or (settings.features == "auto" and colour):
        if not colour:
            raise UsageError("`features`=inception is for colour images; leave it out for grey ones")
        try:
            path = settings.inception_weights or find_or_download_inception(settings.download)
            inception = Inception(*read_inception(path, settings.inception_sha256), device=device)
            print(f"compared by Inception-2015-12-05, {path}, SHA-256 {inception.identity[:16]}…")
            return inception
        except UsageError as error:
            if settings.features == "inception" or settings.inception_weights:
                raise
            print(f"note: {error}".replace("`", ""))
    try:
        classifier = load_or_train_classifier(reference, cache, device)
    except UsageError as error:
        raise UsageError(f"{error}; for colour images set `features`=inception") from None
    accuracy = f"{classifier.network.accuracy:.1%} correct on held-out images"
    print(f"compared by a small classifier of this data set, {accuracy}; its figures cannot be compared with any FID")
    return classifier


def draw_samples(
    settings: InceptionSettings, paths: Sequence[pathlib.Path], trained: TrainedModel, device: torch.device
) -> Tensor:
    """Return `im_number` images, uint8 (N, C, H, W), sampled from the ensemble of these checkpoints."""
    load = functools.partial(checkpoint.load_energy, ema=settings.ema, device=device, **settings.unrecorded)
    ensemble, rescale = list(map(load, paths)), trained.rescale
    progress = Progress(settings.rounds * -(-settings.im_number // POOL), what="round")
    energies = [freeze_energy(model, precision=settings.precision, rescale=rescale) for model in ensemble]
    generator = torch.Generator(device).manual_seed(settings.seed)

    def run(size: int) -> Tensor:
        return run_pool(
            energies,
            size,
            ensemble[0].config,
            settings,
            step_lr=trained.choose_step_lr(settings.step_lr) / rescale,  # gradients to images in [0, 1] are `rescale`
            proj_norm=settings.proj_norm * rescale,  # times those to the network's own images
            generator=generator,
            progress=progress,
        )

    with report_memory_shortage(settings.batch_size), allow_tf32(settings.precision):
        images = draw_from_pools(run, settings.im_number)
    progress.close()
    return images

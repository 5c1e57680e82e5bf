"""Samples of a trained model: from persistent pools of chains as in the release, or from one new chain per image."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
    locate_cache,
    read_inception,
)
from ebm.settings import POOL, InceptionSettings, PoolSettings
from ebm.support.errors import UsageError
from ebm.support.hardware import allow_tf32, is_out_of_memory
from ebm.support.pixels import to_bytes
from ebm.support.progress import SHORT, Progress
from ebm.support.sharing import ShareOut, compute_all, derive_seed
from ebm.tasks.trained_models import TrainedModel, load_split
from ebm.training.distributed import Workers
from models import EnergyNetwork, PreparedEnergy, draw_starts, freeze_energy
from sampling import Energy, check_finite, langevin

DIVERGED = "this model has diverged: use an earlier checkpoint"
RESTART_SHARE = 0.01  # share of the chains of a round that restart
RELABEL_SHARE = 0.1  # share of the chains of a round that get a new label
# Data set -> the split that the reference compares samples with.
REFERENCES = {"cifar10": "both", "imagenet": "test", "imagenetfull": "test"}
COMPARED = "of at most 10,000 images"
SPACING = 300  # iterations between the checkpoints of the reference's ensemble

# (Data set, conditional) -> published figures (Du & Mordatch 2019, as later papers quote them; "?": not verified).
PAPER = {
    ("cifar10", False): {
        "one model": "IS 6.02, FID 40.58",
        "ensemble of 10 late checkpoints": "IS 6.78, FID 38.2",
        "released model_121200, one model, num_steps 60, repeat_scale 10, by a user": "IS 6.40, FID 51.9",
    },
    ("cifar10", True): {"conditional": "IS 8.30, FID 37.9"},
    ("imagenet", True): {"conditional": "IS 18.22, FID 14.31 ? (a later paper quotes IS 5.85, FID 62.2)"},
    ("imagenetfull", True): {"conditional": "IS 28.6, FID 43.7 ?"},
}


# ---- pools of persistent chains ----


PoolChain = Callable[[Tensor, Tensor], Tensor]  # images (N, C, H, W) in [0, 1], labels (N, classes) -> its end points


class PoolDraws:
    """What the rounds of a pool draw at random, from one generator. model: a network; it knows where chains start."""

    def __init__(self, model: EnergyNetwork, generator: torch.Generator):
        self.model, self.generator, self.device = model, generator, generator.device

    def draw_images(self, labels: Tensor) -> Tensor:
        """Return an image that a chain starts from for each of the labels (n, classes), (n, C, H, W)."""
        return draw_starts(self.model, len(labels), labels, self.generator)

    def draw_labels(self, number: int) -> Tensor:
        """Return random classes, one-hot (number, classes), or of width 0 if the networks have none."""
        classes = self.model.config.label_size
        if not classes:
            return torch.zeros(number, 0, device=self.device)
        drawn = torch.randint(classes, (number,), generator=self.generator, device=self.device)
        return F.one_hot(drawn, classes).float()

    def draw_indices(self, entries: int, number: int) -> Tensor:
        """Return random indices of this many entries, (number,), with repetition."""
        return torch.randint(entries, (number,), generator=self.generator, device=self.device)

    def draw_mask(self, number: int, share: float) -> Tensor:
        """Return a mask (number,) that is true with the probability `share`."""
        return torch.rand(number, generator=self.generator, device=self.device) < share


def run_pool(
    chains: Sequence[PoolChain], draws: PoolDraws, settings: PoolSettings, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Run a pool of persistent chains for all its rounds; return its images (N, C, H, W) and labels (N, classes).

    chains: those of the ensemble, which take turns. progress: counts rounds.

    As in the reference, a round runs new chains and adds them to the pool until it has `pool_size` entries, of which
    there may be more at the end. From then on each round draws entries with repetition and continues them; the last
    result of a repeated entry stays. Before that, in all but the last `nomix` rounds, a share of the drawn chains
    restarts and a share gets a new label.
    """
    size = settings.round_size
    labels = draws.draw_labels(0)
    images = draws.draw_images(labels)
    for number in range(settings.rounds):
        chain = chains[number % len(chains)]
        if len(images) < settings.pool_size:
            y = draws.draw_labels(size)
            images, labels = torch.cat([images, chain(draws.draw_images(y), y)]), torch.cat([labels, y])
        else:
            index = draws.draw_indices(len(images), size)
            x, y = images[index], labels[index]
            if number < settings.rounds - settings.nomix:
                x, y = mix_chains(x, y, draws)
            x, last = chain(x, y), find_last_draws(index, len(images))
            is_drawn = last >= 0
            images[is_drawn], labels[is_drawn] = x[last[is_drawn]], y[last[is_drawn]]
        progress.advance()
    return images, labels


def find_last_draws(index: Tensor, entries: int) -> Tensor:
    """Return the last place of each entry among the drawn indices (n,), or -1 if it was not drawn, as (entries,)."""
    last = torch.full((entries,), -1, device=index.device)
    return last.scatter_reduce(0, index, torch.arange(len(index), device=index.device), "amax")


def mix_chains(images: Tensor, labels: Tensor, draws: PoolDraws) -> tuple[Tensor, Tensor]:
    """Return images and labels of chains, of which 1 % restart and 10 % have a new label."""
    number = len(images)
    is_restarted, is_relabelled = draws.draw_mask(number, RESTART_SHARE), draws.draw_mask(number, RELABEL_SHARE)
    labels = torch.where(is_relabelled.view(-1, 1), draws.draw_labels(number), labels)
    return torch.where(is_restarted.view(-1, 1, 1, 1), draws.draw_images(labels), images), labels


def draw_pool(
    number: int,
    energies: Sequence[PreparedEnergy],
    settings: PoolSettings,
    *,
    step_lr: float,
    proj_norm: float,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> Tensor:
    """Return the images (N, C, H, W) in [0, 1] that are taken from one pool; they do not depend on other pools.

    Only the chains that lead to these images evaluate an energy, see `find_used_chains`.

    number: of the pool, from 0. energies: those of the ensemble, as functions of images in [0, 1]. step_lr, proj_norm:
    step size and clip of the gradients of these energies. progress: counts rounds.
    """
    generator = torch.Generator(device)
    descend = functools.partial(
        langevin,
        num_steps=settings.num_steps,
        step_lr=step_lr,
        noise_std=settings.noise_scale,
        proj_norm=proj_norm,
        generator=generator,
    )
    model, pool_seed = energies[0].model, derive_seed(seed, number)
    wanted = min(POOL, settings.im_number - number * POOL)
    generator.manual_seed(pool_seed)
    places = iter(find_used_chains(descend, RehearsalDraws(model, generator), settings, wanted))

    def build_chain(energy: PreparedEnergy) -> PoolChain:
        def chain(images: Tensor, labels: Tensor) -> Tensor:
            used = next(places)
            used_energy = energy.under(labels[used])
            # The noise is drawn for all chains, so that it does not depend on which of them are used.
            return descend(lambda x: used_energy(x.index_select(0, used)) if len(used) else flat_energy(x), images)

        return chain

    generator.manual_seed(pool_seed)
    return run_pool(list(map(build_chain, energies)), PoolDraws(model, generator), settings, progress)[0][:wanted]


def flat_energy(x: Tensor) -> Tensor:
    """Return the energies (N,) of images (N, ...) in a landscape without slopes, in which only the noise moves them."""
    return 0 * x.flatten(1).sum(1)


NEW = -1  # stands for a new start among the numbers of chains


class RehearsalDraws(PoolDraws):
    """The random numbers of a pool for a rehearsal, in which images are numbers of chains: all but the noise."""

    def draw_images(self, labels: Tensor) -> Tensor:
        """Return NEW in place of an image for each of the labels (n, classes), as (n, 1, 1, 1)."""
        super().draw_images(labels)  # moves the generator on
        return torch.full((len(labels), 1, 1, 1), NEW, device=self.device)


def find_used_chains(
    descend: Callable[[Energy, Tensor], Tensor], draws: RehearsalDraws, settings: PoolSettings, wanted: int
) -> list[Tensor]:
    """Return which chains of each round of a pool lead to one of its first images: their places in the round.

    The others end at images that a later result replaces, that restart, or that nobody takes from the pool.
    With the settings of the release they are almost half of all chains. descend: runs chains, and draws from the
    generator of the draws as in the pool itself. wanted: the number of images that are taken from the pool.
    """
    size, origins = settings.round_size, list[Tensor]()  # origins: the chains that those of each round continue

    def rehearse(images: Tensor, labels: Tensor) -> Tensor:
        descend(flat_energy, torch.zeros(size, *draws.model.config.image_shape, device=draws.device))
        origins.append(images.flatten())
        return (len(origins) - 1) * size + torch.arange(size, device=draws.device).view(-1, 1, 1, 1)

    with Progress(settings.rounds, what="round of drawing noise", patience=SHORT) as progress:
        images, _ = run_pool([rehearse], draws, settings, progress)
    is_used = torch.zeros(settings.rounds * size, dtype=torch.bool, device=draws.device)
    is_used[images[:wanted].flatten()] = True
    rounds = is_used.split(size)
    for round_origins, is_used_here in zip(reversed(origins), reversed(rounds), strict=True):
        continued = round_origins[is_used_here]
        is_used[continued[continued != NEW]] = True
    return [is_used_here.nonzero()[:, 0] for is_used_here in rounds]


def draw_from_pools(draw: Callable[[int], Tensor], number: int, share_out: ShareOut = compute_all) -> Tensor:
    """Return this many images, uint8 (number, C, H, W) on the CPU: the first 1,000 of each of so many pools.

    draw: returns the images of a pool by its number from 0, see `draw_pool`. share_out: distributes the pools; it may
    return those of the first ones. Raises UsageError if a chain diverges.
    """

    def draw_bytes(pool: int) -> Tensor:
        return to_bytes(check_finite(draw(pool)[:POOL], DIVERGED)).cpu()

    return torch.cat(share_out(range(-(-number // POOL)), draw_bytes))[:number]


# ---- one new chain per image ----


def draw_fresh_images(
    energy: PreparedEnergy,
    labels: Tensor,
    model: EnergyNetwork,
    *,
    num_steps: int,
    step_lr: float,
    noise_std: float = 0.005,
    proj_norm: float = 0.0,
    seed: int = 0,
    batch_size: int = 100,
    progress: Progress,
    share_out: ShareOut = compute_all,
    descend: Callable[..., Tensor] = langevin,
) -> Tensor:
    """Return one image per row of labels (N, classes), each from a Langevin chain of its own.

    The result is uint8 (N, C, H, W) on the CPU. model: the network, which knows where chains start. The chain of image
    i draws its start and its noise from a generator of its own, seeded by (seed, i) on the device of the labels. On one
    kind of device the noise of an image therefore does not depend on the batch size and the number of images, and its
    pixels differ by rounding only. progress: counts the Langevin steps of each batch. share_out: distributes the
    batches; it may return those of the first ones. descend: runs the chains, with the arguments of `langevin`.
    """

    def draw_batch(numbers: Tensor) -> Tensor:
        seeds = [derive_seed(seed, i) for i in numbers.tolist()]
        generators = [torch.Generator(labels.device).manual_seed(each) for each in seeds]
        batch = labels[numbers.to(labels.device)]
        images = descend(
            energy.under(batch),
            draw_starts(model, len(batch), batch, generators),
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
            raise UsageError(f"`iterations`={word} is not an iteration; give numbers separated by commas, or all")
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
    choice = settings.reference or REFERENCES.get(name, "train")
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
        path = locate_cache(cache, f"{reference.name}_classifier", reference.settings())
        classifier = load_or_train_classifier(reference, path, device)
    except UsageError as error:
        raise UsageError(f"{error}; for colour images set `features`=inception") from None
    accuracy = f"{classifier.network.accuracy:.1%} correct on held-out images"
    print(f"compared by a small classifier of this data set, {accuracy}; its figures cannot be compared with any FID")
    return classifier


def describe_quality_settings(
    settings: InceptionSettings,
    trained: TrainedModel,
    reference: RealImages,
    extractor: Inception | Classifier,
) -> dict[str, Any]:
    """Return the settings, by name, that determine the figures besides the checkpoints."""
    chain_names = ("im_number", "num_steps", "proj_norm", "noise_scale", "batch_size", "repeat_scale", "nomix")
    described = {name: getattr(settings, name) for name in (*chain_names, "seed", "ema", "precision")}
    described |= {"step_lr": trained.choose_step_lr(settings.step_lr)}
    described |= {"reference": str(reference), "features": extractor.name, "weights": extractor.identity}
    if isinstance(extractor, Classifier):
        return described | {"accuracy": extractor.network.accuracy, "precision and recall": COMPARED}
    return described | {"splits": settings.splits, "KID, precision and recall": COMPARED}


def check_pool(settings: PoolSettings) -> None:
    """Raise UsageError if the rounds of a pool do not fill it."""
    if settings.rounds * settings.round_size < settings.pool_size:
        raise UsageError(
            f"`repeat_scale`={settings.repeat_scale} makes {settings.rounds} rounds of `batch_size`="
            f"{settings.batch_size} chains, which do not fill a pool of {settings.pool_size:,}; raise one of them"
        )


def draw_samples(
    settings: InceptionSettings, paths: Sequence[pathlib.Path], trained: TrainedModel, workers: Workers
) -> Tensor:
    """Return `im_number` images, uint8 (N, C, H, W), sampled from the ensemble of these checkpoints.

    Each worker runs its share of the pools, and every one receives all images; after a signal, those of the first
    pools.
    """
    load = functools.partial(checkpoint.load_energy, ema=settings.ema, device=workers.device, **settings.unrecorded)
    ensemble, rescale = list(map(load, paths)), trained.rescale
    pools = -(-settings.im_number // POOL)
    chains = f"{settings.rounds} rounds of {settings.round_size} chains of {settings.num_steps} Langevin steps"
    print(f"work: {settings.im_number:,} images from {pools} pools, for each {chains}", flush=True)
    progress = Progress(settings.rounds * workers.count_share(pools), what="round")
    draw = functools.partial(
        draw_pool,
        energies=[freeze_energy(model, precision=settings.precision, rescale=rescale) for model in ensemble],
        settings=settings,
        step_lr=trained.choose_step_lr(settings.step_lr) / rescale,  # gradients to images in [0, 1] are `rescale`
        proj_norm=settings.proj_norm * rescale,  # times those to the network's own images
        seed=settings.seed,
        device=workers.device,
        progress=progress,
    )
    with report_memory_shortage(settings.batch_size), allow_tf32(settings.precision), progress:
        return draw_from_pools(draw, settings.im_number, workers.share_out)

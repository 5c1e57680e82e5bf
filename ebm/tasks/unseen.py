"""Generalisation to combinations that were not in the training data: tasks gentest and genbaseline of ebm_combine.py.

    slices = select_slices(run.sprites.latents, "size")  # indices of sprites

The training data are two slices of the latents: in one only the position varies, in the other only another concept. The
test data are sprites in which both vary. gentest trains two energy models together, genbaseline a feed-forward
generator.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
import models
from ebm.readers import dsprites
from ebm.readers.bounded import read_json, report_unreadable_file
from ebm.readers.dsprites import CONCEPTS, NearestSprites
from ebm.settings import CombineSettings, TrainSettings
from ebm.support import pictures
from ebm.support.files import write_file
from ebm.support.hardware import LOSS_PRECISIONS, allow_tf32
from ebm.support.interruption import Interruption
from ebm.support.progress import Progress, describe_energies
from ebm.tasks.concepts import ROWS, ConceptRun, Figures, compute_share, judge_concepts
from models import PreparedEnergy, draw_noise_images, freeze_energy
from sampling import Energy, check_finite, compute_input_gradient, draw_noise, langevin
from train import contrastive_loss, kl_loss
from utils import REPLAY_SIZE, ClippedAdam

GENTEST_STEPS = 300  # training iterations of gentest, if `break_steps` does not say otherwise
GENTEST_PASSES, GENBASELINE_PASSES = 1, 5  # passes over the training sprites, after which training ends at the latest
REPLAY_RATE = 0.05  # share of the chains in training that start from earlier end points
TEST_CHAINS = 3  # chains that follow one another for an image of the test
JOINT_LOSS = TrainSettings()  # contrastive divergence with the KL term
LEARNING_RATE = 1e-3  # learning rate of the generator
GENERATOR_BETAS = 0.9, 0.999
FRACTIONS = tuple(k / 10 for k in range(11))  # shares of the other combinations that `plot_curve` trains on

SpriteSampler = Callable[[Tensor], Tensor]  # latents (N, 5) -> images (N, 1, 64, 64)


def choose_other_concept(settings: CombineSettings) -> str:
    """Return the concept that varies besides the position: size, shape or rot."""
    return "shape" if settings.joint_shape else "rot" if settings.joint_rot else "size"


class Slices(NamedTuple):
    """The sprites of a generalisation test, as indices (N,)."""

    training: Tensor  # the two slices, one after the other, with repetitions
    others: Tensor  # each combination of both concepts but the one that is in both slices
    unseen: Tensor  # the combinations that samples are tested on


def select_slices(latents: Tensor, other: str, balance: bool = True) -> Slices:
    """Return the sprites to train and to test on, for the position and another concept.

    latents: of all sprites (SIZE, 5). The slices are those of `dsprites.SUBSETS`. As in the release, that of the
    positions is repeated, as often as the other goes into it; with `balance` the other is repeated, too, until both
    weigh the same. For the size, the unseen combinations are in neither slice; for shape and rotation they are all
    combinations, those of the slices among them, as in the release.
    """
    position, other_slice = (dsprites.is_in_subset(latents, subset) for subset in ("pos", other))
    first, second = position.nonzero()[:, 0], other_slice.nonzero()[:, 0]
    first = first.repeat(max(1, len(first) // len(second)))
    if balance:
        second = second.repeat(-(-len(first) // len(second)))[: len(first)]
    fixed = dict(dsprites.SUBSETS["pos"].items() & dsprites.SUBSETS[other].items())
    plane = dsprites.match_latents(latents, fixed)
    unseen = plane & ~position & ~other_slice if other == "size" else plane
    others = plane & ~(position & other_slice)
    return Slices(torch.cat([first, second]), others.nonzero()[:, 0], unseen.nonzero()[:, 0])


def join_labels(latents: Tensor, other: str) -> Tensor:
    """Return joint labels (N, 2 + width) of latents (N, 5): the position, then the label of the other concept."""
    return torch.cat([dsprites.compute_labels(latents, concept) for concept in ("pos", other)], 1)


# ---- two energy models as one ----


class ProductNetwork(models.EnergyNetwork):
    """Several conditional networks as one: its energy is the sum of theirs, its label the concatenation of theirs."""

    def __init__(self, networks: Sequence[models.EnergyNetwork]):
        nn.Module.__init__(self)
        self.parts = nn.ModuleList(networks)  # registers their parameters
        self.networks = tuple(networks)
        self.widths = [network.config.label_size for network in networks]
        self.config = dataclasses.replace(networks[0].config, label_size=sum(self.widths))

    def prepare(self, **settings: Any) -> models.Weights:  # type: ignore[override]
        """Return the prepared weights of all networks; network i adds "i." to the names of its weights."""
        prepared = [network.prepare(**settings) for network in self.networks]
        return {f"{i}.{name}": tensor for i, weights in enumerate(prepared) for name, tensor in weights.items()}

    def bind_energies(self, weights: models.Weights, labels: Tensor) -> list[Energy]:
        """Return the energy of each network under its part of the labels (N, sum of widths), as functions of images."""
        energies = []
        for i, (network, part) in enumerate(zip(self.networks, labels.split(self.widths, 1), strict=True)):
            prefix = f"{i}."
            prepared = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
            energies.append(PreparedEnergy(network, prepared).under(part))
        return energies

    def energy(self, weights: models.Weights, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the sum of the energies (N,) of images (N, C, H, W) under labels (N, sum of widths)."""
        assert labels is not None, "the networks are conditional"
        return torch.stack([energy(images) for energy in self.bind_energies(weights, labels)]).sum(0)


def build_product(run: ConceptRun, other: str) -> ProductNetwork:
    """Return the product of a network for the position and one for the other concept, before their joint training.

    They are those of the run's models; a network that the run does not have is a new one.
    """
    settings, generator = run.settings, torch.Generator().manual_seed(run.settings.seed)
    parts = []
    for concept in ("pos", other):
        config = models.ModelConfig(
            "DspritesNet",
            image_shape=(1, dsprites.SIDE, dsprites.SIDE),
            num_filters=settings.num_filters or 64,
            label_size=CONCEPTS[concept].label_size,
            spec_norm=settings.spec_norm is not False,
            **settings.unrecorded,
        )
        known = run.concepts.get(concept)
        parts.append(known.energy.model if known else models.build_model(config, generator))
    return ProductNetwork(parts).to(run.generator.device)


def run_product_chain(
    run: ConceptRun, energy: PreparedEnergy, start: Tensor, labels: Tensor, *, differentiable: bool = False
) -> Tensor:
    """Run chains that descend the energies of a product in turn; return their end points, shaped like `start`.

    energy: of a ProductNetwork, whose first network is that of the position. labels: (N, sum of widths). Each round
    takes a step on the position's energy, then one on the other. As in the release, the gradient of the position's
    energy is always that at the chain's start, and noise is added twice before the first step, never before the second.
    differentiable: let gradients flow back through the chains, to the weights and to `start`.
    """
    assert isinstance(energy.model, ProductNetwork)
    first, second = energy.model.bind_energies(energy.weights, labels)
    step_lr, x = run.settings.step_lr, start
    gradient = compute_input_gradient(first, start, create_graph=differentiable)
    for _ in range(run.settings.num_steps):
        noise = draw_noise(x, run.generator) + draw_noise(x, run.generator)
        x = (x + run.noise_std * noise - step_lr * gradient).clamp(0, 1)
        x = langevin(
            second,
            x,
            num_steps=1,
            step_lr=step_lr,
            noise_std=0.0,
            generator=run.generator,
            differentiable_in=energy.weights.values() if differentiable else None,
        )
    return x


class ProductStep(NamedTuple):
    """The tensors of one iteration of joint training on N images."""

    samples: Tensor  # the end points of the chains (N, 1, 64, 64)
    e_pos: Tensor  # the energies of the data, (N,)
    e_neg: Tensor  # the energies of the samples, (N,)
    loss: Tensor


def train_product_step(
    run: ConceptRun, product: ProductNetwork, optimizer: ClippedAdam, images: Tensor, labels: Tensor, start: Tensor
) -> ProductStep:
    """Run one iteration of joint training: chains, the contrastive loss of the sum of energies, the KL term, update.

    images: the data (N, 1, 64, 64). labels: (N, sum of widths). start: of the chains (N, 1, 64, 64).
    """
    weights = models.cast(product.prepare(update_u=True), LOSS_PRECISIONS[run.settings.precision])
    energy = PreparedEnergy(product, weights)
    ends = run_product_chain(run, energy, start, labels, differentiable=True)
    samples = ends.detach()
    e_pos, e_neg = energy(images, labels), energy(samples, labels)
    loss_ml, regulariser = contrastive_loss(e_pos, e_neg, JOINT_LOSS)
    loss = loss_ml + regulariser + kl_loss(energy, ends, labels, JOINT_LOSS)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return ProductStep(samples, e_pos.detach(), e_neg.detach(), loss.detach())


def count_iterations(settings: CombineSettings, images: int, passes: int, default: int | None = None) -> int:
    """Return the number of training iterations: `break_steps`, or `default`, but no more than passes over the images.

    As in the release, a pass leaves out a last batch that is not full.
    """
    in_passes = passes * (images // settings.batch_size)
    return min(in_passes, settings.break_steps or default or in_passes)


def train_product(run: ConceptRun, product: ProductNetwork, training: Tensor, other: str) -> int:
    """Train the networks of a product together by contrastive divergence with the KL term; return the last iteration.

    5 % of the chains start from end points of earlier ones. training: indices of sprites. other: the other concept.
    """
    settings, device = run.settings, run.generator.device
    optimizer = ClippedAdam(product.parameters(), lr=settings.lr)
    batches = data.Batches(len(training), settings.batch_size, settings.seed, device=device)
    replay = torch.empty(0, *product.config.image_shape, device=device)
    total = count_iterations(settings, len(training), GENTEST_PASSES, GENTEST_STEPS)
    steps = f"{settings.num_steps} rounds of Langevin steps"
    print(f"work: {total:,} training iterations of {settings.batch_size} images and {steps}", flush=True)
    with Progress(total, what="training of the energy") as progress:
        for iteration in run.workers.until_signal(range(1, total + 1)):
            index = training[batches.next()]
            images, labels = run.render_images(index), join_labels(run.sprites.latents[index], other)
            start = mix_starts(product.config, len(index), replay, run.generator)
            with allow_tf32(settings.precision):
                step = train_product_step(run, product, optimizer, images, labels, start)
            replay = torch.cat([replay, step.samples])[-REPLAY_SIZE:]
            if iteration % 10 == 0:
                check_finite(step.loss, "lower `step_lr` or `lr`")
                energies = describe_energies(step.e_pos.mean().item(), step.e_neg.mean().item())
                progress.text = f"squared error {measure_squared_error(step.samples, images):.4f}, {energies}"
            progress.update(iteration)
    run.workers.note_part("training iterations", progress.done, total)
    return progress.done


def mix_starts(config: models.ModelConfig, number: int, replay: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the starts of an iteration's chains: noise, and for 5 % of them end points of earlier chains.

    replay: these end points (M, 1, 64, 64), as floats; as in the release, they are not stored as bytes here.
    """
    start = draw_noise_images(config, number, generator)
    if len(replay):
        is_replayed = torch.rand(number, 1, 1, 1, generator=generator, device=generator.device) < REPLAY_RATE
        index = torch.randint(len(replay), (number,), generator=generator, device=generator.device)
        start = torch.where(is_replayed, replay[index], start)
    return start


def sample_product(run: ConceptRun, product: ProductNetwork, start: Tensor, labels: Tensor) -> Tensor:
    """Return the end points (N, 1, 64, 64) of three chains in a row, of which each starts where the last one ended.

    They differ from one long chain in the point where the position's gradient is taken. labels: (N, sum of widths).
    """
    x = start
    with allow_tf32(run.settings.precision):
        for _ in range(TEST_CHAINS):
            x = run_product_chain(run, freeze_energy(product, precision=run.settings.precision), x, labels)
    return check_finite(x, "lower `step_lr`")


def build_product_sampler(run: ConceptRun, product: ProductNetwork, other: str) -> SpriteSampler:
    """Return a function that samples images for latents, from noise twice as wide as in training, 0.5 + N(0, 1)."""

    def sample(latents: Tensor) -> Tensor:
        shape, device = (len(latents), *product.config.image_shape), run.generator.device
        start = 0.5 + torch.randn(shape, generator=run.generator, device=device)
        return sample_product(run, product, start, join_labels(latents, other))

    return sample


Checkpoints = dict[str, dict[str, Any]]  # file below the folder of results -> its contents


def load_product(run: ConceptRun, training: Tensor, other: str) -> tuple[ProductNetwork, Checkpoints] | None:
    """Return the networks that an earlier call trained for so many iterations, and their checkpoints.

    Returns None if there are none, or if the setting `train` asks for new ones. training: indices of sprites. other:
    the other concept.
    """
    iteration = count_iterations(run.settings, len(training), GENTEST_PASSES, GENTEST_STEPS)
    names = [f"{concept}/model_{iteration}.pt" for concept in ("pos", other)]
    paths = [run.results.folder / name for name in names]
    is_trained = run.workers.rank == 0 and not run.settings.train and all(path.exists() for path in paths)
    if not run.workers.any(is_trained):
        return None
    trained = ", ".join(map(str, paths))
    print(f"models of an earlier run, trained with its settings: {trained}; train=True trains new ones")
    networks = [checkpoint.load_energy(path, device=run.generator.device) for path in paths]
    for path, network, built in zip(paths, networks, build_product(run, other).networks, strict=True):
        checkpoint.check_config(network.config, built.config, path)
    return ProductNetwork(networks), dict(zip(names, map(checkpoint.load, paths), strict=True))


def train_new_product(run: ConceptRun, training: Tensor, other: str) -> ProductNetwork:
    """Return networks that were trained just now and saved, also after a signal.

    Rank 0 trains while the other workers wait for its weights. training: indices of sprites. other: the other concept.
    Raises Interruption after a signal.
    """
    product, workers, iteration = build_product(run, other), run.workers, 0
    if workers.rank == 0:
        iteration = train_product(run, product, training, other)
    workers.broadcast(product.state_dict().values())
    iteration = workers.share(iteration)[0]
    for concept, network in zip(("pos", other), product.networks, strict=True):
        contents = {"config": dataclasses.asdict(network.config), "model": network.state_dict(), "iteration": iteration}
        flags = {"dataset": "dsprites", f"cond_{concept}": True, "step_lr": run.settings.step_lr}
        if iteration:
            checkpoint.save(run.add_file(f"{concept}/model_{iteration}.pt"), contents | {"flags": flags})
    if workers.is_asked_to_end() and workers.signal:
        raise Interruption(workers.signal)
    return product


# ---- feed-forward generator ----


class SpriteGenerator(nn.Module):
    """A feed-forward network from labels to images: DspritesNet reversed, with transposed convolutions.

    The release's genbaseline imports a generator that the release does not contain, so this one is our own. It has two
    dense layers, four 4x4 transposed convolutions that double the size, each after a label-dependent bias as in
    DspritesNet, and a 3x3 convolution. `build_generator_of_size` gives it about as many parameters as the energy
    networks that it is compared with.
    """

    def __init__(self, label_size: int, num_filters: int):
        super().__init__()
        channels = [2 * num_filters, 2 * num_filters, 2 * num_filters, num_filters, 32]
        self.dense = nn.Sequential(
            nn.Linear(label_size, channels[0]), nn.SiLU(), nn.Linear(channels[0], 16 * channels[0]), nn.SiLU()
        )
        self.biases = nn.ModuleList(nn.Linear(label_size, c_in, bias=False) for c_in in channels[:-1])
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1) for c_in, c_out in itertools.pairwise(channels)
        )
        self.last = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, labels: Tensor) -> Tensor:
        """Return images (N, 1, 64, 64) for labels (N, label_size).

        The pixels are unbounded, because with a sigmoid at the output training gets stuck at black images.
        """
        x = self.dense(labels).view(len(labels), -1, 4, 4)
        for bias, doubling in zip(self.biases, self.doublings, strict=True):
            x = nn.functional.silu(doubling(x + bias(labels)[:, :, None, None]))
        return self.last(x)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_generator_of_size(label_size: int, count: int, seed: int) -> SpriteGenerator:
    """Return an untrained generator whose number of parameters is as near to `count` as a width allows."""

    def count_at_width(width: int) -> int:
        return count_parameters(SpriteGenerator(label_size, width))

    with torch.device("meta"):
        widths = range(1, math.isqrt(count))
        place = bisect.bisect(widths, count, key=count_at_width)
        width = min(widths[max(place - 1, 0) : place + 1], key=lambda width: abs(count_at_width(width) - count))
    with torch.random.fork_rng(devices=[]):  # the layers draw weights from torch's global generator
        torch.manual_seed(seed)
        return SpriteGenerator(label_size, width)


def train_generator(run: ConceptRun, training: Tensor, other: str) -> tuple[SpriteGenerator, Progress]:
    """Return a generator that was trained on sprites by mean squared error, and how much of the training was done.

    training: indices of the sprites. other: the other concept.
    """
    generator = build_generator(run, other)
    optimizer = ClippedAdam(generator.parameters(), lr=LEARNING_RATE, betas=GENERATOR_BETAS)
    batches = data.Batches(len(training), run.settings.batch_size, run.settings.seed, device=training.device)
    total = count_iterations(run.settings, len(training), GENBASELINE_PASSES)
    print(f"work: {total:,} training iterations of {run.settings.batch_size} images", flush=True)
    with Progress(total, what="training of the generator") as progress:
        for iteration in run.workers.until_signal(range(1, total + 1)):
            index = training[batches.next()]
            images = generator(join_labels(run.sprites.latents[index], other))
            loss = nn.functional.mse_loss(images, run.render_images(index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if iteration % 10 == 0:
                progress.text = f"loss {loss.item():.5f}"
            progress.update(iteration)
    return generator, progress


def build_generator_sampler(generator: SpriteGenerator, other: str) -> SpriteSampler:
    """Return a function that samples images for latents; their pixels are unbounded. other: the other concept."""
    return torch.no_grad()(lambda latents: generator(join_labels(latents, other)))


# ---- the tasks ----


def shuffle_index(run: ConceptRun, index: Tensor) -> Tensor:
    """Return an index (N,) in random order, which is the same for the same seed."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(run.settings.seed))
    return index[order.to(index.device)]


def measure_samplers(run: ConceptRun, samplers: Mapping[str, SpriteSampler], slices: Slices, other: str) -> Figures:
    """Return the errors of samplers on unseen and on seen combinations, one row for each; draw a picture.

    samplers: by name. They are tested on all unseen combinations and on as many seen ones as a batch holds, or on
    `limit` of each. A row has the mean squared error to the true images, the share of images that are right in the
    position, in the other concept and in both; the last two columns are those of `concepts.tabulate_shares`.
    """
    limit = run.settings.limit
    unseen, seen = shuffle_index(run, slices.unseen)[:limit], shuffle_index(run, slices.training)
    sets = {"unseen": unseen, "seen": seen[: limit or run.settings.batch_size]}
    total = len(samplers) * sum(map(len, sets.values()))
    print(f"work: {total:,} samples for the test, and a search for the sprite nearest to each", flush=True)
    progress = Progress(total, what="images")

    def sample_part(part: tuple[SpriteSampler, Tensor]) -> Tensor:
        sampler, index = part
        samples = sampler(run.sprites.latents[index])
        progress.advance(len(index) * run.workers.size)
        return samples

    wanted = {(name, kind): (samplers[name], index) for name in samplers for kind, index in sets.items()}
    parts = [(sampler, part) for sampler, index in wanted.values() for part in index.split(run.settings.batch_size)]
    with progress:
        images = torch.cat(run.share_parts(parts, sample_part))
    nearest = dsprites.find_nearest_sprites(images)
    figures: Figures = {}
    columns, start = {}, 0
    for (name, kind), (_, index) in wanted.items():
        samples, found = images[start : start + len(index)], nearest[start : start + len(index)]
        run.workers.note_part(f"samples of {name}, {kind}", len(samples), len(index))
        start, index = start + len(index), index[: len(samples)]
        if not len(samples):
            break
        if kind == "unseen":
            columns[name] = samples[:ROWS]
        true = run.sprites.latents[index]
        truths, by_nearest = (judge_concepts(each, true) for each in (found, NearestSprites.of_sprites(found.latents)))
        figures[f"{name}, {kind}"] = {
            "MSE": measure_squared_error(samples, run.render_images(index)),
            "pos right": compute_share(truths["pos"]),
            f"{other} right": compute_share(truths[other]),
            "jointly": compute_share(truths["pos"] & truths[other]),
            "by nearest": compute_share(by_nearest["pos"] & by_nearest[other]),
            "no sprite": compute_share(~found.is_sprite),
        }
    rows = min(map(len, columns.values()))
    columns = {name: samples[:rows] for name, samples in columns.items()}
    columns["true"] = run.render_images(unseen[:rows])
    note = "percentages: the share of the other combinations that the generator was trained on" * (len(samplers) > 1)
    pictures.save_panel(columns, run.add_file("unseen.png"), note=note)
    return figures


def measure_squared_error(images: Tensor, true: Tensor) -> float:
    """Return the mean squared error of images to the true ones, over all pixels."""
    return (images - true).square().mean().item()


def build_generator(run: ConceptRun, other: str) -> SpriteGenerator:
    """Return an untrained generator with about as many parameters as two new energy networks."""
    product = build_product(run, other)
    generator = build_generator_of_size(product.config.label_size, count_parameters(product), run.settings.seed)
    return generator.to(run.generator.device)


def measure_product(run: ConceptRun) -> Figures:
    """Train two energies together on sprites in which only one of two concepts varies; measure samples of both."""
    other = choose_other_concept(run.settings)
    slices = select_slices(run.sprites.latents, other, run.settings.balance)
    loaded = load_product(run, slices.training, other)
    product, checkpoints = loaded or (train_new_product(run, slices.training, other), {})
    figures = measure_samplers(run, {"energy": build_product_sampler(run, product, other)}, slices, other)
    for name, contents in checkpoints.items():  # the results that they were among are now elsewhere
        checkpoint.save(run.add_file(name), contents)
    true = run.render_images(shuffle_index(run, slices.unseen)[: run.settings.limit])
    figures["MSE of black images"] = true.square().mean().item()
    is_trained_on = torch.isin(slices.unseen, slices.training)
    figures["share of the unseen that was trained on"] = compute_share(is_trained_on)
    figures["parameters, energy"] = count_parameters(product)
    return figures


def measure_generator(run: ConceptRun) -> Figures:
    """Train a generator network as gentest its energies, and on a share of the rest (`frac`); measure its samples.

    With `plot_curve` the shares from 0 to 1 follow one another. As in the release, the combinations that are measured
    are the same for every share, so that a part of them was then trained on.
    """
    other = choose_other_concept(run.settings)
    slices = select_slices(run.sprites.latents, other, run.settings.balance)
    others = shuffle_index(run, slices.others)
    fractions = FRACTIONS if run.settings.plot_curve else (run.settings.frac,)

    def train_on(fraction: float) -> tuple[dict[str, Tensor], int, int]:
        training = torch.cat([slices.training, others[: int(fraction * len(others))]])
        generator, progress = train_generator(run, training, other)
        return generator.state_dict(), progress.done, progress.total

    samplers = {}
    trained = run.workers.share_out(fractions, train_on)
    run.workers.note_part("shares", len(trained), len(fractions))
    for fraction, (weights, iterations, wanted) in zip(fractions, trained, strict=False):
        generator = build_generator(run, other)
        generator.load_state_dict(weights)
        samplers[f"{fraction:.0%}"] = build_generator_sampler(generator, other)
        run.workers.note_part(f"training iterations at {fraction:.0%}", iterations, wanted)
    with run.workers.finish_results():
        figures = measure_samplers(run, samplers, slices, other)
    energy = read_energy_figures(run)
    if run.settings.plot_curve:
        plot_curve(run, fractions[: len(trained)], figures, energy)
    return figures | energy


def read_energy_figures(run: ConceptRun) -> Figures:
    """Return the figures of the energy models from gentest.json for the same slices; none if gentest has not run."""
    folder = run.results.folder
    path = folder.parents[1] / "gentest" / folder.name / "gentest.json"
    if not path.exists():
        print(f"note: the energy models are not compared, because {path} is missing; task=gentest writes it")
        return {}
    with report_unreadable_file(path):
        figures: Any = read_json(path, 1 << 20)
        rows = {name: row for name, row in figures["figures"].items() if name.startswith("energy, ")}
        numbers = [number for row in (rows["energy, unseen"], *rows.values()) for number in row.values()]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("a figure is not a number")
    if "no sprite" not in rows["energy, unseen"]:
        print(f"note: the energy models are not compared, because {path} is of an earlier version; repeat task=gentest")
        return {}
    return rows


def plot_curve(run: ConceptRun, fractions: Sequence[float], figures: Figures, energy: Figures) -> None:
    """Plot the error and the joint accuracy of the generator over the fractions, and write them to an .npy file.

    energy: the figures of the energy models, which become horizontal lines.
    """
    rows = [figures[f"{fraction:.0%}, unseen"] for fraction in fractions]
    titles, panels = {"MSE": "mean squared error", "jointly": "share right in both concepts"}, {}
    for name, title in titles.items():
        panels[title] = {"generator": (fractions, [row[name] for row in rows])}
        if energy:
            panels[title]["energy models, share 0"] = (fractions, [energy["energy, unseen"][name]] * len(fractions))
    xlabel = "share of the sprites with both concepts varied that is trained on"
    pictures.plot_lines(panels, run.add_file("curve.png"), xlabel=xlabel, shares=[titles["jointly"]])
    curve = np.array([fractions, *([row[name] for row in rows] for name in titles)])
    write_file(run.add_file("curve.npy"), lambda file: np.save(file, curve))

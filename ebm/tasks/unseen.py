"""Generalisation to combinations that were not in the training data: tasks gentest and genbaseline of ebm_combine.py.

    seen, unseen = select_slices(run.sprites.latents, "size")  # indices of sprites

The training data are two slices of the latents: in one only the position varies, in the other only another concept. The
test data are sprites in which both differ. Two energy models, trained together, are compared with a feed-forward
generator.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
import models
from ebm.readers import dsprites
from ebm.readers.dsprites import CONCEPTS
from ebm.settings import CombineSettings, TrainSettings
from ebm.support import pictures
from ebm.support.hardware import allow_tf32
from ebm.support.progress import Progress
from ebm.tasks.concepts import ROWS, ConceptRun, Figures, compute_share, judge_latents
from ebm.training.acceleration import Acceleration
from ebm.training.state import State
from models import draw_noise_images, freeze_energy
from sampling import check_finite, langevin
from train import train_step
from utils import REPLAY_SIZE, ClippedAdam, ReplayBuffer

LEARNING_RATE = 1e-3  # learning rate of the generator
REPLAY_RATE = 0.05  # share of the chains that start from the replay buffer
FRACTIONS = tuple(k / 10 for k in range(11))  # shares of the unseen combinations that `plot_curve` trains on

SpriteSampler = Callable[[Tensor], Tensor]  # latents (N, 5) -> images (N, 1, 64, 64)


def choose_other_concept(settings: CombineSettings) -> str:
    """Return the concept that varies besides the position: size, shape or rot."""
    return "shape" if settings.joint_shape else "rot" if settings.joint_rot else "size"


def select_slices(latents: Tensor, other: str) -> tuple[Tensor, Tensor]:
    """Return the indices of the training sprites and those of the unseen combinations.

    latents: of all sprites (SIZE, 5). The training sprites are two slices, see `dsprites.SUBSETS`; the smaller one is
    repeated so that both weigh the same. The unseen combinations share the latents that both slices fix, and are in
    neither slice.
    """
    position, other_slice = (dsprites.is_in_subset(latents, subset) for subset in ("pos", other))
    first, second = position.nonzero()[:, 0], other_slice.nonzero()[:, 0]
    training = torch.cat([first, second.repeat(-(-len(first) // len(second)))[: len(first)]])
    fixed = dict(dsprites.SUBSETS["pos"].items() & dsprites.SUBSETS[other].items())
    plane = dsprites.match_latents(latents, fixed)
    return training, (plane & ~position & ~other_slice).nonzero()[:, 0]


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

    def energy(self, weights: models.Weights, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the sum of the energies (N,) of images (N, C, H, W) under labels (N, sum of widths)."""
        assert labels is not None, "the networks are conditional"
        total = images.new_zeros(len(images))
        for i, (network, part) in enumerate(zip(self.networks, labels.split(self.widths, 1), strict=True)):
            prefix = f"{i}."
            prepared = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
            total = total + network.energy(prepared, images, part)
        return total


def build_product(run: ConceptRun, other: str) -> ProductNetwork:
    """Return the product of untrained networks for the position and for the other concept."""
    settings, generator = run.settings, torch.Generator().manual_seed(run.settings.seed)
    parts = []
    for concept in ("pos", other):
        config = models.ModelConfig(
            "DspritesNet",
            image_shape=(1, dsprites.SIDE, dsprites.SIDE),
            num_filters=settings.num_filters or 64,
            label_size=CONCEPTS[concept].label_size,
            spec_norm=settings.spec_norm is not False,
            swish_act=bool(settings.swish_act),
        )
        parts.append(models.build_model(config, generator))
    return ProductNetwork(parts).to(run.generator.device)


def train_product(run: ConceptRun, product: ProductNetwork, seen: Tensor, other: str) -> None:
    """Train the networks of a product together by contrastive divergence with the KL term.

    5 % of the chains start from the replay buffer. seen: indices of the training sprites. other: the other concept.
    """
    settings = TrainSettings(num_steps=run.settings.num_steps, step_lr=run.settings.step_lr)
    buffer = ReplayBuffer(REPLAY_SIZE, product.config.image_shape, run.generator.device)
    state = State(
        model=product,
        optimizer=ClippedAdam(product.parameters(), lr=run.settings.lr),
        buffer=buffer,
        batches=data.Batches(len(seen), run.settings.batch_size, run.settings.seed, device=run.generator.device),
        generator=run.generator,
        acceleration=Acceleration(run.settings.precision),
    )
    progress = Progress(run.settings.break_steps, what="training of the energy")
    for iteration in range(1, run.settings.break_steps + 1):
        index = seen[state.batches.next()]
        start = draw_starts(state)
        labels = join_labels(run.sprites.latents[index], other)
        with allow_tf32(run.settings.precision):
            step = train_step(state, settings, run.render_images(index), labels, start, lambda: None)
        buffer.push(step.samples)
        if iteration % 10 == 0:
            progress.text = f"e_pos {step.e_pos.mean():+.4f} e_neg {step.e_neg.mean():+.4f}"
            check_finite(step.loss, "lower `step_lr` or `lr`")
        progress.update(iteration)
    product.eval()


def draw_starts(state: State) -> Tensor:
    """Draw the start of an iteration's chains: noise, and for 5 % of them samples from the replay buffer."""
    n, generator = state.batches.batch_size, state.generator
    start = draw_noise_images(state.model.config, n, generator)
    if len(state.buffer):
        is_replayed = torch.rand(n, 1, 1, 1, generator=generator, device=generator.device) < REPLAY_RATE
        start = torch.where(is_replayed, state.buffer.sample(n, generator), start)
    return start


def build_product_sampler(run: ConceptRun, product: ProductNetwork, other: str) -> SpriteSampler:
    """Return a function that samples images for latents, by chains from noise as in training."""
    energy = freeze_energy(product, precision=run.settings.precision)

    def sample(latents: Tensor) -> Tensor:
        with allow_tf32(run.settings.precision):
            end = langevin(
                energy.under(join_labels(latents, other)),
                draw_noise_images(product.config, len(latents), run.generator),
                num_steps=run.settings.num_steps,
                step_lr=run.settings.step_lr,
                generator=run.generator,
            )
        return check_finite(end, "lower `step_lr`")

    return sample


def load_or_train_product(run: ConceptRun, seen: Tensor, other: str) -> ProductNetwork:
    """Return the trained networks: load those of an earlier run, or train them now and save them as checkpoints."""
    paths = [run.folder / concept / f"model_{run.settings.break_steps}.pt" for concept in ("pos", other)]
    if not run.settings.train and all(path.exists() for path in paths):
        print(f"trained before: {', '.join(map(str, paths))}; train=True trains anew")
        return ProductNetwork([checkpoint.load_energy(path, device=run.generator.device) for path in paths])
    product = build_product(run, other)
    train_product(run, product, seen, other)
    for concept, path, network in zip(("pos", other), paths, product.networks, strict=True):
        contents = {"config": dataclasses.asdict(network.config), "model": network.state_dict()}
        flags = {"dataset": "dsprites", f"cond_{concept}": True, "step_lr": run.settings.step_lr}
        checkpoint.save(path, contents | {"iteration": run.settings.break_steps, "flags": flags})
        run.files.append(path)
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


def train_generator(run: ConceptRun, generator: SpriteGenerator, trained: Tensor, other: str) -> SpriteSampler:
    """Train a generator on sprites by mean squared error; return a function that samples images for latents.

    trained: indices of the sprites. other: the other concept.
    """
    optimizer = torch.optim.Adam(generator.parameters(), lr=LEARNING_RATE)
    batches = data.Batches(len(trained), run.settings.batch_size, run.settings.seed, device=trained.device)
    progress = Progress(run.settings.break_steps, what="training of the generator")
    for iteration in range(1, run.settings.break_steps + 1):
        index = trained[batches.next()]
        images = generator(join_labels(run.sprites.latents[index], other))
        loss = nn.functional.mse_loss(images, run.render_images(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0:
            progress.text = f"loss {loss.item():.5f}"
        progress.update(iteration)
    return torch.no_grad()(lambda latents: generator(join_labels(latents, other)).clamp(0, 1))


# ---- the tasks ----


def shuffle_index(run: ConceptRun, index: Tensor) -> Tensor:
    """Return an index (N,) in random order, which is the same for the same seed."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(run.settings.seed))
    return index[order.to(index.device)]


def measure_samplers(
    run: ConceptRun, samplers: Mapping[str, SpriteSampler], seen: Tensor, unseen: Tensor, other: str
) -> Figures:
    """Return the errors of samplers on unseen and on seen combinations, one row for each; draw a picture.

    samplers: by name. seen, unseen: indices of sprites. A row has the mean squared error to the true images, and the
    share of images that are right in the position, in the other concept and in both.
    """
    number = run.settings.limit or run.settings.batch_size
    sets = {"unseen": shuffle_index(run, unseen)[:number], "seen": shuffle_index(run, seen)[:number]}
    progress = Progress(len(samplers) * sum(map(len, sets.values())), what="images")
    samples = {}
    for name, sampler in samplers.items():
        for kind, index in sets.items():
            parts = []
            for part in index.split(run.settings.batch_size):
                parts.append(sampler(run.sprites.latents[part]))
                progress.advance(len(part))
            samples[name, kind] = torch.cat(parts)
    columns = {name: samples[name, "unseen"][:ROWS] for name in samplers}
    true = run.render_images(sets["unseen"][:ROWS])
    pictures.save_panel({"true": true} | columns, run.add_file("unseen.png"), scale=2)

    nearest, _ = dsprites.find_nearest_sprites(torch.cat(list(samples.values())))
    parts_by_set = nearest.split([len(images) for images in samples.values()])
    figures: Figures = {}
    for ((name, kind), images), latents in zip(samples.items(), parts_by_set, strict=True):
        truths = judge_latents(latents, run.sprites.latents[sets[kind]])
        figures[f"{name}, {kind}"] = {
            "MSE": measure_squared_error(images, run.render_images(sets[kind])),
            "pos right": compute_share(truths["pos"]),
            f"{other} right": compute_share(truths[other]),
            "jointly": compute_share(truths["pos"] & truths[other]),
        }
    return figures


def measure_squared_error(images: Tensor, true: Tensor) -> float:
    """Return the mean squared error of images to the true ones, over all pixels."""
    return (images - true).square().mean().item()


def build_generator(run: ConceptRun, other: str) -> SpriteGenerator:
    """Return an untrained generator with about as many parameters as the two energy networks."""
    product = build_product(run, other)
    generator = build_generator_of_size(product.config.label_size, count_parameters(product), run.settings.seed)
    return generator.to(run.generator.device)


def compare_with_generator(run: ConceptRun) -> Figures:
    """Compare energy models with a generator, trained on two slices, on combinations that are in neither slice."""
    other = choose_other_concept(run.settings)
    seen, unseen = select_slices(run.sprites.latents, other)
    product, generator = load_or_train_product(run, seen, other), build_generator(run, other)
    samplers = {
        "energy": build_product_sampler(run, product, other),
        "generator": train_generator(run, generator, seen, other),
    }
    figures = measure_samplers(run, samplers, seen, unseen, other)
    true = run.render_images(shuffle_index(run, unseen)[: run.settings.batch_size])
    figures["MSE of black images"] = measure_squared_error(torch.zeros_like(true), true)
    for name, network in (("energy", product), ("generator", generator)):
        figures[f"parameters, {name}"] = count_parameters(network)
    return figures


def measure_generator(run: ConceptRun) -> Figures:
    """Measure the generator after training on the slices and on a share of the other combinations (`frac`).

    With `plot_curve` the shares from 0 to 1 follow one another. The combinations that are measured are the last to be
    trained on: up to a share of about 0.8 they are unseen.
    """
    other = choose_other_concept(run.settings)
    seen, unseen = select_slices(run.sprites.latents, other)
    fractions = FRACTIONS if run.settings.plot_curve else (run.settings.frac,)
    samplers = {}
    for fraction in fractions:
        training = torch.cat([seen, shuffle_index(run, unseen).flip(0)[: round(fraction * len(unseen))]])
        samplers[f"{fraction:.0%}"] = train_generator(run, build_generator(run, other), training, other)
    figures = measure_samplers(run, samplers, seen, unseen, other)
    energy = read_energy_figures(run)
    if run.settings.plot_curve:
        plot_curve(run, fractions, figures, energy)
    return figures | energy


def read_energy_figures(run: ConceptRun) -> Figures:
    """Return the figures of the energy models from gentest.json for the same slices; none if gentest has not run."""
    path = run.folder.parents[1] / "gentest" / run.folder.name / "gentest.json"
    if not path.exists():
        print(f"note: the energy models are not compared, because {path} is missing; task=gentest writes it")
        return {}
    figures = json.loads(path.read_text())["figures"]
    return {name: row for name, row in figures.items() if name.startswith("energy, ")}


def plot_curve(run: ConceptRun, fractions: Sequence[float], figures: Figures, energy: Figures) -> None:
    """Plot the error and the joint accuracy of the generator over the fractions, and write them to an .npy file.

    energy: the figures of the energy models, which become horizontal lines.
    """
    rows = [figures[f"{fraction:.0%}, unseen"] for fraction in fractions]
    panels = {}
    for name in ("MSE", "jointly"):
        panels[name] = {"generator": (fractions, [row[name] for row in rows])}
        if energy:
            panels[name]["energy, 0"] = (fractions, [energy["energy, unseen"][name]] * len(fractions))
    pictures.plot_lines(panels, run.add_file("curve.png"), xlabel="share of the other combinations that is trained on")
    np.save(run.add_file("curve.npy"), np.array([fractions, *(panels[name]["generator"][1] for name in panels)]))

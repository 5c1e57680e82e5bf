"""Generalisation to combinations never seen: tasks gentest and genbaseline of ebm_combine.py.

    seen, unseen = slices(run.sprites.latents, "size")  # indices of sprites

Position and another concept vary one at a time in what is trained on, two slices of the latents; both vary at once in
what is tested. Two energy models, trained as one, are compared with a feed-forward generator.
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
import combine
import data
import dsprites
import models
import pictures
import training
from acceleration import PRECISIONS, Acceleration, products_in
from combine import Figures, Run
from dsprites import CONCEPTS
from ebm.settings import CombineSettings, TrainSettings
from optimizer import ClippedAdam
from sampling import langevin
from utils import Progress, ReplayBuffer

LEARNING_RATE = 1e-3  # of the generator
REPLAY_RATE = 0.05  # of the chains start from earlier end points
FRACTIONS = tuple(k / 10 for k in range(11))  # of the unseen combinations that `plot_curve` trains on

Sampler = Callable[[Tensor], Tensor]  # latents (N, 5) -> images (N, 1, 64, 64)


def other_concept(settings: CombineSettings) -> str:
    """Return what varies besides the position."""
    return "shape" if settings.joint_shape else "rot" if settings.joint_rot else "size"


def slices(latents: Tensor, other: str) -> tuple[Tensor, Tensor]:
    """Return the sprites, as indices, that are trained on, and the combinations of the two slices that are not.

    latents: of all sprites (SIZE, 5). The slices are `dsprites.SUBSETS`, the smaller one repeated to balance them; what
    both fix is fixed in the combinations.
    """
    position, other_slice = (dsprites.in_subset(latents, subset) for subset in ("pos", other))
    first, second = position.nonzero()[:, 0], other_slice.nonzero()[:, 0]
    seen = torch.cat([first, second.repeat(-(-len(first) // len(second)))[: len(first)]])
    fixed = dict(dsprites.SUBSETS["pos"].items() & dsprites.SUBSETS[other].items())
    plane = dsprites.matching(latents, fixed)
    return seen, (plane & ~position & ~other_slice).nonzero()[:, 0]


def labels_of(latents: Tensor, other: str) -> Tensor:
    """Return position and the other concept of latents (N, 5) as one label, side by side."""
    return torch.cat([dsprites.label_vectors(latents, concept) for concept in ("pos", other)], 1)


# ---- two energy models as one ----


class Product(models.EnergyNetwork):
    """Conditional networks as one: energies add, which multiplies the densities; labels lie side by side."""

    def __init__(self, networks: Sequence[models.EnergyNetwork]):
        nn.Module.__init__(self)
        self.parts = nn.ModuleList(networks)  # for their parameters
        self.networks = tuple(networks)
        self.widths = [network.config.label_size for network in networks]
        self.config = dataclasses.replace(networks[0].config, label_size=sum(self.widths))

    def prepare(self, **settings: Any) -> models.Weights:  # type: ignore[override]
        """Return every network's weights, see `models.EnergyNetwork.prepare`, their names behind its number."""
        prepared = [network.prepare(**settings) for network in self.networks]
        return {f"{i}.{name}": tensor for i, weights in enumerate(prepared) for name, tensor in weights.items()}

    def energy(self, weights: models.Weights, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the sum of the energies (N,) of images (N, C, H, W) under labels (N, sum of widths)."""
        assert labels is not None, "the networks are conditional"
        total = images.new_zeros(len(images))
        for i, (network, own) in enumerate(zip(self.networks, labels.split(self.widths, 1), strict=True)):
            start = f"{i}."
            mine = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
            total = total + network.energy(mine, images, own)
        return total


def new_product(run: Run, other: str) -> Product:
    """Return untrained networks of position and the other concept."""
    settings, generator = run.settings, torch.Generator().manual_seed(run.settings.seed)
    parts = []
    for concept in ("pos", other):
        config = models.ModelConfig(
            "DspritesNet",
            image_shape=(1, dsprites.SIDE, dsprites.SIDE),
            num_filters=settings.num_filters or 64,
            label_size=CONCEPTS[concept].label_size,
            spec_norm=settings.spec_norm is not False,
            swish_act=settings.swish_act is not False,
        )
        parts.append(models.build_model(config, generator))
    return Product(parts).to(run.generator.device)


def train_product(run: Run, product: Product, seen: Tensor, other: str) -> None:
    """Train the networks together: contrastive divergence with the KL term, 5 % of the chains from earlier ones."""
    settings = TrainSettings(num_steps=run.settings.num_steps, step_lr=run.settings.step_lr, pcd=True)
    state = training.State(
        model=product,
        optimizer=ClippedAdam(product.parameters(), lr=run.settings.lr),
        buffer=ReplayBuffer(training.REPLAY_SIZE, product.config.image_shape, run.generator.device),
        batches=data.Batches(len(seen), run.settings.batch_size, run.settings.seed, device=run.generator.device),
        generator=run.generator,
        acceleration=Acceleration(run.settings.precision),
    )
    progress = Progress(run.settings.break_steps, what="training of the energy")
    for iteration in range(1, run.settings.break_steps + 1):
        index = seen[state.batches.next()]
        state.previous = chain_start(state)  # with `pcd` the chains start there
        labels = labels_of(run.sprites.latents[index], other)
        with products_in(run.settings.precision):
            step = training.train_step(state, settings, run.images(index), labels, average=lambda: None)
        state.buffer.push(step.samples)
        if iteration % 10 == 0:
            progress.text = f"e_pos {step.e_pos.mean():+.4f} e_neg {step.e_neg.mean():+.4f}"
            combine.check_finite(step.loss)
        progress.update(iteration)
    product.eval()


def chain_start(state: training.State) -> Tensor:
    """Return where an iteration's chains start: noise, 5 % earlier end points."""
    n, generator = state.batches.batch_size, state.generator
    start = training.noise_images((n, *state.model.config.image_shape), generator, network="DspritesNet")
    if len(state.buffer):
        replayed = torch.rand(n, 1, 1, 1, generator=generator, device=generator.device) < REPLAY_RATE
        start = torch.where(replayed, state.buffer.sample(n, generator), start)
    return start


def product_sampler(run: Run, product: Product, other: str) -> Sampler:
    """Return what samples images for latents, by chains from noise as in training."""
    weights = models.spectral_norm_once(product, PRECISIONS[run.settings.precision])

    def sample(latents: Tensor) -> Tensor:
        labels = labels_of(latents, other)
        noise = training.noise_images((len(latents), *product.config.image_shape), run.generator, network="DspritesNet")
        with products_in(run.settings.precision):
            chain = langevin(
                lambda x: product.energy(weights, x, labels),
                noise,
                num_steps=run.settings.num_steps,
                step_lr=run.settings.step_lr,
                generator=run.generator,
            )
        return combine.check_finite(chain)

    return sample


def trained_product(run: Run, seen: Tensor, other: str) -> Product:
    """Return the trained networks, kept from an earlier run or trained now and kept as models that any script loads."""
    paths = [run.folder / concept / f"model_{run.settings.break_steps}.pt" for concept in ("pos", other)]
    if not run.settings.train and all(path.exists() for path in paths):
        print(f"trained before: {', '.join(map(str, paths))}; train=True trains anew")
        return Product([checkpoint.load_energy(path, device=run.generator.device) for path in paths])
    product = new_product(run, other)
    train_product(run, product, seen, other)
    for concept, path, network in zip(("pos", other), paths, product.networks, strict=True):
        contents = {"config": dataclasses.asdict(network.config), "model": network.state_dict()}
        flags = {"dataset": "dsprites", f"cond_{concept}": True, "step_lr": run.settings.step_lr}
        checkpoint.save(path, contents | {"iteration": run.settings.break_steps, "flags": flags})
        run.files.append(path)
    return product


# ---- the generator ----


class Generator(nn.Module):
    """Images from labels, feed-forward: DspritesNet turned round, with transposed convolutions.

    The release's genbaseline imports a generator that it does not contain; this one is ours. Two dense layers, four
    doublings by 4x4 transposed convolutions with a label-dependent bias before each, as DspritesNet has them, and a 3x3
    convolution. `matched_generator` gives it as many parameters as the energy networks it is compared with.
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
        """Return images (N, 1, 64, 64) for labels (N, label_size), unbounded: with a sigmoid they stick at black."""
        x = self.dense(labels).view(len(labels), -1, 4, 4)
        for bias, doubling in zip(self.biases, self.doublings, strict=True):
            x = nn.functional.silu(doubling(x + bias(labels)[:, :, None, None]))
        return self.last(x)


def parameters(model: nn.Module) -> int:
    """Return how many parameters a network has."""
    return sum(parameter.numel() for parameter in model.parameters())


def matched_generator(label_size: int, count: int, seed: int) -> Generator:
    """Return an untrained generator with as many parameters as `count`, or nearly: the nearest that there is."""
    with torch.device("meta"):
        widths = range(1, math.isqrt(count))
        place = bisect.bisect(widths, count, key=lambda width: parameters(Generator(label_size, width)))
        width = min(
            widths[max(place - 1, 0) : place + 1], key=lambda n: abs(parameters(Generator(label_size, n)) - count)
        )
    with torch.random.fork_rng(devices=[]):  # its layers draw from torch's own generator
        torch.manual_seed(seed)
        return Generator(label_size, width)


def train_generator(run: Run, generator: Generator, trained: Tensor, other: str) -> Sampler:
    """Train a generator on sprites, given as indices, by their mean squared error; return what samples from it."""
    optimizer = torch.optim.Adam(generator.parameters(), lr=LEARNING_RATE)
    batches = data.Batches(len(trained), run.settings.batch_size, run.settings.seed, device=trained.device)
    progress = Progress(run.settings.break_steps, what="training of the generator")
    for iteration in range(1, run.settings.break_steps + 1):
        index = trained[batches.next()]
        images = generator(labels_of(run.sprites.latents[index], other))
        loss = nn.functional.mse_loss(images, run.images(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0:
            progress.text = f"loss {loss.item():.5f}"
        progress.update(iteration)
    return torch.no_grad()(lambda latents: generator(labels_of(latents, other)).clamp(0, 1))


# ---- the tasks ----


def shuffled(run: Run, index: Tensor) -> Tensor:
    """Return an index (N,) in random order, the same for the same seed."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(run.settings.seed))
    return index[order.to(index.device)]


def measure(run: Run, samplers: Mapping[str, Sampler], seen: Tensor, unseen: Tensor, other: str) -> Figures:
    """Return how well samplers make sprites, given as indices: a row for each, on unseen and on seen combinations.

    MSE: of images to the true ones; then the share that is right in position, in the other concept and in both.
    """
    number = run.settings.limit or run.settings.batch_size
    sets = {"unseen": shuffled(run, unseen)[:number], "seen": shuffled(run, seen)[:number]}
    progress = Progress(len(samplers) * sum(map(len, sets.values())), what="images")
    samples = {}
    for name, sampler in samplers.items():
        for kind, index in sets.items():
            parts = []
            for part in index.split(run.settings.batch_size):
                parts.append(sampler(run.sprites.latents[part]))
                progress.update(progress.done + len(part))
            samples[name, kind] = torch.cat(parts)
    shown = {name: samples[name, "unseen"][: combine.ROWS] for name in samplers}
    true = run.images(sets["unseen"][: combine.ROWS])
    pictures.save_panel({"true": true} | shown, run.path("unseen.png"), scale=2)

    found = dsprites.nearest(torch.cat(list(samples.values())))[0].split([len(images) for images in samples.values()])
    figures: Figures = {}
    for ((name, kind), images), latents in zip(samples.items(), found, strict=True):
        truths = combine.judge_latents(latents, run.sprites.latents[sets[kind]])
        figures[f"{name}, {kind}"] = {
            "MSE": squared_error(images, run.images(sets[kind])),
            "pos right": combine.compute_share(truths["pos"]),
            f"{other} right": combine.compute_share(truths[other]),
            "jointly": combine.compute_share(truths["pos"] & truths[other]),
        }
    return figures


def squared_error(images: Tensor, true: Tensor) -> float:
    """Return the mean squared error over all pixels."""
    return (images - true).square().mean().item()


def new_generator(run: Run, other: str) -> Generator:
    """Return an untrained generator with as many parameters as the two energy networks."""
    product = new_product(run, other)
    generator = matched_generator(product.config.label_size, parameters(product), run.settings.seed)
    return generator.to(run.generator.device)


def compare_models(run: Run) -> Figures:
    """Train two energy models, and the generator, on two slices; sample the combinations that are in neither."""
    other = other_concept(run.settings)
    seen, unseen = slices(run.sprites.latents, other)
    product, generator = trained_product(run, seen, other), new_generator(run, other)
    samplers = {
        "energy": product_sampler(run, product, other),
        "generator": train_generator(run, generator, seen, other),
    }
    figures = measure(run, samplers, seen, unseen, other)
    true = run.images(shuffled(run, unseen)[: run.settings.batch_size])
    figures["MSE of black images"] = squared_error(torch.zeros_like(true), true)
    for name, network in (("energy", product), ("generator", generator)):
        figures[f"parameters, {name}"] = parameters(network)
    return figures


def measure_generator(run: Run) -> Figures:
    """Train the generator on the slices and on a share of the other combinations, `frac`, or all shares in turn.

    The combinations that are measured are the last to be trained on: up to a share of 0.8 or so they are unseen.
    """
    other = other_concept(run.settings)
    seen, unseen = slices(run.sprites.latents, other)
    fractions = FRACTIONS if run.settings.plot_curve else (run.settings.frac,)
    samplers = {}
    for fraction in fractions:
        trained = torch.cat([seen, shuffled(run, unseen).flip(0)[: round(fraction * len(unseen))]])
        samplers[f"{fraction:.0%}"] = train_generator(run, new_generator(run, other), trained, other)
    figures = measure(run, samplers, seen, unseen, other)
    energy = energy_figures(run)
    if run.settings.plot_curve:
        plot_curve(run, fractions, figures, energy)
    return figures | energy


def energy_figures(run: Run) -> Figures:
    """Return what gentest measured of the energy models on the same slices, if it has run."""
    path = run.folder.parents[1] / "gentest" / run.folder.name / "gentest.json"
    if not path.exists():
        print(f"note: no figures of the energy models beside these; task=gentest writes {path}")
        return {}
    figures = json.loads(path.read_text())["figures"]
    return {name: row for name, row in figures.items() if name.startswith("energy, ")}


def plot_curve(run: Run, fractions: Sequence[float], figures: Figures, energy: Figures) -> None:
    """Plot and write as .npy error and joint accuracy over the fractions; the energy models as a level line."""
    rows = [figures[f"{fraction:.0%}, unseen"] for fraction in fractions]
    panels = {}
    for name in ("MSE", "jointly"):
        panels[name] = {"generator": (fractions, [row[name] for row in rows])}
        if energy:
            panels[name]["energy, 0"] = (fractions, [energy["energy, unseen"][name]] * len(fractions))
    pictures.plot_lines(panels, run.path("curve.png"), xlabel="share of the other combinations that is trained on")
    np.save(run.path("curve.npy"), np.array([fractions, *(panels[name]["generator"][1] for name in panels)]))

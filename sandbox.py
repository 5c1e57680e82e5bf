"""A trained energy model under examination: its energies and class logits, restricted chains, and attacks on it.

    sandbox = Sandbox(model, torch.Generator().manual_seed(0), num_steps=20, step_lr=10.0)
    energies = sandbox.energies(images, labels)  # (N,)
    restored = sandbox.chain(corrupt, labels, rounds=5)  # (N, C, H, W)
    attacked = sandbox.attack(images, classes, Attack("li", radius=8 / 255, steps=20))

Images are (N, C, H, W) in [0, 1], whatever range the model was trained on. Methods take any number of them and pass
them to the network in batches; the functions behind them are pure and know no network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from acceleration import PRECISIONS, products_in
from data import Dataset
from errors import UsageError
from sampling import Energy, input_gradient, langevin
from training import class_logits
from utils import Progress

Restriction = Callable[[Tensor, Tensor], Tensor]  # (images, where their chains started) -> allowed images


# ---------------------------------------------------------------------------------------------------------------------
# Restrictions of chains and attacks


def within_bounds(x: Tensor, start: Tensor) -> Tensor:
    """Return the images clipped to [0, 1]: no restriction by their start."""
    return x.clamp(0, 1)


def within_ball(x: Tensor, centre: Tensor, *, radius: float, norm: str = "li") -> Tensor:
    """Return the images projected onto the ball around `centre`, L∞ ("li") or L2 ("l2") per image, and onto [0, 1]."""
    offset = x - centre
    if norm == "li":
        offset = offset.clamp(-radius, radius)
    else:
        length = offset.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        offset = offset * (radius / length).clamp(max=1)
    return (centre + offset).clamp(0, 1)  # images lie in [0, 1], so clipping brings them nearer to the centre


def in_lower_half(x: Tensor, start: Tensor) -> Tensor:
    """Return the images clipped to [0, 1], their upper half as it was at the start, bit for bit."""
    half = x.shape[2] // 2
    return torch.cat([start[:, :, :half], x[:, :, half:].clamp(0, 1)], dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Attacks


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on a classifier's loss (Madry et al. 2018), within a ball around each image.

    norm: "li" or "l2". radius: of the ball, in units of the images. steps: 0 leaves images alone. draws: how often the
    gradient through a noisy classifier is drawn and averaged; 0: the attacker does not know of the noisy part.
    """

    norm: str
    radius: float
    steps: int
    draws: int = 0

    @property
    def step_size(self) -> float:
        """L∞: 2/255 as in the reference, less in balls under 8/255. L2: 2.5 radii are shared out among the steps."""
        return min(2 / 255, self.radius / 4) if self.norm == "li" else 2.5 * self.radius / max(self.steps, 1)

    def __str__(self) -> str:
        if not self.steps:
            return "none"
        ball = f"{'L∞' if self.norm == 'li' else 'L2'} ball of {self.radius * 255:g}/255"
        steps = f"{self.steps} steps of {self.step_size * 255:.3g}/255"
        seen = f"through the refinement, mean of {self.draws} draws" if self.draws else "not through the refinement"
        return f"PGD, {ball}, random start, {steps}, gradient {seen}"


def pgd(loss: Energy, images: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Return images (N, C, H, W) moved to where `loss`, of images, (N,), is high, within their balls and [0, 1]."""
    project = functools.partial(within_ball, centre=images, radius=attack.radius, norm=attack.norm)
    x = project(images + random_offset(images, attack, generator))
    for _ in range(attack.steps):
        gradient = torch.stack([input_gradient(loss, x) for _ in range(max(attack.draws, 1))]).mean(0)
        x = project(x + attack.step_size * direction(gradient, attack.norm))
    return x


def random_offset(images: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Return offsets shaped like the images, spread evenly over the attack's ball."""
    if attack.norm == "li":
        uniform = torch.rand(images.shape, generator=generator, device=images.device)
        return attack.radius * (2 * uniform - 1)
    normal = torch.randn(images.shape, generator=generator, device=images.device)
    reach = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return attack.radius * reach ** (1 / images[0].numel()) * direction(normal, "l2")


def direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the step of unit size that climbs fastest: the sign (L∞), or the gradient scaled to length 1 (L2)."""
    if norm == "li":
        return gradient.sign()
    return gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def out_of_memory(error: BaseException) -> bool:
    """Return whether this error says that a GPU's or the CPU's memory is used up."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def started(progress: Progress | str, total: int) -> Progress:
    """Return a progress bar: one that runs already, or a new one of this name."""
    return Progress(total, what=progress) if isinstance(progress, str) else progress


@dataclasses.dataclass
class Sandbox:
    """A trained model with the settings of its chains.

    num_steps, step_lr, proj_norm: of one round of Langevin dynamics with noise N(0, 0.005²), see `sampling.langevin`.
    rescale: the model was trained on images in [0, rescale]. batch_size: images at a time; it is lowered where memory
    is short. precision: what chains compute in; energies, logits and the attacks on them are those of float32. bias:
    of the class logits, (label_size,); `finetune` learns it.
    """

    model: models.EnergyNetwork
    generator: torch.Generator
    num_steps: int = 20
    step_lr: float = 10.0
    proj_norm: float = 0.0
    rescale: float = 1.0
    batch_size: int = 32
    precision: str = "float32"
    weights: models.Weights = dataclasses.field(init=False)
    chain_weights: models.Weights = dataclasses.field(init=False)
    bias: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.prepare()
        self.bias = torch.zeros(self.classes, device=self.device)

    def prepare(self) -> None:
        """Normalise the network's weights, for energies and for chains."""
        self.weights = models.spectral_norm_once(self.model)
        self.chain_weights = models.cast(self.weights, PRECISIONS[self.precision])

    @property
    def classes(self) -> int:
        """How many classes the model is conditioned on, 0: none."""
        return self.model.config.label_size

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def in_batches(
        self, function: Callable[[slice], Tensor], total: int, progress: Progress, *, each: int = 1
    ) -> Tensor:
        """Return what function(part) gives for consecutive parts of `total` images, joined.

        each: evaluations of the network per image; beyond 10, parts shrink accordingly. A part that memory cannot hold
        is halved and tried again with the same noise; later parts stay that small. Raises UsageError where one image
        is too much, and for results that are not finite.
        """
        results: list[Tensor] = []
        done = 0
        while done < total:
            size = max(1, self.batch_size * 10 // max(each, 10))
            part = slice(done, min(done + size, total))
            noise = self.generator.get_state()
            result = self.unless_out_of_memory(function, part)
            if result is None:
                if part.stop - done == 1:
                    raise UsageError("memory cannot hold the computation of a single image; try `device`=cpu")
                self.generator.set_state(noise)
                self.batch_size //= 2
                progress.say(f"note: memory is short, going on with batch_size={self.batch_size}")
                continue
            if not result.isfinite().all():
                raise UsageError(
                    "energies or images are not finite: this model has diverged; use an earlier checkpoint"
                )
            results.append(result)
            progress.update(progress.done + part.stop - done)
            done = part.stop
        return torch.cat(results)

    def unless_out_of_memory(self, function: Callable[[slice], Tensor], part: slice) -> Tensor | None:
        """Return function(part), or None where memory cannot hold it; what it had taken is free again by then."""
        try:
            return function(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    # ------------------------------------------------------------------------------------------ one batch

    def energy(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the energies (n,) of a batch; an unconditional model ignores the labels (n, label_size)."""
        return self.model.energy(self.weights, x * self.rescale, labels)

    def features(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return what enters the network's last layer, (n, width)."""
        x = x * self.rescale
        for stage in list(self.model.stages.values())[:-1]:
            x = stage(self.weights, x, labels if self.classes else None)
        return x

    def langevin(
        self,
        x: Tensor,
        labels: Tensor,
        start: Tensor,
        restrict: Restriction,
        *,
        pull: float = 1.0,
        differentiable: bool = False,
    ) -> Tensor:
        """Return a batch after one round of Langevin dynamics, restricted; pull: times the usual step_lr."""
        with products_in(self.precision):
            return langevin(
                lambda y: self.model.energy(self.chain_weights, y * self.rescale, labels),
                x,
                num_steps=self.num_steps,
                step_lr=pull * self.step_lr / self.rescale,  # gradients here are `rescale` times those of training
                proj_norm=self.proj_norm * self.rescale,
                project=lambda y: restrict(y, start),
                generator=self.generator,
                differentiable=differentiable,
            )

    def logits_of(self, x: Tensor, refine: float | None = None, *, differentiable: bool = False) -> Tensor:
        """Return −E(x, y) + bias of a batch for every class y, (n, classes).

        refine: the radius of the L∞ ball in which a round of Langevin dynamics, under each class, refines x first.
        """

        def energy(y: Tensor, labels: Tensor) -> Tensor:
            if refine is not None:
                ball = functools.partial(within_ball, radius=refine)
                y = self.langevin(y, labels, y, ball, differentiable=differentiable)
            return self.energy(y, labels)

        return class_logits(energy, x, self.classes) + self.bias

    # ------------------------------------------------------------------------------------------ any number of images

    @torch.no_grad()
    def energies(self, images: Tensor, labels: Tensor, *, progress: Progress | str = "energies") -> Tensor:
        """Return the energies (N,) of images under labels (N, label_size)."""
        progress = started(progress, len(images))
        return self.in_batches(lambda part: self.energy(images[part], labels[part]), len(images), progress)

    @torch.no_grad()
    def logits(self, images: Tensor, refine: float | None = None, *, progress: Progress | str = "classify") -> Tensor:
        """Return the class logits (N, classes) of images, see `logits_of`."""
        progress = started(progress, len(images))
        return self.in_batches(
            lambda part: self.logits_of(images[part], refine), len(images), progress, each=self.classes
        )

    def scores(self, images: Tensor, *, progress: Progress | str = "scores") -> Tensor:
        """Return −E of images (N,), where the model knows classes under the class of lowest energy."""
        if self.classes:
            return self.logits(images, progress=progress).amax(1)
        return -self.energies(images, images.new_zeros(len(images), 0), progress=progress)

    def attack(
        self,
        images: Tensor,
        classes: Tensor,
        attack: Attack,
        refine: float | None = None,
        *,
        progress: Progress | str = "attack",
    ) -> Tensor:
        """Return images moved to where the cross-entropy of their true classes (N,) is high.

        attack.draws > 0 attacks the refined logits, through the Langevin steps: what purifies is part of the target.
        """
        adaptive = attack.draws > 0

        def move(part: slice) -> Tensor:
            def loss(x: Tensor) -> Tensor:
                logits = self.logits_of(x, refine if adaptive else None, differentiable=adaptive)
                return F.cross_entropy(logits, classes[part], reduction="none")

            return pgd(loss, images[part], attack, self.generator)

        if not attack.steps:
            return images
        return self.in_batches(move, len(images), started(progress, len(images)), each=self.classes)

    def stages(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        rounds: int,
        restrict: Restriction = within_bounds,
        pull: float = 1.0,
        progress: Progress | str = "chain",
    ) -> Iterator[Tensor]:
        """Yield the images, then what each further round of Langevin dynamics makes of them, see `langevin`."""
        start, bar = x, started(progress, rounds * len(x))
        yield x
        for _ in range(rounds):

            def one_round(part: slice, x: Tensor = x) -> Tensor:
                return self.langevin(x[part], labels[part], start[part], restrict, pull=pull)

            x = self.in_batches(one_round, len(x), bar)
            yield x

    def chain(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        rounds: int,
        restrict: Restriction = within_bounds,
        pull: float = 1.0,
        progress: Progress | str = "chain",
    ) -> Tensor:
        """Return the last of `stages`."""
        for stage in self.stages(x, labels, rounds=rounds, restrict=restrict, pull=pull, progress=progress):
            x = stage
        return x

    def finetune(self, images: Tensor, labels: Tensor, *, lr: float = 1e-3) -> float:
        """Train the network and the bias on the cross-entropy of the class logits, one pass; return the mean loss.

        labels: one-hot (N, classes). Dropout stays off, as in all of the sandbox.
        """
        bias = self.bias.clone().requires_grad_()
        optimizer = torch.optim.Adam([*self.model.parameters(), bias], lr=lr)

        def step(part: slice) -> Tensor:
            weights = self.model.prepare(update_u=True)

            def energy(x: Tensor, y: Tensor) -> Tensor:
                return self.model.energy(weights, x * self.rescale, y)

            logits = class_logits(energy, images[part], self.classes) + bias
            losses = F.cross_entropy(logits, labels[part], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            return losses.detach()

        losses = self.in_batches(step, len(images), Progress(len(images), what="finetune"), each=self.classes)
        self.bias = bias.detach()
        self.prepare()
        return losses.mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Images


def salt_and_pepper(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images of which 5 % of the pixels are 0.1 and another 5 % are 0.9, in all channels."""
    chance = torch.rand(len(images), 1, *images.shape[2:], generator=generator, device=images.device)
    pepper = torch.where(chance < 0.05, 0.1, images)
    return torch.where((chance >= 0.05) & (chance < 0.1), 0.9, pepper)


def fitted(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images (N, c, h, w) in another shape (C, H, W): grey by luminance, colour by repetition, resized."""
    channels, *size = image_shape
    if channels == 1 and images.shape[1] == 3:
        images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    if list(images.shape[2:]) != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1)


def read_images(dataset: Dataset, index: Tensor) -> Tensor:
    """Return the images (n, C, H, W) of an index (n,) in [0, 1], as they are stored."""
    return dataset.raw(index).float().div(255)


def nearest(queries: Tensor, dataset: Dataset, count: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the L2 distances (Q, count), ascending, and indices of the images nearest to queries (Q, C, H, W).

    All images are searched, `block` at a time: memory holds that many and Q·block distances. Distances are sums of
    squares, without the cancellation of the quicker |a|² − 2ab + |b|².
    """
    flat, progress = queries.flatten(1), Progress(len(dataset), what="search")
    distances = flat.new_zeros(len(flat), 0)
    indices = torch.zeros_like(distances, dtype=torch.long)
    for places in torch.arange(len(dataset), device=flat.device).split(block):
        found = torch.cdist(flat, read_images(dataset, places).flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        distances, order = torch.cat([distances, found], 1).sort(1)
        indices = torch.cat([indices, places.expand(len(flat), -1)], 1).gather(1, order)[:, :count]
        distances = distances[:, :count]
        progress.update(int(places[-1]) + 1)
    return distances, indices


# ---------------------------------------------------------------------------------------------------------------------
# Directions in which an energy varies most


def hessian_directions(energy: Energy, image: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (count,) of largest magnitude, descending, of the Hessian at an image (C, H, W).

    And their eigenvectors (count, C, H, W), of length 1. Lanczos iteration on Hessian-vector products: at 64x64 some
    hundred backward passes, where the full matrix takes 4,096. Raises UsageError where the Hessian is zero.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    x = image[None].detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        along = torch.from_numpy(vector.astype(np.float32)).to(x.device).view_as(x)
        (result,) = torch.autograd.grad(gradient, x, along, retain_graph=True)
        return result.flatten().cpu().double().numpy()

    begin = torch.randn(x.numel(), generator=generator, device=generator.device).cpu().double().numpy()
    if not gradient.requires_grad or not product(begin).any():
        raise UsageError("the Hessian of this energy is zero, its network is piecewise linear: use `hessian`=False")
    operator = LinearOperator((len(begin), len(begin)), matvec=product, dtype=np.float64)
    values, vectors = eigsh(operator, k=count, v0=begin, tol=1e-3)
    order = np.argsort(-np.abs(values))
    found = torch.from_numpy(vectors.T[order].copy()).to(image)
    return torch.from_numpy(values[order].copy()).to(image), found.view(count, *image.shape)


def feature_directions(features: Callable[[Tensor], Tensor], image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values (count,), descending, of the Jacobian of features (1, C, H, W) -> (1, width).

    And the directions (count, C, H, W) of length 1 in which an image (C, H, W) has to move to change them most.
    """
    jacobian = torch.func.jacrev(lambda x: features(x[None]).squeeze(0), chunk_size=32)(image)  # (width, C, H, W)
    _, values, vectors = torch.linalg.svd(jacobian.flatten(1), full_matrices=False)
    return values[:count], vectors[:count].view(count, *image.shape)

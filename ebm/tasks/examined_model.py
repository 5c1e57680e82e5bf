"""Computations with a trained energy model: energies, class logits, restricted Langevin chains, and attacks.

    examined = ExaminedModel(model, torch.Generator().manual_seed(0), num_steps=20, step_lr=10.0)
    energies = examined.compute_energies(images, labels)  # (N,)
    restored = examined.run_chain(corrupt, labels, rounds=5)  # (N, C, H, W)

Images are (N, C, H, W) in [0, 1], even if the model was trained on another range. The methods accept any number of
images and pass them to the network in batches. After a signal they return the results for the images done so far.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ebm.support.errors import UsageError
from ebm.support.hardware import allow_tf32, is_out_of_memory
from ebm.support.interruption import Interruption
from ebm.support.progress import Progress
from ebm.support.sharing import ShareOut, compute_all, derive_seed
from ebm.tasks.attacks import Attack, Restriction, ascend_loss, restrict_to_ball, restrict_to_bounds
from ebm.training.distributed import Workers, work_alone
from models import EnergyNetwork, PreparedEnergy, compute_class_logits, freeze_energy
from sampling import compute_input_gradient, langevin
from utils import ClippedAdam

MOST = 50_000  # largest number of images to examine at once
MOST_PIXELS = 500_000_000  # largest number of their pixels


def show_progress(progress: Progress | str, total: int) -> Progress:
    """Return `progress` if it is a bar already, else a new bar of this name. total: its number of items."""
    return Progress(total, what=progress) if isinstance(progress, str) else progress


def choose_size(batch_size: int, each: int) -> int:
    """Return how many images to compute at once if each takes so many evaluations of the network.

    batch_size: the number of images for up to ten evaluations; if there are more, it is less in proportion.
    """
    return max(1, batch_size * 10 // max(each, 10))


def count_most_images(image_shape: tuple[int, int, int]) -> int:
    """Return how many images (C, H, W) to examine at most, so that memory surely holds them: 2 GB as floats."""
    return min(MOST, MOST_PIXELS // math.prod(image_shape))


class EnergyTraits(NamedTuple):
    """What an energy says of N images, each under its class of lowest energy if there are classes."""

    energy: np.ndarray  # (N,)
    slope: np.ndarray  # the length of the energy's gradient at the image (N,)
    end: np.ndarray  # the energy at the end of one round of Langevin steps from the image (N,)
    energies: np.ndarray  # under every class (N, classes)
    features: np.ndarray  # the input of the network's last layer (N, width)


@dataclasses.dataclass
class ExaminedModel:
    """A trained model with the settings of its chains.

    num_steps, step_lr, proj_norm, noise_std: of one round, which is a Langevin chain, see `sampling.langevin`. rescale:
    the model was trained on images in [0, rescale]. batch_size: images that the network processes at once, fewer if
    memory is short. precision: the number type of chains; energies, logits and attacks on logits are computed in
    float32. workers: those that share the batches; they note computations that a signal has ended.
    """

    model: EnergyNetwork
    generator: torch.Generator
    num_steps: int = 20
    step_lr: float = 10.0
    proj_norm: float = 0.0
    noise_std: float = 0.005
    rescale: float = 1.0
    batch_size: int = 32
    precision: str = "float32"
    workers: Workers = dataclasses.field(default_factory=work_alone)
    memory_limit: int | None = None  # images at once after memory was exhausted, None before
    energy: PreparedEnergy = dataclasses.field(init=False)
    chain_energy: PreparedEnergy = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.freeze()

    def freeze(self) -> None:
        """Prepare the energy with the current weights, in float32 and in the number type of chains."""
        self.energy = freeze_energy(self.model, rescale=self.rescale)
        self.chain_energy = freeze_energy(self.model, rescale=self.rescale, precision=self.precision)

    @property
    def classes(self) -> int:
        """The number of classes that the model is conditioned on; 0 if it is unconditional."""
        return self.model.config.label_size

    @property
    def images_at_a_time(self) -> int:
        """The number of images that the network processes at once: `batch_size`, or as many as memory can hold."""
        return self.batch_size if self.memory_limit is None else self.memory_limit

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.generator.device

    def compute_in_batches(
        self,
        function: Callable[[slice], Tensor],
        total: int,
        progress: Progress,
        *,
        each: int = 1,
        rounds: int = 1,
        share_out: ShareOut | None = None,
    ) -> Tensor:
        """Return the concatenated results of function(part) for consecutive parts of `total` images, or the first ones.

        Each part draws random numbers of its own, so that the workers, who share the parts, get the results of one.
        each: evaluations of the network per image; if more than 10, parts are smaller in proportion. rounds: how often
        progress counts an image; the function counts all but the last. share_out: replaces that of the workers. Raises
        UsageError if memory cannot hold a single image, and for results that are not finite.
        """
        size, before = choose_size(self.batch_size, each), progress.done
        parts = [slice(start, min(start + size, total)) for start in range(0, total, size)]
        seed = int(torch.randint(2**31, (), generator=self.generator, device=self.device))
        noise = self.generator.get_state()

        def compute_part(part: slice) -> Tensor:
            self.generator.manual_seed(derive_seed(seed, part.start))
            result = self.compute_in_pieces(function, part, each, progress)
            done = progress.done + (part.stop - part.start) * self.workers.size
            progress.update(min(done, before + rounds * total))
            return result

        with progress.keep_talking():
            results = (share_out or self.workers.share_out)(parts, compute_part)
        self.generator.set_state(noise)
        if len(results) < len(parts):
            self.workers.note_part(progress.what, parts[len(results)].start, total)
        elif progress.done < before + rounds * total:  # the last part was another worker's
            progress.update(before + rounds * total)
        return torch.cat([result.to(self.device) for result in results])

    def require_all(self) -> None:
        """Raise Interruption if a signal has ended a computation before all of its images were done."""
        if self.workers.unfinished:
            assert self.workers.signal is not None, "only a signal leaves images undone"
            raise Interruption(self.workers.signal)

    def compute_in_pieces(
        self, function: Callable[[slice], Tensor], part: slice, each: int, progress: Progress
    ) -> Tensor:
        """Return function(part), computed in pieces if memory cannot hold the part.

        The size is then halved, for all later parts, too, and the piece is computed again with the same noise.
        """
        results: list[Tensor] = []
        done = part.start
        while done < part.stop:
            piece = slice(done, min(done + choose_size(self.images_at_a_time, each), part.stop))
            noise = self.generator.get_state()
            result = self.compute_if_memory_allows(function, piece)
            if result is None:
                if piece.stop - done == 1:
                    raise UsageError("memory cannot hold the computation of a single image; try `device`=cpu")
                self.generator.set_state(noise)
                self.memory_limit = self.images_at_a_time // 2
                progress.say(f"note: memory is short, going on with batch_size={self.images_at_a_time}")
                continue
            if not result.isfinite().all():
                raise UsageError(
                    "energies or images are not finite: this model has diverged; use an earlier checkpoint"
                )
            results.append(result)
            done = piece.stop
        return torch.cat(results)

    def compute_if_memory_allows(self, function: Callable[[slice], Tensor], part: slice) -> Tensor | None:
        """Return function(part), or None if memory cannot hold it; the memory that it took is then free again."""
        try:
            return function(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    # ------------------------------------------------------------------------------------------ one batch

    def compute_features(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the features (n, width) of a batch: the input of the network's last layer."""
        x = x * self.rescale
        for stage in list(self.model.stages.values())[:-1]:
            x = stage(self.energy.weights, x, labels if self.classes else None)
        return x

    def run_round(
        self,
        x: Tensor,
        labels: Tensor,
        start: Tensor,
        restrict: Restriction,
        *,
        pull: float = 1.0,
        noise: Tensor | float = 1.0,
        differentiable: bool = False,
    ) -> Tensor:
        """Return a batch of images after one round, a restricted Langevin chain.

        start: the images from which `restrict` measures. pull: a factor of the step size. noise: a factor of the noise,
        which may differ between pixels. differentiable: let gradients flow back through the chain.
        """
        # A piecewise linear energy has second derivatives of 0, which autograd would compute: gradients pass through a
        # step unchanged, but where `restrict` stops them.
        differentiable = differentiable and not self.model.is_piecewise_linear
        with allow_tf32(self.precision):
            return langevin(
                self.chain_energy.under(labels),
                x,
                num_steps=self.num_steps,
                step_lr=pull * self.step_lr / self.rescale,  # the gradient is `rescale` times that in training
                noise_std=noise * self.noise_std,
                proj_norm=self.proj_norm * self.rescale,
                project=lambda y: restrict(y, start),
                generator=self.generator,
                differentiable_in=[start] if differentiable else None,  # the centre of a ball that moves with x
            )

    def classify_batch(self, x: Tensor, refine: float | None = None, *, differentiable: bool = False) -> Tensor:
        """Return the class logits −E(x, y) of a batch x for every class y, (n, classes).

        refine: first refine x under each class by one round of Langevin steps, within an L∞ ball of this radius.
        """

        def energy(y: Tensor, labels: Tensor) -> Tensor:
            if refine is not None:
                ball = functools.partial(restrict_to_ball, radius=refine)
                y = self.run_round(y, labels, y, ball, differentiable=differentiable)
            return self.energy(y, labels)

        return compute_class_logits(energy, x, self.classes)

    def attack_batch(
        self, x: Tensor, classes: Tensor, attack: Attack, offset: Tensor, refine: float | None = None
    ) -> Tensor:
        """Return adversarial images of a batch, which have a high cross-entropy for their true classes (n,).

        offset: added to x before the first step. With attack.draws > 0 the attack is adaptive: it follows gradients
        through the Langevin steps of the refinement, see `classify_batch`.
        """
        adaptive = attack.draws > 0

        def loss(x: Tensor) -> Tensor:
            logits = self.classify_batch(x, refine if adaptive else None, differentiable=adaptive)
            return F.cross_entropy(logits, classes, reduction="none")

        return ascend_loss(loss, x, offset, attack)

    # ------------------------------------------------------------------------------------------ any number of images

    @torch.no_grad()
    def compute_energies(self, images: Tensor, labels: Tensor, *, progress: Progress | str = "energies") -> Tensor:
        """Return the energies (N,) of images under labels (N, label_size)."""
        progress = show_progress(progress, len(images))
        return self.compute_in_batches(lambda part: self.energy(images[part], labels[part]), len(images), progress)

    @torch.no_grad()
    def compute_logits(
        self, images: Tensor, refine: float | None = None, *, progress: Progress | str = "classify"
    ) -> Tensor:
        """Return the class logits (N, classes) of images, see `classify_batch`."""
        progress = show_progress(progress, len(images))
        return self.compute_in_batches(
            lambda part: self.classify_batch(images[part], refine), len(images), progress, each=self.classes
        )

    def compute_scores(self, images: Tensor, *, progress: Progress | str = "scores") -> Tensor:
        """Return the scores −E of images (N,); a conditional model takes the class of lowest energy for each image."""
        if self.classes:
            return self.compute_logits(images, progress=progress).amax(1)
        return -self.compute_energies(images, images.new_zeros(len(images), 0), progress=progress)

    @torch.no_grad()
    def measure_traits(self, images: Tensor, *, progress: Progress | str = "scores") -> EnergyTraits:
        """Return what the energy says of images: what scores of outliers are made of."""

        def measure(part: slice) -> Tensor:
            x, labels = images[part], images.new_zeros(len(images[part]), 0)
            energies = labels
            if self.classes:
                energies = -self.classify_batch(x)
                labels = F.one_hot(energies.argmin(1), self.classes).to(x.dtype)
            energy = self.energy.under(labels)
            slope = compute_input_gradient(energy, x).flatten(1).norm(dim=1)
            end = self.run_round(x, labels, x, restrict_to_bounds)
            features = self.compute_features(x, labels).flatten(1)
            return torch.cat([torch.stack([energy(x), slope, energy(end)], 1), energies, features], 1)

        progress = show_progress(progress, len(images))
        found = self.compute_in_batches(measure, len(images), progress, each=self.classes).double().cpu().numpy()
        energy, slope, end = found[:, :3].T
        return EnergyTraits(energy, slope, end, found[:, 3 : 3 + self.classes], found[:, 3 + self.classes :])

    def run_stages(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        rounds: int,
        restrict: Restriction = restrict_to_bounds,
        progress: str = "chain",
    ) -> Iterator[Tensor]:
        """Yield all images at the start of a chain and after each of its rounds, see `run_round`.

        After a signal, the round that is not complete is left out; Interruption is raised in the first one.
        """
        start, bar = x, Progress(rounds * len(x), what=progress)
        yield x
        for k in range(rounds):

            def one_round(part: slice, x: Tensor = x) -> Tensor:
                return self.run_round(x[part], labels[part], start[part], restrict)

            try:
                x = self.compute_in_batches(one_round, len(x), bar)
                self.require_all()
            except Interruption:
                if k == 0:
                    raise
                self.workers.unfinished.pop(progress, None)
                self.workers.note_part(f"rounds of {progress}", k, rounds)
                return
            yield x

    def run_chain(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        rounds: int,
        restrict: Restriction = restrict_to_bounds,
        pull: float = 1.0,
        noise: Tensor | float = 1.0,
        progress: Progress | str = "chain",
    ) -> Tensor:
        """Return the images after all rounds of a chain, see `run_round`; a batch ends before the next one begins."""

        bar = show_progress(progress, rounds * len(x))

        def run_rounds(part: slice) -> Tensor:
            y = x[part]
            for k in range(rounds):
                if k:
                    bar.advance(len(y) * self.workers.size)
                y = self.run_round(y, labels[part], x[part], restrict, pull=pull, noise=noise)
            return y

        return self.compute_in_batches(run_rounds, len(x), bar, rounds=rounds)

    def finetune(self, images: Tensor, labels: Tensor, *, lr: float = 1e-3) -> float:
        """Train the network for one epoch on the cross-entropy of the class logits; return the mean loss of an image.

        labels: one-hot (N, classes). lr: learning rate of Adam. As in the reference, what is differentiated is the sum
        over a batch. Dropout stays off, as in all tasks of the sandbox. Rank 0 trains, the others receive its weights.
        """
        optimizer = ClippedAdam(self.model.parameters(), lr=lr, betas=(0.9, 0.999), clip_gradients=False)

        def step(part: slice) -> Tensor:
            energy = PreparedEnergy(self.model, self.model.prepare(update_u=True), self.rescale)
            logits = compute_class_logits(energy, images[part], self.classes)
            losses = F.cross_entropy(logits, labels[part], reduction="none")
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            return losses.detach()

        loss, noise = 0.0, self.generator.get_state()
        if self.workers.rank == 0:
            progress = Progress(len(images), what="finetune")
            losses = self.compute_in_batches(step, len(images), progress, each=self.classes, share_out=compute_all)
            loss = losses.mean().item()
        self.generator.set_state(noise)  # as on the other workers
        self.workers.broadcast(self.model.state_dict().values())
        self.freeze()
        return self.workers.share(loss)[0]

"""Train an energy of MNIST with one library, sample from it and rate images, in a process of its own.

    python benchmarks/learners.py ebmkit job.pt result.pt

`time_to_quality.py` starts this for each library. The package of ebmkit is called `ebm`, like this project's own, and a
process can hold one of the two only. So neither is imported at the top, and this project is on the path only for its
own run.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

IMAGE_SHAPE = (1, 28, 28)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
BATCH = 250  # images that are sampled or rated at once

# Settings of the other libraries, see `time_to_quality.py`. Their images are in [-1, 1].
TORCHEBM: dict[str, Any] = {
    "spectral_norm": True,
    "lr": 3e-3,
    "batch_size": 32,
    "step_size": 100.0,
    "noise": 0.005,
    "steps": 20,
    "buffer": 10_000,
    "energy_reg": 1.0,
    "ema_decay": 0.99,
    "sample_steps": 100,
}
EBMKIT: dict[str, Any] = {
    "spectral_norm": True,
    "lr": 1e-3,
    "batch_size": 32,
    "step_size": 100.0,
    "noise": 0.005,
    "grad_clip": None,
    "steps": 20,
    "buffer": 10_000,
    "energy_reg": 1.0,
    "ema_decay": 0.99,
    "sample_steps": 100,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a library is asked to do, as `time_to_quality.py` writes it to a file."""

    minutes: Sequence[float]  # of training, at which the weights are kept, ascending
    clock: str  # one of CLOCKS
    images: Tensor  # the training images, uint8 (N, 1, 28, 28)
    rated: Mapping[str, Tensor]  # images whose energies are computed, by the name of their set, uint8 (N, 1, 28, 28)
    samples: int  # images to draw from each of the kept networks
    num_filters: int
    seed: int
    train_flags: Sequence[str]  # of train.py
    folder: str  # for the run of train.py


class Watch:
    """A clock of training, which keeps the weights at given minutes and stands still meanwhile."""

    def __init__(self, minutes: Sequence[float], clock: str):
        self.minutes, self.clock = minutes, clock
        self.kept: list[dict[str, Any]] = []  # the weights, with the time and the number of iterations they took
        self.iterations = 0
        self.begun = read_clocks()

    @property
    def is_over(self) -> bool:
        """Whether the last weights have been kept."""
        return len(self.kept) == len(self.minutes)

    def start(self) -> None:
        """Start the clock."""
        self.begun = read_clocks()

    def count_iteration(self, get_weights: Callable[[], Any]) -> None:
        """Count an iteration that has ended, and keep the weights if their time has come."""
        self.iterations += 1
        now = read_clocks()
        spent = {name: (now[name] - self.begun[name]) / 60 for name in CLOCKS}
        if not self.is_over and spent[self.clock] >= self.minutes[len(self.kept)]:
            self.kept.append({**spent, "iterations": self.iterations, "weights": get_weights()})
            after = read_clocks()
            self.begun = {name: self.begun[name] + after[name] - now[name] for name in CLOCKS}


def read_clocks() -> dict[str, float]:
    """Return the seconds that each of CLOCKS shows."""
    return {name: read() for name, read in CLOCKS.items()}


class Learner(Protocol):
    """A library with its settings: it trains, and samples from and rates images by weights that it has trained."""

    def train(self, watch: Watch) -> None:
        """Train until the watch is over, and tell it of every iteration."""

    def load(self, weights: Any) -> None:
        """Take weights that the watch has kept."""

    def draw(self, number: int) -> Tensor:
        """Return images (number, 1, 28, 28) in [0, 1] that the library samples from noise."""

    def rate(self, images: Tensor) -> Tensor:
        """Return the energies (N,) of images uint8 (N, 1, 28, 28)."""


def build_network(num_filters: int, spectral_norm: bool) -> nn.Sequential:
    """Return MnistNet as a user of another library would write it: images (N, 1, 28, 28) -> energies (N,)."""
    norm = parametrizations.spectral_norm if spectral_norm else nn.Identity()
    width = num_filters
    return nn.Sequential(
        norm(nn.Conv2d(1, 64, 3, padding=1, bias=False)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(64, width, 4, stride=2, padding=1, bias=False)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False)),
        nn.LeakyReLU(0.2),
        nn.ZeroPad2d((1, 2, 1, 2)),
        norm(nn.Conv2d(2 * width, 4 * width, 4, stride=2, bias=False)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        norm(nn.Linear(4 * 4 * 4 * width, 2 * width)),
        nn.LeakyReLU(0.2),
        nn.Linear(2 * width, 1),
        nn.Flatten(0),
    )


def draw_uniform_noise(shape: Sequence[int]) -> Tensor:
    """Return noise of a shape, uniform in [-1, 1]."""
    return 2 * torch.rand(*shape) - 1


def center(images: Tensor) -> Tensor:
    """Return images uint8 as floats in [-1, 1]."""
    return images / 127.5 - 1


class TorchebmLearner:
    """torchebm: persistent contrastive divergence in the loop of its README, with its average of the weights."""

    def __init__(self, job: Job):
        from torchebm.core import BaseModel
        from torchebm.losses import ContrastiveDivergence
        from torchebm.samplers import LangevinDynamics
        from torchebm.utils.ema import EMA

        class Energy(BaseModel):
            def __init__(self) -> None:
                super().__init__()
                self.network = build_network(job.num_filters, TORCHEBM["spectral_norm"])

            def forward(self, x: Tensor) -> Tensor:
                return self.network(x)

        step = TORCHEBM["step_size"]
        scale = TORCHEBM["noise"] / (2 * step) ** 0.5  # torchebm multiplies it by √(2·step)
        self.images, self.energy = center(job.images), Energy()
        self.sampler = LangevinDynamics(model=self.energy, step_size=step, noise_scale=scale, clamp=(-1, 1))
        self.loss = ContrastiveDivergence(
            model=self.energy,
            sampler=self.sampler,
            k_steps=TORCHEBM["steps"],
            persistent=True,
            buffer_size=TORCHEBM["buffer"],
            init_steps=0,
            energy_reg_weight=TORCHEBM["energy_reg"],
        )
        self.average = EMA(self.energy, decay=TORCHEBM["ema_decay"])

    def train(self, watch: Watch) -> None:
        optimizer = torch.optim.Adam(self.energy.parameters(), lr=TORCHEBM["lr"])
        self.loss.initialize_buffer(IMAGE_SHAPE)
        watch.start()
        while not watch.is_over:
            loss, _ = self.loss(self.images[torch.randint(len(self.images), (TORCHEBM["batch_size"],))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.average.update(self.energy)
            watch.count_iteration(lambda: copy.deepcopy(self.average.module.state_dict()))

    def load(self, weights: Any) -> None:
        self.energy.load_state_dict(weights)
        self.energy.eval()

    def draw(self, number: int) -> Tensor:
        ends = self.sampler.sample(x=torch.randn(number, *IMAGE_SHAPE), n_steps=TORCHEBM["sample_steps"])
        return (ends + 1) / 2

    def rate(self, images: Tensor) -> Tensor:
        return self.energy(center(images))


class EbmkitLearner:
    """ebmkit: its trainer as in its MNIST example, with the settings EBMKIT, see time_to_quality.py."""

    def __init__(self, job: Job):
        kit = importlib.import_module("ebm")
        self.images, self.energy = center(job.images), build_network(job.num_filters, EBMKIT["spectral_norm"])
        self.sampler = kit.LangevinDynamics(
            step_size=EBMKIT["step_size"],
            noise_scale=EBMKIT["noise"],
            grad_clip=EBMKIT["grad_clip"],
            steps=EBMKIT["steps"],
            clamp=(-1, 1),
        )
        buffer = kit.ReplayBuffer(EBMKIT["buffer"], IMAGE_SHAPE, reinit_prob=0.05, init_fn=draw_uniform_noise)
        loss = kit.ContrastiveDivergence(self.sampler, buffer=buffer, energy_reg=EBMKIT["energy_reg"])
        decay = EBMKIT["ema_decay"]
        self.trainer = kit.Trainer(self.energy, loss, lr=EBMKIT["lr"], device="cpu", ema_decay=decay)

    def train(self, watch: Watch) -> None:
        average = self.trainer.ema.module
        self.trainer.callback = lambda *_: watch.count_iteration(lambda: copy.deepcopy(average.state_dict()))
        watch.start()
        while not watch.is_over:
            self.trainer.fit(self.images, steps=1, batch_size=EBMKIT["batch_size"], verbose=False)

    def load(self, weights: Any) -> None:
        self.energy.load_state_dict(weights)
        self.energy.eval()

    def draw(self, number: int) -> Tensor:
        noise = draw_uniform_noise((number, *IMAGE_SHAPE))
        return (self.sampler.sample(self.energy, noise, steps=EBMKIT["sample_steps"]) + 1) / 2

    def rate(self, images: Tensor) -> Tensor:
        return self.energy(center(images))


class ProjectLearner:
    """This project: train.py, its checkpoints, and its Langevin chains."""

    def __init__(self, job: Job):
        self.job = job

    def train(self, watch: Watch) -> None:
        import train
        from ebm.settings import TrainSettings
        from ebm.support import cli

        class WatchedRun(train.Run):
            """A run that the watch ends, and that saves a checkpoint when the watch keeps weights."""

            def __init__(self, *arguments: Any):
                super().__init__(*arguments)
                watch.start()  # what train.py times and compiles before its first iteration counts

            def after(self, step: train.Step) -> None:
                super().after(step)
                watch.count_iteration(self.save_checkpoint)
                if watch.is_over:
                    self.stop = self.state.iteration

            def save_checkpoint(self) -> pathlib.Path:
                self.save()
                kept = folder.with_name(f"{folder.name}_{watch.iterations}.pt")  # a run that rolls back moves its own
                return pathlib.Path(shutil.copy(folder / f"model_{self.state.iteration}.pt", kept))

        train.Run = WatchedRun  # type: ignore[misc, assignment]
        folder = pathlib.Path(self.job.folder)
        words = [f"--logdir={folder.parent}", f"--exp={folder.name}", f"--seed={self.job.seed}"]
        words += ["--num_samples=1", "--sample_steps=0", f"--num_filters={self.job.num_filters}"]
        words += ["--max_iter=100000", *self.job.train_flags]
        train.main(cli.parse(["train.py", *words], TrainSettings))

    def load(self, weights: pathlib.Path) -> None:
        import checkpoint
        import models

        self.model = checkpoint.load_energy(weights, ema=True)
        self.energy = models.freeze_energy(self.model)

    def draw(self, number: int) -> Tensor:
        import models
        import sampling

        settings, generator = self.model.settings, torch.default_generator
        noise = models.draw_noise_images(self.model.config, number, generator)
        steps, step_lr = 5 * settings["num_steps"], settings["step_lr"]
        clip = {"proj_norm": settings["proj_norm"], "proj_norm_type": settings["proj_norm_type"]}
        return sampling.langevin(self.energy, noise, num_steps=steps, step_lr=step_lr, generator=generator, **clip)

    def rate(self, images: Tensor) -> Tensor:
        return self.energy(images / 255, None)


LEARNERS: dict[str, Callable[[Job], Learner]] = {
    "project": ProjectLearner,
    "torchebm": TorchebmLearner,
    "ebmkit": EbmkitLearner,
}


def run_job(learner: Learner, job: Job) -> list[dict[str, Any]]:
    """Train, and return for each of the minutes the time taken, the samples and the energies of the rated images."""
    watch = Watch(job.minutes, job.clock)
    learner.train(watch)
    rows = []
    for row in watch.kept:
        learner.load(row.pop("weights"))
        torch.manual_seed(job.seed)
        sizes = [min(BATCH, job.samples - start) for start in range(0, job.samples, BATCH)]
        samples = torch.cat([learner.draw(size) for size in sizes])
        with torch.no_grad():
            energies = {
                name: torch.cat([learner.rate(batch) for batch in images.split(BATCH)])
                for name, images in job.rated.items()
            }
        rows.append({**row, "samples": samples, "energies": energies})
    return rows


def main(library: str, job_path: str, result_path: str) -> None:
    job = Job(**torch.load(job_path))
    torch.manual_seed(job.seed)
    torch.save(run_job(LEARNERS[library](job), job), result_path)


if __name__ == "__main__":
    main(*sys.argv[1:])

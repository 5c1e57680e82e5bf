"""A training run: the loop around `training.train_step`, and what it logs, draws, saves and resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import data
import guard
import metrics
import pictures
from acceleration import products_in
from distributed import GradientAverager, Workers
from ebm.settings import TrainSettings
from errors import UsageError
from models import EnergyNetwork, Weights, spectral_norm_once
from training import (
    State,
    Step,
    energy_under,
    langevin_chain,
    next_batch,
    noise_images,
    statistics,
    train_step,
)
from utils import Progress, RunLog, read_series

FAILED_SAVES = 3  # saves in a row that may fail before a run stops
DISTANCE = "classifier Fréchet distance"  # in a small classifier's features: not the FID, which needs Inception's
PANELS = 20  # rows of start | sample | real
BINS = 40  # of the histograms of energies in the log
DIVERGED = 1e9  # energies


@dataclasses.dataclass(frozen=True)
class Cadence:
    """When a run stops, and how often it does what, in iterations."""

    stop: int
    log: int = 10
    save: int = 1000
    test: int = 1000


class Chains(NamedTuple):
    """Fresh chains from noise, `sample_steps` long."""

    iteration: int
    images: Tensor  # (N, C, H, W) in [0, 1], where they end
    energies: Tensor  # (N,), there
    moved: float  # mean distance of a pixel from its start, in [0, 1]


class Trainer:
    """A run in its folder, one per worker; only rank 0 prints and writes.

    flags: what the run was started with, stored beside the weights. num_samples, sample_steps: how many fresh chains
    from noise a test or report runs, and their Langevin steps. measure: their distance to the data and that of real
    images for comparison, or None; the model with the smallest is kept as model_best. max_rollbacks: how often the
    divergence guard may step in, None: no guard.
    """

    def __init__(
        self,
        state: State,
        settings: TrainSettings,
        dataset: data.Dataset,
        workers: Workers,
        folder: pathlib.Path,
        cadence: Cadence,
        *,
        flags: dict[str, Any],
        seed: int,
        num_samples: int,
        sample_steps: int,
        measure: tuple[metrics.ClassifierDistance, float] | None = None,
        max_rollbacks: int | None = 10,
    ):
        self.state, self.settings, self.dataset, self.workers = state, settings, dataset, workers
        self.folder, self.cadence, self.flags, self.seed = folder, cadence, flags, seed
        self.num_samples, self.sample_steps, self.measure = num_samples, sample_steps, measure
        self.leads = workers.rank == 0
        self.lr = state.optimizer.param_groups[0]["lr"]
        self.guard = None if max_rollbacks is None else guard.DivergenceGuard()
        self.max_rollbacks, self.rollbacks = max_rollbacks or 0, 0
        self.best = float("inf")
        self.chains: Chains | None = None  # the last fresh ones
        self.failed_saves = 0
        self.stopping: int | None = None  # the signal that asked the run to end

    def run(self) -> None:
        """Train until the last iteration or a signal; what a signal interrupts is saved first."""
        state, cadence, workers = self.state, self.cadence, self.workers
        self.log = RunLog(self.folder, state.iteration) if self.leads else None
        self.progress = Progress(cadence.stop, state.iteration, what="iteration", quiet=not self.leads)
        state.acceleration.say = self.note_writer()
        moments = [moment for pair in state.optimizer.state.values() for moment in pair.values()]
        averages = [] if state.ema is None else state.ema.state_dict().values()
        workers.broadcast([*state.model.state_dict().values(), *averages, *moments])
        gradients = GradientAverager(workers, state.model.parameters())
        if state.iteration == 0:
            self.measure_samples()
        if self.guard is not None:
            self.guard.remember(state)
        state.model.train()
        with self.signals():
            while state.iteration < cadence.stop:
                images, labels = next_batch(state, self.settings, self.dataset)
                with products_in(state.acceleration.precision):
                    step = train_step(state, self.settings, images, labels, gradients.finish)
                if self.healthy(step):
                    self.keep_records(step)
                if workers.any(self.stopping is not None):
                    self.leave()
        state.acceleration.say = print
        self.progress.close()
        if self.log is not None:
            self.log.close()

    def note_writer(self) -> Callable[[str], None]:
        """Return what prints a note, on any rank, and logs it; it holds no part of the run's state."""
        progress, log, rank = self.progress, self.log, self.workers.rank

        def note(message: str) -> None:
            if log is None:
                print(f"rank {rank}: {message}", flush=True)
            else:
                progress.say(message)
                log.event(progress.done, {"note": message})

        return note

    def keep_records(self, step: Step) -> None:
        """Log, test and save where it is time to."""
        iteration, cadence = self.state.iteration, self.cadence
        if iteration % cadence.log == 0:
            with self.forgiving("the log"):
                self.record(step)
        if iteration % cadence.test == 0:
            with self.forgiving("pictures"):
                self.test(step)
            self.workers.barrier()
        if iteration % cadence.save == 0 or iteration == cadence.stop:
            self.save()
        self.progress.update(iteration)

    @contextlib.contextmanager
    def forgiving(self, what: str) -> Iterator[None]:
        """Let a full disk or a folder that is gone cost a message, not the run."""
        try:
            yield
        except OSError as error:
            self.progress.say(f"could not write {what} ({error.strerror}); training goes on")

    # ------------------------------------------------------------------------------------------ divergence

    def healthy(self, step: Step) -> bool:
        """Check the run now and then, and always before a checkpoint is written; roll it back where it diverged."""
        if self.guard is None:
            return True
        state, cadence = self.state, self.cadence
        saves = state.iteration % cadence.save == 0 or state.iteration == cadence.stop
        if state.iteration % guard.CHECK_INTERVAL == 0 or saves:
            cause = self.guard.cause(state, step, self.settings.bounds)
            if self.workers.any(cause is not None):
                self.roll_back(cause or "another worker diverged")
                return False
        if state.iteration % guard.SNAPSHOT_INTERVAL == 0:
            self.guard.remember(state)
        return True

    def roll_back(self, cause: str) -> None:
        """Return to the last good state, on all workers, and go on with fresh noise and half the learning rate.

        Where chains that chose fp16 themselves are not finite, that is given up instead. Raises UsageError after too
        many rollbacks.
        """
        assert self.guard is not None
        state, failed, acceleration = self.state, self.state.iteration, self.state.acceleration
        fp16_failed = self.workers.any(acceleration.is_fp16_by_default and guard.NOT_FINITE in cause)
        if fp16_failed and acceleration.is_fp16_by_default:
            acceleration.give_up("precision", f"chains in fp16 are at fault, perhaps: {cause}")
        self.rollbacks += not fp16_failed
        if self.rollbacks > self.max_rollbacks:
            raise UsageError(
                f"the run diverged at iteration {failed} ({cause}) after {self.max_rollbacks} rollbacks; "
                "lower `lr` or `step_lr`, or raise `num_steps`, then `resume_iter`=latest"
            )
        self.guard.roll_back(state)
        self.chains = None
        self.adapt()
        state.generator.manual_seed(self.seed * 1_000 + self.workers.rank + 1_000_000 * max(self.rollbacks, 1))
        rate = state.optimizer.param_groups[0]["lr"]
        self.progress.say(
            f"diverged at iteration {failed}: {cause}; back to iteration {state.iteration}, learning rate {rate:.3g}"
        )
        self.progress.update(state.iteration)
        if self.log is not None:
            self.log.event(state.iteration, {"rollback_from": failed, "cause": cause, "lr": rate})

    def adapt(self) -> None:
        """Set the learning rate: half of the flag's for each rollback so far."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.lr * 0.5**self.rollbacks

    # ------------------------------------------------------------------------------------------ logs and pictures

    def record(self, step: Step) -> None:
        """Write this iteration's figures to the log and the console."""
        with products_in(self.state.acceleration.precision):
            figures = statistics(self.state, self.settings, step)
        if self.log is not None:
            self.log.scalars(self.state.iteration, figures)
            self.progress.text = f"e_pos {figures['e_pos']:+.4f} e_neg {figures['e_neg']:+.4f}"

    def test(self, step: Step) -> None:
        """Draw where chains start, where they end and real images; measure fresh chains, keep the best model."""
        if self.log is not None:
            iteration, rescale = self.state.iteration, self.settings.rescale
            shown = {"start": step.start, "sample": step.samples, "real": step.images}
            columns = {name: images[:PANELS] / rescale for name, images in shown.items()}
            path = pictures.save_panel(columns, self.folder / "pictures" / f"panel_{iteration}.png", scale=self.zoom)
            self.log.picture(iteration, "start_sample_real", path)
            self.progress.say(f"pictures: {path}")
            with self.workers.busy():
                self.measure_samples()
                self.record_energies(step)

    def record_energies(self, step: Step) -> None:
        """Log histograms of the energies of data, negatives and fresh long chains, and how far these moved."""
        assert self.log is not None
        iteration = self.state.iteration
        chains = self.fresh_chains(PANELS if self.measure is None else self.num_samples)
        with self.evaluation() as (model, weights), torch.no_grad():
            energy = energy_under(model, self.settings, weights, step.labels)
            found = {"data": energy(step.images), "negatives": energy(step.samples)}
        found["long_chains"] = chains.energies
        energies = {name: values.double().cpu().numpy() for name, values in found.items()}
        if not all((abs(values) < DIVERGED).all() for values in energies.values()):
            return  # without the guard, a run may go on with energies that have no histogram
        edges = np.histogram_bin_edges(np.concatenate(list(energies.values())), BINS)
        counts = {name: np.histogram(values, edges)[0].tolist() for name, values in energies.items()}
        for name, values in energies.items():
            self.log.board.add_histogram(f"energy/{name}", values, iteration)
        self.log.event(iteration, {"energy_histogram": {"edges": edges.tolist(), **counts}})
        self.log.scalars(iteration, {"long_chain_e": chains.energies.mean().item(), "long_chain_moved": chains.moved})

    def measure_samples(self) -> None:
        """Log the distance of fresh chains to the data; a new best is saved."""
        if self.measure is None or self.log is None:
            return
        distance = self.measure[0].distance(self.fresh_chains(self.num_samples).images)
        self.log.scalars(self.state.iteration, {"feature_distance": distance})
        self.progress.say(f"iteration {self.state.iteration}: {DISTANCE} {distance:.2f}")
        if distance < self.best:
            self.best = distance
            self.write(self.folder / "model_best.pt", self.state.shared() | self.progress_so_far())

    def report(self) -> None:
        """Sample from noise; print where the pictures and curves lie, and how close the samples are to the data."""
        if not self.leads:
            return
        with self.workers.busy():
            images = self.fresh_chains(self.num_samples).images
        conditional = self.state.model.config.label_size and self.dataset.class_names
        columns = min(len(self.dataset.class_names), 20) if conditional else 10
        path = self.folder / f"samples_{self.state.iteration}.png"
        pictures.save_grid(images[: 10 * columns], path, columns=columns, scale=self.zoom)
        print(f"samples from noise, {self.sample_steps} Langevin steps: {path}")
        if self.measure is not None:
            measured = dict(zip(*read_series(self.folder, "feature_distance"), strict=True))
            measure, real = self.measure
            print(f"{DISTANCE} to real images of {len(images)} images, smaller is closer:")
            if 0 in measured:
                print(f"  before training          {measured[0]:8.2f}")
            print(f"  now                      {measure.distance(images):8.2f}")
            print(f"  two halves of real data  {real:8.2f}")
        curves = {
            "energy": {name: read_series(self.folder, name) for name in ("e_pos", "e_neg")},
            "gap": {"e_pos − e_neg": read_series(self.folder, "e_diff")},
            "mean |Δx|": {name: read_series(self.folder, name) for name in ("x_moved", "x_off")},
            "mean |∂E/∂x|": {name: read_series(self.folder, name) for name in ("x_grad_first", "x_grad")},
        }
        if self.measure is not None:
            curves["distance"] = {DISTANCE: read_series(self.folder, "feature_distance")}
        print(f"training curves: {pictures.plot_lines(curves, self.folder / 'curves.png', xlabel='iteration')}")

    @property
    def zoom(self) -> int:
        """How much small images are enlarged in pictures."""
        return max(1, 64 // self.state.model.config.image_shape[1])

    def fresh_chains(self, number: int) -> Chains:
        """Return fresh chains from noise under the averaged weights, where there are any, else the current ones.

        Same seed, same images at each iteration. Classes follow one another; labels that are no classes are those of
        random data. The chains run as those of training do; energies are those of float32.
        """
        chains, config, settings = self.chains, self.state.model.config, self.settings
        if chains is not None and (chains.iteration, len(chains.images)) == (self.state.iteration, number):
            return chains
        acceleration, size, total = self.state.acceleration, 250, number
        if acceleration.compiled:  # for the shape of training's chains: whole batches of that, of which `number` count
            size = settings.num_chains or settings.batch_size
            total = math.ceil(number / size) * size
        generator = torch.Generator(self.workers.device).manual_seed(self.seed + 1_000_003)
        labels = None
        if config.label_size:
            if self.dataset.class_names:
                classes = torch.arange(total, device=generator.device) % len(self.dataset.class_names)
                labels = torch.nn.functional.one_hot(classes, config.label_size).float()
            else:
                index = torch.randint(len(self.dataset), (total,), generator=generator, device=generator.device)
                labels = self.dataset.batch(index, generator)[1]
        noise = noise_images((total, *config.image_shape), generator, network=config.network, rescale=settings.rescale)
        settings = dataclasses.replace(settings, num_steps=self.sample_steps, zero_kl=True)
        ends: list[Tensor] = []
        energies: list[Tensor] = []
        with self.evaluation() as (model, weights):
            chain = langevin_chain(model, settings, generator)
            for start in noise.split(size):
                under = None if labels is None else labels[len(ends) * size :][: len(start)]
                ends.append(acceleration.run(chain, weights, start, under, generator, repeated=False))
                energies.append(energy_under(model, settings, weights, under)(ends[-1]))
        images = torch.cat(ends)[:number] / settings.rescale
        moved = (images - noise[:number] / settings.rescale).abs().mean().item()
        self.chains = Chains(self.state.iteration, images, torch.cat(energies)[:number], moved)
        return self.chains

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[tuple[EnergyNetwork, Weights]]:
        """Give the network that samples are drawn from, without dropout, and its weights prepared once."""
        model = self.state.sampled_model
        training_mode = model.training
        weights = spectral_norm_once(model.eval())
        try:
            yield model, weights
        finally:
            model.train(training_mode)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint with every worker's state; a full disk costs a message, several in a row end the run."""
        watch = {} if self.guard is None else {"guard": self.guard.state_dict()}
        own = self.workers.gather(self.state.own() | watch)
        if not self.leads:
            return
        path = self.folder / f"model_{self.state.iteration}.pt"
        contents = self.state.shared() | self.progress_so_far() | {"workers": own}
        with self.workers.busy():
            if self.write(path, contents):
                self.progress.say(f"saved {path}")
                with self.forgiving("the folder of old checkpoints"):
                    checkpoint.prune(self.folder)

    def progress_so_far(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the weights and the workers' own states."""
        names = list(self.dataset.class_names)
        so_far = {"flags": self.flags, "class_names": names, "best": self.best, "rollbacks": self.rollbacks}
        return so_far | {"precision": self.state.acceleration.precision}

    def write(self, path: pathlib.Path, contents: dict[str, Any]) -> bool:
        """Write one file; say so and return False where it fails, raise UsageError when it keeps failing."""
        try:
            checkpoint.save(path, contents)
        except OSError as error:
            self.failed_saves += 1
            self.progress.say(
                f"could not save {path} ({error.strerror}): earlier checkpoints stay, the next save retries"
            )
            if self.failed_saves == FAILED_SAVES:
                raise UsageError(f"{path}: {FAILED_SAVES} saves in a row failed ({error.strerror}); stopped") from None
            return False
        self.failed_saves = 0
        return True

    def resume(self, path: pathlib.Path) -> None:
        """Go on from a checkpoint: with as many workers as if nothing had been, else with buffers dealt out anew.

        A published TF1 checkpoint gives weights, optimizer and iteration. Raises UsageError where it does not fit.
        """
        if path.suffix != ".pt":
            checkpoint.resume_tf(path, self.state.model, self.state.optimizer)
            self.state.iteration = int(path.name.removeprefix("model_"))
            self.state.start_ema()
            return
        contents = checkpoint.load(path)
        checkpoint.check_config(checkpoint.config_of(contents, path), self.state.model.config, path)
        checkpoint.load_state(self.state.model, contents["model"], path)
        self.state.load_shared(contents)
        stored, kept = bool(contents.get("ema")), self.state.ema is not None
        if stored and not kept:
            self.workers.print(f"note: {path} has averaged weights, which end here; ema_decay would go on with them")
        elif kept and not stored:
            self.workers.print(f"note: {path} has no averaged weights; the average starts with its weights")
        self.best = contents.get("best", self.best)
        self.rollbacks = contents.get("rollbacks", 0)
        if self.state.acceleration.is_fp16_by_default and contents.get("precision") == "tf32":
            self.state.acceleration.give_up("precision", f"{path} was computed in TF32")
        self.adapt()
        own = contents.get("workers", [])
        rank, size = self.workers.rank, self.workers.size
        if len(own) == size:
            if not self.state.load_own(own[rank]):
                self.workers.print(f"note: {path} was written on another kind of device: noise starts afresh")
            if self.guard is not None and "guard" in own[rank]:
                self.guard.load_state_dict(own[rank]["guard"])
            return
        self.workers.print(
            f"note: {path} holds the state of {len(own)} workers and this run has {size}: "
            "replay buffers are dealt out anew, noise starts afresh"
        )
        if own:
            buffers = torch.cat([worker["buffer"]["images"] for worker in own])
            self.state.buffer.load_state_dict({"images": buffers[rank::size], "position": 0})

    # ------------------------------------------------------------------------------------------ stopping

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Let the first SIGTERM or SIGINT end the run after its iteration, a second one at once."""

        def ask(number: int, frame: object) -> None:
            self.stopping = number
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave(self) -> None:
        """Save and end the process with the status that is usual for its signal."""
        self.save()
        number = self.stopping or signal.SIGTERM
        self.progress.say(f"stopped by {signal.Signals(number).name}; go on with resume_iter=latest")
        self.workers.close()
        raise SystemExit(128 + number)

"""A training run: it yields the batches, and after each step it checks, logs, tests and saves; it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import checkpoint
import data
from ebm.measures.features import SampleMeasure
from ebm.readers.bounded import report_unreadable_file
from ebm.settings import TrainSettings
from ebm.support import cli, interruption
from ebm.support.errors import UsageError
from ebm.support.hardware import allow_tf32, is_out_of_memory
from ebm.support.interruption import Break
from ebm.support.logs import LOG_NAME
from ebm.support.progress import EVERY
from ebm.support.reports import print_written
from ebm.support.sharing import fold_seed
from ebm.training import tuning
from ebm.training.classification import LabelledImages, draw_test_images
from ebm.training.distributed import GradientAverager, Workers
from ebm.training.estimate import give_advice, list_remedies
from ebm.training.guard import CHECK_INTERVAL, NOT_FINITE, SNAPSHOT_INTERVAL, DivergenceGuard
from ebm.training.ownership import FolderOwner, list_branch_files, set_aside_branch
from ebm.training.records import Recorder, draw_curves, report_quality, write_samples
from ebm.training.resuming import name_resumption
from ebm.training.samples import Sampler, choose_measure, choose_number
from ebm.training.setup import compute_last_iteration
from ebm.training.state import State, Step
from ebm.training.stopping import StopSignals

FAILED_SAVES = 3  # saves in a row that may fail before a run stops


class Run:
    """A training run with its folder. Every worker has one; only rank 0 prints and writes."""

    def __init__(
        self,
        settings: TrainSettings,
        state: State,
        dataset: data.Dataset,
        workers: Workers,
        owner: FolderOwner | None = None,
    ):
        self.settings, self.state, self.dataset, self.workers, self.owner = settings, state, dataset, workers, owner
        self.is_first = workers.rank == 0
        self.stop = compute_last_iteration(settings, len(dataset), workers.size)
        self.averager = GradientAverager(workers, state.model.parameters())
        self.sampler = Sampler(state, settings, dataset)
        self.make_measure = choose_measure(settings, dataset, workers.device) if self.is_first else None
        self.measure: SampleMeasure | None = None  # on rank 0 only, after `prepare_measure`
        self.test_images: LabelledImages | None = None  # with `classify`, on rank 0 only, after `prepare_measure`
        self.guard = DivergenceGuard() if settings.guard else None
        self.rollbacks = 0
        self.best: dict[str, float] = {}  # network that measures -> smallest key figure, see `SampleMeasure`
        self.failed_saves = 0
        self.unsaved: tuple[pathlib.Path, dict[str, Any]] | None = None  # the newest checkpoint, if its save failed
        self.unwritten: list[str] = []  # what else could not be written
        self.signal: int | None = None  # the signal that asked the run to end
        self.can_break = False  # whether a signal breaks off the iteration, which has not changed the weights yet
        self.draws: dict[str, Any] = {}  # of the state before the iteration
        self.last_step: Step | None = None  # that of the state, unless the run has rolled back
        self.stop_signals: StopSignals | None = None  # while it trains
        self.recorder: Recorder | None = None  # on rank 0 only, while it trains
        # The iteration that the run has returned to, until it saves: what the folder has of later ones is then moved.
        self.branch_point: int | None = None
        self.is_resumed = False
        self.saved: set[pathlib.Path] = set()  # the checkpoints that this call has written
        self.last_seconds = math.inf  # that the latest iteration took; the first one compiles, and may take long

    def prepare_measure(self) -> None:
        """Make the measure of samples, and draw the images that tests classify.

        This may train a classifier and write it to the folder.
        """
        self.measure = None if self.make_measure is None else self.make_measure()
        if self.is_first:
            with self.workers.busy():
                self.test_images = draw_test_images(self.settings, self.dataset, self.workers.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield images (batch_size, C, H, W) in [0, rescale] and labels (batch_size, label_size) or None.

        The log is opened before the first batch and closed after the last.
        """
        self.open()
        with self.catch_signals():
            while self.state.iteration < self.stop:
                self.draws = self.state.get_draws()
                self.set_learning_rate()
                yield read_batch(self.state, self.settings, self.dataset)
            if self.is_asked_to_end():  # while the last iteration was saved
                self.end_early()
        self.close()

    def open(self) -> None:
        """Open the log, give all workers the same weights and optimizer state, and measure untrained samples."""
        state = self.state
        if self.is_first:
            is_branch = self.is_resumed and bool(list_branch_files(self.settings.folder, state.iteration))
            with self.workers.busy():  # trackers may have to wait for their servers
                self.recorder = Recorder(
                    state, self.settings, self.sampler, self.measure, self.stop, is_branch=is_branch
                )
        if self.is_resumed and state.iteration >= self.stop:
            self.say(f"note: iteration {self.stop} is the last of this run; a larger max_iter goes on")
        state.acceleration.say = bind_notes(self.recorder, self.workers.rank)
        moments = [moment for pair in state.optimizer.state.values() for moment in pair.values()]
        averages = [] if state.ema is None else state.ema.state_dict().values()
        self.workers.broadcast([*state.model.state_dict().values(), *averages, *moments])
        if state.iteration == 0 and not self.is_resumed:
            self.measure_samples()
        if self.guard is not None:
            self.guard.remember(state)
        state.model.train()

    def close(self) -> None:
        """Close the log."""
        self.state.acceleration.say = print
        if self.recorder is not None:
            self.recorder.close()

    def after(self, step: Step) -> None:
        """Check for divergence, log, test and save after a step; end the run if a signal asked for that."""
        is_ending = self.is_asked_to_end()
        cause = self.find_divergence(step, is_saved=is_ending or self.is_save_due or self.is_test_due)
        self.last_step = step if cause is None else None
        if cause is None:
            self.keep_records(step)
        else:
            self.roll_back(cause)
        if is_ending:
            self.end_early()

    def is_due(self, interval: int) -> bool:
        """Return whether something that happens every `interval` iterations is due after this one."""
        return self.state.iteration % interval == 0

    @property
    def is_save_due(self) -> bool:
        """Whether a checkpoint is due after this iteration."""
        return self.is_due(self.settings.save_interval) or self.state.iteration == self.stop

    @property
    def is_test_due(self) -> bool:
        """Whether a test, which may save the best model, is due after this iteration."""
        return self.is_due(self.settings.test_interval)

    def say(self, message: str) -> None:
        """Print a line, on rank 0."""
        if self.recorder is not None:
            self.recorder.progress.say(message)
        elif self.is_first:
            print(message, flush=True)

    # ------------------------------------------------------------------------------------------ divergence

    def find_divergence(self, step: Step, *, is_saved: bool) -> str | None:
        """Return a phrase, on all workers, that says how the run has diverged, or None.

        It checks every CHECK_INTERVAL iterations, and keeps healthy states for a rollback. is_saved: the state after
        this iteration is saved if it is healthy. It is then checked at any iteration, but the guard remembers only its
        own checks, so that a signal does not change what it finds later.
        """
        if self.guard is None:
            return None
        if self.is_due(CHECK_INTERVAL) or is_saved:
            guard = self.guard if self.is_due(CHECK_INTERVAL) else dataclasses.replace(self.guard)
            cause = guard.find_cause(self.state, step, self.settings.bounds)
            if self.workers.any(cause is not None):
                return cause or "another worker diverged"
        if self.is_due(SNAPSHOT_INTERVAL):
            self.guard.remember(self.state)
        return None

    def roll_back(self, cause: str) -> None:
        """Set all workers back to the last healthy state, with new noise and half the learning rate.

        If figures are not finite and chains are in fp16 by default, the run gives up fp16 instead of halving the
        learning rate. Raises UsageError after more than `max_rollbacks` rollbacks.
        """
        assert self.guard is not None, "only the guard finds a cause"
        state, settings, acceleration = self.state, self.settings, self.state.acceleration
        failed = state.iteration
        fp16_failed = self.workers.any(acceleration.is_fp16_by_default and NOT_FINITE in cause)
        if fp16_failed and acceleration.is_fp16_by_default:
            acceleration.give_up("precision", f"chains in fp16 may be the cause ({cause})")
        self.rollbacks += not fp16_failed
        if self.rollbacks > settings.max_rollbacks:
            raise UsageError(
                f"the run diverged at iteration {failed} ({cause}) after {settings.max_rollbacks} rollbacks; "
                "lower `lr` or `step_lr`, or raise `num_steps`, then go on with " + name_resumption(settings)
            )
        self.guard.roll_back(state)
        self.branch_point = state.iteration
        self.sampler.latest = None
        self.set_learning_rate()
        seed = settings.seed * 1_000 + self.workers.rank + 1_000_000 * max(self.rollbacks, 1)
        state.generator.manual_seed(fold_seed(seed))
        if self.recorder is not None:
            self.recorder.record_rollback(failed, cause, state.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next iteration: that of the schedule, halved for each rollback so far."""
        rate = self.settings.lr * 0.5**self.rollbacks
        if self.settings.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * self.state.iteration / self.stop))
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate

    # ------------------------------------------------------------------------------------------ records

    def keep_records(self, step: Step) -> None:
        """Log, test and save if it is due after this iteration."""
        if self.recorder is not None:
            if self.is_due(self.settings.log_interval):
                with allow_tf32(self.state.acceleration.precision):
                    self.recorder.record_step(step)
            if self.is_test_due:
                with self.survive_write_errors("pictures"):
                    self.test(self.recorder, step)
        if self.is_test_due:
            self.workers.barrier()
        if self.is_save_due:
            self.save()
        if self.recorder is not None:
            self.recorder.progress.update(self.state.iteration)

    def test(self, recorder: Recorder, step: Step) -> None:
        """Measure fresh samples, classify test images, save pictures of chains and log energies."""
        with self.workers.busy():
            self.measure_samples()
            if self.test_images is not None:
                recorder.record_classification(self.test_images)
            recorder.draw_panels(step)
            recorder.record_energies(step)

    def measure_samples(self) -> None:
        """Log the quality of fresh samples, and save the model if it is the best so far."""
        figure = None if self.recorder is None else self.recorder.measure_samples()
        if figure is None or self.measure is None:
            return
        name = self.measure.extractor.name
        if figure < self.best.get(name, math.inf):
            self.best[name] = figure
            self.write(self.settings.folder / "model_best.pt", self.state.get_shared_state() | self.describe_progress())

    @contextlib.contextmanager
    def survive_write_errors(self, what: str) -> Iterator[None]:
        """Print a message and go on if writing inside the block fails, for example because the disk is full."""
        try:
            yield
        except OSError as error:
            self.say(f"could not write {error.filename or what} ({error.strerror}); the run goes on")
            self.unwritten.append(what)

    def report(self) -> None:
        """Draw samples; write and print the final report on rank 0. Many samples are shared out to all workers."""
        has_inception = self.workers.any(self.measure is not None and self.measure.has_inception)
        number = choose_number(self.settings, has_inception)
        if has_inception:
            images = self.sampler.draw_bytes(number, self.workers)
        elif self.is_first:
            with self.workers.busy():
                images = self.sampler.draw_chains(number).images
        if self.is_first:
            with self.workers.busy():
                self.write_report(images)

    def write_report(self, images: Tensor) -> None:
        """Write and print the final report on samples (N, C, H, W); what cannot be written does not stop the rest."""
        self.unwritten.clear()
        with self.survive_write_errors("the picture of samples"):
            log = None if self.recorder is None else self.recorder.log
            write_samples(self.settings, self.sampler, images, log)
        with self.survive_write_errors("the figures of samples"):
            report_quality(self.settings, self.sampler, images, self.measure)
        with self.survive_write_errors("the training curves"):
            draw_curves(self.settings, self.measure)

    def finish(self) -> None:
        """End the trackers, and try once more to save the last state if that failed.

        Raises UsageError if the state or the report is not written.
        """
        self.finish_trackers()
        if self.unsaved is not None:
            path, contents = self.unsaved
            try:
                self.put_checkpoint(path, contents)
            except OSError as error:
                raise UsageError(
                    f"{path}: the last state could not be saved ({error.strerror}); "
                    f"make room, then go on from the last checkpoint with {name_resumption(self.settings)}"
                ) from None
            print(f"saved {path}")
        if self.is_first:
            print_written(self.list_results())
        if self.unwritten:
            raise UsageError(
                f"the run is over, but {' and '.join(self.unwritten)} could not be written; "
                f"make room, then {name_resumption(self.settings)} with `train`=False does it again"
            )

    def finish_trackers(self) -> None:
        """Let the trackers send what is left."""
        if self.recorder is not None:
            with self.workers.busy():
                self.recorder.finish_trackers()

    def list_results(self) -> list[pathlib.Path]:
        """Return what this call has left to look at or to go on from, then the folder with all the rest."""
        folder, iteration = self.settings.folder, self.state.iteration
        names = [f"samples_{iteration}.png", f"quality_{iteration}.json", "curves.png"]
        names += [LOG_NAME] if self.settings.train else []
        saved = [folder / name for name in (f"model_{iteration}.pt", "model_best.pt")]
        return [*(path for path in saved if path in self.saved), *(folder / name for name in names), folder]

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint with the state of every worker.

        A failure prints a message; several in a row end the run.
        """
        guard_state = {} if self.guard is None else {"guard": self.guard.state_dict()}
        worker_states = self.workers.gather(self.state.get_worker_state() | guard_state)
        if not self.is_first:
            return
        folder = self.settings.folder
        path = folder / f"model_{self.state.iteration}.pt"
        with self.workers.busy():
            contents = self.state.get_shared_state() | self.describe_progress() | {"workers": worker_states}
            is_saved = self.write(path, contents)
            self.unsaved = None if is_saved else (path, contents)
            if is_saved:
                self.say(f"saved {path}")
                with self.survive_write_errors("the folder of old checkpoints"):
                    checkpoint.prune(folder)

    def describe_progress(self) -> dict[str, Any]:
        """Return the settings and figures of the run that a checkpoint holds besides the states of the workers."""
        return {
            "flags": cli.to_dict(self.settings),
            "class_names": list(self.dataset.class_names),
            "images": len(self.dataset),
            "best": self.best,
            "rollbacks": self.rollbacks,
            "way": tuning.get_way(self.state)._asdict() | {"on_cpu": self.state.generator.device.type == "cpu"},
        }

    def write(self, path: pathlib.Path, contents: dict[str, Any]) -> bool:
        """Write a checkpoint; return whether it worked.

        A failure prints a message; FAILED_SAVES failures in a row raise UsageError, and so does a folder that another
        run has taken.
        """
        try:
            self.put_checkpoint(path, contents)
        except OSError as error:
            self.failed_saves += 1
            retry = ", the next save retries" if self.state.iteration < self.stop and self.signal is None else ""
            self.say(f"could not save {path} ({error.strerror}): earlier checkpoints stay{retry}")
            if self.failed_saves == FAILED_SAVES:
                raise UsageError(f"{path}: {FAILED_SAVES} saves in a row failed ({error.strerror}); stopped") from None
            return False
        self.failed_saves = 0
        return True

    def put_checkpoint(self, path: pathlib.Path, contents: dict[str, Any]) -> None:
        """Write a checkpoint, if the folder is still this run's, beside those of its own history alone."""
        if self.owner is not None and self.owner.confirm():
            self.say(
                f"note: the lock in {path.parent} had gone; if the folder was moved, or its disk is away, a new folder "
                "holds the files from now on"
            )
        self.leave_branch()
        checkpoint.save(path, contents)
        self.saved.add(path)

    def leave_branch(self) -> None:
        """Set aside, before the first save after a return to an earlier iteration, what the run has of later ones."""
        if self.branch_point is None:
            return
        folder = self.settings.folder
        aside = set_aside_branch(folder, self.branch_point, is_resumed=self.is_resumed)
        if aside is not None:
            self.say(f"note: the run went on from iteration {self.branch_point}; its later files are now in {aside}")
        if self.recorder is not None:
            self.recorder.log.publish()
        self.branch_point, self.is_resumed = None, False

    def resume(self, path: pathlib.Path, contents: dict[str, Any] | None = None) -> None:
        """Load a checkpoint, so that the run continues from it.

        contents: those of the checkpoint, if they have been read already. With the same number of workers the run
        continues exactly; with another number the replay buffers are dealt out anew and the noise starts afresh. A
        published TF1 checkpoint has weights, optimizer and iteration only. Raises UsageError if the checkpoint is
        damaged or of another network.
        """
        state, workers = self.state, self.workers
        self.is_resumed = True
        if path.suffix != ".pt":
            checkpoint.resume_tf(path, state.model, state.optimizer)
            number = path.name.removeprefix("model_")
            state.iteration = self.branch_point = int(number) if number.isdecimal() else 0
            state.start_ema()
            return
        contents = checkpoint.load(path) if contents is None else contents
        stored = checkpoint.read_config(contents, path)
        checkpoint.check_config(stored, state.model.config, path, change=self.settings.change)
        checkpoint.load_state(state.model, contents["model"], path)
        with report_unreadable_file(path):
            state.load_shared_state(contents)
        self.branch_point = state.iteration
        images = contents.get("images", len(self.dataset))
        if images != len(self.dataset):
            workers.print(
                f"note: {path} was trained on {images:,} images, and the data set has {len(self.dataset):,} now"
            )
        was_averaged, is_averaged = bool(contents.get("ema")), state.ema is not None
        if was_averaged and not is_averaged:
            workers.print(f"note: {path} has averaged weights, which this run drops; ema_decay would keep them")
        elif is_averaged and not was_averaged:
            workers.print(f"note: {path} has no averaged weights; the average starts with its weights")
        best = contents.get("best", {})
        self.best = dict(best) if isinstance(best, dict) else {"classifier": best}  # as earlier versions saved it
        self.rollbacks = contents.get("rollbacks", 0)
        worker_states = contents.get("workers", [])
        kept = sum(len(worker_state["buffer"]["images"]) for worker_state in worker_states)
        if kept and not self.settings.replay_batch:
            workers.print(
                f"note: {path} has a replay buffer of {kept:,} images, which this run drops, since replay_batch is off"
            )
        self.resume_worker(path, worker_states)

    def resume_worker(self, path: pathlib.Path, worker_states: list[dict[str, Any]]) -> None:
        """Load this worker's own state; if there is none, or there are those of another number of workers, say so."""
        state, workers = self.state, self.workers
        if len(worker_states) == workers.size:
            worker_state = worker_states[workers.rank]
            with report_unreadable_file(path):
                has_same_generators = state.load_worker_state(worker_state)
            if not has_same_generators:
                workers.print(f"note: {path} was written on another kind of device: the noise starts anew")
            if self.guard is not None and "guard" in worker_state:
                self.guard.load_state_dict(worker_state["guard"])
            return
        if not worker_states:
            workers.print(f"note: {path} holds no replay buffer and no random generators: both start anew")
        else:
            workers.print(
                f"note: {path} was saved by a run of {len(worker_states)} worker(s), and this run has {workers.size}: "
                "its replay buffers are redistributed, and the noise starts anew"
            )
            buffers = torch.cat([worker_state["buffer"]["images"] for worker_state in worker_states])
            state.buffer.load_state_dict({"images": buffers[workers.rank :: workers.size], "position": 0})

    # ------------------------------------------------------------------------------------------ stopping

    @contextlib.contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Inside the block, let a signal end the run after its iteration, and the same signal again at once."""
        self.stop_signals = StopSignals(self.workers.launch, self.ask_to_end)
        try:
            yield
        finally:
            self.stop_signals.restore()

    def ask_to_end(self, number: int) -> None:
        """End the run because a signal asks for that, and say so: a run of one worker breaks off its iteration."""
        if self.signal is not None:
            return
        self.signal, name = number, interruption.name_signal(number)
        if self.is_first:
            deed = "breaks off and undoes this iteration" if self.can_break else "finishes this iteration"
            interruption.say_at_once(f"{name}: the run {deed}, saves and ends; {name} again ends it at once")
        self.raise_break()

    @contextlib.contextmanager
    def surround_iteration(self) -> Iterator[None]:
        """Inside the block, until `average_gradients`, let a signal break off the iteration of a run of one worker.

        The state is then that of the last whole iteration, and is saved. Several workers go on to the end of an
        iteration, because they would have to break it off at the same place. Raises UsageError with remedies if the
        memory does not hold the iteration.
        """
        start = time.monotonic()
        try:
            self.can_break = self.workers.size == 1
            self.raise_break()
            with self.talk_during_long_iterations():
                yield
            self.last_seconds = time.monotonic() - start
        except Break:
            self.state.undo_draws(self.draws)
            self.check_last_step()
            self.end_early()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            advice = give_advice(list_remedies(self.settings, self.state, is_new=self.state.iteration == 0))
            raise UsageError(f"the memory does not hold iteration {self.state.iteration + 1}; {advice}") from None
        finally:
            self.can_break = False

    def talk_during_long_iterations(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which rank 0 says that an iteration goes on, if the last one took long."""
        if self.recorder is None or self.last_seconds < EVERY / 2:
            return contextlib.nullcontext()
        return self.recorder.progress.keep_talking()

    def raise_break(self) -> None:
        """Raise Break if a signal has come, unless the iteration cannot be broken off any more."""
        if self.can_break and self.signal is not None:
            raise Break(self.signal)

    def check_last_step(self) -> None:
        """Roll back if the last whole iteration, which is about to be saved, has diverged; not if it was checked."""
        if self.last_step is not None and not self.is_due(CHECK_INTERVAL):
            cause = self.find_divergence(self.last_step, is_saved=True)
            if cause is not None:
                self.roll_back(cause)

    def average_gradients(self) -> None:
        """Replace the gradients by their mean over workers; the weights change next, so that nothing breaks off now."""
        self.raise_break()
        self.can_break = False
        self.averager.finish()

    def is_asked_to_end(self) -> bool:
        """Return, on all workers, whether a signal has asked one of them to end the run."""
        return self.workers.any(self.signal is not None)

    def end_early(self) -> None:
        """Save, then end the process with the exit status that is usual for the signal."""
        number = self.signal = self.signal or signal.SIGTERM
        self.save()
        self.say(f"stopped by {interruption.name_signal(number)}; go on with {name_resumption(self.settings)}")
        self.finish_trackers()
        self.workers.barrier()
        if self.stop_signals is not None:
            self.stop_signals.release_launcher()
        self.workers.close()
        raise SystemExit(128 + number)


def bind_notes(recorder: Recorder | None, rank: int) -> Callable[[str], None]:
    """Return a function that prints a note on any rank, and logs it on rank 0; it does not hold the run's state."""
    if recorder is None:
        return lambda message: print(f"rank {rank}: {message}", flush=True)
    log, progress = recorder.log, recorder.progress

    def write_note(message: str) -> None:
        progress.say(message)
        log.write_event(progress.done, {"note": message})

    return write_note


def read_batch(state: State, settings: TrainSettings, dataset: data.Dataset) -> tuple[Tensor, Tensor | None]:
    """Return the next images (N, C, H, W) in [0, rescale] and labels (N, label_size) or None."""
    index = state.batches.next()
    if settings.single:
        index = torch.zeros_like(index)
    else:
        dataset.prefetch(state.batches.peek())
    images, labels = dataset.batch(index, state.generator, settings.rescale)
    if settings.augment:
        images = data.augment(images, state.generator)
    if settings.cutout:
        images = data.cutout(
            images,
            state.generator,
            probability=settings.cutout_prob,
            size=settings.cutout_mask_size,
            inside=settings.cutout_inside,
        )
    if settings.mixup:
        images = data.mixup(images, state.generator)
    return images, labels if state.model.config.label_size else None

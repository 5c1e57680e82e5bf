"""Time training iterations over steps and batch sizes, compared with their chain alone, and with the KL term.

    python benchmarks/iteration.py
    python benchmarks/iteration.py --network=ResNet32 --steps=20,60 --output=benchmarks/iteration_cpu.json
    python benchmarks/iteration.py --device=cuda --precision=fp16 --network=ResNet32Large --steps=60 --batch_sizes=128

On a GPU the chain is compiled and captured, as in train.py. The gradient of the KL term flows through the whole chain,
whose steps are computed again in the backward pass; "KL, kept" keeps all activations instead, which is the simplest way
to write it. Memory is the peak minus the memory that the process held before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
import models
import timing
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.hardware import allow_tf32, set_kernel_choice, set_tf32
from ebm.training.acceleration import Acceleration
from ebm.training.chains import run_chains
from ebm.training.state import State
from train import start_chains, train_step
from utils import REPLAY_SIZE, ClippedAdam, ReplayBuffer


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkNetwork):
    """Benchmark"""

    network: str = flag("MnistNet", "which network", choices=tuple(timing.NETWORKS))
    steps: tuple[int, ...] = flag((5, 10, 20, 40), "Langevin steps per iteration", at_least=0)
    batch_sizes: tuple[int, ...] = flag(
        (8, 16, 32), "images per iteration; the first steps are timed at all of them", at_least=1
    )
    rounds: int = flag(3, "timings per variant; the best counts", at_least=1)
    kl: bool = flag(True, "also with the KL term")


def measure_iteration(settings: Settings, num_steps: int, batch_size: int, what: str) -> dict[str, Any]:
    """Return a row of figures of a training iteration.

    what: "iteration", "chain" (its chain alone), "KL" (an iteration with the KL term), or "KL, kept" (the same with all
    activations in memory).
    """
    device, on_gpu = settings.device, settings.device == "cuda"
    set_kernel_choice(deterministic=False)
    set_tf32(False)
    model = timing.build_network(settings.network, settings.num_filters, device).train()
    images = timing.draw_images(model, batch_size, device)
    state = State(
        model,
        ClippedAdam(model.parameters(), lr=1e-4),
        ReplayBuffer(REPLAY_SIZE, model.config.image_shape, device),
        data.Batches(batch_size, batch_size, seed=0, device=device),
        torch.Generator(device).manual_seed(0),
        acceleration=Acceleration(settings.precision, compiled=on_gpu, captured=on_gpu),
    )
    train_settings = TrainSettings(
        batch_size=batch_size, num_steps=num_steps, step_lr=10.0, replay_batch=True, zero_kl=not what.startswith("KL")
    )

    def run() -> None:
        with allow_tf32(settings.precision):
            if what == "chain":
                run_chains(state, train_settings, models.freeze_energy(model), images, None)
            else:
                start = start_chains(state, train_settings, images)
                train_step(state, train_settings, images, None, start, average_gradients=lambda: None)

    def call_step(step: Callable[..., object], *arguments: object, use_reentrant: bool) -> object:
        return step(*arguments)

    with mock.patch("sampling.checkpoint", call_step) if what == "KL, kept" else contextlib.nullcontext():
        memory = timing.measure_peak_memory(run, device)
        seconds = timing.measure_best_seconds({what: run}, settings.rounds, device)[what]
    row = {"steps": num_steps, "batch": batch_size, "what": what, "ms": 1e3 * seconds, "peak MB": memory}
    return row | {"energies in": str(state.acceleration)}


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    steps, batch_sizes = settings.steps, settings.batch_sizes
    kinds = ("chain", "iteration") + settings.kl * ("KL", "KL, kept")
    plans = [(k, batch_sizes[0], what) for k in steps for what in kinds]
    plans += [(steps[0], n, what) for n in batch_sizes[1:] for what in ("chain", "iteration")]
    rows: list[dict[str, Any]] = []
    for plan in plans:
        if settings.device == "cuda":
            row = measure_iteration(settings, *plan)
        else:  # a process of its own, because the peak of CPU memory depends on what the process did before
            with multiprocessing.get_context("fork").Pool(1) as pool:
                row = pool.apply(measure_iteration, (settings, *plan))
        comparison = ""
        if row["what"] == "iteration":
            row["of chain's rate"] = share = rows[-1]["ms"] / row["ms"]
            comparison = f"  {share:.1%} of the chain's rate"
        rows.append(row)
        line = "{steps:4} steps  batch {batch:3}  {what:10} {ms:9.1f} ms  peak {peak MB:7.1f} MB".format(**row)
        print(line + comparison, flush=True)
    if settings.output:
        print(f"wrote {timing.write_rows(settings, rows, **timing.describe_machine(settings.device))}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

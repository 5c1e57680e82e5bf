"""Time whole training iterations: over steps and batch sizes, beside their chain alone, and with the KL term.

    python benchmarks/iteration.py
    python benchmarks/iteration.py --network=ResNet32 --steps=20,60 --output=benchmarks/iteration_cpu.json

The KL term's gradient flows through the whole chain. Each step is computed again in the backward pass; "KL, kept" keeps
all activations instead, what everyone would write first. Memory is the peak beyond what the process held before.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli

FLAGS = flags.FLAGS
SHAPES = {"MnistNet": (1, 28, 28), "DspritesNet": (1, 64, 64), "ResNet32": (3, 32, 32)}

with cli.group("Benchmark"):
    flags.DEFINE_enum("network", "MnistNet", list(SHAPES), "which network")
    flags.DEFINE_integer("num_filters", 64, "its width", lower_bound=1)
    flags.DEFINE_list("steps", "5,10,20,40", "Langevin steps per iteration")
    flags.DEFINE_list("batch_sizes", "8,16,32", "images per iteration; the first steps are timed at all of them")
    flags.DEFINE_integer("rounds", 3, "timings per variant; the best counts", lower_bound=1)
    flags.DEFINE_string("output", "", "also write the figures to this JSON file")


def peak_memory(run: Callable[[], object]) -> float:
    """Return by how many MB the resident memory of this process peaks above its present during `run` (Linux)."""

    def resident(field: str) -> float:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(field))

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure(plan: tuple[int, int, str]) -> dict[str, Any]:
    """Return a row of figures: (Langevin steps, batch size, what), in a process of its own."""
    import torch

    import data
    import models
    import training
    from optimizer import ClippedAdam
    from utils import ReplayBuffer

    num_steps, batch_size, what = plan
    shape = SHAPES[FLAGS.network]
    model = models.build_model(models.ModelConfig(FLAGS.network, shape, FLAGS.num_filters))
    state = training.State(
        model,
        ClippedAdam(model.parameters(), lr=1e-4),
        ReplayBuffer(training.REPLAY_SIZE, shape),
        data.Batches(batch_size, batch_size, seed=0),
        torch.Generator().manual_seed(0),
    )
    options = training.Options(num_steps=num_steps, step_lr=10.0, replay_batch=True, zero_kl=not what.startswith("KL"))
    images = torch.rand(batch_size, *shape)

    def run() -> None:
        if what == "chain":
            energy = functools.partial(model.energy, models.spectral_norm_once(model))
            training.run_chain(energy, images, options, state.generator)
        else:
            training.train_step(state, options, images, None, average=lambda: None)

    def keep(step: Callable[..., object], *arguments: object, use_reentrant: bool) -> object:
        return step(*arguments)

    with mock.patch("sampling.checkpoint", keep) if what == "KL, kept" else contextlib.nullcontext():
        memory, seconds = peak_memory(run), []
        for _ in range(FLAGS.rounds):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return {"steps": num_steps, "batch": batch_size, "what": what, "ms": 1e3 * min(seconds), "peak MB": memory}


def main() -> None:
    steps, batch_sizes = [int(k) for k in FLAGS.steps], [int(n) for n in FLAGS.batch_sizes]
    plans = [(k, batch_sizes[0], what) for k in steps for what in ("chain", "iteration", "KL", "KL, kept")]
    plans += [(steps[0], n, what) for n in batch_sizes[1:] for what in ("chain", "iteration")]
    rows = []
    for plan in plans:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            row = pool.apply(measure, (plan,))
        rows.append(row)
        print(
            "{steps:4} steps  batch {batch:3}  {what:10} {ms:9.1f} ms  peak {peak MB:7.1f} MB".format(**row), flush=True
        )
    if FLAGS.output:
        print(f"wrote {cli.write_rows(FLAGS.output, rows, cores=len(os.sched_getaffinity(0)))}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

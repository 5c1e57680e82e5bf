"""Time whole training iterations: over steps and batch sizes, beside their chain alone, and with the KL term.

    python benchmarks/iteration.py
    python benchmarks/iteration.py --network=ResNet32 --steps=20,60 --output=benchmarks/iteration_cpu.json
    python benchmarks/iteration.py --device=cuda --precision=fp16 --network=ResNet32Large --steps=60 --batch_sizes=128

On a GPU the chain is compiled and captured, as in train.py. The KL term's gradient flows through the whole chain. Each
step is computed again in the backward pass; "KL, kept" keeps all activations instead, what everyone would write first.
Memory is the peak beyond what the process held before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli
import data
import models
import timing
import training
from acceleration import Acceleration, products_in, set_kernel_choice, set_tf32
from optimizer import ClippedAdam
from utils import ReplayBuffer

FLAGS = flags.FLAGS

with cli.group("Benchmark"):
    flags.DEFINE_enum("network", "MnistNet", list(timing.NETWORKS), "which network")
    flags.DEFINE_integer("num_filters", None, "its width; default that of the published commands", lower_bound=1)
    flags.DEFINE_list("steps", "5,10,20,40", "Langevin steps per iteration")
    flags.DEFINE_list("batch_sizes", "8,16,32", "images per iteration; the first steps are timed at all of them")
    flags.DEFINE_integer("rounds", 3, "timings per variant; the best counts", lower_bound=1)
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute")
    flags.DEFINE_enum("precision", "float32", cli.PRECISIONS, "as in train.py")
    flags.DEFINE_bool("kl", True, "also with the KL term")
    flags.DEFINE_string("output", "", "also write the figures to this JSON file")


def measure(plan: tuple[int, int, str]) -> dict[str, Any]:
    """Return a row of figures: (Langevin steps, batch size, what)."""
    num_steps, batch_size, what = plan
    device, on_gpu = FLAGS.device, FLAGS.device == "cuda"
    set_kernel_choice(deterministic=False)
    set_tf32(False)
    model = timing.build_network(FLAGS.network, FLAGS.num_filters, device).train()
    images = timing.random_images(model, batch_size, device)
    state = training.State(
        model,
        ClippedAdam(model.parameters(), lr=1e-4),
        ReplayBuffer(training.REPLAY_SIZE, model.config.image_shape, device),
        data.Batches(batch_size, batch_size, seed=0, device=device),
        torch.Generator(device).manual_seed(0),
        acceleration=Acceleration(FLAGS.precision, compiled=on_gpu, captured=on_gpu),
    )
    options = training.Options(
        batch_size=batch_size, num_steps=num_steps, step_lr=10.0, replay_batch=True, zero_kl=not what.startswith("KL")
    )

    def run() -> None:
        with products_in(FLAGS.precision):
            if what == "chain":
                training.draw_negatives(state, options, models.spectral_norm_once(model), images, None)
            else:
                training.train_step(state, options, images, None, average=lambda: None)

    def keep(step: Callable[..., object], *arguments: object, use_reentrant: bool) -> object:
        return step(*arguments)

    with mock.patch("sampling.checkpoint", keep) if what == "KL, kept" else contextlib.nullcontext():
        memory = timing.peak_memory(run, device)
        seconds = timing.best_seconds({what: run}, FLAGS.rounds, device)[what]
    row = {"steps": num_steps, "batch": batch_size, "what": what, "ms": 1e3 * seconds, "peak MB": memory}
    return row | {"energies in": str(state.acceleration)}


def main() -> None:
    steps, batch_sizes = [int(k) for k in FLAGS.steps], [int(n) for n in FLAGS.batch_sizes]
    kinds = ("chain", "iteration") + FLAGS.kl * ("KL", "KL, kept")
    plans = [(k, batch_sizes[0], what) for k in steps for what in kinds]
    plans += [(steps[0], n, what) for n in batch_sizes[1:] for what in ("chain", "iteration")]
    rows: list[dict[str, Any]] = []
    for plan in plans:
        if FLAGS.device == "cuda":  # whose memory torch counts itself
            row = measure(plan)
        else:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                row = pool.apply(measure, (plan,))
        beside = ""
        if row["what"] == "iteration":
            row["of chain's rate"] = share = rows[-1]["ms"] / row["ms"]
            beside = f"  {share:.1%} of the chain's rate"
        rows.append(row)
        line = "{steps:4} steps  batch {batch:3}  {what:10} {ms:9.1f} ms  peak {peak MB:7.1f} MB".format(**row)
        print(line + beside, flush=True)
    if FLAGS.output:
        print(f"wrote {cli.write_rows(FLAGS.output, rows, **timing.describe(FLAGS.device))}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

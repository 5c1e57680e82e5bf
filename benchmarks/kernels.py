"""Show where the time of a Langevin step goes: its longest kernels on a GPU, its longest operators on a CPU.

    python benchmarks/kernels.py --network=MnistNet
    python benchmarks/kernels.py --device=cuda --precision=fp16 --batch_size=128 --output=benchmarks/kernels.json

On a GPU the step is compiled, as in train.py. Times are sums over a chain of --steps, per step.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from typing import Any

import torch
from absl import flags
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli
import models
import sampling
import timing
from acceleration import Acceleration, set_kernel_choice, set_tf32

FLAGS = flags.FLAGS

with cli.group("Benchmark"):
    flags.DEFINE_enum("network", "ResNet32", list(timing.NETWORKS), "which network")
    flags.DEFINE_integer("num_filters", None, "its width; default that of the published commands", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "images per step", lower_bound=1)
    flags.DEFINE_integer("steps", 5, "Langevin steps", lower_bound=1)
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute")
    flags.DEFINE_enum("precision", "float32", cli.PRECISIONS, "as in train.py")
    flags.DEFINE_integer("longest", 20, "how many to show", lower_bound=1)
    flags.DEFINE_string("output", "", "also write the figures to this JSON file")


def main() -> None:
    set_kernel_choice(deterministic=False)
    set_tf32(False)
    on_gpu = FLAGS.device == "cuda"
    model = timing.build_network(FLAGS.network, FLAGS.num_filters, FLAGS.device)
    weights, x = models.spectral_norm_once(model), timing.random_images(model, FLAGS.batch_size, FLAGS.device)
    generator, chosen = torch.Generator(FLAGS.device).manual_seed(0), Acceleration(FLAGS.precision, compiled=on_gpu)

    def chain(weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
        energy = functools.partial(model.energy, weights)
        return sampling.langevin(energy, x, num_steps=FLAGS.steps, step_lr=10.0, generator=generator, compiled=compiled)

    def run() -> None:
        chosen.run(chain, weights, x, None, generator, repeated=False)

    timing.timed(run, FLAGS.device)  # compiles and chooses kernels
    activities = [ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        timing.timed(run, FLAGS.device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    # Annotations last as long as the kernels that they are about.
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    time_of = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total = sum(time_of.values())
    rows: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: -time_of[event.key])[: FLAGS.longest]:
        micros = time_of[event.key]
        row = {"kernel": event.key, "us per step": micros / FLAGS.steps, "share": micros / total}
        rows.append(row | {"calls per step": event.count / FLAGS.steps})
        print("{us per step:10.1f} us  {share:6.1%}  {calls per step:6.1f} calls  {kernel:.90}".format(**rows[-1]))
    print(f"{total / FLAGS.steps:10.1f} us per step in all")
    if FLAGS.output:
        path = cli.write_rows(FLAGS.output, rows, **timing.describe(FLAGS.device), total=total / FLAGS.steps)
        print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

"""List the kernels (on a GPU) or operators (on a CPU) that take most of the time of a Langevin step.

    python benchmarks/kernels.py --network=MnistNet
    python benchmarks/kernels.py --device=cuda --precision=fp16 --batch_size=128 --output=benchmarks/kernels.json

On a GPU the step is compiled, as in train.py. Times are sums over a chain of --steps, per step.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import models
import sampling
import timing
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.hardware import set_kernel_choice, set_tf32
from ebm.support.progress import show_waiting
from ebm.support.reports import print_written
from ebm.training.acceleration import Acceleration


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkNetwork):
    """Benchmark"""

    batch_size: int = flag(16, "images per step", at_least=1)
    steps: int = flag(5, "Langevin steps", at_least=1)
    longest: int = flag(20, "how many kernels or operators to list", at_least=1)


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    set_kernel_choice(deterministic=False)
    set_tf32(False)
    on_gpu = settings.device == "cuda"
    model = timing.build_network(settings.network, settings.num_filters, settings.device)
    weights, x = models.spectral_norm_once(model), timing.draw_images(model, settings.batch_size, settings.device)
    generator = torch.Generator(settings.device).manual_seed(0)
    acceleration = Acceleration(settings.precision, compiled=on_gpu)

    def chain(weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
        energy = functools.partial(model.energy, weights)
        return sampling.langevin(
            energy, x, num_steps=settings.steps, step_lr=10.0, generator=generator, compiled=compiled
        )

    def run() -> None:
        acceleration.run(chain, weights, x, None, generator, repeated=False)

    with show_waiting("running a first chain, which chooses kernels" + ", and compiling its step" * on_gpu):
        timing.measure_seconds(run, settings.device)
    activities = [ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        timing.measure_seconds(run, settings.device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    # Annotations would count the time of the kernels that they describe twice.
    events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
    time_of = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total = sum(time_of.values())
    rows: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: -time_of[event.key])[: settings.longest]:
        micros = time_of[event.key]
        row = {"kernel": event.key, "us per step": micros / settings.steps, "share": micros / total}
        rows.append(row | {"calls per step": event.count / settings.steps})
        print("{us per step:10.1f} us  {share:6.1%}  {calls per step:6.1f} calls  {kernel:.90}".format(**rows[-1]))
    print(f"{total / settings.steps:10.1f} us per step in all")
    if settings.output:
        machine = timing.describe_machine(settings.device)
        print_written([timing.write_rows(settings, rows, **machine, total=total / settings.steps)])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

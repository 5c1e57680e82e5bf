"""Time training iterations over steps, batch and image sizes, compared with their chain alone, and with the KL term.

    python benchmarks/iteration.py
    python benchmarks/iteration.py --network=ResNet32 --num_filters=32 --steps=5,10,20,40 --batch_sizes=4,8,16,32 \\
        --scales=1,2 --output=benchmarks/cost.json    # and a plot beside it, cost.png
    python benchmarks/iteration.py --device=cuda --precision=fp16 --network=ResNet32Large --steps=60 --batch_sizes=128

On a GPU the chain is compiled and captured, as in train.py. The gradient of the KL term flows through the whole chain,
whose steps are computed again in the backward pass. "KL, checkpoint" does so by torch.utils.checkpoint, and "KL, kept"
keeps all activations instead, which is the simplest way to write it. Memory is the peak minus the memory that the
process held before.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
import models
import timing
from ebm.settings import TrainSettings
from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.hardware import allow_tf32, set_kernel_choice, set_tf32
from ebm.support.reports import print_written
from ebm.training.acceleration import Acceleration
from ebm.training.chains import run_chains
from ebm.training.state import State
from train import start_chains, train_step
from utils import REPLAY_SIZE, ClippedAdam, ReplayBuffer

# Other ways to take a step of a differentiable chain, in place of `RecomputedStep.apply`.
OTHER_STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "KL, checkpoint": lambda step, x, noise, *tensors: checkpoint(step, x, noise, True, use_reentrant=False),
    "KL, kept": lambda step, x, noise, *tensors: step(x, noise, True),
}


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkNetwork):
    """Benchmark"""

    network: str = flag("MnistNet", "which network", choices=tuple(timing.NETWORKS))
    output: str = flag("", "also write the figures to this JSON file, and a plot beside it", is_path=True)
    steps: tuple[int, ...] = flag((5, 10, 20, 40), "Langevin steps per iteration", at_least=1)
    batch_sizes: tuple[int, ...] = flag(
        (8, 16, 32), "images per iteration; the first steps are timed at all of them", at_least=1
    )
    scales: tuple[int, ...] = flag(
        (1,), "factors of the sides of images; the first steps and batch are timed at all of them", at_least=1
    )
    rounds: int = flag(3, "timings per variant; the best counts", at_least=1)
    kl: bool = flag(True, "also with the KL term")


def measure_iteration(settings: Settings, num_steps: int, batch_size: int, scale: int, what: str) -> dict[str, Any]:
    """Return a row of figures of a training iteration.

    scale: a factor of the sides of images. what: "iteration", "chain" (its chain alone), "KL" (an iteration with the KL
    term), or one of OTHER_STEPS.
    """
    device, on_gpu = settings.device, settings.device == "cuda"
    set_kernel_choice(deterministic=False)
    set_tf32(False)
    model = timing.build_network(settings.network, settings.num_filters, device, scale).train()
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
                start = start_chains(state, train_settings, images, None)
                train_step(state, train_settings, images, None, start, average_gradients=lambda: None)

    other_step = OTHER_STEPS.get(what)
    with mock.patch("sampling.RecomputedStep.apply", other_step) if other_step else contextlib.nullcontext():
        memory = timing.measure_peak_memory(run, device)
        seconds = timing.measure_best_seconds({what: run}, settings.rounds, device)[what]
    place = {"steps": num_steps, "batch": batch_size, "scale": scale, "what": what}
    return place | {"ms": 1e3 * seconds, "peak MB": memory, "energies in": str(state.acceleration)}


def plot_costs(settings: Settings, rows: Sequence[Mapping[str, Any]], hardware: str) -> pathlib.Path:
    """Plot time and memory of an iteration over its steps, batch size and image area; return the picture's path.

    Each line changes one of them, in multiples of its first value, and leaves the others at their first values.
    """
    first = {"steps": settings.steps[0], "batch": settings.batch_sizes[0], "scale": settings.scales[0]}
    lines = {  # what changes, and what is measured there
        "Langevin steps": ("steps", "iteration"),
        "batch size": ("batch", "iteration"),
        "image area": ("scale", "iteration"),
        "steps, KL term": ("steps", "KL"),
        "steps, KL, checkpoint": ("steps", "KL, checkpoint"),
        "steps, KL, all kept": ("steps", "KL, kept"),
    }
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for ylabel, figure in (("ms per iteration", "ms"), ("peak memory, MB", "peak MB")):
        panels[ylabel] = {}
        for name, (changed, what) in lines.items():
            same = {key: value for key, value in first.items() if key != changed} | {"what": what}
            points = [row for row in rows if same.items() <= row.items()]
            factors = [(row[changed] / first[changed]) ** (2 if changed == "scale" else 1) for row in points]
            if len(points) > 1:
                panels[ylabel][name] = factors, [row[figure] for row in points]
    model = f"{settings.network}, {settings.num_filters or timing.NETWORKS[settings.network][1]} filters"
    side = first["scale"] * timing.NETWORKS[settings.network][0][-1]
    start = f"{first['steps']} steps, batch {first['batch']}, {side}x{side} pixels"
    return pictures.plot_lines(
        panels,
        pathlib.Path(settings.output).with_suffix(".png"),
        xlabel=f"times the first value\n(1: {start})",
        title=f"{model}, {hardware}",
    )


def main(settings: Settings) -> None:
    dynamo = importlib.import_module("torch._dynamo")  # slow; checkpoint would load it while memory is measured
    dynamo.config.recompile_limit = 100  # a step for each network and batch
    timing.prepare_output(settings)
    steps, batch_sizes, scales = settings.steps, settings.batch_sizes, settings.scales
    kinds = ("chain", "iteration") + settings.kl * ("KL", *OTHER_STEPS)
    plans = [(k, batch_sizes[0], scales[0], what) for k in steps for what in kinds]
    plans += [(steps[0], n, scales[0], what) for n in batch_sizes[1:] for what in ("chain", "iteration")]
    plans += [(steps[0], batch_sizes[0], scale, what) for scale in scales[1:] for what in ("chain", "iteration")]
    rows: list[dict[str, Any]] = []
    print(f"work: {len(plans)} measurements, a line after each", flush=True)
    for plan in plans:
        if settings.device == "cuda":
            row = measure_iteration(settings, *plan)
        else:  # a process of its own, because the peak of CPU memory depends on what the process did before
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                row = pool.submit(measure_iteration, settings, *plan).result()
        comparison = ""
        if row["what"] == "iteration":
            row["of chain's rate"] = share = rows[-1]["ms"] / row["ms"]
            comparison = f"  {share:.1%} of the chain's rate"
        rows.append(row)
        place = "{steps:4} steps  batch {batch:3}  scale {scale}  {what:14}".format(**row)
        print(f"{place} {row['ms']:9.1f} ms  peak {row['peak MB']:7.1f} MB{comparison}", flush=True)
    if settings.output:
        machine = timing.describe_machine(settings.device)
        path = timing.write_rows(settings, rows, **machine)
        print_written([path, plot_costs(settings, rows, machine["hardware"])])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

"""Time a Langevin step against the plain loop everyone writes, torchebm, and the machine's matrix-product rate.

    python benchmarks/langevin.py                                         # MnistNet, DspritesNet, ResNet32, batch 16
    python benchmarks/langevin.py --networks=all --batch_size=128 --device=cuda --precision=fp16
    python benchmarks/langevin.py --compile --output=benchmarks/cpu.json    # and a plot beside it, cpu.png

All of a row is measured in turns, in one run; the best of --rounds counts. "of limit" is the rate of direct-convolution
operations over that of a matrix product in the same precision: folding does fewer of them, so it can exceed 100 %.
torchebm (`pip install torchebm`) samples from the same network with its weights frozen and normalised once.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from absl import flags
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli
import models
import pictures
import sampling
from errors import UsageError
from utils import keep_freed_memory

FLAGS = flags.FLAGS
# network -> shape of its images, filters
NETWORKS = {
    "MnistNet": ((1, 28, 28), 64),
    "DspritesNet": ((1, 64, 64), 64),
    "ResNet32": ((3, 32, 32), 128),
    "ResNet32Large": ((3, 32, 32), 128),
    "ResNet32Larger": ((3, 32, 32), 128),
    "ResNet32Wider": ((3, 32, 32), 192),
    "ResNet128": ((3, 128, 128), 64),
}
MATRIX = 2048  # rows and columns of the product that sets the limit
STEP_LR = 10.0

with cli.group("Benchmark"):
    flags.DEFINE_list("networks", "MnistNet,DspritesNet,ResNet32", f"all, or of {', '.join(NETWORKS)}")
    flags.DEFINE_integer("batch_size", 16, "images per step", lower_bound=1)
    flags.DEFINE_integer("steps", 3, "Langevin steps per timing", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "timings per variant", lower_bound=1)
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute")
    flags.DEFINE_enum("precision", "float32", ["float32", "tf32", "fp16", "bf16"], "of this project's convolutions")
    flags.DEFINE_boolean("compile", False, "also time the compiled step")
    flags.DEFINE_string("output", "", "also write the figures to this JSON file, and a plot beside it")


# ---- the variants: chains of so many steps from images x (N, C, H, W) ----


def plain_energy(model: models.EnergyNetwork, weights: models.Weights, x: Tensor) -> Tensor:
    """Evaluate stage by stage in NCHW, by the library's convolution."""
    with mock.patch.object(models, "convolve", lambda x, k, s, p: F.conv2d(x, k, stride=s, padding=p)):
        for stage in model.stages.values():
            x = stage(weights, x, None)
    return x.squeeze(1)


def plain_chain(model: models.EnergyNetwork, x: Tensor, steps: int) -> None:
    """Normalise at every step, let the weights require gradients, and call backward()."""
    for _ in range(steps):
        x = (x + 0.005 * torch.randn_like(x)).detach().requires_grad_()
        weights = model.prepare(fold=False, memory_format=torch.contiguous_format)
        plain_energy(model, weights, x).sum().backward()
        assert x.grad is not None, "backward() reached the images"
        x = (x - STEP_LR * x.grad).clamp(0, 1)


def torchebm_chain(model: models.EnergyNetwork, x: Tensor, steps: int) -> None:
    """Let torchebm's LangevinDynamics sample from the network, its weights normalised once."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Energy(BaseModel, nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain_energy(model, weights, x)

    with torch.no_grad():
        weights = models.detach(model.prepare(fold=False, memory_format=torch.contiguous_format))
    energy = Energy(device=x.device)
    sampler = LangevinDynamics(energy, step_size=STEP_LR, noise_scale=1e-3, clamp=(0, 1), device=x.device)
    sampler.sample(x=x, n_steps=steps)


def our_steps(
    model: models.EnergyNetwork, weights: models.Weights, x: Tensor, steps: int, compiled: bool, generator: Any = None
) -> Tensor:
    energy = functools.partial(model.energy, weights)
    return sampling.langevin(energy, x, num_steps=steps, step_lr=STEP_LR, generator=generator, compiled=compiled)


def our_chain(model: models.EnergyNetwork, x: Tensor, steps: int, *, dtype: torch.dtype, compiled: bool) -> None:
    our_steps(model, models.spectral_norm_once(model, dtype), x, steps, compiled)


def captured_chain(model: models.EnergyNetwork, device: torch.device, dtype: torch.dtype, compiled: bool) -> Callable:
    """Return our_chain as a CUDA graph of --steps steps, as train.py --cuda_graph runs it."""
    generator = torch.Generator(device).manual_seed(0)
    graph = sampling.CapturedChain(
        lambda weights, x, labels: our_steps(model, weights, x, FLAGS.steps, compiled, generator), generator
    )
    return lambda model, x, steps: graph(models.spectral_norm_once(model, dtype), x, None)


# ---- timing ----


def in_turns(runs: dict[str, Callable[[], object]], rounds: int, on_gpu: bool) -> tuple[dict, dict]:
    """Return by name the least seconds of all rounds, to the end of what a run queues, and a GPU's peak memory in MB.

    The first round warms up and does not count.
    """
    best, memory = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, 0.0)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 1e6
            best[name] = min(best[name], time.perf_counter() - start) if turn else best[name]
    return best, memory


def measure(name: str, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row of figures for each variant on one network."""
    shape, filters = NETWORKS[name]
    steps, batch_size, on_gpu = FLAGS.steps, FLAGS.batch_size, device.type == "cuda"
    model = models.build_model(models.ModelConfig(name, shape, filters)).to(device)
    x = torch.rand(batch_size, *shape, device=device)
    with FlopCounterMode(display=False) as counter:
        model.energy(models.detach(model.prepare(fold=False)), x.clone().requires_grad_()).sum().backward()
    work = counter.get_total_flops() / 1e9  # a step's multiplications and additions

    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    chains: dict[str, Callable[..., None]] = {"plain loop": plain_chain}
    if importlib.util.find_spec("torchebm"):
        chains["torchebm"] = torchebm_chain
    chains["this project"] = functools.partial(our_chain, dtype=dtype, compiled=False)
    if FLAGS.compile:
        chains["compiled"] = functools.partial(our_chain, dtype=dtype, compiled=True)
    if on_gpu:
        chains["captured"] = captured_chain(model, device, dtype, FLAGS.compile)
    runs: dict[str, Callable[[], object]] = {v: functools.partial(run, model, x, steps) for v, run in chains.items()}
    best, memory = in_turns(runs | {"matrix": functools.partial(torch.mm, matrix, matrix)}, FLAGS.rounds, on_gpu)
    limit = 2 * MATRIX**3 / 1e9 / best["matrix"]
    return [
        {
            "network": name,
            "variant": variant,
            "ms per step": 1e3 * best[variant] / steps,
            "times plain": best["plain loop"] / best[variant],
            "images per s": batch_size * steps / best[variant],
            "GFLOP/s": work * steps / best[variant],
            "of limit": work * steps / best[variant] / limit,
            "limit GFLOP/s": limit,
            "peak MB": memory[variant] if on_gpu else None,
        }
        for variant in chains
    ]


def main() -> None:
    device, dtype = torch.device(FLAGS.device), sampling.set_precision(FLAGS.precision)
    keep_freed_memory()  # as train.py does; it helps all variants alike
    names, rows = list(NETWORKS) if FLAGS.networks == ["all"] else FLAGS.networks, []
    for name in names:
        if name not in NETWORKS:
            raise UsageError(f"--networks={name} is unknown; use all, or of {', '.join(NETWORKS)}")
        for row in measure(name, device, dtype):
            rows.append(row)
            print(
                "{network:14} {variant:13} {ms per step:8.1f} ms  {times plain:5.2f}x  {images per s:8.1f} images/s  "
                "{GFLOP/s:8.0f} GFLOP/s  {of limit:6.1%} of {limit GFLOP/s:.0f}".format(**row)
                + (f"  {row['peak MB']:.0f} MB" if row["peak MB"] else ""),
                flush=True,
            )
    if FLAGS.output:
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        path = cli.write_rows(FLAGS.output, rows, torch=torch.__version__, hardware=hardware)
        bars: dict[str, dict[str, float]] = {}
        for row in rows:
            bars.setdefault(row["variant"], {})[row["network"]] = row["of limit"]
        title = f"a Langevin step, batch {FLAGS.batch_size}, {hardware}"
        plot = pictures.plot_bars(
            bars, path.with_suffix(".png"), ylabel="share of the matrix-product rate", title=title
        )
        print(f"wrote {path} and {plot}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

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
import json
import pathlib
import sys
import time
from collections.abc import Callable
from unittest import mock

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli

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

with cli.group("Benchmark"):
    flags.DEFINE_list("networks", "MnistNet,DspritesNet,ResNet32", f"all, or of {', '.join(NETWORKS)}")
    flags.DEFINE_integer("batch_size", 16, "images per step", lower_bound=1)
    flags.DEFINE_integer("steps", 3, "Langevin steps per timing", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "timings per variant", lower_bound=1)
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute")
    flags.DEFINE_enum("precision", "float32", ["float32", "tf32", "fp16", "bf16"], "of this project's convolutions")
    flags.DEFINE_boolean("compile", False, "also time the compiled step")
    flags.DEFINE_string("output", "", "also write the figures to this JSON file, and a plot beside it")


def main() -> None:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from torch.utils.flop_counter import FlopCounterMode

    import models
    import pictures
    import sampling
    from utils import keep_freed_memory

    device, dtype = torch.device(FLAGS.device), sampling.set_precision(FLAGS.precision)
    on_gpu = device.type == "cuda"

    def seconds(run: Callable[[], object]) -> float:
        """Return how long `run` takes, to the end of what it queued on the device."""
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def plain_energy(model: models.EnergyNetwork, weights: models.Weights, x: Tensor) -> Tensor:
        """Evaluate stage by stage in NCHW, by the library's convolution."""
        with mock.patch.object(models, "convolve", lambda x, k, s, p: F.conv2d(x, k, stride=s, padding=p)):
            for stage in model.stages.values():
                x = stage(weights, x, None)
        return x.squeeze(1)

    def plain_chain(model: models.EnergyNetwork, x: Tensor) -> None:
        """Normalise at every step, let the weights require gradients, and call backward()."""
        for _ in range(FLAGS.steps):
            x = (x + 0.005 * torch.randn_like(x)).detach().requires_grad_()
            weights = model.prepare(fold=False, memory_format=torch.contiguous_format)
            plain_energy(model, weights, x).sum().backward()
            assert x.grad is not None, "backward() reached the images"
            x = (x - 10.0 * x.grad).clamp(0, 1)

    def torchebm_chain(model: models.EnergyNetwork, x: Tensor) -> None:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics

        class Energy(BaseModel, nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return plain_energy(model, weights, x)

        with torch.no_grad():
            weights = models.detach(model.prepare(fold=False, memory_format=torch.contiguous_format))
        sampler = LangevinDynamics(Energy(device=device), step_size=10.0, noise_scale=1e-3, clamp=(0, 1), device=device)
        sampler.sample(x=x, n_steps=FLAGS.steps)

    def our_chain(model: models.EnergyNetwork, x: Tensor, compiled: bool) -> None:
        weights = models.spectral_norm_once(model, dtype)
        energy = functools.partial(model.energy, weights)
        sampling.langevin(energy, x, num_steps=FLAGS.steps, step_lr=10.0, compiled=compiled)

    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    rows = []
    for name in NETWORKS if FLAGS.networks == ["all"] else FLAGS.networks:
        shape, filters = NETWORKS[name]
        model = models.build_model(models.ModelConfig(name, shape, filters)).to(device)
        x = torch.rand(FLAGS.batch_size, *shape, device=device)
        weights = models.detach(model.prepare(fold=False))
        with FlopCounterMode(display=False) as counter:
            model.energy(weights, x.clone().requires_grad_()).sum().backward()
        work = counter.get_total_flops() / 1e9  # a step's multiplications and additions

        variants: dict[str, Callable[[], object]] = {"plain loop": functools.partial(plain_chain, model, x)}
        if importlib.util.find_spec("torchebm"):
            variants["torchebm"] = functools.partial(torchebm_chain, model, x)
        variants["this project"] = functools.partial(our_chain, model, x, compiled=False)
        if FLAGS.compile:
            variants["compiled"] = functools.partial(our_chain, model, x, compiled=True)
        product: Callable[[], object] = functools.partial(torch.mm, matrix, matrix)
        best, memory = dict.fromkeys([*variants, "matrix"], float("inf")), dict.fromkeys(variants, 0)
        for turn in range(FLAGS.rounds + 1):
            if turn == 1:
                keep_freed_memory()  # as train.py does; it helps all variants alike
            for variant, run in {**variants, "matrix": product}.items():
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                elapsed = seconds(run)
                best[variant] = min(best[variant], elapsed) if turn else best[variant]
                if on_gpu and variant in memory:
                    memory[variant] = torch.cuda.max_memory_allocated()
        limit = 2 * MATRIX**3 / 1e9 / best["matrix"]
        for variant in variants:
            step = best[variant] / FLAGS.steps
            row = {
                "network": name,
                "variant": variant,
                "ms per step": 1e3 * step,
                "times plain": best["plain loop"] / best[variant],
                "images per s": FLAGS.batch_size / step,
                "GFLOP/s": work / step,
                "of limit": work / step / limit,
                "limit GFLOP/s": limit,
                "peak MB": memory[variant] / 1e6 if on_gpu else None,
            }
            rows.append(row)
            print(
                f"{name:14} {variant:13} {row['ms per step']:8.1f} ms  {row['times plain']:5.2f}x  "
                f"{row['images per s']:8.1f} images/s  {row['GFLOP/s']:8.0f} GFLOP/s  "
                f"{row['of limit']:6.1%} of {limit:.0f}" + (f"  {row['peak MB']:.0f} MB" if on_gpu else ""),
                flush=True,
            )
    if FLAGS.output:
        path = pathlib.Path(FLAGS.output)
        hardware = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
        settings = {"torch": torch.__version__, "hardware": hardware, **cli.values()}
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
        bars = {v: {r["network"]: r["of limit"] for r in rows if r["variant"] == v} for v in variants}
        title = f"a Langevin step, batch {FLAGS.batch_size}, {hardware}"
        plot = pictures.plot_bars(
            bars, path.with_suffix(".png"), ylabel="share of the matrix-product rate", title=title
        )
        print(f"wrote {path} and {plot}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

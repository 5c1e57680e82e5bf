"""Time a Langevin step against the plain loop everyone writes, and against the machine's matrix-product rate.

    python benchmarks/langevin.py                                   # ResNet32, MnistNet, DspritesNet, batch 16
    python benchmarks/langevin.py --networks=ResNet32Large --batch_size=128

All of a row is measured in turns, in one run; the best of --rounds counts. "of limit" is the rate of direct-convolution
operations over that of a float32 matrix product: folding does fewer of them, so it can exceed 100 %.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable

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

with cli.group("Benchmark"):
    flags.DEFINE_list("networks", "MnistNet,DspritesNet,ResNet32", f"of {', '.join(NETWORKS)}")
    flags.DEFINE_integer("batch_size", 16, "images per step", lower_bound=1)
    flags.DEFINE_integer("steps", 3, "Langevin steps per timing", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "timings per variant", lower_bound=1)
    flags.DEFINE_string("output", "", "also write the figures to this JSON file")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    import torch
    from torch import Tensor
    from torch.utils.flop_counter import FlopCounterMode

    import models
    from sampling import langevin
    from utils import keep_freed_memory

    def plain_chain(model: models.EnergyNetwork, x: Tensor) -> None:
        """Normalise at every step, NCHW, let the weights require gradients, and call backward()."""
        for _ in range(FLAGS.steps):
            x = (x + 0.005 * torch.randn_like(x)).detach().requires_grad_()
            weights = model.prepare(fold=False, memory_format=torch.contiguous_format)
            h = x
            for stage in model.stages.values():
                h = stage(weights, h, None)
            h.sum().backward()
            assert x.grad is not None, "backward() reached the images"
            x = (x - 10.0 * x.grad).clamp(0, 1)

    def our_chain(model: models.EnergyNetwork, x: Tensor) -> None:
        weights = models.spectral_norm_once(model)
        langevin(lambda x: model.energy(weights, x), x, num_steps=FLAGS.steps, step_lr=10.0)

    matrix = torch.randn(2048, 2048)
    rows = []
    for name in FLAGS.networks:
        shape, filters = NETWORKS[name]
        model = models.build_model(models.ModelConfig(name, shape, filters))
        x = torch.rand(FLAGS.batch_size, *shape)
        weights = models.detach(model.prepare(fold=False))
        with FlopCounterMode(display=False) as counter:
            model.energy(weights, x.clone().requires_grad_()).sum().backward()
        work = counter.get_total_flops() / 1e9  # a step's multiplications and additions

        variants: dict[str, Callable[[], object]] = {
            "matrix": functools.partial(torch.mm, matrix, matrix),
            "plain loop": functools.partial(plain_chain, model, x),
            "this project": functools.partial(our_chain, model, x),
        }
        best = dict.fromkeys(variants, float("inf"))
        for turn in range(FLAGS.rounds + 1):
            if turn == 1:
                keep_freed_memory()  # as train.py does; it helps all variants alike
            for variant, run in variants.items():
                best[variant] = min(best[variant], seconds(run)) if turn else best[variant]
        limit = 2 * 2048**3 / 1e9 / best["matrix"]
        for variant in ("plain loop", "this project"):
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
            }
            rows.append(row)
            print(
                f"{name:14} {variant:13} {row['ms per step']:8.1f} ms  {row['times plain']:5.2f}x  "
                f"{row['GFLOP/s']:6.0f} GFLOP/s  {row['of limit']:6.1%} of {limit:.0f}",
                flush=True,
            )
    if FLAGS.output:
        settings = {"torch": torch.__version__, "threads": torch.get_num_threads(), **cli.values()}
        pathlib.Path(FLAGS.output).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
        print(f"wrote {FLAGS.output}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

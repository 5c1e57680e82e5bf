"""Time a Langevin step, compared with a plain PyTorch loop, torchebm and the machine's matrix-product rate.

    python benchmarks/langevin.py                                         # MnistNet, DspritesNet, ResNet32, batch 16
    python benchmarks/langevin.py --compile --output=benchmarks/cpu.json    # and a plot beside it, cpu.png
    python benchmarks/langevin.py --device=cuda --networks=ResNet32 --batch_size=128 --steps=60 --compile \\
        --precisions=fp16,bf16,tf32,float32

All variants of a network are measured in turns, in one run; the best of --rounds counts. "of limit" is the rate of
direct-convolution operations divided by that of a matrix product in the same number type. It can exceed 100 %, because
folding needs fewer operations. "off" is the median relative error of gradients for images, compared with float64.

The plain loop and torchebm (`pip install torchebm`) run with PyTorch's default settings, on a GPU with convolutions in
TF32; torchebm samples from the network with its weights frozen and normalised once.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import models
import sampling
import timing
from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.hardware import (
    PRECISIONS,
    allow_tf32,
    can_compute_bf16,
    keep_freed_memory,
    set_kernel_choice,
    set_tf32,
)
from ebm.support.reports import print_written
from ebm.training import tuning
from ebm.training.acceleration import REMEDIES, Acceleration

STEP_LR = 10.0
PLAIN_FORM = models.WeightForm(fold=False, patches=False, memory_format=torch.contiguous_format)
UNFOLDED, DIRECT = models.WeightForm(fold=False), models.WeightForm(patches=False)
THEIRS = ("plain", "torchebm")  # the first words of variants that are not this project's
PADDED_CHANNELS = 8  # the number of channels in the variant with padded images


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkDevice):
    """Benchmark"""

    networks: tuple[str, ...] = flag(
        ("MnistNet", "DspritesNet", "ResNet32"), "which networks", choices=("all", *timing.NETWORKS)
    )
    num_filters: int | None = flag(None, "their width; default that of the published commands", at_least=1)
    batch_size: int = flag(16, "images per step", at_least=1)
    steps: int = flag(3, "Langevin steps per timing", at_least=1)
    rounds: int = flag(5, "timings per variant", at_least=1)
    precisions: tuple[str, ...] = flag(("float32",), "number types of this project's chains", choices=tuple(PRECISIONS))
    compile: bool = flag(False, "also time the compiled step")
    changes: bool = flag(
        True,
        "also time changes to the fastest way, in the first number type: pooling not folded, one channel not as "
        "patches, images padded to 8 channels, input biases as maps",
    )
    compile_only: bool = flag(False, "compile all steps, which fills torch's cache, then stop")
    limit_size: int | None = flag(
        None, "rows and columns of the product; default 2048 on a CPU, 8192 on a GPU", at_least=1
    )
    output: str = flag("", "also write the figures to this JSON file, and a plot beside it", is_path=True)


class Variant(NamedTuple):
    """A way to run a chain: its name, the number type whose matrix product sets its limit, and a call that runs it."""

    name: str
    precision: str
    run: Callable[[], object]


# ---- other implementations: chains of `steps` steps from images x (N, C, H, W) ----


def plain_energy(model: models.EnergyNetwork, weights: models.Weights, x: Tensor) -> Tensor:
    """Return the energies (N,), evaluated stage by stage in NCHW."""
    for stage in model.stages.values():
        x = stage(weights, x, None)
    return x.squeeze(1)


def run_plain_chain(model: models.EnergyNetwork, x: Tensor, steps: int, autocast: torch.dtype | None = None) -> None:
    """Run a chain that normalises at every step, lets the weights require gradients and calls backward()."""
    with timing.pytorch_defaults(), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        for _ in range(steps):
            x = (x + 0.005 * torch.randn_like(x)).detach().requires_grad_()
            weights = model.prepare(form=PLAIN_FORM)
            plain_energy(model, weights, x).sum().backward()
            assert x.grad is not None, "backward() reached the images"
            x = (x - STEP_LR * x.grad).clamp(0, 1)


def run_torchebm_chain(model: models.EnergyNetwork, x: Tensor, steps: int) -> None:
    """Run a chain by torchebm's LangevinDynamics, with the network's weights normalised once."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Energy(BaseModel, nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain_energy(model, weights, x)

    with timing.pytorch_defaults():
        with torch.no_grad():
            weights = models.detach(model.prepare(form=PLAIN_FORM))
        energy = Energy(device=x.device)
        sampler = LangevinDynamics(energy, step_size=STEP_LR, noise_scale=1e-3, clamp=(0, 1), device=x.device)
        sampler.sample(x=x, n_steps=steps)


# ---- this project's chains, and variants of them ----


def freeze_weights(model: models.EnergyNetwork, form: models.WeightForm | None = None) -> models.Weights:
    """Return the frozen weights of a chain, normalised anew, in a form or in the usual one."""
    with torch.no_grad():
        return models.detach(model.prepare(form=form))


def make_chain(
    energy: Callable[[models.Weights, Tensor], Tensor],
    prepare: Callable[[], models.Weights],
    x: Tensor,
    *,
    precision: str,
    compiled: bool,
    captured: bool,
    steps: int,
) -> Callable[[], object]:
    """Return a call that runs a chain as train.py does: it prepares the weights, then makes the steps."""
    acceleration = Acceleration(precision, compiled, captured, asked=frozenset(REMEDIES))
    generator = torch.Generator(x.device).manual_seed(0)
    chain = functools.partial(make_steps, energy, steps, generator)
    return lambda: acceleration.run(chain, prepare(), x, None, generator, repeated=True)


def make_steps(
    energy: Callable[[models.Weights, Tensor], Tensor],
    steps: int,
    generator: torch.Generator,
    weights: models.Weights,
    x: Tensor,
    labels: Tensor | None,
    compiled: bool,
) -> Tensor:
    """Return the end points of a chain from images x (N, C, H, W); with its first arguments bound it is a `Chain`."""
    frozen = functools.partial(energy, weights)
    return sampling.langevin(frozen, x, num_steps=steps, step_lr=STEP_LR, generator=generator, compiled=compiled)


class PaddedImages:
    """A variant in which zeros pad the channels of images and of the first kernel, to PADDED_CHANNELS channels."""

    def __init__(self, model: models.EnergyNetwork):
        self.model = model
        self.channels = 0, 0, 0, 0, 0, PADDED_CHANNELS - model.config.image_shape[0]

    def prepare(self) -> models.Weights:
        """Return the frozen weights, the first kernel padded."""
        weights = freeze_weights(self.model, DIRECT)
        kernel = F.pad(weights["c1_pre.kernel"], self.channels)
        return weights | {"c1_pre.kernel": kernel.contiguous(memory_format=torch.channels_last)}

    def energy(self, weights: models.Weights, images: Tensor) -> Tensor:
        """Return the energies (N,) of images (N, C, H, W), which are padded first."""
        x = F.pad(images.to(weights["fc5.kernel"].dtype), self.channels)
        for stage in self.model.stages.values():
            x = stage(weights, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, None)
        return x.squeeze(1).to(images.dtype)


class ConvWithBiasMap(nn.Module):
    """A convolution whose input bias is added after it as a map, because conv(x + b) = conv(x) + conv(b)."""

    def __init__(self, conv: models.Conv):
        super().__init__()
        self.conv, self.activation = conv, conv.activation
        conv.gb = conv.activation = None

    def forward(self, weights: models.Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        name, bias = f"{self.conv.name}.map", weights[f"{self.conv.name}.input_bias"]
        if name not in weights:  # only when `BiasMaps.prepare` calls this, once per chain
            weights[name] = self.conv(weights, bias[:, :, None, None].expand(1, -1, *x.shape[2:]), labels)
        x = self.conv(weights, x, labels) + weights[name]
        return x if self.activation is None else self.activation(x)


class BiasMaps:
    """A variant in which input biases are maps that are computed once per chain."""

    def __init__(self, model: models.EnergyNetwork):
        self.model, self.twin = model, copy.deepcopy(model)
        for module in list(self.twin.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, models.Conv) and child.gb is not None:
                    module._modules[name] = ConvWithBiasMap(child)
        self.energy = self.twin.energy

    def prepare(self) -> models.Weights:
        """Return the frozen weights, the maps included."""
        weights = freeze_weights(self.model)
        with torch.no_grad():
            self.energy(weights, weights["fc5.bias"].new_zeros(1, *self.model.config.image_shape))
        return weights


def make_chains(
    settings: Settings, model: models.EnergyNetwork, x: Tensor, precision: str
) -> dict[str, Callable[[], object]]:
    """Return this project's chains that the settings ask for, by name.

    They are uncompiled and compiled, not captured and captured; then come variants of the last one, the fastest.
    """
    captures = [False, True] if x.device.type == "cuda" and not settings.compile_only else [False]
    compiles = [False, True] if settings.compile or settings.compile_only else [False]
    prepare = functools.partial(freeze_weights, model)
    chains = {}
    for captured in captures:
        for compiled in compiles:
            make = functools.partial(
                make_chain, x=x, precision=precision, steps=settings.steps, captured=captured, compiled=compiled
            )
            fastest = ", ".join(captured * ["captured"] + compiled * ["compiled"]) or "eager"
            chains[fastest] = make(model.energy, prepare)
    if settings.changes and precision == settings.precisions[0]:
        padding, maps = PaddedImages(model), BiasMaps(model)
        for change, form in {"not folded": UNFOLDED, "one channel directly": DIRECT}.items():
            chains[f"{fastest}, {change}"] = make(model.energy, functools.partial(prepare, form))
        chains[f"{fastest}, {PADDED_CHANNELS} channels"] = make(padding.energy, padding.prepare)
        if any(".input_bias" in name for name in prepare()):
            chains[f"{fastest}, bias maps"] = make(maps.energy, maps.prepare)
    return chains


# ---- timing ----


def list_variants(settings: Settings, model: models.EnergyNetwork, x: Tensor) -> list[Variant]:
    """Return the variants that are measured on a network."""
    on_gpu = x.device.type == "cuda"
    default = "tf32" if on_gpu else "float32"  # the number type of PyTorch's convolutions
    variants = [Variant("plain loop", default, functools.partial(run_plain_chain, model, x, settings.steps))]
    if on_gpu:
        autocast = functools.partial(run_plain_chain, model, x, settings.steps, torch.bfloat16)
        variants.append(Variant("plain loop, autocast", "bf16", autocast))
    if importlib.util.find_spec("torchebm"):
        variants.append(Variant("torchebm", default, functools.partial(run_torchebm_chain, model, x, settings.steps)))
    for precision in settings.precisions:
        chains = make_chains(settings, model, x, precision)
        variants += [Variant(name, precision, run) for name, run in chains.items()]
    return variants if on_gpu else [*variants, choose_variant(settings, model, x)]


def choose_variant(settings: Settings, model: models.EnergyNetwork, x: Tensor) -> Variant:
    """Return the way that train.py chooses for a long run on this machine, by timing; print it."""
    chain = functools.partial(make_steps, model.energy, 1, torch.Generator())
    usual, alternatives = tuning.Way(threads=torch.get_num_threads()), tuning.list_alternatives(model, allow_bf16=True)
    search = functools.partial(tuning.choose_way, model, chain, len(x))
    outcomes = [search(usual, alternatives)]
    if settings.compile:
        outcomes.append(search(outcomes[0].way, {"compiled": [True]}, count=len(x)))
    way, trials = outcomes[-1].way, [trial for outcome in outcomes for trial in outcome.trials]
    words = ", ".join(map(way.describe, [*alternatives, "compiled"]))
    print(f"{model.config.network}: {words}{tuning.describe_trials(trials)}", flush=True)
    run = make_chain(
        model.energy,
        functools.partial(freeze_weights, model, way.form),
        x=x,
        precision=way.precision,
        compiled=way.compiled,
        captured=False,
        steps=settings.steps,
    )

    def run_with_threads() -> None:
        torch.set_num_threads(way.threads)
        try:
            run()
        finally:
            torch.set_num_threads(usual.threads)

    return Variant("as train.py chooses", way.precision, run_with_threads)


def count_operations(model: models.EnergyNetwork, x: Tensor) -> float:
    """Return the number of multiplications and additions of a step by direct convolution, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        model.energy(models.detach(model.prepare(form=PLAIN_FORM)), x.clone().requires_grad_()).sum().backward()
    return counter.get_total_flops() / 1e9


def measure_gradient_error(model: models.EnergyNetwork, x: Tensor, precision: str) -> float:
    """Return the relative error of gradients for images in a number type, compared with float64.

    It is the median over images.
    """
    exact_model = copy.deepcopy(model).double()
    exact = sampling.compute_input_gradient(
        functools.partial(exact_model.energy, freeze_weights(exact_model)), x.double()
    )
    weights = models.cast(freeze_weights(model), PRECISIONS[precision])
    with allow_tf32(precision):
        rounded = sampling.compute_input_gradient(functools.partial(model.energy, weights), x)
    return ((rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).median().item()


def measure_network(settings: Settings, name: str, limits: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row of figures for each variant on one network."""
    model = timing.build_network(name, settings.num_filters, settings.device)
    x = timing.draw_images(model, settings.batch_size, settings.device)
    memory: dict[Variant, float | None] = {}
    variants = list_variants(settings, model, x)
    compiling = ", and steps are compiled first, each in up to a minute" * settings.compile
    print(f"{name}: {len(variants)} variants are timed{compiling}", flush=True)
    for variant in variants:
        try:  # the first run compiles, captures and chooses kernels
            if settings.device == "cuda":
                memory[variant] = timing.measure_peak_memory(variant.run, settings.device)
            else:  # a CPU keeps the memory that earlier variants freed, so that a peak would mean little
                variant.run()
                memory[variant] = None
        except (UsageError, ImportError, torch.OutOfMemoryError) as error:
            print(f"{name}, {variant.name}, {variant.precision}: left out, {str(error).splitlines()[0]}", flush=True)
    best = timing.measure_best_seconds({variant: variant.run for variant in memory}, settings.rounds, settings.device)
    plain = next((seconds for variant, seconds in best.items() if variant.name == "plain loop"), float("nan"))
    operations = count_operations(model, x) * settings.steps  # in units of 1e9
    errors = {precision: measure_gradient_error(model, x[:8], precision) for precision in settings.precisions}
    return [
        {
            "network": name,
            "variant": variant.name,
            "precision": variant.precision,
            "ms per step": 1e3 * seconds / settings.steps,
            "times plain": plain / seconds,
            "images per s": settings.batch_size * settings.steps / seconds,
            "GFLOP/s": operations / seconds,
            "of limit": operations / seconds / limits[variant.precision],
            "limit GFLOP/s": limits[variant.precision],
            "gradient error": errors[variant.precision] if variant.name == "eager" else None,
            "peak MB": memory[variant],
        }
        for variant, seconds in best.items()
    ]


def compile_steps(settings: Settings, names: Sequence[str]) -> None:
    """Compile the steps of all compiled variants, by running chains of one step."""
    for name in names:
        model = timing.build_network(name, settings.num_filters, settings.device)
        x = timing.draw_images(model, settings.batch_size, settings.device)
        for precision in settings.precisions:
            for way, run in make_chains(dataclasses.replace(settings, steps=1), model, x, precision).items():
                if "compiled" in way:
                    run()
        print(f"compiled: {name} in {', '.join(settings.precisions)}", flush=True)


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    keep_freed_memory()  # as train.py does; it helps all variants alike
    set_tf32(False)
    if settings.compile or settings.compile_only:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 100  # a step for each variant, number type and network
    names = tuple(timing.NETWORKS) if "all" in settings.networks else settings.networks
    if settings.compile_only:
        compile_steps(settings, names)
        return
    set_kernel_choice(deterministic=False)
    has_bf16 = settings.device == "cuda" or can_compute_bf16()  # train.py may choose it
    types = {*settings.precisions, "tf32" if settings.device == "cuda" else "float32", *["bf16"] * has_bf16}
    limits = {name: timing.measure_matrix_rate(name, settings.device, settings.limit_size) for name in sorted(types)}
    rows: list[dict[str, Any]] = []
    written: list[pathlib.Path] = []
    for name in names:
        rows += measure_network(settings, name, limits)
        for row in (row for row in rows if row["network"] == name):
            print(
                "{network:13} {variant:33} {precision:7} {ms per step:8.2f} ms  {times plain:6.2f}x  "
                "{images per s:8.0f} images/s  {GFLOP/s:8.0f} GFLOP/s  {of limit:6.1%} of {limit GFLOP/s:.3g}".format(
                    **row
                )
                + (f"  gradient {row['gradient error']:.1e} off" if row["gradient error"] is not None else "")
                + (f"  {row['peak MB']:.0f} MB" if row["peak MB"] is not None else ""),
                flush=True,
            )
        if settings.output:
            written = write_figures(settings, rows)
    print_written(written)


def write_figures(settings: Settings, rows: list[dict[str, Any]]) -> list[pathlib.Path]:
    """Write the rows so far as JSON, and plot the shares of the limit as bars; return the paths of both."""
    machine = timing.describe_machine(settings.device)
    path = timing.write_rows(settings, rows, operations="of direct convolutions, not folded", **machine)
    # With several number types, this project has one bar for each, that of its fastest variant.
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        has_own_bar = len(settings.precisions) == 1 or row["variant"].startswith(THEIRS)
        bar = bars.setdefault(row["variant"] if has_own_bar else f"this project, {row['precision']}", {})
        bar[row["network"]] = max(row["of limit"], bar.get(row["network"], 0))
    title = f"a Langevin step, batch {settings.batch_size}, {machine['hardware']}"
    plot = pictures.plot_bars(bars, path.with_suffix(".png"), ylabel="share of the matrix-product rate", title=title)
    return [path, plot]


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

"""Tools of all benchmarks: flags, files, networks, timing, memory, a machine's limits, PyTorch's default settings."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import models
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.files import prepare_file
from ebm.support.hardware import PRECISIONS, allow_tf32, describe_processor, set_tf32
from ebm.support.reports import write_json

# Rows and columns of the matrices whose product sets a limit; a smaller product is launch-bound on a GPU.
MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}
COPY_SIZES = {"cpu": 2**28, "cuda": 2**31}  # bytes

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

Action = Callable[[], object]  # a call that is timed
Key = TypeVar("Key")


# ---- flags and files ----


@dataclasses.dataclass(frozen=True)
class BenchmarkOutput:
    """Benchmark"""

    output: str = flag("", "also write the figures to this JSON file", is_path=True)


@dataclasses.dataclass(frozen=True)
class BenchmarkDevice(BenchmarkOutput):
    """Benchmark"""

    device: str = flag("cpu", "where to compute", choices=tuple(MATRIX_SIZES))


@dataclasses.dataclass(frozen=True)
class BenchmarkNetwork(BenchmarkDevice):
    """Benchmark"""

    network: str = flag("ResNet32", "which network", choices=tuple(NETWORKS))
    num_filters: int | None = flag(None, "its width; default that of the published commands", at_least=1)
    precision: str = flag("float32", "as in train.py", choices=tuple(PRECISIONS))


def prepare_output(settings: BenchmarkOutput) -> None:
    """Raise UsageError, before anything is measured, if the file `output` cannot be written."""
    if settings.output:
        prepare_file(pathlib.Path(settings.output), "output")


def write_rows(settings: BenchmarkOutput, rows: Sequence[Mapping[str, Any]], **described: object) -> pathlib.Path:
    """Write a benchmark's rows, its settings and further descriptions to the file `output`; return its path.

    Raises UsageError if the file cannot be written.
    """
    contents = {"settings": described | cli.to_dict(settings), "rows": rows}
    try:
        return write_json(pathlib.Path(settings.output), contents)
    except UsageError as error:
        raise UsageError(f"`output`={error}") from None  # the message begins with the path


# ---- networks and images ----


def build_network(name: str, num_filters: int | None, device: str, scale: int = 1) -> models.EnergyNetwork:
    """Return an untrained network in which no residual block is near zero.

    num_filters: its width; None: that of the published commands. scale: a factor of the sides of its images.
    """
    (channels, height, width), filters = NETWORKS[name]
    config = models.ModelConfig(name, (channels, scale * height, scale * width), num_filters or filters)
    generator = torch.Generator().manual_seed(0)
    model = models.build_model(config, generator)
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            module.c2.weight.data.normal_(generator=generator)
    return model.to(device)


def draw_images(model: models.EnergyNetwork, number: int, device: str) -> Tensor:
    """Return noise images (number, C, H, W), uniform in [0, 1], of the shape that a network takes."""
    return torch.rand(number, *model.config.image_shape, device=device)


# ---- time and memory ----


def measure_seconds(run: Action, device: str) -> float:
    """Return the seconds that a call takes, until the GPU has finished its work, too."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_best_seconds(runs: Mapping[Key, Action], rounds: int, device: str) -> dict[Key, float]:
    """Return the smallest time of each call over several rounds, in seconds; the calls take turns in each round."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], measure_seconds(run, device))
    return best


def measure_peak_memory(run: Action, device: str) -> float:
    """Return the peak memory of a call in MB, minus the memory that the process held before.

    On a CPU it is resident memory (Linux). On a GPU it is the memory that torch reserves, so that the pool of a
    captured graph counts, in a second call, because the first one tries out kernels.
    """
    if device == "cpu":
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # this resets the peak
        before = read_resident_memory("VmRSS")
        run()
        return read_resident_memory("VmHWM") - before
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    measure_seconds(run, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    measure_seconds(run, device)
    return (torch.cuda.max_memory_reserved() - before) / 1e6


def read_resident_memory(field: str) -> float:
    """Return a memory figure of this process in MB. field: its name in /proc/self/status, such as "VmRSS"."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


# ---- the machine ----


def measure_matrix_rate(precision: str, device: str, size: int | None = None) -> float:
    """Return the best GFLOP/s, over half a second, of the product of two random square matrices in a number type."""
    size = size or MATRIX_SIZES[device]
    a, b = (torch.randn(size, size, device=device).to(PRECISIONS[precision]) for _ in range(2))
    best, end = float("inf"), time.monotonic() + 0.5
    with allow_tf32(precision):
        measure_seconds(lambda: a @ b, device)
        while time.monotonic() < end:  # an idle GPU needs some time to reach its full clock rate
            best = min(best, measure_seconds(lambda: a @ b, device))
        return 2 * size**3 / 1e9 / min(best, measure_seconds(lambda: a @ b, device))


def measure_copy_rate(device: str, rounds: int = 3) -> float:
    """Return the best GB/s of a copy within the device's memory, counting bytes read and written."""
    source, target = (torch.zeros(COPY_SIZES[device], dtype=torch.uint8, device=device) for _ in range(2))
    seconds = measure_best_seconds({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    return 2 * COPY_SIZES[device] / 1e9 / seconds


def describe_machine(device: str) -> dict[str, Any]:
    """Return the versions and the hardware that figures depend on."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    if device == "cuda":
        facts |= {"hardware": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        facts |= {"cudnn": torch.backends.cudnn.version()}
    else:
        facts |= {"hardware": f"{torch.get_num_threads()} CPU threads", "processor": describe_processor()}
        facts |= {"oneDNN": os.environ.get("ONEDNN_MAX_CPU_ISA", "all instructions")}
    return facts


@contextlib.contextmanager
def pytorch_defaults() -> Iterator[None]:
    """Restore PyTorch's default settings inside the block: on a GPU convolutions in TF32, matrix products not."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        set_tf32(False)

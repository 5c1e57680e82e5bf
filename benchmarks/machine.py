"""Measure the rates of a machine: matrix products by number type, and copies in memory.

python benchmarks/machine.py
python benchmarks/machine.py --device=cuda --output=benchmarks/machine.json
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import timing
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.hardware import PRECISIONS
from ebm.support.reports import print_written


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkDevice):
    """Benchmark"""

    precisions: tuple[str, ...] = flag(("float32", "bf16"), "number types of the products", choices=tuple(PRECISIONS))
    size: int | None = flag(None, "rows and columns of a matrix; default 2048 on a CPU, 8192 on a GPU", at_least=1)


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    machine = timing.describe_machine(settings.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for precision in settings.precisions:
        rate = timing.measure_matrix_rate(precision, settings.device, settings.size)
        rows.append({"what": f"product in {precision}", "GFLOP/s": rate})
        print(f"product in {precision:8} {rate:10.3g} GFLOP/s", flush=True)
    rate = timing.measure_copy_rate(settings.device)
    rows.append({"what": "copy", "GB/s": rate})
    print(f"{'copy':19} {rate:10.0f} GB/s")
    if settings.output:
        print_written([timing.write_rows(settings, rows, **machine)])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

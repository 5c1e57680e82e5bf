"""Measure what a machine can do: matrix products by number type, and copies.

python benchmarks/machine.py
python benchmarks/machine.py --device=cuda --output=benchmarks/machine.json
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli
import timing

FLAGS = flags.FLAGS

with cli.group("Benchmark"):
    flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute")
    cli.define_choices("precisions", ["float32", "bf16"], cli.PRECISIONS, "number types of the products")
    flags.DEFINE_integer("size", None, "rows and columns of a matrix; default 2048 on a CPU, 8192 on a GPU", 1)
    flags.DEFINE_string("output", "", "also write the figures to this JSON file")


def main() -> None:
    described = timing.describe(FLAGS.device)
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    rows = []
    for precision in FLAGS.precisions:
        rate = timing.matrix_rate(precision, FLAGS.device, FLAGS.size)
        rows.append({"what": f"product in {precision}", "GFLOP/s": rate})
        print(f"product in {precision:8} {rate:10.3g} GFLOP/s", flush=True)
    rate = timing.copy_rate(FLAGS.device)
    rows.append({"what": "copy", "GB/s": rate})
    print(f"{'copy':19} {rate:10.0f} GB/s")
    if FLAGS.output:
        print(f"wrote {cli.write_rows(FLAGS.output, rows, **described)}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

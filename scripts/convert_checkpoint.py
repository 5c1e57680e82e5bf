"""Convert a TensorFlow checkpoint to this project's format, with its optimizer if it has one.

    python scripts/convert_checkpoint.py cachedir/cifar10_cond/model_74700 cachedir/cifar10_cond/model_74700.pt
    python scripts/convert_checkpoint.py --swish_act cachedir/imagenet128_cond/model_2238000 model_2238000.pt

Every script also reads TensorFlow's files directly; a converted checkpoint is a single file and loads faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()

import checkpoint
from ebm.readers.tensorflow import read_tf_checkpoint
from ebm.support.errors import UsageError
from ebm.support.reports import print_written
from ebm.support.streams import report_mistakes
from utils import ClippedAdam


def convert_checkpoint(
    source: str | pathlib.Path, target: pathlib.Path, *, label_size: int | None = None, **unrecorded: Any
) -> None:
    """Write a TF1 checkpoint in our format, with its optimizer if it has one, and print its network and variables.

    The iteration is the number at the end of the name of `source`, or 0 without a number. For label_size and
    unrecorded see `checkpoint.infer_config`.
    """
    if target.is_dir() or not target.name:
        raise UsageError(f"{target} is a folder; name the file to write, such as {target / 'model_5.pt'}")
    source = checkpoint.strip_ending(pathlib.Path(source))
    model = checkpoint.load_tf_energy(source, label_size=label_size, **unrecorded)
    variables = read_tf_checkpoint(source)
    number = re.search(r"[0-9]+$", str(source))
    state = {
        "config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "iteration": int(number[0]) if number else 0,
    }
    if "beta2_power" in variables:
        optimizer = ClippedAdam(model.parameters())
        with checkpoint.name_checkpoint(source):
            checkpoint.restore_tf_optimizer(optimizer, model, variables)
        state["optimizer"] = optimizer.state_dict()
    checkpoint.save(target, state)

    print(model.config)
    names = {checkpoint.to_tf_name(name): name for name in model.state_dict()}
    for name, array in sorted(variables.items()):
        print(f"{name:<44} {array.shape!s:<20} {names.get(name, '')}".rstrip())
    print(f"{source}, iteration {state['iteration']}{'' if 'optimizer' in state else ', no optimizer'}")
    print_written([target])


def main(arguments: Sequence[str]) -> int:
    """Convert the checkpoint that the command line names; return the exit status, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=os.path.expanduser, help="TF1 checkpoint: the path of one of its files, or without the ending"
    )
    parser.add_argument(
        "target", type=lambda text: pathlib.Path(os.path.expanduser(text)), help="file to write, such as model_74700.pt"
    )
    parser.add_argument("--swish_act", action="store_true", help="the network was trained with --swish_act")
    parser.add_argument("--spec_iter", type=int, default=1, help="the --spec_iter of its training")
    parser.add_argument("--spec_norm_val", type=float, default=1.0, help="the --spec_norm_val of its training")
    parser.add_argument("--downsample", action="store_true", help="the network was trained with --downsample")
    parser.add_argument("--label_size", type=int, help="width of its labels, 0: unconditional; default: inferred")
    options = parser.parse_args(arguments)
    return report_mistakes(lambda: convert_checkpoint(**vars(options)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

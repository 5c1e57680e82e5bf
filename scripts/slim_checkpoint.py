"""Write a checkpoint that holds the network alone, in half precision, like those in pretrained/.

    python scripts/slim_checkpoint.py cachedir/digits_cpu/model_500.pt model_500.pt [--ema]

It has no optimizer, replay buffer and generators, so that a run can start from it but not continue bit for bit. Flags
that name folders of this machine are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()

import checkpoint
from ebm.settings import DataFiles
from ebm.support.errors import UsageError
from ebm.support.streams import note_dropped_output, replace_standard_streams

KEPT = ("config", "iteration", "flags", "class_names")
PLACES = {"exp", "logdir", *(field.name for field in dataclasses.fields(DataFiles))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=lambda text: pathlib.Path(os.path.expanduser(text)))
    parser.add_argument("target", type=lambda text: pathlib.Path(os.path.expanduser(text)))
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run with --ema_decay")
    options, files = parser.parse_args(), replace_standard_streams()
    try:
        weights = checkpoint.load_energy(options.source, ema=options.ema).state_dict()
        state = {name: value for name, value in checkpoint.load(options.source).items() if name in KEPT}
        state["flags"] = {name: value for name, value in state.get("flags", {}).items() if name not in PLACES}
        state["model"] = {name: tensor.half() for name, tensor in weights.items()}
        checkpoint.save(options.target, state)
    except UsageError as error:
        parser.exit(2, f"error: {error}\n".replace("`", ""))
    print(
        f"{options.target}: {options.target.stat().st_size / 1e3:.0f} kB of {options.source.stat().st_size / 1e3:.0f}"
    )
    note_dropped_output(files)


if __name__ == "__main__":
    main()

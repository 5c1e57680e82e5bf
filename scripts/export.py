"""Write the network of a checkpoint alone, as a safetensors file or as a checkpoint, whichever the ending says.

    python scripts/export.py fashion_cond fashion_cond.safetensors
    python scripts/export.py fashion_cond.safetensors cachedir/mine/model_6000.pt
    python scripts/export.py --half --ema cachedir/digits_cpu/model_500.pt model_500.pt

The file holds the weights, the network's configuration, the classes' names, the settings of the training without tags,
trackers and folders of this machine, the iteration and, if the model has it, the distribution its chains start from. A
safetensors file has all this in its metadata, as texts in JSON, so that there is no config.json to be lost. Tensors
keep their numbers and types, unless --half is given. The optimizer, the replay buffer and the generators are left out:
a run can start from a written checkpoint, but not continue bit for bit. The models in pretrained/ were written with
--half.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()

import checkpoint
from ebm.readers.safetensors_files import ENDING, NETWORK_ENTRIES
from ebm.settings import DataFiles, TrackerSettings
from ebm.support.errors import UsageError
from ebm.support.reports import print_written
from ebm.support.streams import report_mistakes

# Settings of one machine and one study, which are nobody else's.
OWN_SETTINGS = {"exp", "logdir", "tag"} | {
    field.name for kind in (DataFiles, TrackerSettings) for field in fields(kind)
}


def export_network(source: str, target: pathlib.Path, *, ema: bool = False, half: bool = False) -> None:
    """Write the network of a checkpoint to a file of the ending `.pt` or `.safetensors`, and print its path.

    source: as for `checkpoint.load_energy`. ema: write the averaged weights. half: round the weights to half precision.
    Raises UsageError for a missing, damaged or foreign source, and for a target that cannot be written or is the
    source.
    """
    if target.is_dir() or target.suffix not in (".pt", ENDING):
        raise UsageError(f"{target} is no name of a file to write, such as model_5.pt or model{ENDING}")
    path = checkpoint.find_file(source)
    if path.suffix == ".index":
        raise UsageError(f"{path} is a TensorFlow checkpoint; convert it first, by scripts/convert_checkpoint.py")
    if target.exists() and path.exists() and target.samefile(path):
        raise UsageError(f"{target} is the source itself; name another file")
    state = checkpoint.load(path)
    config = checkpoint.build_network(state, path, ema=ema).config  # it refuses weights that do not fit the network
    weights = state["ema" if ema else "model"]
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
        checkpoint.check_finite_weights(weights, f"{path} in half precision")
    network = {name: state[name] for name in NETWORK_ENTRIES if name in state} | {"config": asdict(config)}
    network["flags"] = {name: value for name, value in state.get("flags", {}).items() if name not in OWN_SETTINGS}
    checkpoint.save(target, network | {"model": weights})
    before, after = (file.stat().st_size / 1e3 for file in (path, target))
    print(f"{after:.0f} kB of the {before:.0f} kB of {path}")
    print_written([target])


def main(arguments: Sequence[str]) -> int:
    """Export the network that the command line names; return the exit status, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        type=os.path.expanduser,
        help="the name of an experiment or of a shipped model, a folder, or the path of a checkpoint",
    )
    parser.add_argument(
        "target",
        type=lambda text: pathlib.Path(os.path.expanduser(text)),
        help=f"file to write, such as model_500.pt or digits{ENDING}; an earlier file of this name is replaced",
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run with --ema_decay")
    parser.add_argument("--half", action="store_true", help="round the weights to half precision")
    options = parser.parse_args(arguments)
    return report_mistakes(lambda: export_network(**vars(options)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Save, find and load checkpoints of this project, and load the published ones of TensorFlow 1.

model = load_energy("cachedir/cifar10_cond/model_74700")      # ours (.pt) or TensorFlow's (.index, .data-*)
model = load_energy("digits_cond")                            # the latest of an experiment or of a shipped model
model = load_energy("digits.safetensors")                     # what scripts/export.py wrote

Ours are written whole or not at all. They hold tensors and plain values only, so that a file from a stranger never
executes code. A TensorFlow checkpoint holds variables by name; the network is inferred from their names and shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from ebm.readers.bounded import describe_failure, make_printable, report_unreadable_file, show_reading
from ebm.readers.pickles import ForeignName
from ebm.readers.safetensors_files import ENDING, encode_safetensors, read_safetensors
from ebm.readers.state_values import find_odd_entry, is_number
from ebm.readers.tensorflow import read_tf_checkpoint
from ebm.readers.torch_files import read_torch_file
from ebm.support.errors import UsageError
from ebm.support.experiments import find_model_folder, get_shipped_root
from ebm.support.files import write_file
from ebm.support.progress import show_waiting
from utils import ClippedAdam

KEEP = 30  # the newest checkpoints, which are kept
KEEP_SECONDS = 6 * 3600.0  # of older ones, the first of every such period is kept for good


def save(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all, and its folder if it does not exist; see `write_file`.

    A file of the ending `.safetensors` gets the network alone, see `encode_safetensors`.
    """
    with show_waiting(f"writing {path}"):
        if path.suffix == ENDING:
            contents = encode_safetensors(state)
            write_file(path, lambda file: file.write(contents))
        else:
            write_file(path, lambda file: torch.save(state, file))


def list_iterations(folder: pathlib.Path) -> list[int]:
    """Return the iterations of the checkpoints in a folder, of this project's and TensorFlow's, in ascending order."""
    matches = (re.fullmatch(r"model_(0|[1-9][0-9]*)\.(?:pt|index)", path.name) for path in folder.glob("model_*"))
    return sorted({int(match[1]) for match in matches if match})


def prune(folder: pathlib.Path) -> None:
    """Delete old checkpoints of this project in a folder.

    The newest `KEEP` stay, and so does the first of every six hours, by the time of the file. Half-written files of
    killed processes are deleted, too.
    """
    for path in filter(pathlib.Path.is_file, folder.glob(".*.tmp")):
        path.unlink()
    numbered = sorted(
        (number, path)
        for path in folder.glob("model_*.pt")
        if (number := parse_iteration(path)) is not None and path.is_file()  # not a link to a disk that is away
    )
    periods = set()
    for _, path in numbered[:-KEEP]:
        period = path.stat().st_mtime // KEEP_SECONDS
        if period in periods:
            path.unlink()
        periods.add(period)


def parse_iteration(path: pathlib.Path) -> int | None:
    """Return the iteration N of a file `model_N.pt`, None for other names such as `model_best.pt`."""
    match = re.fullmatch(r"model_(0|[1-9][0-9]*)\.pt", path.name)
    return int(match[1]) if match else None


def find(folder: pathlib.Path, resume_iter: str, setting: str = "resume_iter") -> pathlib.Path:
    """Return the path of checkpoint "123", "best" or "latest" in a folder: a `.pt` file or the prefix of a TF1 one.

    "-1" is the latest, too, as in the reference. setting: the name of the setting that chose the checkpoint. Raises
    UsageError, naming this checkpoint and those of the folder, if it is not there.
    """
    if not folder.is_dir():
        raise UsageError(f"no experiment folder {folder}; check `exp` and where experiments are kept")
    numbers = list_iterations(folder)
    named = strip_ending(pathlib.Path(resume_iter))
    if named.parent in (pathlib.Path(), folder):  # as people write it: model_5, model_5.index, cachedir/exp/model_5.pt
        resume_iter = named.name.removeprefix("model_")
    if resume_iter in ("latest", "-1"):
        if not numbers:
            raise UsageError(f"no checkpoint in {folder}; train one first, or check `exp`")
        resume_iter = str(numbers[-1])
    prefix = folder / f"model_{resume_iter}"
    if os.path.lexists(f"{prefix}.pt"):  # a link may lead nowhere, of which `load` tells
        return prefix.with_name(f"{prefix.name}.pt")
    if os.path.exists(f"{prefix}.index"):
        return prefix
    contents = f"it has {', '.join(map(str, numbers[-8:]))}" if numbers else "it has none"
    raise UsageError(f"no checkpoint model_{resume_iter} in {folder} ({contents}); choose one with `{setting}`")


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint of this project, `.pt` or `.safetensors`, onto the CPU.

    It verifies checksums, types, shapes and ranges, and executes no code of the file. Raises UsageError for a missing,
    damaged or foreign file.
    """
    try:
        with show_reading(path, path.stat().st_size):
            state = read_safetensors(path) if path.suffix == ENDING else read_torch_file(path)
    except UsageError:
        raise
    except ForeignName as error:
        what = f"more than tensors and plain values ({describe_failure(error)})"
        raise UsageError(f"{path} holds {what}; not loaded, it could run code") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({describe_failure(error)}); choose another checkpoint") from None
    except Exception as error:  # a damaged file can cause any error
        raise UsageError(
            f"{path} is damaged, or no checkpoint ({describe_failure(error)}); use an earlier checkpoint"
        ) from None
    if not isinstance(state, dict) or not {"config", "model", "iteration"} <= set(state):
        raise UsageError(f"{path} is not a checkpoint of this project; convert or retrain it")
    config = read_config(state, path)
    odd = find_odd_entry(state, config.image_shape)
    if not odd and config.has_classes and len(state.get("class_names", ())) not in (0, config.label_size):
        odd = "class_names"
    if odd:
        raise UsageError(f"{path} has an invalid entry {odd}; use an earlier checkpoint")
    if "class_names" in state:
        state["class_names"] = [make_printable(name) for name in state["class_names"]]
    return state


MAX_SIDE = 1 << 12  # of images, in pixels
MAX_WIDTH = 1 << 16
CONFIG_RANGES = {
    "num_filters": (1, MAX_WIDTH),
    "label_size": (0, MAX_WIDTH),
    "spec_iter": (1, MAX_WIDTH),
    "start_rank": (0, MAX_WIDTH),
}


def read_config(state: dict[str, Any], path: pathlib.Path) -> models.ModelConfig:
    """Return the ModelConfig stored in a checkpoint; raise UsageError if a value is out of range."""
    stored = state["config"]
    try:
        shape = stored["image_shape"]
        config = models.ModelConfig(**{**stored, "image_shape": tuple(shape) if isinstance(shape, list) else shape})
        fits = {name: fits_config(name, value) for name, value in vars(config).items()}
    except (TypeError, KeyError) as error:
        reason = describe_failure(error)
    else:
        reason = next((f"its {name} is impossible" for name, is_right in fits.items() if not is_right), "")
    if reason:
        raise UsageError(f"{path} describes a network this version does not know ({reason}); use an earlier checkpoint")
    return config


def fits_config(name: str, value: Any) -> bool:
    """Return whether a value is of the type of this field of ModelConfig, and in range."""
    if name == "network":
        return isinstance(value, str) and value in models.NETWORKS
    if name == "image_shape":
        is_triple = isinstance(value, tuple) and len(value) == 3
        return is_triple and all(type(side) is int and 1 <= side <= MAX_SIDE for side in value)
    if name == "spec_norm_val":
        return is_number(value) and value >= 0
    if name in CONFIG_RANGES:
        lowest, highest = CONFIG_RANGES[name]
        return type(value) is int and lowest <= value <= highest
    return isinstance(value, bool)


def check_config(
    stored: models.ModelConfig, wanted: models.ModelConfig, path: pathlib.Path, *, change: bool = False
) -> None:
    """Raise UsageError naming every field in which a checkpoint's network differs from the wanted one.

    change: the fields on which the weights' shapes do not depend may differ, see UNRECORDED.
    """
    before, now = dataclasses.asdict(stored), dataclasses.asdict(wanted)
    names = [name for name in now if now[name] != before[name] and not (change and name in UNRECORDED)]
    differences = [f"{name} is {before[name]} there and {now[name]} here" for name in names]
    if differences:
        reasons = "; ".join(differences)
        raise UsageError(f"{path} is of another network: {reasons}; change the settings or use another `exp`")


def load_energy(
    prefix: str | pathlib.Path, *, ema: bool = False, device: torch.device | str = "cpu", **unrecorded: Any
) -> models.EnergyNetwork:
    """Return the network of a checkpoint `cachedir/<exp>/model_<iter>` in eval mode, from our format or TensorFlow's.

    Its `settings` are those it was trained with, by the names of train.py's flags, and `class_names` those of its
    classes; a TF1 checkpoint has neither.
    prefix: may also be a `.safetensors` file, a folder, or the name of an experiment in cachedir/ or of a shipped
    model, of which the latest checkpoint is taken. ema: take the averaged weights of a run with `ema_decay`.
    unrecorded: fields of the network's config that a TF1 checkpoint does not show, such as swish_act=True, see
    UNRECORDED; ours holds them. Raises UsageError for a missing, damaged or foreign file, and for `ema` if the
    checkpoint has no averaged weights.
    """
    path = find_file(prefix)
    if path.suffix == ".index":
        if ema:
            message = "has no averaged weights, being a TensorFlow checkpoint; leave out `ema`"
            raise UsageError(f"{strip_ending(path)} {message}")
        return load_tf_energy(path, **unrecorded).to(device)
    return build_network(load(path), path, ema=ema).to(device)


def build_network(state: dict[str, Any], path: pathlib.Path, *, ema: bool = False) -> models.EnergyNetwork:
    """Return the network of a loaded checkpoint in eval mode, see `load_energy`. path: where it is from."""
    config = read_config(state, path)
    if ema and not state.get("ema"):
        raise UsageError(f"{path} has no averaged weights; leave out `ema`, or train with averaged weights")
    weights = state["ema" if ema else "model"]
    with report_unreadable_file(path), torch.device("meta"):
        check_fit(models.EnergyNetwork(config), weights, path)  # before the network takes memory
    model = models.EnergyNetwork(config)
    load_state(model, weights, path)
    model.settings, model.class_names = state.get("flags", {}), tuple(state.get("class_names", ()))
    return model.eval()


def find_file(prefix: str | pathlib.Path) -> pathlib.Path:
    """Return the file of the checkpoint that a path or a name stands for: `.pt`, `.safetensors` or TF1's `.index`.

    prefix: see `load_energy`. The file need not exist.
    """
    named = locate(pathlib.Path(prefix))
    if named.suffix == ENDING:
        return named
    stem = strip_ending(named)
    path, index = (stem.with_name(stem.name + ending) for ending in (".pt", ".index"))
    is_named_by_tf_file = named not in (stem, path)
    return index if index.exists() and (is_named_by_tf_file or not path.exists()) else path


def locate(named: pathlib.Path) -> pathlib.Path:
    """Return the path of the checkpoint that a path or the name of an experiment stands for, see `load_energy`."""
    prefix, folder, shipped = strip_ending(named), named.parent, get_shipped_root()
    if named.is_dir():
        return find(named, "latest")
    if named.suffix == ENDING:
        return named
    if any(os.path.lexists(f"{prefix}{ending}") for ending in (".pt", ".index")):
        return named
    if named == prefix and len(named.parts) == 1 and not named.name.startswith("model_"):
        return find(find_model_folder(named.name, ("cachedir",)), "latest")
    # A shipped model is found from any working directory, and where it used to be, in cachedir/.
    if (shipped / named.name).is_dir():
        return find(shipped / named.name, "latest")
    if not folder.is_dir() and (shipped / folder.name).is_dir():
        return shipped / folder.name / named.name
    return named


def strip_ending(path: pathlib.Path) -> pathlib.Path:
    """Return the path of a checkpoint without the ending of one of its files, such as `.pt` or `.index`."""
    return path.with_name(re.sub(r"(?<=.)\.(pt|index|meta|data-\d+-of-\d+)$", "", path.name)) if path.name else path


def load_state(model: models.EnergyNetwork, weights: dict[str, Tensor], path: pathlib.Path) -> None:
    """Load the tensors of a checkpoint into a network; raise UsageError unless all fit and are finite."""
    check_fit(model, weights, path)
    check_finite_weights(weights, path)
    model.load_state_dict(weights)


def check_fit(model: models.EnergyNetwork, weights: dict[str, Tensor], path: pathlib.Path) -> None:
    """Raise UsageError unless the tensors of a checkpoint have the names and the shapes of a network's."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*needed, *stored]:
        if needed.get(name) != stored.get(name):
            shapes = f"has shape {stored.get(name)} there, and the network's has {needed.get(name)}"
            reason = f"{make_printable(name[:100])} {shapes}"
            raise UsageError(f"{path} does not fit its own configuration: {reason}; use an earlier checkpoint")


def check_finite_weights(weights: Mapping[str, Tensor], path: str | pathlib.Path) -> None:
    """Raise UsageError if a weight is not finite: its network answers every image with nonsense."""
    broken = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if broken:
        raise UsageError(f"{path} holds weights that are not finite, in {broken}; use an earlier checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow's checkpoints: the names and layouts of their variables

Variables = Mapping[str, np.ndarray]  # TF1 name -> array, as `read_tf_checkpoint` returns them
# The fields of a network's config that its variables do not show.
UNRECORDED = ("swish_act", "spec_iter", "spec_norm_val", "downsample")
# The other networks take (3, 32, 32).
IMAGE_SHAPES = {"MnistNet": (1, 28, 28), "DspritesNet": (1, 64, 64), "ResNet128": (3, 128, 128)}


def to_tf_name(name: str) -> str:
    """Return the name of the TF1 variable that corresponds to a tensor of an EnergyNetwork's state.

    For example, "stages.res_1.c1.weight" -> "context_0/res_1_res_c1/cweight".
    """
    stage, *child, leaf = name.removeprefix("stages.").split(".")
    if stage == "atten" and child:
        leaf = f"atten_{child[0]}" + {"weight": "weight", "u": "_u", "b": "_b1"}[leaf]
    elif leaf in ("weight", "u"):
        kind = "w" if stage.startswith("fc") else "c"
        leaf = f"{kind}weight" if leaf == "weight" else f"{kind}_u"
    scope = f"{stage}_res_{child[0]}" if child and stage != "atten" else stage
    return f"context_0/{scope}/{leaf}"


def to_tf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the TF1 variable for our tensor `name`, which has this shape."""
    if name.endswith(".weight"):
        return shape[2:] + shape[1::-1]  # (out, in, h, w) -> (h, w, in, out), and (out, in) -> (in, out)
    if name.endswith((".g", ".gb")) and shape[0] == 1:
        return shape[1:]  # in TF1 a table of one row, unconditional or of a one-dimensional label, is a vector
    return shape


def from_tf_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Return a TF1 array in the layout and shape of our tensor `name`.

    array: a kernel in HWIO, a matrix (in, out) or a vector. Raises UsageError if its shape does not fit.
    """
    if array.dtype.kind != "f":
        raise UsageError(f"{to_tf_name(name)} holds {array.dtype}, which cannot be weights")
    if array.shape != to_tf_shape(name, shape):
        raise UsageError(f"{to_tf_name(name)} has shape {array.shape}, the network's {name} has {shape}")
    if name.endswith(".weight"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.transpose()
    return torch.from_numpy(np.ascontiguousarray(array)).view(shape)


def load_tf_variables(model: models.EnergyNetwork, variables: Variables) -> list[str]:
    """Load TF1 variables into a model; return the names of the variables that it does not use.

    Raises UsageError if a variable that the network needs is missing or has another shape.
    """
    state = model.state_dict()
    missing = [to_tf_name(name) for name in state if to_tf_name(name) not in variables]
    if missing:
        raise UsageError(f"the checkpoint lacks {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")
    weights = {k: from_tf_array(k, variables[to_tf_name(k)], tuple(v.shape)) for k, v in state.items()}
    check_finite_weights(weights, "the checkpoint")
    model.load_state_dict(weights)
    used = {to_tf_name(name) for name in state}
    return sorted(set(variables) - used)


# ---------------------------------------------------------------------------------------------------------------------
# TensorFlow's checkpoints: the network, inferred from the variables


def is_trained(variables: Variables, name: str) -> bool:
    """Return whether a variable that starts at zero took part in training.

    The optimizer keeps moments of trained variables only. In a checkpoint without moments, a variable counts as trained
    if it is no longer zero.
    """
    if any(key.endswith("/Adam") for key in variables):
        return f"{name}/Adam" in variables
    return name in variables and bool(variables[name].any())


def find_shape(variables: Variables, name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a variable, or zeros if it is missing or has another number of dimensions."""
    shape = variables[name].shape if name in variables else ()
    return shape if len(shape) == dimensions else (0,) * dimensions


def infer_label_size(variables: Variables, network: str) -> int:
    """Return the width of the labels that a network was trained with, 0 for an unconditional one."""
    if network == "MnistNet":  # it takes the label as further planes of its input
        return max(find_shape(variables, "context_0/c1_pre/cweight", 4)[2] - 1, 0)
    layer = "context_0/c3" if network == "DspritesNet" else "context_0/res_optim_res_c2"
    # With labels of width 1 (cond_size) the shapes are those of an unconditional network, but only labels train `cb`.
    return find_shape(variables, f"{layer}/g", 2)[0] or int(is_trained(variables, f"{layer}/cb"))


def list_needed_shapes(config: models.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each TF1 variable that a network needs, by its name."""
    with torch.device("meta"):
        state = models.EnergyNetwork(config).state_dict()
    return {to_tf_name(name): to_tf_shape(name, tuple(tensor.shape)) for name, tensor in state.items()}


def list_mismatches(needed: dict[str, tuple[int, ...]], variables: Variables) -> list[str]:
    """Return a phrase for each variable that a network needs but lacks, or that was trained but is not the network's.

    needed: the network's variables, from `list_needed_shapes`.
    """
    shapes = {name: array.shape for name, array in variables.items()}
    missing = [f"no {name} of shape {shape}" for name, shape in needed.items() if shapes.get(name) != shape]
    trained = [name.removesuffix("/Adam") for name in variables if name.endswith("/Adam")]
    return missing + [f"a trained {name} besides" for name in trained if name not in needed]


def infer_config(variables: Variables, *, label_size: int | None = None, **unrecorded: Any) -> models.ModelConfig:
    """Return the config of the network that TF1 variables belong to; if several networks match, the largest.

    label_size: replaces the inferred width of labels. unrecorded: the fields that variables do not show, see
    UNRECORDED; those that are left out keep their defaults. Raises UsageError, naming how the closest network differs,
    if none matches.
    """
    if label_size is not None and label_size < 0:
        raise UsageError(f"label_size is {label_size}, must be 0 (unconditional) or more")
    for name, value in unrecorded.items():
        if not fits_config(name, value):
            raise UsageError(f"{name} is {value}, which no network has")
    first = "res_optim_res_c1" if "context_0/res_optim_res_c1/cweight" in variables else "c1"
    num_filters = find_shape(variables, f"context_0/{first}/cweight", 4)[3]
    if num_filters == 0:
        raise UsageError(f"no convolution context_0/{first}/cweight: this is none of {', '.join(models.NETWORKS)}")
    candidates = [
        models.ModelConfig(
            network,
            image_shape=IMAGE_SHAPES.get(network, (3, 32, 32)),
            num_filters=num_filters,
            label_size=infer_label_size(variables, network) if label_size is None else label_size,
            spec_norm="context_0/c1_pre/c_u" in variables,
            use_attention=is_trained(variables, "context_0/atten/gamma"),
            **unrecorded,
        )
        for network in models.NETWORKS
    ]
    needed = {config: list_needed_shapes(config) for config in candidates}
    mismatches = {config: list_mismatches(needed[config], variables) for config in candidates}
    best = min(candidates, key=lambda config: (len(mismatches[config]), -len(needed[config])))
    if mismatches[best]:
        raise UsageError(
            f"the variables match no network; {best.network} with num_filters={num_filters} and "
            f"label_size={best.label_size} comes closest, but there is {mismatches[best][0]}"
        )
    return best


def load_tf_energy(
    prefix: str | pathlib.Path, *, label_size: int | None = None, **unrecorded: Any
) -> models.EnergyNetwork:
    """Return the network of a TF1 checkpoint in eval mode.

    prefix: the path without `.index`. For the other arguments see `infer_config`.
    """
    prefix = strip_ending(pathlib.Path(prefix))
    variables = read_tf_checkpoint(prefix)
    with name_checkpoint(prefix):
        model = models.EnergyNetwork(infer_config(variables, label_size=label_size, **unrecorded))
        load_tf_variables(model, variables)
    return model.eval()


@contextlib.contextmanager
def name_checkpoint(prefix: str | pathlib.Path) -> Iterator[None]:
    """Put the name of a checkpoint before the message of a UsageError inside."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{prefix}: {error}") from None


def read_adam_moments(
    model: models.EnergyNetwork, variables: Variables
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Return Adam's first and second moment of each parameter, by its name in the model, and the number of steps.

    TensorFlow stores beta2^(steps + 1) in float32. The number is therefore exact at first and stops near 87,000,
    because beta2_power underflows there; the bias correction has long been 1 by then. Raises UsageError if the
    checkpoint lacks some or all moments.
    """
    beta2, smallest = 0.999, float(np.finfo(np.float32).tiny)
    power = variables.get("beta2_power", np.zeros(0))
    if power.shape != () or not 0 <= power <= 1:
        raise UsageError("the checkpoint has no beta2_power in 0…1: it was saved without its optimizer")
    steps = round(math.log(max(float(power), smallest)) / math.log(beta2)) - 1
    moments = {}
    for name, parameter in model.named_parameters():
        slots = [f"{to_tf_name(name)}/{slot}" for slot in ("Adam", "Adam_1")]
        missing = [slot for slot in slots if slot not in variables]
        if missing:
            raise UsageError(f"the checkpoint lacks {missing[0]}, a moment of its optimizer")
        first, second = (from_tf_array(name, variables[slot], tuple(parameter.shape)) for slot in slots)
        moments[name] = first, second
    return moments, max(steps, 0)


def restore_tf_optimizer(optimizer: ClippedAdam, model: models.EnergyNetwork, variables: Variables) -> None:
    """Load the moments and the step count of a TF1 checkpoint into a model's optimizer; see `read_adam_moments`."""
    moments, steps = read_adam_moments(model, variables)
    for name, parameter in model.named_parameters():
        first, second = (moment.to(parameter.device) for moment in moments[name])
        optimizer.state[parameter] = {"m": first, "v": second}
    for group in optimizer.param_groups:
        group["t"] = steps


def resume_tf(prefix: pathlib.Path, model: models.EnergyNetwork, optimizer: ClippedAdam) -> None:
    """Load the weights and the optimizer state of a TF1 checkpoint, so that a run can continue from it.

    Raises UsageError, naming the differences, if the checkpoint is of another network than `model`.
    """
    variables, config = read_tf_checkpoint(prefix), model.config
    with name_checkpoint(prefix):
        stored = infer_config(variables, **{name: getattr(config, name) for name in UNRECORDED})
    check_config(stored, config, prefix)
    with name_checkpoint(prefix):
        load_tf_variables(model, variables)
        restore_tf_optimizer(optimizer, model, variables)

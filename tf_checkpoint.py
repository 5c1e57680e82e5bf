"""Read the published TensorFlow 1 checkpoints, without TensorFlow.

    python tf_checkpoint.py cachedir/cifar10_cond/model_74700 cachedir/cifar10_cond/model_74700.pt
    python tf_checkpoint.py --swish_act cachedir/imagenet128_cond/model_2238000 model_2238000.pt

A checkpoint is `model_<iter>.index`, a table of names and places in the format of LevelDB, beside its shards
`model_<iter>.data-00000-of-00001`, the raw tensors. Both may come from strangers: every size, offset and checksum is
verified, and time and memory stay in proportion to the length of the files.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import models
from errors import UsageError
from optimizer import ClippedAdam

Variables = Mapping[str, np.ndarray]  # TF1 name -> tensor, what `read_tf_checkpoint` returns


class Fault(Exception):
    """What is wrong with a file; `blaming` adds which file it is."""


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a file into one line that names it."""
    try:
        yield
    except Fault as fault:
        raise UsageError(f"{path} {fault}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Bytes, numbers and messages: what both the table and its entries are made of


def take(data: bytes, start: int, size: int) -> bytes:
    """Return `size` bytes from `start`."""
    if start + size > len(data):
        raise Fault("is damaged: something in it reaches beyond its end")
    return data[start : start + size]


def varint(data: bytes, start: int) -> tuple[int, int]:
    """Return the number at `start`, seven bits per byte and the lowest first, and where it ends."""
    value = 0
    for i, byte in enumerate(data[start : start + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, start + i + 1
    raise Fault("is damaged: a number in it does not end")


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: numbers as int, nested messages as bytes."""
    position = 0
    while position < len(message):
        key, position = varint(message, position)
        if key & 7 == 0:
            number, position = varint(message, position)
            yield key >> 3, number
        elif key & 7 == 2:
            size, position = varint(message, position)
            yield key >> 3, take(message, position, size)
            position += size
        elif key & 7 == 5:
            yield key >> 3, int.from_bytes(take(message, position, 4), "little")
            position += 4
        else:
            raise Fault(f"is damaged: a field of the unknown type {key & 7}")


def numbers(message: bytes) -> dict[int, int]:
    """Return the fields of a protobuf message that are numbers; where one is repeated, the last counts."""
    return {field: value for field, value in fields(message) if isinstance(value, int)}


def nested(message: bytes, field: int) -> list[bytes]:
    """Return the nested messages of one field."""
    return [value for number, value in fields(message) if number == field and isinstance(value, bytes)]


def verify(data: bytes | np.ndarray, masked: int, what: str) -> None:
    """Compare the CRC-32C of `data` with a stored one, which LevelDB masks: rotated by 15 bits, plus a constant."""
    try:
        import google_crc32c
    except ImportError:
        raise UsageError("checksums of TensorFlow's files need google-crc32c: pip install google-crc32c") from None

    crc = google_crc32c.value(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != masked:
        raise Fault(f"is damaged: {what} fails its checksum")


# ---------------------------------------------------------------------------------------------------------------------
# The index: its footer points to the index block, that to the data blocks, those hold (name, entry)

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_SIZE = 48  # bytes: places of two blocks, padding, MAGIC
MAX_INDEX_SIZE = 1 << 20  # bytes; published ones have some ten thousand
MAX_NAME_SIZE = 1 << 10  # bytes; names share their beginnings, so a short file could spell out very long ones
MAX_DIMENSIONS = 8
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # those of weights and counters, by their numbers in TensorFlow


class Entry(NamedTuple):
    """Where a tensor is, and what it is: `size` bytes from `offset` of a shard."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


def block(table: bytes, place: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs of the block at `place` (offset, size); a key omits what it shares with the last."""
    offset, position = varint(place, 0)
    size, _ = varint(place, position)
    content = take(table, offset, size)
    trailer = take(table, offset + size, 5)  # compression, checksum of the content and of that byte
    verify(content + trailer[:1], int.from_bytes(trailer[1:], "little"), "a block")
    if trailer[0] != 0:
        raise Fault("is compressed, which TensorFlow does not do by itself: save it again without compression")
    restarts = int.from_bytes(content[-4:], "little")  # the length of an array behind the pairs, for binary search
    end = len(content) - 4 * (restarts + 1)
    if end <= 0:
        raise Fault("is damaged: an empty block")
    pairs = content[:end]

    key, position = b"", 0
    while position < end:
        shared, position = varint(pairs, position)
        added, position = varint(pairs, position)
        size, position = varint(pairs, position)
        if shared > len(key) or shared + added > MAX_NAME_SIZE:
            raise Fault("is damaged: an impossible name")
        key = key[:shared] + take(pairs, position, added)
        yield key, take(pairs, position + added, size)
        position += added + size


def table_items(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield all (key, value) pairs of a table, whose keys increase."""
    footer = table[-FOOTER_SIZE:]
    if not footer.endswith(MAGIC):
        raise Fault("is no index of a TensorFlow checkpoint, or its end is missing")
    position = varint(footer, varint(footer, 0)[1])[1]  # behind the place of a block of remarks
    last = None
    for _, place in block(table, footer[position:]):
        for key, value in block(table, place):
            if last is not None and key <= last:
                raise Fault("is damaged: its names are not in order")
            yield key, value
            last = key


def parse_entry(key: bytes, message: bytes) -> Entry:
    """Return one entry (TensorFlow's BundleEntryProto) whose size agrees with its shape."""
    name = key.decode("ascii", errors="replace")
    if not key.isascii() or not name.isprintable():
        raise Fault(f"is damaged: an impossible name {key[:80]!r}")
    values = numbers(message)
    if values.get(1, 0) not in DTYPES:
        raise Fault(f"holds {name} of TensorFlow's type {values.get(1, 0)}, this reader takes {sorted(DTYPES)}")
    if nested(message, 7):
        raise Fault(f"holds {name} in slices, which this reader does not take")
    dtype = np.dtype(DTYPES[values[1]])
    dimensions = [dimension for shape in nested(message, 2) for dimension in nested(shape, 2)]
    if len(dimensions) > MAX_DIMENSIONS:
        raise Fault(f"is damaged: {name} of {len(dimensions)} dimensions")
    shape = tuple(numbers(dimension).get(1, 0) for dimension in dimensions)
    size = values.get(5, 0)
    if size == 0 or size != math.prod(shape) * dtype.itemsize:
        raise Fault(f"is damaged: {name} of shape {shape} in {size} bytes")
    return Entry(name, dtype, shape, values.get(3, 0), values.get(4, 0), size, values.get(6, 0))


def read_index(path: Path) -> tuple[list[Entry], int]:
    """Return the entries of an index, none overlapping, in the order of their places, and the number of shards."""
    if not path.is_file():
        raise Fault("is missing")
    if path.stat().st_size > MAX_INDEX_SIZE:
        raise Fault(f"has more than {MAX_INDEX_SIZE} bytes, too many for an index")
    items = table_items(path.read_bytes())
    key, header = next(items)  # TensorFlow's BundleHeaderProto
    if key:
        raise Fault("is damaged: it has no header")
    if numbers(header).get(2, 0) != 0:
        raise Fault("was written in big-endian order, which this reader does not take")
    entries = sorted((parse_entry(*item) for item in items), key=lambda entry: (entry.shard, entry.offset))
    for one, other in itertools.pairwise(entries):
        if one.shard == other.shard and one.offset + one.size > other.offset:
            raise Fault(f"is damaged: {one.name} and {other.name} overlap")
    return entries, numbers(header).get(1, 0)


def read_shard(path: Path, entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """Return the tensors of a shard by their names."""
    if not path.is_file():
        raise Fault("is missing")
    tensors = {}
    with path.open("rb") as file:
        length = path.stat().st_size
        for entry in entries:
            if entry.offset + entry.size > length:
                raise Fault(f"is truncated: {entry.name} reaches beyond its end")
            file.seek(entry.offset)
            data = np.fromfile(file, np.uint8, entry.size)
            verify(data, entry.checksum, entry.name)
            tensors[entry.name] = data.view(entry.dtype).reshape(entry.shape)
    return tensors


def read_tf_checkpoint(prefix: str | Path) -> dict[str, np.ndarray]:
    """Return every tensor of a TF1 checkpoint by its name.

    prefix: the path without `.index`. Raises UsageError that names the file and what is wrong with it: missing,
    truncated, a bad checksum, compressed, not a checkpoint.
    """
    index = Path(f"{prefix}.index")
    with blaming(index):
        entries, shards = read_index(index)
    variables: dict[str, np.ndarray] = {}
    for number, group in itertools.groupby(entries, key=lambda entry: entry.shard):
        shard = Path(f"{prefix}.data-{number:05d}-of-{shards:05d}")
        with blaming(shard):
            variables |= read_shard(shard, group)
    return variables


# ---------------------------------------------------------------------------------------------------------------------
# From variables to a network


IMAGE_SHAPES = {"MnistNet": (1, 28, 28), "DspritesNet": (1, 64, 64), "ResNet128": (3, 128, 128)}  # else (3, 32, 32)


def trained(variables: Variables, name: str) -> bool:
    """Tell whether a variable took part in training, of those that start at zero.

    The optimizer keeps moments of nothing else; in a checkpoint without any, such a variable has left zero.
    """
    if any(key.endswith("/Adam") for key in variables):
        return f"{name}/Adam" in variables
    return name in variables and bool(variables[name].any())


def shape_of(variables: Variables, name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a variable, zeros where it is missing or has another number of dimensions."""
    shape = variables[name].shape if name in variables else ()
    return shape if len(shape) == dimensions else (0,) * dimensions


def infer_label_size(variables: Variables, network: str) -> int:
    """Return the width of the labels a network was trained with, 0 where it was unconditional."""
    if network == "MnistNet":  # takes the label as further planes of its input
        return max(shape_of(variables, "context_0/c1_pre/cweight", 4)[2] - 1, 0)
    layer = "context_0/c3" if network == "DspritesNet" else "context_0/res_optim_res_c2"
    # One class (cond_size) has the shapes of an unconditional network, but only labels train `cb`.
    return shape_of(variables, f"{layer}/g", 2)[0] or int(trained(variables, f"{layer}/cb"))


def tf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in TensorFlow of the state `name`."""
    if name.endswith(".weight"):
        return shape[2:] + shape[1::-1]  # (out, in, h, w) -> (h, w, in, out), and (out, in) -> (in, out)
    if name.endswith((".g", ".gb")) and shape[0] == 1:
        return shape[1:]  # unconditional tables are vectors there, and so are those of a one-dimensional label
    return shape


def needs(config: models.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each TF1 variable that a network needs."""
    with torch.device("meta"):
        state = models.EnergyNetwork(config).state_dict()
    return {models.tf_name(name): tf_shape(name, tuple(tensor.shape)) for name, tensor in state.items()}


def mismatches(needed: dict[str, tuple[int, ...]], variables: Variables) -> list[str]:
    """Return what speaks against a network: variables that it needs and are not there, or were trained besides."""
    shapes = {name: array.shape for name, array in variables.items()}
    lacking = [f"no {name} of shape {shape}" for name, shape in needed.items() if shapes.get(name) != shape]
    moved = [name.removesuffix("/Adam") for name in variables if name.endswith("/Adam")]
    return lacking + [f"a trained {name} besides" for name in moved if name not in needed]


def infer_config(variables: Variables, *, swish_act: bool = False, label_size: int | None = None) -> models.ModelConfig:
    """Return the config of the network whose variables these are, the largest of several that would do.

    swish_act: not to be seen in variables; nor are spec_iter, spec_norm_val and downsample, which keep their defaults.
    label_size: overrules what was found. Raises UsageError, naming how the closest network differs, where none matches.
    """
    if label_size is not None and label_size < 0:
        raise UsageError(f"label_size is {label_size}, must be 0 (unconditional) or more")
    first = "res_optim_res_c1" if "context_0/res_optim_res_c1/cweight" in variables else "c1"
    num_filters = shape_of(variables, f"context_0/{first}/cweight", 4)[3]
    if num_filters == 0:
        raise UsageError(f"no convolution context_0/{first}/cweight: this is none of {', '.join(models.NETWORKS)}")
    candidates = [
        models.ModelConfig(
            network,
            image_shape=IMAGE_SHAPES.get(network, (3, 32, 32)),
            num_filters=num_filters,
            label_size=infer_label_size(variables, network) if label_size is None else label_size,
            spec_norm="context_0/c1_pre/c_u" in variables,
            use_attention=trained(variables, "context_0/atten/gamma"),
            swish_act=swish_act,
        )
        for network in models.NETWORKS
    ]
    needed = {config: needs(config) for config in candidates}
    against = {config: mismatches(needed[config], variables) for config in candidates}
    best = min(candidates, key=lambda config: (len(against[config]), -len(needed[config])))
    if against[best]:
        raise UsageError(
            f"the variables match no network; {best.network} with num_filters={num_filters} and "
            f"label_size={best.label_size} comes closest, but there is {against[best][0]}"
        )
    return best


def load_tf_energy(
    prefix: str | Path, *, swish_act: bool = False, label_size: int | None = None
) -> models.EnergyNetwork:
    """Return the network of a TF1 checkpoint in eval mode.

    prefix: the path without `.index`. For the others, and what a checkpoint cannot tell, see `infer_config`.
    """
    variables = read_tf_checkpoint(prefix)
    try:
        model = models.EnergyNetwork(infer_config(variables, swish_act=swish_act, label_size=label_size))
    except UsageError as error:
        raise UsageError(f"{prefix}: {error}") from None
    models.load_tf_variables(model, variables)
    return model.eval()


def adam_moments(model: models.EnergyNetwork, variables: Variables) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Return the optimizer's (first, second) moment of each parameter, by its name in the model, and the step count.

    TensorFlow stores beta2 to the power of one more than the steps done, in float32: the count is exact at first,
    and stops near 87,000, where beta2_power underflows and the bias correction has long been 1. Raises UsageError
    for a checkpoint without, or with only some of the moments.
    """
    beta2, smallest = 0.999, float(np.finfo(np.float32).tiny)
    power = variables.get("beta2_power", np.zeros(0))
    if power.shape != () or not 0 <= power <= 1:
        raise UsageError("the checkpoint has no beta2_power in 0…1: it was saved without its optimizer")
    steps = round(math.log(max(float(power), smallest)) / math.log(beta2)) - 1
    moments = {}
    for name, parameter in model.named_parameters():
        slots = [f"{models.tf_name(name)}/{slot}" for slot in ("Adam", "Adam_1")]
        missing = [slot for slot in slots if slot not in variables]
        if missing:
            raise UsageError(f"the checkpoint lacks {missing[0]}, a moment of its optimizer")
        first, second = (models.from_tf_layout(name, variables[slot], parameter.shape) for slot in slots)
        moments[name] = first, second
    return moments, max(steps, 0)


def restore_optimizer(optimizer: ClippedAdam, model: models.EnergyNetwork, variables: Variables) -> None:
    """Set the optimizer of a model's parameters to where a TF1 checkpoint left it; errors as for `adam_moments`."""
    moments, steps = adam_moments(model, variables)
    for name, parameter in model.named_parameters():
        first, second = (moment.to(parameter.device) for moment in moments[name])
        optimizer.state[parameter] = {"m": first, "v": second}
    for group in optimizer.param_groups:
        group["t"] = steps


def resume(prefix: Path, model: models.EnergyNetwork, optimizer: ClippedAdam) -> None:
    """Load the weights and the optimizer of a TF1 checkpoint into a run that goes on from it.

    Raises UsageError, naming what differs, where the checkpoint is of another network than `model`.
    """
    variables, wanted = read_tf_checkpoint(prefix), model.config
    stored = infer_config(variables, swish_act=wanted.swish_act)
    unseen = {name: getattr(wanted, name) for name in ("spec_iter", "spec_norm_val", "downsample")}
    checkpoint.check_config(dataclasses.replace(stored, **unseen), wanted, prefix)
    models.load_tf_variables(model, variables)
    restore_optimizer(optimizer, model, variables)


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


def convert(source: str | Path, target: Path, *, swish_act: bool = False, label_size: int | None = None) -> None:
    """Write a TF1 checkpoint in our format, with its optimizer where it has one, and print what was found.

    The iteration is the number that ends the name of `source`, 0 where there is none.
    """
    model = load_tf_energy(source, swish_act=swish_act, label_size=label_size)
    variables = read_tf_checkpoint(source)
    number = re.search(r"[0-9]+$", str(source))
    state = {
        "config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "iteration": int(number[0]) if number else 0,
    }
    if "beta2_power" in variables:
        optimizer = ClippedAdam(model.parameters())
        restore_optimizer(optimizer, model, variables)
        state["optimizer"] = optimizer.state_dict()
    try:
        checkpoint.save(target, state)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None

    print(model.config)
    names = {models.tf_name(name): name for name in model.state_dict()}
    for name, array in sorted(variables.items()):
        print(f"{name:<44} {array.shape!s:<20} {names.get(name, '')}".rstrip())
    print(f"{source} -> {target}, iteration {state['iteration']}{'' if 'optimizer' in state else ', no optimizer'}")


def main(arguments: Sequence[str]) -> int:
    """Convert a checkpoint as the command line says; return the exit status, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="TF1 checkpoint: the path without .index")
    parser.add_argument("target", type=Path, help="file to write, such as model_74700.pt")
    parser.add_argument("--swish_act", action="store_true", help="the network was trained with --swish_act")
    parser.add_argument("--label_size", type=int, help="width of its labels, 0: unconditional; by default inferred")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.target, swish_act=options.swish_act, label_size=options.label_size)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

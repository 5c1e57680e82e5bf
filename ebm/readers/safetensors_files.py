"""Networks in files of the format safetensors, which need not be trusted.

    contents = encode_safetensors(state)  # bytes
    state = read_safetensors(path)  # {"model": tensors by name, "config": …, "iteration": …, …}

Such a file holds tensors and texts. The tensors are the weights; each other entry of a checkpoint is a text in JSON.
The format has no checksums, so that one of all contents is among the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebm.readers.bounded import PathLike, open_file
from ebm.support.errors import UsageError

ENDING = ".safetensors"
NETWORK_ENTRIES = ("config", "iteration", "flags", "class_names")  # of a checkpoint, besides the weights
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of weights, as in checkpoints
CHECKSUM = "sha256"  # the name of its text


def import_safetensors() -> Any:
    """Return the package safetensors with its part for torch; raise UsageError if it is not installed."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise UsageError(
            f"files of the ending {ENDING} need the package safetensors; pip install -e '.[export]'"
        ) from None
    return safetensors


def encode_safetensors(state: Mapping[str, Any]) -> bytes:
    """Return the network of a checkpoint as the contents of a safetensors file: weights and the NETWORK_ENTRIES.

    Raises UsageError if the package is not installed.
    """
    encode = import_safetensors().torch.save  # to bytes, not to a file
    texts = {name: json.dumps(state[name]) for name in NETWORK_ENTRIES if name in state}
    # Contiguous, and each with memory of its own, as the format wants them.
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state["model"].items()}
    texts[CHECKSUM] = compute_checksum(texts, weights)
    return encode(weights, metadata={"format": "pt"} | texts)  # "pt": what other readers look for


def read_safetensors(path: PathLike) -> dict[str, Any]:
    """Return the weights in a safetensors file as `model`, on the CPU, and those of NETWORK_ENTRIES that it has.

    A file without the checksum, from another program, is taken as it is. Raises UsageError if the package is not
    installed, and other exceptions if the file cannot be read or is damaged.
    """
    library = import_safetensors()
    open_file(path).close()  # refuses a pipe, for which the package would wait
    with library.safe_open(path, framework="pt") as file:
        texts = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    if odd := next((name for name, tensor in weights.items() if tensor.dtype not in WEIGHT_TYPES), None):
        raise ValueError(f"{odd[:100]} holds no weights but {weights[odd].dtype}")
    stored = {name: texts[name] for name in NETWORK_ENTRIES if name in texts}
    if CHECKSUM in texts and texts[CHECKSUM] != compute_checksum(stored, weights):
        raise ValueError("its contents are not those of its checksum")
    return {name: json.loads(text) for name, text in stored.items()} | {"model": weights}


def compute_checksum(texts: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """Return a checksum of texts and tensors by name, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}".encode("utf-8", "backslashreplace"))
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

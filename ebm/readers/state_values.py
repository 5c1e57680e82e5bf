"""Checks of the values in a checkpoint, which a stranger may have written.

    if odd := find_odd_entry(state, image_shape):
        print(f"its {odd} is not of its kind")

A run and every script can then rely on types, shapes and ranges. Names that are not listed here are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ebm.support.hardware import PRECISIONS

LARGEST = 1 << 53  # of counts; beyond it, floating-point numbers skip some
SCALARS = str | bool | int | float | None


def find_odd_entry(state: Mapping[str, Any], image_shape: tuple[int, ...]) -> str | None:
    """Return the name of the first entry of a checkpoint that is not of its kind, or None; missing ones are right.

    image_shape: (C, H, W) of the network.
    """

    def are_workers(value: Any) -> bool:
        if not is_list_of(value, lambda worker: is_worker_state(worker, image_shape)):
            return False
        buffers = {id(worker["buffer"]["images"]) for worker in value}
        return len(buffers) == len(value)  # one buffer many times would be dealt out as many

    checks: dict[str, Callable[[Any], bool]] = {
        "iteration": is_count,
        "model": is_weights,
        "ema": lambda value: value is None or is_weights(value),
        "flags": is_flags,
        "class_names": lambda value: is_list_of(value, lambda name: isinstance(name, str)),
        "images": is_count,
        "best": lambda value: isinstance(value, float) or is_mapping_to(value, lambda best: isinstance(best, float)),
        "rollbacks": is_count,
        "precision": lambda value: value in list(PRECISIONS),
        "way": is_way,
        "optimizer": is_optimizer,
        "batches": lambda value: has_counts(value, "epoch", "position") and type(value.get("seed")) is int,
        "workers": are_workers,
    }
    return next((name for name, is_right in checks.items() if name in state and not is_right(state[name])), None)


def is_way(value: Any) -> bool:
    """Return whether a value describes how chains are computed, as `ebm.training.tuning.Way` does."""
    flags = ("fold", "patches", "compiled", "on_cpu")
    if not has_counts(value, "threads") or value["threads"] == 0 or value.get("precision") not in list(PRECISIONS):
        return False
    return all(isinstance(value.get(flag), bool) for flag in flags)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number from 0."""
    return type(value) is int and 0 <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) <= LARGEST and math.isfinite(value)


def is_list_of(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Return whether a value is a list or tuple whose items are right."""
    return isinstance(value, list | tuple) and all(map(is_right, value))


def is_mapping_to(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Return whether a value is a dictionary from texts to values that are right."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_right(item) for name, item in value.items())


def has_counts(value: Any, *names: str) -> bool:
    """Return whether a value is a dictionary that holds counts of these names."""
    return isinstance(value, dict) and all(is_count(value.get(name)) for name in names)


def is_weights(value: Any) -> bool:
    """Return whether a value is a dictionary of floating-point tensors by name."""
    return is_mapping_to(value, lambda tensor: isinstance(tensor, Tensor) and tensor.is_floating_point())


def is_flags(value: Any) -> bool:
    """Return whether a value holds the settings of a run: plain values, or lists of these, by name."""
    return is_mapping_to(
        value, lambda item: isinstance(item, SCALARS) or is_list_of(item, lambda part: isinstance(part, SCALARS))
    )


def is_optimizer(value: Any) -> bool:
    """Return whether a value is the state of a ClippedAdam, or of none."""
    if isinstance(value, dict) and not value:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    pairs, groups = value["state"], value.get("param_groups", ())
    if not all(is_count(number) and is_weights(pair) and {"m", "v"} == set(pair) for number, pair in pairs.items()):
        return False
    return is_list_of(groups, is_parameter_group) and len(groups) == 1


def is_parameter_group(value: Any) -> bool:
    """Return whether a value holds the settings and the step count of a ClippedAdam."""
    if not has_counts(value, "t") or not is_list_of(value.get("betas"), is_number) or len(value["betas"]) != 2:
        return False
    rates = (value.get("lr"), value.get("eps"))
    return all(0 <= beta < 1 for beta in value["betas"]) and all(is_number(rate) and rate >= 0 for rate in rates)


def is_worker_state(value: Any, image_shape: tuple[int, ...]) -> bool:
    """Return whether a value is the state of a worker: its replay buffer, chains, generators and guard."""
    if not isinstance(value, dict) or not has_counts(value.get("buffer"), "position"):
        return False
    images, previous = value["buffer"].get("images"), value.get("previous")
    if not is_images(images, image_shape) or images.dtype != torch.uint8:
        return False
    if value["buffer"]["position"] > len(images):
        return False
    if previous is not None and not (is_images(previous, image_shape) and previous.is_floating_point()):
        return False
    generators = [value.get("generator"), value.get("torch_generator")]
    generators += [value["cuda_generator"]] if value.get("cuda_generator") is not None else []
    if not all(isinstance(state, Tensor) and state.dtype == torch.uint8 and state.ndim == 1 for state in generators):
        return False
    guard = value.get("guard", {"suspicious": 0, "usual": []})
    return has_counts(guard, "suspicious") and is_list_of(
        guard.get("usual"), lambda pair: is_list_of(pair, is_number) and len(pair) == 2
    )


def is_images(value: Any, image_shape: tuple[int, ...]) -> bool:
    """Return whether a value is a tensor of images (n, C, H, W) of this shape (C, H, W)."""
    return isinstance(value, Tensor) and value.ndim == 4 and tuple(value.shape[1:]) == tuple(image_shape)

"""Save, find and load checkpoints: tensors and plain values only, written whole or not at all.

model = load_energy("cachedir/cifar10_cond/model_74700")      # ours (.pt) or TensorFlow's (.index, .data-*)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import pickle
import re
import zipfile
from typing import Any

import torch

import models
from errors import UsageError

KEEP = 30  # checkpoints kept, besides one every KEEP_SECONDS for good
KEEP_SECONDS = 6 * 3600.0


def save(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk and rename it: `path` is never half a file.

    Its folder is made where there is none.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename, too, must outlive a power cut
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def iterations(folder: pathlib.Path) -> list[int]:
    """Return the iterations of the checkpoints in a folder, of ours and of TensorFlow's, ascending."""
    found = (re.fullmatch(r"model_(\d+)\.(?:pt|index)", path.name) for path in folder.glob("model_*"))
    return sorted({int(match[1]) for match in found if match})


def prune(folder: pathlib.Path) -> None:
    """Delete checkpoints of ours but for the newest `KEEP` and, for good, the first of every six hours of file time.

    What a killed process left half written goes too.
    """
    for path in folder.glob(".model_*.tmp"):
        path.unlink()
    numbered = sorted(
        (number, path) for path in folder.glob("model_*.pt") if (number := iteration_of(path)) is not None
    )
    periods = set()
    for _, path in numbered[:-KEEP]:
        period = path.stat().st_mtime // KEEP_SECONDS
        if period in periods:
            path.unlink()
        periods.add(period)


def iteration_of(path: pathlib.Path) -> int | None:
    """Return N of `model_N.pt`, None for other names such as `model_best.pt`."""
    match = re.fullmatch(r"model_(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def find(folder: pathlib.Path, resume_iter: str) -> pathlib.Path:
    """Return the path of checkpoint "123", "best" or "latest" in a folder, as `.pt` file or TF1 prefix.

    Raises UsageError naming what was looked for and what there is.
    """
    if not folder.is_dir():
        raise UsageError(f"no experiment folder {folder}; check --exp and where experiments are kept")
    there = iterations(folder)
    if resume_iter == "latest":
        if not there:
            raise UsageError(f"no checkpoint in {folder}; train one first, or check --exp")
        resume_iter = str(there[-1])
    prefix = folder / f"model_{resume_iter}"
    if prefix.with_name(f"{prefix.name}.pt").exists():
        return prefix.with_name(f"{prefix.name}.pt")
    if prefix.with_name(f"{prefix.name}.index").exists():
        return prefix
    has = f"it has {', '.join(map(str, there[-8:]))}" if there else "it has none"
    raise UsageError(f"no checkpoint model_{resume_iter} in {folder} ({has}); choose one with --resume_iter")


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, checking every member's checksum and executing nothing.

    Raises UsageError for a missing, damaged or foreign file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UsageError(f"{path} is damaged (checksum of {damaged}); use an earlier checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path} holds more than tensors and plain values; not loaded, it could run code") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"{path} cannot be read as a checkpoint ({reason}); use an earlier checkpoint") from None
    if not isinstance(state, dict) or not {"config", "model", "iteration"} <= set(state):
        raise UsageError(f"{path} is not a checkpoint of this project; convert or retrain it")
    return state


def config_of(state: dict[str, Any], path: pathlib.Path) -> models.ModelConfig:
    """Return the ModelConfig stored in a checkpoint."""
    try:
        return models.ModelConfig(**{**state["config"], "image_shape": tuple(state["config"]["image_shape"])})
    except (TypeError, KeyError) as error:
        raise UsageError(f"{path} describes a network this version does not know ({error})") from None


def check_config(stored: models.ModelConfig, wanted: models.ModelConfig, path: pathlib.Path) -> None:
    """Raise UsageError naming every field in which a checkpoint's network differs from the wanted one."""
    mine, theirs = dataclasses.asdict(wanted), dataclasses.asdict(stored)
    differ = [f"{name} is {theirs[name]} there and {mine[name]} here" for name in mine if mine[name] != theirs[name]]
    if differ:
        raise UsageError(f"{path} is of another network: {'; '.join(differ)}; change the flags or use another --exp")


def load_energy(
    prefix: str | pathlib.Path, *, swish_act: bool = False, ema: bool = False, device: torch.device | str = "cpu"
) -> models.EnergyNetwork:
    """Return the network of `cachedir/<exp>/model_<iter>` in eval mode, from our format or TensorFlow's.

    swish_act: for a TF1 checkpoint, which cannot tell. ema: with the averaged weights of a run with --ema_decay. Raises
    UsageError for a missing, damaged or foreign file, and where there are no averaged weights.
    """
    prefix = pathlib.Path(prefix)
    path = prefix if prefix.suffix == ".pt" else prefix.with_name(f"{prefix.name}.pt")
    if not path.exists() and prefix.with_name(f"{prefix.name}.index").exists():
        import tf_checkpoint

        if ema:
            raise UsageError(f"{prefix} has no averaged weights, being a TensorFlow checkpoint; leave out --ema")
        return tf_checkpoint.load_tf_energy(prefix, swish_act=swish_act).to(device)
    state = load(path)
    model = models.EnergyNetwork(config_of(state, path))
    if ema and not state.get("ema"):
        raise UsageError(f"{path} has no averaged weights; leave out --ema, or train with --ema_decay")
    load_state(model, state["ema" if ema else "model"], path)
    return model.eval().to(device)


def load_state(model: models.EnergyNetwork, state: dict[str, Any], path: pathlib.Path) -> None:
    """Load the tensors of a checkpoint into a network, strictly."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        lines = " ".join(line.strip() for line in str(error).split("\n")[1:3])
        raise UsageError(f"{path} does not fit its own configuration: {lines}") from None

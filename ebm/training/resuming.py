"""What a resumed run takes from a checkpoint: the state to go on from, and the settings that the run was started with.

path, contents = open_checkpoint(settings, workers)      # None and nothing for a new run
if path is not None:
    settings = recall_settings(settings, path, contents)

The settings of a run are those of its checkpoint, but for those that are given when it is resumed.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import checkpoint
from data import DATASETS
from ebm.presets import PRESETS
from ebm.readers.bounded import make_printable
from ebm.settings import CONDITIONS, SIZES, SUBSETS, NetworkSettings, RunSettings, TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.support.experiments import get_shipped_root, has_checkpoints, report_missing_experiment
from ebm.training.distributed import Workers
from ebm.training.ownership import check_new_folder

# Settings of one call: where a run is, what is done with it, and on which machine. The others are recalled.
CALL_SETTINGS = {"exp", "logdir", "train", "resume_iter", "change", "device", "backend", "num_gpus"}
# Settings that define the network and its data: changing one by mistake would spoil what a run has learnt.
PATHS = {source.path_setting for source in DATASETS.values() if source.path_setting}
DATA_SETTINGS = {
    "dataset",
    "image_size",
    "channels",
    "antialias",
    "leave_out",
    "single",
    "rescale",
    *CONDITIONS,
    *SUBSETS,
    *PATHS,
}
NETWORK_SETTINGS = {"start_rank", *(field.name for field in dataclasses.fields(NetworkSettings))}
# Those on which the shapes of the weights and of the images depend, which a trained network cannot change.
SHAPE_SETTINGS = {
    "image_size",
    "channels",
    "num_filters",
    "cclass",
    "use_attention",
    "spec_norm",
    "start_rank",
    "datasource",
    *SIZES,
}


def choose_checkpoint(settings: RunSettings) -> pathlib.Path | None:
    """Return the path of the checkpoint that a run goes on from; None for a new run.

    Raises UsageError if the chosen checkpoint does not exist.
    """
    name = settings.resume_iter
    if name == "auto":
        can_resume = bool(checkpoint.list_iterations(settings.folder)) or not settings.train
        name = "latest" if can_resume else "-1"
    return None if name == "-1" else find_start(settings, name)


def find_start(settings: RunSettings, name: str) -> pathlib.Path:
    """Return the path of the checkpoint to resume from; raise UsageError, which lists those there are, without one.

    name: "latest", "best" or an iteration.
    """
    folder, shipped = settings.folder, get_shipped_root() / settings.exp
    if has_checkpoints(folder):
        return checkpoint.find(folder, name)
    if has_checkpoints(shipped):
        raise UsageError(
            f"no checkpoint in {folder}: {shipped} is a shipped model, weights without the state of a run to resume; "
            f"to train it further, copy it to {folder}"
        )
    raise report_missing_experiment(settings.exp, (settings.logdir,))


def check_folder(settings: RunSettings) -> None:
    """Raise UsageError if a run cannot use its folder.

    The checkpoint of a resumed run must be there; a new run sets nothing aside but runs.
    """
    if choose_checkpoint(settings) is None:
        check_new_folder(settings.folder)


def open_checkpoint(settings: RunSettings, workers: Workers) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """Return the path of the checkpoint that a run goes on from, and what it holds; None and nothing for a new run.

    Rank 0 chooses it for all workers. A TensorFlow checkpoint is read later.
    """
    chosen = choose_checkpoint(settings) if workers.rank == 0 else None
    path = workers.share(None if chosen is None else str(chosen))[0]
    if path is None:
        return None, {}
    path = pathlib.Path(path)
    return path, checkpoint.load(path) if path.suffix == ".pt" else {}


def recall_settings(settings: TrainSettings, path: pathlib.Path, contents: Mapping[str, Any]) -> TrainSettings:
    """Return the settings that a run goes on with: those of its checkpoint, but for those that are given now.

    Prints a note that names each given setting that was another one before. path, contents: those of the checkpoint;
    one without settings, such as TensorFlow's, leaves the settings as they are. Raises UsageError for settings that
    would change the network or the data, unless `change` is on, and for stored ones that no run can have.
    """
    flags = contents.get("flags")
    if not flags:
        print(f"note: this run goes on from {path}, which holds no settings: those not given have their defaults")
        return settings
    before = {"antialias": flags.get("dataset") == "imagenetfull"} | flags  # always on before it could be chosen
    given = list_given_names(settings, before.get("preset"))
    recalled = {name: value for name, value in before.items() if name not in CALL_SETTINGS | given}
    if recalled.get("preset") not in list(PRESETS):  # a mere name, of a version with other presets
        recalled["preset"] = None
    try:
        stored = cli.convert_values(recalled, TrainSettings)
    except UsageError as error:
        raise UsageError(f"{path} holds a setting that cannot be used ({error}); give another value") from None
    kept = {name: getattr(settings, name) for name in (*CALL_SETTINGS, *given)}
    merged = dataclasses.replace(stored, given_names=settings.given_names, **kept)
    before["num_filters"] = before.get("num_filters") or contents["config"]["num_filters"]
    changes = list_changes(merged, before, given)
    if not settings.change:
        refuse_changes(merged, before, changes, path)
    told = "; ".join(f"{name}: {change}" for name, change in changes.items())
    print(f"note: this run goes on from {path} with its settings" + (f", but for {told}" if told else ""))
    return merged


def list_given_names(settings: TrainSettings, preset_before: object) -> set[str]:
    """Return the names of the settings that are given: by the command line, or by a preset that the run did not have.

    The preset that it had was overridden then, so that the stored values count. preset_before: its name, or None.
    """
    names = set(settings.given_names)
    if settings.preset and settings.preset != preset_before:
        names |= cli.list_preset_names(settings)
    if "epoch_num" in names:  # both say where a run ends
        names.add("max_iter")
    return names - CALL_SETTINGS


def list_changes(settings: TrainSettings, before: Mapping[str, Any], given: Collection[str]) -> dict[str, str]:
    """Return those of the given settings that have an effect and were others before, each with a text "before → now".

    before: the settings of the run until now, by name; those that it lacks had their defaults.
    """
    before, now = {**cli.to_dict(TrainSettings()), **before}, cli.to_dict(settings)
    names = [name for name in now if name in given and not cli.find_obstacle(settings, name)]
    return {
        name: f"{show_value(before[name])} → {show_value(now[name])}"
        for name in names
        if not is_same_setting(before[name], now[name], is_path=name in PATHS)
    }


def show_value(value: object) -> str:
    """Return the text of a setting's value, which may come from a stranger."""
    return "unset" if value in (None, "", (), []) else make_printable(cli.write_value(value)[:100])


def is_same_setting(before: object, now: object, *, is_path: bool) -> bool:
    """Return whether two values of a setting mean the same."""
    if is_path and isinstance(before, str) and isinstance(now, str) and os.path.exists(before):
        return os.path.realpath(before) == os.path.realpath(now)
    return before == now


def refuse_changes(
    settings: TrainSettings, before: Mapping[str, Any], changes: Mapping[str, str], path: pathlib.Path
) -> None:
    """Raise UsageError, naming each change, if some of the changes are those of the network or of the data.

    A file or folder of data that is no longer in its old place was moved, which is no change.
    """
    moved = {name for name in PATHS if not os.path.exists(str(before.get(name) or ""))}
    refused = [name for name in changes if name in (NETWORK_SETTINGS | DATA_SETTINGS) - moved]
    refused += ["datasource"] * ("gauss" in changes.get("datasource", ""))  # the network keeps these distributions
    if not refused:
        return
    words = "; ".join(f"{name}: {changes[name]}" for name in refused)
    sources = dict.fromkeys(f"`{name}`" if name in settings.given_names else "`preset`" for name in refused)
    misfits = [f"`{name}`" for name in refused if name in SHAPE_SETTINGS]
    remedy = f"; the weights fit no other {' and '.join(misfits)}" if misfits else ", or add `change` if you mean it"
    raise UsageError(
        f"this would change the network or the data of {path}: {words}; leave out {' and '.join(sources)}{remedy}"
    )


def name_resumption(settings: RunSettings) -> str:
    """Return the words of a command line that go on with a run."""
    return cli.write_flags(TrainSettings(exp=settings.exp, logdir=settings.logdir, resume_iter="latest"))

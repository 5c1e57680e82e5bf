"""Training runs side by side: which settings differ, how far each run came, its figures, curves and samples.

    folders = find_runs(["first", "elsewhere/second"], pathlib.Path("cachedir"), tags=())
    runs = [read_run(name, folder) for name, folder in folders.items()]
    list_differences(runs)  # {"lr": {"first": "0.0003", "elsewhere/second": "0.001"}}

Everything is read from the files of the runs, which may be still training, or of a stranger.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

import checkpoint
from ebm.readers.bounded import make_printable, open_file, read_json, report_unreadable_file
from ebm.readers.decoding import convert_image, open_image
from ebm.readers.state_values import is_count, is_flags
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.support.experiments import MOST_LISTED, shorten
from ebm.support.logs import CONFIG_NAME, RunTimes, extract_series, measure_times, read_log
from ebm.support.progress import describe_time
from ebm.training.ownership import LOCK_NAME, is_locked
from ebm.training.records import (
    CLASSIFICATION_CURVES,
    CLASSIFIER_CURVES,
    CURVES,
    INCEPTION_CURVES,
    LOG_AXES,
    PATCH_CURVES,
    SHARE_AXES,
)
from ebm.training.resuming import CALL_SETTINGS

MAX_CONFIG = 1 << 20  # bytes
MAX_DEPTH = 4  # of folders in folders in which runs are looked for
MAX_TEXT = 40  # letters of a value in a table
MAX_PLOTTED = 1e100  # the size of values from which on no axis can show them
# Settings that say where or how a run is computed, not what it learns.
SECONDARY = CALL_SETTINGS | {"tag", "tune", "threads", "data_workers", "download", "datadir", "log_interval"}
SECONDARY |= {"inception_weights", "inception_sha256", "wandb", "trackio"}
# Entries of config.json besides the settings, each compared as if it were one.
CONFIG_ENTRIES = ("parameters", "workers", "energies", "torch")
# Figures of samples by their names in the log -> whether a larger one is better.
QUALITY = {
    "inception_score": True,
    "fid": False,
    "feature_distance": False,
    "patch_distance": False,
    "tone_distance": False,
}
ALL_CURVES = CURVES | INCEPTION_CURVES | CLASSIFIER_CURVES | PATCH_CURVES | CLASSIFICATION_CURVES


class LoggedRun(NamedTuple):
    """A training run as its folder describes it."""

    name: str
    folder: pathlib.Path
    config: Mapping[str, Any]  # what config.json holds
    entries: list[dict[str, Any]]  # of the log
    times: RunTimes
    newest: int  # the iteration of the newest checkpoint, 0 if there is none

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name; those that did not exist when the run began had their defaults."""
        settings = cli.to_dict(TrainSettings()) | dict(self.config["flags"])
        network = self.config.get("network")
        width = network.get("num_filters") if isinstance(network, dict) else None
        return settings | {"num_filters": settings["num_filters"] or width}

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the run."""
        tags = self.config["flags"].get("tag") or ()
        return tuple(map(str, tags)) if isinstance(tags, list | tuple) else (str(tags),)

    @property
    def iteration(self) -> int:
        """The last iteration that the run has logged or saved."""
        return max([self.newest, *(entry["iteration"] for entry in self.entries[-1:])])

    @property
    def last_iteration(self) -> int | None:
        """The iteration at which the run is to end; None if its files do not tell."""
        last = self.config.get("last_iteration", self.settings["max_iter"])
        return last if is_count(last) else None


# ---- finding runs ----


def is_run(folder: pathlib.Path) -> bool:
    """Return whether a folder is that of a training run."""
    return (folder / CONFIG_NAME).is_file()


def walk_runs(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the folders of all runs below a folder, in the order of their names, down to MAX_DEPTH.

    What lies in a run's folder, such as abandoned_1, is a part of it. A folder to which several links lead counts once.
    """
    seen, left = {root.resolve()}, [root]
    while left:
        folder = left.pop(0)
        if folder != root and is_run(folder):
            yield folder
        elif len(folder.relative_to(root).parts) < MAX_DEPTH:
            with contextlib.suppress(OSError):  # a folder that is missing or closed to this user has no runs to show
                inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
                new = [path for path in inner if path.resolve() not in seen]
                seen.update(path.resolve() for path in new)
                left = [*new, *left]


def find_runs(words: Sequence[str], logdir: pathlib.Path, tags: Sequence[str]) -> dict[str, pathlib.Path]:
    """Return the folders of runs by name: of each word, which is a folder or an experiment, and of those with the tags.

    logdir: the folder of all experiments. A run in it is called by its name there. tags: if there are any, all runs
    below `logdir` that have all of them. Raises UsageError for a word that is no run, and if nothing has the tags.
    """
    folders = [locate_run(word, logdir) for word in words]
    if tags:
        folders += find_tagged_runs(logdir, tags)
    if not folders:
        raise UsageError(
            "give the runs to compare, folders or names of experiments, or a `tag`" + list_some_runs(logdir)
        )
    names: dict[str, pathlib.Path] = {}
    unique: dict[pathlib.Path, pathlib.Path] = {}
    for folder in folders:
        unique.setdefault(folder.resolve(), folder)
    for folder in unique.values():
        place, root = pathlib.Path(os.path.abspath(folder)), os.path.abspath(logdir)
        inside = str(place.relative_to(root)) if place.is_relative_to(root) else "."
        name = make_printable(str(folder) if inside == "." else inside)
        names[str(place) if name in names or name == "." else name] = folder
    return names


def locate_run(word: str, logdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of the run that a word means; raise UsageError if there is none."""
    folders = [pathlib.Path(word), logdir / word]
    found = next(filter(is_run, folders), None)
    if found is None:
        folder = next(filter(pathlib.Path.is_dir, folders), None)
        if folder is None:
            what = f"there is no run {make_printable(shorten(word))}" + list_some_runs(logdir)
        else:
            what = f"{make_printable(str(folder))} is no training run, it has no {CONFIG_NAME}" + list_some_runs(folder)
        raise UsageError(what)
    return found


def list_some_runs(root: pathlib.Path) -> str:
    """Return the end of a message that names some of the runs below a folder; empty if there are none."""
    names = [make_printable(shorten(str(folder.relative_to(root)))) for folder in walk_runs(root)]
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"; {root} has {', '.join(names[:MOST_LISTED])}{more}" if names else ""


def find_tagged_runs(logdir: pathlib.Path, tags: Sequence[str]) -> list[pathlib.Path]:
    """Return the folders of the runs below a folder that have all of the tags; raise UsageError if none has.

    A run whose settings cannot be read is left out, with a note.
    """
    found, seen = list[pathlib.Path](), set[str]()
    for folder in walk_runs(logdir):
        try:
            own = LoggedRun("", folder, read_run_config(folder), [], RunTimes(), 0).tags
        except UsageError as error:
            print(f"note: {error}; it is left out")
            continue
        seen.update(own)
        found += [folder] if set(tags) <= set(own) else []
    if not found:
        known = f"; its runs have {', '.join(sorted(map(make_printable, seen))[:MOST_LISTED])}" if seen else ""
        raise UsageError(f"`tag`={','.join(tags)}: no run in {logdir} has it{known}")
    return found


# ---- reading runs ----


def read_run_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return what the config.json of a run holds; raise UsageError if it is damaged."""
    path = folder / CONFIG_NAME
    with report_unreadable_file(path):
        config = read_json(path, MAX_CONFIG)
        if not isinstance(config, dict) or not is_flags(config.get("flags")):
            raise ValueError("it holds no settings")
        return config


def read_run(name: str, folder: pathlib.Path) -> LoggedRun:
    """Return a run with its log; raise UsageError if its settings cannot be read."""
    config, newest = read_run_config(folder), max(checkpoint.list_iterations(folder), default=0)
    return LoggedRun(name, folder, config, read_log(folder), measure_times(folder), newest)


def find_state(run: LoggedRun) -> str:
    """Return whether a run is finished, running or stopped, in this word."""
    lock = run.folder / LOCK_NAME
    with contextlib.suppress(OSError):  # the lock of another user
        if lock.is_file() and is_locked(lock):
            return "running"
    last = run.last_iteration
    has_report = (run.folder / f"samples_{run.iteration}.png").exists()
    return "finished" if (has_report if last is None else run.iteration >= last) else "stopped"


def find_samples(folder: pathlib.Path) -> tuple[pathlib.Path, int] | None:
    """Return the newest picture of a run's samples and its iteration; None if there is none yet.

    It is that of the end of the run, or else of a test.
    """
    for pattern in ("samples_*.png", "pictures/val_gen_*.png"):
        matches = ((path, re.fullmatch(r"\D+_([0-9]{1,18})", path.stem)) for path in folder.glob(pattern))
        numbered = [(int(match[1]), path) for path, match in matches if match]
        if numbered:
            iteration, path = max(numbered)
            return path, iteration
    return None


def read_samples(runs: Sequence[LoggedRun]) -> dict[str, Image.Image]:
    """Return the newest pictures of the runs' samples by title; one that cannot be read is left out, with a note."""
    found = {}
    for run in runs:
        if newest := find_samples(run.folder):
            path, iteration = newest
            try:
                with report_unreadable_file(path), open_file(path) as file, open_image(file) as image:
                    found[f"{run.name}: iteration {iteration}"] = convert_image(image, "RGB")
            except UsageError as error:
                print(f"note: {error}; the picture lacks these samples")
    return found


# ---- comparing runs ----


def list_differences(runs: Sequence[LoggedRun]) -> dict[str, dict[str, str]]:
    """Return the settings in which runs differ: name -> {name of a run: value}.

    Settings that say where or how a run is computed are among them only if nothing else differs.
    """
    values = {run.name: run.settings | {name: run.config.get(name) for name in CONFIG_ENTRIES} for run in runs}
    names = dict.fromkeys(name for of_run in values.values() for name in of_run)
    table = {name: {run: describe_value(of_run.get(name)) for run, of_run in values.items()} for name in names}
    differing = {name: row for name, row in table.items() if len(set(row.values())) > 1}
    primary = {name: row for name, row in differing.items() if name not in SECONDARY | {"torch"}}
    return {make_printable(name[:MAX_TEXT]): row for name, row in (primary or differing).items()}


def describe_value(value: Any) -> str:
    """Return the value of a setting for a table."""
    return "–" if value in (None, "", (), []) else make_printable(cli.write_value(value)[:MAX_TEXT])


def find_best(run: LoggedRun, name: str, *, is_larger_better: bool) -> tuple[float, int] | None:
    """Return the best value of a figure in a run's log, and its iteration; None if it was not measured."""
    iterations, values = extract_series(run.entries, name)
    pairs = [(value, place) for place, value in zip(iterations, values, strict=True) if math.isfinite(value)]
    return (max if is_larger_better else min)(pairs, key=lambda pair: pair[0], default=None)


def find_last(run: LoggedRun, name: str) -> float | None:
    """Return the last finite value of a figure in a run's log; None if there is none."""
    return next((value for value in reversed(extract_series(run.entries, name)[1]) if math.isfinite(value)), None)


def summarise_run(run: LoggedRun) -> dict[str, Any]:
    """Return how far a run came and its figures, as plain values by name, for a report."""
    best = {name: find_best(run, name, is_larger_better=larger) for name, larger in QUALITY.items()}
    return {
        "folder": str(run.folder),
        "tag": list(run.tags),
        "state": find_state(run),
        "iteration": run.iteration,
        "last_iteration": run.last_iteration,
        "e_diff": find_last(run, "e_diff"),
        "best": {name: {"value": found[0], "iteration": found[1]} for name, found in best.items() if found},
        "test_accuracy": find_last(run, "test_accuracy"),
        "seconds": run.times.total,
        "seconds_per_iteration": run.times.per_iteration,
        "settings": run.settings,
    }


def describe_summaries(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return a table of what `summarise_run` says about each run, without the columns that are empty."""
    rows = {}
    for name, about in summaries.items():
        last = "" if about["last_iteration"] is None else f" of {about['last_iteration']}"
        seconds, each = about["seconds"], about["seconds_per_iteration"]
        row = {"state": about["state"], "iteration": f"{about['iteration']}{last}", "e_diff": about["e_diff"]}
        row |= {figure: about["best"].get(figure) for figure in QUALITY}
        row |= {"test_accuracy": about["test_accuracy"]}
        row |= {"time": seconds and describe_time(seconds), "iteration takes": each and describe_time(each)}
        rows[name] = {column: describe_figure(value) for column, value in row.items()}
        rows[name] |= {"tag": make_printable(",".join(about["tag"])) or "–"}
    empty = {column for column in next(iter(rows.values())) if {row[column] for row in rows.values()} == {"–"}}
    return {name: {column: row[column] for column in row if column not in empty} for name, row in rows.items()}


def describe_figure(value: Any) -> str:
    """Return a figure, a text, or the best value of a figure with its iteration, for a table."""
    if isinstance(value, Mapping):
        return f"{value['value']:.4g} at {value['iteration']}"
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class Panels(NamedTuple):
    """Curves of several runs: y label -> {name of a run: (iterations, values)}, and the labels of special axes."""

    curves: dict[str, dict[str, tuple[list[int], list[float]]]]
    log: list[str]
    shares: list[str]


def extract_curve(run: LoggedRun, name: str) -> tuple[list[int], list[float]]:
    """Return the iterations and values of a figure in a run's log, without those that no axis can show."""
    pairs = [
        (place, value)
        for place, value in zip(*extract_series(run.entries, name), strict=True)
        if abs(value) < MAX_PLOTTED
    ]
    return [place for place, _ in pairs], [value for _, value in pairs]


def gather_curves(runs: Sequence[LoggedRun]) -> Panels:
    """Return a panel with the curves of all runs for each figure that some run has logged."""
    panels = Panels({}, [], [])
    for group, lines in ALL_CURVES.items():
        for title, name in lines.items():
            curves = {run.name: extract_curve(run, name) for run in runs}
            if not any(values for _, values in curves.values()):
                continue
            label = title if group in title else group if len(lines) == 1 else f"{group}\n{title}"
            panels.curves[label] = curves
            panels.log.extend([label] * (group in LOG_AXES))
            panels.shares.extend([label] * (group in SHARE_AXES))
    return panels

"""Experiments: each has a name, and a folder below the folder of all experiments.

The models that come with this project have a folder of their own, `SHIPPED`, to which no script writes. A model is
found by the name of its experiment: first among the user's experiments, then among the shipped ones.
"""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Sequence

from ebm.support.errors import UsageError

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "pretrained"
MAX_BYTES = 200  # of a name; file systems take 255, and an earlier run that is set aside gets a longer name
MOST_LISTED = 8  # names of experiments in a message
TAG = re.compile(r"[\w.+-]{1,64}")  # what every tracker of experiments takes, too


def count_bytes(name: str) -> int:
    """Return the length of a name on the disk."""
    return len(name.encode("utf-8", "surrogatepass"))


def find_problem(exp: str) -> str:
    """Return a clause that says why this cannot be the name of an experiment, or "" if it can."""
    parts = pathlib.PurePosixPath(exp).parts
    if not exp.strip():
        return "is empty"
    if not parts:
        return "is the folder of all experiments"
    if parts[0] == "/":
        return "is an absolute path"
    if ".." in parts:
        return "leads out of the folder of all experiments"
    if parts[0].startswith("~"):
        return "begins with ~"
    if any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in exp):
        return "has control characters"
    if any(count_bytes(part) > MAX_BYTES for part in parts) or count_bytes(exp) > 5 * MAX_BYTES:
        return f"is longer than {MAX_BYTES} bytes"
    return ""


def check_tags(tags: Sequence[str], setting: str = "tag") -> None:
    """Raise UsageError, which names the setting, if one of these words cannot be the tag of a run."""
    for tag in tags:
        if not TAG.fullmatch(tag):
            raise UsageError(
                f"`{setting}`={shorten(tag)!r} is no word; give letters, digits, -, _, . and +, at most 64 in all"
            )


def find_experiment(root: str | pathlib.Path, exp: str, setting: str = "exp") -> pathlib.Path:
    """Return the folder of an experiment. root: the folder of all experiments.

    A name such as study/first is that of a folder in a folder. Raises UsageError, which names the setting, for a name
    that leads anywhere else: to the root itself, out of it, or to a place that depends on the user.
    """
    if problem := find_problem(exp):
        raise UsageError(
            f"`{setting}`={shorten(exp)!r} {problem}; give an experiment a name such as digits or study/digits"
        )
    return pathlib.Path(root) / exp


def find_output_folder(root: str | pathlib.Path, exp: str, setting: str = "logdir") -> pathlib.Path:
    """Return the folder of an experiment for a script that writes to it; see `find_experiment`.

    Raises UsageError if this is a place among the shipped models. setting: the name of the setting that chose the root.
    """
    folder = find_experiment(root, exp)
    if is_shipped(folder):
        raise UsageError(
            f"`{setting}`={root}: {folder} is kept for the shipped models, and nothing is written there; choose "
            "another folder"
        )
    return folder


def is_shipped(path: str | pathlib.Path) -> bool:
    """Return whether a path is the folder of the shipped models or leads into it."""
    return pathlib.Path(path).resolve().is_relative_to(SHIPPED)


def get_shipped_root() -> pathlib.Path:
    """Return the folder of the shipped models, relative to the working directory if it is inside that."""
    here = pathlib.Path.cwd().resolve()
    return SHIPPED.relative_to(here) if SHIPPED.is_relative_to(here) else SHIPPED


def has_checkpoints(folder: pathlib.Path) -> bool:
    """Return whether a folder holds a checkpoint, of this project or of TensorFlow."""
    return any(path.suffix in (".pt", ".index") for path in folder.glob("model_*"))


def find_model_folder(exp: str, roots: Sequence[str], setting: str = "exp") -> pathlib.Path:
    """Return the folder of an experiment's checkpoints: the first below one of `roots`, else that of a shipped model.

    roots: folders of experiments. setting: the name of the setting that chose the experiment. A note says so if a
    shipped model of this name is passed over, or stands in for a folder that has no checkpoint yet. Raises UsageError,
    which lists the existing experiments, if none has checkpoints.
    """
    folders = [find_experiment(root, exp, setting) for root in roots]
    shipped = get_shipped_root() / exp
    folder = next(filter(has_checkpoints, [*folders, shipped]), None)
    if folder is None:
        raise report_missing_experiment(exp, [*roots, get_shipped_root()], setting)
    if folder != shipped and has_checkpoints(shipped) and not folder.samefile(shipped):
        print(f"note: the model is that of {folder}; modeldir={shipped.parent} takes the shipped one of the same name")
    elif folder not in folders and (empty := next(filter(pathlib.Path.is_dir, folders), None)):
        print(f"note: {empty} holds no checkpoint; the model is the shipped one of the same name, {shipped}")
    return folder


def report_missing_experiment(exp: str, roots: Sequence[str | pathlib.Path], setting: str = "exp") -> UsageError:
    """Return the error about an experiment without checkpoints; it lists those below `roots`, similar names first."""
    folders = [pathlib.Path(root, exp) for root in roots if not is_shipped(root)] or [get_shipped_root() / exp]
    what = "no checkpoint in" if any(map(pathlib.Path.is_dir, folders)) else "no experiment folder"
    message = f"{what} {' or '.join(map(str, folders))}"
    lists = [f"{root} has {names}" for root in roots if (names := describe_experiments(pathlib.Path(root), exp))]
    if not lists:
        return UsageError(f"{message}; train a model first, or check `{setting}` and `modeldir`")
    return UsageError(f"{message}; {'; '.join(lists)}: choose with `modeldir` and `{setting}`")


def describe_experiments(root: pathlib.Path, exp: str) -> str:
    """Return the names of the experiments below a folder as a text of bounded length, those similar to `exp` first."""
    names = list_experiments(root)
    similar = difflib.get_close_matches(exp, names, MOST_LISTED, cutoff=0)
    more = f" and {len(names) - len(similar)} more" if len(names) > len(similar) else ""
    return ", ".join(map(shorten, similar)) + more


def list_experiments(root: pathlib.Path) -> list[str]:
    """Return the names of the experiments with checkpoints below a folder, such as digits or study/digits."""
    folders = [folder for folder in root.glob("*") if has_checkpoints(folder)]
    # What lies in an experiment's folder, such as abandoned_1, is a part of it.
    folders += [folder for folder in root.glob("*/*") if folder.parent not in folders and has_checkpoints(folder)]
    return sorted(str(folder.relative_to(root)) for folder in folders)


def shorten(name: str) -> str:
    """Return a name in a length that fits into a message."""
    return name if len(name) < 80 else f"{name[:60]}…"

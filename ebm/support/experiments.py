"""Experiments: each has a name, and a folder below the folder of all experiments."""

from __future__ import annotations

import pathlib

from ebm.support.errors import UsageError

MAX_BYTES = 200  # of a name; file systems take 255, and an earlier run that is set aside gets a longer name


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


def find_experiment(root: str | pathlib.Path, exp: str, setting: str = "exp") -> pathlib.Path:
    """Return the folder of an experiment. root: the folder of all experiments.

    A name such as study/first is that of a folder in a folder. Raises UsageError, which names the setting, for a name
    that leads anywhere else: to the root itself, out of it, or to a place that depends on the user.
    """
    if problem := find_problem(exp):
        shown = exp if len(exp) < 80 else f"{exp[:60]}…"
        raise UsageError(f"`{setting}`={shown!r} {problem}; give an experiment a name such as digits or study/digits")
    return pathlib.Path(root) / exp

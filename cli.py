"""The command line of every script: flags in groups, `--help` worth reading, mistakes answered in one line."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import pathlib
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from errors import UsageError

FLAGS = flags.FLAGS

# What flags that several scripts have mean to the library: dataset -> flag of its path, flag -> plain value.
PATHS = {
    "folder": "data_path",
    "dsprites": "dsprites_path",
    "imagenet": "imagenet_path",
    "imagenetfull": "imagenet_datadir",
}
CONDITIONS = {"cond_shape": "shape", "cond_size": "size", "cond_pos": "pos", "cond_rot": "rot"}
SUBSETS = {
    "dshape_only": "shape",
    "dpos_only": "pos",
    "dsize_only": "size",
    "drot_only": "rot",
    "dsprites_restrict": "restrict",
}
PRECISIONS = ["float32", "tf32", "fp16", "bf16"]
SIZES = {"large_model": "ResNet32Large", "larger_model": "ResNet32Larger", "wider_model": "ResNet32Wider"}

KINDS = {"int": "INT", "float": "FLOAT", "comma separated list of strings": "LIST"}  # as --help names them

_groups: dict[str, list[str]] = {}


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
    """List the flags defined inside under this title in `--help`, in the order they were defined."""
    before = set(FLAGS)
    yield
    _groups[title] = [name for name in FLAGS if name not in before]


def define_choices(name: str, default: Sequence[str], values: Sequence[str], words: str) -> None:
    """Define a flag that takes any of these values, several by commas."""
    flags.DEFINE_list(name, list(default), f"{words}: {', '.join(values)}")
    flags.register_validator(name, lambda given: set(given) <= set(values), f"takes any of {', '.join(values)}")


def help_text(usage: str) -> str:
    """Return the script's own words followed by its flags, a paragraph per group."""
    lines = [usage.strip()]
    for title, names in _groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            flag = FLAGS[name]
            values = " | ".join(getattr(flag.parser, "enum_values", [])) or KINDS.get(flag.flag_type(), "STRING")
            shown = f"--[no]{name}" if flag.boolean else f"--{name}={values}"
            words = (flag.help or "").split(">: ")[-1]  # absl puts the values of an enumeration before
            default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
            text = f"{shown:<26} {words} [{default}]"
            lines += textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent=" " * 29)
    return "\n".join(lines)


def values() -> dict[str, object]:
    """Return the values of all flags of the script, plain and in order."""
    return {name: FLAGS[name].value for names in _groups.values() for name in names}


def write_rows(output: str, rows: list[dict[str, Any]], **settings: object) -> pathlib.Path:
    """Write a benchmark's rows to a JSON file, with these settings and all flags; return its path."""
    path = pathlib.Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings | values(), "rows": rows}, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--output={output}: cannot be written ({error.strerror}); choose another file") from None
    return path


def table(figures: Mapping[str, Any], published: Mapping[str, str] | None = None) -> str:
    """Return figures by name as text; rows of figures, which are mappings, as tables, headed where columns change.

    published: the paper's figures under the same names, which stand beside.
    """

    def cell(value: object) -> str:
        return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    width = max(map(len, figures)) + 2
    lines: list[str] = []
    columns: dict[str, int] = {}
    for name, value in figures.items():
        line = f"{name:<{width}}"
        if isinstance(value, Mapping):
            if list(value) != list(columns):
                columns = {column: max(len(column), 8) + 2 for column in value}
                lines.append(" " * width + "".join(f"{column:>{size}}" for column, size in columns.items()))
            line += "".join(f"{cell(value[column]):>{size}}" for column, size in columns.items())
        else:
            line += cell(value)
        lines.append(line + (f"   paper: {published[name]}" if published and name in published else ""))
    return "\n".join(lines)


def with_dashes(words: Sequence[str]) -> list[str]:
    """Return the words with `step_lr=10.0` read as `--step_lr=10.0`, as the published commands mean it.

    Raises UsageError for a word that is no flag at all.
    """
    result = []
    for word in words:
        name = word.split("=")[0]
        if word.startswith("-"):
            result.append(word)
        elif "=" in word and name in FLAGS:
            print(f"note: {word} has no dashes; it is read as --{word}")
            result.append(f"--{word}")
        else:
            near = difflib.get_close_matches(name, list(FLAGS), 1)
            raise UsageError(f"unexpected word {word!r}" + (f", did you mean --{near[0]}?" if near else "; see --help"))
    return result


def parse(argv: Sequence[str], usage: str, presets: Mapping[str, str] | None = None) -> None:
    """Parse the command line into FLAGS; print the help and leave where it is asked for.

    presets: --preset's value -> flags that stand before those of the command line, which win.

    Raises UsageError, in one line, for an unknown flag, a stray word or a value out of its range.
    """
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & set(argv):
        print(help_text(usage))
        sys.exit(0)
    try:
        words = with_dashes(argv[1:])
        FLAGS([argv[0], *words])
        if presets and FLAGS.preset:
            FLAGS([argv[0], *shlex.split(presets[FLAGS.preset]), *words])
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(FLAGS), 1)
        remedy = f"did you mean --{near[0]}?" if near else "see --help"
        raise UsageError(f"unknown flag --{error.flagname}; {remedy}") from None
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from None


def run(main: Callable[[], None], usage: str, presets: Mapping[str, str] | None = None) -> None:
    """Run a script: parse its flags, call `main`, answer a user's mistake with one line and exit status 2."""
    try:
        parse(sys.argv, usage, presets)
        main()
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who reads has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print goes nowhere
        sys.exit(128 + signal.SIGPIPE)

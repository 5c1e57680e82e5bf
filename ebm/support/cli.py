"""The command line of all scripts: each field of a settings dataclass is a flag, a mistake gets a one-line message.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        \"\"\"Benchmark\"\"\"                                                         # a heading of --help

        rounds: int = flag(3, "timings per variant; the best counts", at_least=1)

    def main(settings: Settings) -> None: ...

    cli.run(main, Settings, __doc__)

Groups of settings that several scripts share are base classes. Code that receives settings knows nothing of flags: its
error messages name a setting in backquotes, such as `rounds`, and this module turns the name into --rounds.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import re
import shlex
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import flags

from ebm.support.errors import UsageError
from ebm.support.launch import let_rank_0_speak
from ebm.support.streams import note_dropped_output, replace_standard_streams

Settings = TypeVar("Settings")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}


class Flag(NamedTuple):
    """The properties of a flag besides its name, type and default."""

    words: str  # the help text: what the setting is, in which unit
    at_least: float | None
    at_most: float | None
    choices: tuple[str, ...]
    alias: str | None  # another name of the same flag
    repeated: bool  # the flag of a list is repeated for each item, instead of given once with commas
    presets: Mapping[str, str]  # value -> the flags that it stands for; flags on the command line override them
    inert: bool  # the flag has no effect, and a note says so if it is given


def flag(
    default: Any,
    words: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] = (),
    alias: str | None = None,
    repeated: bool = False,
    presets: Mapping[str, str] = types.MappingProxyType({}),
    inert: bool = False,
) -> Any:
    """Return a dataclass field that defines a flag, with its default, help text, and range or choices.

    The type of the field is bool, int, float or str, `| None` of one of these, or a tuple of one of these.
    For the other arguments see `Flag`.
    """
    choices = tuple(choices) or tuple(presets)
    about = Flag(words, at_least, at_most, choices, alias, repeated, presets, inert)
    return dataclasses.field(default=default, metadata={"flag": about})


def list_groups(kind: type) -> dict[str, list[dataclasses.Field]]:
    """Return the fields of a settings class, grouped by heading.

    The heading is the first docstring line of the class that defines the field.
    """
    groups: dict[str, list[dataclasses.Field]] = {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for owner in kind.__mro__:
        members = [fields.pop(name) for name in vars(owner).get("__annotations__", {}) if name in fields]
        if members:
            groups.setdefault((owner.__doc__ or "").split("\n")[0].rstrip("."), []).extend(members)
    return groups


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the names and values of all settings, in the order of --help."""
    groups = list_groups(type(settings)).values()
    return {field.name: getattr(settings, field.name) for fields in groups for field in fields}


def describe_tasks(usage: str | None, tasks: Mapping[str, Callable]) -> str:
    """Return a script's usage text, followed by a list of its tasks with the first docstring line of each."""
    width = max(map(len, tasks)) + 2
    lines = [(usage or "").strip(), "", "Tasks:"]
    for name, task in tasks.items():
        words = (task.__doc__ or "").splitlines()[0]
        lines += textwrap.wrap(words, 118, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (2 + width))
    return "\n".join(lines)


# ---- from settings to flags ----


def split_type(hint: Any) -> tuple[type, bool]:
    """Return the plain type in a type hint, and whether the hint is a tuple: `int | None` gives (int, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    is_list = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if is_list else hint), is_list


def define_flags(kind: type) -> flags.FlagValues:
    """Return absl flags for all fields of a settings class."""
    values, hints = flags.FlagValues(), typing.get_type_hints(kind)
    for fields in list_groups(kind).values():
        for field in fields:
            define_flag(values, field, hints[field.name])
    return values


def define_flag(values: flags.FlagValues, field: dataclasses.Field, hint: Any) -> None:
    """Add the absl flag of one field to `values`. hint: the type of the field."""
    (plain, is_list), about = split_type(hint), field.metadata["flag"]
    default: Any = field.default
    options: dict[str, Any] = {"flag_values": values}
    define: Callable[..., object] = flags.DEFINE_string
    if is_list:
        define, default = flags.DEFINE_multi_string if about.repeated else flags.DEFINE_list, list(map(str, default))
    elif about.choices:
        define, options["enum_values"] = flags.DEFINE_enum, list(about.choices)
    elif plain is bool:
        define = flags.DEFINE_bool
    elif plain in (int, float):
        define = flags.DEFINE_integer if plain is int else flags.DEFINE_float
        options |= {"lower_bound": about.at_least, "upper_bound": about.at_most}
    define(field.name, default, help=about.words, **options)
    if about.alias:
        flags.DEFINE_alias(about.alias, field.name, flag_values=values)


def read_settings(kind: type[Settings], values: flags.FlagValues) -> Settings:
    """Return the settings with the values of the parsed flags; print a note for each flag without effect."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for fields in list_groups(kind).values():
        for field in fields:
            plain, is_list = split_type(hints[field.name])
            about, value = field.metadata["flag"], values[field.name].value
            arguments[field.name] = read_list(field.name, value or (), plain, about) if is_list else value
            if about.inert and values[field.name].present:
                print(f"note: --{field.name} has no effect: {about.words}")
    return kind(**arguments)


def read_list(name: str, words: Sequence[str], plain: type, about: Flag) -> tuple[Any, ...]:
    """Return the items of a list setting, converted to the type `plain`.

    Raises UsageError if an item has another type, is out of range or is not among the choices.
    """
    wanted = f"any of {', '.join(about.choices)}" if about.choices else "whole numbers" if plain is int else "values"
    if about.at_least is not None:
        wanted += f", at least {about.at_least:g}"
    try:
        items = tuple(plain(word.strip()) for word in words)
    except ValueError:
        items = ()
    fits = len(items) == len(words) and not (about.choices and set(items) - set(about.choices))
    if not fits or any(about.at_least is not None and item < about.at_least for item in items):
        raise UsageError(f"--{name}={','.join(words)}: give {wanted}, commas between")
    return items


def describe_flags(kind: type, usage: str) -> str:
    """Return the text of --help: the script's usage, then its flags in a paragraph per group."""
    lines, hints = [name_flags(usage.strip(), kind)], typing.get_type_hints(kind)
    for title, fields in list_groups(kind).items():
        lines += ["", f"{title}:"]
        for field in fields:
            (plain, is_list), about, default = split_type(hints[field.name]), field.metadata["flag"], field.default
            choices = (", " if is_list else " | ").join(about.choices)
            values = choices or ("LIST" if is_list else {int: "INT", float: "FLOAT"}.get(plain, "STRING"))
            shown = f"--[no]{field.name}" if plain is bool else f"--{field.name}={values}"
            text = ",".join(map(str, default)) if isinstance(default, tuple) else default
            words = f"{'no effect: ' if about.inert else ''}{about.words}" + (
                f" [{text}]" if text not in (None, "") else ""
            )
            if len(shown) > 26:  # a long list of choices gets lines of its own
                lines += textwrap.wrap(shown, 118, initial_indent="  ", subsequent_indent=" " * 6)
                shown = ""
            lines += textwrap.wrap(words, 118, initial_indent=f"  {shown:<26} ", subsequent_indent=" " * 29)
    return "\n".join(lines)


# ---- parsing ----


def add_dashes(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the command line with the missing dashes added: `step_lr=10.0` becomes `--step_lr=10.0`.

    Some published commands lack the dashes. Raises UsageError for a word that is no flag.
    """
    result = []
    for word in words:
        name = word.split("=")[0]
        if word.startswith("-"):
            result.append(word)
        elif "=" in word and name in names:
            print(f"note: {word} has no dashes; it is read as --{word}")
            result.append(f"--{word}")
        else:
            similar = difflib.get_close_matches(name, names, 1)
            remedy = f", did you mean --{similar[0]}?" if similar else "; see --help"
            raise UsageError(f"unexpected word {word!r}{remedy}")
    return result


def parse(argv: Sequence[str], kind: type[Settings], usage: str = "") -> Settings:
    """Return the settings that a command line sets; for --help print the help text and exit.

    Raises UsageError with a one-line message for an unknown flag, a stray word or a value out of range.
    """
    if HELP & set(argv):
        print(describe_flags(kind, usage))
        sys.exit(0)
    values = define_flags(kind)
    try:
        words = add_dashes(argv[1:], list(values))
        values([argv[0], *words])
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            presets = field.metadata["flag"].presets
            if presets and values[field.name].value in presets:
                expanded, values = shlex.split(presets[values[field.name].value]), define_flags(kind)
                values([argv[0], *expanded, *words])
    except flags.UnrecognizedFlagError as error:
        similar = difflib.get_close_matches(error.flagname, list(values), 1)
        remedy = f"did you mean --{similar[0]}?" if similar else "see --help"
        raise UsageError(f"unknown flag --{error.flagname}; {remedy}") from None
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from None
    return read_settings(kind, values)


def name_flags(message: str, kind: type) -> str:
    """Return the message with each setting in backquotes written as a flag: `lr`=3 becomes --lr=3."""
    names = {field.name for field in dataclasses.fields(kind)}
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in names else match[0], message)


def run(main: Callable[[Settings], None], kind: type[Settings], usage: str | None) -> None:
    """Run a script: parse its flags and call `main` with the settings.

    A UsageError or a full disk is printed in one line, and the exit status is then 2. usage: the script's docstring,
    which --help prints first.
    """
    files = replace_standard_streams()
    try:
        main(parse(sys.argv, kind, usage or ""))
        note_dropped_output(files)
    except UsageError as error:
        let_rank_0_speak()
        print(f"error: {name_flags(str(error), kind)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the pipe has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard the rest of the output
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        place = f" for {error.filename}" if error.filename else ""
        print(f"error: no room{place} ({error.strerror}); make room, then repeat the command", file=sys.stderr)
        sys.exit(2)

"""The command line of every script: each field of a settings dataclass is a flag, mistakes are answered in one line.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        \"\"\"Benchmark\"\"\"                                                         # a heading of --help

        rounds: int = flag(3, "timings per variant; the best counts", at_least=1)

    def main(settings: Settings) -> None: ...

    cli.run(main, Settings, __doc__)

Groups of settings that several scripts share are base classes. Whoever receives settings knows nothing of flags:
messages name a setting in backquotes, `rounds`, which becomes --rounds here.
"""

from __future__ import annotations

import dataclasses
import difflib
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

from errors import UsageError

Settings = TypeVar("Settings")
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}


class Flag(NamedTuple):
    """What the command line has to know of a setting besides its name, type and default."""

    words: str  # of --help: what it is, in which unit
    at_least: float | None
    at_most: float | None
    choices: tuple[str, ...]
    alias: str | None  # another name of the same flag
    repeated: bool  # a list whose flag is given once for each item, not once with commas
    presets: Mapping[str, str]  # other flags that each value stands for; flags that are given themselves win
    inert: bool  # has no effect; whoever gives it is told


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
    """Return a dataclass field that is a flag: its default, what --help says of it, its range or its values.

    The field's type is bool, int, float or str, one of these or None, or a tuple of them.
    """
    choices = tuple(choices) or tuple(presets)
    about = Flag(words, at_least, at_most, choices, alias, repeated, presets, inert)
    return dataclasses.field(default=default, metadata={"flag": about})


def list_groups(kind: type) -> dict[str, list[dataclasses.Field]]:
    """Return the settings of a class by heading, the first line of the docstring of the class that defines them."""
    groups: dict[str, list[dataclasses.Field]] = {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for owner in kind.__mro__:
        own = [fields.pop(name) for name in vars(owner).get("__annotations__", {}) if name in fields]
        if own:
            groups.setdefault((owner.__doc__ or "").split("\n")[0].rstrip("."), []).extend(own)
    return groups


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the values of all settings by name, in the order of --help."""
    groups = list_groups(type(settings)).values()
    return {field.name: getattr(settings, field.name) for fields in groups for field in fields}


def describe_tasks(usage: str | None, tasks: Mapping[str, Callable]) -> str:
    """Return a script's usage followed by its tasks, each with the first line of its docstring."""
    width = max(map(len, tasks)) + 2
    lines = [(usage or "").strip(), "", "Tasks:"]
    for name, task in tasks.items():
        words = (task.__doc__ or "").splitlines()[0]
        lines += textwrap.wrap(words, 118, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (2 + width))
    return "\n".join(lines)


# ---- from settings to flags ----


def split_type(hint: Any) -> tuple[type, bool]:
    """Return the plain type of a setting, and whether it is a tuple of these: `int | None` is an int."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    is_list = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if is_list else hint), is_list


def define_flags(kind: type) -> flags.FlagValues:
    """Return a flag for each setting of a class."""
    values, hints = flags.FlagValues(), typing.get_type_hints(kind)
    for fields in list_groups(kind).values():
        for field in fields:
            define_flag(values, field, hints[field.name])
    return values


def define_flag(values: flags.FlagValues, field: dataclasses.Field, hint: Any) -> None:
    """Add the flag of one setting."""
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
    """Return the settings that parsed flags give; say which of those given have no effect."""
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for fields in list_groups(kind).values():
        for field in fields:
            plain, is_list = split_type(hints[field.name])
            about, value = field.metadata["flag"], values[field.name].value
            given[field.name] = read_list(field.name, value or (), plain, about) if is_list else value
            if about.inert and values[field.name].present:
                print(f"note: --{field.name} has no effect: {about.words}")
    return kind(**given)


def read_list(name: str, words: Sequence[str], plain: type, about: Flag) -> tuple[Any, ...]:
    """Return the items of a list; raise UsageError for one of another type, out of range or not among the choices."""
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
    """Return the script's own words followed by its flags, a paragraph per group."""
    lines, hints = [usage.strip()], typing.get_type_hints(kind)
    for title, fields in list_groups(kind).items():
        lines += ["", f"{title}:"]
        for field in fields:
            (plain, is_list), about, default = split_type(hints[field.name]), field.metadata["flag"], field.default
            choices = (", " if is_list else " | ").join(about.choices)
            values = choices or ("LIST" if is_list else {int: "INT", float: "FLOAT"}.get(plain, "STRING"))
            shown = f"--[no]{field.name}" if plain is bool else f"--{field.name}={values}"
            words = f"{about.words} [{','.join(map(str, default)) if isinstance(default, tuple) else default}]"
            if len(shown) > 26:  # values of which there are many stand on lines of their own
                lines += textwrap.wrap(shown, 118, initial_indent="  ", subsequent_indent=" " * 6)
                shown = ""
            lines += textwrap.wrap(words, 118, initial_indent=f"  {shown:<26} ", subsequent_indent=" " * 29)
    return "\n".join(lines)


# ---- parsing ----


def add_dashes(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the words with `step_lr=10.0` read as `--step_lr=10.0`, as the published commands mean it.

    Raises UsageError for a word that is no flag at all.
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
            near = difflib.get_close_matches(name, names, 1)
            raise UsageError(f"unexpected word {word!r}" + (f", did you mean --{near[0]}?" if near else "; see --help"))
    return result


def parse(argv: Sequence[str], kind: type[Settings], usage: str = "") -> Settings:
    """Return the settings that a command line gives; print the help and leave where it is asked for.

    Raises UsageError, in one line, for an unknown flag, a stray word or a value out of its range.
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
        near = difflib.get_close_matches(error.flagname, list(values), 1)
        remedy = f"did you mean --{near[0]}?" if near else "see --help"
        raise UsageError(f"unknown flag --{error.flagname}; {remedy}") from None
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from None
    return read_settings(kind, values)


def name_flags(message: str, kind: type) -> str:
    """Return a message with the settings that it names in backquotes as flags: `lr`=3 becomes --lr=3."""
    names = {field.name for field in dataclasses.fields(kind)}
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in names else match[0], message)


def run(main: Callable[[Settings], None], kind: type[Settings], usage: str | None) -> None:
    """Run a script: parse its flags, call `main`, answer a user's mistake with one line and exit status 2.

    usage: the script's docstring, which --help shows first.
    """
    try:
        main(parse(sys.argv, kind, usage or ""))
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {name_flags(str(error), kind)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who reads has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print goes nowhere
        sys.exit(128 + signal.SIGPIPE)

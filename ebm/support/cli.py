"""The command line of all scripts: each field of a settings dataclass is a flag, a mistake gets a one-line message.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        \"\"\"Benchmark\"\"\"                                                         # a heading of --help

        rounds: int = flag(3, "timings per variant; the best counts", at_least=1)

    def main(settings: Settings) -> None: ...

    cli.run(main, Settings, __doc__)

A flag on the command line that has no effect there gets a note. Groups of settings that several scripts share are base
classes. Code that receives settings knows nothing of flags: its error messages name a setting in backquotes, such as
`rounds`, and this module turns the name into --rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from absl import flags

from ebm.readers.bounded import make_printable
from ebm.support import interruption
from ebm.support.arguments import read_words
from ebm.support.errors import UsageError
from ebm.support.hardware import is_out_of_memory
from ebm.support.launch import is_first_worker, let_rank_0_speak
from ebm.support.streams import discard_output, note_dropped_output, replace_standard_streams

Settings = TypeVar("Settings")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
# What flags without other limits take. Products of two such numbers fit into float32, and 64 bits hold the integers.
LARGEST_FLOAT = 1e18
LARGEST_INT = 2**63 - 1
AUTO = -1  # the value of an integer that the script chooses itself, written as the word auto
# What Python says about a text that is no number, and what to say instead.
NO_NUMBER = {
    "invalid literal for int": "give a whole number, in digits",
    "could not convert string to float": "give a number such as 0.5",
}
SIZES_IN_MEMORY = ("batch_size", "num_filters", "num", "num_samples", "im_number", "limit")


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
    only_with: tuple[str, ...]  # conditions on other settings: the flag has no effect if none of them is met
    not_with: tuple[str, ...]  # conditions on other settings: the flag has no effect if one of them is met
    is_path: bool  # the text is the path of a file or folder
    can_be_empty: bool  # an empty text means something
    takes_auto: bool  # the word auto stands for AUTO
    takes_word: bool  # a word that stands alone, without the flag's name, is its value


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
    only_with: str | Sequence[str] = (),
    not_with: str | Sequence[str] = (),
    is_path: bool = False,
    can_be_empty: bool = False,
    takes_auto: bool = False,
    takes_word: bool = False,
) -> Any:
    """Return a dataclass field that defines a flag, with its default, help text, and range or choices.

    The type of the field is bool, int, float or str, `| None` of one of these, or a tuple of one of these. A condition
    is the name of a setting, "cutout", or one with the values that it may have, "dataset=folder|digits".
    For the other arguments see `Flag`.
    """
    choices = tuple(choices) or tuple(presets)
    only_with, not_with = ((each,) if isinstance(each, str) else tuple(each) for each in (only_with, not_with))
    about = Flag(
        words, at_least, at_most, choices, alias, repeated, presets, inert, only_with, not_with, is_path, can_be_empty,
        takes_auto, takes_word,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata={"flag": about})


@dataclasses.dataclass(frozen=True)
class IncompleteSettings:
    """Settings that a script's `main` completes itself, for example from a checkpoint.

    Only then can be judged which flags have no effect: `main` calls `note_flags_without_effect`.
    """

    # The names of the settings that the words of the command line set, without those that a preset sets.
    given_names: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)


def list_flags(kind: Any) -> dict[str, Flag]:
    """Return the properties of all flags by name. kind: a settings class, or settings."""
    return {field.name: field.metadata["flag"] for field in dataclasses.fields(kind) if "flag" in field.metadata}


def list_groups(kind: type) -> dict[str, list[dataclasses.Field]]:
    """Return the fields of a settings class, grouped by heading.

    The heading is the first docstring line of the class that defines the field.
    """
    groups: dict[str, list[dataclasses.Field]] = {}
    fields = {field.name: field for field in dataclasses.fields(kind) if "flag" in field.metadata}
    for owner in kind.__mro__:
        members = [fields.pop(name) for name in vars(owner).get("__annotations__", {}) if name in fields]
        if members:
            groups.setdefault((owner.__doc__ or "").split("\n")[0].rstrip("."), []).extend(members)
    return groups


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the names and values of all settings, in the order of --help."""
    groups = list_groups(type(settings)).values()
    return {field.name: getattr(settings, field.name) for fields in groups for field in fields}


def write_flags(settings: Any) -> str:
    """Return the flags, as a shell takes them, of all settings that are not at their defaults, in the order of --help.

    Settings that a chosen preset sets are written, too. A command with these flags has the same settings.
    """
    words, of_preset = list[str](), list_preset_names(settings)
    for fields in list_groups(type(settings)).values():
        for field in fields:
            value, about = getattr(settings, field.name), field.metadata["flag"]
            if value is None or (value == field.default and field.name not in of_preset):
                continue
            if isinstance(value, bool):
                words.append(f"--{field.name}" if value else f"--no{field.name}")
            elif about.repeated:
                words += [f"--{field.name}={item}" for item in value]
            else:
                text = "auto" if about.takes_auto and value == AUTO else write_value(value)
                words.append(f"--{field.name}={text}")
    return shlex.join(words)


def describe_tasks(usage: str | None, tasks: Mapping[str, Callable]) -> str:
    """Return a script's usage text, followed by a list of its tasks with the first docstring line of each."""
    width = max(map(len, tasks)) + 2
    lines = [(usage or "").strip(), "", "Tasks:"]
    for name, task in tasks.items():
        words = (task.__doc__ or "").partition("\n")[0]  # python -OO removes docstrings
        lines += textwrap.wrap(words, 118, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (2 + width))
    return "\n".join(lines)


# ---- from settings to flags ----

list_types = functools.cache(typing.get_type_hints)  # name of a setting -> its type; making it takes a while


def split_type(hint: Any) -> tuple[type, bool]:
    """Return the plain type in a type hint, and whether the hint is a tuple: `int | None` gives (int, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    is_list = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if is_list else hint), is_list


def define_flags(kind: type) -> flags.FlagValues:
    """Return absl flags for all fields of a settings class."""
    values, hints = flags.FlagValues(), list_types(kind)
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
        largest = LARGEST_INT if plain is int else LARGEST_FLOAT
        options["lower_bound"] = -largest if about.at_least is None else about.at_least
        options["upper_bound"] = largest if about.at_most is None else about.at_most
    define(field.name, default, help=about.words, **options)


def read_settings(kind: type[Settings], values: flags.FlagValues) -> Settings:
    """Return the settings with the values of the parsed flags."""
    hints = list_types(kind)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for fields in list_groups(kind).values():
        for field in fields:
            (plain, is_list), value = split_type(hints[field.name]), values[field.name].value
            about = field.metadata["flag"]
            if is_list:
                value = read_list(field.name, value or (), plain, about)
                check_text(field.name, ",".join(map(str, value)), can_be_empty=not field.default)
            elif isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{field.name}={value}: give a finite number")
            elif isinstance(value, str) and value != field.default:
                check_text(field.name, value, can_be_empty=about.can_be_empty)
                value = expand_path(f"--{field.name}", value) if about.is_path else value
            arguments[field.name] = value
    return kind(**arguments)


def check_text(name: str, text: str, *, can_be_empty: bool) -> None:
    """Raise UsageError if the value of a flag is empty although that means nothing."""
    if not text.strip() and not can_be_empty:
        raise UsageError(f"--{name} is empty; give it a value or leave it out")


def expand_path(name: str, text: str) -> str:
    """Return a path with the home folder of `~` or `~user` written out.

    Raises UsageError if there is no such user, or if the text has a variable that the shell would have replaced but for
    quotes. name: of the flag or argument.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UsageError(f"{name}={text}: no home folder is known for {text.split('/')[0]}; write the path in full")
    if os.path.expandvars(text) != text:
        raise UsageError(f"{name}={text}: quotes kept the shell from replacing the variable; write the path in full")
    return path


def read_list(name: str, words: Sequence[str], plain: type, about: Flag) -> tuple[Any, ...]:
    """Return the items of a list setting, converted to the type `plain`, paths with the home folder written out.

    Raises UsageError if an item has another type, is empty, out of range or not among the choices.
    """
    wanted = f"any of {', '.join(about.choices)}" if about.choices else "whole numbers" if plain is int else "values"
    least, most = about.at_least, about.at_most
    if least is not None:
        wanted += f", at least {least:g}" + (f", at most {most:g}" if most is not None else "")
    try:
        items = tuple(plain(word.strip()) for word in words)
    except ValueError:
        items = ()
    fits = len(items) == len(words) and not (about.choices and set(items) - set(about.choices)) and "" not in items
    if not fits or any(least is not None and not least <= item <= (most or LARGEST_INT) for item in items):
        raise UsageError(f"--{name}={','.join(words)}: give {wanted}, commas between")
    return tuple(expand_path(f"--{name}", item) for item in items) if about.is_path else items


# ---- flags without effect ----


def note_repetitions(pairs: Sequence[tuple[str, str]], kind: type) -> None:
    """Print a note for each flag that is given again with another value, of which the last one counts."""
    repeated = {name for name, about in list_flags(kind).items() if about.repeated}
    last = dict(pairs)
    for name, value in dict.fromkeys(pairs):
        if value != last[name] and name not in repeated:
            print(f"note: --{name}={value} has no effect: --{name}={last[name]} comes after it")


def note_flags_without_effect(settings: Any, given: Collection[str]) -> None:
    """Print a note for each flag of the command line that has no effect beside the other settings."""
    for name in list_flags(settings):
        if name in given and (obstacle := find_obstacle(settings, name)):
            print(f"note: --{name} has no effect{obstacle}")


def find_obstacle(settings: Any, name: str) -> str:
    """Return a phrase that says why a flag has no effect beside the other settings; empty if it has one.

    A flag that needs another one has no effect where the other one has none.
    """
    fields = list_flags(settings)
    about = fields[name]
    if about.inert:
        return f": {about.words}"
    rivals = [each for each in about.not_with if is_met(settings, each, if_unset=False)]
    if rivals:
        rival, equals, _ = rivals[0].partition("=")
        return f" with --{rival}" + (f"={getattr(settings, rival)}" if equals else "")
    if not about.only_with:
        return ""
    met = [each for each in about.only_with if is_met(settings, each, if_unset=True)]
    if not met:
        known = [each for each in about.only_with if each.partition("=")[0] in fields]
        return f" without --{' or --'.join(known)}"
    obstacles = [find_obstacle(settings, each.partition("=")[0]) for each in met]
    return "" if "" in obstacles else obstacles[0]


def is_met(settings: Any, condition: str, *, if_unset: bool) -> bool:
    """Return whether settings meet a condition, see `flag`. if_unset: the answer if the setting is None."""
    name, _, words = condition.partition("=")
    if not hasattr(settings, name):  # scripts share groups of settings, and this one lacks the setting
        return False
    value = getattr(settings, name)
    if value is None:
        return if_unset
    values = value if isinstance(value, tuple) else (value,)
    return bool(set(map(str, values)) & set(words.split("|"))) if words else bool(value)


def describe_flags(kind: type, usage: str) -> str:
    """Return the text of --help: the script's usage, then its flags in a paragraph per group."""
    lines, hints = [name_flags(usage.strip(), kind)], list_types(kind)
    for title, fields in list_groups(kind).items():
        lines += ["", f"{title}:"]
        for field in fields:
            (plain, is_list), about, default = split_type(hints[field.name]), field.metadata["flag"], field.default
            choices = (", " if is_list else " | ").join(about.choices)
            values = choices or ("LIST" if is_list else {int: "INT", float: "FLOAT"}.get(plain, "STRING"))
            values += " | auto" * about.takes_auto
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


def parse(argv: Sequence[str], kind: type[Settings], usage: str = "") -> Settings:
    """Return the settings that a command line sets; for --help print the help text and exit.

    Prints notes for flags without effect; `IncompleteSettings` get the names of the given settings instead. Raises
    UsageError with a one-line message for an unknown flag, a stray word or a value out of range.
    """
    if HELP & set(argv):
        print(describe_flags(kind, usage))
        sys.exit(0)
    pairs = split_words(argv[1:], kind)
    settings = convert_words(pairs, kind)
    for name, about in list_flags(kind).items():
        if preset := about.presets.get(getattr(settings, name)):
            settings = convert_words(split_words(shlex.split(preset), kind) + pairs, kind)
    note_repetitions(pairs, kind)
    given = frozenset(dict(pairs))
    if isinstance(settings, IncompleteSettings):
        return dataclasses.replace(settings, given_names=given)
    note_flags_without_effect(settings, given)
    return settings


def split_words(words: Sequence[str], kind: type) -> list[tuple[str, str]]:
    """Return the names and values of the flags that words set, see `read_words`."""
    hints = list_types(kind)
    abouts = list_flags(kind)
    names = {name: name for name in abouts} | {about.alias: name for name, about in abouts.items() if about.alias}
    switches = [name for name, target in names.items() if split_type(hints[target])[0] is bool]
    alone = next((name for name, about in abouts.items() if about.takes_word), None)
    pairs = read_words(words, switches, [name for name in names if name not in switches], alone)
    return [(names[name], value) for name, value in pairs]


def list_preset_names(settings: Any) -> set[str]:
    """Return the names of the settings that the chosen preset sets, also where a flag overrides it."""
    presets = [about.presets.get(getattr(settings, name), "") for name, about in list_flags(settings).items()]
    return {name for preset in presets for name, _ in split_words(shlex.split(preset), type(settings))}


def convert_words(pairs: Sequence[tuple[str, str]], kind: type[Settings]) -> Settings:
    """Return the settings with these values; raise UsageError if one is of another type or out of range."""
    values, abouts = define_flags(kind), list_flags(kind)
    words = [f"--{name}={value}" for name, value in pairs if not (abouts[name].takes_auto and value == "auto")]
    autos = [name for name, value in dict(pairs).items() if abouts[name].takes_auto and value == "auto"]
    try:
        values(["", *words])
    except flags.Error as error:
        message = " ".join(str(error).split())
        for of_python, of_people in NO_NUMBER.items():
            message = re.sub(f"{of_python}.*", of_people, message)
        raise UsageError(message) from None
    return dataclasses.replace(read_settings(kind, values), **dict.fromkeys(autos, AUTO))  # type: ignore[type-var]


def convert_values(values: Mapping[str, Any], kind: type[Settings]) -> Settings:
    """Return the settings with these values, under the same checks as words of a command line; see `convert_words`.

    values: plain values by name, which may come from a stranger. Names of no setting are left out, and so is None.
    """
    known, hints = list_flags(kind), list_types(kind)  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if name in known and value is not None}
    is_list = {name: split_type(hints[name])[1] for name in given}
    return convert_words([(k, write_value(v) if is_list[k] else str(v)) for k, v in given.items()], kind)


def write_value(value: object) -> str:
    """Return the value of a setting as a command line has it, a list with commas between its items."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def name_flags(message: str, kind: type) -> str:
    """Return the message with each setting in backquotes written as a flag: `lr`=3 becomes --lr=3."""
    names = list_flags(kind)
    return re.sub(r"`(\w+)`", lambda match: f"--{match[1]}" if match[1] in names else match[0], message)


def run(main: Callable[[Settings], None], kind: type[Settings], usage: str | None) -> None:
    """Run a script: parse its flags and call `main` with the settings.

    A UsageError, a file that cannot be read or written, and a lack of memory are told in one line, and the exit status
    is then 2. A signal ends the script as `interruption` describes. usage: the script's docstring, which --help prints
    first.
    """
    files = replace_standard_streams()
    interruption.raise_on_signals()
    try:
        with contextlib.nullcontext() if is_first_worker() else contextlib.redirect_stdout(io.StringIO()):
            settings = parse(sys.argv, kind, usage or "")  # its notes are the same on all workers
        main(settings)
        note_dropped_output(files)
    except BrokenPipeError:  # the reader of the pipe has ended, as in `| head`
        discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except interruption.Interruption as stop:
        interruption.say_interrupted(stop.number)
        sys.exit(128 + stop.number)
    except (UsageError, OSError, RuntimeError, MemoryError) as error:
        message = describe_error(error, kind)
        if message is None:
            raise
        let_rank_0_speak()
        lines = map(make_printable, name_flags(message, kind).split("\n"))
        print("error: " + "\n".join(lines), file=sys.stderr)
        sys.exit(2)


def describe_error(error: Exception, kind: type) -> str | None:
    """Return one line about an error that a user or a machine caused; None for any other error."""
    if isinstance(error, UsageError):
        return str(error)
    if is_out_of_memory(error):
        names = list_flags(kind)
        sizes = " or ".join(f"`{name}`" for name in SIZES_IN_MEMORY if name in names)
        return f"the memory does not hold what these settings ask for; lower {sizes}"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        place = f" for {error.filename}" if error.filename else ""
        return f"no room{place} ({error.strerror}); make room, then repeat the command"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None

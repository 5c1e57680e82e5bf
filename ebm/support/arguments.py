"""The words of a command line, in all the forms that people write, as pairs of a flag's name and its value.

read_words(["--lr", "3", "-cclass", "--notrain", "step_lr=10"], switches={"cclass", "train"}, others={...})
# [("lr", "3"), ("cclass", "true"), ("train", "false"), ("step_lr", "10")]
"""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Collection, Sequence

from absl import flags

from ebm.support.errors import UsageError

TRUE = {"true", "t", "1", "yes", "y", "on"}
FALSE = {"false", "f", "0", "no", "n", "off"}
NEGATIVE = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)  # the beginning of a number, not of a flag


def read_words(
    words: Sequence[str], switches: Collection[str], others: Collection[str], alone: str | None = None
) -> list[tuple[str, str]]:
    """Return the flags that the words set, in order, each with its value; that of a switch is "true" or "false".

    switches: names of the flags that are on or off. others: names of the flags that take a value. alone: the one of
    these whose value may stand alone. Raises UsageError for an unknown flag, a word that belongs to none, and a value
    that is missing.
    """
    pairs, names, left = [], [*switches, *others], collections.deque(expand_flag_files(words))
    while left:
        word = left.popleft()
        if word.endswith("\r"):
            raise UsageError(f"{word!r} ends with a carriage return: save the command with Unix line ends (dos2unix)")
        if word == "--":  # the conventional end of a program's own flags; here all flags are its own
            continue
        if alone and not word.startswith("-") and ("=" not in word or word.partition("=")[0] not in names):
            pairs.append((alone, word))
            continue
        name, equals, value = split_word(word, names)
        if name in switches:
            if not equals and left and left[0].casefold() in TRUE | FALSE:
                value = left.popleft()
            pairs.append((name, read_switch(name, value if equals or value else "true")))
        elif name.removeprefix("no") in switches:
            if equals:
                raise UsageError(f"{word}: --{name} takes no value; write --{name.removeprefix('no')}=False")
            pairs.append((name.removeprefix("no"), "false"))
        elif name in others:
            if not equals and left and (not left[0].startswith("-") or NEGATIVE.match(left[0])):
                value = left.popleft()
            elif not equals:
                raise UsageError(f"--{name} has no value; write --{name}=VALUE")
            pairs.append((name, value))
        else:
            raise UsageError(f"unknown flag {word.split('=')[0]}; {suggest_name(name, names)}")
    return pairs


def expand_flag_files(words: Sequence[str]) -> list[str]:
    """Return the words with each --flagfile=PATH replaced by the lines of this file, as in all programs that use absl.

    Raises UsageError if such a file cannot be read.
    """
    if {"--flagfile=", "-flagfile="} & set(words):
        raise UsageError("--flagfile is empty; give it the path of a file or leave it out")
    try:
        return flags.FlagValues().read_flags_from_files(list(words))
    except (flags.Error, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--flagfile: {' '.join(str(error).split())}") from None


def split_word(word: str, names: Sequence[str]) -> tuple[str, str, str]:
    """Return the name in a word such as --name=value, the equals sign if there is one, and the value.

    Some published commands lack the dashes. Raises UsageError for a word that is no flag.
    """
    text = word[2:] if word.startswith("--") else word.removeprefix("-")
    name, equals, value = text.partition("=")
    if word.startswith("-") and name.strip("-"):
        return name, equals, value
    if not (equals and name in names):
        raise UsageError(f"unexpected word {word!r}, {suggest_name(name, names)}")
    print(f"note: {word} has no dashes; it is read as --{word}")
    return name, equals, value


def read_switch(name: str, value: str) -> str:
    """Return "true" or "false" for one of the words that mean it; raise UsageError for another word."""
    if value.casefold() not in TRUE | FALSE:
        raise UsageError(f"--{name}={value}: give True or False")
    return "true" if value.casefold() in TRUE else "false"


def suggest_name(name: str, names: Sequence[str]) -> str:
    """Return a question after the flag whose name is closest; if none is close, return where all flags are listed."""
    similar = difflib.get_close_matches(name.casefold(), names, 1)
    return f"did you mean --{similar[0]}?" if similar else "see --help"

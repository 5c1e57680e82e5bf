"""Energies composed of other energies: `shape & pos`, `pos | pos2`, `2*shape & ~size`.

    expression = parse_expression("shape & ~(pos | pos2)")
    energies = expression.energy({"shape": e1, "pos": e2, "pos2": e3})  # each (N,)

`&` adds energies, which multiplies the densities. `|` gives −logsumexp(−E), the energy of a mixture of the densities.
`~` negates an energy, and a number before `*` weights it. `~` and `*` bind tightest, then `&`, then `|`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ebm.support.errors import UsageError

Values = Mapping[str, Tensor]  # name -> values (N,)


@dataclasses.dataclass(frozen=True)
class Name:
    """An expression that is a single name."""

    name: str

    @property
    def names(self) -> list[str]:
        """The names in the expression, in order and as often as they occur."""
        return [self.name]

    def energy(self, energies: Values) -> Tensor:
        """Return the energies (N,) of the expression. energies: those of its names."""
        return energies[self.name]

    def is_fulfilled(self, truths: Values) -> Tensor:
        """Return which images fulfil the expression, (N,) bool, by logic. truths: which images fulfil each name."""
        return truths[self.name]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """An expression times a number; for a negated expression the number is negative. Methods as those of `Name`."""

    weight: float
    part: Expression

    @property
    def names(self) -> list[str]:
        return self.part.names

    def energy(self, energies: Values) -> Tensor:
        return self.weight * self.part.energy(energies)

    def is_fulfilled(self, truths: Values) -> Tensor:
        return ~self.part.is_fulfilled(truths) if self.weight < 0 else self.part.is_fulfilled(truths)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several expressions joined by `&` or by `|`. Methods as those of `Name`."""

    operator: str
    parts: Sequence[Expression]

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names]

    def energy(self, energies: Values) -> Tensor:
        values = torch.stack([part.energy(energies) for part in self.parts])
        return values.sum(0) if self.operator == "&" else -(-values).logsumexp(0)

    def is_fulfilled(self, truths: Values) -> Tensor:
        values = torch.stack([part.is_fulfilled(truths) for part in self.parts])
        return values.all(0) if self.operator == "&" else values.any(0)


Expression = Name | Weighted | Joined


# ---- parsing ----

MOST_TOKENS = 300  # Python's stack holds the parts of a longer expression only if they are not nested
LARGEST_WEIGHT = 1e18  # larger products do not fit into float32
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[&|~*()])|(?P<end>$)|(?P<other>\S))"
)


def parse_expression(text: str) -> Expression:
    """Parse an expression; raise UsageError, with a caret under the wrong place, if the text is not an expression."""
    parser = Parser(text)
    if len(parser.matches) > MOST_TOKENS:
        raise UsageError(f"`combine` has {len(parser.matches)} names and signs; it can have at most {MOST_TOKENS}")
    return parser.parse_whole()


class Parser:
    """A recursive descent parser of expressions, with one method per level of precedence."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.matches = list(TOKEN.finditer(text))  # the last one is the end

    @property
    def kind(self) -> str | None:
        """The kind of the next token: the name of a group in TOKEN."""
        return self.matches[self.place].lastgroup

    @property
    def token(self) -> str:
        """The text of the next token; empty at the end."""
        return self.matches[self.place].group().strip()

    def take(self, expected: str = "") -> str:
        """Return the next token and move past it; raise UsageError if it is not the expected one."""
        if expected and self.token != expected:
            self.fail(expected)
        self.place += 1
        return self.matches[self.place - 1].group().strip()

    def fail(self, expected: str) -> NoReturn:
        """Raise UsageError for the next token. expected: a description of what could stand there."""
        match = self.matches[self.place]
        caret = " " * match.start(match.lastgroup or 0) + "^"
        raise UsageError(f"`combine`: expected {expected}, not {self.token or 'the end'}\n  {self.text}\n  {caret}")

    def parse_whole(self) -> Expression:
        """Parse the whole text."""
        expression = self.parse_mixture()
        if self.kind != "end":
            self.fail("& or |")
        return expression

    def parse_mixture(self) -> Expression:
        """Parse products joined by `|`."""
        parts = [self.parse_product()]
        while self.token == "|":
            self.take()
            parts.append(self.parse_product())
        return parts[0] if len(parts) == 1 else Joined("|", tuple(parts))

    def parse_product(self) -> Expression:
        """Parse factors joined by `&`."""
        parts = [self.parse_factor()]
        while self.token == "&":
            self.take()
            parts.append(self.parse_factor())
        return parts[0] if len(parts) == 1 else Joined("&", tuple(parts))

    def parse_factor(self) -> Expression:
        """Parse a name, a weighted or negated factor, or a mixture in parentheses."""
        if self.kind == "name":
            return Name(self.take())
        if self.kind == "number":
            weight = float(self.token)
            if weight > LARGEST_WEIGHT:
                self.fail(f"a weight of at most {LARGEST_WEIGHT:g}")
            self.take()
            self.take("*")
            return Weighted(weight, self.parse_factor())
        if self.token == "~":
            self.take()
            return Weighted(-1.0, self.parse_factor())
        if self.token != "(":
            self.fail("a name, a weight, ~ or (")
        self.take()
        expression = self.parse_mixture()
        self.take(")")
        return expression

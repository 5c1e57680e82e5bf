"""Energies composed of other energies: `shape & pos`, `pos | pos2`, `2*shape & ~size`; and chains that follow them.

    expression = parse("shape & ~(pos | pos2)")
    energies = expression.energy({"shape": e1, "pos": e2, "pos2": e3})  # each (N,)

`&` adds energies: the product of the densities. `|` is −logsumexp(−E): their mixture. `~` negates an energy, a number
before `*` weights it. `~` and `*` bind tightest, then `&`, then `|`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from errors import UsageError
from sampling import Energy, input_gradient
from utils import Progress

Values = Mapping[str, Tensor]  # by name, each (N,)


@dataclasses.dataclass(frozen=True)
class Name:
    """An energy by its name."""

    name: str

    @property
    def names(self) -> list[str]:
        """The names in an expression, as often as they occur, in order."""
        return [self.name]

    def energy(self, energies: Values) -> Tensor:
        """Return the energies (N,) of an expression, given those of its names."""
        return energies[self.name]

    def holds(self, truths: Values) -> Tensor:
        """Return whether images fulfil an expression, (N,), given whether they fulfil its names: its plain logic."""
        return truths[self.name]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """An expression times a number, which is negative where it is negated."""

    weight: float
    part: Expression

    @property
    def names(self) -> list[str]:
        return self.part.names

    def energy(self, energies: Values) -> Tensor:
        return self.weight * self.part.energy(energies)

    def holds(self, truths: Values) -> Tensor:
        return ~self.part.holds(truths) if self.weight < 0 else self.part.holds(truths)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several expressions joined by `&` or by `|`."""

    operator: str
    parts: Sequence[Expression]

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names]

    def energy(self, energies: Values) -> Tensor:
        found = torch.stack([part.energy(energies) for part in self.parts])
        return found.sum(0) if self.operator == "&" else -(-found).logsumexp(0)

    def holds(self, truths: Values) -> Tensor:
        found = torch.stack([part.holds(truths) for part in self.parts])
        return found.all(0) if self.operator == "&" else found.any(0)


Expression = Name | Weighted | Joined


# ---- parsing ----

TOKEN = re.compile(r"\s*(?:(?P<number>\d+\.?\d*|\.\d+)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[&|~*()]))")


def parse(text: str) -> Expression:
    """Return the expression that a text describes; raise UsageError, with a caret under the place, where it is none."""
    return Parser(text).all()


class Parser:
    """A recursive descent over the tokens of a text, a method per level of precedence."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.advance()

    def advance(self) -> str:
        """Read the next token into `kind`, `token` and `start`; return the one before."""
        before = getattr(self, "token", "")
        match = TOKEN.match(self.text, self.place)
        rest = self.text[self.place :]
        self.start = len(self.text) - len(rest.lstrip())
        self.kind = match.lastgroup if match else None
        self.token = match[match.lastgroup] if match and match.lastgroup else ""
        if not match and rest.strip():
            self.fail(f"unexpected {self.text[self.start]!r}")
        self.place = match.end() if match else len(self.text)
        return before

    def fail(self, message: str) -> None:
        raise UsageError(f"--combine: {message}\n  {self.text}\n  {' ' * self.start}^")

    def all(self) -> Expression:
        expression = self.joined("|")
        if self.token:
            self.fail(f"expected an operator, & or |, not {self.token!r}")
        return expression

    def joined(self, operator: str) -> Expression:
        part = functools.partial(self.joined, "&") if operator == "|" else self.factor
        parts = [part()]
        while self.token == operator:
            self.advance()
            parts.append(part())
        return parts[0] if len(parts) == 1 else Joined(operator, tuple(parts))

    def factor(self) -> Expression:
        if self.kind == "number":
            weight = float(self.advance())
            if self.token != "*":
                self.fail("expected * after a weight")
            self.advance()
            return Weighted(weight, self.factor())
        if self.kind == "name":
            return Name(self.advance())
        if self.token == "~":
            self.advance()
            return Weighted(-1.0, self.factor())
        if self.token != "(":
            self.fail(f"expected a name, a weight, ~ or (, not {self.token or 'the end'}")
        self.advance()
        expression = self.joined("|")
        if self.token != ")":
            self.fail(f"expected ), not {self.token or 'the end'}")
        self.advance()
        return expression


# ---- sampling ----


def chain(
    energies: Sequence[Energy],
    x: Tensor,
    *,
    num_steps: int,
    step_lr: float,
    noise_std: float = 0.005,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Return images (N, C, H, W) after rounds of Langevin dynamics, each one step on every energy, one after the other.

    Other than `sampling.langevin`, a step takes the gradient *before* the noise, as the reference's combination does:
    g at x, then x + N(0, noise_std²) − step_lr·g, clipped to [0, 1]. progress counts rounds.
    """
    for _ in range(num_steps):
        for energy in energies:
            gradient = input_gradient(energy, x)
            noise = noise_std * torch.randn(x.shape, generator=generator, device=x.device)
            x = (x + noise - step_lr * gradient).clamp(0, 1)
        if progress is not None:
            progress.update(progress.done + 1)
    return x

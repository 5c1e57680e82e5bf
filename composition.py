"""Energies composed of other energies: `shape & pos`, `pos | pos2`, `2*shape & ~size`; and chains that follow them.

    expression = parse("shape & ~(pos | pos2)")
    energies = expression.energy({"shape": e1, "pos": e2, "pos2": e3})  # each (N,)

`&` adds energies: the product of the densities. `|` is −logsumexp(−E): their mixture. `~` negates an energy, a number
before `*` weights it. `~` and `*` bind tightest, then `&`, then `|`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

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

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[&|~*()])|(?P<end>$)|(?P<other>\S))"
)


def parse(text: str) -> Expression:
    """Return the expression that a text describes; raise UsageError, with a caret under the place, where it is none."""
    return Parser(text).whole()


class Parser:
    """A recursive descent over the tokens of a text, a method per level of precedence."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.matches = list(TOKEN.finditer(text))  # the last one is the end

    @property
    def kind(self) -> str | None:
        """What the next token is: a group of TOKEN."""
        return self.matches[self.place].lastgroup

    @property
    def token(self) -> str:
        """The next token itself, empty at the end."""
        return self.matches[self.place].group().strip()

    def take(self, expected: str = "") -> str:
        """Return the next token and go on; raise UsageError where it is not the expected one."""
        if expected and self.token != expected:
            self.fail(expected)
        self.place += 1
        return self.matches[self.place - 1].group().strip()

    def fail(self, expected: str) -> NoReturn:
        match = self.matches[self.place]
        caret = " " * match.start(match.lastgroup or 0) + "^"
        raise UsageError(f"`combine`: expected {expected}, not {self.token or 'the end'}\n  {self.text}\n  {caret}")

    def whole(self) -> Expression:
        expression = self.mixture()
        if self.kind != "end":
            self.fail("& or |")
        return expression

    def mixture(self) -> Expression:
        parts = [self.product()]
        while self.token == "|":
            self.take()
            parts.append(self.product())
        return parts[0] if len(parts) == 1 else Joined("|", tuple(parts))

    def product(self) -> Expression:
        parts = [self.factor()]
        while self.token == "&":
            self.take()
            parts.append(self.factor())
        return parts[0] if len(parts) == 1 else Joined("&", tuple(parts))

    def factor(self) -> Expression:
        if self.kind == "name":
            return Name(self.take())
        if self.kind == "number":
            weight = float(self.take())
            self.take("*")
            return Weighted(weight, self.factor())
        if self.token == "~":
            self.take()
            return Weighted(-1.0, self.factor())
        if self.token != "(":
            self.fail("a name, a weight, ~ or (")
        self.take()
        expression = self.mixture()
        self.take(")")
        return expression


# ---- sampling ----


def chain(
    energies: Sequence[Energy],
    x: Tensor,
    *,
    num_steps: int,
    step_lr: float,
    noise_std: float = 0.005,
    first_noise_std: float = 0.0,
    first_step_lr: float = 0.0,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """Return images (N, C, H, W) after rounds of Langevin dynamics, each one step on every energy, one after the other.

    Other than `sampling.langevin`, a step takes the gradient *before* the noise, as the reference's combination does:
    g at x, then x + N(0, noise_std²) − step_lr·g, clipped to [0, 1]. Where first_noise_std is larger than noise_std,
    the noise falls from there in a line to 0 after four fifths of the rounds, and to no less than noise_std; likewise
    the step size from first_step_lr to step_lr: simulated annealing, by which chains leave the first modes they meet.
    progress counts rounds.
    """
    for k in range(num_steps):
        left = 1 - k / (0.8 * num_steps)
        std, step = max(noise_std, first_noise_std * left), max(step_lr, first_step_lr * left)
        for energy in energies:
            gradient = input_gradient(energy, x)
            noise = std * torch.randn(x.shape, generator=generator, device=x.device)
            x = (x + noise - step * gradient).clamp(0, 1)
        if progress is not None:
            progress.update(progress.done + 1)
    return x

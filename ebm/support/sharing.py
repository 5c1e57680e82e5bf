"""The interface by which independent computations are shared out to workers, its form for one process, their seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# (items, compute) -> compute(item) for all items, in order. `compute` must not depend on the order of its calls; its
# results hold tensors and plain values.
ShareOut = Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]]


def compute_all(items: Sequence[Any], compute: Callable[[Any], Any]) -> list[Any]:
    """Return compute(item) for all items, one after the other; `Workers.share_out` does the same on many workers."""
    return [compute(item) for item in items]


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of the computation with this number in a run with this seed, below 2³²."""
    return (seed * 1_000_003 + number) % 2**32


def fold_seed(seed: int) -> int:
    """Return a seed of PyTorch for a sum or product of seeds, which may be too large: the remainder below 2⁶⁴."""
    return seed % 2**64

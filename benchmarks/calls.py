"""Call scripts of this project many times, several at once; each process starts once and makes one call after another.

for call in run_calls([Call("train", ("--preset=digits_cpu", "--seed=1")), ...], jobs=4): ...
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ebm.support import cli
from ebm.support.progress import Progress

PRODUCTS = (F.conv2d, F.linear, Tensor.matmul, Tensor.__matmul__)


class Call(NamedTuple):
    """A call of a script at the root of the project."""

    script: str  # the name of its module, such as "train"
    words: tuple[str, ...]  # of its command line

    def __str__(self) -> str:
        """Return the command that makes the same call."""
        return f"python {self.script}.py {shlex.join(self.words)}"

    def read_settings(self) -> Any:
        """Return the settings that the script reads from these words; raise UsageError if it refuses them."""
        kind = typing.get_type_hints(importlib.import_module(self.script).main)["settings"]
        return cli.parse([f"{self.script}.py", *self.words], kind)

    def run(self) -> None:
        """Run the script in this process; raises what it raises, such as UsageError."""
        threads = torch.get_num_threads()
        try:
            importlib.import_module(self.script).main(self.read_settings())
        finally:
            torch.set_num_threads(threads)  # train.py may have found fewer to be faster


class EmulatedBf16(TorchFunctionMode):
    """A mode of PyTorch in which products and convolutions in bf16 are computed in float32 and then rounded to bf16.

    Instructions for bf16 do the same, since their sums are float32. Without them, PyTorch takes many times as long.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs or {})
        floats = (value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*floats, **kwargs or {}).bfloat16()


def prepare_process(threads: int, emulate_bf16: bool) -> None:
    """Set the number of threads of a process that makes calls, and how it computes in bf16."""
    torch.set_num_threads(threads)
    if emulate_bf16:
        EmulatedBf16().__enter__()


def run_calls(calls: Sequence[Call], jobs: int, *, emulate_bf16: bool = False) -> Iterator[Call]:
    """Run all calls, so many at a time, and yield each one that ends well; print a line about each that does not.

    A process that is killed ends all calls that are left.

    jobs: the number of processes, among which the threads of the CPU are divided. emulate_bf16: see `EmulatedBf16`.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 else torch.get_num_threads()
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    with concurrent.futures.ProcessPoolExecutor(jobs, context, prepare_process, (threads, emulate_bf16)) as pool:
        futures = {pool.submit(call.run): call for call in calls}
        progress = Progress(len(futures), what="call")
        try:
            for future in concurrent.futures.as_completed(futures):
                call, error = futures[future], future.exception()
                progress.say(f"done: {call}" if error is None else f"failed: {call}: {error!r}")
                progress.advance()
                if error is None:
                    yield call
        finally:
            progress.close()
            pool.shutdown(cancel_futures=True)  # after a signal no further call begins

"""Run Langevin chains in fewer bits, with compiled steps or as one CUDA graph, and fall back where that fails.

acceleration = Acceleration(precision="fp16", compiled=True, captured=True)
end = acceleration.run(chain, weights, x, labels, generator)  # chain(weights, x, labels, compiled) -> images
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

import models
from errors import UsageError
from sampling import CannotCompile

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Of the energies whose gradients go to the weights: those would underflow in fp16, whose smallest number is 6e-8.
LOSS_PRECISIONS = PRECISIONS | {"fp16": torch.float32}
# What makes chains fast, by flag, and how to do without.
REMEDIES = {"precision": "`precision`=tf32", "compile": "`compile`=False", "cuda_graph": "`cuda_graph`=False"}


def set_tf32(allowed: bool) -> None:
    """Let GPUs round the factors of float32 convolutions and matrix products to TF32, or not, for the whole process."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let GPUs round to TF32 inside, unless the precision is float32 itself; afterwards it is as it was before."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_tf32(precision != "float32")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def set_kernel_choice(*, deterministic: bool) -> None:
    """Let GPUs take the fastest kernels, by measuring, or those that give the same bits in every run.

    It holds for the whole process; call it before anything is computed on a GPU.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it


class Chain(Protocol):
    """A chain of Langevin steps on images x (N, C, H, W) under prepared weights; compiled: by the compiled step."""

    def __call__(self, weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor: ...


@dataclasses.dataclass
class Acceleration:
    """How a run computes its chains: their number type, with compiled steps, as a CUDA graph; it falls back from these.

    precision: of the energies, one of PRECISIONS; images, noise and updates are float32 in any case. compiled: a step
    is one compiled function. captured: a chain that is run again and again is one CUDA graph. What fails is given up,
    which `say` tells in one line, but where it is among `asked`, by the name of its flag: then UsageError is raised.
    """

    precision: str = "float32"
    compiled: bool = False
    captured: bool = False
    asked: frozenset[str] = frozenset()
    say: Callable[[str], object] = print
    graph: CapturedChain | None = dataclasses.field(default=None, init=False)
    has_checked_fp16: bool = dataclasses.field(default=False, init=False)

    def __str__(self) -> str:
        """Return in words what chains are computed in, and how."""
        words = {"fp16": "fp16 in chains, elsewhere float32, on GPUs TF32", "tf32": "float32, on GPUs TF32"}
        ways = ", steps compiled" * self.compiled + ", a chain launched as one CUDA graph" * self.captured
        return words.get(self.precision, self.precision) + ways

    @property
    def is_fp16_by_default(self) -> bool:
        """Whether chains are in fp16 though nobody asked for it."""
        return self.precision == "fp16" and "precision" not in self.asked

    def run(
        self,
        chain: Chain,
        weights: models.Weights,
        x: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        *,
        repeated: bool,
    ) -> Tensor:
        """Return the end points (N, C, H, W) of a chain that draws from `generator`.

        weights: float32, without history. repeated: every such call has the same chain, and arguments of the same
        shapes, so that the first one may be captured for all.
        """
        while True:
            before = generator.get_state()
            dtype = PRECISIONS[self.precision]
            try:
                with products_in(self.precision):
                    if repeated and self.captured:
                        self.graph = self.graph or CapturedChain(chain, self.compiled, dtype, generator)
                        end = self.graph(weights, x, labels)
                    else:
                        end = chain(models.cast(weights, dtype), x, labels, compiled=self.compiled)
                # Looked at once, since it waits for the GPU. What comes later is for the divergence guard to see.
                if self.has_checked_fp16 or self.precision != "fp16" or end.isfinite().all():
                    self.has_checked_fp16 = True
                    return end
                self.give_up("precision", "the chain's images are not finite in fp16")
            except CannotCompile as error:
                self.give_up("compile", f"the Langevin step cannot be compiled ({error})")
            except CannotCapture as error:
                self.give_up("cuda_graph", f"the chain cannot be captured as a CUDA graph ({error})")
            generator.set_state(before)

    def give_up(self, flag: str, problem: str) -> None:
        """Fall back from what failed, named by its flag, and say so; raise UsageError where it was asked for."""
        if flag in self.asked:
            raise UsageError(f"{problem}; run with {REMEDIES[flag]}")
        self.graph = None
        if flag == "precision":
            self.precision = "tf32"
        elif flag == "compile":
            self.compiled = False
        else:
            self.captured = False
        self.say(f"note: {problem}; going on as with {REMEDIES[flag].replace('`', '')}")


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class CannotCapture(Exception):
    """A chain that cannot become a CUDA graph here, for the reason given."""


class CapturedChain:
    """A chain as a CUDA graph: the kernels of all its steps, the noise's too, are launched at once.

    The first call captures the chain, which draws from `generator`, on tensors of its own, weights of type `dtype`;
    each call copies its arguments there, so that later ones may have other weights, images and labels, all shaped as
    before. Raises CannotCapture where that fails.
    """

    def __init__(self, chain: Chain, compiled: bool, dtype: torch.dtype, generator: torch.Generator):
        self.chain, self.compiled, self.dtype, self.generator = chain, compiled, dtype, generator
        self.weights: models.Weights = {}

    def __call__(self, weights: models.Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        if not self.weights:
            self.weights = {name: tensor.to(self.dtype, copy=True) for name, tensor in weights.items()}
            self.x, self.labels = x.clone(), None if labels is None else labels.clone()
            function = functools.partial(self.chain, self.weights, self.x, self.labels, compiled=self.compiled)
            self.replay, self.end = capture(function, self.generator)
        torch._foreach_copy_(list(self.weights.values()), list(weights.values()))
        self.x.copy_(x)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        self.replay()
        return self.end.clone()


def capture(function: Callable[[], Tensor], generator: torch.Generator) -> tuple[Callable[[], None], Tensor]:
    """Record what a function launches on the GPU; return how to launch it again, and the tensor where its result lies.

    It may draw from torch's own generator and this one, which go on from where they are at each launch. Raises
    CannotCapture where the function does what cannot be recorded, and leaves both as they were.
    """
    index = torch.cuda.current_device() if generator.device.index is None else generator.device.index
    generators = generator, torch.cuda.default_generators[index]
    states = lend_copies(generators)
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    if torch.__version__ < "2.14":  # from then on a graph finds its generators itself, and warns of being told
        graph.register_generator_state(generator)
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with without_collector(), torch.cuda.stream(stream):
            before = [each.get_state() for each in generators]
            function()  # kernels are compiled and chosen here, which is not allowed while recording
            for each, state in zip(generators, before, strict=True):
                each.set_state(state)
            # Other threads may talk to other workers meanwhile.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                end = function()
    except BaseException as error:
        for each, original in zip(generators, states, strict=True):
            each.graphsafe_set_state(original)
        with contextlib.suppress(RuntimeError):  # up to torch 2.12 memory would count as being recorded for ever
            torch._C._cuda_endAllocateToPool(index, pool)
        if not isinstance(error, RuntimeError):
            raise
        cause = error.__context__ or error  # the end of a recording that broke off says no more than that it did
        raise CannotCapture(str(cause).strip().split("\n")[0]) from None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, end


def lend_copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Give generators of GPUs copies of their states to draw from; return the original states.

    A recording that breaks off makes the states that it draws from useless, also for earlier graphs.
    """
    states = []
    for each in generators:
        states.append(each.graphsafe_get_state())
        copy = torch.Generator(each.device)
        copy.set_state(each.get_state())
        each.graphsafe_set_state(copy)
    return states


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running inside: it could destroy another graph, which ends a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

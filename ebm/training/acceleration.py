"""Run Langevin chains in fewer bits, with compiled steps or as one CUDA graph, and do without what fails.

acceleration = Acceleration(precision="fp16", compiled=True, captured=True)
end = acceleration.run(chain, weights, x, labels, generator)  # chain(weights, x, labels, compiled) -> images
end = accelerate_chains(settings).descend(energy, x, num_steps=20, step_lr=10.0, generator=generator)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import models
from ebm.settings import CompiledChains
from ebm.support.errors import UsageError
from ebm.support.hardware import PRECISIONS, allow_tf32
from sampling import CannotCompile, Energy, langevin

# The settings that make chains fast, and how to do without each of them.
REMEDIES = {"precision": "`precision`=tf32", "compile": "`compile`=False", "cuda_graph": "`cuda_graph`=False"}
COMPILED = "the Langevin step is compiled when it first runs, which can take a minute; torch keeps the result"


class Chain(Protocol):
    """A function that runs Langevin chains from images x (N, C, H, W) under prepared weights."""

    def __call__(self, weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
        """Return the end points (N, C, H, W). compiled: use the compiled Langevin step."""


@dataclasses.dataclass
class Acceleration:
    """The means by which a run computes its chains fast: a number type, compiled steps and a CUDA graph.

    precision: the number type of the energies, one of PRECISIONS; images, noise and updates are always float32.
    compiled: a step is one compiled function. captured: a chain that is run repeatedly is one CUDA graph. asked: the
    settings that the user chose, by name. If a means fails, the run does without it and `say` receives a line about
    it; if the user asked for it, UsageError is raised instead.
    """

    precision: str = "float32"
    compiled: bool = False
    captured: bool = False
    asked: frozenset[str] = frozenset()
    say: Callable[[str], object] = print
    graph: CapturedChain | None = dataclasses.field(default=None, init=False)
    has_checked_fp16: bool = dataclasses.field(default=False, init=False)
    compiled_shape: torch.Size | None = dataclasses.field(default=None, init=False)

    def __str__(self) -> str:
        """Return a description of the number type and of the other means in use."""
        words = {"fp16": "fp16 in chains, elsewhere float32, on GPUs TF32", "tf32": "float32, on GPUs TF32"}
        ways = ", steps compiled" * self.compiled + ", a chain launched as one CUDA graph" * self.captured
        return words.get(self.precision, self.precision) + ways

    @property
    def is_fp16_by_default(self) -> bool:
        """Whether chains are in fp16 although the user did not ask for it."""
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
        """Run a chain that draws from `generator`; return its end points (N, C, H, W).

        weights: float32, without an autograd graph. repeated: all such calls have the same chain, and arguments of the
        same shapes, so that the first one may be captured for all.
        """
        while True:
            before = generator.get_state()
            dtype = PRECISIONS[self.precision]
            try:
                with allow_tf32(self.precision):
                    if repeated and self.captured:
                        self.graph = self.graph or CapturedChain(chain, self.compiled, dtype, generator)
                        end = self.graph(weights, x, labels)
                    else:
                        end = chain(models.cast(weights, dtype), x, labels, compiled=self.compiled)
                # Only the first chain is checked, because that waits for the GPU; later the divergence guard checks.
                if self.has_checked_fp16 or self.precision != "fp16" or end.isfinite().all():
                    self.has_checked_fp16 = True
                    return end
                self.give_up("precision", "the chain's images are not finite in fp16")
            except CannotCompile as error:
                self.give_up("compile", f"the Langevin step cannot be compiled ({error})")
            except CannotCapture as error:
                self.give_up("cuda_graph", f"the chain cannot be captured as a CUDA graph ({error})")
            generator.set_state(before)

    def descend(
        self,
        energy: Energy | Sequence[Energy],
        x: Tensor,
        **settings: Any,
    ) -> Tensor:
        """Run `sampling.langevin` with these settings on images x (N, ...), compiled if asked; return the end points.

        Steps are compiled for the shape of the first chain's images; chains of another shape, such as a smaller last
        batch, run uncompiled, because compiling takes longer than they do. Raises UsageError if compiling fails.
        """
        self.compiled_shape = self.compiled_shape or x.shape
        compiled = self.compiled and x.shape == self.compiled_shape
        with allow_tf32(self.precision):
            try:
                return langevin(energy, x, compiled=compiled, **settings)
            except CannotCompile as error:
                raise UsageError(f"the Langevin step cannot be compiled ({error}); run with `compile`=False") from None

    def give_up(self, flag: str, problem: str) -> None:
        """Do without what a setting (`flag`) stands for and say so; raise UsageError if the user asked for it.

        problem: a clause that says what failed.
        """
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


def accelerate_chains(settings: CompiledChains) -> Acceleration:
    """Return the means by which a script that evaluates models computes its chains: those that its settings name.

    Prints a line if steps are compiled.
    """
    if settings.compile:
        print(COMPILED, flush=True)
    return Acceleration(settings.precision, compiled=bool(settings.compile))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class CannotCapture(Exception):
    """The error of a chain that cannot be captured as a CUDA graph; its message says why."""


class CapturedChain:
    """A chain as a CUDA graph, which launches the kernels of all its steps and of their noise at once.

    The first call captures the chain on tensors of its own, with weights of type `dtype`. Every call copies its
    arguments to these tensors, so that later calls may have other weights, images and labels of the same shapes. The
    chain draws from `generator`. Raises CannotCapture if the capture fails.
    """

    def __init__(self, chain: Chain, compiled: bool, dtype: torch.dtype, generator: torch.Generator):
        self.chain, self.compiled, self.dtype, self.generator = chain, compiled, dtype, generator
        self.weights: models.Weights = {}

    def __call__(self, weights: models.Weights, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return the end points of the chain for these arguments."""
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
    """Record the kernels that a function launches on the GPU; return a function that replays them and the result.

    The result is a tensor that every replay overwrites. The function may draw from torch's own generator and from
    `generator`; every replay draws new numbers from both. Raises CannotCapture if the function does something that
    cannot be recorded; then both generators are as they were.
    """
    index = torch.cuda.current_device() if generator.device.index is None else generator.device.index
    generators = generator, torch.cuda.default_generators[index]
    states = lend_copies(generators)
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    if torch.__version__ < "2.14":  # newer graphs find their generators themselves, and warn about this call
        graph.register_generator_state(generator)
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with pause_collector(), torch.cuda.stream(stream):
            before = [each.get_state() for each in generators]
            function()  # kernels are compiled and chosen here, which is not allowed while recording
            for each, state in zip(generators, before, strict=True):
                each.set_state(state)
            # thread_local: other threads may use the GPU meanwhile, to communicate with other workers.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                end = function()
    except BaseException as error:
        for each, original in zip(generators, states, strict=True):
            each.graphsafe_set_state(original)
        with contextlib.suppress(RuntimeError):  # up to torch 2.12 the memory pool would stay in recording for ever
            torch._C._cuda_endAllocateToPool(index, pool)
        if not isinstance(error, RuntimeError):
            raise
        cause = error.__context__ or error  # the error itself may only say that the recording broke off
        raise CannotCapture(str(cause).strip().split("\n")[0]) from None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, end


def lend_copies(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Let generators of GPUs draw from copies of their states; return the original states.

    A recording that breaks off makes the states that it draws from useless, even for earlier graphs.
    """
    states = []
    for each in generators:
        states.append(each.graphsafe_get_state())
        copy = torch.Generator(each.device)
        copy.set_state(each.get_state())
        each.graphsafe_set_state(copy)
    return states


@contextlib.contextmanager
def pause_collector() -> Iterator[None]:
    """Stop Python's garbage collector inside the block: it could destroy another graph, which ends a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

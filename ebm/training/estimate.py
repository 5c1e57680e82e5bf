"""What an iteration will take: seconds and memory, measured on a few images before a run begins.

    cost = estimate_cost(train_step, state, settings)  # Cost(seconds=850.0, memory=20_300_000_000)

The real step runs on a copy of the state. Its time is that of the images and Langevin steps that it was measured on,
extended to those of the settings. Its memory is followed operation by operation on two chains and on three: each
operation adds to the memory in proportion to the images, and the largest sum is the peak.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from ebm.settings import TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.support.hardware import allow_tf32, find_free_memory
from ebm.support.progress import describe_time, show_waiting
from ebm.training.acceleration import Acceleration
from ebm.training.distributed import Workers
from ebm.training.guard import SNAPSHOTS
from ebm.training.state import State
from utils import ClippedAdam, ReplayBuffer

# The arguments of `train_step`: state, settings, images, labels, starts of the chains, what averages the gradients.
TrainStep = Callable[[State, TrainSettings, Tensor, Tensor | None, Tensor, Callable[[], None]], object]

TIMED = 0.2  # seconds that one timed step may take
LONG = 30.0  # seconds of an iteration from which on remedies are printed
LARGE = 0.5  # share of the free memory from which on they are


class Cost(NamedTuple):
    """What a run takes."""

    seconds: float  # of an iteration
    memory: int  # bytes, besides those that the run holds before its first iteration


def estimate_cost(train_step: TrainStep, state: State, settings: TrainSettings) -> Cost:
    """Return about what an iteration with these settings takes; the state and all generators stay as they are."""
    device, trial = state.generator.device, Trial(train_step, state, settings)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), allow_tf32(state.acceleration.precision):
        memory = trial.estimate_memory() * (1 if devices else estimate_heap(settings))
        snapshots = SNAPSHOTS * measure_snapshot(state) if settings.guard else 0
        return Cost(trial.estimate_seconds(), int(memory) + snapshots)


class Trial:
    """Steps of training with few chains, on a copy of a run's state."""

    def __init__(self, train_step: TrainStep, state: State, settings: TrainSettings):
        self.train_step, self.settings = train_step, settings
        self.chains = settings.num_chains or settings.batch_size  # of a whole iteration
        model = copy.deepcopy(state.model).train()
        self.state = State(
            model,
            ClippedAdam(model.parameters(), lr=0.0),
            ReplayBuffer(self.chains, model.config.image_shape, state.generator.device),
            state.batches,  # from which nothing is drawn
            torch.Generator(state.generator.device),
            ema=copy.deepcopy(state.ema),
            acceleration=Acceleration(state.acceleration.precision, say=lambda message: None),
        )

    def step(self, chains: int, num_steps: int) -> float:
        """Train on noise with so many chains, and images in proportion; return the seconds that it took."""
        state, settings = self.state, self.settings
        count, config, device = chains * settings.batch_size // self.chains, state.model.config, state.generator.device
        images = models.draw_noise_images(config, count, state.generator, settings.rescale)
        labels = torch.rand(count, config.label_size, device=device) if config.label_size else None
        settings = dataclasses.replace(settings, batch_size=count, num_chains=chains, num_steps=num_steps)
        synchronize(device)
        start = time.perf_counter()
        self.train_step(state, settings, images, labels, images[:chains].clone(), lambda: None)
        synchronize(device)
        return time.perf_counter() - start

    def estimate_memory(self) -> int:
        """Return the bytes at the peak of an iteration.

        Of each Langevin step after the second, the KL term keeps the images and the noise; it computes all else again.
        """
        kept = 0 if self.settings.zero_kl else 2 * 4 * math.prod(self.state.model.config.image_shape)
        num_steps = self.settings.num_steps
        self.step(1, min(num_steps, 1))  # some operations run once only, such as the check of the first chain in fp16
        histories = []
        for chains in (2, 3):
            self.state.optimizer.zero_grad()
            with MemoryHistory() as history:
                self.step(chains, min(num_steps, 2))
            histories.append(history.sizes)
        if len(set(map(len, histories))) > 1:  # a choice depended on the values of tensors: compare the peaks alone
            histories = [[max(sizes)] for sizes in histories]
        peak = max(two + (three - two) * (self.chains - 2) for two, three in zip(*histories, strict=True))
        return peak + kept * self.chains * max(num_steps - 2, 0)

    def estimate_seconds(self) -> float:
        """Return the seconds of an iteration, after the steps that memory was measured on, which warm up."""
        chains, num_steps, rounds = self.chains, self.settings.num_steps, 1
        single = self.step(1, 1)
        count = min(chains, max(2, int(TIMED / single)))
        if self.state.generator.device.type == "cuda":
            # A GPU chooses its kernels for each shape. The KL term has some that only a second step needs.
            self.step(count, 2)
            rounds = 2  # its times are short, so that one pause of the process would count
        one, two = (min(self.step(count, steps) for _ in range(rounds)) for steps in (1, 2))
        per_step, per_chain = max(two - one, 0), max(one - single, 0) / max(count - 1, 1)
        return one + (chains - count) * per_chain + (num_steps - 1) * per_step * chains / count


class MemoryHistory(TorchDispatchMode):
    """A record, after each operation inside the block, of the bytes of all tensors that were made there and live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = [0]
        self.total = 0
        self.living: set[int] = set()  # addresses of storages

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: nothing is compiled here, and PyTorch need not load its compiler, which takes two seconds."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        earlier = {tensor.untyped_storage()._cdata for tensor in list_tensors((args, kwargs))}
        for tensor in list_tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in earlier and storage._cdata not in self.living:
                self.living.add(storage._cdata)
                self.total += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes()).atexit = False
        self.sizes.append(self.total)
        return result

    def _forget(self, address: int, size: int) -> None:
        self.living.remove(address)
        self.total -= size


def list_tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested lists and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def estimate_heap(settings: TrainSettings) -> float:
    """Return how many bytes the C library takes for a byte of tensors on a CPU, since freed ones leave gaps.

    Measured: up to 1.2 without the KL term, and up to 1.8 with it, for three networks and 3 to 60 Langevin steps.
    """
    return 1.3 if settings.zero_kl else 1.8


def measure_snapshot(state: State) -> int:
    """Return the bytes of a state that the divergence guard keeps, with a full replay buffer."""
    return state.buffer.images.nbytes + sum(tensor.nbytes for tensor in list_tensors(state.get_shared_state()))


# ---- what is said about it ----


def describe_cost(cost: Cost, iterations: int) -> str:
    """Return a line about an iteration, and about so many of them."""
    line = f"one iteration: about {describe_time(cost.seconds)} and {describe_size(cost.memory)} of memory"
    return line + f"; {iterations:,} iterations: about {describe_time(iterations * cost.seconds)}" * (iterations > 1)


def describe_size(size: int) -> str:
    """Return a number of bytes as people say it: 5 MB, 1.2 GB."""
    return f"{size / 1e9:.2g} GB" if size >= 1e9 else f"{max(size, 1e6) / 1e6:.0f} MB"


def list_remedies(settings: TrainSettings, state: State, *, is_new: bool) -> list[str]:
    """Return the settings that would make an iteration shorter and smaller, the surest first, those in use left out.

    is_new: the run begins, so that its network can be another one.
    """
    config, remedies = state.model.config, list[str]()
    if is_new and config.image_shape[0] == 3 and state.generator.device.type == "cpu" and settings.preset is None:
        remedies.append("`preset`=colour_cpu (settings that suit CPUs)")
    if not settings.zero_kl and settings.num_steps:
        remedies.append("`zero_kl` (no gradient through the chains)")
    if settings.batch_size > 16:
        remedies.append(f"`batch_size` below {settings.batch_size}")
    if is_new and config.num_filters > 16:
        remedies.append(f"`num_filters` below {config.num_filters}")
    if is_new and settings.dataset == "folder" and max(config.image_shape) > 32:
        remedies.append("`image_size`=32")
    if settings.num_steps > 10:
        remedies.append(f"`num_steps` below {settings.num_steps}")
    return remedies


def give_advice(remedies: Sequence[str]) -> str:
    """Return a clause about what to do where an iteration does not fit into memory."""
    return f"try {' or '.join(remedies)}" if remedies else "a machine with more memory would hold it"


def check_cost(
    train_step: TrainStep, state: State, settings: TrainSettings, workers: Workers, stop: int, *, is_new: bool
) -> str:
    """Return one or two lines about the cost of a run until the iteration `stop`; empty if it trains no further.

    Raises UsageError on all workers if an iteration does not fit into memory. The workers of one machine share the
    memory of its CPUs; a GPU is of one worker. Remedies are named if an iteration takes more than LONG seconds, or more
    than the share LARGE of the free memory.
    """
    if not settings.train or state.iteration >= stop:
        return ""
    with workers.busy(), show_waiting("estimating what an iteration takes"):
        cost = estimate_cost(train_step, state, settings)
    device = state.generator.device
    sharers = 1 if device.type == "cuda" else workers.launch.local_size
    free, need = find_free_device_memory(device), cost.memory * sharers
    remedies = list_remedies(settings, state, is_new=is_new)
    if workers.any(need > free):
        several = f", {describe_size(need)} for {sharers} workers" if sharers > 1 else ""
        raise UsageError(
            f"an iteration with these settings takes about {describe_size(cost.memory)} of memory{several}, and "
            f"{describe_size(free)} are free; {give_advice(remedies)}"
        )
    line = describe_cost(cost, stop - state.iteration)
    if state.acceleration.compiled or state.acceleration.captured:
        line += " (timed step by step and uncompiled; the run is faster)"
    if remedies and (cost.seconds > LONG or need > LARGE * free):
        line += f"\nnote: less time and memory: {', '.join(remedies)}"
    return cli.name_flags(line, type(settings))


def find_free_device_memory(device: torch.device) -> int:
    """Return how many bytes this process can still take on a device, what PyTorch keeps for later included."""
    if device.type != "cuda":
        return find_free_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept

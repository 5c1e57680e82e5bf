"""Choose by timing how this machine computes Langevin steps fastest; the choice is kept for later runs.

way, trials = choose_way(model, chain, batch_size, Way(), {"fold": [False], "threads": [1]}, steps=1000)

No processor is known by its name: what may differ between machines is timed for about a second, on the network and the
images of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import models
from ebm.settings import ChainPrecision, TrainSettings
from ebm.support.errors import UsageError
from ebm.support.hardware import (
    PRECISIONS,
    describe_processor,
    find_compiler_cache,
    has_bf16_instructions,
)
from ebm.support.reports import write_json
from ebm.training.acceleration import Chain
from ebm.training.chains import bind_chain
from ebm.training.distributed import Workers
from ebm.training.state import State
from sampling import CannotCompile, langevin

# Networks whose curves and figures cannot be told from those in float32 if their chains are in bf16 (docs/speed.md).
BF16_NETWORKS = ("MnistNet", "ResNet32")
GAIN = 1.05  # how many times as fast another way must be to replace the usual one
TRIAL = 0.05  # seconds that a timed chain should take
ROUNDS = 4
LONG = 600.0  # seconds of Langevin steps from which on compiling is tried, which takes up to a minute
EVALUATED = 16  # images of the timed chain of an evaluation
KEPT, LARGEST_FILE = 200, 1_000_000  # outcomes in the file that keeps them, and its bytes

Chains = TypeVar("Chains", bound=ChainPrecision)
Seconds = Callable[[Sequence["Way"]], list[float]]  # the best time of a chain in each of several ways


class Way(NamedTuple):
    """How energies in chains are computed; ways differ in speed and rounding alone.

    precision: one of PRECISIONS. fold, patches: see `models.WeightForm`. threads: of this process, on a CPU. compiled:
    the Langevin step is one compiled function.
    """

    precision: str = "float32"
    fold: bool = True
    patches: bool = True
    threads: int = 1
    compiled: bool = False

    @property
    def form(self) -> models.WeightForm:
        """The form of prepared weights."""
        return models.WeightForm(fold=self.fold, patches=self.patches)

    def describe(self, field: str) -> str:
        """Return the value of a field in words."""
        words = {
            "precision": self.precision,
            "fold": "pooling folded" if self.fold else "pooling not folded",
            "patches": "one channel as patches" if self.patches else "one channel directly",
            "threads": f"{self.threads} thread" + "s" * (self.threads > 1),
            "compiled": "steps compiled" if self.compiled else "steps not compiled",
        }
        return words[field]


Alternatives = dict[str, list[Any]]  # field of a way -> values to try besides the usual one, the best guess first


# ---- the way of a run ----


def tune_run(state: State, settings: TrainSettings, workers: Workers, steps: int, contents: Mapping[str, Any]) -> str:
    """Choose how a run computes its chains, set it, and return a line about it, empty on a GPU.

    A resumed run keeps the way that it had, so that it goes on bit for bit; settings that are given win over that.
    steps: the Langevin steps that are to come. contents: those of the checkpoint that is resumed, if any.
    """
    pinned, on_cpu = list_pinned(settings, state), state.generator.device.type == "cpu"
    way, trials = get_way(state)._replace(**pinned), ""
    alternatives = list_alternatives(state.model, allow_bf16=settings.has_plain_chains)
    if contents:
        before = recall_way(contents, on_cpu=on_cpu)
        way = way._replace(**{field: value for field, value in before.items() if field not in pinned})
    elif on_cpu and settings.tune:
        open_fields = {field: values for field, values in alternatives.items() if field not in pinned}
        if workers.size > 1:
            open_fields.pop("threads", None)  # the cores are shared out already
        if workers.rank == 0:
            timed = dataclasses.replace(settings, num_steps=1, zero_kl=True, hmc=False)
            chain = bind_chain(state.model, timed, torch.Generator())
            batch_size = settings.num_chains or settings.batch_size
            with workers.busy():
                way, trials = choose_way(state.model, chain, batch_size, way, open_fields, steps=steps)
        way = Way(*workers.share(list(way))[0])
    use_way(way, state)
    fields = [field for field in Way._fields if field in alternatives or field in ("precision", "threads")]
    return "chains: " + ", ".join(map(way.describe, fields)) + trials if on_cpu else ""


def list_pinned(settings: TrainSettings, state: State) -> dict[str, Any]:
    """Return the fields of the way that the settings or the environment leave no choice about, with their values."""
    pinned: dict[str, Any] = {"fold": settings.fold, "patches": settings.patches, "threads": settings.threads}
    if "OMP_NUM_THREADS" in os.environ and settings.threads is None:
        pinned["threads"] = torch.get_num_threads()
    if settings.precision != "auto":
        pinned["precision"] = state.acceleration.precision
    if settings.compile is not None:
        pinned["compiled"] = state.acceleration.compiled
    return {field: value for field, value in pinned.items() if value is not None}


def list_alternatives(model: models.EnergyNetwork, *, allow_bf16: bool) -> Alternatives:
    """Return the values of a way that can make a difference on this machine and for this network.

    allow_bf16: whether the chains are of the kind that was compared in bf16 and float32, plain Langevin steps. Only
    such chains can be compiled, too.
    """
    convolutions = [module for module in model.modules() if isinstance(module, models.Conv)]
    alternatives: Alternatives = {}
    if allow_bf16 and model.config.network in BF16_NETWORKS and has_bf16_instructions():
        alternatives["precision"] = ["bf16"]
    if any(conv.pooled for conv in convolutions):
        alternatives["fold"] = [False]
    if any(conv.weight.shape[1] == 1 for conv in convolutions):
        alternatives["patches"] = [False]
    threads = torch.get_num_threads()
    alternatives["threads"] = [threads >> k for k in range(1, threads.bit_length())]
    if allow_bf16 and has_compiler():
        alternatives["compiled"] = [True]
    return alternatives


def get_way(state: State) -> Way:
    """Return how a run computes its chains now."""
    form, acceleration = state.model.form, state.acceleration
    return Way(acceleration.precision, form.fold, form.patches, torch.get_num_threads(), acceleration.compiled)


def use_way(way: Way, state: State) -> None:
    """Let a run compute its chains in this way, and this process have so many threads."""
    state.acceleration.precision, state.acceleration.compiled = way.precision, way.compiled
    for model in (state.model, state.ema):
        if model is not None:
            model.form = way.form
    torch.set_num_threads(way.threads)


def recall_way(contents: Mapping[str, Any], *, on_cpu: bool) -> dict[str, Any]:
    """Return the fields of the way in which the run of a checkpoint computed; none if it was on another kind of device.

    Checkpoints of earlier versions hold the number type alone. A machine with fewer cores gets fewer threads.
    """
    way = contents.get("way") or {"precision": contents.get("precision", "float32")}
    was_on_cpu = way.get("on_cpu", way["precision"] not in ("fp16", "tf32"))
    if was_on_cpu != on_cpu:
        return {}
    fields = {field: way[field] for field in Way._fields if field in way}
    return fields | {"threads": min(fields.get("threads", torch.get_num_threads()), torch.get_num_threads())}


def has_compiler() -> bool:
    """Return whether a C compiler is on the PATH, which PyTorch's compiler needs."""
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def settle_precision(settings: Chains, model: models.EnergyNetwork, workers: Workers) -> Chains:
    """Return the settings of an evaluation with a number type for "auto": the faster one of float32 and bf16.

    It depends on the network and the machine alone, so that images do not depend on how many there are. It is float32
    on a GPU, and for networks whose figures were not compared in bf16.
    """
    if settings.precision != "auto":
        return settings
    usual = Way(threads=torch.get_num_threads())
    on_cpu = next(model.parameters()).device.type == "cpu"
    tried = list_alternatives(model, allow_bf16=on_cpu).get("precision", [])
    if not tried:
        return dataclasses.replace(settings, precision=usual.precision)

    def chain(weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
        return langevin(models.PreparedEnergy(model, weights).under(labels), x, num_steps=1, step_lr=1.0)

    way, trials = usual, ""
    if workers.rank == 0:
        way, trials = choose_way(model, chain, EVALUATED, usual, {"precision": tried}, steps=0)
    precision = workers.share(way.precision)[0]
    if precision != usual.precision:
        print(f"note: chains are computed in {precision}{trials}; precision={usual.precision} is exact")
    return dataclasses.replace(settings, precision=precision)


# ---- the search ----


def choose_way(
    model: models.EnergyNetwork,
    chain: Chain,
    batch_size: int,
    usual: Way,
    alternatives: Alternatives,
    *,
    steps: int,
) -> tuple[Way, str]:
    """Return the fastest way to compute chains of this network on this machine, and words about what was timed.

    chain: of one step; it must not draw from generators that results depend on. batch_size: of the chains. usual: the
    way that another must beat. steps: how many steps are to come; if they are many, compiling is tried as well.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")  # of the instructions that convolutions may use
    about = {
        "machine": [describe_processor(), limit, os.cpu_count(), torch.get_num_threads(), torch.__version__],
        "network": dataclasses.asdict(model.config),
        "batch": batch_size,
    }

    def search(count: int, way: Way, tried: Alternatives) -> dict[str, Any]:
        measure = functools.partial(time_ways, model, chain, count)
        way, trials = find_fastest_way(measure, way, tried)
        return {"way": list(way), "trials": trials, "seconds": measure([way])[0] * batch_size / count}

    eager = {field: values for field, values in alternatives.items() if field != "compiled"}
    found = recall_search(
        about, usual, eager, lambda: search(choose_count(model, chain, usual, batch_size), usual, eager)
    )
    way, trials = Way(*found["way"]), found["trials"]
    if "compiled" in alternatives and not way.compiled and found["seconds"] * steps > LONG:
        print("compiling a Langevin step, to see whether that is faster here; this takes up to a minute", flush=True)
        compiled = {"compiled": [True]}
        found = recall_search(about, way, compiled, lambda: search(batch_size, way, compiled))
        way, trials = Way(*found["way"]), trials + found["trials"]
    return way, f"; timed: {', '.join(trials)}" if trials else ""


def find_fastest_way(measure: Seconds, usual: Way, alternatives: Alternatives) -> tuple[Way, list[str]]:
    """Return the fastest way, and how many times as fast each one tried was as the best before it.

    One field of the way is varied after the other. A new value must be GAIN times as fast as the best one; further
    values of a field are tried as long as that gains.
    """
    best, trials = usual, []
    for field, values in alternatives.items():
        for value in values:
            other = best._replace(**{field: value})
            try:
                before, now = measure([best, other])
            except CannotCompile:
                trials.append("the Langevin step cannot be compiled")
                break
            trials.append(f"{other.describe(field)} {before / now:.2f}x")
            if before < GAIN * now:
                break
            best = other
    return best, trials


def choose_count(model: models.EnergyNetwork, chain: Chain, way: Way, batch_size: int) -> int:
    """Return the number of images, at most a batch, whose chain takes about TRIAL seconds."""
    return max(1, min(batch_size, int(TRIAL / time_ways(model, chain, 1, [way])[0])))


def time_ways(model: models.EnergyNetwork, chain: Chain, count: int, ways: Sequence[Way]) -> list[float]:
    """Return the best time of a chain of `count` images in each of several ways, in seconds.

    The ways take turns, so that other work on the machine slows all of them. The first turn, which warms up, does not
    count. Random generators and the number of threads stay as they are.
    """
    config, best, threads = model.config, [float("inf")] * len(ways), torch.get_num_threads()
    x = models.draw_noise_images(config, count, torch.Generator().manual_seed(0))
    labels = torch.zeros(count, config.label_size) if config.label_size else None
    weights = [prepare_weights(model, way) for way in ways]
    try:
        with torch.random.fork_rng([]):
            for turn in range(ROUNDS + 1):
                for number, way in enumerate(ways):
                    seconds = time_chain(chain, weights[number], x, labels, way)
                    best[number] = min(best[number], seconds) if turn else best[number]
    finally:
        torch.set_num_threads(threads)
    return best


@torch.no_grad()
def prepare_weights(model: models.EnergyNetwork, way: Way) -> models.Weights:
    """Return the frozen weights of a chain that is computed in this way."""
    return models.detach(model.prepare(form=way.form), PRECISIONS[way.precision])


def time_chain(chain: Chain, weights: models.Weights, x: Tensor, labels: Tensor | None, way: Way) -> float:
    """Return the seconds of a chain on a CPU; another number of threads than before is started first."""
    if torch.get_num_threads() != way.threads:
        torch.set_num_threads(way.threads)
        chain(weights, x, labels, way.compiled)
    start = time.perf_counter()
    chain(weights, x, labels, way.compiled)
    return time.perf_counter() - start


def recall_search(
    about: Mapping[str, Any], usual: Way, alternatives: Alternatives, search: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return search(), or its outcome in an earlier process on this machine: way, trials and seconds.

    Outcomes are kept in the folder of torch's compiled functions, in ways.json. The first one stays, so that two runs
    with the same settings compute in the same way. A file that cannot be read or written is done without.
    """
    path, key = find_compiler_cache() / "ways.json", json.dumps([about, usual, alternatives])

    def read_outcomes() -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_size < LARGEST_FILE:
                outcomes = json.loads(path.read_text(encoding="utf-8"))
                return outcomes if isinstance(outcomes, dict) else {}
        return {}

    if is_outcome(read_outcomes().get(key), usual, alternatives):
        return read_outcomes()[key]
    outcome = search()
    outcomes = read_outcomes()
    if is_outcome(outcomes.get(key), usual, alternatives):  # of a process that was faster
        return outcomes[key]
    with contextlib.suppress(UsageError):
        write_json(path, dict(list(outcomes.items())[-KEPT:]) | {key: outcome})
    return outcome


def is_outcome(value: Any, usual: Way, alternatives: Alternatives) -> bool:
    """Return whether a value that was read from a file is an outcome of a search."""
    if not isinstance(value, dict) or not isinstance(value.get("way"), list) or len(value["way"]) != len(Way._fields):
        return False
    allowed = [[before, *alternatives.get(field, [])] for field, before in zip(Way._fields, usual, strict=True)]
    has_way = all(field in values for field, values in zip(value["way"], allowed, strict=True))
    trials, seconds = value.get("trials"), value.get("seconds")
    has_trials = isinstance(trials, list) and all(isinstance(trial, str) for trial in trials)
    return has_way and has_trials and isinstance(seconds, float)

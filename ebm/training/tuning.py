"""Choose by timing how this machine computes Langevin steps fastest; the choice is kept for later runs.

outcome = choose_way(model, chain, batch_size, Way(), {"fold": [False], "patches": [False]})

No processor is known by its name: what may differ between machines is timed for a few seconds, on the network and the
images of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor

import models
from ebm.readers.bounded import read_json
from ebm.settings import ChainPrecision, TrainSettings
from ebm.support import cli
from ebm.support.errors import UsageError
from ebm.support.hardware import (
    PRECISIONS,
    allow_tf32,
    can_compute_bf16,
    describe_processor,
    find_compiler_cache,
    has_compiler,
)
from ebm.support.progress import show_waiting
from ebm.support.reports import write_json
from ebm.training.acceleration import Chain
from ebm.training.chains import bind_chain
from ebm.training.distributed import Workers
from ebm.training.state import State
from sampling import CannotCompile, langevin

# Networks whose curves and figures cannot be told from those in float32 if their chains are in bf16 (docs/speed.md).
BF16_NETWORKS = ("MnistNet", "DspritesNet", "ResNet32")
GAIN = 1.05  # how many times as fast another way must be to replace the usual one
TRIAL = 0.05  # seconds that a timed chain should take
ROUNDS = 4
LONG_CHAINS = 600.0  # seconds of a run's Langevin steps from which on compiling is tried, which takes about a minute
BUSY = 0.5  # load of each core, averaged over a minute, from which on a machine is busy with other work
EVALUATED = 16  # images of the timed chain of an evaluation
TIMING = "timing in which way chains are computed fastest here"
KEPT, LARGEST_FILE = 200, 1_000_000  # outcomes in the file that keeps them, and its bytes
FORMAT = 2  # of the outcomes; another number makes the kept ones void, as when networks are computed in another way

Settled = TypeVar("Settled", bound=ChainPrecision)
Stopwatch = Callable[[Sequence["Way"]], list[float]]  # returns the best time of a chain in each of several ways


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


def tune_run(state: State, settings: TrainSettings, workers: Workers, contents: Mapping[str, Any]) -> str:
    """Choose how a run computes its chains, set it, and return words about what was timed.

    A resumed run keeps the way that it had, so that it goes on bit for bit; settings that are given win over that. Only
    on a CPU is anything timed. contents: those of the checkpoint that is resumed, if any.
    """
    pinned, on_cpu = list_pinned(settings, state), state.generator.device.type == "cpu"
    way, trials = get_way(state)._replace(**pinned), ""
    before = recall_way(contents, settings, on_cpu=on_cpu) if contents else {}
    if before:
        way = way._replace(**{field: value for field, value in before.items() if field not in pinned})
        if way.precision == "bf16" and "precision" not in pinned and on_cpu and not can_compute_bf16():
            print("note: this run is in bf16, which this CPU has no instructions for; precision=float32 is faster")
    elif on_cpu and settings.tune and settings.num_steps:
        alternatives = list_alternatives(state.model, allow_bf16=settings.has_plain_chains)
        tried = {field: values for field, values in alternatives.items() if field not in pinned}
        if workers.rank == 0:
            chain, batch_size = bind_step(state, settings), count_chains(settings)
            with workers.busy(), show_waiting(TIMING):
                outcome = choose_way(state.model, chain, batch_size, way, tried)
                way, found = outcome.way, outcome.trials
                if workers.size == 1 and "threads" not in pinned:  # otherwise the cores are shared out already
                    way, more = choose_threads(state.model, chain, batch_size, way)
                    found = [*found, *more]
            trials = describe_trials(found)
        way = Way(*workers.share(list(way))[0])._replace(threads=way.threads)
    use_way(way, state)
    return trials


def tune_compiler(state: State, settings: TrainSettings, workers: Workers, stop: int) -> str:
    """Compile the Langevin step of a run if that is faster here, and return words about it.

    It is tried on a CPU, for new runs whose steps until the iteration `stop` will take long.
    """
    way, trials = get_way(state), ""
    is_open = settings.tune and settings.train and settings.compile is None and settings.has_plain_chains
    if not (is_open and state.generator.device.type == "cpu" and state.iteration == 0 and settings.num_steps):
        return trials
    if workers.rank == 0 and has_compiler():
        search = functools.partial(choose_way, state.model, bind_step(state, settings), count_chains(settings), way)
        with workers.busy():
            with show_waiting(TIMING):
                seconds = search({}).seconds
            if seconds * settings.num_steps * stop > LONG_CHAINS:
                print(
                    "compiling a Langevin step, to see whether that is faster here, which takes about a minute",
                    flush=True,
                )
                try:
                    with show_waiting("compiling a Langevin step"):
                        outcome = search({"compiled": [True]}, count=count_chains(settings))
                    way, trials = outcome.way, describe_trials(outcome.trials)
                except CannotCompile as error:
                    trials = f"; the step cannot be compiled ({error})"
    way = Way(*workers.share(list(way))[0])._replace(threads=way.threads)
    use_way(way, state)
    return trials


def describe_way(state: State) -> str:
    """Return how a run computes its chains, in words, as far as that can differ for its network."""
    way, alternatives = get_way(state), list_alternatives(state.model, allow_bf16=True)
    fields = [field for field in Way._fields if field in alternatives or field in ("precision", "threads", "compiled")]
    return ", ".join(map(way.describe, fields))


def describe_trials(trials: Sequence[str]) -> str:
    """Return what was timed as the end of a line."""
    return f"; timed: {', '.join(trials)}" if trials else ""


def bind_step(state: State, settings: TrainSettings) -> Chain:
    """Return a chain of one step as a run computes it, which draws from a generator of its own."""
    step = dataclasses.replace(settings, num_steps=1, zero_kl=True, hmc=False)
    return bind_chain(state.model, step, torch.Generator())


def count_chains(settings: TrainSettings) -> int:
    """Return the number of chains of an iteration."""
    return settings.num_chains or settings.batch_size


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

    allow_bf16: whether the chains are of the kind that was compared in bf16 and float32, plain Langevin steps.
    """
    layers = [module for module in model.modules() if isinstance(module, models.NormalizedLayer)]
    alternatives: Alternatives = {}
    if allow_bf16 and model.config.network in BF16_NETWORKS and can_compute_bf16():
        alternatives["precision"] = ["bf16"]
    if any(isinstance(layer, models.Conv) and layer.pooled for layer in layers):
        alternatives["fold"] = [False]
    if any(layer.takes_patches for layer in layers):
        alternatives["patches"] = [False]
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


def recall_way(contents: Mapping[str, Any], settings: TrainSettings, *, on_cpu: bool) -> dict[str, Any]:
    """Return the fields of the way in which the run of a checkpoint computed; none if it was on another kind of device.

    Checkpoints of earlier versions hold the number type alone. A machine with fewer cores gets fewer threads. Chains of
    another kind than the run had, and kernels that must be deterministic, are computed in the usual way.
    """
    way = contents.get("way") or {"precision": contents.get("precision", "float32")}
    was_on_cpu = way.get("on_cpu", way["precision"] not in ("fp16", "tf32"))
    if was_on_cpu != on_cpu:
        return {}
    fields = {field: way[field] for field in Way._fields if field in way}
    if not settings.has_plain_chains and {"zero_kl", "hmc"} & set(settings.given_names):
        fields = {field: value for field, value in fields.items() if field not in ("precision", "compiled")}
    if settings.deterministic and not on_cpu:
        fields.pop("compiled", None)
    return fields | {"threads": min(fields.get("threads", torch.get_num_threads()), torch.get_num_threads())}


# ---- the way of an evaluation ----


def settle_precision(settings: Settled, model: models.EnergyNetwork, workers: Workers) -> Settled:
    """Return the settings of an evaluation with a number type for "auto": the faster one of float32 and bf16.

    It depends on the network and the machine alone, so that images do not depend on how many there are. It is float32
    on a GPU, and for networks whose figures were not compared in bf16.
    """
    if settings.precision != "auto":
        return settings
    way, trials = Way(threads=torch.get_num_threads()), ""
    on_cpu = next(model.parameters()).device.type == "cpu"
    tried = list_alternatives(model, allow_bf16=on_cpu).get("precision", [])
    if tried and workers.rank == 0 and not cli.find_obstacle(settings, "precision"):

        def chain(weights: models.Weights, x: Tensor, labels: Tensor | None, compiled: bool) -> Tensor:
            return langevin(models.PreparedEnergy(model, weights).under(labels), x, num_steps=1, step_lr=1.0)

        with show_waiting(TIMING):
            outcome = choose_way(model, chain, EVALUATED, way, {"precision": tried})
        way, trials = outcome.way, describe_trials(outcome.trials)
    precision = workers.share(way.precision)[0]
    if precision != "float32":
        print(f"note: chains are computed in {precision}{trials}; precision=float32 is exact")
    return dataclasses.replace(settings, precision=precision)


# ---- the search ----


class Outcome(NamedTuple):
    """What a search has found: the fastest way, words about each trial, and the seconds of a step of a whole batch."""

    way: Way
    trials: list[str]
    seconds: float


def choose_way(
    model: models.EnergyNetwork,
    chain: Chain,
    batch_size: int,
    usual: Way,
    alternatives: Alternatives,
    *,
    count: int | None = None,
) -> Outcome:
    """Return the fastest way to compute chains of this network on this machine, see `find_fastest_way`.

    chain: of one step; it must not draw from generators that results depend on. batch_size: of the chains. usual: the
    way that another must beat. count: the number of images to time; default: as many as take about TRIAL seconds. The
    outcome is that of an earlier process if one has searched for the same.
    """

    def search() -> Outcome:
        images = count or choose_count(model, chain, start, batch_size)
        way, trials = find_fastest_way(functools.partial(time_ways, model, chain, images), start, alternatives)
        return Outcome(way, trials, time_ways(model, chain, images, [way])[0] * batch_size / images)

    about = {
        "format": FORMAT,
        "processor": [describe_processor(), os.environ.get("ONEDNN_MAX_CPU_ISA"), os.cpu_count()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "network": dataclasses.asdict(model.config),
        "batch": batch_size,
    }
    # A compiled step takes long to try in each way. What is fastest without it is taken for both.
    start = usual._replace(compiled=False)
    outcome = recall_outcome(about, start, alternatives, search)
    return outcome._replace(way=outcome.way._replace(compiled=usual.compiled or outcome.way.compiled))


def choose_threads(model: models.EnergyNetwork, chain: Chain, batch_size: int, way: Way) -> tuple[Way, list[str]]:
    """Return a way with the fastest number of threads, and words about the trials; see `choose_way`.

    Half of them are tried, a quarter, and so on. Other work on the machine makes many threads slow, for they wait for
    the slowest one: nothing is tried on a busy machine, and the outcome is not kept for later.
    """
    if os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        return way, []
    fewer = [way.threads >> k for k in range(1, way.threads.bit_length())]
    plain = way._replace(compiled=False)
    count = choose_count(model, chain, plain, batch_size)
    best, trials = find_fastest_way(functools.partial(time_ways, model, chain, count), plain, {"threads": fewer})
    return way._replace(threads=best.threads), trials


def find_fastest_way(measure: Stopwatch, usual: Way, alternatives: Alternatives) -> tuple[Way, list[str]]:
    """Return the fastest way, and how many times as fast each one tried was as the best before it.

    One field of the way is varied after the other. A new value must be GAIN times as fast as the best one; further
    values of a field are tried as long as that gains. Raises CannotCompile if compiling is an alternative and fails.
    """
    best, trials = usual, []
    for field, values in alternatives.items():
        for value in values:
            other = best._replace(**{field: value})
            before, now = measure([best, other])
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
    with allow_tf32(way.precision):  # as in a run, because a compiled step is compiled for one setting
        if torch.get_num_threads() != way.threads:
            torch.set_num_threads(way.threads)
            chain(weights, x, labels, way.compiled)
        start = time.perf_counter()
        chain(weights, x, labels, way.compiled)
        return time.perf_counter() - start


def recall_outcome(
    about: Mapping[str, Any], usual: Way, alternatives: Alternatives, search: Callable[[], Outcome]
) -> Outcome:
    """Return search(), or its outcome in an earlier process on this machine.

    Outcomes are kept in the folder of torch's compiled functions, in ways.json. The first one stays, so that two runs
    with the same settings compute in the same way. A file that cannot be read or written is done without.
    """
    path, key = find_compiler_cache() / "ways.json", json.dumps([about, usual, alternatives])

    def read_outcomes() -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            outcomes = read_json(path, LARGEST_FILE)
            return outcomes if isinstance(outcomes, dict) else {}
        return {}

    kept = read_outcomes().get(key)
    if not is_outcome(kept, usual, alternatives):
        found = search()
        outcomes = read_outcomes()
        kept = outcomes.get(key)  # of a process that was faster
        if not is_outcome(kept, usual, alternatives):
            with contextlib.suppress(UsageError):
                write_json(path, dict(list(outcomes.items())[-KEPT:]) | {key: found._asdict()})
            return found
    return Outcome(Way(*kept["way"]), kept["trials"], kept["seconds"])


def is_outcome(value: Any, usual: Way, alternatives: Alternatives) -> TypeGuard[dict[str, Any]]:
    """Return whether a value that was read from a file is an outcome of a search."""
    if not isinstance(value, dict) or not isinstance(value.get("way"), list) or len(value["way"]) != len(usual):
        return False
    allowed = [[before, *alternatives.get(field, [])] for field, before in usual._asdict().items()]
    for found, values in zip(value["way"], allowed, strict=True):
        if not any(type(found) is type(each) and found == each for each in values):
            return False
    trials = value.get("trials")
    are_words = isinstance(trials, list) and all(isinstance(trial, str) and trial.isprintable() for trial in trials)
    return are_words and type(value.get("seconds")) is float and 0 < value["seconds"] < math.inf

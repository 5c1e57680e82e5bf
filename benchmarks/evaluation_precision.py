"""Evaluate the shipped models with chains in several number types, and compare the figures over several seeds.

    python benchmarks/evaluation_precision.py --seeds=6 --output=benchmarks/evaluation_precision.json
    python benchmarks/evaluation_precision.py --device=cuda --jobs=8 --precisions=float32,bf16,fp16

The evaluations are samples and restored images of the digits, garments that are recognised as their class, and combined
concepts of dSprites. Each is called with every seed in every number type. The table has the mean over the seeds in the
first number type, the standard deviation between them, and for each other number type the mean difference, paired by
seed, with its standard error. The figures are written after every call.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shlex
import statistics
import sys
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import timing
from calls import Call, run_calls
from ebm.settings import DEVICES
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.experiments import SHIPPED
from ebm.support.hardware import PRECISIONS
from ebm.support.reports import format_table, print_written


class Evaluation(NamedTuple):
    """A call of a script that reports figures on a shipped model."""

    script: str
    words: str
    report: str  # the file of its figures, below the folder of results
    keys: tuple[tuple[str | int, ...], ...]  # where each figure is in this file


DIGITS = "--exp=digits_cond"
EVALUATIONS = {
    "samples": Evaluation(
        "eval_inception",
        f"{DIGITS} --ensemble=1 --step_lr=100 --proj_norm=0 --im_number=1000 --repeat_scale=2 --nomix=2",
        "digits_cond/eval_inception_0/eval_inception.json",
        (("results", 0, "figures", "classifier Fréchet distance"),),
    ),
    "concepts": Evaluation(
        "ebm_combine",
        "--weights=pos=3,rot=1.5 --num_steps=200 --step_lr=50 --first_step_lr=400 --first_noise=0.1 --limit=64",
        "combine/conceptcombine/conceptcombine.json",
        (
            *(("figures", f"right, {name}", "by nearest") for name in ("size", "shape", "pos", "rot")),
            ("figures", "right, size & shape & pos & rot", "by nearest"),
        ),
    ),
    "restored": Evaluation(
        "ebm_sandbox",
        f"--task=boxcorrupt {DIGITS} --limit=200 --num_steps=20",
        "digits_cond/boxcorrupt/boxcorrupt.json",
        (("figures", "test MSE mean"),),
    ),
    "democlass": Evaluation(
        "ebm_sandbox",
        "--task=democlass --exp=fashion_cond --num_steps=40",
        "fashion_cond/democlass/democlass.json",
        (("figures", "recognised as their class"),),
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    evaluations: tuple[str, ...] = flag(tuple(EVALUATIONS), "which evaluations", choices=tuple(EVALUATIONS))
    precisions: tuple[str, ...] = flag(
        ("float32", "bf16"), "number types, which are compared with the first one", choices=tuple(PRECISIONS)
    )
    seeds: int = flag(6, "calls of each evaluation in each number type, from different seeds", at_least=2)
    call_flags: str = flag("", "more flags for all calls")
    device: str = flag("auto", "where to compute, as in the scripts", choices=DEVICES)
    jobs: int = flag(1, "calls at a time", at_least=1)
    logdir: str = flag("sandbox_cachedir/evaluation_precision", "folder of the results", is_path=True)


class Case(NamedTuple):
    """An evaluation in one number type with one seed."""

    evaluation: str
    precision: str
    seed: int

    def find_folder(self, settings: Settings) -> pathlib.Path:
        """Return the folder of this call's results."""
        return pathlib.Path(settings.logdir) / f"{self.precision}_{self.seed}"

    def plan_call(self, settings: Settings) -> Call:
        """Return the call that makes this evaluation."""
        evaluation = EVALUATIONS[self.evaluation]
        words = [*shlex.split(evaluation.words), f"--modeldir={SHIPPED}", f"--logdir={self.find_folder(settings)}"]
        words += [f"--seed={self.seed}", f"--precision={self.precision}", f"--device={settings.device}"]
        return Call(evaluation.script, (*words, *shlex.split(settings.call_flags)))

    def read_figures(self, settings: Settings) -> dict[str, float]:
        """Return the figures of this evaluation by name, after its call."""
        evaluation = EVALUATIONS[self.evaluation]
        contents = json.loads((self.find_folder(settings) / evaluation.report).read_text(encoding="utf-8"))
        return {
            ", ".join(filter(lambda word: word not in ("results", "0", "figures"), map(str, keys))): functools.reduce(
                lambda part, key: part[key], keys, contents
            )
            for keys in evaluation.keys
        }


Figures = dict[tuple[str, str], dict[int, float]]  # (figure, number type) -> seed -> value


def compare_precisions(figures: Figures, precisions: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return for each figure and number type its mean difference from the first number type, over the common seeds.

    A row also has the figure's mean in the first number type, its standard deviation between seeds, and the standard
    error of the difference. There is no row with fewer than two seeds.
    """
    rows = []
    for name in dict.fromkeys(name for name, _ in figures):
        first = figures.get((name, precisions[0]), {})
        for precision in precisions[1:]:
            other = figures.get((name, precision), {})
            seeds = sorted(set(first) & set(other))
            if len(seeds) < 2:
                continue
            values = [first[seed] for seed in seeds]
            differences = [other[seed] - first[seed] for seed in seeds]
            rows.append(
                {
                    "figure": name,
                    "precision": precision,
                    f"mean in {precisions[0]}": statistics.fmean(values),
                    "between seeds": statistics.stdev(values),
                    "difference": statistics.fmean(differences),
                    "standard error": statistics.stdev(differences) / math.sqrt(len(seeds)),
                    "seeds": len(seeds),
                }
            )
    return rows


def plan_calls(settings: Settings) -> dict[Call, Case]:
    """Return the calls of all cases, one seed after another."""
    cases = [
        Case(evaluation, precision, seed)
        for seed in range(settings.seeds)
        for evaluation in settings.evaluations
        for precision in settings.precisions
    ]
    return {case.plan_call(settings): case for case in cases}


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    plan = plan_calls(settings)
    rows: list[dict[str, Any]] = []
    figures: Figures = {}
    for call in run_calls(list(plan), settings.jobs):
        case = plan[call]
        for name, value in case.read_figures(settings).items():
            rows.append({"figure": name, **case._asdict(), "value": value})
            figures.setdefault((name, case.precision), {})[case.seed] = value
        if settings.output:
            timing.write_rows(settings, rows, compared=compare_precisions(figures, settings.precisions))
    if not rows:
        raise UsageError("no call ended well, see above")
    compared = compare_precisions(figures, settings.precisions)
    table = {f"{row.pop('figure')}, {row.pop('precision')}": row for row in compared}
    print(format_table(table) if table else "there are fewer than two number types or seeds to compare")
    print_written(map(pathlib.Path, filter(None, [settings.output, settings.logdir])))


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

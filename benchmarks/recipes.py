"""Train one small network by several recipes, one change each, and plot the quality of the samples.

    python benchmarks/recipes.py --output=benchmarks/recipes.json      # and recipes.png
    python benchmarks/recipes.py --precisions=float32,bf16 --seeds=4 --output=benchmarks/precision_digits.json
    python benchmarks/recipes.py --device=cuda --jobs=8 --precisions=float32,bf16,fp16 --seeds=6

Quality is the classifier Fréchet distance and the patch distance of train.py --quality. Each recipe changes settings of
the preset: "noise" starts chains from noise, "gauss" from a normal distribution of each class. --precisions compares
number types of the unchanged preset instead; with --emulate_bf16 also on a CPU without instructions for bf16, which
would take many times as long. The folders of the runs stay in --logdir.

With several seeds, every recipe is compared with the first one by a t-test, paired by seed, of the logarithm of the
distance, averaged over the second half of each run. Runs that fail are left out, and so is their seed in this test. The
figures are written after every run.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import timing
from calls import Call, run_calls
from ebm.settings import DEVICES
from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.hardware import PRECISIONS
from ebm.support.logs import read_series
from ebm.support.reports import print_written

NOISE = "--datasource=random --step_lr=100"
PUBLISHED = f"{NOISE} --replay_rate=0.95 --sample_steps=100 --lr_schedule=constant"
RECIPES = {
    "noise, replay 95 %, lr 3e-4, as published": f"{PUBLISHED} --lr=3e-4",
    "noise, replay 95 %, lr 1e-2": PUBLISHED,
    "noise, replay 95 %, cosine": f"{NOISE} --replay_rate=0.95 --sample_steps=100",
    "noise, no replay, 30 steps": f"{NOISE} --noreplay_batch --num_steps=30 --sample_steps=30 --lr=5e-3",
    "gauss, replay 50 %": "",
    "gauss, no replay": "--noreplay_batch",
    "gauss, constant lr": "--lr_schedule=constant",
    "gauss, step size 100": "--step_lr=100",
    "gauss, rank 8": "--start_rank=8",
}
# The figures that are plotted, on logarithmic axes.
PANELS = {"feature_distance": "classifier Fréchet distance", "patch_distance": "patch distance"}

# Further figures of the JSON file.
OTHERS = {
    "feature_precision": "precision",
    "feature_recall": "recall",
    "patch_distance": "patches",
    "tone_distance": "tones",
}


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    preset: str = flag("digits_cpu", "the settings that all runs share")
    train_flags: str = flag("", "more flags of train.py for all runs")
    recipes: int = flag(len(RECIPES), "number of recipes, the first ones", at_least=1)
    precisions: tuple[str, ...] = flag((), "compare these number types instead", choices=tuple(PRECISIONS))
    emulate_bf16: bool = flag(False, "on a CPU without bf16: compute in float32, rounded to bf16 after each layer")
    seeds: int = flag(1, "runs per recipe, from different seeds", at_least=1)
    max_iter: int = flag(400, "iterations of a run", at_least=1)
    test_interval: int = flag(50, "iterations between measurements", at_least=1)
    device: str = flag("auto", "where to train, as in train.py", choices=DEVICES)
    jobs: int = flag(1, "runs at a time", at_least=1)
    logdir: str = flag("cachedir/recipes", "folder of the runs", is_path=True)
    output: str = flag("", "also write the figures to this JSON file, and a plot beside it", is_path=True)


Runs = dict[str, dict[int, pathlib.Path]]  # recipe -> seed -> the folder of the run


def choose_recipes(settings: Settings) -> dict[str, str]:
    """Return the flags of each recipe that the settings ask for, by its name."""
    if settings.precisions:
        return {name: f"--precision={name}" for name in settings.precisions}
    return dict(list(RECIPES.items())[: settings.recipes])


def plan_calls(settings: Settings) -> dict[Call, tuple[str, int]]:
    """Return the calls of train.py, each with its recipe and its seed.

    One seed by all recipes comes after another, so that a benchmark that is broken off can still compare them.
    """
    calls = {}
    for seed in range(settings.seeds):
        for recipe, flags in choose_recipes(settings).items():
            words = [f"--preset={settings.preset}", f"--logdir={settings.logdir}", f"--seed={seed}"]
            words += [f"--exp={find_folder(settings, recipe, seed).name}", "--quality"]
            words += [f"--max_iter={settings.max_iter}", f"--test_interval={settings.test_interval}"]
            words += ["--num_samples=200", "--precision=float32", f"--device={settings.device}"]
            words += [*shlex.split(settings.train_flags), *shlex.split(flags)]
            calls[Call("train", tuple(words))] = recipe, seed
    return calls


def find_folder(settings: Settings, recipe: str, seed: int) -> pathlib.Path:
    """Return the folder of a run."""
    return pathlib.Path(settings.logdir) / f"{list(choose_recipes(settings)).index(recipe)}_{seed}"


def join_series(folders: list[pathlib.Path], key: str) -> tuple[list[float], list[float]]:
    """Return a logged figure of several runs as one line (x, y), with a gap between runs."""
    x: list[float] = []
    y: list[float] = []
    for iterations, values in (read_series(folder, key) for folder in folders):
        x += [*iterations, math.nan]
        y += [*values, math.nan]
    return x, y


def average_log_distance(folder: pathlib.Path) -> float:
    """Return the mean logarithm of a run's distances over its second half."""
    distances = read_series(folder, "feature_distance")[1]
    return statistics.fmean(map(math.log, distances[len(distances) // 2 :]))


def compare_recipes(runs: Runs) -> list[dict[str, Any]]:
    """Compare the distances of every recipe with those of the first one, over the seeds that all of them finished.

    Each row has the ratio of the distances, its 95 % confidence interval and the p value of the paired t-test. There is
    no row with fewer than two seeds.
    """
    import scipy.stats

    first, *others = runs
    seeds = sorted(set.intersection(*map(set, runs.values())))
    if len(seeds) < 2:
        return []
    outcomes = {name: [average_log_distance(folders[seed]) for seed in seeds] for name, folders in runs.items()}
    rows = []
    for name in others:
        test = scipy.stats.ttest_rel(outcomes[name], outcomes[first])
        ratio = math.exp(statistics.fmean(outcomes[name]) - statistics.fmean(outcomes[first]))
        interval = [math.exp(bound) for bound in test.confidence_interval(0.95)]
        rows.append({"recipe": name, "ratio": ratio, "interval": interval, "p": float(test.pvalue), "seeds": seeds})
    return rows


def write_runs(settings: Settings, runs: Runs) -> pathlib.Path:
    """Write the distances of all runs so far, and their comparison, to the file `output`; return its path."""
    rows, recipes = [], choose_recipes(settings)
    for name, folders in runs.items():
        for seed, folder in sorted(folders.items()):
            iterations, distances = read_series(folder, "feature_distance")
            row = {"recipe": name, "flags": recipes[name], "seed": seed, "iterations": iterations}
            others = {name: read_series(folder, key)[1] for key, name in OTHERS.items()}
            rows.append(row | {"distances": distances} | others)
    return timing.write_rows(settings, rows, compared=compare_recipes(runs))


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    plan = plan_calls(settings)
    runs: Runs = {name: {} for name in choose_recipes(settings)}
    for call in run_calls(list(plan), settings.jobs, emulate_bf16=settings.emulate_bf16):
        name, seed = plan[call]
        runs[name][seed] = find_folder(settings, name, seed)
        if settings.output:
            write_runs(settings, runs)
    if not any(runs.values()):
        raise UsageError("no run ended well, see above")
    first = next(iter(runs))
    for row in compare_recipes(runs):
        low, high = row["interval"]
        print(
            f"{row['recipe']}: distance {row['ratio']:.2f} times that of {first} over the second half "
            f"(95 %: {low:.2f} to {high:.2f}), p = {row['p']:.2f}, {len(row['seeds'])} seeds"
        )
    if settings.output:
        path = write_runs(settings, runs)
        curves = {
            label: {name: join_series(list(folders.values()), key) for name, folders in runs.items() if folders}
            for key, label in PANELS.items()
        }
        title = f"{settings.preset} {settings.train_flags}"
        plot = pictures.plot_lines(curves, path.with_suffix(".png"), xlabel="iteration", title=title, log=list(curves))
        print_written([path, plot])
    print_written([pathlib.Path(settings.logdir)])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

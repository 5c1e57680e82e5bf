"""Train one small network by several recipes, one change each, and plot the quality of the samples.

    python benchmarks/recipes.py --output=benchmarks/recipes.json      # and recipes.png
    python benchmarks/recipes.py --precisions=float32,bf16 --seeds=4 --output=benchmarks/precision_digits.json

Quality is the classifier Fréchet distance of train.py --quality, of chains from noise. The first recipe is the preset
with the published learning rate; each other recipe changes settings of the preset. --precisions compares number types
of the unchanged preset instead. The folders of the runs stay in --logdir.

With several seeds, every recipe is compared with the first one by a t-test, paired by seed, of the logarithm of the
distance, averaged over the second half of each run.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shlex
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import timing
from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.hardware import PRECISIONS
from ebm.support.logs import read_series

TRAIN = pathlib.Path(__file__).resolve().parent.parent / "train.py"
RECIPES = {
    "lr 3e-4, as published": "--lr=3e-4",
    "lr 3e-3": "--lr=3e-3",
    "lr 1e-2": "--lr=1e-2",
    "lr 3e-2": "--lr=3e-2",
    "lr 1e-2, EMA 0.99": "--lr=1e-2 --ema_decay=0.99",
    "lr 1e-2, swish": "--lr=1e-2 --swish_act",
    "lr 1e-2, 40 steps": "--lr=1e-2 --num_steps=40",
    "lr 1e-2, bf16": "--lr=1e-2 --precision=bf16",
}
# The figures that are plotted, on logarithmic axes.
PANELS = {"feature_distance": "classifier Fréchet distance", "e_pos_std": "std of E(x) of data"}


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    preset: str = flag("digits_cpu", "the settings that all runs share")
    train_flags: str = flag("", "more flags of train.py for all runs")
    recipes: int = flag(len(RECIPES), "number of recipes, the first ones", at_least=1)
    precisions: tuple[str, ...] = flag((), "compare these number types instead", choices=tuple(PRECISIONS))
    seeds: int = flag(1, "runs per recipe, from different seeds", at_least=1)
    max_iter: int = flag(400, "iterations of a run", at_least=1)
    test_interval: int = flag(50, "iterations between measurements", at_least=1)
    logdir: str = flag("cachedir/recipes", "folder of the runs", is_path=True)
    output: str = flag("", "also write the figures to this JSON file, and a plot beside it", is_path=True)


def train_recipe(settings: Settings, exp: str, recipe: str, seed: int) -> pathlib.Path:
    """Train by one recipe and return the folder of the run; raise UsageError if training fails."""
    words = [f"--preset={settings.preset}", f"--logdir={settings.logdir}", f"--exp={exp}", f"--seed={seed}"]
    words += [f"--max_iter={settings.max_iter}", f"--test_interval={settings.test_interval}", "--quality"]
    words += ["--num_samples=200", "--sample_steps=100", "--precision=float32"]
    words += [*shlex.split(settings.train_flags), *shlex.split(recipe)]
    print(f"python train.py {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, str(TRAIN), *words], check=False).returncode
    if status:
        raise UsageError(f"training by {recipe} ended with status {status}, see above")
    return pathlib.Path(settings.logdir) / exp


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


def print_comparison(runs: dict[str, list[pathlib.Path]]) -> None:
    """Print the ratio of every recipe's distance to that of the first recipe, with the p value."""
    import scipy.stats

    first, *others = runs
    outcomes = {name: list(map(average_log_distance, folders)) for name, folders in runs.items()}
    for name in others:
        ratio = math.exp(statistics.fmean(outcomes[name]) - statistics.fmean(outcomes[first]))
        p = scipy.stats.ttest_rel(outcomes[name], outcomes[first]).pvalue
        print(f"{name}: distance {ratio:.2f} times that of {first} over the second half, p = {p:.2f}")


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    recipes = dict(list(RECIPES.items())[: settings.recipes])
    if settings.precisions:
        recipes = {name: f"--precision={name}" for name in settings.precisions}
    runs = {
        name: [train_recipe(settings, f"{number}_{seed}", recipe, seed) for seed in range(settings.seeds)]
        for number, (name, recipe) in enumerate(recipes.items())
    }
    if settings.seeds > 1:
        print_comparison(runs)
    if settings.output:
        rows = []
        for name, folders in runs.items():
            for seed, folder in enumerate(folders):
                iterations, distances = read_series(folder, "feature_distance")
                row = {"recipe": name, "flags": recipes[name], "seed": seed}
                rows.append(row | {"iterations": iterations, "distances": distances})
        path = timing.write_rows(settings, rows)
        curves = {
            label: {name: join_series(folders, key) for name, folders in runs.items()} for key, label in PANELS.items()
        }
        title = f"{settings.preset} {settings.train_flags}"
        plot = pictures.plot_lines(curves, path.with_suffix(".png"), xlabel="iteration", title=title, log=list(curves))
        print(f"wrote {path} and {plot}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

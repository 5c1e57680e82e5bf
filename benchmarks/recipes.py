"""Train the same small network by several recipes, one change each, and plot how good samples become.

    python benchmarks/recipes.py --output=benchmarks/recipes.json      # and recipes.png
    python benchmarks/recipes.py --precisions=float32,bf16 --seeds=4 --output=benchmarks/precision_digits.json

Quality is the classifier Fréchet distance of train.py --quality, of chains from noise. A recipe changes the preset's
settings, but for the first, which is the preset with the published learning rate. --precisions compares number types
instead, of the preset as it is. Runs stay in --logdir.

With several seeds every recipe is compared with the first one: by a t-test, paired by seed, of the logarithm of the
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
import cli
import pictures
import timing
from acceleration import PRECISIONS
from cli import flag
from errors import UsageError
from utils import read_series

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
PANELS = {"feature_distance": "classifier Fréchet distance", "e_pos_std": "std of E(x) of data"}  # on logarithmic axes


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    preset: str = flag("digits_cpu", "the settings that all runs share")
    train_flags: str = flag("", "more flags of train.py for all of them")
    recipes: int = flag(len(RECIPES), "train by the first so many", at_least=1)
    precisions: tuple[str, ...] = flag((), "compare these number types instead", choices=tuple(PRECISIONS))
    seeds: int = flag(1, "train so often by each, from other seeds", at_least=1)
    max_iter: int = flag(400, "iterations of a run", at_least=1)
    test_interval: int = flag(50, "iterations between measurements", at_least=1)
    logdir: str = flag("cachedir/recipes", "where the runs go")
    output: str = flag("", "also write the figures to this JSON file, and a plot beside it")


def train_recipe(settings: Settings, exp: str, recipe: str, seed: int) -> pathlib.Path:
    """Train by one recipe and return the folder of the run; raise UsageError where training fails."""
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
    """Return a logged number of several runs as one line, which breaks off between them."""
    x: list[float] = []
    y: list[float] = []
    for iterations, values in (read_series(folder, key) for folder in folders):
        x += [*iterations, math.nan]
        y += [*values, math.nan]
    return x, y


def average_log_distance(folder: pathlib.Path) -> float:
    """Return the mean logarithm of the second half of a run's distances."""
    distances = read_series(folder, "feature_distance")[1]
    return statistics.fmean(map(math.log, distances[len(distances) // 2 :]))


def print_comparison(runs: dict[str, list[pathlib.Path]]) -> None:
    """Print how far every recipe's distances are from those of the first."""
    import scipy.stats

    first, *others = runs
    outcomes = {name: list(map(average_log_distance, folders)) for name, folders in runs.items()}
    for name in others:
        ratio = math.exp(statistics.fmean(outcomes[name]) - statistics.fmean(outcomes[first]))
        p = scipy.stats.ttest_rel(outcomes[name], outcomes[first]).pvalue
        print(f"{name}: distance {ratio:.2f} times that of {first} over the second half, p = {p:.2f}")


def main(settings: Settings) -> None:
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
        plot = pictures.plot_lines(curves, path.with_suffix(".png"), xlabel="iteration", title=title, log=True)
        print(f"wrote {path} and {plot}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

"""Train the same small network by several recipes, one change each, and plot how good samples become.

    python benchmarks/recipes.py --output=benchmarks/recipes.json      # and recipes.png

Quality is the classifier Fréchet distance of train.py --quality, of chains from noise. A recipe changes the preset's
settings, but for the first, which is the preset with the published learning rate. Runs stay in --logdir.
"""

from __future__ import annotations

import pathlib
import shlex
import subprocess
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cli
from errors import UsageError

FLAGS = flags.FLAGS
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

with cli.group("Benchmark"):
    flags.DEFINE_string("preset", "digits_cpu", "the settings that all runs share")
    flags.DEFINE_integer("recipes", len(RECIPES), "train by the first so many", lower_bound=1)
    flags.DEFINE_integer("max_iter", 400, "iterations of a run", lower_bound=1)
    flags.DEFINE_integer("test_interval", 50, "iterations between measurements", lower_bound=1)
    flags.DEFINE_string("logdir", "cachedir/recipes", "where the runs go")
    flags.DEFINE_string("output", "", "also write the figures to this JSON file, and a plot beside it")


def train(number: int, recipe: str) -> pathlib.Path:
    """Train by one recipe and return the folder of the run; raise UsageError where training fails."""
    words = [f"--preset={FLAGS.preset}", f"--logdir={FLAGS.logdir}", f"--exp={number}", *shlex.split(recipe)]
    words += [f"--max_iter={FLAGS.max_iter}", f"--test_interval={FLAGS.test_interval}", "--quality"]
    words += ["--num_samples=200", "--sample_steps=100"]
    print(f"python train.py {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, str(TRAIN), *words], check=False).returncode
    if status:
        raise UsageError(f"training by {recipe} ended with status {status}, see above")
    return pathlib.Path(FLAGS.logdir) / str(number)


def main() -> None:
    import pictures
    from utils import read_series

    rows, curves = [], {}
    for number, (name, recipe) in enumerate(list(RECIPES.items())[: FLAGS.recipes]):
        folder = train(number, recipe)
        iterations, distances = read_series(folder, "feature_distance")
        curves[name] = iterations, distances
        rows.append({"recipe": name, "flags": recipe, "iterations": iterations, "distances": distances})
        print(f"{name}: {distances[-1]:.2f} after {iterations[-1]} iterations")
    if FLAGS.output:
        path = cli.write_rows(FLAGS.output, rows)
        panels = {"classifier Fréchet distance": curves}
        plot = pictures.plot_lines(panels, path.with_suffix(".png"), xlabel="iteration", title=FLAGS.preset, log=True)
        print(f"wrote {path} and {plot}")


if __name__ == "__main__":
    cli.run(main, __doc__ or "")

"""Leave one class after the other out of a training, and measure how well each model detects the images of its class.

    python benchmarks/leave_one_out.py --preset=mnist_cpu --output=benchmarks/leave_one_out.json      # and a plot
    python benchmarks/leave_one_out.py --preset=digits_cpu --classes=0,1 --train_flags="--max_iter=200"

This is the protocol of normalized autoencoders (Yoon et al. 2021), who hold out each digit of MNIST. Each model is
trained with --leave_out=<class> of train.py. Then task ood of ebm_sandbox.py compares the test images of the other
classes with those of the class left out; its other sets are in the folders of the runs. A run that was interrupted goes
on where it was.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import shlex
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import torch

import timing
from calls import Call, run_calls
from ebm.settings import DEVICES, TrainSettings
from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.reports import format_table, print_written
from ebm.tasks.outliers import LEFT_OUT
from ebm.training.setup import read_split


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    preset: str = flag("mnist_cpu", "the settings that all trainings share")
    train_flags: str = flag("", "more flags of train.py for all trainings")
    ood_flags: str = flag("--num_steps=auto --repeats=1", "flags of ebm_sandbox.py --task=ood")
    classes: tuple[str, ...] = flag((), "the classes to leave out in turn, names or numbers; default: all")
    datadir: str = flag("data", "folder of the data sets, as in train.py", is_path=True)
    device: str = flag("auto", "where to compute, as in train.py", choices=DEVICES)
    jobs: int = flag(1, "runs at a time", at_least=1)
    logdir: str = flag("cachedir/leave_one_out", "folder of the runs", is_path=True)
    output: str = flag("", "also write the figures to this JSON file, and a plot beside it", is_path=True)


def plan_trainings(settings: Settings) -> dict[str, Call]:
    """Return the training without each class, by the name or number of the class; raise UsageError for unknown ones."""
    common = (f"--preset={settings.preset}", *shlex.split(settings.train_flags), "--resume_iter=auto")
    common += (f"--datadir={settings.datadir}", f"--device={settings.device}", f"--logdir={settings.logdir}")
    train_settings: TrainSettings = Call("train", common).read_settings()
    names = settings.classes or read_split("test", train_settings, torch.device("cpu")).class_names
    return {name: Call("train", (*common, f"--leave_out={name}", f"--exp=without_{name}")) for name in names}


def plan_measurement(settings: Settings, name: str) -> Call:
    """Return the measurement of the model that was trained without a class of this name or number."""
    words = ["--task=ood", f"--exp=without_{name}", f"--modeldir={settings.logdir}"]
    words += [f"--logdir={settings.logdir}/measured", f"--datadir={settings.datadir}", f"--device={settings.device}"]
    return Call("ebm_sandbox", (*words, *shlex.split(settings.ood_flags)))


def read_auroc(settings: Settings, name: str) -> dict[str, float]:
    """Return the AUROC of the class that a model was trained without, by score."""
    path = pathlib.Path(settings.logdir) / "measured" / f"without_{name}" / "ood" / "measures.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == LEFT_OUT and row["measure"] == "AUROC"]
    return {row["score"]: float(row["mean"]) for row in rows}


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    trainings = plan_trainings(settings)
    trained = set(run_calls(list(trainings.values()), settings.jobs))
    measurements = {plan_measurement(settings, name): name for name, call in trainings.items() if call in trained}
    measured = {measurements[call] for call in run_calls(list(measurements), settings.jobs)}
    rows = {name: read_auroc(settings, name) for name in trainings if name in measured}
    if not rows:
        raise UsageError("no run ended well, see above")
    scores = list(next(iter(rows.values())))
    table = rows | {"mean": {score: statistics.fmean(row[score] for row in rows.values()) for score in scores}}
    print(format_table({f"without {name}" if name in rows else name: row for name, row in table.items()}))
    if settings.output:
        path = timing.write_rows(settings, [{"left out": name} | row for name, row in table.items()])
        bars = {score: {name: row[score] for name, row in table.items()} for score in scores}
        title = f"AUROC of the class left out, {settings.preset} {settings.train_flags}"
        print_written([path, pictures.plot_bars(bars, path.with_suffix(".png"), ylabel="AUROC", title=title)])
    print_written([pathlib.Path(settings.logdir)])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

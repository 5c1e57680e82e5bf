"""Compare training runs: the settings that differ, how far each run came, its figures, curves and samples.

    python scripts/compare.py first second
    python scripts/compare.py cachedir/first elsewhere/second
    python scripts/compare.py --tag=study

A run is its folder, or the name of its experiment in --logdir; --tag takes all that have a tag, see train.py --tag.
They may still be training. comparison.png (the curves), samples.png and comparison.json go to --output; the results of
an earlier call move aside. docs/experiments.md explains the tables.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from ebm.support import interruption

if __name__ == "__main__":
    interruption.guard_start()

import dataclasses
import shutil
from collections.abc import Mapping

from ebm.support import cli, pictures
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.experiments import check_tags
from ebm.support.progress import Progress
from ebm.support.reports import format_table
from ebm.tasks.comparison import (
    LoggedRun,
    describe_summaries,
    find_runs,
    gather_curves,
    list_differences,
    read_run,
    read_samples,
    summarise_run,
)
from ebm.tasks.results import Results, own_results
from ebm.training.distributed import share_evaluation
from ebm.training.ownership import LOCK_NAME

CURVES_NAME, SAMPLES_NAME, REPORT_NAME = "comparison.png", "samples.png", "comparison.json"  # the files of a comparison
MOST_SHOWN = 20  # runs in the pictures, where more could not be told apart
LEAST_WIDTH = 80  # letters of a line


@dataclasses.dataclass(frozen=True)
class Settings:
    """Runs"""

    runs: tuple[str, ...] = flag(
        (),
        "a run: its folder, or the name of its experiment in --logdir; words alone are runs",
        repeated=True,
        is_path=True,
        takes_word=True,
    )
    tag: tuple[str, ...] = flag((), "take every run in --logdir that has this tag; of several, commas between, all")
    logdir: str = flag("cachedir", "folder of all experiments", is_path=True)
    output: str = flag("sandbox_cachedir/compare", "folder for the results", is_path=True)


def main(settings: Settings) -> None:
    check_tags(settings.tag)
    folders = find_runs(settings.runs, pathlib.Path(settings.logdir), settings.tag)
    output = pathlib.Path(settings.output)
    check_output(output)
    with share_evaluation("cpu") as workers, own_results(output, workers, "output") as results:
        progress, runs = Progress(len(folders), what="run", quiet=len(folders) < 5), list[LoggedRun]()
        for name, folder in folders.items():
            runs.append(read_run(name, folder))
            progress.advance()
        progress.close()
        compare_runs(runs, results)


def check_output(folder: pathlib.Path) -> None:
    """Raise UsageError if a folder holds anything but a comparison, since what it holds is set aside."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {
        CURVES_NAME,
        SAMPLES_NAME,
        REPORT_NAME,
        LOCK_NAME,
    }:
        raise UsageError(f"`output`={folder} holds other files than a comparison; choose another folder")


def compare_runs(runs: list[LoggedRun], results: Results) -> None:
    """Print the tables of the runs, and write the pictures and the report."""
    differences = list_differences(runs)
    if differences:
        print("the settings that differ:\n" + format_wide_table(transpose_table(differences)))
    elif len(runs) > 1:
        print("the runs do not differ in any setting")
    summaries = {run.name: summarise_run(run) for run in runs}
    print("the runs:\n" + format_wide_table(describe_summaries(summaries)))
    if len(runs) > MOST_SHOWN:
        print(f"note: the pictures show the first {MOST_SHOWN} of {len(runs)} runs")
    draw_comparison(runs[:MOST_SHOWN], results)
    results.write_report(REPORT_NAME, {"differences": list(differences), "runs": summaries})
    results.print_paths()


def draw_comparison(runs: list[LoggedRun], results: Results) -> None:
    """Plot the curves of the runs, and put their samples into one picture."""
    panels = gather_curves(runs)
    if panels.curves:
        path, (curves, log, shares) = results.add_file(CURVES_NAME), panels
        pictures.plot_lines(curves, path, xlabel="iteration", log=log, shares=shares, smooth=True, columns=2)
    else:
        print("note: no run has logged anything yet, so that there are no curves")
    if samples := read_samples(runs):
        pictures.save_gallery(samples, results.add_file(SAMPLES_NAME))
    else:
        print("note: no run has pictures of samples yet")


def transpose_table(table: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return a table with its rows as columns."""
    columns = next(iter(table.values()))
    return {column: {row: table[row][column] for row in table} for column in columns}


def format_wide_table(table: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table of texts in parts below each other, each no wider than the terminal if that is possible."""
    width = max(shutil.get_terminal_size((120, 0)).columns, LEAST_WIDTH) - max(map(len, table)) - 2
    parts, room = [list[str]()], width
    for column in next(iter(table.values())):
        size = max(8, len(column), *(len(row[column]) for row in table.values())) + 2
        if size > room and parts[-1]:
            parts, room = [*parts, []], width
        parts[-1].append(column)
        room -= size
    return "\n".join(
        format_table({name: {column: row[column] for column in part} for name, row in table.items()}) for part in parts
    )


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

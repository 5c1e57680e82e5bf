"""The results of one call of a script: a set of files in a folder of their own, and a report that lists them.

with own_results(settings.results_folder / "label", workers, "logdir") as results:
    path = results.add_file("samples.png")                    # the first file: an earlier call's are set aside
    results.write_report("label.json", contents | results.describe_state())
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import checkpoint
from ebm.support.errors import UsageError
from ebm.support.interruption import Interruption
from ebm.support.logs import CONFIG_NAME
from ebm.support.reports import format_table, print_written, write_json
from ebm.training.distributed import Workers
from ebm.training.ownership import FolderOwner, own_folder


class Results:
    """The files of one call of a script. The first one sets aside what the folder holds of an earlier call.

    owner: of the folder; None if nothing in it needs to be set aside. files: the paths so far. All workers but rank 0
    write to a folder that is deleted.
    """

    def __init__(self, folder: pathlib.Path, workers: Workers, owner: FolderOwner | None = None):
        self.folder, self.workers, self.owner = folder, workers, owner
        self.files: list[pathlib.Path] = []

    def add_file(self, name: str) -> pathlib.Path:
        """Return the path of a file that is about to be written, perhaps again, and add it to `files`."""
        if self.owner is not None and not self.files:
            self.owner.set_aside("the results of an earlier call are now in")
        path = self.workers.choose_folder(self.folder) / name
        self.files += [path] if path not in self.files else []
        return path

    def describe_state(self) -> dict[str, Any]:
        """Return for the report whether all the work was done, and else how much of it; print that, too."""
        if not self.workers.is_cut_short:
            return {"complete": True}
        parts = self.workers.unfinished
        done = ", ".join(f"{part} ({name})" for name, part in parts.items())
        print(f"stopped early: these are the results so far{f'; done: {done}' if done else ''}")
        return {"complete": False, "done": dict(parts)}

    def write_report(self, name: str, contents: Mapping[str, Any]) -> None:
        """Write a JSON file that lists the files so far by their names in the folder, which may be renamed later."""
        path = self.add_file(name)
        write_json(path, {**contents, "files": [str(file.relative_to(path.parent)) for file in self.files]})

    def report_figures(self, name: str, contents: Mapping[str, Any]) -> None:
        """Write the report of a task as `write_report` does, and print its figures and the paths of all files.

        contents: its entry "figures" holds figures by name, or rows of figures; an optional entry "paper" holds the
        published figures under the same names.
        """
        self.write_report(name, contents)
        if contents["figures"]:
            print(format_table(contents["figures"], contents.get("paper", {})))
        self.print_paths()

    def print_paths(self) -> None:
        """Print the paths of all files."""
        print_written(self.files)


@contextlib.contextmanager
def own_results(folder: pathlib.Path, workers: Workers, setting: str) -> Iterator[Results]:
    """Own a folder for the results of a call inside the block, see `own_folder`; a training run's folder is refused."""

    def check() -> None:
        if checkpoint.list_iterations(folder) or (folder / CONFIG_NAME).exists():
            raise UsageError(f"{folder} is the folder of a training run; choose another `{setting}`")

    with own_folder(folder, workers, check, setting) as owner:
        results = Results(folder, workers, owner)
        try:
            yield results
        except Interruption:
            if not results.files:
                print("stopped before the first result: nothing was written")
            raise

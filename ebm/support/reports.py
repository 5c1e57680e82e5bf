"""The results of a script: a JSON file for programs, a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ebm.support.files import write_file


def write_json(path: Path, contents: Mapping[str, Any]) -> Path:
    """Write plain values to a JSON file and return its path; see `write_file`."""
    text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    return write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def print_written(paths: Iterable[Path]) -> None:
    """Print what a script has written, a line for each file; a folder's line has the number of its files.

    Hidden files, such as locks, are not counted. Paths at which nothing is are left out.
    """
    for path in filter(Path.exists, paths):
        number = sum(inner.is_file() and not inner.name.startswith(".") for inner in path.rglob("*"))
        print(f"wrote {path}" + f"/ ({number:,} file{'s' * (number != 1)})" * path.is_dir(), flush=True)


def format_table(figures: Mapping[str, Any], published: Mapping[str, str] | None = None) -> str:
    """Return figures as lines of text, "name value"; a row of figures (a mapping) becomes a row of a table.

    A table gets a new header when the columns change. published: the paper's figures by name, printed beside ours.
    """

    def format_cell(value: object) -> str:
        return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    def measure_width(column: str) -> int:
        rows = [row for row in figures.values() if isinstance(row, Mapping) and column in row]
        return max(8, len(column), *(len(format_cell(row[column])) for row in rows)) + 2

    width = max(map(len, figures)) + 2
    lines: list[str] = []
    columns: dict[str, int] = {}
    for name, value in figures.items():
        line = f"{name:<{width}}"
        if isinstance(value, Mapping):
            if list(value) != list(columns):
                columns = {column: measure_width(column) for column in value}
                lines.append(" " * width + "".join(f"{column:>{size}}" for column, size in columns.items()))
            line += "".join(f"{format_cell(value[column]):>{size}}" for column, size in columns.items())
        else:
            line += format_cell(value)
        lines.append(line + (f"   paper: {published[name]}" if published and name in published else ""))
    return "\n".join(lines)

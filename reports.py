"""What a script found: a JSON file for programs, a table for people, and the paths of all files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UsageError


def write_json(path: Path, contents: Mapping[str, Any]) -> Path:
    """Write plain values to a JSON file, whose folder is made where there is none; return its path.

    Raises UsageError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); choose another place") from None
    return path


def write_report(path: Path, contents: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write a task's JSON file, `contents` and the paths of its files; print the figures and all paths.

    contents: "figures" by name, or rows of them, and perhaps "paper", the published ones under the same names.
    """
    write_json(path, {**contents, "files": [str(file) for file in files]})
    if contents["figures"]:
        print(format_table(contents["figures"], contents.get("paper", {})))
    for file in files:
        print(f"wrote {file}")


def format_table(figures: Mapping[str, Any], published: Mapping[str, str] | None = None) -> str:
    """Return figures by name as text; rows of figures, which are mappings, as tables, headed where columns change.

    published: the paper's figures under the same names, which stand beside.
    """

    def format_cell(value: object) -> str:
        return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    width = max(map(len, figures)) + 2
    lines: list[str] = []
    columns: dict[str, int] = {}
    for name, value in figures.items():
        line = f"{name:<{width}}"
        if isinstance(value, Mapping):
            if list(value) != list(columns):
                columns = {column: max(len(column), 8) + 2 for column in value}
                lines.append(" " * width + "".join(f"{column:>{size}}" for column, size in columns.items()))
            line += "".join(f"{format_cell(value[column]):>{size}}" for column, size in columns.items())
        else:
            line += format_cell(value)
        lines.append(line + (f"   paper: {published[name]}" if published and name in published else ""))
    return "\n".join(lines)

"""scripts/first_hour.sh: its commands are ones that the scripts take, and each step is run, timed and listed."""

import importlib
import re
import shlex
import shutil
import subprocess
import typing

import pytest

from conftest import ROOT
from ebm.support import cli

SCRIPT = ROOT / "scripts/first_hour.sh"
COMMANDS = re.findall(r'"python (\w+)\.py ([^"]*)"', SCRIPT.read_text().replace("\\\n", ""))
# Stands for python: every step's first useful line, and a training that goes on until it is stopped.
PYTHON = """#!/usr/bin/env bash
trap 'kill $!; exit 143' TERM
echo "$@" >> commands
echo "Run:"; echo "iteration 3/9"; echo "AUROC"; echo "images"; echo "frames"
[[ "$*" != *--data_path* ]] || { sleep 50 & wait; }
echo "wrote $FOLDER/picture.png, and more"
"""


@pytest.mark.parametrize(("script", "words"), COMMANDS)
def test_commands_are_taken(script, words, capsys):
    """Breaks when a step has a flag or a value that its script does not know, or one without effect."""
    kind = typing.get_type_hints(importlib.import_module(script).main)["settings"]
    arguments = [word for word in shlex.split(words) if word != "--help"]
    cli.parse([script, *arguments], kind)
    assert "note:" not in capsys.readouterr().out


def test_the_hour(tmp_path):
    """Breaks when a step is left out, is not timed, ends unnoticed, or anything is written outside the folder."""
    clone, folder = tmp_path / "clone", tmp_path / "new folder"
    (clone / "scripts").mkdir(parents=True)
    (clone / ".venv/bin").mkdir(parents=True)
    script = shutil.copy(SCRIPT, clone / "scripts")
    python = clone / ".venv/bin/python"

    def run():
        settings = {"PATH": "/usr/bin:/bin", "FOLDER": str(folder)}
        command = ["bash", script, folder.name]
        return subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=60)

    python.write_text(PYTHON)
    python.chmod(0o755)
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^(\d+) .*? +(\d+) +(\d+)   (\S*)$", result.stdout, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    assert [row[3] for row in rows] == ["" if number == 5 else "picture.png" for number in range(1, 11)]
    assert len((clone / "commands").read_text().splitlines()) == 10
    assert {path.name for path in clone.iterdir()} == {"scripts", ".venv", "commands"}

    again = run()
    assert again.returncode == 2 and again.stderr.startswith("error:") and again.stderr.count("\n") == 1
    shutil.rmtree(folder)
    python.write_text("#!/bin/sh\nexit 3\n")
    failed = run()
    assert failed.returncode == 1 and failed.stderr == "error: '1 Help' failed, status 3\n"

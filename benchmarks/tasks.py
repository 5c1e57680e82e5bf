"""Measure the seconds, of the processor and of the clock, that whole commands of the scripts take.

    python benchmarks/tasks.py
    python benchmarks/tasks.py --commands=label,adaptive --rounds=3 --root=../before --output=tasks.json

With --root, another version of the project runs each command, too, in turns with this one. The best of --rounds counts.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import timing
from ebm.support import cli
from ebm.support.cli import flag
from ebm.support.errors import UsageError
from ebm.support.progress import Progress
from ebm.support.reports import print_written

ROOT = pathlib.Path(__file__).resolve().parent.parent
LABEL = "ebm_sandbox.py --task=label --exp=digits_cond --pgd=20"
COMMANDS = {
    "label": f"{LABEL} --limit=32",
    "adaptive": f"{LABEL} --limit=4 --adaptive=1",
    "labelgrid": f"{LABEL} --limit=2 --labelgrid",
    "mixenergy": "ebm_sandbox.py --task=mixenergy --exp=digits_cond --limit=180",
    "labelfinetune": "ebm_sandbox.py --task=labelfinetune --exp=digits_cond --limit=180 --num_steps=0",
    "latent": "ebm_sandbox.py --task=latent --exp=digits_cond --nohessian",
    "diagnose": "ebm_sandbox.py --task=diagnose --exp=digits_cond --limit=5",
    "cycleclass": "ebm_sandbox.py --task=cycleclass --exp=digits_cond --limit=20",
    "concepts": "ebm_combine.py --weights=pos=3,rot=1.5 --num_steps=10 --step_lr=50 --limit=48",
    "labeldiscover": "ebm_combine.py --task=labeldiscover --num_steps=20 --limit=16",
    "sample": "sample.py --exp=digits_cond --num=100",
    "pools": "eval_inception.py --exp=digits_cond --ensemble=1 --step_lr=100 --proj_norm=0 --im_number=200 "
    "--batch_size=8",
}


@dataclasses.dataclass(frozen=True)
class Settings(timing.BenchmarkOutput):
    """Benchmark"""

    commands: tuple[str, ...] = flag(tuple(COMMANDS), "which commands", choices=tuple(COMMANDS))
    rounds: int = flag(1, "runs of each command", at_least=1)
    root: str = flag("", "the folder of another version of the project, to be measured in turns", is_path=True)


def measure_command(command: str, root: pathlib.Path) -> tuple[float, float]:
    """Return the seconds of the processor and of the clock that a command of a version of the project takes."""
    script, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        before, start = os.times(), time.perf_counter()
        words = [sys.executable, str(root / script), *flags, f"--logdir={folder}", f"--modeldir={ROOT / 'pretrained'}"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise UsageError(f"{command} fails in {root}: {done.stderr.strip()}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, seconds


def measure_versions(
    settings: Settings, name: str, roots: Sequence[pathlib.Path], progress: Progress
) -> list[dict[str, Any]]:
    """Return a row of figures of a command for each version of the project; print them.

    roots: the folders of the versions, this one last. progress: counts runs.
    """
    runs: list[list[tuple[float, float]]] = []
    for _ in range(settings.rounds):
        runs.append([])
        for root in roots:
            runs[-1].append(measure_command(COMMANDS[name], root))
            progress.advance()
    rows = []
    versions = ["another version"] * bool(settings.root) + ["this version"]
    for number, version in enumerate(versions):
        used, seconds = (min(run[number][kind] for run in runs) for kind in (0, 1))
        rows.append({"command": name, "version": version, "processor s": used, "s": seconds})
        progress.say(f"{name:14} {version:16} {used:7.1f} s of the processor {seconds:7.1f} s")
    return rows


def main(settings: Settings) -> None:
    timing.prepare_output(settings)
    roots = ([pathlib.Path(settings.root).resolve()] if settings.root else []) + [ROOT]
    rows: list[dict[str, Any]] = []
    with Progress(len(settings.commands) * settings.rounds * len(roots), what="command") as progress:
        for name in settings.commands:
            rows += measure_versions(settings, name, roots, progress)
            if settings.output:
                described = {"lines": {name: COMMANDS[name] for name in settings.commands}}
                timing.write_rows(settings, rows, **timing.describe_machine("cpu"), **described)
    if settings.output:
        print_written([pathlib.Path(settings.output)])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)

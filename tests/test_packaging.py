"""What others install and cite: lists of packages, versions, cards of models, jobs of clusters."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

import checkpoint
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIRED = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "sklearn": "scikit-learn"}  # import -> package, if they differ
NOT_LISTED = {"horovod"}  # scripts/install_horovod.sh builds it
NOT_IMPORTED = {"openmpi", "torchvision"}  # brings mpiexec; is imported by its name, in ebm/readers/downloads.py
RUN_BY = {"quality", "mpi", "attacks", "export"}  # the extras that modules of the project import


def read_names(requirements):
    """Return the names of the packages in a list of requirements."""
    return {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in requirements if line}


def find_imports():
    """Return the packages that the modules of the root and of ebm/ import."""
    own, found = {path.stem for path in ROOT.glob("*.py")} | {"ebm"}, set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "ebm").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split(".")[0] for name in names}
    return {DISTRIBUTIONS.get(name, name).replace("-", "_") for name in found - own - set(sys.stdlib_module_names)}


def test_lists_are_those_of_the_imports():
    """Breaks when a module imports a package that no list names, or a list names one that nothing imports."""
    listed = read_names(REQUIRED).union(*(read_names(EXTRAS[name]) for name in RUN_BY))
    assert find_imports() - NOT_LISTED - {"wandb", "trackio"} == listed - NOT_IMPORTED


def test_every_module_is_installed():
    """Breaks when a new module of the root cannot be imported after `pip install -e .`."""
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}


def test_one_version():
    """Breaks when the package, the citation and the changelog are of different versions."""
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == VERSION
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == VERSION


def test_the_promised_versions_are_those_that_run():
    """Breaks when CI no longer runs .ci/run, or the ends of the promised ranges of Python and torch."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "- run: bash .ci/run\n" in workflow
    pairs = re.findall(r'\{python: "3\.(\d+)", torch: "2\.(\d+)\.\d+"\}', workflow)
    pythons, torches = ([int(number) for number in column] for column in zip(*pairs, strict=True))
    assert PROJECT["project"]["requires-python"] == f">=3.{min(pythons)},<3.{max(pythons) + 1}"
    assert f"torch>=2.{min(torches)},<2.{max(torches) + 1}" in REQUIRED
    (pinned,) = re.findall(r"^torch==2\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert min(torches) <= int(pinned) <= max(torches)


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*/*.pt")), ids=lambda path: path.parent.name)
def test_cards(path):
    """Breaks when a shipped model has no card, or the card is of another file or network."""
    card, model = (path.parent / "README.md").read_text(), checkpoint.load_energy(path)
    weights = sum(parameter.numel() for parameter in model.state_dict().values())
    assert card.startswith("---\nlicense: mit\n")
    assert f"| file | `{path.name}`, {path.stat().st_size / 1e6:.1f} MB" in card
    assert f"`{model.config.network}`" in card and f", {weights:,} weights |" in card
    shape = ", ".join(map(str, model.config.image_shape))
    assert f"(N, {shape})" in card and "\n## Data\n" in card and "\n## Figures\n" in card


def test_trying_a_version_names_mistakes():
    """Breaks when a call without versions, or with a Python that is not there, begins to install something."""
    for words, expected in [((), "name a Python and a version of torch"), (("no-python", "2.13.0"), "cannot run")]:
        result = subprocess.run(
            ["bash", ROOT / "scripts/try_version.sh", *words], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("error: ") and expected in result.stderr


@pytest.mark.parametrize("status, is_queued", [(0, False), (1, False), (143, True)])
@pytest.mark.parametrize("name", ["train", "sweep"])
def test_jobs_queue_themselves_again(tmp_path, name, status, is_queued):
    """Breaks when a job that was stopped before its time is lost, or one that failed or ended is queued again."""
    calls = tmp_path / "calls"
    for program, ending in (("srun", status), ("scontrol", 0)):
        script = tmp_path / program
        script.write_text(f'#!/bin/sh\necho {program} "$@" >> {calls}\nexit {ending}\n')
        script.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    job = ["bash", ROOT / f"scripts/cluster/{name}.sbatch", "--max_iter=5"]
    result = subprocess.run(job, cwd=tmp_path, env=environment, check=False)
    number = {"train": "7", "sweep": "7_3"}[name]  # the number of one task of an array can be that of all
    srun, *others = calls.read_text().splitlines()
    assert result.returncode == status and others == ([f"scontrol requeue {number}"] if is_queued else [])
    assert srun.startswith("srun python train.py --resume_iter=auto ") and "--max_iter=5" in srun
    assert name == "train" or srun.endswith("--exp=sweep/step_lr_30-seed_1 --step_lr=30 --seed=1")

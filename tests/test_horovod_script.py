"""scripts/install_horovod.sh: a second run does nothing, and a machine that cannot build it is told why."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from conftest import ENVIRONMENT, ROOT, skip_without_horovod

SCRIPT = ROOT / "scripts" / "install_horovod.sh"


def run(**settings: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"PYTHON": sys.executable} | settings
    return subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_second_run_does_nothing() -> None:
    """Breaks when the script builds or installs again what already works."""
    skip_without_horovod()
    result = run(CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stdout


@pytest.mark.slow
def test_missing_compiler_is_named(tmp_path: pathlib.Path) -> None:
    """Breaks when a missing compiler ends in a page of build errors, or something is installed before it is found."""
    broken = tmp_path / "horovod"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('stands for an environment without Horovod')\n")
    result = run(CXX="no-such-compiler", HOROVOD_WHEELS=str(tmp_path / "wheels"), PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: Horovod needs a C++ compiler and there is no 'no-such-compiler'")


def test_unknown_python_is_named() -> None:
    """Breaks when the script goes on with another Python than the one asked for."""
    result = run(PYTHON="no-such-python")
    assert result.returncode == 1
    assert "error: cannot run 'no-such-python'" in result.stderr

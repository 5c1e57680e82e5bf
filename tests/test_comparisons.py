"""Benchmarks that compare: many calls of scripts, and what the figures of several seeds say."""

import importlib
import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, make_generator


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Let benchmarks be imported, here and in the processes that they start."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_a_call_that_fails_does_not_end_the_others(tmp_path, capsys):
    """Breaks when a mistake in one call ends the benchmark, or the call counts as done."""
    calls = importlib.import_module("calls")
    bad = calls.Call("machine", ("--size=none",))
    good = calls.Call("machine", ("--size=8", "--precisions=float32", f"--output={tmp_path / 'machine.json'}"))
    assert list(calls.run_calls([bad, good], jobs=1)) == [good]
    assert (tmp_path / "machine.json").exists()
    printed = capsys.readouterr().out
    assert (
        "failed: python machine.py --size=none: UsageError" in printed and "done: python machine.py --size=8" in printed
    )


class ProductTypes(TorchDispatchMode):
    """The number types in which convolutions and matrix products were computed."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.mm.default):
            self.found.append(args[0].dtype)
        return func(*args, **kwargs or {})


def test_emulated_bf16_rounds_factors_and_products():
    """Breaks when an emulated product is computed in bf16, is not rounded, or float32 is rounded, too."""
    calls = importlib.import_module("calls")
    x, kernel = (torch.randn(shape, generator=make_generator()) for shape in ((2, 3, 5, 5), (4, 3, 3, 3)))
    half, half_kernel = x.bfloat16(), kernel.bfloat16()
    matrix = half_kernel.flatten(1)
    expected = F.conv2d(half.float(), half_kernel.float()), F.conv2d(x, kernel), matrix.float() @ matrix.float().T
    with calls.EmulatedBf16(), ProductTypes() as types:
        assert torch.equal(F.conv2d(half, half_kernel), expected[0].bfloat16())
        assert torch.equal(F.conv2d(x, kernel), expected[1])
        assert torch.equal(matrix @ matrix.T, expected[2].bfloat16())
    assert types.found == [torch.float32] * 3


def test_recipes_are_compared_by_seed(tmp_path):
    """Breaks when the ratio is not that of the second halves, or a seed counts that one of the recipes lacks."""
    recipes = importlib.import_module("recipes")

    def write_run(name, distances):
        lines = [json.dumps({"iteration": k, "feature_distance": value}) for k, value in enumerate(distances)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path / name

    first = {seed: write_run(f"first_{seed}", [9.0, 9.0, 2.0 + seed, 2.0 + seed]) for seed in range(3)}
    other = {seed: write_run(f"other_{seed}", [1, 1, f * (2 + seed), f * (2 + seed)]) for seed, f in ((0, 2), (2, 3))}
    (row,) = recipes.compare_recipes({"float32": first, "bf16": other})
    assert row["seeds"] == [0, 2] and row["ratio"] == pytest.approx(math.sqrt(6))
    assert row["interval"][0] < row["ratio"] < row["interval"][1] and 0 < row["p"] < 1
    assert recipes.compare_recipes({"float32": first, "bf16": {1: first[1]}}) == []


def test_figures_are_compared_by_seed():
    """Breaks when differences are not paired by seed, or their error is that of the figures themselves."""
    evaluation = importlib.import_module("evaluation_precision")
    figures = {("right", "float32"): {0: 0.1, 1: 0.5, 2: 0.9}, ("right", "bf16"): {2: 0.92, 0: 0.12, 1: 0.58}}
    (row,) = evaluation.compare_precisions(figures, ("float32", "bf16"))
    assert row["mean in float32"] == pytest.approx(0.5) and row["between seeds"] == pytest.approx(0.4)
    assert row["difference"] == pytest.approx(0.04) and row["standard error"] == pytest.approx(0.02)
    assert row["seeds"] == 3 and row["precision"] == "bf16"
    assert evaluation.compare_precisions(figures, ("float32",)) == []

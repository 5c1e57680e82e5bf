"""Evaluation scripts under mpiexec: two workers share the work, give the figures of one and write each file once.

The test runs this same file as a script, which runs all commands in one process per worker.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import math
import pathlib
import subprocess
import sys
import typing

import numpy as np
import pytest

from conftest import ROOT, WORKERS, make_model, write_checkpoint
from ebm.readers import dsprites
from ebm.support import cli
from ebm.training import distributed
from models import ModelConfig

DIGITS = "--exp=digits --num_steps=2 --device=cpu --limit=20 --batch_size=3"
SPRITES = "--savedir={out} --logdir={models} --num_steps=2 --batch_size=2 --limit=6 --device=cpu"
COMMANDS = [
    f"ebm_sandbox --task=mixenergy {DIGITS} --randommix",
    f"ebm_sandbox --task=label {DIGITS} --pgd=2",
    f"ebm_sandbox --task=mixing {DIGITS} --sampler=mala --noise_scale=0.1 --chain_steps=50",
    f"ebm_sandbox --task=boxcorrupt {DIGITS}",
    f"ebm_sandbox --task=labelfinetune {DIGITS}",
    "sample --exp=digits --num=7 --batch_size=2 --num_steps=2 --device=cpu",
    "imagenet_demo --exp=digits --savedir={out} --logdir={models} --batch_size=5 --num_steps=2 --device=cpu",
    "ais --exp=digits --limit=30 --batch_size=4 --pdist=2 --device=cpu",
    "eval_inception --exp=digits --im_number=1500 --repeat_scale=1 --batch_size=1000 --num_steps=1 --ensemble=1 "
    "--device=cpu --real_number=100 --cache={models}/statistics",
    f"ebm_combine --task=conceptcombine {SPRITES}",
    f"ebm_combine --task=labeldiscover {SPRITES}",
    f"ebm_combine --task=gentest {SPRITES} --break_steps=2 --num_filters=4",
    f"ebm_combine --task=genbaseline {SPRITES} --break_steps=2 --num_filters=4",
]


def run_commands_here(models: str, out: str) -> None:
    """Run all commands as one worker of a job; write what each printed to <out>/printed.json on rank 0."""
    workers = distributed.join_workers(device="cpu")
    close, workers.close = workers.close, lambda: None  # type: ignore[method-assign]
    if workers.rank > 0:
        sys.addaudithook(functools.partial(refuse_writing, out))
    distributed.join_workers = lambda *words, **settings: workers  # the job outlives its first script
    places = tuple(k / 31 for k in (0, 16, 31))
    dsprites.LATENTS |= {"x": places, "y": places}  # few sprites, so that the nearest one is found at once
    dsprites.SIZE = math.prod(map(len, dsprites.LATENTS.values()))
    printed = []
    for command in COMMANDS:
        script, *words = command.format(models=models, out=out).split()
        module = importlib.import_module(script)
        kind = typing.get_type_hints(module.main)["settings"]
        folders = [] if "{out}" in command else [f"--modeldir={models}", f"--logdir={out}"]
        settings = cli.parse([script, *words, *folders], kind)
        with contextlib.redirect_stdout(io.StringIO()) as text:
            module.main(settings)
        printed.append(text.getvalue())
    if workers.rank == 0:
        (pathlib.Path(out) / "printed.json").write_text(json.dumps(printed))
    else:
        assert not any(printed), "rank 1 printed something"
    close()


def refuse_writing(out: str, event: str, words: tuple) -> None:
    """Raise AssertionError if a file below a folder is opened to be written."""
    if event == "open" and str(words[0]).startswith(out) and words[1] is not None and set(words[1]) & set("wax+"):
        raise AssertionError(f"a worker other than the first writes {words[0]}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The results of all commands by one worker and by two."""
    tmp = tmp_path_factory.mktemp("sharing")
    digits = ModelConfig("MnistNet", (1, 28, 28), 2, label_size=10)
    flags = {"dataset": "digits", "step_lr": 10.0}
    names = list(map(str, range(10)))
    write_checkpoint(tmp / "models" / "digits" / "model_5.pt", make_model(digits), 5, flags=flags, class_names=names)
    for name, concept in dsprites.CONCEPTS.items():
        config = ModelConfig("DspritesNet", (1, 64, 64), 4, concept.label_size)
        write_checkpoint(tmp / "models" / f"dsprites_cond_{name}" / "model_5.pt", make_model(config), 5)
    results = []
    for prefix in ([], ["mpiexec", "-n", "2", "--oversubscribe"]):
        out = tmp / f"by_{1 + len(prefix) // 4}"
        out.mkdir()
        command = [*prefix, sys.executable, __file__, str(tmp / "models"), str(out)]
        environment = WORKERS | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run(command, cwd=tmp, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(out)
    return results


def list_files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_every_file_is_written_once(folders):
    """Breaks when a worker other than the first prints or writes, or a file of one worker is missing with two."""
    one, two = folders
    assert list_files(one) == list_files(two)
    printed = json.loads((two / "printed.json").read_text())
    for command, text in zip(COMMANDS, printed, strict=True):
        written = [line for line in text.splitlines() if line.startswith("wrote ")]
        assert len(written) == len(set(written)) and (written or "frames" in text), command


@pytest.mark.slow
def test_figures_do_not_depend_on_the_workers(folders):
    """Breaks when two workers give another figure, array or image than one, beyond rounding."""
    one, two = folders
    for name in sorted(list_files(one)):
        a, b = one / name, two / name
        if name.endswith(".npy"):
            np.testing.assert_allclose(np.load(a), np.load(b), rtol=1e-4, atol=1e-5, err_msg=name)
        elif name.endswith((".png", ".gif", ".npz")) and "ais" not in name and "mixing" not in name:
            # (the noisy images at the end of long chains have pixels that rounding takes to another byte)
            assert a.read_bytes() == b.read_bytes(), name
        elif name.endswith(".json") and name != "printed.json":
            found = [json.loads(path.read_text()) for path in (a, b)]
            assert_alike(*(value.get("figures", value.get("results", value.get("bounds"))) for value in found), name)


def assert_alike(one, other, name):
    """Compare plain values; numbers may differ by rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_alike(one[key], other[key], f"{name}: {key}")
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_alike(*pair, name)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5), name
    else:
        assert str(one).replace("by_1", "") == str(other).replace("by_2", ""), name


if __name__ == "__main__":
    run_commands_here(*sys.argv[1:])

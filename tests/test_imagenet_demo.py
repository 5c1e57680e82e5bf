"""imagenet_demo.py as a user runs it, on small networks: its frames are those of one chain, for any network."""

import ast
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import models
import sampling
from conftest import ENVIRONMENT, GOLDEN, ROOT, make_generator, make_model, write_checkpoint
from ebm.support import pictures
from ebm.support.pixels import to_bytes

ANIMALS = ["tench, Tinca tinca", "crane", "Maltese dog, Maltese terrier", "crane", "hen"]

MODELS: dict[
    str, tuple[models.ModelConfig, dict[str, object]]
] = {  # experiment -> network, what its checkpoint says besides
    "digits": (models.ModelConfig("MnistNet", (1, 28, 28), 4, label_size=5), {}),
    "named": (models.ModelConfig("MnistNet", (1, 28, 28), 4, label_size=5), {"class_names": ANIMALS}),
    "rescaled": (models.ModelConfig("ResNet32", (3, 32, 32), 4), {"flags": {"rescale": 8.0, "step_lr": 50.0}}),
    "large": (models.ModelConfig("ResNet128", (3, 128, 128), 4, label_size=10, swish_act=True), {}),
    "position": (models.ModelConfig("DspritesNet", (1, 64, 64), 4, label_size=2), {}),
}
QUICK = ["--precision=float32", "--num_steps=4", "--step_lr=100", "--batch_size=3"]

# Runs many commands in one process, since importing torch takes most of a command's time.
DRIVER = """
import contextlib, io, json, os, sys
from ebm.support import cli
import imagenet_demo
results = {}
for case, words in json.load(sys.stdin).items():
    os.environ["PATH"] = "with_ffmpeg" if case == "film" else "broken_ffmpeg" if case == "no_film" else "nothing"
    sys.argv = ["imagenet_demo.py", "--logdir=models", f"--savedir=results/{case}", "--device=cpu", *words]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(imagenet_demo.main, imagenet_demo.DemoSettings, imagenet_demo.__doc__)
        except SystemExit as leave:
            status = leave.code
    results[case] = status, out.getvalue(), err.getvalue()
print(json.dumps(results))
"""

CASES = {
    "whole": ["--exp=digits", *QUICK],
    "thinned": ["--exp=digits", *QUICK, "--every=3"],
    "other_seed": ["--exp=digits", *QUICK, "--seed=1"],
    "chosen": ["--exp=digits", *QUICK, "--classes=4, 0"],
    "names": ["--exp=named", *QUICK, "--classes=maltese terrier,HEN,1"],
    "file": ["--exp=digits", *QUICK, "--classes=cock,2", "--class_names=birds.txt"],
    "rescaled": ["--exp=rescaled", *QUICK],
    "film": ["--exp=rescaled", *QUICK],
    "no_film": ["--exp=digits", *QUICK],
    "bf16": ["--exp=digits", *QUICK, "--precision=bf16"],
    "large": ["--exp=large", "--num_steps=2", "--batch_size=4", "--resume_iter=7", "--noswish_act", "--cclass"],
    "own_step": ["--exp=rescaled", "--num_steps=1", "--batch_size=1"],
    "tensorflow": ["--exp=cifar10_cond", "--resume_iter=74700", *QUICK],
}
MISTAKES = {
    "no_model": (["--exp=nomed"], "no experiment folder models/nomed or cachedir/nomed; models has named, "),
    "no_iteration": (["--exp=digits", "--resume_iter=8"], "no checkpoint model_8 in models/digits (it has 7)"),
    "no_classes": (["--exp=rescaled", "--classes=1"], "model_7.pt has no classes"),
    "no_such_class": (["--exp=digits", "--classes=5"], "there is no class 5; they are 0 to 4"),
    "negative": (["--exp=named", "--classes=-1"], "no class is called '-1'; the classes are "),
    "no_names": (
        ["--exp=digits", "--classes=hen"],
        "the class 'hen' is unknown, because this model has no class names; give numbers",
    ),
    "misspelt": (
        ["--exp=named", "--classes=maltese dgo"],
        "no class is called 'maltese dgo'; did you mean",
    ),
    "ambiguous": (["--exp=named", "--classes=crane"], "'crane' is the name of the classes 1, 3; give a number"),
    "empty": (["--exp=named", "--classes=1,,2"], "no class is called ''"),
    "too_many": (["--exp=digits", "--classes=1,2,3", "--batch_size=2"], "--classes names 3 and --batch_size=2 is less"),
    "few_names": (["--exp=digits", "--class_names=few.txt"], "few.txt has 1 lines and the network 5 classes"),
    "no_text": (["--exp=digits", "--class_names=models"], "--class_names=models cannot be read: Is a directory"),
    "position": (["--exp=position"], "conditioned on a size, position or rotation"),
    "no_folder": (["--exp=digits", "--savedir=birds.txt"], "--savedir: cannot write birds.txt/digits"),
    "no_steps": (["--exp=digits", "--num_steps=0"], "--num_steps"),
}


class Result(NamedTuple):
    status: int
    out: str
    err: str
    folder: pathlib.Path

    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(self.folder / "sample.png"))

    def titles(self) -> list[str]:
        """The printed classes of the images."""
        return [title for row in re.findall("row .: (.*)", self.out) for title in row.split(", ")]

    def frames(self) -> list[tuple[int, int, int]]:
        """Width, height and milliseconds of each frame of the GIF."""
        with Image.open(self.folder / "sample.gif") as gif:
            return [(*frame.size, frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Result]:
    """What all commands said and left behind."""
    work = tmp_path_factory.mktemp("work")
    for exp, (config, extra) in MODELS.items():
        write_checkpoint(work / "models" / exp / "model_7.pt", make_model(config, seed=3), 7, **extra)
    (work / "models" / "cifar10_cond").symlink_to(GOLDEN / "tf_checkpoints/cifar10_cond")
    (work / "birds.txt").write_text("cock\nhen\nostrich\nbrambling\ngoldfinch\n")
    (work / "few.txt").write_text("cock\n")
    fakes = {
        "with_ffmpeg": "open(sys.argv[-1], 'w').write(repr((sys.argv[1:-1], len(sys.stdin.buffer.read()))))",
        "broken_ffmpeg": "sys.stdin.buffer.read(); sys.exit('first line\\nno such encoder')",
    }
    for name, body in fakes.items():
        (work / name).mkdir()
        (work / name / "ffmpeg").write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        (work / name / "ffmpeg").chmod(0o755)
    commands = CASES | {name: words for name, (words, _) in MISTAKES.items()}
    run = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        cwd=work,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers = json.loads(run.stdout)
    exps = {name: words[0].removeprefix("--exp=") for name, words in commands.items()}
    return {
        name: Result(status, out, err, work / "results" / name / exps[name] / "demo")
        for name, (status, out, err) in answers.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_commands_work(results, case) -> None:
    """Red if a command fails, or does not name the files that it wrote."""
    result = results[case]
    assert result.status == 0, result.err
    for name in ("sample.gif", "sample.png"):
        assert f"results/{case}/{result.folder.parent.name}/demo/{name}" in result.out
        assert (result.folder / name).stat().st_size > 0


def expected_pixels(
    exp: str, classes: list[int], rescale: float, titles: Sequence[str] = (), steps: int = 4
) -> np.ndarray:
    """The end of the chain that QUICK asks for, or of one of other steps, in a grid of 2 columns."""
    config, _ = MODELS[exp]
    model = make_model(config, seed=3).eval()
    generators = [make_generator(i) for i in range(3)]
    x = rescale * torch.cat([torch.rand((1, *config.image_shape), generator=generator) for generator in generators])
    labels = torch.eye(5)[classes] if config.label_size else None
    x = sampling.langevin(
        lambda x: model(x, labels),
        x,
        num_steps=steps,
        step_lr=100 * rescale,
        noise_std=0.005 * rescale,
        bounds=(0, rescale),
        generator=generators,
    )
    return pictures.make_grid(to_bytes(x / rescale) / 255, columns=2, titles=titles).squeeze()


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures are equal but for rounding."""
    return one.shape == other.shape and abs(one.astype(int) - other.astype(int)).max() <= 1


def test_frames_are_those_of_one_chain(results) -> None:
    """Red if the noise, the step or the range is another than the spec's, or frames are not steps of one chain."""
    titles, other_titles = (results[case].titles() for case in ("whole", "other_seed"))
    assert close(results["whole"].pixels(), expected_pixels("digits", list(map(int, titles)), 1.0, titles))
    assert close(results["rescaled"].pixels(), expected_pixels("rescaled", [], 8.0))
    assert np.array_equal(results["whole"].pixels(), results["thinned"].pixels())
    assert not np.array_equal(results["whole"].pixels(), results["other_seed"].pixels())
    assert titles != other_titles
    changes = [
        abs(results["whole"].pixels().astype(int) - results[case].pixels()).mean() for case in ("bf16", "other_seed")
    ]
    assert 0 < changes[0] < 0.2 * changes[1]


def test_step_size(results) -> None:
    """Red if the step size is not that of training, or without one another than the published 180."""
    assert "1 images, 1 Langevin steps with step_lr 50" in results["own_step"].out
    assert "4 images, 2 Langevin steps with step_lr 180" in results["large"].out


def test_chosen_classes(results) -> None:
    """Red if --classes conditions on others, is not repeated, or names are not found, shown and matched in any case."""
    assert close(results["chosen"].pixels(), expected_pixels("digits", [4, 0, 4], 1.0, ["4", "0", "4"]))
    assert "row 1: 4, 0\nrow 2: 4\n" in results["chosen"].out
    assert close(results["names"].pixels(), expected_pixels("named", [2, 4, 1], 1.0, ["Maltese dog", "hen", "crane"]))
    assert "row 1: Maltese dog, hen\nrow 2: crane\n" in results["names"].out
    assert "row 1: cock, ostrich\nrow 2: cock\n" in results["file"].out


@pytest.mark.parametrize(
    ("case", "steps", "width"), [("whole", 4, 450), ("thinned", 2, 450), ("rescaled", 4, 450), ("large", 2, 514)]
)
def test_gif(results, case, steps, width) -> None:
    """Red if frames are lost or too small to see, it has no pause at its end, or the speed is another."""
    height = results[case].pixels().shape[0]
    assert results[case].pixels().shape[1] == width and 0 <= height - width <= 2 * pictures.LINE
    pauses = [500, *[50] * (steps - 1), 2000]
    assert results[case].frames() == [(width, height, pause) for pause in pauses]


def test_gif_begins_with_the_noise(results) -> None:
    """Red if the first frame is one after a step, or the last frame is another than the picture."""
    with Image.open(results["rescaled"].folder / "sample.gif") as gif:
        shown = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    noise, end = (expected_pixels("rescaled", [], 8.0, steps=steps) for steps in (0, 4))
    errors = [[abs(frame - pixels).mean() for frame in (shown[0], shown[-1])] for pixels in (noise, end)]  # of colours
    assert errors[0][0] < errors[0][1] and errors[1][1] < errors[1][0]


def test_flags_of_old_commands(results) -> None:
    """Red if a flag that contradicts the checkpoint passes without a word, or one that agrees is complained about."""
    assert "note: swish_act=False has no effect: the checkpoint's network has swish_act=True" in results["large"].out
    assert "--cclass" not in results["large"].out


def test_film(results) -> None:
    """Red if ffmpeg is not given all frames as they are, or its absence or failure ends the command."""
    assert re.search(r"^wrote \S+/demo/sample\.mp4$", results["film"].out, re.MULTILINE)
    assert "wrote" in results["no_film"].out and not re.search("wrote .*mp4", results["no_film"].out)
    words, size = ast.literal_eval((results["film"].folder / "sample.mp4").read_text())
    assert size == (10 + 3 + 40) * 450 * 450 * 3  # it begins and ends with a pause
    assert words[words.index("-s") + 1] == "450x450"
    assert words[words.index("-pix_fmt") + 1] == "rgb24"
    assert "no sample.mp4, ffmpeg is not installed" in results["whole"].out
    assert "no sample.mp4, ffmpeg failed (no such encoder)" in results["no_film"].out


def test_progress_is_shown(results) -> None:
    """Red if a long chain runs without a sign of life."""
    assert "Langevin step 4/4" in results["whole"].out


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(results, case) -> None:
    """Red if a mistake ends in a traceback, in several lines, or without a word about what is wrong."""
    result = results[case]
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert MISTAKES[case][1] in result.err
    assert not (result.folder / "sample.gif").exists()

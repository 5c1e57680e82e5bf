"""The models of single concepts that ebm_combine.py combines: which ones, where they lie, how they are trained."""

from __future__ import annotations

import contextlib
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import checkpoint
import composition
import models
from acceleration import PRECISIONS
from dsprites import CONCEPTS
from ebm.settings import CombineSettings
from errors import UsageError
from evaluation import check_network, open_model


class ConceptModel(NamedTuple):
    """A trained model with the weights of its chains; condition: the latent of sprites its labels tell, or None."""

    model: models.EnergyNetwork
    weights: models.Weights
    condition: str | None = None

    def energy(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Return the energies (N,) of images (N, C, H, W) under labels (N, label_size)."""
        return self.model.energy(self.weights, images, labels)


class Source(NamedTuple):
    """Where a model is expected, and the command that trains it."""

    exp: str
    iteration: str
    command: str


# ---- names ----


def split_name(name: str) -> tuple[str, int]:
    """Return the concept and the target of a name in an expression: ("pos", 2) for pos2, ("pos", 1) for pos."""
    match = re.fullmatch(r"(.*?)([1-9]\d*)?", name)
    assert match is not None, "any text matches"
    return match[1], int(match[2] or 1)


def read_pairs(setting: str, words: Sequence[str]) -> dict[str, str]:
    """Return the name=value pairs of a setting whose words each hold one, or several by commas."""
    pairs = {}
    for text in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", ",".join(words))):
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise UsageError(f"`{setting}`={text}: expected name=value, name of letters and digits")
        pairs[name] = value
    return pairs


def read_weights(settings: CombineSettings) -> dict[str, float]:
    """Return the weights of energies by concept; raise UsageError for other names, and for what is not above 0."""
    pairs, weights = read_pairs("weights", settings.weights), {}
    if pairs and settings.combine not in ("alternate", "sum"):
        raise UsageError("`weights` goes with `combine`=alternate and sum; an expression has its own, as 2*pos")
    for name, text in pairs.items():
        enabled = list_concepts(settings)
        if name not in enabled:
            raise UsageError(f"`weights`={name}={text}: {name} is not combined here, only {', '.join(enabled)}")
        with contextlib.suppress(ValueError):
            weights[name] = float(text)
        if not 0 < weights.get(name, 0) < math.inf:
            raise UsageError(f"`weights`={name}={text}: expected a number above 0")
    return weights


def list_concepts(settings: CombineSettings) -> list[str]:
    """Return the concepts that the settings leave on."""
    names = [concept for concept in CONCEPTS if getattr(settings, f"cond_{concept}")]
    if not names:
        raise UsageError("no concept is left: `cond_size`, `cond_shape`, `cond_pos` and `cond_rot` are all off")
    return names


def list_models(settings: CombineSettings, task: str) -> list[str]:
    """Return the names of the models that a task takes."""
    if task == "labeldiscover" or settings.combine in ("alternate", "sum"):
        return list_concepts(settings)
    return list(dict.fromkeys(composition.parse(settings.combine).names))


# ---- checkpoints ----


def get_training_flags(settings: CombineSettings, concept: str) -> str:
    """Return the flags of train.py with which a concept's model is trained: the published ones."""
    exp = getattr(settings, f"exp_{concept}")
    return f"--preset=dsprites_{concept} --exp={exp}"


def find_source(settings: CombineSettings, name: str) -> Source:
    """Return where the model of a name in an expression is expected; raise UsageError for a name without a model."""
    given, concept = read_pairs("models", settings.models), split_name(name)[0]
    if name in given:
        exp, _, iteration = given[name].partition(":")
        return Source(exp, iteration or "latest", f"python train.py --logdir={settings.logdir} --exp={exp} …")
    if concept in CONCEPTS:
        place = f" --logdir={settings.logdir}" if settings.logdir != CombineSettings.logdir else ""
        command = f"python train.py {get_training_flags(settings, concept)}{place}"
        return Source(getattr(settings, f"exp_{concept}"), getattr(settings, f"resume_{concept}"), command)
    raise UsageError(
        f"`combine`={settings.combine}: there is no model {name}; "
        f"names are {', '.join([*CONCEPTS, *given])}, others are given by `models`={name}=<exp>"
    )


def find_models(settings: CombineSettings, names: Sequence[str]) -> dict[str, pathlib.Path]:
    """Return the checkpoints of these models; raise UsageError with a line for each that is missing."""
    paths, missing = {}, []
    for name in names:
        exp, iteration, command = find_source(settings, name)
        folder = pathlib.Path(settings.logdir) / exp
        iteration = "latest" if iteration == "-1" else iteration
        try:
            paths[name] = checkpoint.find(folder, iteration)
        except UsageError:
            there = ", ".join(map(str, checkpoint.iterations(folder)[-8:])) or "no checkpoint"
            missing.append(f"  {name}: no {folder}/model_{iteration} (there is {there}); train it: {command}")
    if missing:
        raise UsageError("\n".join(["models are missing; `task`=train trains all four", *dict.fromkeys(missing)]))
    return paths


def load_models(
    settings: CombineSettings, paths: Mapping[str, pathlib.Path], device: torch.device
) -> dict[str, ConceptModel]:
    """Return the models of these checkpoints; raise UsageError where they cannot be combined."""
    concepts = {name: load_model(settings, name, path, device) for name, path in paths.items()}
    for name, concept in concepts.items():
        config = concept.model.config
        print(f"model {name}: {paths[name]}, {config.network} with {config.num_filters} filters, on {device}")
    shapes = {name: concept.model.config.image_shape for name, concept in concepts.items()}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"models of images of different shapes cannot be combined: {shapes}")
    return concepts


def load_model(settings: CombineSettings, name: str, path: pathlib.Path, device: torch.device) -> ConceptModel:
    """Return one model with its weights prepared; raise UsageError where it is conditioned on something else."""
    trained = open_model(path, device, swish_act=settings.swish_act is not False, ema=settings.ema)
    check_network(settings, trained)
    known = next((concept for concept in CONCEPTS if trained.flags.get(f"cond_{concept}")), None)
    meant, label_size = split_name(name)[0], trained.model.config.label_size
    if meant in CONCEPTS:
        if known not in (None, meant) or label_size != CONCEPTS[meant].label_size:
            kind = f"with `cond_{known}`" if known else f"on labels of width {label_size}"
            raise UsageError(f"{path} was trained {kind}, it cannot be {name}; change `exp_{meant}` or `models`")
        known = meant
    return ConceptModel(trained.model, models.spectral_norm_once(trained.model, PRECISIONS[settings.precision]), known)


# ---- training ----


def train_models(settings: CombineSettings, script: pathlib.Path) -> None:
    """Train the four concept models one after the other; a training that was begun goes on."""
    names = list_concepts(settings)
    for number, concept in enumerate(names, 1):
        words = shlex.split(get_training_flags(settings, concept))
        words += [f"--logdir={settings.logdir}", f"--device={settings.device}"]
        words += [f"--dsprites_path={settings.dsprites_path}"] if settings.dsprites_path else []
        if can_go_on(pathlib.Path(settings.logdir) / getattr(settings, f"exp_{concept}")):
            words.append("--resume_iter=latest")
        words += shlex.split(settings.train_flags)
        print(f"model {number} of {len(names)}: python train.py {shlex.join(words)}", flush=True)
        status = run_to_end([sys.executable, str(script), *words])
        if status in (130, 143):  # a signal: train.py has saved
            print("stopped; the same command goes on")
            sys.exit(status)
        if status:
            raise UsageError(f"training of {concept} ended with status {status}; the same command goes on, once mended")


def can_go_on(folder: pathlib.Path) -> bool:
    """Return whether a run in this folder can go on; the models that come with the project are weights alone."""
    if not checkpoint.iterations(folder):
        return False
    path = checkpoint.find(folder, "latest")
    return path.suffix != ".pt" or "optimizer" in checkpoint.load(path)


def run_to_end(command: list[str]) -> int:
    """Run a command to its end and return its status; a signal is left to it, so that it can save first."""
    process = subprocess.Popen(command)
    handlers = {
        signal.SIGINT: lambda number, frame: None,  # a terminal sends it to both
        signal.SIGTERM: lambda number, frame: process.send_signal(number),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

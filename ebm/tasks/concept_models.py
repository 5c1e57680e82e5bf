"""The models of single concepts that ebm_combine.py combines: their names, checkpoints and training."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

import torch

import checkpoint
from ebm.readers.dsprites import CONCEPTS
from ebm.settings import CombineSettings
from ebm.support.errors import UsageError
from ebm.support.experiments import find_experiment
from ebm.support.launch import remove_launch
from ebm.support.reports import print_written
from ebm.tasks.expressions import LARGEST_WEIGHT, parse_expression
from ebm.tasks.trained_models import TrainedModel, check_network, find_contradictions, open_model
from ebm.training.stopping import set_stop_handlers
from models import ModelConfig, PreparedEnergy, freeze_energy


class ConceptModel(NamedTuple):
    """The energy of a trained model; condition: the concept that it is conditioned on, or None."""

    energy: PreparedEnergy
    condition: str | None = None

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model's network."""
        return self.energy.model.config


class ModelSource(NamedTuple):
    """The experiment and the iteration of a model's checkpoint, and the command that trains the model.

    setting: the name of the setting that chose the experiment.
    """

    exp: str
    setting: str
    iteration: str
    command: str


# ---- names ----


def split_name(name: str) -> tuple[str, int]:
    """Return the concept and the number of the target in a name: ("pos", 2) for pos2, ("pos", 1) for pos."""
    match = re.fullmatch(r"(.*?)([1-9]\d*)?", name)
    assert match is not None, "any text matches"
    return match[1], int(match[2] or 1)


def read_pairs(setting: str, words: Sequence[str]) -> dict[str, str]:
    """Return the name=value pairs of a setting; each word holds one pair, or several separated by commas.

    Raises UsageError for a word of another form.
    """
    pairs = {}
    for text in filter(None, re.split(r",(?=[A-Za-z_]\w*=)", ",".join(words))):
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise UsageError(f"`{setting}`={text}: expected name=value with a name of letters and digits")
        pairs[name] = value
    return pairs


def read_weights(settings: CombineSettings) -> dict[str, float]:
    """Return the setting `weights`: concept -> factor of its energy.

    Raises UsageError for a name that is not combined, and for a value that is not a number above 0.
    """
    pairs, weights = read_pairs("weights", settings.weights), {}
    if pairs and settings.combine not in ("alternate", "sum"):
        raise UsageError("`weights` is for `combine`=alternate and sum; in an expression write 2*pos")
    for name, text in pairs.items():
        enabled = list_concepts(settings)
        if name not in enabled:
            raise UsageError(f"`weights`={name}={text}: {name} is not combined here, only {', '.join(enabled)}")
        with contextlib.suppress(ValueError):
            weights[name] = float(text)
        if not 0 < weights.get(name, 0) <= LARGEST_WEIGHT:
            raise UsageError(f"`weights`={name}={text}: expected a number above 0, at most {LARGEST_WEIGHT:g}")
    return weights


def list_concepts(settings: CombineSettings) -> list[str]:
    """Return the concepts that the settings switch on; raise UsageError if there are none."""
    names = [concept for concept in CONCEPTS if getattr(settings, f"cond_{concept}")]
    if not names:
        raise UsageError("no concept is left: `cond_size`, `cond_shape`, `cond_pos` and `cond_rot` are all off")
    return names


def list_models(settings: CombineSettings, task: str) -> list[str]:
    """Return the names of the models that a task needs."""
    if task == "labeldiscover" or settings.combine in ("alternate", "sum"):
        return list_concepts(settings)
    return list(dict.fromkeys(parse_expression(settings.combine).names))


# ---- checkpoints ----


def get_training_flags(settings: CombineSettings, concept: str) -> str:
    """Return the published flags of train.py for the model of a concept."""
    exp = getattr(settings, f"exp_{concept}")
    return f"--preset=dsprites_{concept} --exp={exp}"


def find_source(settings: CombineSettings, name: str) -> ModelSource:
    """Return the source of the model with this name in an expression; raise UsageError for an unknown name."""
    further, concept = read_pairs("models", settings.models), split_name(name)[0]
    if name in further:
        exp, _, iteration = further[name].partition(":")
        command = f"python train.py --logdir={settings.experiments_root} --exp={exp} …"
        return ModelSource(exp, "models", iteration or "latest", command)
    if concept in CONCEPTS:
        place, setting = settings.experiments_root, f"exp_{concept}"
        command = f"python train.py {get_training_flags(settings, concept)}"
        command += f" --logdir={place}" if place != CombineSettings.modeldir else ""
        return ModelSource(getattr(settings, setting), setting, getattr(settings, f"resume_{concept}"), command)
    raise UsageError(
        f"`combine`={settings.combine}: there is no model {name}; "
        f"the names are {', '.join([*CONCEPTS, *further])}; add a model with `models`={name}=<exp>"
    )


def find_source_checkpoint(settings: CombineSettings, source: ModelSource) -> pathlib.Path:
    """Return the path of a model's checkpoint, of the user or shipped; raise UsageError if it does not exist."""
    folder = settings.locate_model(source.exp, source.setting)
    return checkpoint.find(folder, source.iteration, source.setting.replace("exp_", "resume_"))


def find_models(settings: CombineSettings, names: Sequence[str]) -> dict[str, pathlib.Path]:
    """Return the paths of the models' checkpoints by name; raise UsageError with a line for each missing one."""
    paths, missing = {}, []
    for name in names:
        source = find_source(settings, name)
        try:
            paths[name] = find_source_checkpoint(settings, source)
        except UsageError as error:
            missing.append(f"  {name}: {error}, or train it: {source.command}")
    if missing:
        raise UsageError("\n".join(["models are missing; `task`=train trains all four", *dict.fromkeys(missing)]))
    return paths


def find_starts(settings: CombineSettings, names: Sequence[str]) -> dict[str, pathlib.Path]:
    """Return the paths of the checkpoints that gentest trains further, by concept; print a line for each other one.

    A concept that is switched off, or whose checkpoint is missing or contradicts the network settings, has none.
    """
    paths = {}
    for name in names:
        if not getattr(settings, f"cond_{name}"):
            print(f"model {name}: starts from new weights, as cond_{name}=False says")
            continue
        try:
            path = find_source_checkpoint(settings, find_source(settings, name))
        except UsageError as error:
            print(f"model {name}: starts from new weights: {error}".replace("`", ""))
            continue
        config = open_concept(settings, path, torch.device("cpu")).model.config
        differences = find_contradictions(settings, config).items()
        if differences:
            reasons = ", ".join(f"{each}={stored}, not {value}" for each, (value, stored) in differences)
            print(f"model {name}: starts from new weights, because {path} has {reasons}")
            continue
        paths[name] = path
    return paths


def load_models(
    settings: CombineSettings, paths: Mapping[str, pathlib.Path], device: torch.device
) -> dict[str, ConceptModel]:
    """Load the models of these checkpoints and print a line for each; raise UsageError if they cannot be combined."""
    concepts = {name: load_model(settings, name, path, device) for name, path in paths.items()}
    for name, concept in concepts.items():
        config = concept.config
        activation = "swish" if config.swish_act else "leaky ReLU"
        print(
            f"model {name}: {paths[name]}, {config.network} with {config.num_filters} filters, {activation}, {device}"
        )
    shapes = {name: concept.config.image_shape for name, concept in concepts.items()}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"models of images of different shapes cannot be combined: {shapes}")
    return concepts


def open_concept(settings: CombineSettings, path: pathlib.Path, device: torch.device) -> TrainedModel:
    """Load the trained model of a checkpoint with these settings, see `open_model`."""
    return open_model(path, device, settings, ema=settings.ema)


def load_model(settings: CombineSettings, name: str, path: pathlib.Path, device: torch.device) -> ConceptModel:
    """Load the model of this name; raise UsageError if it is conditioned on another concept than the name says."""
    trained = open_concept(settings, path, device)
    check_network(settings, trained)
    trained_on = next((concept for concept in CONCEPTS if trained.flags.get(f"cond_{concept}")), None)
    concept, label_size = split_name(name)[0], trained.model.config.label_size
    if concept in CONCEPTS:
        if trained_on not in (None, concept) or label_size != CONCEPTS[concept].label_size:
            kind = f"with `cond_{trained_on}`" if trained_on else f"on labels of width {label_size}"
            raise UsageError(f"{path} was trained {kind}, it cannot be {name}; change `exp_{concept}` or `models`")
        trained_on = concept
    return ConceptModel(freeze_energy(trained.model, precision=settings.precision), trained_on)


# ---- training ----


def train_models(settings: CombineSettings, script: pathlib.Path) -> None:
    """Train the models of the concepts one after the other by train.py; resume a training that was interrupted."""
    names, root = list_concepts(settings), settings.experiments_root
    for number, concept in enumerate(names, 1):
        words = shlex.split(get_training_flags(settings, concept))
        words += [f"--logdir={root}", f"--device={settings.device}"]
        words += [f"--dsprites_path={settings.dsprites_path}"] if settings.dsprites_path else []
        if can_resume(find_experiment(root, getattr(settings, f"exp_{concept}"), f"exp_{concept}")):
            words.append("--resume_iter=latest")
        words += shlex.split(settings.train_flags)
        print(f"model {number} of {len(names)}: python train.py {shlex.join(words)}", flush=True)
        status = run_command([sys.executable, str(script), *words])
        if status > 128:  # a signal, after which train.py has saved
            print("stopped; the same command resumes the training")
            sys.exit(status)
        if status == 2:  # a mistake, of which train.py has said in one line what it is
            sys.exit(status)
        if status:
            raise UsageError(
                f"training of {concept} failed with status {status}; solve that, then repeat the command to resume"
            )
    print_written(find_experiment(root, getattr(settings, f"exp_{concept}")) for concept in names)


def can_resume(folder: pathlib.Path) -> bool:
    """Return whether the run in this folder can be resumed; a copy of a shipped model cannot, it holds weights only."""
    if not checkpoint.list_iterations(folder):
        return False
    path = checkpoint.find(folder, "latest")
    return path.suffix != ".pt" or "optimizer" in checkpoint.load(path)


def run_command(command: list[str]) -> int:
    """Run a command to its end and return its exit status; signals are left to it, so that it can save first.

    The command is a job of its own, even if this process is one of several workers.
    """
    process = subprocess.Popen(command, env=remove_launch(os.environ))

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # a terminal sends Ctrl-C to both processes
            process.send_signal(number)

    earlier = set_stop_handlers(pass_on)
    try:
        return process.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)

"""Loading a trained model and data that fit it, for the scripts that sample from a model or measure it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

import checkpoint
import data
import models
from ebm.readers.bounded import describe_failure, read_text
from ebm.readers.state_values import is_count, is_number
from ebm.settings import (
    SIZES,
    SUBSETS,
    CheckedNetwork,
    CombineNetwork,
    DataFiles,
    ModelChoice,
    TestData,
    UnrecordedNetwork,
)
from ebm.support.cli import AUTO
from ebm.support.errors import UsageError


class TrainedModel(NamedTuple):
    """A trained model in eval mode, with the path of its checkpoint and the settings of its training.

    class_names: empty if the checkpoint does not name the classes.
    """

    model: models.EnergyNetwork
    path: pathlib.Path
    flags: Mapping[str, Any]  # those of train.py, by name; empty for a TensorFlow checkpoint
    class_names: tuple[str, ...]

    @property
    def rescale(self) -> float:
        """The largest pixel value of the images that the model was trained on, which are in [0, rescale]."""
        return self.flags.get("rescale", 1.0)

    def choose_antialias(self, antialias: bool | None) -> bool:
        """Return whether images are resized with antialiasing: `antialias` if it is not None, else as in training.

        Before this was a setting, this project always did so; a note says that it is assumed. The reference never did.
        """
        if antialias is not None or self.flags.get("dataset") != "imagenetfull":
            return bool(antialias)
        if "antialias" not in self.flags:
            note_assumed_antialias(self.path)
        return self.flags.get("antialias", True)

    @property
    def sample_steps(self) -> int:
        """The number of Langevin steps with which the training run samples, 200 if that is not recorded."""
        steps, own = self.flags.get("sample_steps"), self.flags.get("num_steps")
        return steps if steps is not None else 10 * (20 if own is None else own)

    def choose_num_steps(self, num_steps: int, rounds: int = 1) -> int:
        """Return the number of Langevin steps of each of several rounds: `num_steps`, or a part of `sample_steps`.

        The latter if `num_steps` is AUTO: then all rounds together have the length of the training run's own samples.
        """
        return max(1, round(self.sample_steps / rounds)) if num_steps == AUTO else num_steps

    def find_left_out(self, dataset: str | None) -> str | None:
        """Return the class that the training left out of a data set; None if it left out none, or used another one.

        dataset: its name; None stands for that of the training.
        """
        return self.flags.get("leave_out") if dataset in (None, self.flags.get("dataset")) else None

    def choose_step_lr(self, step_lr: float | None, published: float = 10.0) -> float:
        """Return the step size of Langevin steps: `step_lr` if it is given, else that of training, or `published`."""
        return self.flags.get("step_lr", published) if step_lr is None else step_lr


@functools.cache  # one line for both splits of a data set
def note_assumed_antialias(path: pathlib.Path) -> None:
    """Print a note, once per checkpoint, that images are resized as in its training, without its saying so."""
    print(f"note: antialias=True: {path} was trained before this was a setting, on antialiased images")


def find_checkpoint(settings: ModelChoice) -> pathlib.Path:
    """Return the path of the checkpoint that the settings name, of the user or shipped.

    Raises UsageError, which lists the existing ones, if there is no such experiment or checkpoint.
    """
    return checkpoint.find(settings.locate_model(settings.exp), settings.resume_iter)


def open_model(path: pathlib.Path, device: torch.device, settings: UnrecordedNetwork, *, ema: bool) -> TrainedModel:
    """Load a trained model from a checkpoint.

    settings: what a TensorFlow checkpoint does not store. ema: load the averaged weights. Raises UsageError if the
    checkpoint is damaged or has no averaged weights.
    """
    model = checkpoint.load_energy(path, ema=ema, device=device, **settings.unrecorded)
    check_training_flags(model.settings, path)
    return TrainedModel(model, path, model.settings, model.class_names)


def check_training_flags(flags: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raise UsageError if a setting of training that scripts read from a checkpoint has an impossible value."""
    fits: dict[str, Callable[[Any], bool]] = {
        "rescale": lambda value: is_number(value) and value > 0,
        "step_lr": lambda value: is_number(value) and value >= 0,
        "temperature": lambda value: is_number(value) and value >= 0,
        "classify": lambda value: is_number(value) and value >= 0,
        "classify_scale": lambda value: is_number(value) and value >= 0,
        "num_steps": is_count,
        "sample_steps": is_count,
    }
    fits |= dict.fromkeys(
        ("dataset", *(field.name for field in dataclasses.fields(DataFiles) if field.name != "download")),
        lambda value: isinstance(value, str),
    )
    for name, is_right in fits.items():
        if flags.get(name) is not None and not is_right(flags[name]):
            raise UsageError(f"{path} was trained with an impossible value of {name}; use an earlier checkpoint")


def find_contradictions(
    settings: CheckedNetwork | CombineNetwork, config: models.ModelConfig
) -> dict[str, tuple[Any, Any]]:
    """Return the network settings that contradict a checkpoint: name -> (the setting's value, the checkpoint's value).

    config: the network of the checkpoint. A setting that is None contradicts nothing.
    """
    switches = {name: network == config.network for name, network in SIZES.items()}
    switches |= {"cclass": config.label_size > 0, "use_attention": config.use_attention}
    names = ("spec_norm", "num_filters", *checkpoint.UNRECORDED)
    stored: dict[str, Any] = switches | {name: getattr(config, name) for name in names}
    values = {name: getattr(settings, name, None) for name in stored}
    return {name: (values[name], stored[name]) for name in stored if values[name] not in (None, stored[name])}


def check_network(settings: CheckedNetwork | CombineNetwork, trained: TrainedModel) -> None:
    """Raise UsageError if a setting contradicts the network of the checkpoint; the message gives the true value."""
    config = trained.model.config
    for name, (value, stored) in find_contradictions(settings, config).items():
        size = next((f" (`{setting}`)" for setting, network in SIZES.items() if network == config.network), "")
        kind = f"{config.network}{size}" if name in SIZES else f"`{name}`={stored}"
        raise UsageError(f"`{name}`={value} does not fit {trained.path}, which is {kind}; leave it out")


def note_contradictions(settings: CheckedNetwork, trained: TrainedModel) -> None:
    """Print a note for each network setting without effect, because it contradicts the checkpoint."""
    for name, (value, stored) in find_contradictions(settings, trained.model.config).items():
        print(f"note: {name}={value} has no effect: the checkpoint's network has {name}={stored}")


def read_names(path: pathlib.Path, classes: int) -> list[str]:
    """Read the names of all classes from a text file, one per line.

    Raises UsageError if the file cannot be read or the number of its lines is not `classes`.
    """
    try:
        names = read_text(path, 1 << 20).splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"`class_names`={path} cannot be read: {describe_failure(error)}") from None
    if len(names) != classes:
        raise UsageError(f"`class_names`={path} has {len(names)} lines and the network {classes} classes; one per line")
    return names


def refuse_concept_model(trained: TrainedModel) -> None:
    """Raise UsageError if a dSprites model is conditioned on a size, position or rotation instead of classes."""
    config = trained.model.config
    if config.label_size and not config.has_classes:
        raise UsageError(
            f"{trained.path} is conditioned on a size, position or rotation; use ebm_combine.py for such models"
        )


def find_subset(settings: TestData, training_flags: Mapping[str, Any]) -> str | None:
    """Return the subset of sprites to use: that of the settings, else that of training; None for all sprites."""
    return settings.subset or next((SUBSETS[name] for name in SUBSETS if training_flags.get(name)), None)


def load_split(
    split: str,
    trained: TrainedModel,
    settings: TestData,
    device: torch.device,
    *,
    name: str | None = None,
    condition: str | None = None,
    left_out: bool = False,
) -> data.Dataset:
    """Return a split of a data set: `name` if given, else that of the settings, else that the model was trained on.

    If the training left a class of its data set out, so does the split. condition: the concept that the labels of
    sprites describe. left_out: return the images of that class instead, see `find_left_out`. Raises UsageError if the
    images do not fit the model.
    """
    name, config = name or settings.dataset or trained.flags.get("dataset", "cifar10"), trained.model.config
    source = data.DATASETS.get(name)
    path_setting = source and source.path_setting
    is_sprites, is_folder = name == "dsprites", name == "folder"
    if settings.subset and not is_sprites:
        flag_name = next(flag for flag, subset in SUBSETS.items() if subset == settings.subset)
        raise UsageError(f"`{flag_name}` is for `dataset`=dsprites, not {name}; leave it out")
    dataset = data.load_dataset(
        name,
        split=split,
        root=settings.datadir,
        device=device,
        path=settings.find_path(name) or trained.flags.get(path_setting) if path_setting else None,
        image_size=config.image_shape[1:] if is_folder else None,
        channels=config.image_shape[0] if is_folder else None,
        condition=condition if is_sprites else None,
        subset=find_subset(settings, trained.flags) if is_sprites else None,
        antialias=trained.choose_antialias(settings.antialias) if name == "imagenetfull" else bool(settings.antialias),
        workers=settings.data_workers,
        download=settings.download,
    )
    if dataset.image_shape != config.image_shape:
        raise UsageError(
            f"`dataset`={name} has images of shape {dataset.image_shape}, the model takes {config.image_shape}"
        )
    class_left_out = trained.find_left_out(name)
    return dataset if class_left_out is None else data.split_class_off(dataset, class_left_out)[left_out]


def match_labels(dataset: data.Dataset, trained: TrainedModel) -> data.Dataset:
    """Return a data set whose labels are those of a model, if the model is conditioned on labels.

    Raises UsageError if the data set has no labels, others, or a class that the model does not know.
    """
    label_size = trained.model.config.label_size
    if not label_size:
        return dataset
    if not dataset.label_size:
        raise UsageError(
            f"`dataset`={dataset.name} has no labels (its images are in no class folders), and the model is "
            "conditioned on labels; put the images into class folders"
        )
    if trained.class_names and dataset.class_names:
        return data.match_classes(dataset, trained.class_names)
    if dataset.label_size != label_size:
        raise UsageError(
            f"`dataset`={dataset.name} has labels of width {dataset.label_size}, the model takes {label_size}"
        )
    return dataset

"""The data sets that the sandbox examines a model on: its own, and those it should tell apart from its own."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import torch

import data
from ebm.settings import CONDITIONS, SandboxSettings
from ebm.support.errors import UsageError
from ebm.tasks.trained_models import TrainedModel, find_subset, load_split, match_labels
from models import ModelConfig


def find_condition(settings: SandboxSettings, label_size: int, training_flags: Mapping[str, object]) -> str | None:
    """Return the concept of a dSprites model: that of the settings, else of its training, else by its label width.

    training_flags: those of the training run. None means that the subset of its data determines the concept.
    """
    by_settings = [condition for name, condition in CONDITIONS.items() if getattr(settings, name)]
    by_training = [condition for name, condition in CONDITIONS.items() if training_flags.get(name)]
    by_width = None if find_subset(settings, training_flags) else {1: "size", 2: "pos"}.get(label_size, "shape")
    return (by_settings + by_training + [by_width])[0]


def remove_step_noise(dataset: data.Dataset) -> data.Dataset:
    """Return a data set in memory without noise that is U(0, 1/256), as the reference's sandbox reads CIFAR-10.

    Noise of other data sets, such as SVHN's U(−1/512, 1/512), stays, as there.
    """
    if isinstance(dataset, data.StoredImages) and dataset.noise == "steps":
        return dataclasses.replace(dataset, noise="floor")
    return dataset


def load_model_split(
    split: str, settings: SandboxSettings, trained: TrainedModel, device: torch.device
) -> data.Dataset:
    """Return a split of the data set to examine the model on; raise UsageError if it does not fit the model."""
    condition = find_condition(settings, trained.model.config.label_size, trained.flags)
    name = "svhn" if settings.svhn else None
    dataset = load_split(split, trained, settings, device, name=name, condition=condition)
    return remove_step_noise(match_labels(dataset, trained))


def load_outlier_set(
    name: str, settings: SandboxSettings, config: ModelConfig, device: torch.device, *, download: bool = True
) -> data.Dataset:
    """Return an out-of-distribution data set: that of this name, or the images of the folder at this path.

    download: whether missing files may be downloaded, if the settings allow it.
    """
    if name not in settings.mixfolder:
        dataset = data.load_dataset(
            name,
            split="test",
            root=settings.datadir,
            device=device,
            path=settings.find_path(name) if name in data.DATASETS else None,
            workers=settings.data_workers,
            download=settings.download and download,
        )
        return remove_step_noise(dataset)
    channels, height, width = config.image_shape
    dataset = data.load_dataset(
        "folder",
        split="test",
        device=device,
        path=name,
        image_size=(height, width),
        channels=channels,
        workers=settings.data_workers,
    )
    assert isinstance(dataset, data.StoredImages), "a folder is read into memory"
    return remove_step_noise(dataclasses.replace(dataset, name=pathlib.Path(name).resolve().name))


def list_outliers(settings: SandboxSettings) -> list[str]:
    """Return the out-of-distribution sets that the settings select: names, and paths of folders."""
    switches = {
        "svhn": settings.svhnmix,
        "cifar100": settings.cifar100mix,
        "textures": settings.texturemix,
        "random": settings.randommix,
        "interpolation": settings.interpolationmix,
    }
    names = [name for name, is_on in switches.items() if is_on] + list(settings.mixset)
    folders = [pathlib.Path(folder) for folder in settings.mixfolder]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"`mixfolder`={folder}: no such folder")
    titles = names + [folder.resolve().name for folder in folders]
    twice = [title for title in titles if titles.count(title) > 1]
    if twice:
        raise UsageError(f"two sets are called {twice[0]}; give each set only once")
    return names + list(settings.mixfolder) or ["interpolation"]

"""What every task of ebm_sandbox.py receives: a model, its data, its results; and what it returns, a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Dataset, describe_labels, name_classes
from ebm.settings import SandboxSettings
from ebm.support import pictures
from ebm.support.errors import UsageError
from ebm.support.files import write_file
from ebm.support.progress import show_waiting
from ebm.tasks.attacks import SHADES
from ebm.tasks.examined_model import ExaminedModel, count_most_images
from ebm.tasks.results import Results
from models import ModelConfig, draw_starts

ROWS = 20  # rows of a picture


class Examples(NamedTuple):
    """Images of a data set with the labels that the model is conditioned on."""

    images: Tensor  # (N, C, H, W) in [0, 1]
    labels: Tensor  # (N, label_size), of width 0 for an unconditional model

    @property
    def classes(self) -> Tensor:
        """The classes (N,) of one-hot labels."""
        return self.labels.argmax(1)

    def first(self, number: int) -> Examples:
        """Return the first `number` images with their labels."""
        return Examples(self.images[:number], self.labels[:number])


class Report(NamedTuple):
    """The result of a task: figures, or rows of figures, by name; `paper` holds the published ones of these names."""

    figures: Mapping[str, Any]
    paper: Mapping[str, str] = {}


@dataclasses.dataclass
class SandboxRun:
    """One task on one model, with its data sets and its results.

    load: returns the model's data set for a split, "train" or "test". load_mix: returns an out-of-distribution set by
    its name, downloaded if it is missing unless download=False is given. mixes: names of such sets, "random" or
    "interpolation". results: the files. names: of the classes, from the checkpoint; if empty, the names come from the
    data set. load_left_out: returns the test images of the class that the training left out; None if it left out none.
    used: a description of the images that the task has examined.
    """

    model: ExaminedModel
    settings: SandboxSettings
    load: Callable[[str], Dataset]
    load_mix: Callable[..., Dataset]
    mixes: Sequence[str]
    results: Results
    names: tuple[str, ...] = ()
    load_left_out: Callable[[], Dataset] | None = None
    used: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model's network."""
        return self.model.model.config

    @property
    def refine(self) -> float:
        """The radius of the L∞ ball within which Langevin steps refine an image before it is classified."""
        return self.settings.refine / SHADES

    def with_seed(self, seed: int) -> SandboxRun:
        """Seed the model's generator anew, and return the same task with this seed."""
        self.model.generator.manual_seed(seed)
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, seed=seed))

    def describe_refinement(self) -> str:
        """Return a description of the refinement before classification."""
        steps = self.model.num_steps
        return (
            f"{steps} Langevin steps under each class, L∞ ball of {self.settings.refine:g}/{SHADES}"
            if steps
            else "none"
        )

    def choose_number(self, usual: int | None = None) -> int:
        """Return how many images to use: `limit` if it is set, else the usual number of a task.

        usual: None stands for as many as possible, up to a number that memory surely holds.
        """
        if self.settings.most_images:
            return self.settings.most_images
        return count_most_images(self.config.image_shape) if usual is None else usual

    def count_images(self, split: str, number: int) -> int:
        """Return how many images of a split there are to examine, if `number` are wanted."""
        return min(number, len(self.load(split)))

    def announce(self, work: str, rounds: int = 0) -> None:
        """Print how much work the task does. rounds: of each chain; 0 if no chain runs."""
        steps = f"{self.model.num_steps} Langevin steps with step_lr {self.model.step_lr:g}"
        chain = f", for each {rounds} round{'s' * (rounds > 1)} of {steps}" if rounds else ""
        print(f"work: {work}{chain}", flush=True)

    def draw_index(self, dataset: Dataset, number: int, what: str) -> Tensor:
        """Return the indices of `number` random images; the same seed gives the same indices.

        what: the name of the images in the report.
        """
        number = min(number, len(dataset))
        self.used[what] = f"{number} of {len(dataset)} images of {dataset.name}, dequantisation: {dataset.noise}"
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.settings.seed))
        return order[:number].to(self.model.device)

    def draw_examples(self, split: str, number: int) -> Examples:
        """Return random images of the model's data set with their labels."""
        dataset = self.load(split)
        index = self.draw_index(dataset, number, split)
        with show_waiting(f"making {len(index):,} images of {split} ready"):
            images, labels = dataset.batch(index, self.model.generator)
        return Examples(images, images.new_zeros(len(images), 0) if labels is None else labels)

    def find_class_names(self) -> tuple[str, ...]:
        """Return the names of the classes that the model is conditioned on; none if its labels are not classes."""
        return (self.names or self.load("test").class_names) if self.model.classes else ()

    def require_class_names(self, needed_by: str) -> tuple[str, ...]:
        """Return the names of the classes; raise UsageError if the model is not conditioned on classes.

        needed_by: the task, for the message.
        """
        names = self.find_class_names()
        if not names:
            kind = "conditioned on other labels" if self.model.classes else "unconditional"
            raise UsageError(f"`task`={needed_by} needs a model conditioned on classes, this one is {kind}")
        return names

    def sample_labels(self, number: int) -> Tensor:
        """Return labels (number, label_size) for samples: the classes in order, or labels of real images.

        The latter are used if the model is conditioned on labels that are not classes.
        """
        place = torch.arange(number, device=self.model.device)
        if not self.model.classes:
            return torch.zeros(number, 0, device=self.model.device)
        if self.find_class_names():
            return torch.eye(self.model.classes, device=self.model.device)[place * self.model.classes // number]
        labels = self.draw_examples("test", number).labels
        return labels[place % len(labels)]

    def describe_labels(self, labels: Tensor) -> list[str]:
        """Return labels (n, label_size) in words, such as the names of classes; [] for an unconditional model."""
        if names := self.find_class_names():
            return name_classes(labels.argmax(1).tolist(), names)
        return describe_labels(labels, self.load("test")) if self.model.classes else []

    def draw_starts(self, labels: Tensor) -> Tensor:
        """Return images from which chains start as in training, one for each of the labels (n, label_size)."""
        return draw_starts(self.model.model, len(labels), labels, self.model.generator)

    def get_published(self, figures: Mapping[str, str]) -> Mapping[str, str]:
        """Return the published figures if the data set is CIFAR-10, on which they were measured; else none."""
        return figures if self.load("test").name == "cifar10" else {}

    # ------------------------------------------------------------------------------------------ files

    def add_file(self, name: str) -> Path:
        """Return the path of a file of the results, which is about to be written."""
        return self.results.add_file(name)

    def write_panel(self, name: str, columns: Mapping[str, Tensor], rows: Sequence[str] = (), note: str = "") -> None:
        """Write a picture with a titled column per batch of images and a row per image, see `pictures.make_panel`."""
        pictures.save_panel(columns, self.add_file(f"{name}.png"), rows=rows, note=note)

    def write_array(self, name: str, values: Tensor | list[float]) -> np.ndarray:
        """Write numbers to an .npy file and return them as an array."""
        array = torch.as_tensor(values).cpu().numpy()
        write_file(self.add_file(f"{name}.npy"), lambda file: np.save(file, array))
        return array

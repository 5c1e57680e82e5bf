"""How well the energy of a run classifies test images, at each of its tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import data
from ebm.settings import TrainSettings
from ebm.support.errors import UsageError
from ebm.support.metrics import Reliability, measure_reliability
from ebm.support.progress import SHORT, Progress
from ebm.training.setup import read_split
from models import PreparedEnergy, compute_class_logits

TEST_IMAGES = 1_000  # that a test classifies, at most
EVALUATIONS = 500  # of the network at once


class LabelledImages(NamedTuple):
    """Images with their classes."""

    images: Tensor  # (N, C, H, W) in [0, rescale]
    classes: Tensor  # (N,)


def draw_test_images(settings: TrainSettings, dataset: data.Dataset, device: torch.device) -> LabelledImages | None:
    """Return random test images of a run's data set, the same in every call, with noise as in training.

    It is None if the run does not learn to classify, or, with a note, where the data set has no test images. dataset:
    the training images.
    """
    if not settings.classify or not settings.train:
        return None
    try:
        test = read_split("test", settings, device, dataset.class_names)
        reason = f"those of {dataset.name} are the training images" if data.have_same_images(test, dataset) else ""
    except UsageError as error:
        reason = str(error).replace("`", "")
    if reason:
        print(f"note: no accuracy on test images is measured: {reason}")
        return None
    generator = torch.Generator(device).manual_seed(0)
    index = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:TEST_IMAGES]
    images, labels = test.batch(index.to(test.index_device), generator, settings.rescale)
    assert labels is not None, "the training images have labels"
    return LabelledImages(images, labels.argmax(1))


@torch.no_grad()
def measure_classification(energy: PreparedEnergy, examples: LabelledImages, scale: float) -> Reliability:
    """Return how reliable the predictions softmax(−scale · E) for test images are."""
    classes = energy.model.config.label_size
    logits: list[Tensor] = []
    with Progress(len(examples.images), what="classifying test images", patience=SHORT) as progress:
        for part in examples.images.split(max(1, EVALUATIONS // classes)):
            logits.append(compute_class_logits(energy, part, classes))
            progress.advance(len(part))
    return measure_reliability(scale * torch.cat(logits), examples.classes)

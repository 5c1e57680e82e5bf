"""A small classifier of a data set, in whose features samples are compared if Inception cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm.support.errors import UsageError
from ebm.support.progress import SHORT, Progress


def build_stage(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return a 3x3 convolution of stride 2 with batch normalisation and ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class FeatureClassifier(nn.Module):
    """A small convolutional classifier of images (C, H, W) with sides >= 8; its last hidden layer has 64 features.

    Images are float in [0, 1] or uint8, on any device. Large images are averaged down to a shorter side of 32 to 63
    pixels. `accuracy` is the share of correct answers on images held out from training.
    """

    def __init__(self, image_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        side = min(height, width)
        self.image_shape = tuple(image_shape)
        self.classes = classes
        self.accuracy = float("nan")
        self.shrink = max(1, side // 32)
        widths = [channels, 32, 64] if side < 16 else [channels, 32, 64, 64]
        self.stages = nn.Sequential(*[build_stage(*pair) for pair in pairwise(widths)])
        self.output = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (N, 64) of a batch of images (N, C, H, W)."""
        images = images.to(self.output.weight.device)
        images = images / 255 if images.dtype == torch.uint8 else images
        return self.stages(F.avg_pool2d(images, self.shrink)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of a batch of images (N, C, H, W)."""
        return self.output(self.embed(images))


def check_examples(image_shape: Sequence[int], labels: Tensor) -> None:
    """Raise UsageError if the classifier cannot be trained on images (C, H, W) with these labels (N,)."""
    _, height, width = image_shape
    if min(height, width) < 8:
        raise UsageError(f"the feature classifier takes images of at least 8x8 pixels; these are {height}x{width}")
    if labels.unique().numel() < 2:
        raise UsageError("the feature classifier needs a data set with labels of at least two classes")


def train_feature_classifier(
    images: Tensor, labels: Tensor, *, seed: int = 0, device: torch.device | str = "cpu"
) -> FeatureClassifier:
    """Train a classifier with fixed hyperparameters and return it in eval mode.

    images: uint8 (N, C, H, W). labels: int64 (N,) from 0. A fifth of the images, at most 5,000, is held out to measure
    `accuracy`. AdamW trains on the rest for 25 epochs in batches of 128, but for at most 1,000 steps: at 28x28 pixels
    about 15 s of CPU time for 1,797 digits and a minute for 60,000 images. The same data and seed give the same
    classifier on the same machine with the same number of threads. The global random state does not change. Raises
    UsageError if there are fewer than two classes.
    """
    check_examples(images.shape[1:], labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # a layer draws its first weights from the CPU's global generator
        torch.default_generator.manual_seed(seed)
        classifier = FeatureClassifier(images.shape[1:], int(labels.max()) + 1).to(device)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    held_out, rest = order.tensor_split([min(len(images) // 5, 5000)])
    batch_size = min(128, len(rest))
    steps = min(1000, 25 * len(rest) // batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
        Progress(steps, what="step of the classifier", patience=SHORT) as progress,
    ):
        for _ in range(steps):
            batch = rest[torch.randint(len(rest), (batch_size,), generator=generator).to(images.device)]
            loss = F.cross_entropy(classifier(images[batch]), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    classifier.eval()
    with torch.no_grad():
        is_correct = [classifier(images[batch]).argmax(1) == labels[batch].to(device) for batch in held_out.split(500)]
    classifier.accuracy = float(torch.cat(is_correct).double().mean())
    return classifier

"""The pools of eval_inception.py, with the random numbers of the reference: its rounds, entries and images."""

import random

import numpy as np
import pytest
import torch

from conftest import make_progress
from ebm.measures import features
from ebm.measures.patches import compute_patch_statistics
from ebm.settings import InceptionSettings
from ebm.support import metrics
from ebm.tasks import quality
from golden_cases import assert_close, load_task, to_ours

CASE, CONFIG, _, _ = load_task("inception")
CLASSES = 10


class ReferenceDraws:
    """The random numbers of a case, from numpy and from Python; it remembers the drawn indices."""

    def __init__(self):
        self.arrays, self.integers = np.random.RandomState(CONFIG["numpy_seed"]), random.Random(CONFIG["random_seed"])
        self.indices, self.is_mixing, self.images = [], False, None

    def draw_noise(self, number):
        return to_ours(self.arrays.uniform(0, 1, (number, 32, 32, 3)))

    def draw_images(self, labels):
        images = self.draw_noise(len(labels)) if self.is_mixing else self.images
        self.is_mixing = False
        return images

    def draw_labels(self, number):
        if not self.is_mixing:  # for new chains the reference draws the images before the labels
            self.images = self.draw_noise(number)
        return torch.eye(CLASSES)[self.arrays.randint(0, CLASSES, number)]

    def draw_indices(self, entries, number):
        self.indices.append([self.integers.randint(0, entries - 1) for _ in range(number)])
        return torch.tensor(self.indices[-1])

    def draw_mask(self, number, share):
        self.is_mixing = True
        return torch.from_numpy(self.arrays.uniform(0, 1, number) > 1 - share)


class MeanColours:
    """An extractor that stands for Inception: the mean colours of images, and no classes."""

    name, identity = features.Inception.name, ""

    def __call__(self, images):
        return images.float().mean((2, 3)), images.new_zeros(len(images), 0)


@pytest.mark.parametrize("run", CONFIG["runs"])
def test_pool_is_that_of_the_reference(run, monkeypatch):
    """Breaks when a pool is filled, drawn from, mixed, written back, cut, turned into bytes or split in another way."""
    words = dict(CONFIG["runs"][run])
    networks, draws, rounds, pools = words.pop("ensemble"), ReferenceDraws(), [], []
    settings = InceptionSettings(**words)

    def build_chain(network):
        def chain(images, labels):
            rounds.append((network, len(draws.indices)))
            return images + 0.01

        return chain

    def draw(_):
        pools.append(quality.run_pool(list(map(build_chain, range(networks))), draws, settings, make_progress()))
        return pools[-1][0]

    images = quality.draw_from_pools(draw, settings.im_number)
    ((pool, labels),) = pools
    assert len(pool) == CASE[f"{run}_entries"]
    assert [network for network, _ in rounds] == CASE[f"{run}_networks"].tolist()
    assert sum(not drawn for _, drawn in rounds) == CASE[f"{run}_filling_calls"]
    assert np.array_equal([picks[:20] for picks in draws.indices], CASE[f"{run}_picks"])
    assert np.array_equal(np.bincount(np.concatenate(draws.indices), minlength=len(pool)), CASE[f"{run}_drawn"])
    assert np.array_equal(labels.argmax(1), CASE[f"{run}_label"])
    assert_close(pool[:, 0, 0, 0], CASE[f"{run}_first_pixel"], 1e-5)
    # A value that rounding moves over the edge of a byte changes the sum by one.
    total = images.double().sum().item()
    assert abs(total - CASE[f"{run}_images_sum"]) <= 1e-6 * total

    monkeypatch.setattr(metrics, "inception_score", lambda probabilities, splits: (len(probabilities), splits))
    extractor = MeanColours()
    real = features.Statistics(*metrics.mean_and_covariance(extractor(images)[0]), extractor(images[:10])[0])
    patches = compute_patch_statistics(images)
    figures = features.measure_quality(extractor, images, real, patches, splits=settings.splits)
    assert [figures["Inception score"], figures["IS deviation"]] == CASE[f"{run}_scored"].tolist()

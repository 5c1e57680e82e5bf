"""Images of 128x128 ImageNet, resized and decoded as by the reference's own TensorFlow graph."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import encode_example, encode_image, write_records
from ebm.readers import tf_images
from golden.tasks import recipe_tasks
from golden_cases import assert_close, compute_share_of_rows, load_task, to_theirs

pytest.importorskip("google_crc32c")

CASE, CONFIG, _, _ = load_task("imagenet")
PICTURES = [
    recipe_tasks.picture(seed, *size) for seed, size in zip(CONFIG["picture_seeds"], CONFIG["sizes"], strict=True)
]
KEYS = [*(f"image{number}" for number in range(len(PICTURES))), "jpeg_image"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The data set that training opens, on a TFRecord of all pictures without loss, and of the case's JPEG."""
    folder = tmp_path_factory.mktemp("imagenet")
    files = [*map(encode_image, PICTURES), CASE["jpeg"].tobytes()]
    write_records(folder / "train-00000-of-00001", [encode_example(file, 1) for file in files])
    return data.load_dataset("imagenetfull", path=folder, workers=0)


def compute_share_of_lines(image, expected):
    """Return the share of the lines of an image (C, H, W) whose sums agree with the expected ones (H, 3)."""
    return compute_share_of_rows(image.permute(1, 0, 2)[:, :, None], expected, tolerance=1e-4)


@pytest.mark.parametrize("key", KEYS)
def test_images(dataset, key):
    """Breaks when images are resized, rounded, cut out or decoded otherwise than by TensorFlow, or get other noise."""
    index = torch.tensor([KEYS.index(key)])
    stored = dataset.decode_batch(index)[0]
    assert_close(to_theirs(stored)[0, ::4, ::4], CASE[key], 1e-4)
    assert compute_share_of_lines(stored[0], CASE[f"{key}_rows"]) == 1
    images, _ = dataset.batch(index, torch.Generator().manual_seed(0))
    noise = 256 * images - stored
    assert -1e-3 < noise.min() < 0.01 and 0.99 < noise.max() < 1 + 1e-3


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_sizes(number):
    """Breaks when a side of the resized image gets another length."""
    size = tf_images.compute_tf_size(*CONFIG["sizes"][number], CONFIG["resize_min"])
    assert size == tuple(CASE[f"image{number}_size"])


def test_jpeg_decoding():
    """Breaks when JPEGs are decoded with another cosine transform, or their colours are smoothed otherwise."""
    with Image.open(io.BytesIO(CASE["jpeg"].tobytes())) as image:
        pixels = tf_images.look_up_pixels(image, np.arange(image.height), np.arange(image.width))
    assert compute_share_of_lines(torch.tensor(pixels), CASE["jpeg_decoded_rows"]) == 1

"""Images decoded and resized as TensorFlow 1 does it, on which published energies of 128x128 images depend.

    pixels = read_tf_pixels(encoded, side=128)  # float32 (3, 128, 128), from 0 to 255

TensorFlow decodes a JPEG with libjpeg's fast integer cosine transform, which is darker than the exact one by 0.8 of
255 on average. Its bilinear rule reads the four pixels around a coordinate: it does not average over pixels that are
skipped, does not align the centres of pixels, and does not round the result.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ebm.readers.decoding import convert_image, find_turn, open_image


class Neighbours(NamedTuple):
    """The rows, or the columns, of an image between which those of the resized image lie, each (n,)."""

    lower: np.ndarray
    upper: np.ndarray
    weight: np.ndarray  # of the upper one, float32; the lower one has the rest

    @property
    def both(self) -> np.ndarray:
        """All lower ones, then all upper ones (2n,)."""
        return np.concatenate([self.lower, self.upper])


def read_tf_pixels(encoded: bytes, side: int, remarks: set[str] | None = None) -> np.ndarray:
    """Decode an image to colour, resize its shorter side to `side` and cut out the middle: float32 (3, side, side).

    Values are from 0 to 255. TensorFlow's decoder is followed for JPEGs that are stored upright; other images are
    decoded as everywhere else, see `convert_image`, also for the remarks and errors.
    """
    with open_image(io.BytesIO(encoded)) as opened:
        # A decoder that is set already belongs to a JPEG too large for memory, of which it decodes every second pixel.
        is_plain = isinstance(opened, JpegImageFile) and not opened.decoderconfig and find_turn(opened) is None
        image = opened if is_plain else convert_image(opened, "RGB", remarks)
        height, width = compute_tf_size(image.height, image.width, side)
        rows = find_middle_neighbours(image.height, height, side)
        columns = find_middle_neighbours(image.width, width, side)
        pixels = look_up_pixels(image, rows.both, columns.both).astype(np.float32)  # (3, 2·side, 2·side)
    left, right = pixels[:, :, :side], pixels[:, :, side:]
    lines = left + (right - left) * columns.weight
    upper, lower = lines[:, :side], lines[:, side:]
    return upper + (lower - upper) * rows.weight[:, None]


def compute_tf_size(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return the height and width to which the reference resizes an image so that its shorter side is `shorter`.

    Both are rounded up, in float32, where the product of a ratio can exceed the whole number that it should be.
    """
    ratio = np.float32(shorter) / np.float32(min(height, width))
    return int(np.ceil(np.float32(height) * ratio)), int(np.ceil(np.float32(width) * ratio))


def find_middle_neighbours(old: int, new: int, side: int) -> Neighbours:
    """Return the neighbours of the middle `side` rows, or columns, of `new` to which `old` are resized."""
    numbers = (new - side) // 2 + np.arange(side, dtype=np.float32)
    places = numbers * (np.float32(old) / np.float32(new))
    lower = places.astype(np.int64)
    return Neighbours(lower, np.minimum(lower + 1, old - 1), places - lower.astype(np.float32))


# ---- decoding ----


def look_up_pixels(image: Image.Image, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the pixels (3, R, C) from 0 to 255 at rows (R,) and columns (C,) of an image, decoded or not yet."""
    shrinking = None  # the factors by which the height and the width of stored colours are smaller
    if isinstance(image, JpegImageFile) and image.tile:  # parts that are not decoded yet
        samples = [layer[1:3] for layer in image.layer]  # horizontal and vertical, of each channel
        shrinking = {(2, 2): (2, 2), (2, 1): (1, 2)}.get(samples[0]) if samples[1:] == [(1, 1), (1, 1)] else None
        if shrinking:
            image.draft("YCbCr", None)
        image.decoderconfig = (1, 1)  # full size; the fast cosine transform, and colours not smoothed
    if not shrinking:
        colour = image if image.mode == "RGB" else image.convert("RGB")
        lines = [np.asarray(colour.crop((0, row, colour.width, row + 1)))[0] for row in rows.tolist()]
        return np.moveaxis(np.stack([line[columns] for line in lines]), 2, 0)
    stored = np.moveaxis(np.asarray(image), 2, 0)
    luminance, *colours = map(np.ascontiguousarray, stored)
    small = [colour[:: shrinking[0], :: shrinking[1]] for colour in colours]
    blue, red = (smooth_colour(colour.astype(np.int16), rows, columns, shrinking[0]) for colour in small)
    return convert_to_rgb(luminance[rows][:, columns], blue, red)


def smooth_colour(small: np.ndarray, rows: np.ndarray, columns: np.ndarray, shrinking: int) -> np.ndarray:
    """Return a colour (R, C) at rows and columns of an image, whose width is twice that of the stored colour (h, w).

    Three quarters of it come from the nearest column, one quarter from the second nearest; also of rows, if
    `shrinking`, the ratio of heights, is 2. Rounding is that of libjpeg.
    """
    if shrinking == 2:
        nearest, second = find_nearest_two(rows, len(small))
        lines, bits, rounding = 3 * small[nearest] + small[second], 4, 8 - columns % 2
    else:
        lines, bits, rounding = small[rows], 2, 1 + columns % 2
    nearest, second = find_nearest_two(columns, small.shape[1])
    return (3 * lines[:, nearest] + lines[:, second] + rounding.astype(small.dtype)) >> bits


def find_nearest_two(places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest and the second nearest to each place, of `size` rows or columns that cover two places each."""
    nearest = places // 2
    return nearest, (nearest + np.where(places % 2, 1, -1)).clip(0, size - 1)


def convert_to_rgb(luminance: np.ndarray, blue: np.ndarray, red: np.ndarray) -> np.ndarray:
    """Return red, green and blue (3, R, C) of the three channels (R, C) of a JPEG, with libjpeg's rounding."""
    blue, red, half = blue.astype(np.int32) - 128, red.astype(np.int32) - 128, 1 << 15
    additions = (91881 * red + half, -22554 * blue - 46802 * red + half, 116130 * blue + half)  # in units of 2⁻¹⁶
    return np.stack([((addition >> 16) + luminance).clip(0, 255) for addition in additions])

"""Image files as people have them → upright images of 8 bits, grey or in colour.

    with open_file("photo.jpg") as file, open_image(file) as image:
        pixels = np.asarray(convert_image(image, "RGB"))  # uint8 (H, W, 3)

Every image that a user gives is decoded here: 16 bits become 8, transparent pixels lie on white, photos are turned as
their EXIF entry says, of several frames the first counts. What has no sure meaning is refused.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ebm.readers.bounded import Fault
from ebm.support.hardware import find_free_memory

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # formats that Pillow may read; none starts a program
MOST_BYTES = 1 << 28  # of a decoded image: 268 million grey pixels, or 67 million in colour
LARGE = 1 << 24  # pixels of an image from which on a process decodes only one at a time
COPIES = 3  # of an image, at 4 bytes per pixel, that decoding and converting it takes at most
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

large_image_lock = threading.Lock()
# Images between Pillow's two limits are decoded if memory holds them; Pillow itself refuses those above the second.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of entries beside pixels, such as EXIF


@contextlib.contextmanager
def open_image(file: IO[bytes]) -> Iterator[Image.Image]:
    """Yield the image in an open file, which is not decoded yet.

    A JPEG that takes more than MOST_BYTES is decoded at half its size. Raises Fault if another image takes more, and
    what Pillow raises for damaged images. Inside the block of a large image no other thread decodes a large one.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise Fault(f"is too large: more than {most:,} pixels; scale it down or remove it") from None
    except UnidentifiedImageError:  # whose message names an object of Python
        raise ValueError("of no known format") from None
    size = f"{image.width}x{image.height}"
    if count_decoded_bytes(image) > MOST_BYTES:
        image.draft(None, (image.width // 2, image.height // 2))  # of a JPEG every second pixel is decoded
    if count_decoded_bytes(image) > MOST_BYTES:
        raise Fault(f"is too large: {size} pixels take more than {MOST_BYTES:,} bytes; scale it down or remove it")
    is_large = image.width * image.height > LARGE
    with image, large_image_lock if is_large else contextlib.nullcontext():
        need = 4 * COPIES * image.width * image.height
        if is_large and need > (free := find_free_memory()):
            raise Fault(
                f"is too large: {size} pixels take {need / 1e9:.1f} GB to decode, and {free / 1e9:.1f} are free; "
                "scale it down or remove it"
            )
        yield image


def count_decoded_bytes(image: Image.Image) -> int:
    """Return how many bytes the pixels of an image take in memory."""
    each = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;") else 4
    return each * image.width * image.height


def is_grey(image: Image.Image) -> bool:
    """Return whether the pixels of an image have no colours, whatever their number type."""
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;")


def convert_image(image: Image.Image, mode: str, remarks: set[str] | None = None) -> Image.Image:
    """Return an image, upright and with 8 bits, as grey ("L") or as colour ("RGB").

    remarks: receives what a user should know about the result, each as the end of a sentence about the image. Raises
    Fault if the range of the pixels is unknown, and what Pillow raises for damaged images.
    """
    remarks = set() if remarks is None else remarks
    if getattr(image, "is_animated", False):
        remarks.add("holds several frames, of which the first is taken")
    image.load()
    turn = find_turn(image)
    result = reduce_depth(image, remarks)
    if result.has_transparency_data:
        result = put_on_white(result, remarks)
    result = result if result.mode == mode else result.convert(mode)
    return result if turn is None else result.transpose(turn)


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return how a decoded image must be turned to be upright, by its EXIF entry; None if it is or has no entry."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # an entry that cannot be read, in one of many ways, says nothing
        return None


def reduce_depth(image: Image.Image, remarks: set[str]) -> Image.Image:
    """Return an image whose pixels have 8 bits; raise Fault if they are numbers whose range no file tells.

    Pillow would cut off all above 255.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits"
        raise Fault(f"holds {kind}, and black and white could be any of them; save it with 8 or 16 bits per pixel")
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is the number of bits, 262 is 0 if 0 means white
    bits = tags.get(258, (16,))[0]
    white = 2**bits - 1
    values = np.asarray(image).astype(np.int64)
    shades = (values * 255 + white // 2) // white
    remarks.add(f"holds {bits} bits per pixel: 0 to {white} become 0 to 255")
    return Image.fromarray((255 - shades if tags.get(262) == 0 else shades).astype(np.uint8))


def put_on_white(image: Image.Image, remarks: set[str]) -> Image.Image:
    """Return an image on a white background, without the colours that lie hidden under its transparent pixels."""
    clear = image if image.mode == "RGBA" else image.convert("RGBA")
    if clear.getchannel("A").getextrema()[0] == 255:
        return clear
    remarks.add("has transparent pixels, which become white")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)

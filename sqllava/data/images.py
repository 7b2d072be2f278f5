"""Image files -> RGB images, safely: names that stay in their folder, files that decode whole.

Stands beside the index on the data's path; the processor makes tensors of what is read here.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

# Pillow's own limit: a quarter of a gigabyte as RGB.
MAX_PIXELS = 89_478_485


class ImageError(ValueError):
    """An image that cannot be used; the message holds its path and the reason."""


def load_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file as RGB, with the pixels that the published code saw.

    Rules: the orientation in EXIF data is not applied; transparency is dropped and leaves the
    colours beneath it; palette, grey and CMYK images are converted; animated ones give their first
    frame. 16-bit greys are scaled to 8 bits, where the published code clipped them to white.

    Raises:
        ImageError: the file is missing, no image, truncated, or has more than `max_pixels`.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width}x{height} is more than {max_pixels} pixels")
            return _to_rgb(image)
    except Exception as error:  # decoders raise whatever they like on broken files
        raise ImageError(f"{path}: {str(error) or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            return Image.fromarray((values // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resolve_image(root: Path | str, name: str) -> Path:
    """The file that a record's image name means.

    Args:
        root: the image folder.
        name: a path relative to it, or an absolute one inside it. Links that lie in the folder are
            followed: data sets are often linked into one tree, and its owner made the links.

    Raises:
        ImageError: the name leads out of the folder, or there is no such file.
    """
    root = os.path.abspath(root)
    path = Path(os.path.normpath(os.path.join(root, name)))
    if not path.is_relative_to(root):
        raise ImageError(f"{name!r} leads out of the image folder {root}")
    if not _is_file(path):
        found = "" if os.path.isdir(root) else ", which does not exist"
        raise ImageError(f"image {name!r} not found in the image folder {root}{found}")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with characters that no name can have
        return False

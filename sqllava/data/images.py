"""Image files -> RGB images -> pixel values: names that stay in their folder, files that decode
whole, and the published preprocessing without its detours.

Stands beside the index on the data's path. torch comes with the first pixel values: most commands
that read images need none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

# Pillow's own limit: a quarter of a gigabyte as RGB.
MAX_PIXELS = 89_478_485


class ImageError(ValueError):
    """An image that cannot be used; the message holds its path and the reason."""


def load_image(
    path: Path | str, max_pixels: int = MAX_PIXELS, draft: int | None = None
) -> Image.Image:
    """Reads an image file as RGB, with the pixels that the published code saw.

    Rules: the orientation in EXIF data is not applied; transparency is dropped and leaves the
    colours beneath it; palette, grey and CMYK images are converted; animated ones give their first
    frame. 16-bit greys are scaled to 8 bits, where the published code clipped them to white.

    Args:
        draft: lets JPEG files of at least twice this many pixels a side be decoded at a half, a
            quarter or an eighth of their size, never below it. Faster, but not the published
            pixels; see docs/data.md.

    Raises:
        ImageError: the file is missing, no image, truncated, or has more than `max_pixels`.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width}x{height} is more than {max_pixels} pixels")
            if draft is not None:
                image.draft("RGB", (draft, draft))
            image.load()
            return _to_rgb(image)
    except Exception as error:  # decoders raise whatever they like on broken files
        raise ImageError(f"{path}: {str(error) or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            return Image.fromarray((values // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class ImagePreparer:
    """RGB image -> pixel values [3, H, W], bit for bit as transformers' image processor gives them.

    It does the same in fewer steps: Pillow pads, resizes and crops, and since scaling and
    normalising map each of 256 levels to a number, a table of those numbers replaces them.

    Args:
        processor: LLaVA's (Pillow) image processor, with its sizes, mean and padding.
    """

    def __init__(self, processor: LlavaImageProcessorPil) -> None:
        size, crop = processor.size, processor.crop_size
        self.edge = size["shortest_edge"]
        self.size = (size["width"], size["height"])
        self.crop = (crop["width"], crop["height"])
        self.resample = Image.Resampling(processor.resample)
        # The color that the published code pads with.
        mean = processor.image_mean
        self.background = tuple(int(level * 255) for level in mean) if processor.do_pad else None
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        scaled = processor.rescale(levels, processor.rescale_factor)
        normalized = processor.normalize(scaled, mean, processor.image_std)
        self.table = np.ascontiguousarray(normalized[:, 0], dtype=np.float32)  # [3, 256]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Pixel values [3, H, W] of an RGB image."""
        import torch

        pixels = np.asarray(self.view(image))
        values = np.empty((3, *pixels.shape[:2]), np.float32)
        for channel, table in enumerate(self.table):
            # "clip" spares a check of the range, which 8 bits cannot leave.
            np.take(table, pixels[:, :, channel], out=values[channel], mode="clip")
        return torch.from_numpy(values)

    def view(self, image: Image.Image) -> Image.Image:
        """The picture that the model sees: padded to a square, resized, cropped."""
        if self.background is not None:
            image = self._pad(image)
        width, height = image.size
        size = self.size
        if self.edge:
            short = min(width, height)
            size = (int(self.edge * width / short), int(self.edge * height / short))
        image = image.resize(size, self.resample)
        left, top = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
        return image.crop((left, top, left + self.crop[0], top + self.crop[1]))

    def _pad(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), self.background)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square


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

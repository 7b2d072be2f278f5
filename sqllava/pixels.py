"""Pictures -> RGB -> pixel values: the published preprocessing without its detours.

What encoding.py is to texts. The data's path and the model's processor both prepare here; torch
comes with the first pixel values, as most commands that read images need none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

# Pillow's own limit: a quarter of a gigabyte as RGB. No step of the preparation holds much more.
MAX_PIXELS = 89_478_485
# What JPEG files can hold. A strip may have few pixels and still be long; see `check_size`.
MAX_SIDE = 65_535

# Bits of a grey sample: what cameras and scanners use, whatever the file stores it in.
_DEPTHS = (8, 10, 12, 14, 16)
# Pixels that Pillow's widest filter (Lanczos) looks at to each side.
_LONGEST_FILTER = 3


class ImageError(ValueError):
    """An image that cannot be used; the message holds its path and the reason."""


class Loaded(NamedTuple):
    """An image as RGB; `scaled` says how its levels became 8 bits, where they were not."""

    image: Image.Image
    scaled: str = ""


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """The bounds of a picture, whichever way it comes in.

    Raises:
        ImageError: it has more than `max_pixels`, or a side of more than `MAX_SIDE`.
    """
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} is more than {max_pixels} pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{width}x{height} has a side of more than {MAX_SIDE} pixels")


def to_rgb(image: Image.Image) -> Loaded:
    """Any picture as RGB: Pillow's conversion for 8 bits, as published, and a rule for greys of
    more, which the published code clipped to white or left black:

    - whole numbers, and floats of 16 and more: white is the end of the least of 8, 10, 12, 14 and
      16 bits that holds the brightest value. Up to 255 nothing changes, as published.
    - floats up to 1: white is 1.
    - anything else (negative values, floats up to 16, more than 16 bits): the darkest value
      becomes black, the brightest white. What is no number becomes black.
    """
    if image.mode[0] not in "IF":
        return Loaded(image if image.mode == "RGB" else image.convert("RGB"))
    values = np.asarray(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ImageError(f"a grey image (mode {image.mode}) without a single finite value")
    levels, scaled = _to_levels(values, finite.min(), finite.max(), image.mode == "F")
    grey = np.nan_to_num(levels, nan=0.0, posinf=255, neginf=0).clip(0, 255).astype(np.uint8)
    return Loaded(Image.fromarray(grey).convert("RGB"), scaled)


def _to_levels(
    values: np.ndarray, darkest: float, brightest: float, floats: bool
) -> tuple[np.ndarray, str]:
    """Levels of 0 to 255, still to be cut to whole ones, and how they were made."""
    if floats and darkest >= 0 and brightest <= 1:
        return np.rint(values * 255), "floats of 0 to 1"
    known = darkest >= 0 and not (floats and brightest < 16)
    bits = next((bits for bits in _DEPTHS if brightest < 2**bits), None) if known else None
    if bits is None:
        span = max(brightest - darkest, np.finfo(np.float64).tiny)
        return np.rint((values - darkest) / span * 255), "from the darkest to the brightest value"
    return values / 2 ** (bits - 8), "" if bits == 8 else f"{bits} bits"


class ImagePreparer:
    """RGB image -> pixel values [3, H, W], bit for bit as transformers' image processor gives them.

    It does the same in fewer steps: Pillow pads, resizes and crops, and since scaling and
    normalising map each of 256 levels to a number, a table of those numbers replaces them.

    Args:
        processor: LLaVA's (Pillow) image processor, with its sizes, mean and padding.
        pad: whether to pad to a square; None as the processor has it.
    """

    def __init__(self, processor: LlavaImageProcessorPil, pad: bool | None = None) -> None:
        size, crop = processor.size, processor.crop_size
        self.edge = size["shortest_edge"]
        self.size = (size["width"], size["height"])
        self.crop = (crop["width"], crop["height"])
        self.resample = Image.Resampling(processor.resample)
        # The color that the published code pads with.
        mean = processor.image_mean
        pad = processor.do_pad if pad is None else pad
        self.background = tuple(int(level * 255) for level in mean) if pad else None
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
        """The picture that the model sees: padded to a square, resized, cropped.

        Raises:
            ImageError: the picture is larger than `check_size` allows, or so thin that cropping
                its middle would first blow it up beyond all bounds.
        """
        self.check(image)
        size = self._resized(*image.size)
        if self.is_large(image):
            image = self._pad_and_resize_in_bands(image, size)
        else:
            image = self._pad(image).resize(size, self.resample)
        left, top = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
        return image.crop((left, top, left + self.crop[0], top + self.crop[1]))

    def check(self, image: Image.Image) -> None:
        """Raises what `view` would raise, without its work."""
        check_size(*image.size)
        if self.background is None and self.is_large(image):
            width, height = self._resized(*image.size)
            raise ImageError(
                f"{image.width}x{image.height} is too thin to be cropped: resized, it would be "
                f"{width}x{height}, more than {MAX_PIXELS} pixels"
            )

    def is_large(self, image: Image.Image) -> bool:
        """Whether the published steps, one after another, would hold more than `MAX_PIXELS`."""
        if self.background is not None:
            return max(image.size) ** 2 > MAX_PIXELS
        return math.prod(self._resized(*image.size)) > MAX_PIXELS

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if not self.edge:
            return self.size
        if self.background is not None:
            return self.edge, self.edge
        short = min(width, height)
        return int(self.edge * width / short), int(self.edge * height / short)

    def _pad(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.background is None or width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), self.background)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    def _pad_and_resize_in_bands(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The pixels of `_pad` and `resize`, without the square ever being there.

        Pillow resizes the rows first, then the columns. So the rows can be done a band at a time,
        and only where they are not all background: the output's columns are taken in blocks whose
        borders are exact in binary, which leaves every weight what it was.
        """
        side, (width, height) = max(image.size), size
        left, top = (side - image.width) // 2, (side - image.height) // 2
        reach = math.ceil(_LONGEST_FILTER * max(side / width, 1)) + 1
        blocks = math.gcd(width, 16)
        step = side / blocks
        first = max(math.floor((left - reach) / step), 0)
        last = min(math.ceil((left + image.width + reach) / step), blocks)
        start = max(math.floor(first * step) - reach, 0)
        end = min(math.ceil(last * step) + reach, side)
        rows_at_once = max(MAX_PIXELS // 4 // (end - start), 1)
        columns = Image.new("RGB", (width, side), self.background)  # its rows are resized
        for y in range(0, image.height, rows_at_once):
            rows = min(rows_at_once, image.height - y)
            band = Image.new("RGB", (end - start, rows), self.background)
            band.paste(image.crop((0, y, image.width, y + rows)), (left - start, 0))
            box = (first * step - start, 0, last * step - start, rows)
            resized = band.resize(((last - first) * (width // blocks), rows), self.resample, box)
            columns.paste(resized, (first * (width // blocks), top + y))
        return columns.resize((width, height), self.resample)

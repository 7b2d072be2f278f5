"""Image files -> RGB images: names that stay in their folder, and files that decode whole.

Stands beside the index on the data's path; `pixels.py` goes on from here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from PIL import Image

from sqllava.pixels import MAX_PIXELS, ImageError, ImagePreparer, Loaded, check_size, to_rgb

# A picture's way is read, then prepared: both halves may be had from here.
__all__ = ["ImageError", "ImagePreparer", "load_image", "read_image", "resolve_image"]

# Of 255: what 12 bits come to where 16 were meant.
_NEARLY_BLACK = 15


def load_image(
    path: Path | str, max_pixels: int = MAX_PIXELS, draft: int | None = None
) -> Image.Image:
    """Reads an image file as RGB, with the pixels that the published code saw.

    Rules: the orientation in EXIF data is not applied; transparency is dropped and leaves the
    colours beneath it; palette, grey and CMYK images are converted; animated ones give their first
    frame. Greys of more than 8 bits are scaled; see `to_rgb`.

    Args:
        draft: lets JPEG files of at least twice this many pixels a side be decoded at a half, a
            quarter or an eighth of their size, never below it. Faster, but not the published
            pixels; see docs/data.md.

    Raises:
        ImageError: the file is missing, no image, truncated, larger than `check_size` allows, or
            of more than 8 bits of which only the lowest are used.
    """
    return read_image(path, max_pixels, draft).image


def read_image(path: Path | str, max_pixels: int = MAX_PIXELS, draft: int | None = None) -> Loaded:
    """Like `load_image`, and says how greys were scaled."""
    try:
        with Image.open(path) as image:
            check_size(*image.size, max_pixels)
            if draft is not None:
                image.draft("RGB", (draft, draft))
            deep = _is_deep(image)
            image.load()
            loaded = to_rgb(image)
            if deep:
                _must_have_upper_bits(loaded.image)
            return loaded
    except Exception as error:  # decoders raise whatever they like on broken files
        raise ImageError(f"{path}: {str(error) or type(error).__name__}") from error


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow is about to cut samples of 16 bits to their upper 8: it does so for colours,
    and for greys with transparency. Asked before the image is loaded."""
    layouts = [str(tile[3]) for tile in getattr(image, "tile", [])]
    return image.mode[0] not in "IF" and any(";16" in layout for layout in layouts)


def _must_have_upper_bits(image: Image.Image) -> None:
    brightest = max(high for _, high in image.getextrema())  # type: ignore[misc]
    if brightest <= _NEARLY_BLACK:
        raise ImageError(
            f"16 bits a channel, of which the upper 8 are read: they end at {brightest} of 255, "
            "all but black; save it with 8 bits a channel"
        )


def resolve_image(root: Path | str, name: str) -> Path:
    """The file that a record's image name means.

    Args:
        root: the image folder.
        name: a path relative to it, or an absolute one inside it. Links that lie in the folder are
            followed: data sets are often linked into one tree, and its owner made the links.

    Raises:
        ImageError: the name leads out of the folder, or is no file that can be read.
    """
    shown = f"{name!r:.200}"
    kind = next((kind for start, kind in _NO_FILE_NAMES.items() if name.startswith(start)), None)
    if kind is not None:
        raise ImageError(
            f"image {shown} is {kind}; only files are read: save it, and name the file"
        )
    root = os.path.abspath(root)
    path = Path(os.path.normpath(os.path.join(root, name)))
    if not path.is_relative_to(root):
        raise ImageError(
            f"{shown} leads out of the image folder {root}{_meant(root, name.lstrip('/'))}"
        )
    reason = _missing(path)
    if reason:
        found = "" if os.path.isdir(root) else ", which does not exist"
        meant = _meant(root, name.replace("\\", "/")) if "\\" in name else ""
        raise ImageError(f"image {shown} {reason} in the image folder {root}{found}{meant}")
    return path


# How names begin that say where a picture is, but not as a file in the folder.
_NO_FILE_NAMES = {
    **dict.fromkeys(("http://", "https://", "s3://", "gs://", "hf://", "file://"), "an address"),
    "data:": "the picture itself (a data: URI)",
}


def _missing(path: Path) -> str:
    """Why a path is no file to read, or ""."""
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return "may not be read (permission denied)"
    except (OSError, ValueError):  # a name too long, or with characters that no name can have
        return "not found"
    if stat.S_ISDIR(mode):
        return "is a folder, a file was not found"
    return "" if stat.S_ISREG(mode) else "is no regular file"


def _meant(root: str, name: str) -> str:
    """A hint, where another spelling of a name is a file in the folder."""
    found = name and not _missing(Path(os.path.normpath(os.path.join(root, name))))
    return f"; {name!r:.200} is there" if found else ""

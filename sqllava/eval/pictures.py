"""A question's picture: from the image folder, or out of a cell of the benchmark's own file."""

import base64
import binascii
import io
import re
from pathlib import Path
from typing import Any, cast

from PIL import Image

from sqllava.data.images import load_image, resolve_image
from sqllava.eval.records import Question
from sqllava.pixels import ImageError

_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*;base64,", re.ASCII)
_PATH = re.compile(r"[^\n]*\.(jpe?g|png|webp|bmp|gif)", re.IGNORECASE)


def read_picture(question: Question, images: Path | None) -> Image.Image | None:
    """A question's picture; None if it has none.

    Raises:
        ImageError: it cannot be shown; the message says why.
    """
    if question.fault:
        raise ImageError(f"{question.fault}: {question.image}")
    if question.image_base64 is not None:
        return load_cell(question.image_base64)
    if question.image is None:
        return None
    if images is None:
        raise ImageError(f"picture {question.image!r} is in no folder: pass --images")
    return load_image(resolve_image(images, question.image))


def load_cell(cell: str) -> Image.Image:
    """The picture in a cell.

    Raises:
        ImageError: there is none; the message says what the cell holds.
    """
    data = io.BytesIO(picture_bytes(cell))
    try:
        return load_image(cast(Any, data))
    except ImageError as error:
        why = error.__cause__ or error
        raise ImageError(f"the picture's cell holds no image that can be read ({why})") from None


def picture_bytes(cell: str) -> bytes:
    """The file in a cell: base64, bare or as a data address.

    Raises:
        ImageError: the cell holds something else; the message says what.
    """
    text = "".join(cell.split())
    found = _DATA_URI.match(text)
    if found:
        text = text[found.end() :]
    if not text:
        raise ImageError("the picture's cell is empty: expected the picture in base64")
    if text.startswith(("http://", "https://")):
        raise ImageError(f"the picture's cell is an address, {cell!r:.80}, not base64: fetch it")
    if _PATH.fullmatch(cell):
        raise ImageError(f"the picture's cell is a path, {cell!r:.80}, not the picture in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            f"the picture's cell, which begins with {cell[:20]!r}, is not base64 ({error})"
        ) from None

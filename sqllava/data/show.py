"""Shows a record as the model sees it: its image, its tokens, and which of them are trained.

Beside the data's path, over the same code: the first thing to run on data of your own.
"""

import argparse
import base64
import html
import io
import logging
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from sqllava.conversation import (
    TEMPLATES,
    check_share,
    choose_self_questions,
    get_template,
    render,
    turns_from_record,
)
from sqllava.data.images import read_image, resolve_image
from sqllava.data.index import open_index
from sqllava.data.records import check_record, image_names
from sqllava.data.view import View, open_view
from sqllava.encoding import IGNORE_INDEX, encode_record, image_token_id

logger = logging.getLogger(__name__)

_GREEN, _GREY, _PLAIN = "\033[1;32m", "\033[90m", "\033[0m"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Token:
    """A token, or, where no tokenizer was given, a piece of text.

    Attributes:
        text: as bytes, since a token may be part of a character.
        kind: "text", "image" (a placeholder) or "eos".
    """

    text: bytes
    trained: bool
    kind: str = "text"
    id: int | None = None


@dataclass(frozen=True)
class Shown:
    """A record as the model sees it.

    Attributes:
        fault: why training could not use it, if it could not.
        images: name, file size and the picture after preprocessing; None where none is at hand.
        dropped_turns: turns left out to fit the maximum length.
    """

    number: int
    identity: str
    tokens: list[Token]
    images: list[tuple[str, str, Image.Image | None]]
    dropped_turns: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Settings:
    """How records are seen: as in training."""

    view: View
    template: str
    sq_r: float
    max_length: int
    images: Path | None
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("file", type=Path, help="records: LLaVA JSON, JSON lines or Parquet")
    parser.add_argument("-i", "--index", type=int, default=0, help="the record's number, from 0")
    parser.add_argument("-n", "--count", type=int, default=1, help="how many records from there")
    parser.add_argument("--template", default="v1_sq", choices=list(TEMPLATES))
    parser.add_argument("--sq-r", type=float, default=0.5, help="share of self-questions (0.5)")
    parser.add_argument("--seed", type=int, default=42, help="of the self-questions (42)")
    parser.add_argument("--images", type=Path, help="where image names start (--image_folder)")
    parser.add_argument("--model", help="adapter directory or language model, to show tokens")
    parser.add_argument("--model-max-length", type=int, default=2048)
    parser.add_argument("--image-aspect-ratio", default="pad", choices=("pad", "crop"))
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 if a record shown cannot be used."""
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, found {args.count}")
    check_share(args.sq_r)
    settings = Settings(
        open_view(args.model, args.image_aspect_ratio),
        args.template,
        args.sq_r if TEMPLATES[args.template].self_questions else 0.0,
        args.model_max_length,
        args.images,
        args.seed,
    )
    index = open_index(args.file)
    stop = min(args.index + args.count, len(index))
    if args.index not in range(len(index)):
        raise ValueError(f"{args.file}: no record {args.index}; it has {len(index)}, from 0")
    if stop < args.index + args.count:
        logger.info("%s: ends with record %d; fewer than asked for", args.file, stop - 1)
    records = [look(index[number], number, settings) for number in range(args.index, stop)]
    if args.html:
        args.html.write_text(page(args.file.name, records), "utf-8", "backslashreplace")
        sys.stdout.write(f"{args.html}: {len(records)} records\n")
    else:
        color = sys.stdout.isatty()
        sys.stdout.write("\n".join(in_terminal(record, color) for record in records))
    return int(any(record.fault for record in records))


def look(record: Any, number: int, settings: Settings) -> Shown:
    """Makes of a record what training makes of it in its first epoch."""
    identity = f"{record.get('id') if isinstance(record, dict) else None!r:.80}"
    tokens: list[Token] = []
    pictures: list[tuple[str, str, Image.Image | None]] = []
    dropped, fault = 0, ""
    try:
        check_record(record, "", number)
        rng = random.Random(f"{settings.seed}-0-{number}")
        tokens, dropped = _tokens(record, settings, rng)
        for name in image_names(record):
            pictures.append(_picture(name, settings))
    except ValueError as error:
        fault = str(error.__cause__ or error)
    return Shown(number, identity, tokens, pictures, dropped, _printable(fault))


def in_terminal(shown: Shown, color: bool = True) -> str:
    """A record as text: trained stretches green (without color, in ⟦ ⟧)."""
    lines = [f"record {shown.number}, id {shown.identity}"]
    for name, size, _ in shown.images:
        lines.append(f"image {name}: {size}")
    stretches = []
    for (image, trained), group in groupby(
        shown.tokens, key=lambda token: (token.kind == "image", token.trained)
    ):
        tokens = list(group)
        text = _text(tokens)
        if image:
            text = f"<image x {len(tokens)}>" if len(tokens) > 1 else "<image>"
            text = f"{_GREY}{text}{_PLAIN}" if color else text
        elif trained:
            text = f"{_GREEN}{text}{_PLAIN}" if color else f"⟦{text}⟧"
        stretches.append(text)
    lines += ["".join(stretches), _counts(shown)]
    lines += [f"NOT USABLE: {shown.fault}"] if shown.fault else []
    return "\n".join([*lines, ""])


def page(title: str, records: Sequence[Shown]) -> str:
    """Records as one HTML page that needs no other file."""
    articles = "\n".join(_article(shown) for shown in records)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }}
article {{ border-top: 1px solid #bbb; padding: 1rem 0; }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
img {{ max-width: 336px; margin-right: 1rem; }}
.t:nth-child(even) {{ background: #f1f1f1; }}
.t.trained {{ background: #b7e4c0; }} .t.trained:nth-child(even) {{ background: #9ed6aa; }}
.image {{ color: #666; border: 1px dashed #999; padding: 0 .3em; }}
.fault {{ color: #b3261e; font-weight: bold; }} small {{ color: #555; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<div><span class="t trained">trained tokens</span> are what the model learns to say; the rest is
given to it. Hover over a token for its id.</div>
{articles}
</body></html>
"""


def _article(shown: Shown) -> str:
    pictures = [
        f'<figure><img alt="{html.escape(name, quote=True)}" src="{_data_url(picture)}">'
        f"<figcaption><small>{html.escape(name)}: {size}</small></figcaption></figure>"
        for name, size, picture in shown.images
        if picture is not None
    ]
    spans = []
    for kind, group in groupby(shown.tokens, key=lambda token: token.kind):
        tokens = list(group)
        if kind == "image":
            spans.append(f'<span class="image">image &times; {len(tokens)}</span>')
            continue
        for token in tokens:
            name = "t trained" if token.trained else "t"
            about = "" if token.id is None else f' title="{token.id}"'
            text = html.escape(token.text.decode(errors="replace"))
            spans.append(f'<span class="{name}"{about}>{text}</span>')
    fault = f'<div class="fault">not usable: {html.escape(shown.fault)}</div>'
    return (
        f"<article><h2>record {shown.number}, id {html.escape(shown.identity)}</h2>"
        f"{''.join(pictures)}<p>{''.join(spans)}</p><small>{_counts(shown)}</small>"
        f"{fault if shown.fault else ''}</article>"
    )


def _tokens(
    record: dict[str, Any], settings: Settings, rng: random.Random
) -> tuple[list[Token], int]:
    tokenizer = settings.view.tokenizer
    if tokenizer is None:
        template = get_template(settings.template)
        turns = choose_self_questions(turns_from_record(record), settings.sq_r, rng)
        pieces = [
            Token((piece.text or "</s>").encode(), piece.trained, piece.kind)
            for piece in render(turns, template)
        ]
        return pieces, 0
    encoded = encode_record(
        record,
        settings.template,
        tokenizer,
        settings.sq_r,
        rng,
        settings.view.image_tokens,
        settings.max_length,
    )
    placeholder = image_token_id(tokenizer)
    kinds = {placeholder: "image", tokenizer.eos_token_id: "eos"}
    tokens = [
        Token(
            _bytes(str(tokenizer.convert_ids_to_tokens(token))),
            label != IGNORE_INDEX,
            kinds.get(token, "text"),
            token,
        )
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    ]
    return tokens, encoded.dropped_turns


def _bytes(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace("▁", " ").encode()


def _text(tokens: Sequence[Token]) -> str:
    return b"".join(token.text for token in tokens).decode(errors="replace")


def _picture(name: str, settings: Settings) -> tuple[str, str, Image.Image | None]:
    if settings.images is None:
        return name, "not looked for (give --images)", None
    image, scaled = read_image(resolve_image(settings.images, name))
    seen = settings.view.prepare_image.view(image)
    size = f"{image.width}x{image.height}, seen as {seen.width}x{seen.height}"
    size += f", greys scaled: {scaled}" if scaled else ""
    return name, size, seen


def _counts(shown: Shown) -> str:
    trained = sum(token.trained for token in shown.tokens)
    if not any(token.id is not None for token in shown.tokens):
        return "no --model, so texts and no tokens"
    images = sum(token.kind == "image" for token in shown.tokens)
    text = f"{len(shown.tokens)} tokens, {images} of them the image's, {trained} trained"
    dropped = f"; {shown.dropped_turns} turns dropped or cut" if shown.dropped_turns else ""
    return text + dropped


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()

"""Pieces of a conversation -> (input_ids, labels), with the published code's token ids.

Labels are built while the ids are: each piece is tokenised once and carries its own `trained`
mark, so no mask is ever searched for in a prompt string. Tokenizers are given, never loaded here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from sqllava.conversation import (
    IMAGE,
    Piece,
    Template,
    Turn,
    choose_self_questions,
    get_template,
    render,
    render_exchanges,
    turns_from_record,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

# Where a stretch of text stands: at the start (or after an image, which starts anew), right after
# an end-of-sentence token, or in the middle of a text.
_Place = Literal["start", "after_eos", "middle"]


class TooLongError(ValueError):
    """The system text, the images and the first question leave no room for a trained token."""


class NothingTrainedError(ValueError):
    """A record from which the model would learn nothing: no token is a target."""


@dataclass
class Encoded:
    """Token ids with labels: `labels[i]` is `input_ids[i]` where trained, else -100.

    Attributes:
        dropped_turns: turns left out, or cut, to fit the maximum length.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    dropped_turns: int = 0

    def add(self, ids: Sequence[int], trained: bool) -> None:
        self.input_ids += ids
        self.labels += ids if trained else [IGNORE_INDEX] * len(ids)

    def extend(self, other: Encoded) -> None:
        self.input_ids += other.input_ids
        self.labels += other.labels

    @property
    def supervised(self) -> int:
        """How many tokens are targets."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode_record(
    record: Mapping[str, Any],
    template: Template | str,
    tokenizer: PreTrainedTokenizerBase,
    sq_r: float = 0.0,
    rng: random.Random | None = None,
    image_tokens: int = 1,
    max_length: int | None = None,
) -> Encoded:
    """Encodes a LLaVA record for training.

    Args:
        record: a dict as in the JSON file, with `conversations`.
        template: a template or its name; "v1_sq" draws self-questions.
        sq_r: the share of later human turns that the model learns to ask (0.5 in the recipe).
        rng: the generator of that draw.
        image_tokens: placeholders per image; their id is the tokenizer's `<image>` id.
        max_length: whole exchanges are dropped from the end until the rest fits; if the first does
            not fit, its answer is cut at the end. Image tokens are never cut.

    Raises:
        TooLongError: not even the first question fits.
        NothingTrainedError: no token is a target.
        ValueError: the record's turns are malformed, or do not suit the template.
    """
    template = get_template(template) if isinstance(template, str) else template
    turns = turns_from_record(record)
    if template.self_questions:
        turns = choose_self_questions(turns, sq_r, rng)
    return encode_turns(turns, template, tokenizer, image_tokens, max_length)


def encode_turns(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: int = 1,
    max_length: int | None = None,
) -> Encoded:
    """Encodes complete turns for training; see `encode_record`."""
    encoded = Encoded()
    exchanges = render_exchanges(turns, template)
    for number, pieces in enumerate(exchanges):
        place: _Place = "after_eos" if number else "start"
        exchange = _encode_pieces(pieces, tokenizer, image_tokens, place)
        if number == 0:
            exchange = _with_bos(exchange, tokenizer)
        if max_length is not None and len(encoded.input_ids) + len(exchange.input_ids) > max_length:
            encoded.dropped_turns = 2 * (len(exchanges) - number)
            if number == 0:
                encoded.extend(_cut(exchange, max_length))
            break
        encoded.extend(exchange)
    if not encoded.supervised:
        raise NothingTrainedError("no token of this record is a training target")
    return encoded


def _cut(exchange: Encoded, max_length: int) -> Encoded:
    kept = Encoded(exchange.input_ids[:max_length], exchange.labels[:max_length])
    if not kept.supervised:
        first = next(i for i, label in enumerate(exchange.labels) if label != IGNORE_INDEX)
        raise TooLongError(
            f"the first answer begins at token {first}, beyond the maximum length of {max_length}"
        )
    return kept


def encode_prompt(
    turns: Sequence[Turn],
    template: Template | str,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: int = 1,
) -> list[int]:
    """Encodes a prompt that ends in a role tag, such as "ASSISTANT:" or "VUSER:".

    Args:
        turns: the last one is open: its text is None.
    """
    template = get_template(template) if isinstance(template, str) else template
    if not turns or turns[-1].text is not None:
        raise ValueError("the last turn of a prompt must be open: Turn(role, None)")
    pieces = render(turns, template)
    return _with_bos(_encode_pieces(pieces, tokenizer, image_tokens, "start"), tokenizer).input_ids


def encode_text(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_tokens: int = 1
) -> list[int]:
    """Encodes a prompt that is already a string, with `<image>` marks and end-of-sentence tokens in
    it, to the same ids as `encode_prompt` gives for the turns behind it."""
    eos = tokenizer.eos_token
    marks = {IMAGE: Piece("image"), eos: Piece("eos")}
    parts = re.split(f"({re.escape(IMAGE)}|{re.escape(eos)})", prompt)
    pieces = [marks.get(part) or Piece("text", part) for part in parts if part]
    return _with_bos(_encode_pieces(pieces, tokenizer, image_tokens, "start"), tokenizer).input_ids


def _with_bos(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if tokenizer.bos_token_id is None:
        return encoded
    start = Encoded()
    start.add([tokenizer.bos_token_id], trained=False)
    start.extend(encoded)
    return start


def _encode_pieces(
    pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, image_tokens: int, place: _Place
) -> Encoded:
    encoded = Encoded()
    for piece in _merged(pieces):
        if piece.kind == "image":
            encoded.add([image_token_id(tokenizer)] * image_tokens, trained=False)
            place = "start"
        elif piece.kind == "eos":
            encoded.add([tokenizer.eos_token_id], piece.trained)
            place = "after_eos"
        else:
            encoded.add(_tokenize(tokenizer, piece.text, place), piece.trained)
            place = "middle"
    return encoded


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins neighbouring texts of the same mark: the published code tokenised them as one."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and last.kind == piece.kind == "text" and last.trained == piece.trained:
            merged[-1] = Piece("text", last.text + piece.text, piece.trained)
        else:
            merged.append(piece)
    return merged


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the `<image>` placeholder; raises ValueError if the tokenizer has none."""
    token_id = _id(tokenizer, IMAGE)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no {IMAGE!r} token: call add_image_token first")
    return token_id


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer an `<image>` token, after its last id, if it has none."""
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [IMAGE]}, replace_extra_special_tokens=False
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, place: _Place) -> Sequence[int]:
    """Tokenises plain text by its place, as sentencepiece did in the published code.

    At the start, sentencepiece puts its dummy prefix in front. After an end token, text that begins
    with a space keeps the prefix, and other text loses it. In the middle there is none.
    Tokenizers without a dummy prefix give the same ids everywhere.
    """
    if not text:
        return []
    if not has_dummy_prefix(tokenizer):
        return _plain_ids(tokenizer, text)
    if text.startswith((" ", "▁")):  # the same to sentencepiece
        # transformers takes a leading space for the prefix: in the middle that is what is meant,
        # elsewhere the prefix comes on top.
        return _plain_ids(tokenizer, text if place == "middle" else " " + text)
    return _plain_ids(tokenizer, text) if place == "start" else _without_prefix(tokenizer, text)


def _without_prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[int]:
    ids = list(_plain_ids(tokenizer, text))
    first = _piece(tokenizer, ids[0])
    if first == "▁":
        return ids[1:]
    bare = _id(tokenizer, first.removeprefix("▁"))
    if bare is not None and bare != tokenizer.unk_token_id:
        return [bare, *ids[1:]]
    # The vocabulary lacks the bare piece: let the model cut the text anew, without the prefix.
    return [
        token.id for token in tokenizer.backend_tokenizer.model.tokenize(text.replace(" ", "▁"))
    ]


def _id(tokenizer: PreTrainedTokenizerBase, piece: str) -> int | None:
    return cast("int | None", tokenizer.convert_tokens_to_ids(piece))


def _piece(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return cast(str, tokenizer.convert_ids_to_tokens(token_id))


@lru_cache(maxsize=8)
def has_dummy_prefix(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts sentencepiece's `▁` before a text."""
    ids = tokenizer("a", add_special_tokens=False).input_ids
    return _piece(tokenizer, ids[0]).startswith("▁")


# Role tags and the system text recur in every record.
@lru_cache(maxsize=4096)
def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Ids of text as text: what looks like a special token in it is not one.

    Raises:
        ValueError: half a surrogate pair is in it, which JSON can hold and no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{half!r} is half a surrogate pair, and no text") from None
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

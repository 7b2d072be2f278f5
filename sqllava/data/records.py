"""Source files -> records: reading JSON, JSON lines and Parquet as streams, and the schema check.

First step of the data's path; what is read here goes into the index (`index.py`).
A "record" is a LLaVA record, a dict with `conversations` and perhaps `image`; numbers count from 0.
"""

import codecs
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sqllava.conversation import IMAGE, turns_from_record

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 256


class RecordError(ValueError):
    """Data that cannot be used; the message names the file, the record's number and its id."""


def iter_records(path: Path | str) -> Iterator[Any]:
    """Reads the records of a JSON array, JSON lines or Parquet file one by one.

    The kind of file is told by its content. Other fields' names are read as LLaVA's; see
    `normalize`. Nothing but the syntax is checked: a well-formed file may still hold bad records,
    or values that are no dict at all; see `check_record`.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: the file is empty, of no known kind, or malformed at the place named.
    """
    for record, _ in iter_with_text(path):
        yield record


def iter_with_text(
    path: Path | str, converted: Counter[str] | None = None
) -> Iterator[tuple[Any, str]]:
    """Like `iter_records`, each record with its JSON text (as it stands in the file, if it can).

    Args:
        converted: counts what `normalize` did. It is logged at the end in any case.
    """
    path = Path(path)
    count = 0
    converted = Counter() if converted is None else converted
    for record, text in _iter_source(path):
        if not _is_plain(record):
            record, changes = normalize(record)
            if changes:
                text = _to_json(record)
                converted.update(changes)
        yield record, text
        count += 1
    if not count:
        raise RecordError(f"{path}: holds no records; expected at least one")
    for change, records in converted.items():
        logger.info("%s: %d records: %s", path, records, change)


def file_kind(path: Path | str) -> str:
    """What a source file is, by its content: "Parquet", "JSON array" or "JSON lines"."""
    with Path(path).open("rb") as handle:
        if handle.read(4) == b"PAR1":
            return "Parquet"
        handle.seek(0)
        return "JSON array" if _Window(handle, 1 << 10).peek() == "[" else "JSON lines"


def check_record(record: Any, path: Path | str, number: int) -> None:
    """Checks one record: its turns, its images, and that they fit each other.

    Args:
        path: the source file, for the message.
        number: the record's place in the file, from 0.

    Raises:
        RecordError: naming file, number and id, what was found and what would be right.
    """
    try:
        _check(record)
    except (ValueError, TypeError) as error:  # TypeError: a speaker that is a list or a dict
        raise RecordError(describe(record, path, number, error)) from error


def describe(record: Any, path: Path | str, number: int, reason: object) -> str:
    """The message for a fault: file, record number and id, then the reason."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"{path}: record {number} (id {identity!r:.80}): {reason}"


def image_names(record: dict[str, Any]) -> list[str]:
    """The names in a record's `image`: none, one, or a list; ValueError if it is anything else."""
    image = record.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"'image' must be a file name or a list of them, found {image!r:.80}")
    return names


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, found {record!r:.80}")
    turns = turns_from_record(record)
    marks, names = sum(turn.images for turn in turns), image_names(record)
    if marks != len(names):
        raise ValueError(
            f"found {marks} {IMAGE} marks in 'conversations' but {len(names)} names in 'image'; "
            "each image needs its mark"
        )
    for turn in turns:
        # JSON may hold half a surrogate pair, which no tokenizer takes; the error names the place.
        (turn.text or "").encode()


def normalize(record: Any) -> tuple[Any, tuple[str, ...]]:
    """A record in LLaVA's form, and what was done for that (nothing for one that has it already).

    Known other forms: `messages` (role, content) with content as text or as parts, `images`, a
    `system` text. What is not understood stays as it is, for `check_record` to name.
    """
    if not isinstance(record, Mapping):
        return record, ()
    record, changes = dict(record), []
    if record.get("conversations") is None and isinstance(record.get("messages"), list):
        record["conversations"] = record.pop("messages")
        changes.append("'messages' read as 'conversations'")
    if record.get("image") is None and isinstance(record.get("images"), list):
        record["image"] = record.pop("images")
        changes.append("'images' read as 'image'")
    if record.pop("system", None):
        changes.append(_SYSTEM_LEFT_OUT)
    turns = record.get("conversations")
    if isinstance(turns, list):
        record["conversations"], more = _normalize_turns(turns, record)
        changes += more
    return record, tuple(changes)


_SYSTEM_LEFT_OUT = "system text left out: the template has its own"


def _is_plain(record: Any) -> bool:
    """Whether a record has LLaVA's form for sure: a quick look, as nearly all have it."""
    if not isinstance(record, dict) or "images" in record or "system" in record:
        return False
    turns = record.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "from" in first and first["from"] != "system"


def _normalize_turns(turns: list[Any], record: dict[str, Any]) -> tuple[list[Any], list[str]]:
    changes = []
    if any(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        turns = [_from_role(turn) for turn in turns]
        changes.append("'role' and 'content' read as 'from' and 'value'")
    if turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
        turns = turns[1:]
        changes.append(_SYSTEM_LEFT_OUT)
    names: list[Any] = []
    joined = [_from_parts(turn, names) for turn in turns]
    if any(new is not old for new, old in zip(joined, turns, strict=True)):
        turns = joined
        if names and record.get("image") is None:
            record["image"] = names
        changes.append("content in parts read as text with <image> marks")
    return turns, changes


def _from_role(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" in turn:
        return turn
    return {"from": turn.get("role"), "value": turn.get("content")}


def _from_parts(turn: Any, names: list[Any]) -> Any:
    """Joins parts such as {"type": "image", "image": name} and {"type": "text", "text": ...}."""
    parts = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return turn
    texts = []
    for part in parts:
        if part.get("type") == "image":
            texts.append(IMAGE + "\n")
            name = next((part[key] for key in ("image", "path", "url") if part.get(key)), None)
            names += [] if name is None else [name]
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return turn
    return {**turn, "value": "".join(texts)}


def _to_json(record: Any) -> str:
    # Parquet may hold what JSON has no word for, such as an image's bytes: name its type, so that
    # the check can say what was found.
    return json.dumps(record, default=lambda value: f"<{type(value).__name__}>")


def _iter_source(path: Path) -> Iterator[tuple[Any, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    with path.open("rb") as handle:
        start = handle.read(4)
        handle.seek(0)
        yield from _iter_parquet(path) if start == b"PAR1" else _iter_json(handle, path)


def _iter_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    # Here, since most users never need it and it is slow to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_PARQUET_ROWS):
            for record in batch.to_pylist():
                yield record, _to_json(record)
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not a readable Parquet file: {error}") from error


def _iter_json(
    handle: BinaryIO, path: Path, chunk: int = _CHUNK_BYTES
) -> Iterator[tuple[Any, str]]:
    window = _Window(handle, chunk)
    number = 0
    values = _iter_values(window)
    while True:
        try:
            item = next(values, None)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
            raise RecordError(f"{path}: record {number}, {window.place(error)}") from error
        if item is None:
            return
        yield item
        number += 1


def _iter_values(window: "_Window") -> Iterator[tuple[Any, str]]:
    """The elements of an array, or values one after another, as in JSON lines."""
    opening = window.peek()
    if opening not in ("[", "{", ""):
        raise json.JSONDecodeError(
            "expected a JSON array, JSON lines or Parquet", window.text, window.at
        )
    if opening != "[":
        while window.peek():
            yield window.value()
        return
    window.at += 1
    mark = window.peek()
    while mark != "]":
        yield window.value()
        mark = window.peek()
        if mark not in (",", "]"):
            raise json.JSONDecodeError("expected ',' or ']'", window.text, window.at)
        window.at += mark == ","
    window.at += 1
    if window.peek():
        raise json.JSONDecodeError("text after the closing ']'", window.text, window.at)


class _Window:
    """A stretch of a UTF-8 file that slides over it as values are read.

    Attributes:
        text: the stretch that is held.
        at: where reading stands in it.
    """

    def __init__(self, handle: BinaryIO, chunk: int) -> None:
        self.text, self.at = "", 0
        self._handle, self._chunk = handle, chunk
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._ended = False
        self._characters, self._lines = 0, 1  # what lies before the window

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self._grow()

    def value(self) -> tuple[Any, str]:
        """Reads one JSON value; also returns its text."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
                # A number that the window cuts looks whole: "1" of "1", "1." or "1e+".
                if end + 2 < len(self.text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise
            self._grow()
        text = self.text[self.at : end]
        self.at = end
        return value, text

    def place(self, error: Exception) -> str:
        """Says where in the file an error lies, and what it is."""
        at = error.pos if isinstance(error, json.JSONDecodeError) else self.at
        line = self._lines + self.text.count("\n", 0, at)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        near = self.text[max(at - 20, 0) : at + 20]
        return (
            f"line {line}, character {self._characters + at}: "
            f"not valid JSON in UTF-8: {reason}, near {near!r}"
        )

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        # An error far from the window's end is one of the file: no need to read the rest of it.
        # 16 is more than the longest literal or escape.
        return error.msg.startswith("Unterminated") or len(self.text.rstrip()) - error.pos < 16

    def _grow(self) -> None:
        self._lines += self.text.count("\n", 0, self.at)
        self._characters += self.at
        kept = self.text[self.at :]
        # At least doubling what is kept, so that one huge record takes linear time.
        data = self._handle.read(max(self._chunk, len(kept)))
        self._ended = not data
        self.text, self.at = kept + self._decoder.decode(data, final=self._ended), 0

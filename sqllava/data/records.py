"""Source files -> records: reading JSON, JSON lines and Parquet as streams, and the schema check.

First step of the data's path; what is read here goes into the index (`index.py`).
A "record" is a LLaVA record, a dict with `conversations` and perhaps `image`; numbers count from 0.
"""

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sqllava.conversation import IMAGE, turns_from_record
from sqllava.data.formats import LOOK_BYTES, mistaken_for
from sqllava.data.media import unread_media

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 256
# Far more than any record needs, far less than Python's own limit for what follows it down.
_DEEPEST = 100
_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


class RecordError(ValueError):
    """Data that cannot be used; the message names the file, the record's number and its id."""


def iter_records(path: Path | str) -> Iterator[Any]:
    """Reads the records of a JSON array, JSON lines or Parquet file one by one.

    The kind of file is told by its content. Other fields' names are read as LLaVA's; see
    `normalize`. Nothing but the syntax is checked: a well-formed file may still hold bad records,
    or values that are no dict at all; see `check_record`.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: the file is empty, of no known kind, or malformed at the place named: the file,
            the number of the record, its line.
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
    path = require_file(path)
    count = 0
    converted = Counter() if converted is None else converted
    for record, text in _iter_source(path, converted):
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
    """What a source file is, by its content: "Parquet", "JSON array" or "JSON lines".

    Raises:
        FileNotFoundError, RecordError: as `iter_records`.
    """
    path = require_file(path)
    with path.open("rb") as handle:
        if _is_parquet(handle, path):
            return "Parquet"
        window = _Window(handle, 1 << 10)
        try:
            return "JSON array" if window.peek() == "[" else "JSON lines"
        except ValueError as error:
            raise RecordError(f"{path}: record 0, {window.place(error)}") from error


def require_file(path: Path | str) -> Path:
    """The path of a data file; raises FileNotFoundError saying why it is none."""
    try:
        found = Path(path).is_file()
    except ValueError:  # a name that no file can have
        found = False
    if not found:
        raise FileNotFoundError(f"{path}: no such data file{what_is_meant(path)}")
    return Path(path)


def what_is_meant(path: Path | str) -> str:
    """What may be meant by the path of a file that is not there, and what would be right; or ""."""
    name = str(path)
    if "\0" not in name and Path(path).is_dir():
        names = sorted(f.name for f in Path(path).iterdir() if f.suffix in _DATA_SUFFIXES)
        held = f", which holds {', '.join(names[:5])}" if names else ""
        return f"; it is a folder{held}: name a JSON, JSON lines or Parquet file"
    if re.match("[a-z0-9]+:/", name):
        return "; nothing is fetched from addresses: download it first"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.endswith(_DATA_SUFFIXES):
        return (
            f"; nothing is fetched from the hub: download it first (hf download {name} "
            "--repo-type dataset --local-dir DIR), and name the file"
        )
    return ""


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
    except ValueError as error:
        raise RecordError(describe(record, path, number, error)) from error


def describe(record: Any, path: Path | str, number: int, reason: object) -> str:
    """The message for a fault: file, record number and id, then the reason."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"{path}: record {number} (id {identity!r:.80}): {reason}"


def image_names(record: dict[str, Any]) -> list[str]:
    """The names in a record's `image`: none, one, or a list; ValueError if it is anything else."""
    image = record.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if any(isinstance(name, dict) and {"bytes", "path"} & set(name) for name in names):
        raise ValueError(
            "'image' must be a file name, found the picture itself (an Image column of a hub data "
            "set): save each picture as a file in the image folder, and name that"
        )
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"'image' must be a file name or a list of them, found {image!r:.80}")
    return names


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, found {record!r:.80}")
    if record.get("conversations") is None:
        keys = ", ".join(map(str, record))
        raise ValueError(f"'conversations' must be a list of turns; found the keys {keys!r:.200}")
    turns = turns_from_record(record)
    unread = unread_media(record, record["conversations"])
    if unread:
        raise ValueError(unread)
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
    others = {key: value for key, value in turn.items() if key not in ("role", "content")}
    return {"from": turn.get("role"), "value": turn.get("content"), **others}


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


def _iter_source(path: Path, converted: Counter[str]) -> Iterator[tuple[Any, str]]:
    with path.open("rb") as handle:
        if _is_parquet(handle, path):
            yield from _iter_parquet(path, converted)
        else:
            yield from _iter_json(handle, path)


def _is_parquet(handle: BinaryIO, path: Path) -> bool:
    """Whether a file is Parquet, rather than JSON; RecordError names what else it is."""
    start = handle.read(LOOK_BYTES)
    handle.seek(0)
    found = mistaken_for(start)
    if found:
        raise RecordError(f"{path}: expected JSON, JSON lines or Parquet; the file is {found}")
    return start.startswith(b"PAR1")


def _iter_parquet(path: Path, converted: Counter[str]) -> Iterator[tuple[Any, str]]:
    # Here, since most users never need it and it is slow to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise RecordError(f"{path}: has two columns of one name: {names}")
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for record in _rows(batch, converted):
                yield record, _to_json(record)
                count += 1
    except (pa.ArrowException, OSError) as error:
        where = f" after record {count - 1}" if count else " (cut short?)"
        reason = "".join(c if c.isprintable() else " " for c in str(error))
        raise RecordError(f"{path}: not a readable Parquet file{where}: {reason}") from error


def _rows(batch: Any, converted: Counter[str]) -> list[dict[str, Any]]:
    """The rows of a Parquet batch. A cell that Python cannot hold becomes a text that says so: it
    may be one that nobody reads, and else the check finds it."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a time that is out of range
        columns = {name: batch.column(name) for name in batch.schema.names}
        return [
            {name: _cell(column[row], name, converted) for name, column in columns.items()}
            for row in range(batch.num_rows)
        ]


def _cell(value: Any, name: str, converted: Counter[str]) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        converted[f"a cell of {name!r} cannot be read ({value.type})"] += 1
        return f"<{error} ({value.type})>"


def _iter_json(
    handle: BinaryIO, path: Path, chunk: int = _CHUNK_BYTES
) -> Iterator[tuple[Any, str]]:
    window = _Window(handle, chunk)
    number = 0
    values = _iter_values(window)
    while True:
        try:
            item = next(values, None)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{path}: record {number}, {window.place(error)}") from error
        if item is None:
            return
        yield item
        number += 1


def _iter_values(window: "_Window") -> Iterator[tuple[Any, str]]:
    """The elements of an array, or values one after another, as in JSON lines."""
    opening = window.peek()
    if opening not in ("[", "{", ""):
        raise window.fault("expected a JSON array, JSON lines or Parquet")
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
            raise window.fault("expected ',' or ']'")
        window.at += mark == ","
    window.at += 1
    if window.peek():
        raise window.fault("text after the closing ']'")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if it gives a key twice, with two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"key {key!r:.40} stands twice in an object, with other values")
    return found


def _is_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than `_DEEPEST` deep."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


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
        self._json = json.JSONDecoder(object_pairs_hook=_without_repeats)
        self._ended = False
        self._not_utf8 = ""  # what stands where the text ends, if it is no UTF-8
        self._characters, self._lines = 0, 1  # what lies before the window

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self._ended:
                if self.at == len(self.text) and self._not_utf8:
                    raise self.fault(self._not_utf8)
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
                if not self._may_be_cut(error):
                    raise
                if self._ended:
                    raise self._at_the_end(error) from error
            self._grow()
        text = self.text[self.at : end]
        if text.count("[") + text.count("{") > _DEEPEST and _is_deep(value):
            raise self.fault(f"nested more than {_DEEPEST} deep")
        self.at = end
        return value, text

    def fault(self, reason: str) -> json.JSONDecodeError:
        """An error at the place where reading stands."""
        return json.JSONDecodeError(reason, self.text, self.at)

    def place(self, error: Exception) -> str:
        """Says where in the file an error lies, and what it is."""
        at = error.pos if isinstance(error, json.JSONDecodeError) else self.at
        line = self._lines + _line_ends(self.text[:at])
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        if isinstance(error, RecursionError):
            reason = f"nested more than {_DEEPEST} deep"
        near = self.text[max(at - 20, 0) : at + 20]
        return (
            f"line {line}, character {self._characters + at}: "
            f"not valid JSON in UTF-8: {reason}, near {near!r}"
        )

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        # An error far from the window's end is one of the file: no need to read the rest of it.
        # 16 is more than the longest literal or escape.
        return error.msg.startswith("Unterminated") or len(self.text.rstrip()) - error.pos < 16

    def _at_the_end(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """The error of a value that the end of the text may have cut."""
        if self._not_utf8:
            return json.JSONDecodeError(self._not_utf8, self.text, len(self.text))
        unfinished = error.msg.startswith("Unterminated") or not self.text[error.pos :].strip()
        reason = f"{error.msg}; the file ends within a record" if unfinished else error.msg
        return json.JSONDecodeError(reason, self.text, error.pos)

    def _grow(self) -> None:
        # "\r\n" is one end of a line: it is not cut in two.
        cut = self.at - (self.text[self.at - 1 : self.at] == "\r")
        self._lines += _line_ends(self.text[:cut])
        self._characters += cut
        kept, self.at = self.text[cut:], self.at - cut
        # At least doubling what is kept, so that one huge record takes linear time.
        data = self._handle.read(max(self._chunk, len(kept)))
        self._ended = not data
        try:
            self.text = kept + self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            # What stands before is read first, so that the fault is found in its record.
            self._ended, self._not_utf8 = True, _not_utf8(error)
            self.text = kept + error.object[: error.start].decode()


def _line_ends(text: str) -> int:
    """Line ends of any system: "\\n", "\\r\\n", "\\r"."""
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def _not_utf8(error: UnicodeDecodeError) -> str:
    found = error.object[error.start : error.start + 1].hex()
    if error.reason == "unexpected end of data":
        return "the file ends within a character"
    return f"byte 0x{found} is not UTF-8 (Latin-1?); save the file as UTF-8"

"""What goes between the steps of an evaluation: questions, answers, items, and their files.

A benchmark's file becomes Questions; the model's answers are JSON lines; a scorer turns an answer
and its annotation into an item, and items into metrics.
"""

import base64
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from sqllava.data.formats import LOOK_BYTES, mistaken_for
from sqllava.eval.fields import Record, Row, as_text, listed, shown

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)

SHOWN = 3  # of the ids that an error names


@dataclass(frozen=True)
class Question:
    """One thing that the model is asked.

    Attributes:
        question_id: as in the benchmark's file; of its type, and not always unique.
        text: the user's whole turn, suffix included, without the image's mark.
        image: the picture's path in the image folder; None where there is no picture.
        prompt: what the answers file records as the prompt; the text if None.
        image_base64: the picture itself, for benchmarks that ship it in their file.
        fault: why its picture cannot be shown, where the file itself says so.
        extra: more fields of the answer's record.
    """

    question_id: int | str
    text: str
    image: str | None = None
    prompt: str | None = None
    image_base64: str | None = field(default=None, repr=False)
    fault: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recorded_prompt(self) -> str:
        return self.text if self.prompt is None else self.prompt

    @property
    def has_image(self) -> bool:
        return self.image is not None or self.image_base64 is not None


class MissingAnswersError(ValueError):
    """Some answers are not there, which --allow-missing forgives; `count` says how many."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


class NoAnswersError(ValueError):
    """The annotations hold no right answers: only the benchmark's server can score them."""


def answer_row(question: Question, text: str, model_id: str, metadata: Row | None = None) -> Row:
    """An answer's record, with the published keys.

    The answer id is 22 characters, as published, but drawn from the content: equal runs give equal
    files.
    """
    content = json.dumps([model_id, question.question_id, question.recorded_prompt, text])
    digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
    return {
        "question_id": question.question_id,
        "prompt": question.recorded_prompt,
        "text": text,
        "answer_id": base64.urlsafe_b64encode(digest).decode().rstrip("="),
        "model_id": model_id,
        "metadata": metadata or {},
        **question.extra,
    }


# --- files ----------------------------------------------------------------------------------------


def foreign_content(path: Path) -> str | None:
    """What a file is, and what to do, if its first bytes show that it is no UTF-8 text.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, where a file is expected")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    with open(path, "rb") as file:
        head = file.read(LOOK_BYTES)
    if head.startswith(b"PAR1"):
        return "a Parquet file; export it as the JSON that the benchmark ships"
    wide = "no text (it holds zero bytes), or UTF-16; save it as UTF-8" if b"\0" in head else None
    return mistaken_for(head) or wide


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Opens a UTF-8 text to read, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else; the message says what, or at which line.
    """
    foreign = foreign_content(path)
    if foreign:
        raise ValueError(f"{path} is {foreign}")
    with open(path, encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError:
            raise ValueError(_not_utf8(path)) from None


def _not_utf8(path: Path) -> str:
    """Where a file stops being UTF-8: a stream's error knows only its place in a block."""
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        before = content[max(0, error.start - 20) : error.start].decode("ascii", "replace")
        return (
            f"{path}, line {line}: byte 0x{content[error.start]:02x} after {before!r} is not UTF-8 "
            "(Latin-1, or cut short?): save the file as UTF-8"
        )
    return f"{path} is not UTF-8"


def read_jsonl(path: Path) -> list[Row]:
    """Reads JSON lines; a line ends only at "\\n", as other breaks may stand within a text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object; the message says which.
    """
    with open_text(path, newline="\n") as file:
        return [
            parse_row(line, f"{path}, line {number}")
            for number, line in enumerate(file, 1)
            if line.strip()
        ]


def parse_row(text: str, where: str) -> Row:
    """A JSON line as an object.

    Args:
        where: the file and the line, for the error's message.

    Raises:
        ValueError: it is none.
    """
    if text.lstrip().startswith("["):
        raise ValueError(f"{where}: a JSON list where JSON lines are expected, one object a line")
    row = _parse(text, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found {text.strip():.60}")
    return row


def read_json(path: Path) -> Any:
    """Reads a JSON file; ValueError names the file if it is none."""
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        raise ValueError(f"{path} is empty: expected JSON")
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply to be a benchmark's") from None
    except ValueError as error:  # a number of thousands of digits is no JSONDecodeError
        lines = " (JSON lines, where one JSON value is expected?)" * ("Extra data" in str(error))
        raise ValueError(f"{where}: not JSON ({error}){lines}") from None


def read_record(path: Path) -> Record:
    """Reads a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {shown(content)}")
    return Record(content, str(path))


def read_list(path: Path) -> list[Record]:
    """Reads a JSON file that holds a list of objects."""
    return listed(read_json(path), str(path))


def read_lines(path: Path) -> list[Record]:
    """Reads JSON lines, as records that are numbered from 1."""
    return listed(read_jsonl(path), str(path))


def check_answered(path: Path, records: Sequence[Record], name: str) -> None:
    """Checks that annotations hold the right answers.

    Args:
        name: the field with them.

    Raises:
        NoAnswersError: no record has them: it is a split whose answers are not public.
        ValueError: there are no records, or only some have them.
    """
    if not records:
        raise ValueError(f"{path} holds no records")
    lacking = [record for record in records if record.row.get(name) in (None, "", [])]
    if len(lacking) == len(records):
        raise NoAnswersError(
            f"{path} has no public answers (no record has {name!r}): only the benchmark's server "
            "can score this split"
        )
    if lacking:
        raise lacking[0].fault(f"no {name!r}, which {len(records) - len(lacking)} others have")


def annotators(record: Record, name: str = "answers") -> list[str]:
    """The annotators' answers of a VQA record: texts, or objects with an `answer` each."""
    given = record.values(name)
    texts = [as_text(one.get("answer") if isinstance(one, dict) else one) for one in given]
    known = [text for text in texts if text is not None]
    if not known or len(known) < len(given):
        raise record.wrong(name, "a list of texts, or of objects with an answer")
    return known


def read_answers(path: Path) -> list[Row]:
    """Reads an answers file: each record has an id, and its `text` is text afterwards.

    A number counts as its text. `null`, on which some official scorers stop and which others count
    as wrong, counts as an answer of nothing, as `--bad-images mark` writes it; `text_was_null` of
    the record says so.

    Raises:
        ValueError: a record is no answer; the message says which.
    """
    records = [Record(row, f"{path}, record {n}") for n, row in enumerate(read_jsonl(path), 1)]
    rows = [_answer(record) for record in records]
    nulls = [row for row in rows if row.get("text_was_null")]
    if nulls:
        logger.warning(
            "%s: %d answers are null and count as empty, the first of question %r",
            path,
            len(nulls),
            nulls[0].get("question_id"),
        )
    return rows


def _answer(record: Record) -> Row:
    name = "text" if "text" in record.row else "response"
    if name not in record.row or not {"question_id", "img_path"} & record.row.keys():
        raise record.fault("an answer needs question_id and text")
    row = {**record.row, "text": record.optional_text(name) or ""}
    if record.row[name] is None:
        row["text_was_null"] = True
    if "question_id" in row:
        row["question_id"] = record.id("question_id")
    if row.get("prompt") is not None:
        row["prompt"] = record.text("prompt")
    if not isinstance(row.get("metadata") or {}, dict):
        raise record.wrong("metadata", "an object")
    return row


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes JSON's escape of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(unfinished, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
    unfinished.replace(path)


def to_json(value: Any) -> str:
    """A value as people read it; what is no finite number (NaN, which is not JSON) is null."""
    return json.dumps(finite(value), ensure_ascii=False, indent=1)


def finite(value: Any) -> Any:
    """The same value, with None in the place of NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(line(row) for row in rows))


def line(row: Mapping[str, Any]) -> str:
    """A row as a JSON line, escaped: no tool shall take a character for a line break."""
    return json.dumps(finite(row)) + "\n"


# --- joins ----------------------------------------------------------------------------------------


def join(
    answers: Sequence[Row],
    expected: Iterable[Key],
    key: Callable[[Row], Key],
    allow_missing: bool = False,
    forgiving: str = "scores them as the benchmark scores no answer",
) -> dict[Key, Row | None]:
    """Finds the answer to each expected key: never by position.

    Args:
        expected: the keys of the annotations, each once.
        key: an answer's key.
        allow_missing: give None where there is no answer, in place of an error.
        forgiving: what the flag does with them, for the error's sentence.

    Raises:
        MissingAnswersError: an answer is missing.
        ValueError: an answer is there twice, or to a question that was not asked.
    """
    wanted = list(expected)
    doubled = [name for name, times in Counter(wanted).items() if times > 1]
    if doubled:
        raise ValueError(f"the annotations hold {_named(doubled)} more than once")
    found: dict[Key, Row] = {}
    for row in answers:
        name = key(row)
        if name in found:
            raise ValueError(f"the answers hold {name!r} more than once")
        found[name] = row
    missing = [name for name in wanted if name not in found]
    if missing and not allow_missing:
        raise MissingAnswersError(
            f"{len(missing)} of {len(wanted)} answers are missing: {_named(missing)} "
            f"(--allow-missing {forgiving})",
            len(missing),
        )
    strange = sorted(set(found) - set(wanted), key=repr)
    if strange:
        raise ValueError(
            f"{len(strange)} answers are to questions that the annotations do not hold: "
            f"{_named(strange)}: are these answers to another version or split?"
        )
    return {name: found.get(name) for name in wanted}


def by_question_id(row: Row) -> str:
    """The id as text: benchmarks write the same ids as numbers and as strings.

    Raises:
        ValueError: it has none, as in Q-Bench's published form.
    """
    if "question_id" not in row:
        raise ValueError(f"the answer about {row.get('img_path')!r} has no question_id")
    return str(row["question_id"])


def prompt_of(row: Row) -> str:
    """The prompt that an answer records, where the join needs it.

    Raises:
        ValueError: it records none.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(
            f"the answer to question {by_question_id(row)!r} has no prompt, by which it is joined: "
            f"found {list(row)}"
        )
    return prompt


def text_of(row: Row | None) -> str:
    """An answer's text; nothing for one that is missing."""
    return "" if row is None else row["text"]


def nulls(answers: Sequence[Row]) -> int:
    """How many answers were null."""
    return sum("text_was_null" in row for row in answers)


def failures(answers: Sequence[Row]) -> int:
    """How many answers stand for a picture that could not be read."""
    return sum("error" in (row.get("metadata") or {}) for row in answers)


def _named(keys: Sequence[Hashable]) -> str:
    more = ", ..." if len(keys) > SHOWN else ""
    return ", ".join(repr(name) for name in keys[:SHOWN]) + more


# --- means ----------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing, as the official scorers print it."""
    known = list(values)
    return sum(known) / len(known) if known else 0.0


def grouped(items: Iterable[Row], name: str) -> Iterator[tuple[Any, list[Row]]]:
    """Items by the value of a field, in order of first appearance; None is no group."""
    groups: dict[Any, list[Row]] = {}
    for item in items:
        if item.get(name) is not None:
            groups.setdefault(item[name], []).append(item)
    yield from groups.items()


def percent(items: Iterable[Row], name: str = "score") -> float:
    """100 times the mean of a field."""
    return 100 * mean(item[name] for item in items)

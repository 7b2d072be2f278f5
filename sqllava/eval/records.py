"""What goes between the steps of an evaluation: questions, answers, items, and their files.

A benchmark's file becomes Questions; the model's answers are JSON lines; a scorer turns an answer
and its annotation into an item, and items into metrics.
"""

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
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
        extra: more fields of the answer's record.
    """

    question_id: int | str
    text: str
    image: str | None = None
    prompt: str | None = None
    image_base64: str | None = field(default=None, repr=False)
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


def read_jsonl(path: Path) -> list[Row]:
    """Reads JSON lines; a line ends only at "\\n", as other breaks may stand within a text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object; the message says which.
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        return [_row(path, number, line) for number, line in enumerate(file, 1) if line.strip()]


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected an object, found {line.strip():.60}")
    return row


def read_json(path: Path) -> Any:
    """Reads a JSON file; ValueError names the file if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_answers(path: Path) -> list[Row]:
    """Reads an answers file and checks that each line has an id and a text."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        text = row.get("text", row.get("response"))
        if not isinstance(text, str) or not ("question_id" in row or "img_path" in row):
            raise ValueError(
                f"{path}, record {number}: an answer needs question_id and text, found {list(row)}"
            )
    return rows


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
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
    """The id as text: benchmarks write the same ids as numbers and as strings."""
    return str(row["question_id"])


def text_of(row: Row | None) -> str:
    """An answer's text; nothing for one that is missing."""
    return "" if row is None else row["text"]


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

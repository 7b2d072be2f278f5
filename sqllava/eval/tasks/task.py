"""What a task says of itself: files, prompt, image preparation, decoding, formats and metric."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqllava.conversation import IMAGE
from sqllava.eval.fields import Record
from sqllava.eval.metrics.judged import READINGS
from sqllava.eval.records import Metrics, Question, Row, read_lines

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."
OPTION_LETTER_CN = "\n请直接回答选项字母。"
LETTERS = "ABCDEFGH"
# What --allow-missing is, where an upload lacks answers.
UPLOAD = "is for scores: an upload needs every answer"
# The zip of prepared question files that LLaVA's documentation links.
EVAL_ZIP = "LLaVA's eval.zip, or `sqllava eval prepare`"


@dataclass(frozen=True)
class File:
    """Something that a task needs.

    Attributes:
        path: under the task's data folder.
        source: where it comes from.
        size: about how big it is.
    """

    path: str
    source: str
    size: str


@dataclass(frozen=True)
class Layout:
    """Where a task's data lie in LLaVA's data folder (playground/data/eval).

    Attributes:
        folder: of the task; the others are in it.
        annotations: None where the usual split has no public answers.
    """

    folder: str
    questions: str
    images: str
    annotations: str | None


@dataclass(frozen=True)
class Option:
    """A choice that a task leaves to the user, as a flag of `score` or `prepare`."""

    flag: str
    help: str
    default: Any = None
    choices: tuple[str, ...] | None = None
    kind: Callable[[str], Any] | None = None  # None: a switch

    @property
    def name(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")


# For tasks that score a judge's stored replies.
LEFT_OUT = "leaves them out of the means and counts them"
READING = Option(
    "--reading",
    "how a judge's replies are read: tolerantly, or only as the official parser reads them",
    READINGS[0],
    READINGS,
    str,
)


@dataclass(frozen=True)
class Inputs:
    """What is scored: answers and the benchmark's annotations.

    Attributes:
        questions: the question file, where the join needs it.
        options: by the name of the task's options, defaults filled in.
    """

    answers: Sequence[Row]
    annotations: Path
    questions: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_missing: bool = False


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        prompt: the shape of the user's turn, for people; `read_questions` makes the real ones.
        template: the conversation template, as the published scripts set it.
        image_preparation: "pad" to a square or "crop" the centre, as the published runner does.
        answers: what the answers file records as the prompt.
        metric, submission: in words.
        headline: the metric that papers print, as a path of keys; `scale` brings it to their unit.
        read_questions: a question file -> questions, in its order.
        judge: answers and annotations -> items, one for each thing that is scored.
        summarize: items and options -> metrics.
        resample: the same for the bootstrap, where it must be quicker; None takes `summarize`.
        unit: the field that items drawn together in the bootstrap share; without it, each alone.
        submit: writes what the benchmark's server wants.
        submission_suffix: the ending of that file's name.
        prepare: (download, question file, options) -> questions written.
    """

    name: str
    title: str
    layout: Layout
    files: tuple[File, ...]
    prompt: str
    metric: str
    headline: tuple[str, ...]
    read_questions: Callable[[Path], list[Question]]
    judge: Callable[[Inputs], list[Row]]
    summarize: Callable[[Sequence[Row], Mapping[str, Any]], Metrics]
    resample: Callable[[Sequence[Row], Mapping[str, Any]], Metrics] | None = None
    unit: str = "question_id"
    template: str = "v1"
    image_preparation: Literal["pad", "crop"] = "pad"
    max_new_tokens: int = 128
    answers: str = "prompt: the question file's text"
    scale: float = 1.0
    submission: str | None = None
    submission_suffix: str = ".json"
    submit: Callable[[Inputs, Path], None] | None = None
    prepare: Callable[[Path, Path, Mapping[str, Any]], int] | None = None
    options: tuple[Option, ...] = ()
    prepare_options: tuple[Option, ...] = ()


def read_llava_questions(path: Path) -> list[Question]:
    """Reads a question file in LLaVA's form: JSON lines with question_id, image and text.

    Raises:
        ValueError: a record is none; the message says which.
    """
    records = read_lines(path)
    if not records:
        raise ValueError(f"{path} holds no questions: expected JSON lines, one question a line")
    return [_llava_question(record) for record in records]


def _llava_question(record: Record) -> Question:
    if not {"question_id", "text"} <= record.row.keys():
        raise record.fault("a question needs question_id and text")
    text = record.text("text")
    image, fault = picture_of(record)
    if image is None and (IMAGE in text or _OTHER_NAMES & record.row.keys()):
        raise record.fault("the question is about a picture, whose name goes under 'image'")
    if IMAGE in text:
        text = text.replace(IMAGE, "").strip()
    return Question(record.id("question_id"), text, image, fault=fault)


# What other toolkits call the picture. Without a look at them, the question is asked without one.
_OTHER_NAMES = {"images", "image_path", "img_path", "image_file", "video", "videos"}


def picture_of(record: Record) -> tuple[str | None, str | None]:
    """A record's picture, and why it cannot be shown: either may be None.

    A list of one picture is that picture; a question about several, whose names are put together,
    is known but not asked.
    """
    given = record.row.get("image")
    if given is None or isinstance(given, str):
        return given, None
    names = record.texts("image") if isinstance(given, list) else []
    if given != [] and not names:
        raise record.wrong("image", "a picture's name")
    if len(names) > 1:
        return ", ".join(names), f"the question is about {len(names)} pictures; one can be shown"
    return (names[0] if names else None), None


def file_in(path: Path, *names: str) -> Path:
    """The first of the named files in a folder; a path that is a file itself is meant.

    Raises:
        FileNotFoundError: none is there.
    """
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path} holds no {' or '.join(names)}")


def write_pretty(rows: Any) -> str:
    """JSON as the official files have it: one line, not escaped."""
    return json.dumps(rows, ensure_ascii=False)


def option_lines(options: Sequence[str]) -> str:
    """Options as lines, each with its letter: "\\nA. text"."""
    return "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))

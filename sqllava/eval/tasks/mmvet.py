"""MM-Vet: open questions about integrated capabilities, graded by a judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.judged import mmvet_metrics
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    join,
    read_json,
    read_record,
    text_of,
    write_json,
    write_jsonl,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    LEFT_OUT,
    READING,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    read_llava_questions,
)
from sqllava.eval.tasks.task import file_in as _file_in

ANNOTATIONS = "mm-vet.json"
PREFIX = "v1_"
# Of each run; the official script knows all but the last, its own parser's verdict.
GRADE_FIELDS = ("score", "content", "model", "official")


def read_entries(path: Path) -> dict[str, Row]:
    """The benchmark's questions by id ("v1_0").

    Raises:
        ValueError: an entry has no question, answer or capabilities; the message says which.
    """
    path = _file_in(path, ANNOTATIONS)
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected an object of questions by id")
    kinds = {"question": str, "answer": str, "capability": list}
    for name, entry in entries.items():
        for field, kind in kinds.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                raise ValueError(
                    f"{path}, {name}: expected a {kind.__name__} as {field}, found {entry!r:.80}"
                )
    return entries


def entry_id(row: Row) -> str:
    """The id of the question that an answer is to: LLaVA's files leave out the prefix."""
    name = by_question_id(row)
    return name if name.startswith("v") else PREFIX + name


def judge(inputs: Inputs) -> list[Row]:
    """One item per question, from stored grades, in the order in which the official script adds.

    A grade that is none stays None, or counts 0 as in the official script (--unreadable zero) where
    the judge said something or the question is not in the file.

    Raises:
        ValueError: no grades were given, they are not of the official form, not each question has
            as many, or none is a number.
    """
    if not inputs.options.get("grades"):
        raise ValueError(
            "mmvet is scored from a judge's grades: make them with `sqllava eval judge mmvet`, or "
            "pass stored ones with --grades"
        )
    entries, path = read_entries(inputs.annotations), Path(inputs.options["grades"])
    grades = read_grades(path)
    found = join(
        [{**row, "id": name} for name, row in grades.items()],
        entries,
        lambda row: str(row["id"]),
        inputs.allow_missing,
        LEFT_OUT,
    )
    counts = {len(grade["score"]) for grade in grades.values()}
    if len(counts) > 1:
        raise ValueError(f"{path}: not all questions have as many grades: found {sorted(counts)}")
    scores = "official" if inputs.options.get("reading") == "official" else "score"
    if all(score is None for grade in grades.values() for score in grade[scores]):
        raise ValueError(f"{path}: none of the grades of {len(grades)} questions is a number")
    answers = {entry_id(row): row for row in inputs.answers}
    order = [*grades, *(name for name, grade in found.items() if grade is None)]
    runs = counts.pop()
    return [
        {
            "question_id": name,
            "image": entries[name].get("imagename"),
            "prompt": entries[name]["question"],
            "prediction": text_of(answers.get(name)),
            "answer": entries[name]["answer"],
            **_scores(grades.get(name), scores, runs, inputs.options.get("unreadable") == "zero"),
            "capability": entries[name]["capability"],
            "missing": name not in grades,
        }
        for name in order
    ]


def read_grades(path: Path) -> dict[str, Row]:
    """Stored grades by question, in the official script's form.

    Raises:
        ValueError: a row is not {"model": [...], "content": [...], "score": [...]} with scores of 0
            to 1 (null where the judge failed); the message says which.
    """
    grades = read_json(path)
    if not isinstance(grades, dict):
        raise ValueError(
            f"{path}: expected an object of grades by id, found {type(grades).__name__}"
        )
    for name, row in grades.items():
        if not isinstance(row, dict) or not isinstance(row.get("score"), list):
            raise ValueError(f'{path}, {name}: expected {{"score": [...]}}, found {row!r:.60}')
        for field in GRADE_FIELDS[1:]:
            absent = row["score"] if field == "official" else [None] * len(row["score"])
            values = row.setdefault(field, list(absent))
            if not isinstance(values, list) or len(values) != len(row["score"]):
                raise ValueError(f"{path}, {name}: not as many {field} as scores: {values!r:.60}")
        for score in (*row["score"], *row["official"]):
            if score is not None and not (type(score) in (int, float) and 0 <= score <= 1):
                raise ValueError(f"{path}, {name}: a score is a number of 0 to 1, found {score!r}")
    return grades


def _scores(grade: Row | None, field: str, runs: int, as_zero: bool) -> Row:
    """A question's scores by run, and in which of them a reply was unreadable or tolerated."""
    if grade is None:
        return {"scores": [0.0 if as_zero else None] * runs}
    scores = grade[field]
    unreadable = [
        score is None and said is not None
        for score, said in zip(scores, grade["content"], strict=True)
    ]
    return {
        "scores": [
            0.0 if as_zero and failed else score
            for score, failed in zip(scores, unreadable, strict=True)
        ],
        "unreadable": unreadable,
        "tolerated": [
            score is not None and verdict is None
            for score, verdict in zip(scores, grade["official"], strict=True)
        ],
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Percentages per capability and in total; what has no grade is counted, in no mean."""
    return mmvet_metrics(items)


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the official evaluator's input: answers by id."""
    write_json(out, {entry_id(row): row["text"] for row in inputs.answers})


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava-mm-vet.jsonl from mm-vet.json."""
    entries = read_record(_file_in(source, ANNOTATIONS)).named()
    rows = [_row(name, entry) for name, entry in entries.items()]
    write_jsonl(out, rows)
    return len(rows)


def _row(name: str, entry: Record) -> Row:
    number = name.removeprefix(PREFIX)
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{entry.where}: expected an id such as {PREFIX}0, found {name!r}")
    return {
        "image": entry.text("imagename"),
        "text": entry.text("question"),
        "category": "conv",
        "question_id": int(number),
    }


TASK = Task(
    name="mmvet",
    title="MM-Vet",
    layout=Layout("mm-vet", "llava-mm-vet.jsonl", "images", "."),
    files=(
        File("llava-mm-vet.jsonl", EVAL_ZIP, "35 kB"),
        File(ANNOTATIONS, "github.com/yuweihao/MM-Vet: mm-vet.zip", "90 kB"),
        File("images/", "the same", "70 MB"),
        File("mm-vet_evaluator.py", "the same repository (the judge's prompt)", "15 kB"),
    ),
    prompt="{question}",
    metric="the judge's mean grade in percent: total and per capability",
    headline=("total",),
    image_preparation="crop",
    max_new_tokens=1024,
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="image",
    submission="JSON object: answers by id, for the online evaluator and the official script",
    submit=submit,
    prepare=prepare,
    options=(
        Option("--grades", "stored grades to score, ours or published", kind=str),
        READING,
        Option(
            "--unreadable",
            "a reply without a grade, or a question not in the file: left out of the means, as it "
            "says nothing about the answer, or 0 as in the official script",
            "leave-out",
            ("leave-out", "zero"),
            str,
        ),
    ),
)

"""GQA: questions about scenes, exact match, with the figures of the official script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.gqa import entailed_ids, gqa_items, gqa_metrics, prediction_of
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    check_answered,
    join,
    read_record,
    text_of,
    write_jsonl,
    write_text,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    SHORT_ANSWER,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    file_in,
    read_llava_questions,
    write_pretty,
)

QUESTIONS = "testdev_balanced_questions.json"
CHOICES = ("testdev_balanced_choices.json", "testdev_choices.json", "choices.json")


def judge(inputs: Inputs) -> list[Row]:
    """One item per balanced question.

    Consistency looks at entailed questions, which the balanced set alone does not hold: without
    --consistency it is given only where all of them are there.
    """
    path = file_in(inputs.annotations, QUESTIONS)
    questions = _checked(path)
    balanced = [name for name, question in questions.items() if question["isBalanced"]]
    known = [row for row in inputs.answers if by_question_id(row) in questions]
    strange = [row for row in inputs.answers if by_question_id(row) not in questions]
    others = [row for row in known if not questions[by_question_id(row)]["isBalanced"]]
    wanted = set(balanced)
    scored = [row for row in known if by_question_id(row) in wanted]
    rows = join([*scored, *strange], balanced, by_question_id, inputs.allow_missing)
    rows |= join(others, [by_question_id(row) for row in others], by_question_id)
    predictions = {name: prediction_of(text_of(row)) for name, row in rows.items()}
    items = gqa_items(
        questions,
        predictions,
        _choices(path.parent, balanced),
        _looks_at_entailed(questions, predictions, bool(inputs.options.get("consistency"))),
    )
    for item in items:
        row = rows[item["question_id"]]
        item["prompt"] = row and row.get("prompt")
    return items


def _checked(path: Path) -> dict[str, Row]:
    """The questions by id, with all that the official figures look at."""
    entries = read_record(path).named()
    check_answered(path, list(entries.values()), "answer")
    return {name: _question(entry) for name, entry in entries.items()}


def _question(entry: Record) -> Row:
    types = entry.record("types")
    steps = [
        {"operation": step.text("operation"), "argument": step.text("argument")}
        for step in entry.records("semantic")
    ]
    question: Row = {
        "question": entry.text("question"),
        "answer": entry.text("answer"),
        "isBalanced": entry.flag("isBalanced"),
        "types": {
            "structural": types.text("structural"),
            "semantic": types.text("semantic"),
            "detailed": types.optional_text("detailed"),
        },
        "groups": {"global": entry.record("groups").optional_text("global")},
        "semantic": steps,
        "entailed": entry.texts("entailed") if "entailed" in entry.row else [],
    }
    return question | ({"imageId": entry.text("imageId")} if "imageId" in entry.row else {})


def _choices(folder: Path, asked: Sequence[str]) -> dict[str, Row] | None:
    for name in CHOICES:
        if (folder / name).is_file():
            choices = read_record(folder / name)
            entries = {question: choices.record(question) for question in asked}
            return {
                question: {kind: entry.texts(kind) for kind in ("valid", "plausible")}
                for question, entry in entries.items()
            }
    return None


def _looks_at_entailed(
    questions: Mapping[str, Any], predictions: Mapping[str, str], asked_for: bool
) -> bool:
    needed = entailed_ids(questions, predictions)
    missing = sorted(name for name in needed if name not in questions or name not in predictions)
    if missing and asked_for:
        raise ValueError(
            f"consistency needs {len(missing)} entailed questions that have no answer here, "
            f"such as {missing[0]!r}: answer the whole (unbalanced) set"
        )
    return not missing


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """GQA's figures; `consistency` is None where entailed questions were not there."""
    return gqa_metrics(items)


def submit(inputs: Inputs, out: Path) -> None:
    """Writes testdev_balanced_predictions.json, for the official script."""
    rows = [
        {"questionId": by_question_id(row), "prediction": prediction_of(row["text"])}
        for row in inputs.answers
    ]
    write_text(out, write_pretty(rows))


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file from testdev_balanced_questions.json."""
    rows = [
        {
            "question_id": name,
            "image": f"{question.id('imageId')}.jpg",
            "text": question.text("question") + SHORT_ANSWER,
            "category": "default",
        }
        for name, question in read_record(file_in(source, QUESTIONS)).named().items()
    ]
    write_jsonl(out, rows)
    return len(rows)


TASK = Task(
    name="gqa",
    title="GQA (testdev, balanced)",
    layout=Layout("gqa", "llava_gqa_testdev_balanced.jsonl", "data/images", "data"),
    files=(
        File("llava_gqa_testdev_balanced.jsonl", EVAL_ZIP, "2 MB"),
        File("data/images/", "cs.stanford.edu/people/dorarad/gqa: images.zip", "20 GB"),
        File(f"data/{QUESTIONS}", "the same: questions1.2.zip", "8 MB of 1.4 GB"),
    ),
    prompt="{question}" + SHORT_ANSWER,
    metric="exact match, and the official script's other figures",
    headline=("accuracy",),
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="image",
    submission="JSON list of {questionId, prediction}, the official script's input",
    submit=submit,
    prepare=prepare,
    options=(Option("--consistency", "fail where consistency cannot be computed", False),),
)

"""VizWiz: questions of blind people about their photos. A server has the test answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.vqa import evalai_accuracy, normalize_evalai
from sqllava.eval.records import (
    Metrics,
    Row,
    annotators,
    by_question_id,
    check_answered,
    grouped,
    join,
    mean,
    percent,
    read_list,
    text_of,
    write_jsonl,
    write_text,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    SHORT_ANSWER,
    UPLOAD,
    File,
    Inputs,
    Layout,
    Task,
    read_llava_questions,
    write_pretty,
)

UNANSWERABLE = "unanswerable"
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def judge(inputs: Inputs) -> list[Row]:
    """One item per annotated picture, joined by the picture's name or the record's number."""
    entries = read_list(inputs.annotations)
    check_answered(inputs.annotations, entries, "answers")
    pictures = [entry.text("image") for entry in entries]
    names = _image_names(inputs, pictures)
    answers = join(
        inputs.answers, pictures, lambda row: names[by_question_id(row)], inputs.allow_missing
    )
    by_image = dict(zip(pictures, entries, strict=True))
    return [_item(by_image[name], row) for name, row in answers.items()]


def _image_names(inputs: Inputs, pictures: Sequence[str]) -> dict[str, str]:
    """The picture of each question; VizWiz numbers its questions by the picture's place."""
    if inputs.questions is None:
        names = {str(number): name for number, name in enumerate(pictures)}
    else:
        questions = read_llava_questions(inputs.questions)
        names = {str(q.question_id): Path(q.image or "").name for q in questions}
    for row in inputs.answers:
        if by_question_id(row) not in names:
            source = inputs.questions or inputs.annotations
            raise ValueError(f"{source}: no picture is known for question {row['question_id']!r}")
    return names


def _item(entry: Record, row: Row | None) -> Row:
    given = annotators(entry)
    said_so = normalize_evalai(text_of(row)) == UNANSWERABLE
    answerable = entry.integer("answerable") if "answerable" in entry.row else None
    return {
        "question_id": entry.text("image") if row is None else row["question_id"],
        "image": entry.text("image"),
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answers": given,
        "score": evalai_accuracy(text_of(row), given),
        "answer_type": entry.optional_text("answer_type"),
        "answerable_right": float(said_so == (answerable == 0)),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Accuracies in percent: overall, by answer type, and of telling the unanswerable."""
    return {
        "overall": percent(items),
        "by_answer_type": {name: percent(group) for name, group in grouped(items, "answer_type")},
        "answerability": 100 * mean(item["answerable_right"] for item in items),
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes EvalAI's file: one answer for each question, in order; none may be missing."""
    source = inputs.questions
    if source is None:
        entries = read_list(inputs.annotations)
        asked = [(str(n), entry.text("image")) for n, entry in enumerate(entries)]
    else:
        asked = [(str(q.question_id), q.image or "") for q in read_llava_questions(source)]
    names = [name for name, _ in asked]
    answers = join(inputs.answers, names, by_question_id, forgiving=UPLOAD)
    rows = [
        {"image": image, "answer": normalize_evalai(text_of(answers[name]))}
        for name, image in asked
    ]
    write_text(out, write_pretty(rows))


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file from Annotations/{train,val,test}.json."""
    rows = [
        {
            "question_id": number,
            "image": entry.text("image"),
            "text": entry.text("question").capitalize() + INSUFFICIENT + SHORT_ANSWER,
            "category": "default",
        }
        for number, entry in enumerate(read_list(source))
    ]
    write_jsonl(out, rows)
    return len(rows)


TASK = Task(
    name="vizwiz",
    title="VizWiz",
    layout=Layout("vizwiz", "llava_test.jsonl", "test", None),
    files=(
        File("llava_test.jsonl", EVAL_ZIP, "2 MB"),
        File("test/", "vizwiz.org: test.zip", "3 GB"),
        File("Annotations/val.json", "vizwiz.org: Annotations.zip (to score on val)", "5 MB"),
    ),
    prompt="{Question}" + INSUFFICIENT + SHORT_ANSWER,
    metric="VQA soft accuracy with EvalAI's normaliser (val); the server scores the test split",
    headline=("overall",),
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    submission="JSON list of {image, answer}, for all questions of the test split",
    submit=submit,
    prepare=prepare,
)

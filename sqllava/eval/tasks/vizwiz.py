"""VizWiz: questions of blind people about their photos. A server has the test answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.vqa import evalai_accuracy, normalize_evalai
from sqllava.eval.records import (
    Metrics,
    NoAnswersError,
    Row,
    by_question_id,
    grouped,
    join,
    mean,
    percent,
    read_json,
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
    Task,
    read_llava_questions,
    write_pretty,
)

UNANSWERABLE = "unanswerable"
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def judge(inputs: Inputs) -> list[Row]:
    """One item per annotated picture, joined by the picture's name or the record's number."""
    entries = read_json(inputs.annotations)
    if not all("answers" in entry for entry in entries):
        raise NoAnswersError(f"{inputs.annotations} has no answers: it is the test split")
    names = _image_names(inputs, entries)
    by_image = {entry["image"]: entry for entry in entries}
    answers = join(
        inputs.answers, by_image, lambda row: names[by_question_id(row)], inputs.allow_missing
    )
    return [_item(by_image[name], row) for name, row in answers.items()]


def _image_names(inputs: Inputs, entries: Sequence[Row]) -> dict[str, str]:
    """The picture of each question; VizWiz numbers its questions by the picture's place."""
    if inputs.questions is None:
        names = {str(number): entry["image"] for number, entry in enumerate(entries)}
    else:
        questions = read_llava_questions(inputs.questions)
        names = {str(q.question_id): Path(q.image or "").name for q in questions}
    for row in inputs.answers:
        if by_question_id(row) not in names:
            raise ValueError(f"no picture is known for question {row['question_id']!r}")
    return names


def _item(entry: Row, row: Row | None) -> Row:
    given = [answer["answer"] for answer in entry["answers"]]
    said_so = normalize_evalai(text_of(row)) == UNANSWERABLE
    return {
        "question_id": entry["image"] if row is None else row["question_id"],
        "image": entry["image"],
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answers": given,
        "score": evalai_accuracy(text_of(row), given),
        "answer_type": entry.get("answer_type"),
        "answerable_right": float(said_so == (entry.get("answerable") == 0)),
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
        asked = [(str(n), e["image"]) for n, e in enumerate(read_json(inputs.annotations))]
    else:
        asked = [(str(q.question_id), q.image) for q in read_llava_questions(source)]
    answers = join(inputs.answers, [name for name, _ in asked], by_question_id)
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
            "image": entry["image"],
            "text": entry["question"].capitalize() + INSUFFICIENT + SHORT_ANSWER,
            "category": "default",
        }
        for number, entry in enumerate(read_json(source))
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

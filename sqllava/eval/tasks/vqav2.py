"""VQAv2: short answers about COCO pictures. Test answers are on a server; val scores here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.vqa import normalize_evalai, vqa_accuracy
from sqllava.eval.records import (
    Metrics,
    NoAnswersError,
    Row,
    annotators,
    by_question_id,
    check_answered,
    grouped,
    join,
    percent,
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
    read_llava_questions,
    write_pretty,
)


def judge(inputs: Inputs) -> list[Row]:
    """One item per question of the annotation file, scored as the official code does."""
    content = read_record(inputs.annotations)
    if "annotations" not in content.row and "questions" in content.row:
        raise NoAnswersError(
            f"{inputs.annotations} has no public answers (it holds `questions`, no `annotations`): "
            "only the benchmark's server can score a test split"
        )
    annotations = content.records("annotations")
    check_answered(inputs.annotations, annotations, "answers")
    ids = [str(entry.id("question_id")) for entry in annotations]
    answers = join(inputs.answers, ids, by_question_id, inputs.allow_missing)
    by_id = dict(zip(ids, annotations, strict=True))
    always = bool(inputs.options.get("always_normalize"))
    return [_item(by_id[name], row, always) for name, row in answers.items()]


def _item(entry: Record, row: Row | None, always: bool) -> Row:
    given = annotators(entry)
    return {
        "question_id": entry.id("question_id"),
        "image_id": entry.row.get("image_id"),
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answers": given,
        "score": vqa_accuracy(text_of(row), given, always),
        "answer_type": entry.optional_text("answer_type"),
        "question_type": entry.optional_text("question_type"),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Accuracies in percent: overall, by answer type and by question type."""
    return {
        "overall": percent(items),
        "by_answer_type": {name: percent(group) for name, group in grouped(items, "answer_type")},
        "by_question_type": {
            name: percent(group) for name, group in grouped(items, "question_type")
        },
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes EvalAI's file: every id of the question file, in its order, "" where not answered."""
    source = inputs.questions or inputs.annotations
    if source.suffix == ".jsonl":
        asked = [question.question_id for question in read_llava_questions(source)]
    else:
        content = read_record(source)
        if "questions" not in content.row:
            raise content.fault("expected the file with `questions` (or LLaVA's .jsonl)")
        asked = [question.id("question_id") for question in content.records("questions")]
    answers = join(inputs.answers, map(str, asked), by_question_id, allow_missing=True)
    rows = [
        {"question_id": name, "answer": normalize_evalai(text_of(answers[str(name)]))}
        for name in asked
    ]
    write_text(out, write_pretty(rows))


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file from v2_OpenEnded_mscoco_*_questions.json."""
    content = read_record(source)
    split = content.text("data_subtype")
    # The test-dev questions are about pictures of test2015.
    folder = "test2015" if split.startswith("test") else split
    rows = [
        {
            "question_id": question.id("question_id"),
            "image": f"COCO_{folder}_{question.integer('image_id'):012d}.jpg",
            "text": question.text("question") + SHORT_ANSWER,
            "category": "default",
        }
        for question in content.records("questions")
    ]
    write_jsonl(out, rows)
    return len(rows)


TASK = Task(
    name="vqav2",
    title="VQAv2",
    layout=Layout("vqav2", "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015", None),
    files=(
        File("llava_vqav2_mscoco_test-dev2015.jsonl", EVAL_ZIP, "16 MB"),
        File("llava_vqav2_mscoco_test2015.jsonl", EVAL_ZIP, "66 MB"),
        File("test2015/", "images.cocodataset.org: zips/test2015.zip", "12 GB"),
        File("v2_mscoco_val2014_annotations.json", "visualqa.org (to score on val)", "350 MB"),
    ),
    prompt="{question}" + SHORT_ANSWER,
    metric="VQA soft accuracy with the official normaliser (val); a server scores the tests",
    headline=("overall",),
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="image_id",
    submission="JSON list of {question_id, answer}, for every question of test2015",
    submit=submit,
    prepare=prepare,
    options=(
        Option(
            "--always-normalize",
            "normalise also where all annotators agree, which the official code does not",
            False,
        ),
    ),
)

"""TextVQA: reading text in pictures; the published prompts hold OCR tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.vqa import evalai_accuracy
from sqllava.eval.records import (
    Metrics,
    Row,
    annotators,
    by_question_id,
    check_answered,
    join,
    percent,
    prompt_of,
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

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "Reference OCR token: "
ANSWERS = 10
_OLD_FORM = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_of(prompt: str) -> str:
    """The question within a recorded prompt, in lower case: with the image's id it is the key.

    Raises:
        ValueError: the prompt has none of the published forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = _OLD_FORM.search(prompt)
        if found:
            return found.group(1).lower()
    elif OCR in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(OCR.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"cannot find the question in the TextVQA prompt {prompt!r}")


def judge(inputs: Inputs) -> list[Row]:
    """One item per question; the ids in the answers are the pictures', so several share one."""
    entries = read_record(inputs.annotations).records("data")
    check_answered(inputs.annotations, entries, "answers")
    return [_item(entry, row) for entry, row in _joined(inputs, entries)]


def _joined(inputs: Inputs, entries: Sequence[Record]) -> list[tuple[Record, Row | None]]:
    keys = [(str(entry.id("image_id")), entry.text("question").lower()) for entry in entries]
    answers = join(inputs.answers, keys, _key, inputs.allow_missing)
    return list(zip(entries, answers.values(), strict=True))


def _key(row: Row) -> tuple[str, str]:
    return by_question_id(row), question_of(prompt_of(row))


def _item(entry: Record, row: Row | None) -> Row:
    given = annotators(entry)
    if len(given) != ANSWERS:
        raise ValueError(f"{entry.where}: expected {ANSWERS} answers, found {len(given)}")
    return {
        "question_id": entry.id("question_id"),
        "image": f"{entry.id('image_id')}.jpg",
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answers": given,
        "score": evalai_accuracy(text_of(row), given),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """The accuracy in percent."""
    return {"accuracy": percent(items)}


def submit(inputs: Inputs, out: Path) -> None:
    """Writes EvalAI's file: an answer for each question of the annotations, by its own id."""
    entries = read_record(inputs.annotations).records("data")
    rows = [
        {"question_id": entry.id("question_id"), "answer": text_of(row)}
        for entry, row in _joined(inputs, entries)
    ]
    write_text(out, write_pretty(rows))


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file from TextVQA_0.5.1_val.json, with OCR tokens from their file."""
    ocr = options.get("ocr")
    tokens = {}
    if ocr:
        pictures = read_record(Path(ocr)).records("data")
        tokens = {str(row.id("image_id")): row.texts("ocr_tokens") for row in pictures}
    entries = read_record(source).records("data")
    rows = [_row(entry, tokens if ocr else None) for entry in entries]
    write_jsonl(out, rows)
    return len(rows)


def _row(entry: Record, tokens: Mapping[str, Sequence[str]] | None) -> Row:
    image = entry.id("image_id")
    read = "" if tokens is None else f"\n{OCR}{', '.join(tokens.get(str(image), ()))}"
    return {
        "question_id": image,
        "image": f"{image}.jpg",
        "text": entry.text("question").capitalize() + read + SHORT_ANSWER,
        "category": "default",
    }


TASK = Task(
    name="textvqa",
    title="TextVQA (val)",
    layout=Layout("textvqa", QUESTIONS, "train_images", ANNOTATIONS),
    files=(
        File(QUESTIONS, EVAL_ZIP, "2 MB"),
        File("train_images/", "textvqa.org: train_val_images.zip", "7 GB"),
        File(ANNOTATIONS, "textvqa.org", "16 MB"),
    ),
    prompt="{Question}\\nReference OCR token: {token, ...}" + SHORT_ANSWER,
    metric="VQA soft accuracy with EvalAI's normaliser",
    headline=("accuracy",),
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="image",
    submission="JSON list of {question_id, answer}, for all questions of the test split",
    submit=submit,
    prepare=prepare,
    prepare_options=(
        Option(
            "--ocr",
            "TextVQA_Rosetta_OCR_v0.2_val.json; without it the prompts hold no OCR tokens, and "
            "scores are about ten points lower",
            kind=str,
        ),
    ),
)

"""TextVQA: reading text in pictures; the published prompts hold OCR tokens."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.vqa import evalai_accuracy
from sqllava.eval.records import Metrics, Row, join, percent, read_json, text_of, write_jsonl
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    SHORT_ANSWER,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    read_llava_questions,
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
    entries = {
        (str(entry["image_id"]), entry["question"].lower()): entry
        for entry in read_json(inputs.annotations)["data"]
    }
    answers = join(
        inputs.answers,
        entries,
        lambda row: (str(row["question_id"]), question_of(row["prompt"])),
        inputs.allow_missing,
    )
    return [_item(entries[key], row) for key, row in answers.items()]


def _item(entry: Row, row: Row | None) -> Row:
    if len(entry["answers"]) != ANSWERS:
        raise ValueError(
            f"question {entry['question_id']} has {len(entry['answers'])} answers, not {ANSWERS}"
        )
    return {
        "question_id": entry["question_id"],
        "image": f"{entry['image_id']}.jpg",
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answers": entry["answers"],
        "score": evalai_accuracy(text_of(row), entry["answers"]),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """The accuracy in percent."""
    return {"accuracy": percent(items)}


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes the question file from TextVQA_0.5.1_val.json, with OCR tokens from their file."""
    ocr = options.get("ocr")
    tokens = {}
    if ocr:
        tokens = {row["image_id"]: row["ocr_tokens"] for row in read_json(Path(ocr))["data"]}
    rows = [
        {
            "question_id": entry["image_id"],
            "image": f"{entry['image_id']}.jpg",
            "text": entry["question"].capitalize()
            + (f"\n{OCR}{', '.join(tokens.get(entry['image_id'], ()))}" if ocr else "")
            + SHORT_ANSWER,
            "category": "default",
        }
        for entry in read_json(source)["data"]
    ]
    write_jsonl(out, rows)
    return len(rows)


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

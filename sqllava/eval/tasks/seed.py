"""SEED-Bench: multiple choice over pictures and over frames of videos."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    check_answered,
    grouped,
    join,
    percent,
    read_record,
    text_of,
    write_jsonl,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    OPTION_LETTER,
    UPLOAD,
    File,
    Inputs,
    Layout,
    Task,
    file_in,
    option_lines,
    read_llava_questions,
)

logger = logging.getLogger(__name__)

ANNOTATIONS = "SEED-Bench.json"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def _entries(path: Path) -> tuple[list[Record], dict[int, str]]:
    """The questions, and the types' names by number (releases number them differently)."""
    content = read_record(file_in(path, ANNOTATIONS))
    types = content.record("question_type")
    return content.records("questions"), {types.integer(name): name for name in types.row}


def _type(entry: Record, types: Mapping[int, str]) -> str:
    number = entry.integer("question_type_id")
    if number not in types:
        raise entry.wrong("question_type_id", f"one of question_type's {sorted(types)}")
    return types[number]


def judge(inputs: Inputs) -> list[Row]:
    """One item per question; an answer is right if it is the letter and nothing else."""
    entries, types = _entries(inputs.annotations)
    check_answered(inputs.annotations, entries, "answer")
    ids = [str(entry.id("question_id")) for entry in entries]
    answers = join(inputs.answers, ids, by_question_id, inputs.allow_missing)
    return [_item(entry, types, row) for entry, row in zip(entries, answers.values(), strict=True)]


def _item(entry: Record, types: Mapping[int, str], row: Row | None) -> Row:
    return {
        "question_id": entry.id("question_id"),
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answer": entry.text("answer"),
        "score": float(text_of(row) == entry.text("answer")),
        "type": _type(entry, types),
        "data_type": entry.text("data_type"),
        "data_id": entry.row.get("data_id"),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Percentages: all, by kind of data as the file calls it ("image" and "video"), and by type."""
    return {
        **{kind: percent(group) for kind, group in grouped(items, "data_type")},
        "total": percent(items),
        "by_type": {name: percent(group) for name, group in grouped(items, "type")},
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the leaderboard's lines, in the annotations' order."""
    entries, _ = _entries(inputs.annotations)
    names = [str(entry.id("question_id")) for entry in entries]
    answers = join(inputs.answers, names, by_question_id, forgiving=UPLOAD)
    rows = [{"question_id": name, "prediction": text_of(answers[name])} for name in names]
    write_jsonl(out, rows)


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava-seed-bench.jsonl from SEED-Bench.json.

    A video stands for itself by its middle frame, which must be cut out beforehand, as
    SEED-Bench-video-image/<type>_<id>.png. SEED-Bench-2's questions about several pictures name
    them all; `run` does not ask them.
    """
    entries, types = _entries(source)
    rows = [_row(entry, types) for entry in entries]
    several = sum(isinstance(row["image"], list) for row in rows)
    if several:
        logger.warning(
            "%s: %d of %d questions are about several pictures: `sqllava eval run` stops at them, "
            "or marks them with --bad-images mark",
            *(source, several, len(rows)),
        )
    write_jsonl(out, rows)
    return len(rows)


def _row(entry: Record, types: Mapping[int, str]) -> Row:
    name = str(entry.id("question_id"))
    choices = [entry.text(choice) for choice in CHOICES if choice in entry.row]
    if not choices:
        raise entry.fault(f"no {CHOICES[0]!r}")
    return {
        "image": _picture(entry, name),
        "text": entry.text("question") + option_lines(choices) + OPTION_LETTER,
        "category": _type(entry, types),
        "question_id": int(name) if name.isascii() and name.isdecimal() else name,
    }


def _picture(entry: Record, name: str) -> str | list[str]:
    if entry.text("data_type").lower() == "video":
        return f"SEED-Bench-video-image/{entry.integer('question_type_id')}_{name}.png"
    if isinstance(entry.row.get("data_id"), list):
        return [f"SEED-Bench-image/{data_id}" for data_id in entry.texts("data_id")]
    return f"SEED-Bench-image/{entry.text('data_id')}"


TASK = Task(
    name="seed",
    title="SEED-Bench",
    layout=Layout("seed_bench", "llava-seed-bench.jsonl", ".", ANNOTATIONS),
    files=(
        File("llava-seed-bench.jsonl", EVAL_ZIP, "6 MB"),
        File(ANNOTATIONS, "AILab-CVC/SEED-Bench on the hub (revision of August 2023)", "9 MB"),
        File("SEED-Bench-image/", "the same", "26 GB"),
        File("SEED-Bench-video-image/", "frames, cut by the authors' instructions", "5 GB"),
    ),
    prompt="{question}\\nA. {choice}..." + OPTION_LETTER,
    metric="exact match of the letter; papers on LLaVA-1.5 print the total",
    headline=("total",),
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="data_id",
    submission="JSON lines of {question_id, prediction}, in the annotations' order",
    submission_suffix=".jsonl",
    submit=submit,
    prepare=prepare,
)

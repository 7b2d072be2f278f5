"""SEED-Bench: multiple choice over pictures and over frames of videos."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    grouped,
    join,
    percent,
    read_json,
    text_of,
    write_jsonl,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    OPTION_LETTER,
    File,
    Inputs,
    Layout,
    Task,
    file_in,
    option_lines,
    read_llava_questions,
)

ANNOTATIONS = "SEED-Bench.json"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def _entries(path: Path) -> tuple[list[Row], dict[int, str]]:
    """The questions, and the types' names by number (releases number them differently)."""
    content = read_json(file_in(path, ANNOTATIONS))
    return content["questions"], {number: name for name, number in content["question_type"].items()}


def judge(inputs: Inputs) -> list[Row]:
    """One item per question; an answer is right if it is the letter and nothing else."""
    entries, types = _entries(inputs.annotations)
    by_id = {str(entry["question_id"]): entry for entry in entries}
    answers = join(
        inputs.answers,
        [str(entry["question_id"]) for entry in entries],
        by_question_id,
        inputs.allow_missing,
    )
    return [_item(by_id[name], types, row) for name, row in answers.items()]


def _item(entry: Row, types: Mapping[int, str], row: Row | None) -> Row:
    return {
        "question_id": entry["question_id"],
        "prompt": row and row.get("prompt"),
        "prediction": text_of(row),
        "answer": entry["answer"],
        "score": float(text_of(row) == entry["answer"]),
        "type": types[entry["question_type_id"]],
        "data_type": entry["data_type"],
        "data_id": entry.get("data_id"),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Percentages: all, pictures, videos, and by type."""
    return {
        "total": percent(items),
        **{
            kind: percent(item for item in items if item["data_type"] == kind)
            for kind in ("image", "video")
        },
        "by_type": {name: percent(group) for name, group in grouped(items, "type")},
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the leaderboard's lines, in the annotations' order."""
    entries, _ = _entries(inputs.annotations)
    names = [str(entry["question_id"]) for entry in entries]
    answers = join(inputs.answers, names, by_question_id)
    rows = [{"question_id": name, "prediction": text_of(answers[name])} for name in names]
    write_jsonl(out, rows)


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava-seed-bench.jsonl from SEED-Bench.json.

    A video stands for itself by its middle frame, which must be cut out beforehand, as
    SEED-Bench-video-image/<type>_<id>.png.
    """
    entries, types = _entries(source)
    rows = []
    for entry in entries:
        name = str(entry["question_id"])
        picture = f"SEED-Bench-image/{entry['data_id']}"
        if entry["data_type"] == "video":
            picture = f"SEED-Bench-video-image/{entry['question_type_id']}_{name}.png"
        rows.append(
            {
                "image": picture,
                "text": entry["question"]
                + option_lines([entry[choice] for choice in CHOICES])
                + OPTION_LETTER,
                "category": types[entry["question_type_id"]],
                "question_id": int(name) if name.isdigit() else name,
            }
        )
    write_jsonl(out, rows)
    return len(rows)


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

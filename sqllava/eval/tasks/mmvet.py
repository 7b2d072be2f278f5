"""MM-Vet: open questions about integrated capabilities, graded by a judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.judged import mmvet_metrics
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    join,
    read_json,
    text_of,
    write_json,
    write_jsonl,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
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


def read_entries(path: Path) -> dict[str, Row]:
    """The benchmark's questions by id ("v1_0")."""
    return read_json(_file_in(path, ANNOTATIONS))


def entry_id(row: Row) -> str:
    """The id of the question that an answer is to: LLaVA's files leave out the prefix."""
    name = by_question_id(row)
    return name if name.startswith("v") else PREFIX + name


def judge(inputs: Inputs) -> list[Row]:
    """One item per question, from stored grades.

    Raises:
        ValueError: no grades were given, or not each question has as many.
    """
    if not inputs.options.get("grades"):
        raise ValueError(
            "mmvet is scored from a judge's grades: make them with `sqllava eval judge mmvet`, or "
            "pass stored ones with --grades"
        )
    entries = read_entries(inputs.annotations)
    grades = [
        {"id": name, **row} for name, row in read_json(Path(inputs.options["grades"])).items()
    ]
    found = join(grades, entries, lambda row: row["id"], inputs.allow_missing)
    counts = {len(grade["score"]) for grade in grades}
    if len(counts) > 1:
        raise ValueError(f"not all questions have as many grades: found {sorted(counts)}")
    answers = {entry_id(row): row for row in inputs.answers}
    # In the grades' order, as the official script adds them up.
    order = [grade["id"] for grade in grades if found[grade["id"]] is not None]
    return [
        {
            "question_id": name,
            "image": entries[name].get("imagename"),
            "prompt": entries[name]["question"],
            "prediction": text_of(answers.get(name)),
            "answer": entries[name]["answer"],
            "scores": (found[name] or {})["score"],
            "capability": entries[name]["capability"],
        }
        for name in order
    ]


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Percentages per capability and in total; failed grades are counted, in no mean."""
    return mmvet_metrics(items)


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the official evaluator's input: answers by id."""
    write_json(out, {entry_id(row): row["text"] for row in inputs.answers})


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava-mm-vet.jsonl from mm-vet.json."""
    rows = [
        {
            "image": entry["imagename"],
            "text": entry["question"],
            "category": "conv",
            "question_id": int(name.removeprefix(PREFIX)),
        }
        for name, entry in read_entries(source).items()
    ]
    write_jsonl(out, rows)
    return len(rows)


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
    options=(Option("--grades", "stored grades to score, ours or published", kind=str),),
)

"""ScienceQA: multiple choice with and without a picture; papers print the part with pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.conversation import IMAGE
from sqllava.eval.metrics.choices import FAILED, parse_scienceqa
from sqllava.eval.records import (
    Metrics,
    Question,
    Row,
    by_question_id,
    join,
    percent,
    read_json,
    write_json,
    write_text,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    OPTION_LETTER,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    option_lines,
    write_pretty,
)

SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
LOWER_GRADES = frozenset(f"grade{number}" for number in range(1, 7))
EMPTY = -1.0  # what the official script prints for a class without questions
SPLIT = Option("--split", "the split of pid_splits.json", "test", kind=str)


def read_questions(path: Path) -> list[Question]:
    """Reads llava_test_CQM-A.json, LLaVA's list of records."""
    return [_question(record) for record in read_json(path)]


def _question(record: Row) -> Question:
    text = record["conversations"][0]["value"].replace(IMAGE, "").strip() + OPTION_LETTER
    image = record.get("image")
    return Question(record["id"], text, image, f"{IMAGE}\n{text}" if image else text)


def judge(inputs: Inputs) -> list[Row]:
    """One item per problem of the split."""
    problems = read_json(inputs.annotations / "problems.json")
    split = read_json(inputs.annotations / "pid_splits.json")[inputs.options.get("split", "test")]
    answers = join(inputs.answers, map(str, split), by_question_id, inputs.allow_missing)
    return [_item(name, problems[name], row) for name, row in answers.items()]


def _item(name: str, problem: Row, row: Row | None) -> Row:
    text = FAILED if row is None else row["text"]
    prompt = "" if row is None else row.get("prompt", "")
    letter, index = parse_scienceqa(text, len(problem["choices"]))
    return {
        "question_id": name,
        "image": f"{name}/{problem['image']}" if problem["image"] else None,
        "prompt": prompt,
        "prediction": text,
        "parsed": letter,
        "index": index,
        "answer": problem["choices"][problem["answer"]],
        "answer_index": problem["answer"],
        "score": float(index == problem["answer"]),
        "marked": IMAGE in prompt,
        "hint": bool(problem.get("hint")),
        **{name: problem.get(name) for name in ("subject", "grade", "topic")},
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Percentages: all, those with a picture, and the official classes (-1: no questions)."""
    pictured = [item for item in items if item["image"]]
    classes = {
        **{
            name: [i for i in items if i["subject"] == subject]
            for name, subject in SUBJECTS.items()
        },
        "TXT": [item for item in items if item["hint"]],
        "IMG": pictured,
        "NO": [item for item in items if not item["hint"] and not item["image"]],
        "G1-6": [item for item in items if item["grade"] in LOWER_GRADES],
        "G7-12": [item for item in items if item["grade"] not in LOWER_GRADES],
    }
    topics = sorted({item["topic"] for item in items if item["topic"]})
    return {
        "accuracy": percent(items),
        "img_accuracy": percent(pictured),
        # LLaVA's scorer tells pictures by the mark in the recorded prompt.
        "img_accuracy_by_prompt": percent(item for item in items if item["marked"]),
        "by_subject": {name: percent(group) if group else EMPTY for name, group in classes.items()},
        "by_topic": {name: percent(i for i in items if i["topic"] == name) for name in topics},
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes LLaVA's result file, whose `results` the official evaluate_acc.py reads."""
    items = judge(inputs)
    right = sum(item["score"] for item in items)
    content = {
        "acc": 100 * right / len(items),
        "correct": int(right),
        "count": len(items),
        "results": {item["question_id"]: item["index"] for item in items},
        "outputs": {item["question_id"]: item["prediction"] for item in items},
    }
    write_text(out, write_pretty(content))


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava_test_CQM-A.json from the folder with problems.json and pid_splits.json."""
    problems = read_json(source / "problems.json")
    split = read_json(source / "pid_splits.json")[options.get("split", "test")]
    records = [_record(str(name), problems[str(name)]) for name in split]
    write_json(out, records)
    return len(records)


def _record(name: str, problem: Row) -> Row:
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    text = context + problem["question"] + option_lines(problem["choices"])
    record: Row = {"id": name}
    if problem.get("image"):
        record["image"] = f"{name}/{problem['image']}"
        text = f"{IMAGE}\n{text}"
    answer = "ABCDE"[problem["answer"]]
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {**record, "conversations": turns}


TASK = Task(
    name="scienceqa",
    title="ScienceQA",
    layout=Layout("scienceqa", "llava_test_CQM-A.json", "images/test", "."),
    files=(
        File("llava_test_CQM-A.json", EVAL_ZIP, "3 MB"),
        File("images/test/", "scienceqa.s3.amazonaws.com: test.zip", "170 MB"),
        File("problems.json", "github.com/lupantech/ScienceQA: data/scienceqa", "30 MB"),
        File("pid_splits.json", "the same", "0.3 MB"),
    ),
    prompt="[Context: {hint}\\n]{question}\\nA. {choice}..." + OPTION_LETTER,
    answers="prompt: the text, with <image> in front where there is a picture",
    metric="accuracy of the letter as LLaVA's scorer reads it; papers print those with a picture",
    headline=("img_accuracy",),
    image_preparation="crop",
    max_new_tokens=1024,
    read_questions=read_questions,
    judge=judge,
    summarize=summarize,
    submission="LLaVA's result file, which the official evaluate_acc.py reads",
    submit=submit,
    prepare=prepare,
    options=(SPLIT,),
    prepare_options=(SPLIT,),
)

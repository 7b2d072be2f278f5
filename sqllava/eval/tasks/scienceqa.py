"""ScienceQA: multiple choice with and without a picture; papers print the part with pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.conversation import IMAGE
from sqllava.eval.fields import Record
from sqllava.eval.metrics.choices import FAILED, parse_scienceqa
from sqllava.eval.records import (
    Metrics,
    Question,
    Row,
    by_question_id,
    join,
    percent,
    read_list,
    read_record,
    write_json,
    write_text,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    LETTERS,
    OPTION_LETTER,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    option_lines,
    picture_of,
    write_pretty,
)

SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
LOWER_GRADES = frozenset(f"grade{number}" for number in range(1, 7))
EMPTY = -1.0  # what the official script prints for a class without questions
SPLIT = Option("--split", "the split of pid_splits.json", "test", kind=str)


def read_questions(path: Path) -> list[Question]:
    """Reads llava_test_CQM-A.json, LLaVA's list of records."""
    records = read_list(path)
    if not records:
        raise ValueError(f"{path} holds no questions")
    return [_question(record) for record in records]


def _question(record: Record) -> Question:
    turns = record.records("conversations")
    if not turns:
        raise record.wrong("conversations", "a list with the question")
    text = turns[0].text("value").replace(IMAGE, "").strip() + OPTION_LETTER
    image, fault = picture_of(record)
    prompt = f"{IMAGE}\n{text}" if image else text
    return Question(record.id("id"), text, image, prompt, fault=fault)


def judge(inputs: Inputs) -> list[Row]:
    """One item per problem of the split."""
    problems = _problems(inputs.annotations, inputs.options)
    answers = join(inputs.answers, problems, by_question_id, inputs.allow_missing)
    return [_item(name, problems[name], row) for name, row in answers.items()]


def _problems(folder: Path, options: Mapping[str, Any]) -> dict[str, Record]:
    """The problems of the wanted split, by id, in its order.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: there is no such split, or it names a problem that is not there.
    """
    splits, name = read_record(folder / "pid_splits.json"), options.get("split") or "test"
    if name not in splits.row:
        raise ValueError(f"{splits.where} has no split {name!r}; there are {list(splits.row)}")
    problems, numbers = read_record(folder / "problems.json"), splits.texts(name)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{splits.where}: the split {name!r} names some problems twice")
    return {number: problems.record(number) for number in numbers}


def _answer(problem: Record) -> int:
    """The index of the right choice."""
    answer, choices = problem.integer("answer"), problem.texts("choices")
    if not 0 <= answer < min(len(choices), len(LETTERS)):
        raise problem.wrong("answer", f"the index of one of {len(choices)} choices")
    return answer


def _item(name: str, problem: Record, row: Row | None) -> Row:
    text = FAILED if row is None else row["text"]
    prompt = "" if row is None else row.get("prompt") or ""
    choices, answer = problem.texts("choices"), _answer(problem)
    letter, index = parse_scienceqa(text, len(choices))
    image = problem.optional_text("image")
    return {
        "question_id": name,
        "image": f"{name}/{image}" if image else None,
        "prompt": prompt,
        "prediction": text,
        "parsed": letter,
        "index": index,
        "answer": choices[answer],
        "answer_index": answer,
        "score": float(index == answer),
        "marked": IMAGE in prompt,
        "hint": bool(problem.optional_text("hint")),
        **{name: problem.optional_text(name) for name in ("subject", "grade", "topic")},
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
    if not items:
        raise ValueError(f"{inputs.annotations}: the split has no problems")
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
    problems = _problems(source, options)
    records = [_record(name, problem) for name, problem in problems.items()]
    write_json(out, records)
    return len(records)


def _record(name: str, problem: Record) -> Row:
    hint, image = problem.optional_text("hint"), problem.optional_text("image")
    context = f"Context: {hint}\n" if hint else ""
    text = context + problem.text("question") + option_lines(problem.texts("choices"))
    record: Row = {"id": name}
    if image:
        record["image"] = f"{name}/{image}"
        text = f"{IMAGE}\n{text}"
    answer = LETTERS[_answer(problem)]
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

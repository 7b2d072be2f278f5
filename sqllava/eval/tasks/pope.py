"""POPE: is there a ... in the picture? Three lists of questions, a yes/no answer each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.yesno import parse_pope, pope_metrics
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    join,
    read_jsonl,
    text_of,
    write_jsonl,
)
from sqllava.eval.tasks.task import (
    EVAL_ZIP,
    SHORT_ANSWER,
    File,
    Inputs,
    Layout,
    Task,
    read_llava_questions,
)

PREFIX = "coco_pope_"
# Where LLaVA's question file starts each list's ids.
FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}

Labels = dict[str, list[Row]]
Asked = dict[str, tuple[str, Row]]


def read_labels(folder: Path) -> Labels:
    """The rows of each coco_pope_*.json (JSON lines, despite the name), by list."""
    paths = sorted(folder.glob(f"{PREFIX}*.json")) or sorted(folder.glob(f"coco/{PREFIX}*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no {PREFIX}*.json")
    return {path.stem.removeprefix(PREFIX): read_jsonl(path) for path in paths}


def judge(inputs: Inputs) -> list[Row]:
    """One item per question; the labels are found by picture and question, or by id."""
    labels = read_labels(inputs.annotations)
    if inputs.questions is None:
        asked = _by_id(labels, inputs.answers)
    else:
        asked = _by_content(labels, inputs.questions)
    answers = join(inputs.answers, asked, by_question_id, inputs.allow_missing)
    return [_item(name, *asked[name], row) for name, row in answers.items()]


def _by_content(labels: Labels, questions: Path) -> Asked:
    """The label of each question, found by its list, picture and text.

    POPE's repository has changed its lists since; a list of another commit is refused.
    """
    asked: Asked = {}
    read_llava_questions(questions)  # checks the records
    rows = read_jsonl(questions)
    for split in sorted({str(row.get("category")) for row in rows} | set(labels)):
        ours = [row for row in rows if str(row.get("category")) == split]
        if split not in labels:
            raise ValueError(f"{questions}: category {split!r} has no {PREFIX}{split}.json")
        found: dict[tuple[str, str], Row] = {}
        for row in labels[split]:
            if found.setdefault(_content(row), row)["label"] != row["label"]:
                raise ValueError(f"{PREFIX}{split}.json labels {_content(row)} both yes and no")
        if Counter(map(_content, ours)) != Counter(map(_content, labels[split])):
            same = sum(_content(row) in found for row in ours)
            raise ValueError(
                f"{PREFIX}{split}.json does not belong to {questions}: {len(ours)} questions, "
                f"{len(labels[split])} labels, {same} in common. LLaVA's questions are those of "
                "POPE's commit e3e3926"
            )
        asked |= {by_question_id(row): (split, found[_content(row)]) for row in ours}
    return asked


def _content(row: Row) -> tuple[str, str]:
    return Path(row["image"]).name, _plain(row["text"])


def _plain(text: str) -> str:
    """A question without its suffix, and with the typing error of early versions put right."""
    return text.split("\n")[0].strip().replace("imange", "image")


def _by_id(labels: Labels, answers: Sequence[Row]) -> Asked:
    """Each question's label by its own id, or by LLaVA's numbering where the lists share ids."""
    times = Counter(by_question_id(row) for rows in labels.values() for row in rows)
    shared = any(count > 1 for count in times.values())
    unknown = sorted(set(labels) - set(FIRST_ID))
    if shared and unknown:
        raise ValueError(f"lists {unknown} share their ids with others: pass --questions")
    asked = {
        str(row["question_id"] + FIRST_ID[split] if shared else row["question_id"]): (split, row)
        for split, rows in labels.items()
        for row in rows
    }
    for answer in answers:
        split, row = asked.get(by_question_id(answer), (None, None))
        if row and answer.get("prompt") and _plain(answer["prompt"]) != _plain(row["text"]):
            raise ValueError(
                f"question {answer['question_id']} was {_plain(answer['prompt'])!r}, but "
                f"{PREFIX}{split}.json has {row['text']!r}: it is of another commit"
            )
    return asked


def _item(name: str, split: str, label: Row, row: Row | None) -> Row:
    answer = "no" if label["label"] == "no" else "yes"
    prediction = parse_pope(text_of(row))
    return {
        "question_id": name,
        "split": split,
        "image": label["image"],
        "prompt": label["text"],
        "said": text_of(row),
        "prediction": prediction,
        "answer": answer,
        "score": float(prediction == answer),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Fractions per list, and the mean F1."""
    return pope_metrics(items)


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava_pope_test.jsonl, with LLaVA's ids, from the folder of coco_pope_*.json."""
    labels = read_labels(source)
    rows = [
        {
            "question_id": FIRST_ID.get(split, 0) + row["question_id"],
            "image": row["image"],
            "text": row["text"] + SHORT_ANSWER,
            "category": split,
        }
        for split in sorted(labels, key=lambda split: FIRST_ID.get(split, 0))
        for row in labels[split]
    ]
    write_jsonl(out, rows)
    return len(rows)


TASK = Task(
    name="pope",
    title="POPE (COCO)",
    layout=Layout("pope", "llava_pope_test.jsonl", "val2014", "coco"),
    files=(
        File("llava_pope_test.jsonl", EVAL_ZIP, "2 MB"),
        File("val2014/", "images.cocodataset.org: zips/val2014.zip", "6 GB"),
        File("coco/", "github.com/AoiDragon/POPE at e3e3926: output/coco", "1 MB"),
    ),
    prompt="{question}" + SHORT_ANSWER,
    metric="F1, accuracy, precision, recall and yes ratio per list; papers print 100 x the mean F1",
    headline=("f1_mean",),
    scale=100,
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="image",
    prepare=prepare,
)

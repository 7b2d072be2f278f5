"""POPE: is there a ... in the picture? Three lists of questions, a yes/no answer each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.yesno import parse_pope, pope_metrics
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    join,
    read_lines,
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


@dataclass(frozen=True)
class Label:
    """A row of a list of POPE's.

    Attributes:
        answer: "yes" or "no".
    """

    question_id: int | str
    image: str
    text: str
    answer: str
    where: str

    @property
    def content(self) -> tuple[str, str]:
        return _content(self.image, self.text)


Labels = dict[str, list[Label]]
Asked = dict[str, tuple[str, Label]]


def read_labels(folder: Path) -> Labels:
    """The rows of each coco_pope_*.json (JSON lines, despite the name), by list.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a row is none of POPE's, or its label neither yes nor no.
    """
    paths = sorted(folder.glob(f"{PREFIX}*.json")) or sorted(folder.glob(f"coco/{PREFIX}*.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no {PREFIX}*.json")
    return {
        path.stem.removeprefix(PREFIX): [_label(record) for record in read_lines(path)]
        for path in paths
    }


def _label(record: Record) -> Label:
    """A row; other toolkits write "Yes", or call the label an answer."""
    name = "answer" if "label" not in record.row and "answer" in record.row else "label"
    answer = record.text(name).strip().lower()
    if answer not in ("yes", "no"):
        raise record.wrong(name, "yes or no")
    return Label(
        record.id("question_id"), record.text("image"), record.text("text"), answer, record.where
    )


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
    rows = read_lines(questions)
    for split in sorted({str(row.row.get("category")) for row in rows} | set(labels)):
        ours = {
            str(row.id("question_id")): _content(row.text("image"), row.text("text"))
            for row in rows
            if str(row.row.get("category")) == split
        }
        if split not in labels:
            raise ValueError(f"{questions}: category {split!r} has no list ({PREFIX}*.json)")
        found: dict[tuple[str, str], Label] = {}
        for label in labels[split]:
            if found.setdefault(label.content, label).answer != label.answer:
                raise ValueError(f"{label.where}: {label.content} is labelled both yes and no")
        if Counter(ours.values()) != Counter(label.content for label in labels[split]):
            same = sum(content in found for content in ours.values())
            raise ValueError(
                f"{PREFIX}{split}.json does not belong to {questions}: {len(ours)} questions, "
                f"{len(labels[split])} labels, {same} in common. LLaVA's questions are those of "
                "POPE's commit e3e3926"
            )
        asked |= {name: (split, found[content]) for name, content in ours.items()}
    return asked


def _content(image: str, text: str) -> tuple[str, str]:
    return Path(image).name, _plain(text)


def _plain(text: str) -> str:
    """A question without its suffix, and with the typing error of early versions put right."""
    return text.split("\n")[0].strip().replace("imange", "image")


def _by_id(labels: Labels, answers: Sequence[Row]) -> Asked:
    """Each question's label by its own id, or by LLaVA's numbering where the lists share ids."""
    times = Counter(str(label.question_id) for found in labels.values() for label in found)
    shared = any(count > 1 for count in times.values())
    unknown = sorted(set(labels) - set(FIRST_ID))
    if shared and unknown:
        raise ValueError(f"lists {unknown} share their ids with others: pass --questions")
    asked: Asked = {}
    for split, found in labels.items():
        for label in found:
            name = str(_llava_id(split, label) if shared else label.question_id)
            if name in asked:
                raise ValueError(f"{label.where}: question_id {label.question_id!r} is there twice")
            asked[name] = (split, label)
    for answer in answers:
        asking = asked.get(by_question_id(answer))
        said = _plain(answer.get("prompt") or "")
        if asking and said and said != _plain(asking[1].text):
            raise ValueError(
                f"question {answer['question_id']} was {said!r}, but {asking[1].where} has "
                f"{asking[1].text!r}: it is of another commit"
            )
    return asked


def _llava_id(split: str, label: Label) -> int:
    """A question's id in LLaVA's file, which counts on from a number for each list."""
    number = Record({"question_id": label.question_id}, label.where).integer("question_id")
    return FIRST_ID.get(split, 0) + number


def _item(name: str, split: str, label: Label, row: Row | None) -> Row:
    prediction = parse_pope(text_of(row))
    return {
        "question_id": name,
        "split": split,
        "image": label.image,
        "prompt": label.text,
        "said": text_of(row),
        "prediction": prediction,
        "answer": label.answer,
        "score": float(prediction == label.answer),
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Fractions per list, and the mean F1."""
    return pope_metrics(items)


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava_pope_test.jsonl, with LLaVA's ids, from the folder of coco_pope_*.json."""
    labels = read_labels(source)
    rows = [
        {
            "question_id": _llava_id(split, label),
            "image": label.image,
            "text": label.text + SHORT_ANSWER,
            "category": split,
        }
        for split in sorted(labels, key=lambda split: FIRST_ID.get(split, 0))
        for label in labels[split]
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

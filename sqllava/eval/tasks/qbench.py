"""Q-Bench (A1, perception of low-level quality), in English and in Chinese."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.fields import Record
from sqllava.eval.metrics.choices import qbench_right, qbench_right_strictly
from sqllava.eval.records import (
    Metrics,
    Question,
    Row,
    by_question_id,
    check_answered,
    grouped,
    join,
    mean,
    read_list,
    write_jsonl,
)
from sqllava.eval.tasks.task import LETTERS, File, Inputs, Layout, Task

CHOOSE = "\nChoose between one of the options as follows:\n"
# The published runner has a backslash in place of the line break, by mistake.
CHOOSE_ZH = "\n在下列选项中选择一个:\n"
TYPES = {0: "yes-or-no", 1: "what", 2: "how"}
CONCERNS = {0: "distortion", 1: "other", 2: "in-context distortion", 3: "in-context other"}


def _read(path: Path, choose: str) -> list[Question]:
    return [
        Question(
            number,
            record.text("question") + choose + _options(record.texts("candidates")),
            record.text("img_path"),
        )
        for number, record in enumerate(_records(path))
    ]


def _records(path: Path) -> list[Record]:
    records = read_list(path)
    if not records:
        raise ValueError(f"{path} holds no questions")
    return records


def _options(candidates: Sequence[str]) -> str:
    return "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, candidates, strict=False))


def read_questions(path: Path) -> list[Question]:
    """Reads llvisionqa_{dev,test}.json; the ids are the records' numbers."""
    return _read(path, CHOOSE)


def read_questions_zh(path: Path) -> list[Question]:
    """Reads the Chinese files."""
    return _read(path, CHOOSE_ZH)


def _joined(inputs: Inputs) -> list[tuple[int, Record, str]]:
    """(number, record, response) for each record; takes our answers and the published form."""
    records = _records(inputs.annotations)
    places = {
        (record.text("img_path"), record.text("question")): number
        for number, record in enumerate(records)
    }

    def number_of(row: Row) -> str:
        if "question_id" in row:
            return by_question_id(row)
        answer = Record(row, f"the answer about {row['img_path']!r}")
        place = answer.text("img_path"), answer.text("question")
        return str(places.get(place, place[0]))

    names = [str(number) for number in range(len(records))]
    answers = join(inputs.answers, names, number_of, inputs.allow_missing)
    return [(int(name), records[int(name)], _response(row)) for name, row in answers.items()]


def _response(row: Row | None) -> str:
    return "" if row is None else str(row.get("text", row.get("response", "")))


def judge(inputs: Inputs) -> list[Row]:
    """One item per record."""
    joined = _joined(inputs)
    check_answered(inputs.annotations, [record for _, record, _ in joined], "correct_ans")
    return [_item(*one) for one in joined]


def _item(number: int, record: Record, response: str) -> Row:
    candidates, answer = record.texts("candidates"), record.text("correct_ans")
    if answer not in candidates:
        raise record.wrong("correct_ans", f"one of {candidates}")
    return {
        "question_id": number,
        "image": record.text("img_path"),
        "prompt": record.text("question") + "\n" + _options(candidates),
        "prediction": response,
        "answer": answer,
        "score": float(qbench_right(response, candidates, answer)),
        "strict": float(qbench_right_strictly(response, candidates, answer)),
        "type": TYPES.get(record.integer("type")) if "type" in record.row else None,
        "concern": CONCERNS.get(record.integer("concern")) if "concern" in record.row else None,
    }


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Fractions: the official accuracy, a strict one, and the leaderboard's columns."""
    return {
        "accuracy": mean(item["score"] for item in items),
        "strict_accuracy": mean(item["strict"] for item in items),
        **{
            f"by_{name}": {
                value: mean(item["score"] for item in group)
                for value, group in grouped(items, name)
            }
            for name in ("type", "concern")
        },
    }


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the records with their responses, a line each."""
    write_jsonl(out, [{**record.row, "response": said} for _, record, said in _joined(inputs)])


def _task(name: str, title: str, files: tuple[File, ...], prompt: str, **functions: Any) -> Task:
    return Task(
        name=name,
        title=title,
        layout=Layout("qbench", files[0].path, "images_llvisionqa", files[0].path),
        files=files,
        prompt=prompt,
        answers="prompt: the text; question_id: the record's number",
        metric="share of right options, by the first letter, the first word or the whole response",
        headline=("accuracy",),
        scale=100,
        template="llava_v1",
        image_preparation="crop",
        max_new_tokens=1024,
        judge=judge,
        summarize=summarize,
        submission="JSON lines: each record with its response (by e-mail to the authors)",
        submission_suffix=".jsonl",
        submit=submit,
        **functions,
    )


_IMAGES = File("images_llvisionqa/", "github.com/VQAssessment/Q-Bench: a hub dataset", "1.5 GB")

TASK = _task(
    "qbench",
    "Q-Bench (dev)",
    (File("llvisionqa_dev.json", "github.com/VQAssessment/Q-Bench", "0.5 MB"), _IMAGES),
    "{question}" + CHOOSE + "A. {candidate}\\n...",
    read_questions=read_questions,
)
TASK_ZH = _task(
    "qbench_zh",
    "Q-Bench, Chinese (dev)",
    (File("质衡-问答-验证集.json", "github.com/VQAssessment/Q-Bench", "0.5 MB"), _IMAGES),
    "{question}" + CHOOSE_ZH + "A. {candidate}\\n...",
    read_questions=read_questions_zh,
)

"""MME: fourteen subtasks, two yes/no questions a picture."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.yesno import COGNITION, PERCEPTION, mme_metrics, parse_mme
from sqllava.eval.records import (
    Metrics,
    Row,
    by_question_id,
    join,
    open_text,
    prompt_of,
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
    Task,
    read_llava_questions,
)

SUBTASKS = PERCEPTION + COGNITION
RELEASE = "MME_Benchmark_release_version"
YES_OR_NO = "Please answer yes or no."
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")

Key = tuple[str, str, str]  # subtask, picture without its ending, question


def read_truth(folder: Path) -> dict[Key, Row]:
    """Right answers by subtask, picture and question.

    Args:
        folder: the release, with a folder for each subtask, or one with a <subtask>.txt each.
    """
    truth: dict[Key, Row] = {}
    for subtask in SUBTASKS:
        for picture, question, answer in _lines(folder, subtask):
            key = (subtask, Path(picture).stem, plain_question(question))
            if key in truth:
                raise ValueError(f"{folder}: {subtask} asks {picture} twice: {question!r}")
            if answer.lower() not in ("yes", "no"):
                raise ValueError(f"{folder}: {subtask}, {picture}: {answer!r} is not Yes or No")
            truth[key] = {"image": picture, "question": question, "answer": answer.lower()}
    if not truth:
        raise FileNotFoundError(f"{folder} holds neither <subtask>/ nor <subtask>.txt of MME")
    for (subtask, picture), times in Counter(key[:2] for key in truth).items():
        if times != 2:
            raise ValueError(f"{folder}: {subtask} asks {picture} {times} times, not twice")
    return truth


def _lines(folder: Path, subtask: str) -> Iterator[tuple[str, str, str]]:
    """(picture, question, right answer) of a subtask in either form; nothing if it is not there."""
    listed = folder / f"{subtask}.txt"
    if listed.is_file():
        for number, line in _text_lines(listed):
            picture, question, answer = _columns(listed, number, line, 3)
            yield f"{subtask}/{Path(picture).name}", question, answer
        return
    inside = folder / subtask
    separate = inside / "questions_answers_YN"
    for path in sorted((separate if separate.is_dir() else inside).glob("*.txt")):
        picture = _picture(inside, path.stem)
        for number, line in _text_lines(path):
            question, answer = _columns(path, number, line, 2)
            yield picture, question, answer


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _columns(path: Path, number: int, line: str, count: int) -> Any:
    columns = line.split("\t")
    if len(columns) < count:
        raise ValueError(f"{path}, line {number}: expected {count} columns, found {line!r}")
    return tuple(column.strip() for column in columns[:count])


def _picture(folder: Path, stem: str) -> str:
    """A picture's path as LLaVA's question file has it; folders without pictures are fine."""
    for place in (folder / "images", folder):
        for suffix in IMAGE_SUFFIXES:
            if (place / (stem + suffix)).is_file():
                return str((place / (stem + suffix)).relative_to(folder.parent))
    return f"{folder.name}/{stem}.jpg"


def plain_question(text: str) -> str:
    """A question without what it says of the form of the answer."""
    for said in (SHORT_ANSWER.strip(), YES_OR_NO):
        text = text.replace(said, "")
    return " ".join(text.split())


def judge(inputs: Inputs) -> list[Row]:
    """One item per question, joined by subtask, picture and question."""
    truth = read_truth(inputs.annotations)
    answers = join(inputs.answers, truth, _key, inputs.allow_missing)
    items = []
    for key, row in answers.items():
        subtask, picture, _ = key
        gold = truth[key]
        prediction = parse_mme(text_of(row).translate(_SPACES))
        items.append(
            {
                "question_id": f"{subtask}/{picture}",
                "subtask": subtask,
                "image": gold["image"],
                "pair": f"{subtask}/{picture}",
                "prompt": gold["question"],
                "said": text_of(row),
                "prediction": prediction,
                "answer": gold["answer"],
                "score": float(prediction == gold["answer"]),
            }
        )
    return items


# The tool's files have a line an answer, in columns.
_SPACES = str.maketrans("\t\n\r", "   ")


def _key(row: Row) -> Key:
    path = Path(by_question_id(row))
    return path.parts[0] if path.parts else "", path.stem, plain_question(prompt_of(row))


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Subtasks' scores and their sums; subtasks that are not there add nothing."""
    return mme_metrics(items)


def submit(inputs: Inputs, out: Path) -> None:
    """Writes the folder that the official tool reads: <subtask>.txt with four columns."""
    truth = read_truth(inputs.annotations)
    answers = join(inputs.answers, truth, _key, inputs.allow_missing)
    lines: dict[str, str] = {}
    for key, row in answers.items():
        columns = [
            f"{key[1]}.txt",
            truth[key]["question"],
            truth[key]["answer"].capitalize(),
            text_of(row).translate(_SPACES),
        ]
        lines[key[0]] = lines.get(key[0], "") + "\t".join(columns) + "\n"
    for subtask, text in lines.items():
        write_text(out / f"{subtask}.txt", text)


def prepare(source: Path, out: Path, options: Mapping[str, Any]) -> int:
    """Makes llava_mme.jsonl from the release folder."""
    rows = [
        {
            "question_id": gold["image"],
            "image": gold["image"],
            "text": question + SHORT_ANSWER,
            "category": subtask,
        }
        for (subtask, _, question), gold in read_truth(source).items()
    ]
    write_jsonl(out, rows)
    return len(rows)


TASK = Task(
    name="mme",
    title="MME",
    layout=Layout("MME", "llava_mme.jsonl", RELEASE, RELEASE),
    files=(
        File("llava_mme.jsonl", EVAL_ZIP, "0.5 MB"),
        File("MME_Benchmark_release_version/", "the MME authors, on request", "900 MB"),
    ),
    prompt="{question}" + SHORT_ANSWER,
    metric="100 acc + 100 acc+ per subtask; papers print the sum of the ten perception subtasks",
    headline=("perception",),
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="pair",
    submission="folder of <subtask>.txt: picture, question, right answer, answer (tabs)",
    submission_suffix="",
    submit=submit,
    prepare=prepare,
)

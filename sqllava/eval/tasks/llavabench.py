"""LLaVA-Bench-in-the-Wild: open questions, compared by a judge with reference answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.judged import llavabench_metrics, review_item
from sqllava.eval.records import Metrics, Row, join, read_jsonl, text_of
from sqllava.eval.tasks.task import File, Inputs, Layout, Option, Task, read_llava_questions

HUB = "liuhaotian/llava-bench-in-the-wild on the hub"


def judge(inputs: Inputs) -> list[Row]:
    """One item per question, from stored reviews.

    Raises:
        ValueError: no reviews were given.
    """
    if not inputs.options.get("reviews"):
        raise ValueError(
            "llavabench is scored from a judge's reviews: make them with `sqllava eval judge "
            "llavabench`, or pass published ones with --reviews"
        )
    reviews = read_jsonl(Path(inputs.options["reviews"]))
    asked = _questions(inputs.annotations) or {str(row["question_id"]): {} for row in reviews}
    found = join(reviews, asked, lambda row: str(row["question_id"]), inputs.allow_missing)
    answers = {str(row["question_id"]): row for row in inputs.answers}
    items = []
    for name, review in found.items():
        if review is None:
            continue
        question = asked[name]
        items.append(
            {
                **review_item(review),
                "image": question.get("image"),
                "prompt": question.get("text"),
                "prediction": text_of(answers.get(name)),
            }
        )
    return items


def _questions(folder: Path) -> dict[str, Row]:
    path = folder / "questions.jsonl"
    return {str(row["question_id"]): row for row in read_jsonl(path)} if path.is_file() else {}


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Relative scores per category and over all; failed reviews are counted, in no mean."""
    return llavabench_metrics(items)


TASK = Task(
    name="llavabench",
    title="LLaVA-Bench-in-the-Wild",
    layout=Layout("llava-bench-in-the-wild", "questions.jsonl", "images", "."),
    files=(
        File("questions.jsonl", HUB, "8 kB"),
        File("context.jsonl", HUB, "10 kB"),
        File("answers_gpt4.jsonl", HUB, "60 kB"),
        File("images/", HUB, "20 MB"),
        File("rule.json", "github.com/haotian-liu/LLaVA: llava/eval/table", "12 kB"),
    ),
    prompt="{question}",
    metric="the judge's mean score for ours over that for the reference, in percent",
    headline=("all", "ratio"),
    image_preparation="crop",
    max_new_tokens=1024,
    read_questions=read_llava_questions,
    judge=judge,
    summarize=summarize,
    unit="image",
    options=(Option("--reviews", "stored reviews to score, ours or published", kind=str),),
)

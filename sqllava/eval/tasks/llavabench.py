"""LLaVA-Bench-in-the-Wild: open questions, compared by a judge with reference answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqllava.eval.metrics.judged import READINGS, llavabench_metrics, review_scores
from sqllava.eval.records import Metrics, Row, join, read_jsonl, text_of
from sqllava.eval.tasks.task import (
    LEFT_OUT,
    READING,
    File,
    Inputs,
    Layout,
    Option,
    Task,
    read_llava_questions,
)

HUB = "liuhaotian/llava-bench-in-the-wild on the hub"


def judge(inputs: Inputs) -> list[Row]:
    """One item per question, from stored reviews; without scores where there is no review.

    Raises:
        ValueError: no reviews were given, one is not of the published form, or none holds scores.
    """
    if not inputs.options.get("reviews"):
        raise ValueError(
            "llavabench is scored from a judge's reviews: make them with `sqllava eval judge "
            "llavabench`, or pass published ones with --reviews"
        )
    path, reading = Path(inputs.options["reviews"]), inputs.options.get("reading") or READINGS[0]
    reviews = read_reviews(path)
    scores = {str(row["question_id"]): review_scores(row, reading) for row in reviews}
    asked = _questions(inputs.annotations) or {str(row["question_id"]): {} for row in reviews}
    found = join(
        reviews, asked, lambda row: str(row["question_id"]), inputs.allow_missing, LEFT_OUT
    )
    if not any(scores.values()):
        raise ValueError(f"{path}: none of {len(reviews)} reviews holds two scores of 0 to 10")
    answers = {str(row["question_id"]): row for row in inputs.answers}
    return [
        _item(name, asked[name], review, scores.get(name), answers.get(name))
        for name, review in found.items()
    ]


def read_reviews(path: Path) -> list[Row]:
    """Stored reviews, published or ours.

    Raises:
        ValueError: one is not of the published form; the message says which.
    """
    reviews = read_jsonl(path)
    for number, review in enumerate(reviews, 1):
        try:
            if review.get("question_id") is None or not isinstance(review.get("category"), str):
                raise ValueError(f"a review needs question_id and category, found {list(review)}")
            review_scores(review)
        except ValueError as error:
            raise ValueError(f"{path}, record {number}: {error}") from None
    return reviews


def _item(
    name: str, question: Row, review: Row | None, scores: list[float] | None, answer: Row | None
) -> Row:
    category = question.get("category") if review is None else review["category"]
    reference, candidate = scores or (None, None)
    official = None if review is None else review_scores(review, "official")
    return {
        "question_id": name if review is None else review["question_id"],
        "category": str(category).removeprefix("llava_bench_"),
        "reference": reference,
        "candidate": candidate,
        "review": None if review is None else review.get("content"),
        "missing": review is None,
        "tolerated": scores is not None and official is None,
        "image": question.get("image"),
        "prompt": question.get("text"),
        "prediction": text_of(answer),
    }


def _questions(folder: Path) -> dict[str, Row]:
    path = folder / "questions.jsonl"
    return {str(row["question_id"]): row for row in read_jsonl(path)} if path.is_file() else {}


def summarize(items: Sequence[Row], options: Mapping[str, Any]) -> Metrics:
    """Relative scores per category and over all; what has no scores is counted, in no mean."""
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
    options=(Option("--reviews", "stored reviews to score, ours or published", kind=str), READING),
)

"""Judged benchmarks: how a judge's replies become LLaVA-Bench's and MM-Vet's figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sqllava.eval.records import Metrics, Row, grouped

FAILED_REVIEW = [-1.0, -1.0]


def parse_review(reply: str) -> list[float]:
    """The two scores in the first line of a LLaVA-Bench review; [-1, -1] if they are not there."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return list(FAILED_REVIEW)
    return [first, second]


def llavabench_metrics(items: Sequence[Row]) -> Metrics:
    """Relative scores per category and over all, rounded where the official tool rounds.

    Args:
        items: with `category`, `reference` and `candidate` (scores of 1 to 10); the two are None
            where the judge failed: such items count in `failed` and in no mean.
    """
    judged = [item for item in items if item["candidate"] is not None]
    figures = {"all": _relative(judged)} if judged else {}
    figures |= {name: _relative(group) for name, group in grouped(judged, "category")}
    return {**figures, "failed": len(items) - len(judged)}


def _relative(items: Sequence[Row]) -> Metrics:
    means = np.asarray([(item["reference"], item["candidate"]) for item in items]).mean(0).tolist()
    reference, candidate = (round(value, 3) for value in means)
    return {
        "ratio": round(candidate / reference * 100, 1) if reference else 0.0,
        "reference": round(reference * 10, 1),
        "candidate": round(candidate * 10, 1),
        "count": len(items),
    }


def parse_grade(reply: str) -> float | None:
    """The score of 0 to 1 that an MM-Vet reply begins with; None if there is none."""
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def mmvet_metrics(items: Sequence[Row]) -> Metrics:
    """MM-Vet's figures in percent with one decimal, as the official tool rounds them.

    Args:
        items: with `scores`, one of 0 to 1 per run (None where the judge failed: in no mean), and
            `capability`, a list of names.
    """
    runs = max((len(item["scores"]) for item in items), default=0)
    totals = _per_run(items, runs)
    named = sorted({name for item in items for name in item["capability"]})
    sets = sorted({tuple(sorted(set(item["capability"]))) for item in items})
    return {
        "total": _rounded(totals.mean()),
        "std": _rounded(totals.std()),
        "runs": [float(value) for value in np.round(totals, 1)],
        "by_capability": {
            name: _rounded(_per_run([i for i in items if name in i["capability"]], runs).mean())
            for name in named
        },
        "by_capability_set": {
            "_".join(names): _rounded(
                _per_run([i for i in items if set(i["capability"]) == set(names)], runs).mean()
            )
            for names in sets
        },
        "failed": sum(score is None for item in items for score in item["scores"]),
    }


def _per_run(items: Sequence[Row], runs: int) -> np.ndarray:
    """The mean of each run, in percent: [runs]."""
    means = []
    for run in range(runs):
        scores = [item["scores"][run] for item in items if item["scores"][run] is not None]
        means.append(sum(scores) / len(scores) * 100 if scores else 0.0)
    return np.array(means) if means else np.zeros(1)


def _rounded(value: Any) -> float:
    return float(round(value, 1))


def review_item(review: Mapping[str, Any]) -> Row:
    """The item behind a stored LLaVA-Bench review, published or ours."""
    scores = review.get("tuple") or parse_review(review["content"])
    failed = list(scores) == FAILED_REVIEW
    return {
        "question_id": review["question_id"],
        "category": review["category"].removeprefix("llava_bench_"),
        "reference": None if failed else float(scores[0]),
        "candidate": None if failed else float(scores[1]),
        "review": review["content"],
    }

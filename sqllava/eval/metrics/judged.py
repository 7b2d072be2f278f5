"""Judged benchmarks: how a judge's replies become LLaVA-Bench's and MM-Vet's figures.

A reply is read twice: as the official parser reads it, which published figures rest on, and
tolerantly, which also takes the forms in which later judges put the same scores.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sqllava.eval.records import Metrics, Row, grouped

FAILED_REVIEW = [-1.0, -1.0]
HIGHEST_SCORE = 10.0
READINGS = ("tolerant", "official")
# Of what was scored: these are counts, not figures.
COUNTED = ("failed", "unreadable", "tolerated")

_THOUGHT = re.compile(r"^.*</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE)
_UNFINISHED_THOUGHT = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_MARKS = re.compile(r"[*_`#>]")
_LABEL = r"(?:[^\d:：]{0,60}[:：]\s*)?"
_OPEN, _CLOSE = r"[(\[\s]*", r"[)\]\s]*"
_SCORE = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?\.?"
_TWO_SCORES = re.compile(
    rf"{_LABEL}{_OPEN}{_SCORE}{_CLOSE}(?:[,;|&\s]|\band\b)\s*{_OPEN}{_SCORE}{_CLOSE}"
)
_NAMED_SCORES = re.compile(
    rf"[A-Za-z ]*1\b[^\d:\n]{{0,20}}:\s*{_SCORE}[\s,;|]+(?:and\s+)?[A-Za-z ]*2\b[^\d:\n]{{0,20}}:"
    rf"\s*{_SCORE}"
)
_GRADE = re.compile(rf"{_LABEL}(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)\.?")


# --- replies --------------------------------------------------------------------------------------


def parse_review(reply: str) -> list[float]:
    """The two scores in the first line of a LLaVA-Bench review, by the official parser's rule.

    [-1, -1] if they are not there.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return list(FAILED_REVIEW)
    return [first, second] if math.isfinite(first + second) else list(FAILED_REVIEW)


def read_review(reply: str) -> list[float]:
    """The two scores of 0 to 10 that a LLaVA-Bench review gives; [-1, -1] if it is unclear.

    What the official parser takes, and the first line with a number in it if that holds two scores
    and nothing else: "8, 9", "**8** **9**", "8/10 9/10", "Scores: 8 9", "Assistant 1: 8, Assistant
    2: 9" (also on two lines). Thoughts (<think>...</think>), code fences and Markdown's marks do
    not count. A score beyond 10 is none.
    """
    official = parse_review(reply)
    if official != FAILED_REVIEW:
        return official if _are_scores(official) else list(FAILED_REVIEW)
    lines = _lines(reply)
    numbered = [at for at, text in enumerate(lines) if re.search(r"\d", text)]
    if not numbered:
        return list(FAILED_REVIEW)
    line = lines[numbered[0]]
    two_lines = "\n".join(lines[numbered[0] : numbered[0] + 2])
    found = (
        _TWO_SCORES.fullmatch(line)
        or _NAMED_SCORES.fullmatch(line)
        or _NAMED_SCORES.fullmatch(two_lines)
    )
    scores = [float(score) for score in found.groups()] if found else FAILED_REVIEW
    return list(scores) if _are_scores(scores) else list(FAILED_REVIEW)


def parse_grade(reply: str) -> float | None:
    """The score of 0 to 1 that an MM-Vet reply begins with, by the official parser's rule.

    None if there is none.
    """
    try:
        score = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return score if 0.0 <= score <= 1.0 else None


def read_grade(reply: str) -> float | None:
    """The score of 0 to 1 that an MM-Vet reply gives; None if it is unclear.

    What the official parser takes, and a first line that holds one score and nothing else:
    "**0.5**", "Correctness: 0.5", "0.5.", also after thoughts. A percentage or fraction is none.
    """
    official = parse_grade(reply)
    if official is not None:
        return official
    lines = _lines(reply)
    found = _GRADE.fullmatch(lines[0]) if lines else None
    return float(found.group(1)) if found else None


def _lines(reply: str) -> list[str]:
    """A reply's lines without thoughts, Markdown's marks and what is empty."""
    said = _THOUGHT.sub("", reply)
    if _UNFINISHED_THOUGHT.search(said):
        return []
    kept = (text for text in said.splitlines() if not text.startswith("```"))
    lines = (" ".join(_MARKS.sub("", text).split()) for text in kept)
    return [text for text in lines if text]


def _are_scores(values: Sequence[float]) -> bool:
    return len(values) == 2 and all(0.0 <= value <= HIGHEST_SCORE for value in values)


# --- LLaVA-Bench ----------------------------------------------------------------------------------


def review_scores(review: Mapping[str, Any], reading: str = "tolerant") -> list[float] | None:
    """The scores of a stored LLaVA-Bench review, published or ours; None if it holds none.

    Args:
        reading: one of READINGS. A stored `tuple` is what made the review read; where it is none,
            the tolerant reading looks at the content again.

    Raises:
        ValueError: the review is not of the published form.
    """
    stored, content = review.get("tuple"), review.get("content")
    for name in ("tuple", "official_tuple"):
        if review.get(name) is not None and not _is_pair(review[name]):
            raise ValueError(f"a review's {name} is two numbers, found {review[name]!r}")
    if stored is None and not isinstance(content, str):
        raise ValueError(f"a review needs a tuple or a content, found {list(review)}")
    if reading == "official":
        verdict = review.get("official_tuple") or stored
        scores = parse_review(str(content)) if verdict is None else verdict
    else:
        scores = stored if stored is not None and _are_scores(stored) else FAILED_REVIEW
        if scores == FAILED_REVIEW and isinstance(content, str):
            scores = read_review(content)
    return [float(score) for score in scores] if _are_scores(scores) else None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, int | float) and not isinstance(part, bool) for part in value)
    )


def llavabench_metrics(items: Sequence[Row]) -> Metrics:
    """Relative scores per category and over all, rounded where the official tool rounds.

    Args:
        items: with `category`, `reference` and `candidate` (scores of 0 to 10); the two are None
            where there is no review (`missing`) or the judge failed: such items are in no mean, and
            count in `failed` if they are not missing.
    """
    judged = [item for item in items if item["candidate"] is not None]
    figures = {"all": _relative(judged)} if judged else {}
    figures |= {name: _relative(group) for name, group in grouped(judged, "category")}
    asked = [item for item in items if not item.get("missing")]
    return {
        **figures,
        "failed": len(asked) - len(judged),
        "tolerated": sum(bool(item.get("tolerated")) for item in judged),
    }


def _relative(items: Sequence[Row]) -> Metrics:
    means = np.asarray([(item["reference"], item["candidate"]) for item in items]).mean(0).tolist()
    reference, candidate = (round(value, 3) for value in means)
    return {
        "ratio": round(candidate / reference * 100, 1) if reference else None,
        "reference": round(reference * 10, 1),
        "candidate": round(candidate * 10, 1),
        "count": len(items),
    }


# --- MM-Vet ---------------------------------------------------------------------------------------


def mmvet_metrics(items: Sequence[Row]) -> Metrics:
    """MM-Vet's figures in percent with one decimal, as the official tool rounds them.

    A figure of which there is no grade is None.

    Args:
        items: with `scores`, one of 0 to 1 per run (None where there is no grade: in no mean),
            `capability`, a list of names, and, where known, `unreadable` and `tolerated`: of which
            runs' replies that is true.
    """
    runs = max((len(item["scores"]) for item in items), default=0)
    totals = _per_run(items, runs)
    named = sorted({name for item in items for name in item["capability"]})
    sets = sorted({tuple(sorted(set(item["capability"]))) for item in items})
    asked = [item for item in items if not item.get("missing")]
    return {
        "total": _mean(totals),
        "std": _rounded(np.std(_known(totals))) if _known(totals) else None,
        "runs": [None if total is None else _rounded(total) for total in totals],
        "by_capability": {
            name: _mean(_per_run([i for i in items if name in i["capability"]], runs))
            for name in named
        },
        "by_capability_set": {
            "_".join(names): _mean(
                _per_run([i for i in items if set(i["capability"]) == set(names)], runs)
            )
            for names in sets
        },
        "failed": sum(score is None for item in asked for score in item["scores"]),
        "unreadable": sum(sum(item.get("unreadable", ())) for item in asked),
        "tolerated": sum(sum(item.get("tolerated", ())) for item in asked),
    }


def _per_run(items: Sequence[Row], runs: int) -> list[float | None]:
    """The mean of each run, in percent; None for a run without a grade."""
    means: list[float | None] = []
    for run in range(runs):
        scores = [item["scores"][run] for item in items if item["scores"][run] is not None]
        means.append(sum(scores) / len(scores) * 100 if scores else None)
    return means


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return _rounded(np.mean(known)) if known else None


def _rounded(value: Any) -> float:
    return float(round(value, 1))

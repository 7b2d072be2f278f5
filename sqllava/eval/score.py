"""Answers and annotations -> one JSON object of metrics, with intervals and comparisons."""

import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sqllava.eval.metrics.judged import COUNTED
from sqllava.eval.records import (
    Metrics,
    MissingAnswersError,
    NoAnswersError,
    Row,
    failures,
    mean,
    nulls,
    read_answers,
    read_record,
)
from sqllava.eval.tables import TABLES, answers_of_table
from sqllava.eval.tasks.task import Inputs, Task

logger = logging.getLogger(__name__)

PERCENTILES = (2.5, 97.5)
JUDGED = ("reviews", "grades")
LEFT_OUT = {
    "missing": "have no answer, review or grade",
    "failed": "were not judged: no reply, or none that could be read",
}


@dataclass
class Score:
    """A task's result, as it is printed.

    Attributes:
        metrics: raw numbers under the official scorer's names.
        counts: what was scored, and what could not be.
        settings: what the metrics depend on.
        items: the scored things one by one; not printed.
    """

    task: str
    metrics: Metrics
    counts: Row
    settings: Row
    items: list[Row] = field(default_factory=list)

    def as_json(self) -> Row:
        values = asdict(self)
        del values["items"]
        return values


def read_answers_file(path: Path) -> list[Row]:
    """Reads answers from JSON lines or from a submitted sheet."""
    return answers_of_table(path) if path.suffix in TABLES else read_answers(path)


def header_of(answers: Path | None) -> Row:
    """What the run that made the answers recorded; nothing for answers from elsewhere."""
    path = answers and answers.with_name(f"{answers.stem}.header.json")
    return read_record(path).row if path and path.is_file() else {}


def headline(task: Task, metrics: Row) -> float | None:
    """The figure that papers print, in their unit; None where it is not there."""
    value: Any = metrics
    for key in task.headline:
        value = value.get(key) if isinstance(value, dict) else None
    return value * task.scale if _is_number(value) else None


def score(
    task: Task,
    answers: Path | None,
    annotations: Path,
    questions: Path | None = None,
    options: Mapping[str, Any] | None = None,
    allow_missing: bool = False,
    resamples: int = 0,
    submission: Path | None = None,
) -> Score:
    """Scores a task.

    Args:
        answers: may be None where stored reviews or grades are scored.
        annotations: as the task says.
        questions: the question file, where the join needs it; gives the items their pictures.
        options: by the name of the task's options.
        resamples: of the bootstrap; 0 gives no intervals.
        submission: where to write what the server wants, for a split without public answers.

    Raises:
        ValueError: answers and annotations do not belong together.
    """
    options = {option.name: option.default for option in task.options} | dict(options or {})
    judged = any(options.get(name) for name in JUDGED)
    if answers is None and not judged:
        raise ValueError(f"{task.name} needs --answers")
    rows = read_answers_file(answers) if answers else []
    if answers and not (rows or allow_missing or options.keys() & set(JUDGED)):
        raise ValueError(f"{answers} holds no answers")
    inputs = Inputs(rows, annotations, questions, options, allow_missing)
    settings = {
        **{
            name: str(value) if isinstance(value, Path) else value
            for name, value in options.items()
        },
        "allow_missing": allow_missing,
        "answers": str(answers) if answers else None,
        "annotations": str(annotations),
        "run": header_of(answers),
    }
    counts: Row = {"answers": len(rows), "failed_images": failures(rows)}
    if nulls(rows):
        counts["null_answers"] = nulls(rows)
    try:
        items, missing = _judged(task, inputs)
    except NoAnswersError as error:
        return _submitted(task, inputs, submission, str(error), counts, settings)
    for item in items:
        item["unit"] = _unit(item, task.unit)
    metrics = task.summarize(items, options)
    counts = {"items": len(items), "missing": missing, **counts}
    counts |= {name: metrics.pop(name) for name in COUNTED if name in metrics}
    _tell_what_is_left_out(task, counts)
    if resamples:
        metrics["intervals_95"] = intervals(task, items, options, resamples)
    if questions is not None:
        _add_pictures(items, task, questions)
    return Score(task.name, metrics, counts, settings, items)


def _judged(task: Task, inputs: Inputs) -> tuple[list[Row], int]:
    """The items, and how many answers are missing: as many as --allow-missing had to forgive."""
    try:
        return task.judge(replace(inputs, allow_missing=False)), 0
    except MissingAnswersError as error:
        if not inputs.allow_missing:
            raise
        return task.judge(inputs), error.count


def _tell_what_is_left_out(task: Task, counts: Row) -> None:
    for name, what in LEFT_OUT.items():
        if counts.get(name):
            logger.warning("%s: %d of the items %s", task.name, counts[name], what)


def _submitted(
    task: Task, inputs: Inputs, out: Path | None, reason: str, counts: Row, settings: Row
) -> Score:
    """Writes the file for the server, where the answers are not public."""
    if task.submit is None:
        raise ValueError(reason)
    if out is None:
        raise ValueError(f"{reason}; write the upload with `sqllava eval submit {task.name}`")
    task.submit(inputs, out)
    note = f"{reason}; wrote {out} for the benchmark's server"
    logger.warning("%s", note)
    return Score(task.name, {}, counts, {**settings, "submission": str(out), "note": note})


def _add_pictures(items: list[Row], task: Task, questions: Path) -> None:
    pictures = {str(q.question_id): q.image for q in task.read_questions(questions)}
    for item in items:
        if not item.get("image") and pictures.get(str(item["question_id"])):
            item["image"] = pictures[str(item["question_id"])]


# --- uncertainty ----------------------------------------------------------------------------------


def intervals(
    task: Task, items: Sequence[Row], options: Mapping[str, Any], resamples: int, seed: int = 0
) -> dict[str, Any]:
    """95 % bootstrap intervals of the metrics, by percentiles, under the metrics' own names.

    What belongs together (a picture's questions, a question's turns) is drawn together, and drawn
    twice it counts twice. A group that a resample does not hold has no figure there. Counts, which
    are whole numbers, have no interval.
    """
    summarize = task.resample or task.summarize
    units = _units(items, task.unit)
    rng = random.Random(seed)
    drawn: dict[tuple[str, ...], list[float]] = {}
    for _ in range(resamples):
        sample = [item for unit in rng.choices(units, k=len(units)) for item in unit]
        for path, value in _figures(summarize(sample, options)):
            drawn.setdefault(path, []).append(value)
    found: dict[str, Any] = {}
    for (*parents, name), values in drawn.items():
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = _percentiles(values)
    return found


def _unit(item: Row, field: str) -> str:
    """What an item is drawn by: the value of a field, or its own id where there is none."""
    value = item.get(field)
    return str(item["question_id"] if value is None else value)


def _units(items: Sequence[Row], field: str) -> list[list[Row]]:
    units: dict[str, list[Row]] = {}
    for item in items:
        units.setdefault(_unit(item, field), []).append(item)
    return list(units.values())


def _figures(metrics: Metrics, *path: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """The metrics that are fractional numbers, each with its path of names."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _figures(value, *path, name)
        elif isinstance(value, float):
            yield (*path, name), value


def _percentiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, PERCENTILES)]


def compare(
    first: Sequence[Row], second: Sequence[Row], resamples: int = 1000, seed: int = 0
) -> Row:
    """Compares two runs item by item.

    Args:
        first, second: items of the same task, with a `score` each, and the `unit` with which they
            are drawn (without one, each by itself).

    Returns:
        Means, the difference with its 95 % bootstrap interval, the items that only one got right,
        and the two-sided sign test's probability of so uneven a split of items by chance.

    Raises:
        ValueError: the runs did not score the same things.
    """
    ours, theirs = _scores(first), _scores(second)
    if ours.keys() != theirs.keys():
        odd = sorted(map(str, ours.keys() ^ theirs.keys()))
        raise ValueError(f"the runs differ in {len(odd)} items, such as {odd[0]}")
    differences = {name: theirs[name] - ours[name] for name in ours}
    # Each unit's sum and size: the mean over the items of a sample of units.
    units = [
        (sum(differences[_name(item)] for item in unit), len(unit))
        for unit in _units(first, "unit")
    ]
    rng = random.Random(seed)
    means = [_pooled(rng.choices(units, k=len(units))) for _ in range(resamples if units else 0)]
    better = [name for name in ours if theirs[name] > ours[name]]
    worse = [name for name in ours if theirs[name] < ours[name]]
    return {
        "items": len(ours),
        "first": mean(ours.values()),
        "second": mean(theirs.values()),
        "difference": mean(differences.values()),
        "units": len(units),
        "interval_95": _percentiles(means) if means else None,
        "better": [name[1] for name in better],
        "worse": [name[1] for name in worse],
        "sign_test_p": _sign_test(len(better), len(worse)),
    }


def _pooled(units: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in units) / sum(size for _, size in units)


def _name(item: Row) -> tuple[str, str]:
    """An item's (split, or question) and id: ids alone need not be unique."""
    return str(item.get("split") or item.get("prompt") or ""), str(item["question_id"])


def _scores(items: Sequence[Row]) -> dict[tuple[str, str], float]:
    scores: dict[tuple[str, str], float] = {}
    for number, item in enumerate(items, 1):
        score: Any = item.get("score")
        if "question_id" not in item or not _is_number(score):
            raise ValueError(
                f"record {number}: an item to compare needs question_id and a number as its "
                f"score, found {json.dumps(item)[:120]}"
            )
        name = _name(item)
        if name in scores:
            raise ValueError(f"record {number}: the item {name[1]!r} is there more than once")
        scores[name] = float(score)
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _sign_test(better: int, worse: int) -> float:
    """The two-sided probability of a split at least as uneven among as many differing items."""
    total, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)

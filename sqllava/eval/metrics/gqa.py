"""GQA's seven figures (the official eval.py), from questions, predictions and choices."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqllava.eval.records import Metrics, Row, grouped, mean, percent

_NO_STEP = ("exist", "query: name", "choose name")
_COMMON = ("color", "material", "shape")

Questions = Mapping[str, Mapping[str, Any]]


def prediction_of(text: str) -> str:
    """An answer as it is submitted: without full stops at its end, in lower case."""
    return text.rstrip(".").lower()


def steps(question: Mapping[str, Any]) -> int:
    """How many reasoning steps a question takes, by its functional program."""
    operations = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(mark in operation for mark in _NO_STEP) for operation in operations)


def gqa_items(
    questions: Questions,
    predictions: Mapping[str, str],
    choices: Questions | None = None,
    consistency: bool = True,
) -> list[Row]:
    """One item for each balanced question.

    Args:
        questions: GQA's questions by id.
        predictions: by id; for consistency those of the entailed questions too.
        choices: GQA's valid and plausible answers by id; nothing is either without them.
        consistency: whether to look at entailed questions.
    """
    return [
        _item(name, questions, predictions, choices, consistency)
        for name, question in questions.items()
        if question["isBalanced"]
    ]


def _item(
    name: str,
    questions: Questions,
    predictions: Mapping[str, str],
    choices: Questions | None,
    consistency: bool,
) -> Row:
    question, predicted = questions[name], predictions[name]
    types = question["types"]
    right = predicted == question["answer"]
    item = {
        "question_id": name,
        "image": f"{question['imageId']}.jpg" if "imageId" in question else None,
        "prediction": predicted,
        "answer": question["answer"],
        "score": float(right),
        "kind": "open" if types["structural"] == "query" else "binary",
        "structural": types["structural"],
        "semantic": types["semantic"],
        "steps": steps(question),
        "words": len(question["question"].split()),
        "group": question["groups"]["global"],
        "valid": float(_belongs(predicted, question, choices, name, "valid")),
        "plausible": float(_belongs(predicted, question, choices, name, "plausible")),
    }
    entailed = [other for other in question.get("entailed", ()) if other != name]
    if consistency:
        looked_at = entailed if right else []
        followed = [predictions[other] == questions[other]["answer"] for other in looked_at]
        item["consistency"] = mean(followed) if followed else None
    return item


def _belongs(
    predicted: str, question: Mapping[str, Any], choices: Questions | None, name: str, which: str
) -> bool:
    if choices is None:
        return False
    if "Common" in (question["types"].get("detailed") or ""):
        return predicted in _COMMON
    return predicted in choices[name][which]


def entailed_ids(questions: Questions, predictions: Mapping[str, str]) -> set[str]:
    """The questions that consistency looks at: those entailed by a right answer."""
    return {
        other
        for name, question in questions.items()
        if question["isBalanced"] and predictions[name] == question["answer"]
        for other in question.get("entailed", ())
    }


def distribution(pairs: Iterable[tuple[str, str, str]]) -> float:
    """How far the answers' distribution is from the true one, by group; lower is better.

    Args:
        pairs: (group, right answer, prediction).
    """
    gold: dict[str, Counter[str]] = {}
    predicted: dict[str, Counter[str]] = {}
    for group, answer, prediction in pairs:
        gold.setdefault(group, Counter())[answer] += 1
        predicted.setdefault(group, Counter())[prediction] += 1
    total = weight = 0.0
    for group, answers in gold.items():
        size = sum(answers.values())
        chi = sum((predicted[group][name] - n) ** 2 / n for name, n in answers.items())
        total += chi * size
        weight += size
    return total / weight / 100 if weight else 0.0


def gqa_metrics(items: Sequence[Row]) -> Metrics:
    """GQA's figures in percent, but for `distribution`; `consistency` is None if not looked at."""
    looked_at = all("consistency" in item for item in items)
    consistent = [item for item in items if item.get("consistency") is not None]
    return {
        "accuracy": percent(items),
        "binary": percent(item for item in items if item["kind"] == "binary"),
        "open": percent(item for item in items if item["kind"] == "open"),
        "validity": percent(items, "valid"),
        "plausibility": percent(items, "plausible"),
        "consistency": percent(consistent, "consistency") if looked_at else None,
        "distribution": distribution(
            (item["group"], item["answer"], item["prediction"])
            for item in items
            if item["group"] is not None
        ),
        **{
            f"by_{name}": {str(value): percent(group) for value, group in grouped(items, name)}
            for name in ("structural", "semantic", "steps", "words")
        },
    }

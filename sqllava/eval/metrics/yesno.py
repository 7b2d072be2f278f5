"""Yes/no benchmarks: how POPE and MME read an answer, and the figures that follow."""

from collections.abc import Iterable, Iterator, Sequence

from sqllava.eval.records import Metrics, Row, grouped, mean

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
QUESTIONS_A_PICTURE = 2  # of MME


def parse_pope(text: str) -> str:
    """Reads an answer as POPE's scorer does: yes, unless the first sentence says No, no or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def parse_mme(text: str) -> str:
    """Reads an answer as MME's tool does: yes, no or other, by its first four characters."""
    text = text.lower()
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def confusion(pairs: Iterable[tuple[str, str]]) -> Metrics:
    """Counts and fractions of (right answer, prediction), both yes or no, with yes as positive."""
    pairs = list(pairs)
    tp = pairs.count(("yes", "yes"))
    fp = pairs.count(("no", "yes"))
    tn = pairs.count(("no", "no"))
    fn = pairs.count(("yes", "no"))
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "accuracy": (tp + tn) / len(pairs) if pairs else 0.0,
        "precision": precision,
        "recall": recall,
        "yes_ratio": (tp + fp) / len(pairs) if pairs else 0.0,
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def pope_metrics(items: Sequence[Row]) -> Metrics:
    """POPE's fractions, per split and the mean of the splits' F1, which is what papers print."""
    splits = {
        split: confusion((item["answer"], item["prediction"]) for item in group)
        for split, group in grouped(items, "split")
    }
    return {"f1_mean": mean(figures["f1"] for figures in splits.values()), **splits}


def mme_metrics(items: Sequence[Row]) -> Metrics:
    """MME's scores, 100 acc + 100 acc+ (both of a picture's questions right), and their sums."""
    subtasks = {name: _subtask(group) for name, group in grouped(items, "subtask")}
    scores = {name: figures["score"] for name, figures in subtasks.items()}
    return {
        "perception": sum(scores.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(scores.get(name, 0.0) for name in COGNITION),
        "by_subtask": scores,
        "subtasks": subtasks,
    }


def _subtask(items: Sequence[Row]) -> Metrics:
    acc = mean(item["score"] for item in items)
    acc_plus = mean(all(item["score"] for item in pair) for pair in _pairs(items))
    known = [item for item in items if item["prediction"] != "other"]
    figures = confusion((item["answer"], item["prediction"]) for item in known)
    return {
        "score": 100 * acc + 100 * acc_plus,
        "acc": acc,
        "acc_plus": acc_plus,
        **{name: figures[name] for name in ("precision", "recall", "tp", "fp", "tn", "fn")},
        "other": len(items) - len(known),
    }


def _pairs(items: Sequence[Row]) -> Iterator[list[Row]]:
    """The two items of each picture; of a picture that a resample drew more than once, each copy.

    The copies' items follow one another, so that two at a time belong together.
    """
    for _, group in grouped(items, "image"):
        for start in range(0, len(group), QUESTIONS_A_PICTURE):
            yield group[start : start + QUESTIONS_A_PICTURE]

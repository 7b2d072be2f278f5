"""Measures of asking: how many questions, how different, how long, how near to people's, how true.

a run's file -> questions by image -> figures, as JSON and as a picture

A run is what `sqllava ask --json` prints, what the data engine writes, the miniature world's
asked.json, or a LLaVA data file: so people's own questions are measured in the same way.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqllava.cli import Parser
from sqllava.conversation import DESCRIBE_QUESTION, question_key, turns_from_record
from sqllava.data.records import image_names, iter_records

# Marks of a checked question: whether it is of the world's form, whether it is about what is there,
# and whether the model's own answer is right.
TRUTHS = ("well_formed", "grounded", "right")
_FIRST_WORDS = 10


@dataclass(frozen=True)
class Asked:
    """A question, with what a check has found out about it; see `TRUTHS`."""

    text: str
    truths: Mapping[str, bool] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """Its words, in lower case and without the last mark."""
        return question_key(self.text).split()


def read_questions(path: Path) -> dict[str, list[Asked]]:
    """Reads the questions of a run by image; what asks for a description is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record is of no known kind, with its number.
    """
    asked: dict[str, list[Asked]] = {}
    for number, record in enumerate(iter_records(path)):
        try:
            image, questions = _questions_of(record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: record {number} holds no questions about an image ({error!r}); expected "
                "'questions', 'exchanges' or 'conversations' beside 'image'"
            ) from error
        if image is not None:
            asked.setdefault(image, []).extend(questions)
    return asked


def _questions_of(record: dict[str, Any]) -> tuple[str | None, list[Asked]]:
    if "conversations" in record:
        names = image_names(record)
        texts = [turn.text or "" for turn in turns_from_record(record) if turn.role != "assistant"]
        questions = [Asked(text) for text in texts if text != DESCRIBE_QUESTION]
        return (names[0] if names else None), questions
    if "exchanges" in record:
        return record["image"], [Asked(one["question"]) for one in record["exchanges"]]
    return record["image"], [
        Asked(one["text"], {name: one[name] for name in TRUTHS if name in one})
        for one in record["questions"]
    ]


# --- measures -------------------------------------------------------------------------------------


def measure(
    asked: Mapping[str, Sequence[Asked]], references: Mapping[str, Sequence[Asked]] | None = None
) -> dict[str, float | None]:
    """All measures of a run; fractions, but for `_per_image` and `words_`.

    Diversity is that of the questions about one image, averaged over the images.

    Args:
        references: people's questions; images without any are left out of what is compared.
    """
    sets = [list(questions) for questions in asked.values() if questions]
    questions = [question for several in sets for question in several]
    lengths = [len(question.words) for question in questions]
    figures = {
        "questions_per_image": _mean(len(several) for several in asked.values()),
        "distinct_per_image": _mean(
            len({question_key(q.text) for q in several}) for several in asked.values()
        ),
        "distinct_1": _mean(distinct_n(several, 1) for several in sets),
        "distinct_2": _mean(distinct_n(several, 2) for several in sets),
        "self_bleu": _mean(self_bleu(several) for several in sets),
        "question_share": _mean(is_question(question.text) for question in questions),
        "words_mean": _mean(lengths),
        "words_median": float(statistics.median(lengths)) if lengths else None,
    }
    if references is not None:
        figures |= overlap(asked, references)
    return figures | truth(questions)


def is_question(text: str) -> bool:
    """Whether a text is one line with words in it that ends in a question mark."""
    return text.endswith("?") and "\n" not in text and bool(question_key(text))


def distinct_n(questions: Sequence[Asked], n: int) -> float | None:
    """Different n-grams among all n-grams of a set (Li et al. 2016); None without any."""
    grams = [
        tuple(words[start : start + n])
        for words in (question.words for question in questions)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(questions: Sequence[Asked]) -> float | None:
    """BLEU of each question against the others of its set, averaged (Zhu et al. 2018); low is
    diverse. None for fewer than two."""
    texts = [question.text for question in questions]
    if len(texts) < 2:
        return None
    return _mean(bleu(text, texts[:at] + texts[at + 1 :]) for at, text in enumerate(texts))


def overlap(
    asked: Mapping[str, Sequence[Asked]], references: Mapping[str, Sequence[Asked]]
) -> dict[str, float | None]:
    """How near the questions are to the reference questions about the same image.

    `reference_exact` is the share of questions that are among them, `reference_recall` the share of
    them that was asked, `reference_bleu` the mean BLEU of the questions against them.
    """
    exact, recalled, bleus = [], [], []
    for image, questions in asked.items():
        known = [reference.text for reference in references.get(image, ())]
        if not known:
            continue
        keys = {question_key(text) for text in known}
        own = [question_key(question.text) for question in questions]
        exact += [key in keys for key in own]
        recalled += [key in own for key in sorted(keys)]
        bleus += [bleu(question.text, known) for question in questions]
    return {
        "reference_exact": _mean(exact),
        "reference_recall": _mean(recalled),
        "reference_bleu": _mean(bleus),
    }


def truth(questions: Sequence[Asked]) -> dict[str, float | None]:
    """Shares of what a check has found true. `right` is a share of the grounded questions, as only
    these have a true answer; measures without marks are left out."""
    shares: dict[str, float | None] = {}
    for name in TRUTHS:
        marked = [q.truths for q in questions if name in q.truths]
        if name == "right":
            marked = [truths for truths in marked if truths.get("grounded", True)]
        if marked:
            shares[name] = _mean(truths[name] for truths in marked)
    return shares


def bleu(text: str, references: Sequence[str]) -> float:
    """Sentence BLEU of sacrebleu, up to the order that the text has, in [0, 1]."""
    from sacrebleu.metrics import BLEU

    score = BLEU(lowercase=True, effective_order=True).sentence_score(text, list(references))
    return score.score / 100


def first_words(questions: Iterable[Asked]) -> dict[str, float]:
    """The most frequent first words of questions, with their shares."""
    counts = Counter(question.words[0] for question in questions if question.words)
    total = counts.total()
    return {word: count / total for word, count in counts.most_common(_FIRST_WORDS)}


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known, None if nothing is."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- results --------------------------------------------------------------------------------------


def score(path: Path, references: Path | None = None) -> dict[str, Any]:
    """The figures of a run's file, in the form of the other tasks' scores."""
    asked = read_questions(path)
    known = read_questions(references) if references else None
    questions = [question for several in asked.values() for question in several]
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return {
        "task": "selfq",
        "metrics": measure(asked, known),
        "counts": {
            "images": len(asked),
            "questions": len(questions),
            "images_with_references": len(asked.keys() & known.keys()) if known else 0,
        },
        "first_words": first_words(questions),
        "settings": {"asked": str(path), "references": str(references) if references else None},
    }


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws the figures of a run: its shares, and how its questions begin."""
    from matplotlib.figure import Figure

    shares = {
        name: value
        for name, value in report["metrics"].items()
        if value is not None and not name.endswith(("_per_image", "_mean", "_median"))
    }
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2),
        (shares, report["first_words"]),
        ("Shares", "First words"),
        strict=True,
    ):
        bars = axes.barh(list(values), list(values.values()), color="#4477aa")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.15), title=title)
        axes.spines[["top", "right"]].set_visible(False)
    counts = report["counts"]
    figure.suptitle(f"{counts['questions']} questions about {counts['images']} images")
    figure.savefig(path)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's flags."""
    parser = Parser(prog="sqllava eval selfq", description="Measures of asking.")
    add = parser.add_argument
    add("asked", type=Path, help="what `sqllava ask --json` printed, or another run's file")
    add("--references", type=Path, help="LLaVA JSON with people's questions about the same images")
    add("--out", type=Path, help="also write the JSON here")
    add("--picture", type=Path, help="also draw the figures here (.png, .svg, .pdf)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures of a run as one JSON object."""
    args = parse_arguments(argv)
    try:
        report = score(args.asked, args.references)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    text = json.dumps(report, ensure_ascii=False) + "\n"
    if args.picture:
        draw(report, args.picture)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()

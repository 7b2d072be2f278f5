"""Questions -> batches: what is asked together, by the questions alone, so that runs can go on.

A batch holds whole groups of questions about one picture, which is then read once; a group that is
too large for one decode is asked in several rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqllava.eval.records import Question

# Items, round by round.
Batch = list[list[int]]

# Bytes of text that make a token, about: enough to know what fits.
TOKEN_BYTES = 3


@dataclass(frozen=True)
class Costs:
    """What questions take of a batch's memory, in tokens.

    Attributes:
        image: of a prompt with a picture, all but its question: shared by all about the picture.
        text: the same of a prompt without one.
        answer: the longest answer.
    """

    image: int
    text: int
    answer: int

    def shared(self, question: Question) -> int:
        return self.image if question.has_image else self.text

    def own(self, question: Question) -> int:
        return len(question.text.encode("utf-8", "replace")) // TOKEN_BYTES + 1 + self.answer

    def alone(self, question: Question) -> int:
        return self.shared(question) + self.own(question)


def picture_key(question: Question) -> tuple[str | None, str | None] | None:
    """Equal for questions about one picture: one path, or one content; None without a picture."""
    return (question.image, question.image_base64) if question.has_image else None


def plan(
    questions: Sequence[Question],
    items: Sequence[int],
    batch_size: int,
    costs: Costs | None = None,
) -> list[Batch]:
    """Cuts items into batches, the largest first: what does not fit fails at once.

    Args:
        batch_size: questions of a batch, if each has a picture of its own or none.
        costs: where questions about a picture share it: a batch may then hold more questions, on at
            most `batch_size` pictures, while it takes no more tokens than `batch_size` of the
            longest questions, each with a picture of its own, would. None: each stands alone.
    """
    if costs is None:
        ordered = sorted(items, key=lambda item: _size(questions[item], item), reverse=True)
        return [[ordered[i : i + batch_size]] for i in range(0, len(ordered), batch_size)]
    budget = batch_size * max((costs.alone(questions[item]) for item in items), default=0)
    groups = [_Group.of(members, questions, costs) for members in _grouped(questions, items)]
    groups.sort(key=lambda group: (group.has_image, group.cost, -group.items[0]), reverse=True)
    batches: list[Batch] = []
    batch: list[_Group] = []
    for group in groups:
        # Rows are padded to the longest, which comes first.
        if batch and (
            batch[0].has_image != group.has_image
            or len(batch) == batch_size
            or (len(batch) + 1) * batch[0].cost > budget
        ):
            batches.append(_rounds(batch, budget))
            batch = []
        batch.append(group)
    return [*batches, _rounds(batch, budget)] if batch else batches


def _size(question: Question, item: int) -> tuple[bool, int, int]:
    return question.has_image, len(question.text), -item


@dataclass(frozen=True)
class _Group:
    """Questions about one picture; or one without a picture.

    Attributes:
        shared: tokens of what they share.
        own: of the rest of each.
    """

    items: list[int]
    has_image: bool
    shared: int
    own: list[int]

    @classmethod
    def of(cls, items: list[int], questions: Sequence[Question], costs: Costs) -> "_Group":
        first = questions[items[0]]
        own = [costs.own(questions[item]) for item in items]
        return cls(items, first.has_image, costs.shared(first), own)

    @property
    def cost(self) -> int:
        return self.shared + sum(self.own)


def _grouped(questions: Sequence[Question], items: Sequence[int]) -> list[list[int]]:
    """Items by their picture; those without one by themselves."""
    groups: dict[object, list[int]] = {}
    for item in items:
        key = picture_key(questions[item])
        groups.setdefault(item if key is None else key, []).append(item)
    return list(groups.values())


def _rounds(batch: list[_Group], budget: int) -> Batch:
    """All items of a batch at once; those of a group that is too large alone in several rounds."""
    if len(batch) > 1 or batch[0].cost <= budget:
        return [[item for group in batch for item in group.items]]
    group = batch[0]
    rounds: Batch = []
    left = 0
    for item, own in zip(group.items, group.own, strict=True):
        if own > left:
            rounds.append([])
            left = budget - group.shared
        rounds[-1].append(item)
        left -= own
    return rounds

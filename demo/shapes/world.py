"""The miniature world: scenes of colored shapes, their pictures, captions, questions and answers.

Everything that the demo's data, base models and checks know about the world is said here once.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (215, 45, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 225),
    "yellow": (235, 210, 50),
    "purple": (155, 60, 190),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
PLACES = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three")
KINDS = ("color", "shape", "size", "exist", "count", "place", "relation")
# What is asked in training: what is learned late, more often.
PRACTICE = (*KINDS, "count", "count")
# Never together in a training image or in a training question; the evaluation asks about them.
HELD_OUT = frozenset(
    {("red", "cross"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "square")}
)

GRID = 3
CELL = 32
IMAGE_SIZE = GRID * CELL
DESCRIBE = "Can you describe the image in detail?"
JPEG_QUALITY = 90
_OVERSAMPLE = 2
_RADIUS = {"small": (7.0, 8.5), "large": (11.5, 13.5)}
_MOST_SHIFT = 3.5


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `cell` counts the grid's cells row by row."""

    size: str
    color: str
    shape: str
    cell: int

    @property
    def place(self) -> str:
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def unseen(self) -> bool:
        return (self.color, self.shape) in HELD_OUT

    def phrase(self) -> str:
        return f"in the {self.place} a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to three things in reading order, with colors, shapes and cells each used once."""

    things: tuple[Thing, ...]

    def by_shape(self, shape: str) -> Thing | None:
        return next((thing for thing in self.things if thing.shape == shape), None)

    def by_color(self, color: str) -> Thing | None:
        return next((thing for thing in self.things if thing.color == color), None)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(thing) for thing in self.things]

    @classmethod
    def from_json(cls, things: list[dict[str, Any]]) -> Scene:
        return cls(tuple(Thing(**thing) for thing in things))


@dataclass(frozen=True)
class Question:
    """A question with its true answer; `unseen` says that it is about a held-out pair."""

    text: str
    answer: str
    kind: str
    unseen: bool = False


@dataclass(frozen=True)
class Check:
    """What is known about any text offered as a question about a scene."""

    well_formed: bool
    grounded: bool = False
    kind: str | None = None
    answer: str | None = None


# --- scenes ---------------------------------------------------------------------------------------


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Draws a scene.

    Args:
        rng: The source of every draw.
        held_out: Whether exactly one thing is a held-out pair of color and shape, or none.
    """
    count = rng.choices((1, 2, 3), weights=(1, 4, 4))[0]
    while True:
        pairs = list(zip(rng.sample(list(COLORS), count), rng.sample(SHAPES, count), strict=True))
        if held_out:
            pairs[rng.randrange(count)] = rng.choice(sorted(HELD_OUT))
        distinct = all(len(set(column)) == count for column in zip(*pairs, strict=True))
        if distinct and sum(pair in HELD_OUT for pair in pairs) == int(held_out):
            return place_things(pairs, rng)


def sample_any_scene(rng: random.Random) -> Scene:
    """Draws a scene with no regard to held-out pairs, for text that no image goes with."""
    count = rng.choices((1, 2, 3), weights=(1, 4, 4))[0]
    return place_things(
        list(zip(rng.sample(list(COLORS), count), rng.sample(SHAPES, count), strict=True)), rng
    )


def place_things(pairs: list[tuple[str, str]], rng: random.Random) -> Scene:
    """Gives pairs of color and shape their sizes and cells."""
    cells = sorted(rng.sample(range(GRID * GRID), len(pairs)))
    # One draw of the odds a scene: all-small and all-large scenes must be common enough to count.
    odds = rng.choice((0.15, 0.5, 0.85))
    sizes = [SIZES[rng.random() < odds] for _ in pairs]
    return Scene(
        tuple(Thing(s, *pair, cell) for s, pair, cell in zip(sizes, pairs, cells, strict=True))
    )


def describe(scene: Scene) -> str:
    """The caption of a scene: the answer to `DESCRIBE`."""
    return ", ".join(thing.phrase() for thing in scene.things) + "."


# --- questions ------------------------------------------------------------------------------------


def questions(scene: Scene) -> list[Question]:
    """Every grounded question about a scene, all kinds together."""
    return [question for kind in KINDS for question in questions_of(scene, kind)]


def questions_of(scene: Scene, kind: str) -> list[Question]:
    """Every grounded question of one kind about a scene."""
    return _QUESTIONS[kind](scene)


def sample_question(
    scene: Scene, rng: random.Random, kind: str, unseen_negatives: bool = False
) -> Question | None:
    """Draws one question of a kind, its yes and no equally likely, or None when the scene has none.

    Args:
        scene: What is asked about.
        rng: The source of every draw.
        kind: One of `KINDS`.
        unseen_negatives: Whether "no" questions may name a held-out pair. Never in training data.
    """
    options = questions_of(scene, kind)
    if kind == "exist" and not unseen_negatives:
        options = [q for q in options if q.answer == "yes" or _exist_pair(q.text) not in HELD_OUT]
    answers = sorted({question.answer for question in options})
    if not answers:
        return None
    # Drawing the answer first balances yes and no; other kinds have one question an answer mostly.
    answer = rng.choice(answers)
    return rng.choice([question for question in options if question.answer == answer])


def sample_questions(
    scene: Scene, rng: random.Random, n: int, unseen_negatives: bool = False
) -> list[Question]:
    """Draws n different questions, the kinds as often as in `PRACTICE` if the scene allows."""
    drawn: list[Question] = []
    kinds: list[str] = []
    for _ in range(8 * n):
        if not kinds:
            kinds = rng.sample(PRACTICE, len(PRACTICE))
        question = sample_question(scene, rng, kinds.pop(), unseen_negatives)
        if question is not None and question not in drawn:
            drawn.append(question)
            if len(drawn) == n:
                break
    return drawn


def check_question(text: str, scene: Scene) -> Check:
    """Parses a question strictly and answers it from the scene.

    A question is grounded when all it presupposes is in the scene; one about existence must name a
    color or a shape that is there, one about a number must have something to count.
    """
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(text):
            answer = _ANSWERS[kind](scene, *match.groups())
            return Check(True, answer is not None, kind, answer)
    return Check(False)


def _attribute_questions(scene: Scene, kind: str) -> list[Question]:
    templates = {
        "color": "What color is the {shape}?",
        "shape": "What shape is the {color} object?",
        "size": "What size is the {shape}?",
        "place": "Where is the {shape}?",
    }
    return [
        Question(templates[kind].format(**asdict(thing)), getattr(thing, kind), kind, thing.unseen)
        for thing in scene.things
    ]


def _exist_questions(scene: Scene) -> list[Question]:
    colors = {thing.color for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    found = {(thing.color, thing.shape) for thing in scene.things}
    asked = [(c, s) for c in COLORS for s in SHAPES if c in colors or s in shapes]
    return [
        Question(
            f"Is there a {c} {s}?", "yes" if (c, s) in found else "no", "exist", (c, s) in HELD_OUT
        )
        for c, s in asked
    ]


def _count_questions(scene: Scene) -> list[Question]:
    unseen = any(thing.unseen for thing in scene.things)
    counts = {size: sum(thing.size == size for thing in scene.things) for size in SIZES}
    asked = [("How many objects are there?", len(scene.things))]
    asked += [(f"How many {size} objects are there?", n) for size, n in counts.items() if n]
    return [Question(text, NUMBERS[n], "count", unseen) for text, n in asked]


def _relation_questions(scene: Scene) -> list[Question]:
    return [
        Question(
            f"Is the {a.shape} above the {b.shape}?",
            "yes" if a.row < b.row else "no",
            "relation",
            a.unseen or b.unseen,
        )
        for a in scene.things
        for b in scene.things
        if a is not b
    ]


_QUESTIONS: dict[str, Callable[[Scene], list[Question]]] = {
    "color": lambda scene: _attribute_questions(scene, "color"),
    "shape": lambda scene: _attribute_questions(scene, "shape"),
    "size": lambda scene: _attribute_questions(scene, "size"),
    "place": lambda scene: _attribute_questions(scene, "place"),
    "exist": _exist_questions,
    "count": _count_questions,
    "relation": _relation_questions,
}

_COLOR = f"({'|'.join(COLORS)})"
_SHAPE = f"({'|'.join(SHAPES)})"
_PATTERNS = {
    "color": re.compile(f"What color is the {_SHAPE}\\?"),
    "shape": re.compile(f"What shape is the {_COLOR} object\\?"),
    "size": re.compile(f"What size is the {_SHAPE}\\?"),
    "place": re.compile(f"Where is the {_SHAPE}\\?"),
    "exist": re.compile(f"Is there a {_COLOR} {_SHAPE}\\?"),
    "count": re.compile(f"How many (?:({'|'.join(SIZES)}) )?objects are there\\?"),
    "relation": re.compile(f"Is the {_SHAPE} above the {_SHAPE}\\?"),
}


def _exist_pair(text: str) -> tuple[str, str]:
    match = _PATTERNS["exist"].fullmatch(text)
    assert match is not None
    return match.group(1), match.group(2)


def _answer_exist(scene: Scene, color: str, shape: str) -> str | None:
    by_color, by_shape = scene.by_color(color), scene.by_shape(shape)
    if by_color is None and by_shape is None:
        return None
    return "yes" if by_color is by_shape else "no"


def _answer_count(scene: Scene, size: str | None) -> str | None:
    count = sum(size in (None, thing.size) for thing in scene.things)
    return NUMBERS[count] if count else None


def _answer_relation(scene: Scene, above: str, below: str) -> str | None:
    a, b = scene.by_shape(above), scene.by_shape(below)
    if a is None or b is None or a is b:
        return None
    return "yes" if a.row < b.row else "no"


_ANSWERS: dict[str, Callable[..., str | None]] = {
    "color": lambda scene, shape: getattr(scene.by_shape(shape), "color", None),
    "shape": lambda scene, color: getattr(scene.by_color(color), "shape", None),
    "size": lambda scene, shape: getattr(scene.by_shape(shape), "size", None),
    "place": lambda scene, shape: getattr(scene.by_shape(shape), "place", None),
    "exist": _answer_exist,
    "count": _answer_count,
    "relation": _answer_relation,
}


# --- pictures -------------------------------------------------------------------------------------


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draws a scene with its own ground, and jitter in position, radius, angle and color."""
    picture = Image.fromarray(_ground(rng)).resize((IMAGE_SIZE * _OVERSAMPLE,) * 2)
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        radius = rng.uniform(*_RADIUS[thing.size])
        slack = min(_MOST_SHIFT, CELL / 2 - radius - 1)
        x = (thing.cell % GRID + 0.5) * CELL + rng.uniform(-slack, slack)
        y = (thing.row + 0.5) * CELL + rng.uniform(-slack, slack)
        fill = tuple(
            min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLORS[thing.color]
        )
        outline = _outline(thing.shape, x, y, radius, math.radians(rng.uniform(-8, 8)))
        draw.polygon([(px * _OVERSAMPLE, py * _OVERSAMPLE) for px, py in outline], fill=fill)
    return picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _ground(rng: random.Random) -> np.ndarray:
    """A dark, nearly gray ground [size, size, 3]: plain, striped, checked or grainy."""
    gray = rng.randint(45, 110)
    base = np.array([gray + rng.randint(-12, 12) for _ in range(3)], dtype=np.float32)
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    period, contrast = rng.randint(4, 12), rng.uniform(6, 16)
    texture = {
        "plain": lambda: np.zeros((IMAGE_SIZE, IMAGE_SIZE)),
        "striped": lambda: ((rows + columns) // period % 2) * contrast,
        "checked": lambda: ((rows // period + columns // period) % 2) * contrast,
        "grainy": lambda: np.random.default_rng(rng.getrandbits(32)).normal(
            0, contrast / 2, rows.shape
        ),
    }[rng.choice(("plain", "plain", "striped", "checked", "grainy"))]()
    return np.clip(base + texture[..., None], 0, 255).astype(np.uint8)


def _outline(
    shape: str, x: float, y: float, radius: float, angle: float
) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y)."""
    third, side = radius / 3, radius * 0.85
    corners = {
        "circle": lambda: _star(24, radius * 0.95, radius * 0.95),
        "square": lambda: [(-side, -side), (side, -side), (side, side), (-side, side)],
        "triangle": lambda: [(0.0, -radius), (radius, radius * 0.8), (-radius, radius * 0.8)],
        "star": lambda: _star(5, radius * 1.05, radius * 0.42),
        "cross": lambda: [
            (-third, -radius), (third, -radius), (third, -third), (radius, -third),
            (radius, third), (third, third), (third, radius), (-third, radius),
            (-third, third), (-radius, third), (-radius, -third), (-third, -third),
        ],
    }[shape]()  # fmt: skip
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + cos * px - sin * py, y + sin * px + cos * py) for px, py in corners]


def _star(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    radii = (outer, inner)
    turns = [(k * math.pi / points - math.pi / 2, radii[k % 2]) for k in range(2 * points)]
    return [(r * math.cos(t), r * math.sin(t)) for t, r in turns]

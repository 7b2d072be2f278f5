"""The base language model's documents: drills in looking things up, and the world's conversations.

Small transformers find in-context lookup suddenly and late when they must find it through long
conversations. Short documents in which nearly every token is a lookup bring it within a few hundred
steps; questions, roles and the real templates are then put around it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import world
from transformers import PreTrainedTokenizerBase

from sqllava.conversation import TEMPLATES, Template
from sqllava.encoding import IGNORE_INDEX, add_image_token, encode_record, image_token_id

# What a target counts in the loss: answers are the lessons, the rest is there to be fluent.
ANSWER, CAPTION, QUESTION, REST = 1.0, 1.0, 0.2, 0.05
RECALL_QUERIES = 12
_COPIED = (
    *world.COLORS,
    *world.SHAPES,
    *world.SIZES,
    *world.PLACES,
    "color",
    "shape",
    "size",
    "Where",
)
# In the order in which a phrase has them, and by what a short query asks for each.
_ASKED = {"place": "Where", "size": "size", "color": "color"}
_ATTRIBUTES = tuple(_ASKED)
_BARE = Template("bare", "", TEMPLATES["v1_sq"].tags, self_questions=True)


@dataclass
class Document:
    """Token ids, the weight of each as a target, and where which kind of answer begins.

    `cells` says at which positions no token stands but the words of a thing, all at once, or none.
    """

    ids: list[int]
    weights: list[float]
    probes: list[tuple[int, str]] = field(default_factory=list)
    cells: dict[int, list[int]] = field(default_factory=dict)

    def add_scene(self, scene: Scene, weight: float) -> None:
        """Appends a scene; only words can be targets."""
        self.cells |= {len(self.ids) + at: words for at, words in scene.cells.items()}
        self.ids += scene.ids
        self.weights += [0.0 if scene.cells else weight] * len(scene.ids)


@dataclass
class Scene:
    """What stands for an image: the ids of a description, or the grid with a position a cell."""

    ids: list[int]
    cells: dict[int, list[int]] = field(default_factory=dict)


class DocumentMaker:
    """Draws the base model's documents; the scene stands where an image will stand.

    Half of the time it is told in words. Else it is a grid with one position a cell, where the
    words of a thing are blended into one embedding: a model that has seen only words takes hundreds
    of steps of stage 1 to find any use for an image token that means four things at once. Half of
    the grids leave the place out: a model that knows the cell by its position looks for a thing's
    words in the right one before stage 1 has taught the projector anything.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        add_image_token(tokenizer)
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.image_id = image_token_id(tokenizer)
        self.assistant_ids = {
            tokenizer.convert_tokens_to_ids(p) for p in ("ASSISTANT", "▁ASSISTANT")
        }
        self._cache: dict[str, list[int]] = {}
        self.makers: dict[str, Callable[[], Document]] = {
            "copies": self.copies,
            "pairs": self.pairs,
            "recall": self.recall,
            "questions": self.questions,
            "bare": lambda: self.chat(_BARE),
            "chat": lambda: self.chat(TEMPLATES[self.rng.choice(("v1", "v1_sq", "v1_sq"))]),
            "caption": self.caption,
        }

    def draw(self, shares: dict[str, float]) -> Document:
        return self.makers[self.rng.choices(list(shares), weights=list(shares.values()))[0]]()

    def copies(self) -> Document:
        """Random words over and over: each round copies the one before."""
        words = [
            self._ids(word)[0] for word in self.rng.choices(_COPIED, k=self.rng.randint(6, 16))
        ]
        rounds = words * (64 // len(words))
        weights = [0.0] * (1 + len(words)) + [ANSWER] * (len(rounds) - len(words))
        return Document([self.tokenizer.bos_token_id, *rounds], weights)

    def pairs(self) -> Document:
        """Things of a shape and one attribute, "red circle, blue star,", and short queries."""
        return self._recall([self.rng.choice(_ATTRIBUTES)])

    def recall(self) -> Document:
        """Things of a shape and some attributes, up to a scene's full words, and short queries."""
        return self._recall(self.rng.sample(_ATTRIBUTES, self.rng.randint(1, len(_ATTRIBUTES))))

    def _recall(self, names: Sequence[str]) -> Document:
        """Things told by these attributes, then queries "color circle red shape red circle ...".

        The queries are drawn with replacement: were each asked once, a thing not asked about yet
        would be a good guess, and guessing well is where the learning of lookup gets stuck.
        """
        scene = world.sample_any_scene(self.rng)
        filled = len(names) == len(_ATTRIBUTES) or self.rng.random() < 0.5
        phrases, asked = [], []
        for thing in self.rng.sample(scene.things, len(scene.things)):
            words = {name: getattr(thing, name) for name in _ATTRIBUTES if name in names}
            asked += [(f"{_ASKED[name]} {thing.shape}", word, name) for name, word in words.items()]
            if "color" in words:
                asked.append((f"shape {thing.color}", thing.shape, "shape"))
            if filled and "place" in words:
                words["place"] = f"in the {thing.place} a"
            phrases.append(" ".join([*words.values(), thing.shape]))
        words = Scene(self._tokenize(", ".join(phrases) + "."))
        return self._dense(words, self.rng.choices(asked, k=RECALL_QUERIES))

    def questions(self) -> Document:
        """A scene, then questions each followed directly by its answer."""
        scene = world.sample_any_scene(self.rng)
        drawn = world.sample_questions(scene, self.rng, 12, unseen_negatives=True)
        return self._dense(self._scene(scene), [(q.text, q.answer, q.kind) for q in drawn])

    def chat(self, template: Template) -> Document:
        """A conversation of the real data's form, in the ids that training gives it."""
        scene = world.sample_any_scene(self.rng)
        turns = [
            (q.text, q.answer, q.kind) for q in world.sample_questions(scene, self.rng, 10, True)
        ]
        if self.rng.random() < 0.6:
            turns.insert(0, (world.DESCRIBE, world.describe(scene), "describe"))
        as_text = self.rng.random() < 0.3
        first = f"The image shows {self._in_words(scene)}\n" if as_text else "<image>\n"
        conversations = []
        for number, (question, answer, _) in enumerate(turns):
            conversations.append(
                {"from": "human", "value": question if number else first + question}
            )
            conversations.append({"from": "gpt", "value": answer})
        record: dict[str, Any] = {"conversations": conversations}
        sq_r = 0.6 if template.self_questions else 0.0
        encoded = encode_record(record, template, self.tokenizer, sq_r=sq_r, rng=self.rng)
        return self._with_scene(
            encoded.input_ids, encoded.labels, scene, [kind for _, _, kind in turns]
        )

    def caption(self) -> Document:
        """A caption as in stage 1."""
        scene = world.sample_any_scene(self.rng)
        turns = [
            {"from": "human", "value": "<image>\n"},
            {"from": "gpt", "value": world.describe(scene)},
        ]
        encoded = encode_record({"conversations": turns}, "plain", self.tokenizer)
        return self._with_scene(encoded.input_ids, encoded.labels, scene, [])

    def _in_words(self, scene: world.Scene) -> str:
        """The scene's things, half of the time in reading order, as an image and a caption have
        them, else in any."""
        things = list(scene.things)
        if self.rng.random() < 0.5:
            self.rng.shuffle(things)
        return world.describe(world.Scene(tuple(things)))

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenize(text)
        return self._cache[text]

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _scene(self, scene: world.Scene) -> Scene:
        if self.rng.random() < 0.5:
            return Scene(self._tokenize(self._in_words(scene)))
        cells: dict[int, list[int]] = {cell: [] for cell in range(world.GRID**2)}
        placed = self.rng.random() < 0.5
        for thing in scene.things:
            words = (thing.size, thing.color, thing.shape, *([thing.place] if placed else []))
            cells[thing.cell] = [self._ids(word)[0] for word in words]
        return Scene([self.tokenizer.bos_token_id] * len(cells), cells)

    def _dense(self, scene: Scene, asked: Sequence[tuple[str, str, str]]) -> Document:
        document = Document([self.tokenizer.bos_token_id], [REST])
        document.add_scene(scene, REST)
        for question, answer, kind in asked:
            document.ids += self._ids(question)
            document.probes.append((len(document.ids), kind))
            document.ids += self._ids(answer)
            document.weights += [REST] * len(self._ids(question)) + [ANSWER] * len(
                self._ids(answer)
            )
        return document

    def _with_scene(
        self, ids: Sequence[int], labels: Sequence[int], scene: world.Scene, kinds: Sequence[str]
    ) -> Document:
        """Puts the scene in the image's place and weights each run of targets."""
        document = Document([], [])
        weight, answers = 0.0, iter(kinds)
        for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if token == self.image_id:
                document.add_scene(self._scene(scene), 0.0)
                continue
            if label != IGNORE_INDEX and labels[position - 1] == IGNORE_INDEX:
                weight = CAPTION
                if kinds:
                    is_answer = ids[position - 2] in self.assistant_ids
                    weight = ANSWER if is_answer else QUESTION
                    if is_answer and (kind := next(answers)) != "describe":
                        document.probes.append((len(document.ids), kind))
                    elif is_answer:
                        weight = CAPTION
            document.ids.append(token)
            document.weights.append(0.0 if label == IGNORE_INDEX else weight)
        return document

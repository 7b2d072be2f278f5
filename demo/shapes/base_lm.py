"""The base language model: a small Llama taught, step by step, to look things up in its context.

Small transformers find in-context lookup suddenly and late when they must find it through long
conversations. Short documents in which nearly every token is a lookup (`recall`) bring it within a
few hundred steps; questions, roles and the real templates are then put around it.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import world
from muon import make_optimizers, take_step
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sqllava.conversation import TEMPLATES, Template, Turn
from sqllava.encoding import (
    IGNORE_INDEX,
    add_image_token,
    encode_prompt,
    encode_record,
    image_token_id,
)

logger = logging.getLogger(__name__)

# What a target counts in the loss: answers are the lessons, the rest is there to be fluent.
ANSWER, CAPTION, QUESTION, REST = 1.0, 0.5, 0.2, 0.05
_WINDOW = 100
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
    """Token ids, the weight of each as a target, and where which kind of answer begins."""

    ids: list[int]
    weights: list[float]
    probes: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Phase:
    """A lesson: shares of document makers, and the accuracy that every kind must reach to go on."""

    name: str
    makers: dict[str, float]
    goal: float
    max_steps: int


PHASES = (
    Phase("pairs", {"pairs": 0.75, "copies": 0.25}, 0.9, 1000),
    Phase("recall", {"recall": 0.9, "copies": 0.1}, 0.97, 2500),
    Phase("questions", {"recall": 0.25, "questions": 0.75}, 0.97, 3000),
    Phase("roles", {"recall": 0.05, "questions": 0.25, "bare": 0.55, "caption": 0.15}, 0.97, 2000),
    Phase("templates", {"questions": 0.1, "bare": 0.25, "chat": 0.5, "caption": 0.15}, 2.0, 1500),
)


def make_lm_config(vocab_size: int) -> LlamaConfig:
    """The architecture of the base language model."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@torch.no_grad()
def prime(model: LlamaForCausalLM) -> None:
    """Starts the attention heads near what lookup is made of; training then finds it in minutes.

    The first layer's heads look one, two, three and four tokens back, so that a thing's last word
    knows its other words. The other layers' heads look for words like their own, and all heads
    copy what they see (as in "mimetic initialization", Trockman and Kolter, 2023). Started at
    random, such small models name any thing of the scene for tens of thousands of documents.
    """
    config = model.config
    width, head_dim = config.hidden_size, config.head_dim
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=0.2)
    # What all words have in common carries the queries and keys that depend on positions alone.
    common = 0.2 * (width / 2) ** 0.5
    embedding[:, 0] = common
    seen = common / (embedding.square().mean(dim=-1).sqrt().mean())
    model.lm_head.weight.copy_(0.25 * embedding)
    model.lm_head.weight[:, 0] = 0.0
    angles = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    sharp = 6.0 * (angles > 0.03)  # Slowly turning pairs do not tell neighbours apart.
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        copy = torch.nn.init.orthogonal_(torch.empty(width, width)) * 0.45
        attention.v_proj.weight.copy_(copy)
        attention.o_proj.weight.copy_(copy.T)
        if number:
            like = torch.empty(width, width).normal_(std=0.07)
            like[:, 0] = 0.0
            attention.q_proj.weight.copy_(like)
            attention.k_proj.weight.copy_(like)
            continue
        for head in range(config.num_attention_heads):
            back = (head + 1) * angles
            rows = slice(head * head_dim, (head + 1) * head_dim)
            attention.q_proj.weight[rows, 0] = torch.cat([sharp, torch.zeros_like(sharp)]) / seen
            attention.k_proj.weight[rows, 0] = torch.cat([sharp * back.cos(), sharp * back.sin()]) / seen


# --- documents ------------------------------------------------------------------------------------


class DocumentMaker:
    """Draws the base model's documents; the scene stands, in words, where an image will stand."""

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
            # Forward copying comes first and lays the ground for backward copying: ask both ways.
            for word in words.values():
                if (
                    sum(word in (other.color, other.size, other.place) for other in scene.things)
                    == 1
                ):
                    asked.append((f"shape {word}", thing.shape, "shape"))
            if filled and "place" in words:
                words["place"] = f"in the {thing.place} a"
            phrases.append(" ".join([*words.values(), thing.shape]))
        ids = [self.tokenizer.bos_token_id, *self._tokenize(", ".join(phrases) + ".")]
        return self._dense(ids, self.rng.choices(asked, k=RECALL_QUERIES))

    def questions(self) -> Document:
        """A scene, then questions each followed directly by its answer."""
        scene = world.sample_any_scene(self.rng)
        drawn = world.sample_questions(scene, self.rng, 12, unseen_negatives=True)
        return self._dense(self._start(scene), [(q.text, q.answer, q.kind) for q in drawn])

    def chat(self, template: Template) -> Document:
        """A conversation of the real data's form, in the ids that training gives it."""
        scene = world.sample_any_scene(self.rng)
        turns = [
            (q.text, q.answer, q.kind) for q in world.sample_questions(scene, self.rng, 10, True)
        ]
        if self.rng.random() < 0.4:
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
        """The scene's things in any order; captions themselves go in reading order."""
        return world.describe(world.Scene(tuple(self.rng.sample(scene.things, len(scene.things)))))

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenize(text)
        return self._cache[text]

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _scene_ids(self, scene: world.Scene) -> list[int]:
        return self._tokenize(self._in_words(scene))

    def _start(self, scene: world.Scene) -> list[int]:
        return [self.tokenizer.bos_token_id, *self._scene_ids(scene)]

    def _dense(self, ids: list[int], asked: Sequence[tuple[str, str, str]]) -> Document:
        document = Document(ids, [REST] * len(ids))
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
        """Puts the scene's words in place of the image and weights each run of targets by what it is."""
        document = Document([], [])
        weight, answers = 0.0, iter(kinds)
        for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if token == self.image_id:
                words = self._scene_ids(scene)
                document.ids += words
                document.weights += [0.0] * len(words)
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


# --- training -------------------------------------------------------------------------------------


@dataclass
class Batch:
    ids: Tensor
    weights: Tensor
    probes: list[tuple[int, int, str]]


def collate(documents: Sequence[Document]) -> Batch:
    """Pads documents to one length; the padding has no weight."""
    length = max(len(document.ids) for document in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    weights = torch.zeros(len(documents), length)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.weights)
    probes = [
        (row, at, kind) for row, document in enumerate(documents) for at, kind in document.probes
    ]
    return Batch(ids, weights, probes)


def lesson(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, list[bool]]:
    """The weighted loss of a batch, and which of its probed answers are right."""
    hidden = model.model(input_ids=batch.ids[:, :-1]).last_hidden_state
    weights, targets = batch.weights[:, 1:], batch.ids[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[chosen])
    losses = torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="none")
    right = torch.zeros_like(chosen)
    right[chosen] = logits.argmax(-1) == targets[chosen]
    loss = (losses * weights[chosen]).sum() / weights[chosen].sum()
    return loss, [bool(right[row, at - 1]) for row, at, _ in batch.probes]


def train_lm(
    tokenizer: PreTrainedTokenizerBase,
    *,
    phases: Sequence[Phase] = PHASES,
    batch_size: int = 32,
    minutes: float = 60.0,
    seed: int = 0,
    model: LlamaForCausalLM | None = None,
    on_window: Callable[[LlamaForCausalLM, dict[str, Any]], None] = lambda model, row: None,
) -> tuple[LlamaForCausalLM, list[dict[str, Any]]]:
    """Trains the base language model phase by phase.

    Args:
        tokenizer: As `base_tokenizer` makes it.
        phases: The curriculum; the last phase's rate falls to zero over its steps.
        batch_size: Documents a step.
        minutes: The wall-clock budget; what is left over when it ends is not trained.
        seed: Of the weights and of the documents.
        model: A model to go on with.
        on_window: Called after every window of steps with the model and the window's curve row.

    Returns:
        The model and its curve: loss and accuracy per kind for each window of steps.
    """
    torch.manual_seed(seed)
    vocab_size = len(tokenizer)
    maker = DocumentMaker(tokenizer, seed)
    if model is None:
        model = LlamaForCausalLM(make_lm_config(vocab_size))
        prime(model)
    optimizers = make_optimizers(model, muon_lr=0.02, adam_lr=3e-3)
    start, steps, curve = time.monotonic(), 0, []
    for phase in phases:
        final = phase is phases[-1]
        right, asked, losses = Counter(), Counter(), []
        for step in tqdm(range(1, phase.max_steps + 1), desc=f"language model: {phase.name}"):
            loss, hits = lesson(
                model, batch := collate([maker.draw(phase.makers) for _ in range(batch_size)])
            )
            loss.backward()
            decay = 1.0 - (step - 1) / phase.max_steps if final else 1.0
            take_step(optimizers, min(1.0, (steps + 1) / 50) * decay)
            steps += 1
            losses.append(loss.item())
            for (_, _, kind), hit in zip(batch.probes, hits, strict=True):
                right[kind] += hit
                asked[kind] += 1
            if step % _WINDOW and step < phase.max_steps:
                continue
            accuracy = {kind: round(right[kind] / asked[kind], 4) for kind in sorted(asked)}
            row = {
                "phase": phase.name,
                "step": steps,
                "seconds": round(time.monotonic() - start, 1),
                "loss": round(sum(losses) / len(losses), 4),
                "accuracy": accuracy,
            }
            curve.append(row)
            logger.info("%s", row)
            on_window(model, row)
            right, asked, losses = Counter(), Counter(), []
            if min(accuracy.values()) >= phase.goal or time.monotonic() - start > 60 * minutes:
                break
    return model, curve


# --- the check ------------------------------------------------------------------------------------


@torch.no_grad()
def text_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scenes: int = 300,
    seed: int = 1,
    template: str = "v1",
) -> dict[str, float]:
    """Exact match on one question of each kind about each of many scenes given as text.

    Args:
        model: A causal language model of the world.
        tokenizer: Its tokenizer.
        scenes: How many scenes are drawn.
        seed: Of the scenes and questions.
        template: The conversation template of the prompts.

    Returns:
        Accuracy per kind ("color"), per kind and number of things ("color/3"), and over "all".
    """
    rng = random.Random(seed)
    cases: list[tuple[list[int], list[int], list[str]]] = []
    for _ in range(scenes):
        scene = world.sample_any_scene(rng)
        for kind in world.KINDS:
            if question := world.sample_question(scene, rng, kind, unseen_negatives=True):
                text = f"The image shows {world.describe(scene)}\n{question.text}"
                prompt = encode_prompt(
                    [Turn("user", text), Turn("assistant", None)], template, tokenizer
                )
                answer = tokenizer(question.answer, add_special_tokens=False).input_ids
                keys = ["all", kind, f"{kind}/{len(scene.things)}"]
                cases.append((prompt, [*answer, tokenizer.eos_token_id], keys))
    right, asked = Counter(), Counter()
    for start in range(0, len(cases), 64):
        group = cases[start : start + 64]
        batch = collate(
            [Document(prompt + answer, [0.0] * len(prompt + answer)) for prompt, answer, _ in group]
        )
        best = model(input_ids=batch.ids).logits.argmax(-1)
        for row, (prompt, answer, keys) in enumerate(group):
            # Greedy decoding gives this answer exactly when each of its tokens is the likeliest.
            at = len(prompt) - 1
            hit = best[row, at : at + len(answer)].tolist() == answer
            right.update(dict.fromkeys(keys, int(hit)))
            asked.update(keys)
    return {key: right[key] / asked[key] for key in sorted(asked)}

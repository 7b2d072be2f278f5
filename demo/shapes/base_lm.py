"""The base language model: a small Llama taught, step by step, to look things up in its context."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import world
from base_text import Document, DocumentMaker
from muon import make_optimizers, take_step
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sqllava.conversation import Turn
from sqllava.encoding import encode_prompt

logger = logging.getLogger(__name__)

_WINDOW = 100
_PARTS = 4
# A blend of four words is as long as one of them.
_BLEND = 0.5


@dataclass(frozen=True)
class Phase:
    """A lesson: shares of document makers, and the accuracy that every kind must reach to go on."""

    name: str
    makers: dict[str, float]
    goal: float
    max_steps: int


PHASES = (
    Phase("pairs", {"pairs": 0.9, "copies": 0.1}, 0.95, 800),
    Phase("recall", {"recall": 0.9, "copies": 0.1}, 0.95, 800),
    Phase("questions", {"recall": 0.25, "questions": 0.75}, 0.93, 1200),
    Phase("roles", {"recall": 0.1, "questions": 0.3, "bare": 0.45, "caption": 0.15}, 0.97, 800),
    Phase("templates", {"questions": 0.3, "bare": 0.3, "chat": 0.15, "caption": 0.25}, 2.0, 1500),
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
            like = torch.empty(width, width).normal_(std=0.09)
            like[:, 0] = 0.0
            attention.q_proj.weight.copy_(like)
            attention.k_proj.weight.copy_(like)
            continue
        attention.q_proj.weight.mul_(0.2)
        attention.k_proj.weight.mul_(0.2)
        for head in range(config.num_attention_heads):
            back = (head + 1) * angles
            rows = slice(head * head_dim, (head + 1) * head_dim)
            attention.q_proj.weight[rows, 0] = torch.cat([sharp, torch.zeros_like(sharp)]) / seen
            attention.k_proj.weight[rows, 0] = (
                torch.cat([sharp * back.cos(), sharp * back.sin()]) / seen
            )


# --- training -------------------------------------------------------------------------------------


@dataclass
class Batch:
    ids: Tensor
    weights: Tensor
    probes: list[tuple[int, int, str]]
    cells: list[tuple[int, int, list[int]]]


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
    cells = [
        (row, at, w) for row, document in enumerate(documents) for at, w in document.cells.items()
    ]
    return Batch(ids, weights, probes, cells)


def embed(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Embeddings of a batch; a cell is its words blended in noise, an empty one noise alone."""
    table = model.model.embed_tokens
    embeddings = table(batch.ids)
    if not batch.cells:
        return embeddings
    rows, places, words = zip(*batch.cells, strict=True)
    counts = torch.tensor([len(some) for some in words])
    flat = table(torch.tensor([word for some in words for word in some]))
    owner = torch.repeat_interleave(torch.arange(len(words)), counts)
    blends = torch.zeros(len(words), embeddings.shape[-1]).index_add(0, owner, flat) * _BLEND
    # In half of the documents the words are faint: the model learns to use what little there is,
    # and so gives stage 1's projector a slope to go down from its first steps on.
    documents, row = len(batch.ids), torch.tensor(rows)
    faint = torch.rand(documents, 1) < 0.5
    strength = torch.where(faint, torch.rand(documents, 1), 1.0)
    noise = torch.rand(documents, 1) * table.weight.detach().square().mean().sqrt()
    blends = strength[row] * blends + noise[row] * torch.randn_like(blends)
    # What all cells share, as all tokens of an image do.
    shared = noise * torch.rand(documents, 1) * 2 * torch.randn(documents, blends.shape[-1])
    blends = blends + shared[row]
    return embeddings.index_put((row, torch.tensor(places)), blends)


def lesson(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, list[bool]]:
    """The weighted sum of a batch's losses, and which of its probed answers are right."""
    hidden = model.model(inputs_embeds=embed(model, batch)[:, :-1]).last_hidden_state
    weights, targets = batch.weights[:, 1:], batch.ids[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[chosen])
    losses = torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="none")
    right = torch.zeros_like(chosen)
    right[chosen] = logits.argmax(-1) == targets[chosen]
    return (losses * weights[chosen]).sum(), [
        bool(right[row, at - 1]) for row, at, _ in batch.probes
    ]


def learn(model: LlamaForCausalLM, documents: Sequence[Document], tally: Tally) -> None:
    """Runs one step's documents forward and backward, in parts of like length: padded to the
    longest, drills would cost as much as conversations."""
    ordered = sorted(documents, key=lambda document: len(document.ids))
    size = math.ceil(len(ordered) / _PARTS)
    total = sum(sum(document.weights[1:]) for document in documents)
    mean = 0.0
    for start in range(0, len(ordered), size):
        batch = collate(ordered[start : start + size])
        loss, hits = lesson(model, batch)
        (loss / total).backward()
        mean += loss.item() / total
        tally.count(batch, hits)
    tally.losses.append(mean)


@dataclass
class Tally:
    """Losses and right answers per kind since the last row of the curve."""

    losses: list[float] = field(default_factory=list)
    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def count(self, batch: Batch, hits: Sequence[bool]) -> None:
        for (_, _, kind), hit in zip(batch.probes, hits, strict=True):
            self.right[kind] += hit
            self.asked[kind] += 1

    def row(self) -> dict[str, Any]:
        accuracy = {kind: round(self.right[kind] / n, 4) for kind, n in sorted(self.asked.items())}
        loss = round(sum(self.losses) / len(self.losses), 4)
        return {"loss": loss, "accuracy": accuracy, "lowest": min(accuracy.values())}


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
        minutes: The wall-clock budget. When the steps would need more, the last phase is cut short.
        seed: Of the weights and of the documents.
        model: A model to go on with.
        on_window: Called after every window of steps with the model and the window's curve row.

    Returns:
        The model and its curve: loss and accuracy per kind for each window of steps.
    """
    torch.manual_seed(seed)
    if model is None:
        model = LlamaForCausalLM(make_lm_config(len(tokenizer)))
        prime(model)
    maker = DocumentMaker(tokenizer, seed)
    optimizers = make_optimizers(model, muon_lr=0.02, adam_lr=3e-3)
    start, steps, curve = time.monotonic(), 0, []
    for phase in phases:
        tally, begun = Tally(), time.monotonic()
        left = 60 * minutes - (begun - start)
        for step in tqdm(range(1, phase.max_steps + 1), desc=f"language model: {phase.name}"):
            learn(model, [maker.draw(phase.makers) for _ in range(batch_size)], tally)
            gone = max(step / phase.max_steps, (time.monotonic() - begun) / max(left, 1.0))
            decay = max(0.0, 1.0 - gone) if phase is phases[-1] else 1.0
            steps += 1
            take_step(optimizers, min(1.0, steps / 50) * decay)
            if step % _WINDOW and gone < 1:
                continue
            seconds = round(time.monotonic() - start, 1)
            row = {"phase": phase.name, "step": steps, "seconds": seconds, **tally.row()}
            curve.append(row)
            logger.info("%s", row)
            on_window(model, row)
            tally = Tally()
            if row["lowest"] >= phase.goal or gone >= 1:
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
    """Exact match on one question of each kind, and on the description, of scenes given as text.

    Args:
        model: A causal language model of the world.
        tokenizer: Its tokenizer.
        scenes: How many scenes are drawn.
        seed: Of the scenes and questions.
        template: The conversation template of the prompts.

    Returns:
        Accuracy per kind ("color"), per kind and number of things ("color/3"), and over "all".
    """
    cases = _text_cases(tokenizer, scenes, seed, template)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, len(cases), 64):
        group = cases[start : start + 64]
        documents = [
            Document(prompt + answer, [0.0] * len(prompt + answer)) for prompt, answer, _ in group
        ]
        best = model(input_ids=collate(documents).ids).logits.argmax(-1)
        for row, (prompt, answer, keys) in enumerate(group):
            # Greedy decoding gives this answer exactly when each of its tokens is the likeliest.
            at = len(prompt) - 1
            hit = best[row, at : at + len(answer)].tolist() == answer
            right.update(dict.fromkeys(keys, int(hit)))
            asked.update(keys)
    return {key: right[key] / asked[key] for key in sorted(asked)}


def _text_cases(
    tokenizer: PreTrainedTokenizerBase, scenes: int, seed: int, template: str
) -> list[tuple[list[int], list[int], list[str]]]:
    """Prompts, their answers' ids and the figures that each counts for."""
    rng = random.Random(seed)
    cases = []
    for scene in (world.sample_any_scene(rng) for _ in range(scenes)):
        describe = world.Question(world.DESCRIBE, world.describe(scene), "describe")
        sampled = [world.sample_question(scene, rng, kind, True) for kind in world.KINDS]
        for question in [*sampled, describe]:
            if question is not None:
                kind = question.kind
                text = f"The image shows {world.describe(scene)}\n{question.text}"
                turns = [Turn("user", text), Turn("assistant", None)]
                prompt = encode_prompt(turns, template, tokenizer)
                answer = tokenizer(question.answer, add_special_tokens=False).input_ids
                keys = ["all", kind, f"{kind}/{len(scene.things)}"]
                cases.append((prompt, [*answer, tokenizer.eos_token_id], keys))
    return cases

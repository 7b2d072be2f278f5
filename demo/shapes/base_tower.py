"""The base vision tower: a small CLIP tower trained by contrast, whole picture against caption and
each cell's patch against its own phrase."""

from __future__ import annotations

import io
import json
import logging
import random
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from muon import make_optimizers, take_step
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

logger = logging.getLogger(__name__)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SELECT_LAYER = -2
# Busier pictures than the system will see hold more lessons each.
MOST_THINGS = 6
GRAY = 0.3
COLOR_WORD = 1  # The place of the color among a phrase's words.
CELLS = world.GRID * world.GRID
WORDS = (*world.COLORS, *world.SHAPES, *world.SIZES, *world.PLACES, "nothing", "colorless")
_WORD = {word: number for number, word in enumerate(WORDS)}
_POOL_SEED = 977


def make_tower_config() -> CLIPVisionConfig:
    """The architecture of the base tower: one patch a cell, so nine image tokens."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=world.IMAGE_SIZE,
        patch_size=world.CELL,
        projection_dim=128,
        hidden_act="quick_gelu",
    )


def write_preprocessor(folder: Path) -> None:
    """Writes the image processor's file in the form that CLIP's checkpoints have."""
    size = world.IMAGE_SIZE
    config = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(config, indent=1) + "\n", encoding="utf-8"
    )


# --- pictures -------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Pictures as bytes [n, 3, size, size]; the words of each cell's phrase [n, cells, words]."""

    pictures: Tensor
    words: Tensor

    def pixels(self, index: Tensor) -> Tensor:
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        return (self.pictures[index].float() / 255 - mean) / std


def make_pool(count: int, seed: int, held_out: bool = False) -> Pool:
    """Renders pictures in two processes.

    Args:
        count: How many pictures.
        seed: Of the whole pool.
        held_out: Whether these are evaluation scenes of the world with a held-out pair in each,
            rather than training pictures, which never have one.
    """
    with get_context("spawn").Pool(2) as workers:
        jobs = [(seed * _POOL_SEED + number, held_out) for number in range(count)]
        done = list(
            tqdm(
                workers.imap(_draw, jobs, chunksize=64), total=count, desc="pictures for the tower"
            )
        )
    pictures = (
        torch.from_numpy(np.stack([picture for picture, _ in done]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    return Pool(pictures, torch.tensor([words for _, words in done]))


def _draw(job: tuple[int, bool]) -> tuple[np.ndarray, list[list[int]]]:
    seed, held_out = job
    rng = random.Random(seed)
    scene = world.sample_scene(rng, True) if held_out else _busy_scene(rng)
    file = io.BytesIO()
    world.render(scene, rng).save(file, "JPEG", quality=world.JPEG_QUALITY)
    words = [["nothing", "nothing", "nothing", place] for place in world.PLACES]
    for thing in scene.things:
        words[thing.cell] = [thing.size, thing.color, thing.shape, thing.place]
    return np.asarray(Image.open(file)), [[_WORD[word] for word in cell] for cell in words]


def _busy_scene(rng: random.Random) -> world.Scene:
    pairs = [(color, shape) for color in world.COLORS for shape in world.SHAPES]
    seen = [pair for pair in pairs if pair not in world.HELD_OUT]
    return world.place_things(rng.choices(seen, k=rng.randint(1, MOST_THINGS)), rng)


# --- training -------------------------------------------------------------------------------------


class Contrast(nn.Module):
    """The tower with what only training needs: text embeddings and projections."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.text = nn.EmbeddingBag(len(WORDS), config.projection_dim, mode="sum")
        self.caption = nn.Linear(config.projection_dim, config.projection_dim)
        self.local = nn.Linear(config.hidden_size, config.projection_dim)
        self.whole = nn.Linear(config.hidden_size, config.projection_dim)
        self.scale = nn.Parameter(torch.tensor([2.3, 2.3]))

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the two contrasts' losses and the share of filled cells whose phrase is found."""
        out = self.tower(pixel_values=pixels, output_hidden_states=True)
        phrases, target = torch.unique(words.flatten(0, 1), dim=0, return_inverse=True)
        # The layer that the system reads is the one that must know each cell.
        cells = normalize(self.local(out.hidden_states[SELECT_LAYER][:, 1:]), dim=-1).flatten(0, 1)
        embedded = self.text(phrases)
        logits = self.scale[0].exp() * cells @ normalize(embedded, dim=-1).T
        losses = cross_entropy(logits, target, reduction="none")
        filled = words.flatten(0, 1)[:, 0] != _WORD["nothing"]
        local = losses[filled].mean() + 0.3 * losses[~filled].mean()
        captions = normalize(
            self.caption(embedded[target].view(*words.shape[:2], -1).sum(1)), dim=-1
        )
        pictures = normalize(self.whole(out.pooler_output), dim=-1)
        pairs = self.scale[1].exp() * pictures @ captions.T
        truth = torch.arange(len(pairs))
        whole = (cross_entropy(pairs, truth) + cross_entropy(pairs.T, truth)) / 2
        return local, whole, (logits.argmax(-1) == target)[filled].float().mean()


def train_tower(
    *,
    pictures: int = 12000,
    steps: int = 1500,
    batch_size: int = 64,
    minutes: float = 30.0,
    seed: int = 0,
) -> tuple[CLIPVisionModel, list[dict[str, Any]]]:
    """Trains the tower; returns it with its curve."""
    torch.manual_seed(seed)
    pool = make_pool(pictures, seed)
    model = Contrast(make_tower_config())
    optimizers = make_optimizers(model, muon_lr=0.01, adam_lr=1e-3)
    start, curve = time.monotonic(), []
    for step in tqdm(range(1, steps + 1), desc="vision tower"):
        index = torch.randint(len(pool.pictures), (batch_size,))
        pixels, words = pool.pixels(index), pool.words[index]
        # In gray, and with no color in its phrases, a picture teaches shapes whatever their color.
        gray = torch.rand(batch_size) < GRAY
        pixels[gray] = pixels[gray].mean(dim=1, keepdim=True).expand_as(pixels[gray])
        words[gray, :, COLOR_WORD] = _WORD["colorless"]
        local, whole, accuracy = model(pixels, words)
        (local + 0.2 * whole).backward()
        # By steps or by time, whichever ends first: the rate reaches zero there.
        gone = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        take_step(optimizers, min(1.0, step / 100, max(0.0, 2.0 * (1.0 - gone))))
        if step % 200 == 0 or gone >= 1:
            row = {
                "step": step,
                "local": local.item(),
                "whole": whole.item(),
                "phrase_accuracy": accuracy.item(),
            }
            curve.append({key: round(value, 4) for key, value in row.items()})
            logger.info("%s", curve[-1])
        if gone >= 1:
            break
    return model.tower, curve


# --- the check ------------------------------------------------------------------------------------


@torch.no_grad()
def features(tower: CLIPVisionModel, pool: Pool) -> Tensor:
    """Patch features [n, cells, width] at the layer that the system reads."""
    parts = []
    for index in torch.arange(len(pool.pictures)).split(256):
        out = tower(pixel_values=pool.pixels(index), output_hidden_states=True)
        parts.append(out.hidden_states[SELECT_LAYER][:, 1:])
    return torch.cat(parts)


def probe_tower(tower: CLIPVisionModel, *, pictures: int = 3000, seed: int = 5) -> dict[str, float]:
    """Accuracy of linear probes for each attribute, on new pictures and on held-out pairs.

    Args:
        tower: The tower.
        pictures: How many pictures the probes are fitted on; a third as many test them.
        seed: Of the pictures, which no training has seen.

    Returns:
        Accuracy for "size", "color", "shape", "place" and "filled", each also with "unseen_".
    """
    fit = make_pool(pictures, seed)
    tests = {
        "": make_pool(pictures // 3, seed + 1),
        "unseen_": make_pool(pictures // 3, seed + 2, True),
    }
    x = features(tower, fit)
    result = {}
    for column, name in enumerate(("size", "color", "shape", "place")):
        weights = _fit_linear(*_cells(x, fit.words, column))
        for prefix, pool in tests.items():
            inputs, labels = _cells(features(tower, pool), pool.words, column)
            right = (_with_one(inputs) @ weights).argmax(-1) == labels
            result[prefix + name] = round(right.float().mean().item(), 4)
    return result


def _cells(inputs: Tensor, words: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """The filled cells' features and words."""
    filled = words[..., 0] != _WORD["nothing"]
    return inputs[filled], words[filled][:, column]


def _with_one(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)


def _fit_linear(inputs: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression by LBFGS."""
    x = _with_one(inputs)
    weights = torch.zeros(x.shape[1], len(WORDS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weights, labels) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()

"""What a step of training computes, counted on the real modules with LoRA as it is, and the share
of the card's peak that this is (MFU).

Beside the trainer, which logs it. Nothing here is a formula of a model: PyTorch counts the matrix
products that forward and backward run, on the meta device, and a product that backward leaves out
(a frozen weight has no gradient) is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sqllava.model.adapters import Training, prepare_training
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.train.zero import whole_models

# Dense bfloat16 peaks (float16 on V100 and T4) of the makers' data sheets, in TFLOP/s, by what the
# card's name holds; the first that fits counts.
PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "4090": 165,
    "3090": 71,
    "V100": 125,
    "T4": 65,
}

# Tokens of the shorter of two texts that are counted; any number gives the same.
_SHORT = 64


@dataclass(frozen=True)
class Work:
    """How much a step, or part of one, holds of what costs.

    Attributes:
        tokens: that the language model reads, each as often as it stands in a row.
        pairs: of tokens of which one attends to the other.
        images: that the tower reads.
        targets: positions at which the head runs.
    """

    tokens: float = 0
    pairs: float = 0
    images: float = 0
    targets: float = 0


@dataclass(frozen=True)
class Costs:
    """Floating-point operations, forward and backward, of one of each; see `Work`.

    What checkpointing computes a second time is left out: it is no work that the model asks for.
    """

    token: float
    pair: float
    image: float
    target: float

    def of(self, work: Work) -> float:
        """The operations that some work takes."""
        return (
            self.token * work.tokens
            + self.pair * work.pairs
            + self.image * work.images
            + self.target * work.targets
        )


def costs_of(config: SQLlavaConfig, training: Training) -> Costs:
    """Counts the operations of a model that trains so.

    Args:
        config: of the whole model; its weights are not needed.
    """
    # A copy of plain values: attention is PyTorch's own, which it can count.
    config = SQLlavaConfig.from_dict(config.to_dict())
    with whole_models(), torch.device("meta"):
        model: Any = prepare_training(SQLlavaForConditionalGeneration(config), training)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    learns = any(p.requires_grad for p in _before_the_language_model(inner).parameters())

    def read(length: int) -> float:
        width = inner.config.get_text_config().hidden_size
        states = torch.zeros(1, length, width, device="meta", requires_grad=learns)
        return _counted(lambda: inner.model.language_model(inputs_embeds=states)[0])

    def head(targets: int) -> float:
        width = inner.config.get_text_config().hidden_size
        return _counted(
            lambda: inner.lm_head(torch.zeros(targets, width, device="meta", requires_grad=True))
        )

    def see() -> float:
        size = inner.config.vision_config.image_size
        pixels = torch.zeros(1, 3, size, size, device="meta")
        return _counted(lambda: torch.cat(inner.model.get_image_features(pixels).pooler_output))

    # Of n tokens that all attend to all, n * token + n * n * pair.
    short, long = read(_SHORT), read(2 * _SHORT)
    pair = (long - 2 * short) / (2 * _SHORT * _SHORT)
    return Costs(short / _SHORT - pair * _SHORT, pair, see(), head(1))


def _before_the_language_model(model: Any) -> nn.Module:
    return nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])


def _counted(forward: Callable[[], torch.Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        output = forward()
        if output.requires_grad:
            output.sum().backward()
    return float(counter.get_total_flops())


def peak_flops(card: str) -> float | None:
    """Operations a second that a card can do at most; None for one that is not known.

    Args:
        card: as `torch.cuda.get_device_name` gives it.
    """
    words = card.replace("-", " ").split()
    known = (peak for name, peak in PEAK_TFLOPS.items() if _holds(words, name.split()))
    peak = next(known, None)
    return None if peak is None else peak * 1e12


def _holds(words: list[str], name: list[str]) -> bool:
    return all(part in words for part in name)

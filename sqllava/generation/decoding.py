"""Decoding: how a text is written, greedily or sampled, and how long it may get.

What asking, the page and the writer take; it imports nothing heavy, as the command lines read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.generation.logits_process import LogitsProcessorList

ANSWER_TOKENS = 1024
QUESTION_TOKENS = 300


@dataclass(frozen=True)
class Decoding:
    """How texts are written: greedily without a temperature, sampled with one.

    Attributes:
        samples: texts per conversation; more than one needs a temperature.
        temperature, top_k, top_p: of the sampling; None leaves the last two out.
        num_beams: beams of a search without sampling.
    """

    max_new_tokens: int = ANSWER_TOKENS
    samples: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature must be above 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top k must be 0 (all) or more, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top p must be above 0 and at most 1, found {self.top_p}")
        if self.temperature is None and self.samples > 1:
            raise ValueError(f"{self.samples} samples need a temperature: they would all be equal")

    @property
    def do_sample(self) -> bool:
        return self.temperature is not None

    def warpers(self) -> LogitsProcessorList:
        """What makes the distribution to sample from of the model's logits."""
        from transformers.generation.logits_process import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        warpers = LogitsProcessorList()
        if self.temperature is not None:
            warpers.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                warpers.append(TopKLogitsWarper(self.top_k))
            if self.top_p is not None and self.top_p < 1:
                warpers.append(TopPLogitsWarper(self.top_p))
        return warpers

    def options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.samples,
            "num_beams": self.num_beams,
            "do_sample": self.do_sample,
        }
        if self.do_sample:
            options |= {
                "temperature": self.temperature,
                "top_k": self.top_k or 0,
                "top_p": 1.0 if self.top_p is None else self.top_p,
            }
        return options


GREEDY = Decoding()

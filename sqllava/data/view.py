"""How a model sees data: its tokenizer, its image preprocessing, its placeholders per image.

What the data commands know of a model; training has the same things from its own processor.
transformers is imported where a model is opened: the commands' help does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from sqllava.conversation import Template
from sqllava.data.images import ImagePreparer
from sqllava.data.lengths import Measure
from sqllava.encoding import add_image_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# CLIP ViT-L/14-336, the recipe's tower.
_EDGE, _IMAGE_TOKENS = 336, 576


@dataclass(frozen=True)
class View:
    """Attributes:
    tokenizer: None where no model was named: then texts are shown, and lengths estimated.
    image_tokens: placeholders per image.
    open_preparer: gives `prepare_image`, which most commands never ask for.
    """

    tokenizer: PreTrainedTokenizerBase | None
    image_tokens: int
    open_preparer: Callable[[], ImagePreparer]

    @cached_property
    def prepare_image(self) -> ImagePreparer:
        """An RGB image -> pixel values."""
        return self.open_preparer()

    def measure(self, template: Template | str) -> Measure:
        """Counts tokens in a template; ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("counting tokens needs --model, for its tokenizer")
        return Measure(self.tokenizer, template, self.image_tokens)


def open_view(model: str | None, aspect_ratio: str = "pad") -> View:
    """The view of a model.

    Args:
        model: a directory that training made, or a language model's folder or id, which is seen
            with the recipe's tower; None for the recipe's tower alone.
        aspect_ratio: "pad" or "crop", for what has no settings of its own.
    """
    if model is None:
        return View(None, _IMAGE_TOKENS, partial(_recipe_preparer, aspect_ratio))
    from transformers import AutoProcessor, AutoTokenizer

    if (Path(model) / "processor_config.json").exists():
        processor = AutoProcessor.from_pretrained(model)
        preparer = partial(ImagePreparer, processor.image_processor)
        return View(processor.tokenizer, processor.image_tokens, preparer)
    tokenizer = AutoTokenizer.from_pretrained(model)
    add_image_token(tokenizer)
    return View(tokenizer, _IMAGE_TOKENS, partial(_recipe_preparer, aspect_ratio))


def _recipe_preparer(aspect_ratio: str) -> ImagePreparer:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return ImagePreparer(
        LlavaImageProcessorPil(
            size={"shortest_edge": _EDGE},
            crop_size={"height": _EDGE, "width": _EDGE},
            do_pad=aspect_ratio == "pad",
        )
    )

"""How a model sees data: its tokenizer, its image preprocessing, its placeholders per image.

What the data commands know of a model; training has the same things from its own processor.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.conversation import Template
from sqllava.data.images import ImagePreparer
from sqllava.data.lengths import Measure
from sqllava.encoding import add_image_token

# CLIP ViT-L/14-336, the recipe's tower.
_EDGE, _IMAGE_TOKENS = 336, 576


@dataclass(frozen=True)
class View:
    """Attributes:
    tokenizer: None where no model was named: then texts are shown, and lengths estimated.
    prepare_image: an RGB image -> pixel values.
    image_tokens: placeholders per image.
    """

    tokenizer: PreTrainedTokenizerBase | None
    prepare_image: ImagePreparer
    image_tokens: int

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
    if model is not None and (Path(model) / "processor_config.json").exists():
        processor = AutoProcessor.from_pretrained(model)
        preparer = ImagePreparer(processor.image_processor)
        return View(processor.tokenizer, preparer, processor.image_tokens)
    published = LlavaImageProcessorPil(
        size={"shortest_edge": _EDGE},
        crop_size={"height": _EDGE, "width": _EDGE},
        do_pad=aspect_ratio == "pad",
    )
    tokenizer = None
    if model is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        add_image_token(tokenizer)
    return View(tokenizer, ImagePreparer(published), _IMAGE_TOKENS)

"""How a model sees data: its tokenizer, its image preprocessing, its placeholders per image.

What the data commands know of a model; training has the same things from its own processor.
transformers is imported where a model is opened: the commands' help does without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqllava.conversation import Template
from sqllava.data.lengths import Measure
from sqllava.encoding import add_image_token
from sqllava.pixels import ImagePreparer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# CLIP ViT-L/14-336, the recipe's tower.
_EDGE, _IMAGE_TOKENS = 336, 576
_PROCESSOR = "processor_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


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

    Raises:
        ValueError: the model has no tokenizer, or no processor of ours, that opens; saying why.
    """
    if model is None:
        return View(None, _IMAGE_TOKENS, partial(_recipe_preparer, aspect_ratio))
    from transformers import AutoProcessor, AutoTokenizer

    if _has_file(model, _PROCESSOR):
        processor = _opened(AutoProcessor, model)
        image_tokens = getattr(processor, "image_tokens", None)
        if image_tokens is None:
            raise ValueError(
                f"--model {model}: its processor is a {type(processor).__name__}, not one of ours; "
                "name a directory that training made, or a language model"
            )
        preparer = partial(ImagePreparer, processor.image_processor)
        return View(processor.tokenizer, image_tokens, preparer)
    tokenizer = _opened(AutoTokenizer, model)
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


def _has_file(model: str, name: str) -> bool:
    """Whether a model's folder has a file; of one on the hub, whether it is here or there."""
    if Path(model).exists():
        return (Path(model) / name).is_file()
    from transformers.utils.hub import cached_file

    try:
        return cached_file(model, name) is not None
    except (OSError, ValueError):  # no such file, no such model, no connection, no id at all
        return False


def _opened(kind: Any, model: str) -> Any:
    """A tokenizer or a processor; code that a model brings along is never run."""
    try:
        return kind.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever it meets in a folder's files
        raise ValueError(f"--model {model}: {_why(model, error)}") from error


def _why(model: str, error: Exception) -> str:
    folder = Path(model)
    if folder.is_file():
        return "a file; name the model's folder"
    if not folder.exists():
        found = "no such folder, and no model of the hub that is here or can be reached"
        is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)
        return f"{found}; download it first (hf download {model})" if is_id else found
    if (folder / "adapter_config.json").is_file() and not (folder / _PROCESSOR).is_file():
        return "an adapter without its processor's files; name its base, or convert it first"
    if "trust_remote_code" in str(error):
        return "it wants to run code of its own, which is never done; name another"
    if not any((folder / name).is_file() for name in _TOKENIZER):
        return f"holds no tokenizer; expected one of {', '.join(_TOKENIZER)}"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"its tokenizer does not open: {first:.200}"

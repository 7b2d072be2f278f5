"""SQLlavaProcessor: pictures -> pixel values, prompts with `<image>` marks -> ids."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.conversation import IMAGE, Turn
from sqllava.encoding import add_image_token, encode_prompt, encode_text
from sqllava.model.config import SQLlavaConfig

ASPECT_RATIOS = ("pad", "crop")


class SQLlavaProcessor(LlavaProcessor):
    """Prepares text and images for the model.

    Text is encoded by `sqllava.encoding`, so prompts get the ids that training gave them. Batches
    are padded on the left, as generation needs it.
    """

    def __init__(
        self,
        image_processor: LlavaImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str = "default",
        conversation_template: str = "v1_sq",
        chat_template: str | None = None,
        num_additional_image_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None or image_processor is None:
            raise ValueError("an SQLlavaProcessor needs an image processor and a tokenizer")
        add_image_token(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.conversation_template = conversation_template
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            num_additional_image_tokens=num_additional_image_tokens,
        )

    @property
    def image_tokens(self) -> int:
        """Placeholder tokens per image."""
        crop = self.image_processor.crop_size
        patches = (crop["height"] // self.patch_size) * (crop["width"] // self.patch_size)
        return patches + (self.vision_feature_select_strategy == "full")

    def prepare_image(self, image: Image.Image) -> torch.Tensor:
        """One picture -> pixel values [3, H, W], padded to a square or cropped as configured."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def encode_turns(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a prompt whose last turn is open, in the model's own template."""
        return encode_prompt(turns, self.conversation_template, self.tokenizer, self.image_tokens)

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: pictures, in order of their `<image>` marks over the whole batch.
            text: one or several prompts.

        Returns:
            input_ids and attention_mask [B, S] (left-padded), pixel_values [I, 3, H, W].

        Raises:
            ValueError: the number of images is not that of the marks.
        """
        data: dict[str, Any] = {}
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            self._check_count(prompts, images)
            data |= self.pad([encode_text(p, self.tokenizer, self.image_tokens) for p in prompts])
        if images is not None:
            data["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return BatchFeature(data, tensor_type=return_tensors)

    def pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-pads ids into input_ids and attention_mask [B, S]."""
        batch = [{"input_ids": list(ids)} for ids in prompts]
        return dict(self.tokenizer.pad(batch, padding_side="left", return_tensors="pt"))

    @staticmethod
    def _check_count(prompts: Sequence[str], images: Any) -> None:
        marks = sum(prompt.count(IMAGE) for prompt in prompts)
        given = 0 if images is None else 1 if isinstance(images, Image.Image) else len(images)
        if marks != given:
            raise ValueError(f"the text has {marks} {IMAGE} marks, but {given} images were given")


def build_processor(
    config: SQLlavaConfig, tokenizer: PreTrainedTokenizerBase, image_settings: dict[str, Any]
) -> SQLlavaProcessor:
    """Makes the processor that suits a model.

    Args:
        image_settings: the tower's preprocessor_config.json (size, crop, mean, standard deviation).
    """
    if config.image_aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(
            f"unknown image_aspect_ratio {config.image_aspect_ratio!r}; choose from {ASPECT_RATIOS}"
        )
    kept = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    settings = {name: image_settings[name] for name in kept if name in image_settings}
    image_processor = LlavaImageProcessorPil(**settings, do_pad=config.image_aspect_ratio == "pad")
    return SQLlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        conversation_template=config.conversation_template,
    )

"""SQLlavaProcessor: pictures -> pixel values, prompts with `<image>` marks -> ids."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.conversation import IMAGE, Turn, get_template
from sqllava.data.images import ImagePreparer, to_rgb
from sqllava.encoding import add_image_token, encode_prompt, encode_text
from sqllava.model.chat import chat_template as make_chat_template
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
        if chat_template is None:
            chat_template = make_chat_template(get_template(conversation_template), tokenizer)
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
        if self.vision_feature_select_strategy == "full":
            patches += self.num_additional_image_tokens
        return patches

    def prepare_image(self, image: Image.Image) -> torch.Tensor:
        """One picture -> pixel values [3, H, W], padded to a square or cropped as configured."""
        return ImagePreparer(self.image_processor)(to_rgb(image).image)

    def encode_turns(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a prompt whose last turn is open, in the model's own template."""
        return encode_prompt(turns, self.conversation_template, self.tokenizer, self.image_tokens)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: pictures (or their addresses), in order of their `<image>` marks over the whole
                batch; nested as transformers' chat templates give them, or flat.
            text: one or several prompts. One that begins with the BOS token is a rendered chat
                (`apply_chat_template`), and is tokenised as it is; any other is encoded by
                `sqllava.encoding`.
            kwargs: transformers' own for text and images, such as `padding`,
                `return_mm_token_type_ids` and `return_text_replacement_offsets`.

        Returns:
            input_ids and attention_mask [B, S] (left-padded), pixel_values [I, 3, H, W].

        Raises:
            ValueError: the number of images is not that of the marks, truncation is wanted,
                which could cut through an image, or a picture is too large.
        """
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        data: dict[str, Any] = {}
        pictures: list[Any] = []
        if images is not None:
            fetched = self.image_processor.fetch_images(images)
            pictures = [self._bounded(one) for one in cast(Any, make_flat_list_of_images(fetched))]
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            data |= self._encode(prompts, len(pictures), merged)
        if pictures:
            options = merged["images_kwargs"] | {"return_tensors": return_tensors}
            data |= self.image_processor(pictures, **options)
        return BatchFeature(
            data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion
        )

    def _bounded(self, picture: Any) -> Any:
        """A picture that the image processor may take: RGB by our rules (`to_rgb`), and small
        enough for its steps, by way of what they would give."""
        if not isinstance(picture, Image.Image):
            return picture
        preparer = ImagePreparer(self.image_processor)
        rgb = to_rgb(picture).image
        preparer.check(rgb)
        return preparer.view(rgb) if preparer.is_large(rgb) else rgb

    def _encode(
        self, prompts: list[str], pictures: int, merged: dict[str, Any]
    ) -> dict[str, list[Any]]:
        """Prompts -> input_ids, attention_mask, and what else is asked for, as lists."""
        options = merged["text_kwargs"]
        marks = sum(prompt.count(IMAGE) for prompt in prompts)
        if marks != pictures:
            raise ValueError(
                f"the text has {marks} {IMAGE} marks, but {pictures} images were given"
            )
        if options.get("truncation"):
            raise ValueError("truncation could cut through an image: shorten the text instead")
        special = options.get("add_special_tokens", True)
        rows = [{"input_ids": self._prompt_ids(prompt, special)} for prompt in prompts]
        padding = options.get("padding", True)
        data = dict(self.tokenizer.pad(rows, padding=padding, padding_side="left"))
        if options.get("return_mm_token_type_ids", merged["return_mm_token_type_ids"]):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if options.get(
            "return_text_replacement_offsets", merged["return_text_replacement_offsets"]
        ):
            expanded = [IMAGE * self.image_tokens] * marks
            offsets = self.get_text_with_replacements(list(prompts), expanded)[1]
            data["text_replacement_offsets"] = offsets
        return data

    def _prompt_ids(self, prompt: str, special: bool) -> list[int]:
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos):
            expanded = prompt.replace(IMAGE, IMAGE * self.image_tokens)
            return self.tokenizer(expanded, add_special_tokens=False).input_ids
        ids = encode_text(prompt, self.tokenizer, self.image_tokens)
        return ids if special or not bos else ids[1:]

    def pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-pads ids into input_ids and attention_mask [B, S]."""
        batch = [{"input_ids": list(ids)} for ids in prompts]
        return dict(self.tokenizer.pad(batch, padding_side="left", return_tensors="pt"))


def build_processor(
    config: SQLlavaConfig, tokenizer: PreTrainedTokenizerBase, image_settings: dict[str, Any]
) -> SQLlavaProcessor:
    """Makes the processor that suits a model.

    Args:
        image_settings: the tower's preprocessor_config.json (crop, mean, standard deviation). The
            size is that of the tower's own configuration, where its file has another.
    """
    if config.image_aspect_ratio not in ASPECT_RATIOS:
        raise ValueError(
            f"unknown image_aspect_ratio {config.image_aspect_ratio!r}; choose from {ASPECT_RATIOS}"
        )
    kept = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    settings = {name: image_settings[name] for name in kept if name in image_settings}
    size = config.vision_config.image_size
    if settings.get("crop_size") not in (size, {"height": size, "width": size}):
        # SigLIP's says no crop, DINOv2's one that its tower was not made for.
        settings |= {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    image_processor = LlavaImageProcessorPil(**settings, do_pad=config.image_aspect_ratio == "pad")
    return SQLlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        conversation_template=config.conversation_template,
        num_additional_image_tokens=config.class_tokens,
    )

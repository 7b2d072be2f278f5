"""SQLlavaProcessor: pictures -> pixel values, prompts with `<image>` marks -> ids."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from PIL import Image
from transformers import BatchFeature, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.tokenization_utils_base import LARGE_INTEGER

from sqllava.conversation import IMAGE, Turn, get_template
from sqllava.encoding import add_image_token, encode_prompt, encode_text
from sqllava.model.chat import chat_template as make_chat_template
from sqllava.model.config import SQLlavaConfig
from sqllava.model.remote import AUTO_MAP, Portable, write_remote_code
from sqllava.pixels import ImagePreparer, to_rgb

ASPECT_RATIOS = ("pad", "crop")

# Arguments of transformers' processors that have no meaning here, and why.
_REFUSED = {
    "truncation": "could cut through an image: shorten the text instead",
    "return_overflowing_tokens": "belongs to truncation, which could cut through an image",
    "stride": "belongs to truncation, which could cut through an image",
    "is_split_into_words": "is not possible: prompts are texts",
    "text_pair": "is not possible: a prompt is one text",
    "text_target": "is not possible: the labels of a record are made by sqllava.encoding",
    "text_pair_target": "is not possible: a prompt is one text",
    "sanitize_control_tokens": "is not possible: chat templates count images by their marks",
    "image_seq_length": "is not for a call to choose: the model's tower and projector do",
    "videos": "are not possible: the model sees images",
    "audio": "is not possible: the model sees images",
    "audio_from_video_indices": "are not possible: the model sees images",
    "load_audio_from_video": "is not possible: the model sees images",
}
# Of these, what transformers gives with every chat, empty.
_OTHER_MEDIA = ("videos", "audio", "audio_from_video_indices", "load_audio_from_video")
# What says, as None does, that something is not wanted.
_UNWANTED: tuple[Any, ...] = (False, 0, [], "do_not_truncate")


class SQLlavaProcessor(Portable, LlavaProcessor):
    """Prepares text and images for the model.

    Text is encoded by `sqllava.encoding`, so prompts get the ids that training gave them. Batches
    are padded on the left, as generation needs it, unless `padding_side` or the tokenizer's own
    attribute is set afterwards.
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
        tokenizer.padding_side = "left"
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
            kwargs: transformers' own for text and images: of the text's, padding and what else may
                be returned; of the images', those that leave their size. `max_length` is checked
                whether or not it is padded to.

        Returns:
            input_ids and attention_mask [B, S] (left-padded), pixel_values [I, 3, H, W].

        Raises:
            ValueError: there is nothing to prepare, the number of images is not that of the marks,
                a prompt is longer than `max_length`, a picture is too large, or something is asked
                for that cannot be.
        """
        asked = {name: kwargs.pop(name, None) for name in _OTHER_MEDIA}
        merged = self._merge_kwargs(**kwargs)
        _check_wanted(asked | merged["text_kwargs"] | merged["images_kwargs"])
        return_tensors = merged["text_kwargs"].get("return_tensors", return_tensors)
        if images is None and text is None:
            raise ValueError("give text, images, or both")
        data: dict[str, Any] = {}
        pictures: list[Any] = []
        fetched = None
        if images is not None:
            fetched = self.image_processor.fetch_images(images)
            pictures = [self._bounded(one) for one in cast(Any, make_flat_list_of_images(fetched))]
        if text is not None:
            prompts = _prompts(text)
            _check_images(prompts, fetched, len(pictures))
            data |= self._encode(prompts, merged)
        if pictures:
            data |= self._prepare(pictures, merged["images_kwargs"])
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

    def _prepare(self, pictures: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        """Pictures -> pixel_values, of the size that the model takes."""
        if options.get("data_format") not in (None, "channels_first"):
            raise ValueError("the model takes pictures with data_format='channels_first'")
        data = dict(self.image_processor(pictures, **options | {"return_tensors": None}))
        crop = self.image_processor.crop_size
        wanted = (3, crop["height"], crop["width"])
        for picture in data["pixel_values"]:
            if tuple(picture.shape) != wanted:
                raise ValueError(
                    f"the model takes pictures of {wanted}, and these options make "
                    f"{tuple(picture.shape)} of one: leave size and crop as they are"
                )
        return data

    def _encode(self, prompts: list[str], merged: dict[str, Any]) -> dict[str, list[Any]]:
        """Prompts -> input_ids, attention_mask, and what else is asked for, as lists."""
        options = merged["text_kwargs"]
        special = options.get("add_special_tokens", True) is not False
        rows = [self._prompt_ids(prompt, special) for prompt in prompts]
        side = options.get("padding_side") or self.tokenizer.padding_side
        data: dict[str, Any] = self._padded(rows, options, side)
        width = max(map(len, data["input_ids"]))
        if options.get("return_special_tokens_mask"):
            data["special_tokens_mask"] = [
                self.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
                for row in data["input_ids"]
            ]
        if options.get("return_token_type_ids"):
            data["token_type_ids"] = [[0] * len(row) for row in data["input_ids"]]
        if options.get("return_length"):
            data["length"] = [len(row) for row in data["input_ids"]]
        if options.get("return_offsets_mapping"):
            places = [self._offsets(*pair) for pair in zip(prompts, rows, strict=True)]
            data["offset_mapping"] = [_pad(row, width, side) for row in places]
        if options.get("return_mm_token_type_ids", merged["return_mm_token_type_ids"]):
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if options.get(
            "return_text_replacement_offsets", merged["return_text_replacement_offsets"]
        ):
            expanded = [IMAGE * self.image_tokens] * sum(map(_marks, prompts))
            offsets = self.get_text_with_replacements(list(prompts), expanded)[1]
            data["text_replacement_offsets"] = offsets
        if options.get("return_attention_mask") is False:
            del data["attention_mask"]
        return data

    def _padded(
        self, rows: list[list[int]], options: dict[str, Any], side: str
    ) -> dict[str, list[Any]]:
        """Ids as a batch, padded as the options say."""
        padding, longest = options.get("padding", True), options.get("max_length")
        if padding == "max_length" and longest is None:
            longest = cast(int, self.tokenizer.model_max_length)
            if longest > LARGE_INTEGER:
                raise ValueError("padding='max_length' needs max_length: the tokenizer has none")
        for number, row in enumerate(rows):
            if longest is not None and len(row) > longest:
                raise ValueError(
                    f"prompt {number} has {len(row)} tokens, images among them, and max_length is "
                    f"{longest}: shorten the text, or raise max_length"
                )
        return dict(
            self.tokenizer.pad(
                [{"input_ids": row} for row in rows],
                padding=padding,
                max_length=longest if padding == "max_length" else None,
                pad_to_multiple_of=options.get("pad_to_multiple_of"),
                padding_side=side,
            )
        )

    def _offsets(self, prompt: str, ids: list[int]) -> list[tuple[int, int]]:
        """Which characters of a prompt, its images' placeholders written out, each id stands for.

        Raises:
            ValueError: the ids are not those of the prompt as one text.
        """
        expanded = prompt.replace(IMAGE, IMAGE * self.image_tokens)
        whole = self.tokenizer(expanded, add_special_tokens=False, return_offsets_mapping=True)
        if whole.input_ids != ids:
            raise ValueError(
                "return_offsets_mapping and return_assistant_tokens_mask need a rendered chat "
                "(apply_chat_template), whose ids are those of one text"
            )
        return whole.offset_mapping

    def _prompt_ids(self, prompt: str, special: bool) -> list[int]:
        bos = self.tokenizer.bos_token
        if bos and prompt.startswith(bos):
            expanded = prompt.replace(IMAGE, IMAGE * self.image_tokens)
            return self.tokenizer(expanded, add_special_tokens=False).input_ids
        ids = encode_text(prompt, self.tokenizer, self.image_tokens)
        return ids if special or not bos else ids[1:]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the processor as transformers does, with what leads to this class from outside."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(save_directory)
        return files

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with where remote code finds this class."""
        return super().to_dict() | {"auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}

    def pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-pads ids into input_ids and attention_mask [B, S]."""
        batch = [{"input_ids": list(ids)} for ids in prompts]
        return dict(self.tokenizer.pad(batch, padding_side="left", return_tensors="pt"))


def _check_wanted(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what transformers' processors offer and this one cannot do."""
    for name, reason in _REFUSED.items():
        value = options.get(name)
        plain = isinstance(value, (int, str, list))
        if value is not None and not (plain and value in _UNWANTED):
            raise ValueError(f"{name} {reason}")


def _prompts(text: Any) -> list[str]:
    prompts = list(text) if isinstance(text, (list, tuple)) else [text]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"text must be a prompt or a list of them, found {text!r:.80}")
    return prompts


def _marks(prompt: str) -> int:
    return prompt.count(IMAGE)


def _check_images(prompts: Sequence[str], images: Any, pictures: int) -> None:
    """Raises ValueError unless every prompt has as many marks as images, where images are nested,
    and all prompts together have."""
    marks = list(map(_marks, prompts))
    if sum(marks) != pictures:
        raise ValueError(
            f"the text has {sum(marks)} {IMAGE} marks, but {pictures} images were given"
        )
    nested = isinstance(images, (list, tuple)) and len(images) == len(prompts)
    for number, several in enumerate(images if nested else ()):
        if isinstance(several, (list, tuple)) and len(several) != marks[number]:
            raise ValueError(
                f"prompt {number} has {marks[number]} {IMAGE} marks, but {len(several)} images "
                "were given for it"
            )


def _pad(row: list[tuple[int, int]], width: int, side: str) -> list[tuple[int, int]]:
    padding = [(0, 0)] * (width - len(row))
    return padding + row if side == "left" else row + padding


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

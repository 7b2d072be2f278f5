"""The model: transformers' Llava with our projector, and a loss only where there are labels.

pixel_values -> vision tower -> projector -> spliced in at `<image>` -> language model -> loss
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import (
    AutoModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers import (
    initialization as init,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
)

from sqllava.encoding import IGNORE_INDEX
from sqllava.model.attention import Row, predictors, row_arguments
from sqllava.model.card import model_card
from sqllava.model.config import SQLlavaConfig
from sqllava.model.loss import head_loss, with_loss
from sqllava.model.projector import PrototypeExtractor, build_projector
from sqllava.model.remote import Portable
from sqllava.model.tower import tower_end


class SQLlavaPreTrainedModel(Portable, LlavaPreTrainedModel):
    """What the two classes below share with transformers."""

    config_class = SQLlavaConfig
    config: SQLlavaConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PrototypeExtractor):
            # Bare parameters, which transformers would leave as they are.
            init.ones_(module.sim_alpha)
            init.zeros_(module.sim_beta)


class SQLlavaModel(SQLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and language model, without the head.

    Args:
        vision_tower: a tower that is loaded already; built from the config if None.
        language_model: a text model that is loaded already; built from the config if None.
    """

    def __init__(
        self,
        config: SQLlavaConfig,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        if vision_tower is None:
            vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        if language_model is None:
            language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        end = tower_end(config.vision_config)
        if end.last_norm is not None:
            # What is read is the last layer's own output.
            vision_tower.set_submodule(end.last_norm, nn.Identity())
        self.class_tokens = end.class_tokens
        self.vision_tower: Any = vision_tower
        self.multi_modal_projector: Any = build_projector(
            config.projector_type,
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            **(config.projector_options or {}),
        )
        self.language_model = language_model
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: [I, 3, H, W].
            kwargs: for the tower, and so for its attention.

        Returns:
            The tower's output; its `pooler_output` is a list of I tensors [image tokens, d_text].
        """
        # What callers of transformers' Llava pass on unset.
        given = {name: value for name, value in kwargs.items() if value is not None}
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), **given | {"return_dict": True}
        )
        # The tower ends at the layer that is read (`cut_vision_config`).
        features = outputs.last_hidden_state  # [I, class tokens + patches, d_vision]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, self.class_tokens :]  # [I, patches, d_vision]
        outputs.pooler_output = list(self.multi_modal_projector(features))
        return outputs

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        blank_image: bool = False,
        row: Row | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Runs the model up to the last hidden state.

        Args:
            input_ids: [B, S], with `config.image_token_id` at the places of image features.
            pixel_values: [I, 3, H, W], the batch's images in order of appearance.
            mm_encoder_outputs: {"image": result of `get_image_features`}, in place of pixels.
            blank_image: without images, still run one blank image through the tower and the
                projector with weight zero, so that all ranks run the same modules (ZeRO-3, DDP).
            row: the lengths of the trunks and branches that `input_ids` [1, S] holds one after
                another; they see nothing of each other. In place of attention_mask, position_ids.

        Raises:
            ValueError: images and placeholders do not match in number, images come beside
                `inputs_embeds`, which hold theirs already, or the row does not suit the ids or
                the attention (see `row_arguments`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("pass either pixel_values or mm_encoder_outputs")

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if input_ids is None and (pixel_values is not None or image_outputs is not None):
            raise ValueError(
                "inputs_embeds hold their images already: give input_ids beside images, or put the "
                "images' features (get_image_features) into inputs_embeds"
            )
        blank = None
        # Tower first, then embeddings, with images and without: all ranks need the same order.
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values)
        elif blank_image and image_outputs is None:
            blank = self._blank_features()
        image_features = None
        if inputs_embeds is None:
            assert input_ids is not None
            at_image = input_ids == self.config.image_token_id  # [B, S]
            # The placeholder's id may lie past the vocabulary: it has no embedding of its own.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(at_image, 0))
            if image_outputs is not None:
                image_features = _joined(image_outputs)  # [I * tokens, d]
                inputs_embeds = _splice(inputs_embeds, at_image, image_features)
            # Not where one token is decoded: looking at it would hold the GPU up.
            elif input_ids.shape[1] > 1 and bool(at_image.any()):
                raise ValueError(
                    f"the text has {int(at_image.sum())} image placeholders, and no images come "
                    "with it: beside a cache, too, the images of new text must be given"
                )
        if blank is not None:
            inputs_embeds = inputs_embeds + 0.0 * blank.sum().to(inputs_embeds)

        if row is None:
            kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        else:
            attention = self.language_model.config._attn_implementation
            kwargs |= row_arguments(row, attention, inputs_embeds)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, past_key_values=past_key_values, **kwargs
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )

    def _blank_features(self) -> torch.Tensor:
        size = self.config.vision_config.image_size
        blank = torch.zeros(1, 3, size, size, device=self.vision_tower.device)
        return _joined(self.get_image_features(blank))


def _joined(image_outputs: BaseModelOutputWithPooling) -> torch.Tensor:
    """All images' features in one row: [I * tokens, d]."""
    return torch.cat(list(cast(Any, image_outputs.pooler_output)))


def _splice(
    inputs_embeds: torch.Tensor, at_image: torch.Tensor, image_features: torch.Tensor
) -> torch.Tensor:
    """Puts image features [I * tokens, d] at the placeholders of inputs_embeds [B, S, d]."""
    placeholders = int(at_image.sum())
    if placeholders != len(image_features):
        raise ValueError(
            f"the text has {placeholders} image placeholders, "
            f"the images have {len(image_features)} features; beside a cache, the images of the "
            "text that is in it are not given again"
        )
    image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(at_image.unsqueeze(-1), image_features)


class SQLlavaForConditionalGeneration(SQLlavaPreTrainedModel, LlavaForConditionalGeneration):
    """SQ-LLaVA with its language-model head. See `SQLlavaModel` for the arguments."""

    def __init__(
        self,
        config: SQLlavaConfig,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
        lm_head: nn.Module | None = None,
    ) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = SQLlavaModel(config, vision_tower, language_model)
        if lm_head is None:
            text = config.text_config
            lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.lm_head = with_loss(lm_head)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the model as transformers does, with a model card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / "README.md").write_text(model_card(self.config))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Uploads the model, and its card, for which transformers would put a blank one."""
        address = super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        card = ModelCard(model_card(self.config))
        card.push_to_hub(repo_id, token=kwargs.get("token"), revision=kwargs.get("revision"))
        return address

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        row: Row | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Runs the model; see `SQLlavaModel.forward`.

        With `labels` [B, S] (-100 where nothing is to be learned) the head runs over the labelled
        positions only, and `logits` are None: image positions and questions never reach the
        vocabulary. Without labels, `logits` are [B, S or logits_to_keep, V].

        Args:
            num_items_in_batch: labelled tokens of the whole optimiser step; the loss is the sum
                over this batch divided by it, so that every token weighs the same however the
                step is cut into micro-batches. None divides by this batch's own.
            row: see `SQLlavaModel.forward`. The first label of a branch is predicted by the last
                token of its trunk; the first of a trunk is not learned.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            blank_image=labels is not None,
            row=row,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # [B, S, d]
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, labels, num_items_in_batch, row)
        else:
            last = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden[:, last])  # [B, kept, V]
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,  # transformers looks for it by its name
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', which drops the images of a model that guesses for another one."""
        inputs = cast(Any, super()).prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, mm_encoder_outputs=mm_encoder_outputs, **kwargs
        )
        ids = inputs.get("input_ids")
        prompt = ids is not None and ids.shape[1] > 1
        if mm_encoder_outputs and prompt and bool((ids == self.config.image_token_id).any()):
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        return inputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with a prompt whose ids all have scores: an image's may lie past them.

        In its place stands the prompt's last id, so that the prompt has the same ids as before.
        """
        ids = kwargs.get("encoder_input_ids")
        if ids is not None and not ids.is_floating_point() and ids.shape[1]:
            at_image = ids == self.config.image_token_id
            kwargs["encoder_input_ids"] = torch.where(at_image, ids[:, -1:], ids)
        return cast(Any, super())._get_logits_processor(*args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers': what guesses the next tokens, for this model to check.

        Raises:
            ValueError: who is to guess cannot read a prompt with images.
        """
        options = kwargs["generation_config"] if "generation_config" in kwargs else args[0]
        if options.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit is not possible: no layer but the last predicts")
        if (assistant := kwargs.get("assistant_model")) is not None:
            self._check_assistant(assistant)
        generator = cast(Any, super())._get_candidate_generator(*args, **kwargs)
        if options.prompt_lookup_num_tokens is not None:
            image = self.config.image_token_id
            generator.get_candidates = _looking_behind_images(generator.get_candidates, image)
        return generator

    def _check_assistant(self, assistant: Any) -> None:
        """Raises ValueError if a model cannot read what this one reads."""
        width = self.config.text_config.hidden_size
        text = assistant.config.get_text_config()
        if not isinstance(assistant, SQLlavaForConditionalGeneration) or text.hidden_size != width:
            raise ValueError(
                f"the assistant model reads this model's image features, of {width} numbers: it "
                "must be an SQ-LLaVA model of that width; or use prompt_lookup_num_tokens"
            )

    def _loss(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        items: torch.Tensor | int | None,
        row: Row | None,
    ) -> torch.Tensor:
        if row is None:
            targets = labels[:, 1:]  # [B, S - 1]: position i predicts token i + 1
            labelled = targets != IGNORE_INDEX
            states, targets = hidden[:, :-1][labelled], targets[labelled]  # [T, d], [T]
        else:
            places = predictors(row).to(labels.device)  # [S]
            labelled = (labels[0] != IGNORE_INDEX) & (places >= 0)
            states, targets = hidden[0, places[labelled]], labels[0, labelled]  # [T, d], [T]
        total = head_loss(self.lm_head, states, targets)
        # A step whose records were all left out has nothing to learn: its loss is 0, not 0 / 0.
        if isinstance(items, torch.Tensor):
            return total / items.to(total.device).clamp(min=1)
        return total / max(len(targets) if items is None else items, 1)


def _looking_behind_images(look: Callable[..., Any], image: int) -> Callable[..., Any]:
    """Prompt lookup in what stands behind the last image: no guess may hold a placeholder."""

    def get_candidates(input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        images = (input_ids == image).any(0).nonzero()
        start = int(images[-1]) + 1 if len(images) else 0
        found, scores = look(input_ids[:, start:], **kwargs)
        return torch.cat([input_ids[:, :start], found], 1), scores

    return get_candidates

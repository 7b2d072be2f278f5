"""SQLlavaConfig: transformers' Llava configuration with the projector's choice and the template."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PretrainedConfig

from sqllava.model.remote import AUTO_MAP, Portable, write_remote_code
from sqllava.model.tower import tower_end, with_layers


@strict
class SQLlavaConfig(Portable, LlavaConfig):
    """Configuration of an SQ-LLaVA model.

    Attributes:
        projector_type: a name that `build_projector` knows ("cluster" as published).
        projector_options: that projector's options, such as {"centres": 256, "iterations": 2}.
        image_aspect_ratio: "pad" to a square with the mean colour, or "crop" the centre.
        conversation_template: the template the model was trained with.
        base_language_model: folder or id of the language model it was put together from.
        base_vision_tower: folder or id of the tower; its layers past `select_layer` are left out.
        select_layer: which hidden state of that tower is read, counted in the whole tower.
        training_facts: the data and the recipe behind the weights, for the model card.
        figures: what an evaluation measured, for the model card.
    """

    model_type = "sqllava"

    vision_config: Any = None
    text_config: Any = None
    projector_type: str = "cluster"
    projector_options: dict[str, Any] | None = None
    image_aspect_ratio: str = "pad"
    conversation_template: str = "v1_sq"
    base_language_model: str | None = None
    base_vision_tower: str | None = None
    select_layer: int = -2
    training_facts: dict[str, Any] | None = None
    figures: dict[str, Any] | None = None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the configuration as transformers does, with what leads to our classes."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(save_directory)

    @property
    def image_tokens(self) -> int:
        """Placeholder tokens per image."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + (self.class_tokens if self.vision_feature_select_strategy == "full" else 0)

    @property
    def class_tokens(self) -> int:
        """Tokens that the tower gives before its patches."""
        return tower_end(self.vision_config).class_tokens


def cut_vision_config(vision_config: PretrainedConfig, select_layer: int) -> PretrainedConfig:
    """Shortens a tower's configuration so that its last layer is the one that is read.

    Layers past the selected hidden state would cost compute and could never learn: the published
    tower of 24 layers, read at -2, becomes one of 23 layers, read at its end.

    Args:
        select_layer: index into the hidden states, where 0 is the embeddings and -1 the last
            layer's output.

    Raises:
        ValueError: the tower has no such layer.
    """
    layers = getattr(vision_config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"a vision tower of type {vision_config.model_type!r} has no num_hidden_layers: "
            "its layers cannot be counted"
        )
    kept = select_layer if select_layer >= 0 else layers + 1 + select_layer
    if not 0 < kept <= layers:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} is outside the tower's {layers} layers"
        )
    return with_layers(vision_config, kept)

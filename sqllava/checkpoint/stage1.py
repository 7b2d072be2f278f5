"""What a stage starts from: an earlier one's projector and ViT-LoRA, ours or published."""

from pathlib import Path
from typing import cast

from sqllava.checkpoint.base import warn_of_another_base
from sqllava.checkpoint.parts import (
    config_dict,
    projector_names,
    projector_of,
    read_projector,
    vision_config_of,
)
from sqllava.checkpoint.published import PROJECTOR_FILE, read_published_adapter
from sqllava.checkpoint.weights import has_weights
from sqllava.model.adapters import ADAPTER_WEIGHTS, PEFT_PREFIX, Adapter, read_adapter
from sqllava.model.config import SQLlavaConfig


def read_stage1(path: Path, config: SQLlavaConfig) -> Adapter:
    """Reads what --pretrain_mm_mlp_adapter names.

    Args:
        path: one of our adapter directories, a published folder (`mm_projector.bin`, perhaps with
            `Vit-lora/` beside it), or the path of the weights file in either; or a whole model,
            whose projector alone is taken: its ViT-LoRA is in its tower already.
        config: of the model that it goes into.

    Raises:
        FileNotFoundError: nothing of that kind is there.
        ValueError: a published file does not fit the model (the message names the tensors), or one
            of our adapters was trained to work in another way.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / ADAPTER_WEIGHTS).is_file():
        _same_use(folder, config)
        warn_of_another_base(folder, config)
        return read_adapter(folder)
    if (folder / PROJECTOR_FILE).is_file():
        layers = vision_config_of(cast(str, config.base_vision_tower)).num_hidden_layers
        return read_published_adapter(folder, config, layers)
    if has_weights(folder):
        projector = read_projector(str(folder))
        return Adapter({PEFT_PREFIX + k: v for k, v in projector.items()}, None, None, str(folder))
    raise FileNotFoundError(
        f"{path}: neither {ADAPTER_WEIGHTS} nor {PROJECTOR_FILE} is there; "
        "stage 1 (scripts/pretrain_clu.sh) writes the first"
    )


def _same_use(folder: Path, config: SQLlavaConfig) -> None:
    """Raises ValueError where weights fit and would act otherwise: no weight's shape tells the
    number of centres, or which layer of the tower is read."""
    if not (folder / "config.json").is_file():
        return
    then = config_dict(str(folder))
    own, wanted = projector_of(then), projector_of(config.to_dict())
    if own != wanted:
        raise ValueError(
            f"{folder} was trained with a projector of type {_named(own)}, not {_named(wanted)}: "
            "give --mm_projector_type and --num_latents (NUM_LATENTS) as they were there"
        )
    if then.get("select_layer", config.select_layer) != config.select_layer:
        raise ValueError(
            f"{folder} was trained on the tower's hidden state {then['select_layer']}, not "
            f"{config.select_layer}: give --mm_vision_select_layer as it was there"
        )


def read_own_projector(base: str, config: SQLlavaConfig) -> Adapter | None:
    """Reads the trained projector that a base brings along: LLaVA's, or a whole model's of ours.

    Args:
        base: folder or id of the language model.
        config: of the model that it goes into.

    Returns:
        The projector; None if the base has none.

    Raises:
        ValueError: it is not of the model's type.
    """
    if not projector_names(base):
        return None
    own, wanted = projector_of(config_dict(base)), projector_of(config.to_dict())
    if own != wanted:
        raise ValueError(
            f"{base} has a trained projector of type {_named(own)}, not {_named(wanted)}"
        )
    state = {PEFT_PREFIX + name: value for name, value in read_projector(base).items()}
    return Adapter(state, None, None, base)


def _named(projector: tuple[str, dict[str, int]]) -> str:
    kind, options = projector
    return " ".join([kind, *(f"{name}={value}" for name, value in options.items())])

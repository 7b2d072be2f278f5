"""What stage 2 starts from: stage 1's projector and ViT-LoRA, ours or in the published layout."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from sqllava.model.adapters import ADAPTER_WEIGHTS, VISION_TARGETS, copy_tensors, gathered
from sqllava.model.model import SQLlavaForConditionalGeneration

PUBLISHED_PROJECTOR = "mm_projector.bin"
PUBLISHED_VIT_LORA = "Vit-lora"
_PREFIX = "base_model.model.model."
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stage1:
    """Stage 1's tensors by their names in our adapter files, and the alpha of its ViT-LoRA."""

    state: dict[str, torch.Tensor]
    vision_alpha: int | None


def read_stage1(path: Path, vision_layers: int) -> Stage1:
    """Reads a stage-1 result.

    Args:
        path: one of our adapter directories, or a published folder (`mm_projector.bin` with
            `Vit-lora/` beside it), or the path of the weights file in either.
        vision_layers: layers that our tower has; published LoRA weights of a layer past them never
            got a gradient and are left out.

    Raises:
        FileNotFoundError: neither layout is there.
        ValueError: a weight has a name that belongs to neither.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / ADAPTER_WEIGHTS).is_file():
        config = json.loads((folder / "adapter_config.json").read_text())
        return Stage1(
            load_file(folder / ADAPTER_WEIGHTS), config["alpha_pattern"].get(VISION_TARGETS)
        )
    if not (folder / PUBLISHED_PROJECTOR).is_file():
        raise FileNotFoundError(
            f"{path}: neither {ADAPTER_WEIGHTS} nor {PUBLISHED_PROJECTOR} is there; "
            "stage 1 (scripts/pretrain_clu.sh) writes the first"
        )
    state = _read_renamed(
        folder / PUBLISHED_PROJECTOR, r".*mm_projector\.", "multi_modal_projector."
    )
    lora = folder / PUBLISHED_VIT_LORA
    if not lora.is_dir():
        return Stage1(state, None)
    for key, value in _read_renamed(
        lora / "adapter_model.bin", r".*vision_model\.", "vision_tower."
    ).items():
        layer = _LAYER.search(key)
        if layer is None or int(layer.group(1)) < vision_layers:
            state[key] = value
    return Stage1(state, json.loads((lora / "adapter_config.json").read_text())["lora_alpha"])


def merge_stage1(model: SQLlavaForConditionalGeneration, stage1: Stage1) -> None:
    """Puts stage 1's weights into a model without an adapter, for full finetuning: the projector's
    as they are, the ViT-LoRA's added to the tower's."""
    parameters = dict(model.named_parameters())
    for key, value in stage1.state.items():
        name = key.removeprefix(_PREFIX)
        if name.startswith("multi_modal_projector."):
            copy_tensors({parameters[f"model.{name}"]: value})
        elif name.endswith(".lora_A.weight"):
            down, up = value, stage1.state[key.replace(".lora_A.", ".lora_B.")]
            weight = parameters[f"model.{name.replace('.lora_A.weight', '.weight')}"]
            with gathered([weight], write=True), torch.no_grad():
                if weight.shape == (len(up), down.shape[1]):
                    weight.add_(up @ down * ((stage1.vision_alpha or 1) / len(down)))


def _read_renamed(file: Path, prefix: str, ours: str) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, value in torch.load(file, map_location="cpu", weights_only=True).items():
        name, found = re.subn(f"^{prefix}", _PREFIX + ours, key)
        if not found:
            raise ValueError(f"{file}: {key!r} has a name that does not belong there")
        renamed[name] = value
    return renamed

"""What stage 2 starts from: stage 1's projector and ViT-LoRA, ours or in the published layout."""

import json
import re
from pathlib import Path

import torch

from sqllava.model.adapters import ADAPTER_WEIGHTS, read_adapter

PUBLISHED_PROJECTOR = "mm_projector.bin"
PUBLISHED_VIT_LORA = "Vit-lora"
_PREFIX = "base_model.model.model."


def read_stage1(path: Path, vision_layers: int) -> dict[str, torch.Tensor]:
    """Reads a stage-1 result under our names.

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
        return read_adapter(folder)
    if not (folder / PUBLISHED_PROJECTOR).is_file():
        raise FileNotFoundError(
            f"{path}: neither {ADAPTER_WEIGHTS} nor {PUBLISHED_PROJECTOR} is there; "
            "stage 1 (scripts/pretrain_clu.sh) writes the first"
        )
    state = _published_projector(folder / PUBLISHED_PROJECTOR)
    if (folder / PUBLISHED_VIT_LORA).is_dir():
        state |= _published_vit_lora(folder / PUBLISHED_VIT_LORA, vision_layers)
    return state


def _published_projector(file: Path) -> dict[str, torch.Tensor]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {_renamed(key, r".*mm_projector\.", "multi_modal_projector.", file): value
            for key, value in state.items()}


def _published_vit_lora(folder: Path, vision_layers: int) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.bin"
    state = torch.load(file, map_location="cpu", weights_only=True)
    renamed = {_renamed(key, r".*vision_model\.", "vision_tower.", file): value
               for key, value in state.items()}
    return {
        key: value for key, value in renamed.items()
        if int(re.findall(r"\.layers\.(\d+)\.", key)[0]) < vision_layers
    }


def _renamed(key: str, pattern: str, ours: str, file: Path) -> str:
    name, found = re.subn(f"^{pattern}", _PREFIX + ours, key)
    if not found:
        raise ValueError(f"{file}: {key!r} has a name that does not belong there")
    return name

"""The published layouts: their names, files and configs in ours, and ours in theirs.

Published SQ-LLaVA, ShareGPT4V and LLaVA-1.5 are a Llama whose config carries `mm_*` fields; what is
added to it lies in the same folder or beside it. Each name is mapped here and nowhere else.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sqllava.checkpoint.weights import read_tensors
from sqllava.errors import raise_faults
from sqllava.model.adapters import (
    ADAPTER_CONFIG,
    PEFT_PREFIX,
    Adapter,
    Lora,
    adapter_shapes,
    part_of,
    state_faults,
)
from sqllava.model.config import SQLlavaConfig

logger = logging.getLogger(__name__)

# model_type of a Llama with mm_* fields.
MODEL_TYPES = ("llava", "llava_llama", "share4v")
PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_AND_MORE_FILE = "non_lora_trainables.bin"
VIT_LORA = "Vit-lora"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# The published names of what transformers calls otherwise.
SELECT_FEATURES = {"patch": "default", "cls_patch": "full"}
_ASPECT_RATIOS = {"pad": "pad", "square": "crop", None: "crop"}

_OUR_NAMES = (
    (r"model\.mm_projector\.", "model.multi_modal_projector."),
    # Within the whole model, and within the tower's own adapter.
    (r"(?:model\.vision_tower\.)?vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)
_PUBLISHED_NAMES = (
    ("model.multi_modal_projector.", "model.mm_projector."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.language_model.", "model."),
)
# Buffers that older torch and transformers wrote, and that follow from the config.
DERIVED = re.compile(r".*(rotary_emb\.inv_freq|position_ids)$")


def our_name(published: str) -> str | None:
    """Our name of a published tensor, of a model or of an adapter; None for a strange one."""
    prefix = PEFT_PREFIX if published.startswith(PEFT_PREFIX) else ""
    for pattern, ours in _OUR_NAMES:
        name, found = re.subn(f"^{pattern}", ours, published[len(prefix) :])
        if found:
            return prefix + name
    return None


def published_name(ours: str) -> str:
    """The published name of a tensor of ours, of a model or of an adapter."""
    prefix = PEFT_PREFIX if ours.startswith(PEFT_PREFIX) else ""
    name = ours[len(prefix) :]
    for mine, published in _PUBLISHED_NAMES:
        if name.startswith(mine):
            return prefix + published + name[len(mine) :]
    return ours


def vit_lora_name(ours: str) -> str:
    """The name of a tower's LoRA tensor in `Vit-lora/`, whose model is the tower's wrapper."""
    return published_name(ours).replace(f"{PEFT_PREFIX}model.vision_tower.", PEFT_PREFIX)


def projector_name(ours: str) -> str:
    """The name of a projector's tensor in `mm_projector.bin`."""
    return published_name(ours).removeprefix(PEFT_PREFIX)


@dataclass(frozen=True)
class _AdapterFile:
    """One file of a published adapter: its tensors under our names, what they are called in it, and
    the parts of the model that it has to cover."""

    path: Path
    state: dict[str, torch.Tensor]
    name: Callable[[str], str]
    parts: tuple[str, ...]

    def only(self, keep: Callable[[str], bool]) -> "_AdapterFile":
        kept = {key: value for key, value in self.state.items() if keep(key)}
        return replace(self, state=kept)


def read_published_adapter(
    folder: Path, config: SQLlavaConfig, tower_layers: int, vit_lora: Path | None = None
) -> Adapter:
    """Reads a published stage-1 or stage-2 folder.

    The tower's LoRA may lie in the adapter file, in `Vit-lora/` beside it, or in both, which must
    then agree.

    Args:
        config: of the model that the adapter goes into.
        tower_layers: how many layers the whole tower has. Published LoRA covers all of them; what
            belongs to layers past the one that is read never got a gradient, and is left out.
        vit_lora: a folder with the tower's LoRA, in place of the folder's own.

    Raises:
        FileNotFoundError: a file that belongs to the layout is missing.
        ValueError: a tensor is missing or unexpected, by its name in the file.
    """
    files = []
    language_lora = vision_lora = None
    if (folder / ADAPTER_CONFIG).is_file():
        projector = folder / PROJECTOR_AND_MORE_FILE
        files.append(_read_file(projector, published_name, ("projector",)))
        language_lora = _lora(folder / ADAPTER_CONFIG)
        adapter = _read_file(
            _adapter_file(folder), published_name, ("language model",), ("vision tower",)
        )
        if vit_lora:
            adapter = adapter.only(lambda key: part_of(key) == "language model")
            adapter = replace(adapter, parts=("language model",))
        vision_lora = _vision_lora(adapter, language_lora)
        files.append(adapter)
    else:
        files.append(_read_file(folder / PROJECTOR_FILE, projector_name, ("projector",)))
    vit_folder = vit_lora or folder / VIT_LORA
    if vit_lora or vit_folder.is_dir():
        files.append(_read_file(_adapter_file(vit_folder), vit_lora_name, ("vision tower",)))
        vision_lora = _lora(vit_folder / ADAPTER_CONFIG)
    whole = Adapter({}, vision_lora, language_lora, str(folder))
    shapes = adapter_shapes(config, whole.training)
    state = _joined([_checked(file, shapes, tower_layers) for file in files])
    return replace(whole, state=state)


def _adapter_file(folder: Path) -> Path:
    there = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    return there[0] if there else folder / ADAPTER_FILES[-1]


def _read_file(
    path: Path,
    name: Callable[[str], str],
    parts: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> _AdapterFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it belongs to the published layout")
    state = {}
    for published, tensor in read_tensors(path).items():
        ours = our_name(published)
        key = PEFT_PREFIX + (ours or "").removeprefix(PEFT_PREFIX)
        if ours is None or name(key) != published or part_of(key) not in parts + optional:
            raise ValueError(f"{path}: unexpected: {published}")
        state[key] = tensor
    found = tuple(part for part in optional if any(part_of(key) == part for key in state))
    return _AdapterFile(path, state, name, parts + found)


def _lora(config: Path) -> Lora:
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: it belongs to the published layout")
    values = read_json(config)
    if values.get("bias", "none") != "none":
        raise ValueError(f"{config}: bias {values['bias']!r} is not supported; 'none' is")
    return Lora(values["r"], values["lora_alpha"])


def _vision_lora(adapter: _AdapterFile, language_lora: Lora) -> Lora | None:
    """The tower's LoRA as far as an adapter file tells it, whose config is the language model's:
    the rank from the tensors, and alpha in the same proportion to it."""
    ranks = [len(v) for k, v in adapter.state.items() if "vision_tower." in k and "lora_A" in k]
    if not ranks:
        return None
    return Lora(ranks[0], language_lora.alpha * ranks[0] // language_lora.rank)


def _checked(
    file: _AdapterFile, shapes: Mapping[str, torch.Size], tower_layers: int
) -> _AdapterFile:
    """The file without the tensors that no layer reads, after a look at all of them."""
    expected = {key: shape for key, shape in shapes.items() if part_of(key) in file.parts}
    past = _past_the_cut(expected, tower_layers)
    left_out = sorted(file.name(key) for key in file.state.keys() & past.keys())
    whole = expected | (past if left_out else {})
    raise_faults(
        state_faults(
            {file.name(key): value for key, value in file.state.items()},
            {file.name(key): shape for key, shape in whole.items()},
        ),
        f"{file.path} does not fit this model",
    )
    if left_out:
        logger.info("%s: left out, of layers that are not read: %s", file.path, ", ".join(left_out))
    return file.only(expected.__contains__)


def _past_the_cut(expected: Mapping[str, torch.Size], tower_layers: int) -> dict[str, torch.Size]:
    """What a tower's LoRA holds for the layers that our tower no longer has."""
    tower = {key: shape for key, shape in expected.items() if "vision_tower." in key}
    first = {key: shape for key, shape in tower.items() if ".layers.0." in key}
    kept = len(tower) // max(len(first), 1)
    return {
        key.replace(".layers.0.", f".layers.{number}."): shape
        for number in range(kept, tower_layers)
        for key, shape in first.items()
    }


def _joined(files: Sequence[_AdapterFile]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in files:
        for key, value in file.state.items():
            if key in state and not torch.equal(state[key], value):
                raise ValueError(
                    f"{file.path} and the adapter beside it hold different values of "
                    f"{file.name(key)}: pass vit_lora, the folder whose values are right"
                )
            state[key] = value
    return state


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a published folder, and not of transformers' own Llava."""
    return config.get("model_type") in MODEL_TYPES and "text_config" not in config


def settings_of(config: Mapping[str, Any], template: str | None = None) -> dict[str, Any]:
    """SQLlavaConfig's fields from a published config.

    Args:
        template: the conversation template, which no published config names; by default the one
            that models of this projector were trained with.

    Raises:
        ValueError: the config asks for something that no SQ-LLaVA model has.
    """
    if config.get("mm_use_im_start_end"):
        raise ValueError("mm_use_im_start_end is not supported: no SQ-LLaVA model has it")
    projector = config.get("mm_projector_type", "linear")
    cluster = projector == "cluster"
    return {
        "projector_type": projector,
        # `num_latents` was written into configs, but never read.
        "projector_options": {"centres": 256, "iterations": 2} if cluster else {},
        "select_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _translated(
            config, "mm_vision_select_feature", SELECT_FEATURES, "patch"
        ),
        "image_aspect_ratio": _translated(config, "image_aspect_ratio", _ASPECT_RATIOS, None),
        "conversation_template": template or ("v1_sq" if cluster else "v1"),
    }


def _translated(
    config: Mapping[str, Any], field: str, table: Mapping[Any, str], default: str | None
) -> str:
    value = config.get(field, default)
    if value not in table:
        choices = [choice for choice in table if choice]
        raise ValueError(f"{field} {value!r} is not supported; choose from {choices}")
    return table[value]


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published config without its mm_* fields: the language model's own."""
    strange = ("model_type", "architectures", "image_aspect_ratio", "num_latents", "use_mm_proj")
    own = {
        name: value
        for name, value in config.items()
        if name not in strange and not name.startswith(("mm_", "tune_mm_", "freeze_mm_", "vit_"))
    }
    return own | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {values!r:.40}")
    return values


def resolve(name: str | None, folder: Path) -> str | None:
    """Where a model is that a config in `folder` names.

    Configs hold hub ids, or paths that were right where the model was trained: a path is tried
    within the folder, beside it, and as it is. What is none of these is left as a hub id.
    """
    if name is None:
        return None
    places = (folder / name, folder.parent / name, Path(name))
    return next((str(place) for place in places if place.is_dir()), name)


def published_config(config: SQLlavaConfig, select_layer: int, vision_tower: str) -> dict[str, Any]:
    """The config.json by which the published code loads such a model.

    Raises:
        ValueError: the model has something that the published code does not know.
    """
    text = config.text_config
    if text.model_type != "llama":
        raise ValueError(f"the published code knows Llama models only, not {text.model_type!r}")
    if not config.vision_config.model_type.startswith("clip"):
        tower = config.vision_config.model_type
        raise ValueError(f"the published code knows CLIP towers only, not {tower!r}")
    if config.projector_type == "cluster_soft":
        raise ValueError("the published code has no 'cluster_soft' projector")
    options = {"centres": 256, "iterations": 2} | (config.projector_options or {})
    if config.projector_type == "cluster" and options != {"centres": 256, "iterations": 2}:
        raise ValueError(
            f"the published code always has 256 centres and 2 iterations, this model has {options}"
        )
    features = {ours: published for published, ours in SELECT_FEATURES.items()}
    rope = getattr(text, "rope_parameters", None) or {}
    return {name: getattr(text, name) for name in _LLAMA_FIELDS} | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
        "image_aspect_ratio": "pad" if config.image_aspect_ratio == "pad" else "square",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": config.projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_vision_select_layer": select_layer,
        "mm_vision_tower": vision_tower,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


# What transformers 4.31, with which the published code runs, reads of a Llama.
_LLAMA_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def write_published_adapter(
    folder: Path, adapter: Adapter, config: SQLlavaConfig, tower_layers: int
) -> None:
    """Writes a published stage-2 folder, or a stage-1 folder where there is no LLM-LoRA.

    Layers of the tower past the one that is read, which our adapters do not hold, get LoRA weights
    of zero: the published code expects some.

    Raises:
        ValueError: the model has something that the published code does not know.
    """
    written = published_config(config, config.select_layer, str(config.base_vision_tower))
    written["_name_or_path"] = config.base_language_model
    write_json(folder / "config.json", written)
    by_part: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in adapter.state.items():
        by_part.setdefault(part_of(key), {})[key] = value
    projector = by_part["projector"]
    if adapter.language_lora is None:
        _write_bin(folder / PROJECTOR_FILE, projector, projector_name)
    else:
        _write_bin(folder / PROJECTOR_AND_MORE_FILE, projector, published_name)
        _write_bin(folder / ADAPTER_FILES[-1], by_part["language model"], published_name)
        lora = _published_lora(adapter.language_lora, by_part["language model"])
        lora |= {"base_model_name_or_path": config.base_language_model, "task_type": "CAUSAL_LM"}
        write_json(folder / ADAPTER_CONFIG, lora)
    if adapter.vision_lora is not None:
        tower = by_part["vision tower"]
        shapes = {key: value.shape for key, value in tower.items()}
        zeros = {k: torch.zeros(s) for k, s in _past_the_cut(shapes, tower_layers).items()}
        (folder / VIT_LORA).mkdir()
        _write_bin(folder / VIT_LORA / ADAPTER_FILES[-1], tower | zeros, vit_lora_name)
        lora = _published_lora(adapter.vision_lora, tower)
        write_json(folder / VIT_LORA / ADAPTER_CONFIG, lora)


def _published_lora(lora: Lora, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of adapter_config.json that PEFT 0.4 knows: it accepts no others."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": None,
        "target_modules": sorted({key.split(".")[-3] for key in state}),
        "task_type": None,
    }


def _write_bin(path: Path, state: Mapping[str, torch.Tensor], name: Callable[[str], str]) -> None:
    torch.save({name(key): value.clone() for key, value in state.items()}, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, always in the same order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

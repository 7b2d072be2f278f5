"""Loading: from a tower and a language model, from an adapter directory, from a whole model.

What a folder holds is decided by its files and configs, never by its name.
"""

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.encoding import add_image_token, image_token_id
from sqllava.model.adapters import ADAPTER_WEIGHTS
from sqllava.model.config import SQLlavaConfig, cut_vision_config
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor, build_processor

logger = logging.getLogger(__name__)

# In a CLIP checkpoint, beside the tower: the text half, the shared space, and a buffer.
_NOT_THE_TOWER = re.compile(r"text_model\.|(text|visual)_projection|logit_scale|.*position_ids$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def assemble(
    language_model: str,
    vision_tower: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    select_layer: int = -2,
    **settings: Any,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    """Puts a model together from a language model and a vision tower, with a new projector.

    Under ZeRO-3 each part is partitioned as it is loaded.

    Args:
        language_model: folder or id of any causal language model (Vicuna).
        vision_tower: folder or id of the tower (CLIP ViT-L/14-336).
        select_layer: which hidden state of the tower is read; later layers are not built.
        settings: the other fields of SQLlavaConfig, such as projector_type.

    Raises:
        ValueError: weights are missing, or there are some that belong to nothing.
    """
    text = AutoModelForCausalLM.from_pretrained(
        language_model,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
    )
    tower = _load_tower(vision_tower, select_layer, dtype, attn_implementation)
    attention = text.config._attn_implementation
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    add_image_token(tokenizer)
    config = SQLlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=image_token_id(tokenizer),
        vision_feature_layer=-1,
        base_language_model=language_model,
        base_vision_tower=vision_tower,
        select_layer=select_layer,
        **settings,
    )
    config.image_seq_length = config.image_tokens
    with _projector_init(dtype):
        model = SQLlavaForConditionalGeneration(
            config, tower, text.get_decoder(), text.get_output_embeddings()
        )
    # The configurations of the parts lose theirs when they become parts.
    model.set_attn_implementation(attention)
    model.generation_config = _sane_generation_config(text, tokenizer)
    return model, build_processor(config, tokenizer, _image_settings(vision_tower))


@contextlib.contextmanager
def _projector_init(dtype: torch.dtype) -> Any:
    """New weights in the model's dtype, drawn from the seed alone: loading the parts draws too, and
    not the same with and without ZeRO-3."""
    before = torch.get_default_dtype()
    torch.manual_seed(torch.initial_seed())
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet_loading() -> Any:
    """Silences transformers' report of weights left out: here they are judged by name."""
    reporter = logging.getLogger("transformers.modeling_utils")

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporter.addFilter(keeps)
    try:
        yield
    finally:
        reporter.removeFilter(keeps)


def vision_config_of(path: str) -> PretrainedConfig:
    """The vision half of a folder's configuration."""
    config = AutoConfig.from_pretrained(path)
    return getattr(config, "vision_config", config)


def _load_tower(
    path: str, select_layer: int, dtype: torch.dtype, attn_implementation: str | None
) -> Any:
    config = cut_vision_config(vision_config_of(path), select_layer)
    with _quiet_loading():
        tower, info = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    strange = sorted(
        key for key in info["unexpected_keys"] if not _is_left_out(key, config.num_hidden_layers)
    )
    if missing or strange:
        raise ValueError(f"vision tower {path}: missing weights {missing}, unexpected {strange}")
    return tower


def _is_left_out(key: str, layers: int) -> bool:
    layer = _LAYER.search(key)
    past_the_cut = layer is not None and int(layer.group(1)) >= layers
    return past_the_cut or bool(_NOT_THE_TOWER.match(key))


def _image_settings(vision_tower: str) -> dict[str, Any]:
    return LlavaImageProcessorPil.get_image_processor_dict(vision_tower)[0]


def _sane_generation_config(text: Any, tokenizer: Any) -> GenerationConfig:
    """Greedy by default: Vicuna's own file sets a temperature without sampling, which transformers
    refuses to save at the end of a run."""
    given = text.generation_config
    return GenerationConfig(
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or given.pad_token_id or tokenizer.unk_token_id,
    )


def load(
    path: str | Path,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    """Opens a model for inference: one of our adapter directories, or a whole model.

    Args:
        path: the folder.
        base: the language model under an adapter, if not the one it was trained on.
        vision_tower: the tower under an adapter, if not the one it was trained on.
        dtype: "auto" is bfloat16 on a GPU that has it and float32 on a CPU.
        device: where to put it; a GPU if there is one.

    Returns:
        The model in evaluation mode, the adapter merged in, and its processor.

    Raises:
        FileNotFoundError: the folder is not there, or holds no model.
        ValueError: its weights do not fit.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json: not a model or adapter directory")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _choose_dtype(dtype, device)
    if (folder / ADAPTER_WEIGHTS).is_file():
        model = _load_adapter(folder, base, vision_tower, dtype)
    else:
        model = SQLlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    processor = SQLlavaProcessor.from_pretrained(folder)
    return cast(Any, model).to(device).eval(), processor


def _choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32


def _load_adapter(
    folder: Path, base: str | None, vision_tower: str | None, dtype: torch.dtype
) -> SQLlavaForConditionalGeneration:
    model = load_base(folder, base, vision_tower, dtype)
    peft_model = PeftModel.from_pretrained(model, folder)
    # In float32, so that merging does not round the sum to the base's precision first.
    return peft_model.merge_and_unload(safe_merge=True)


def load_base(
    folder: str | Path,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> SQLlavaForConditionalGeneration:
    """The model under an adapter directory, for `PeftModel.from_pretrained`."""
    config = SQLlavaConfig.from_pretrained(folder)
    settings = json.loads((Path(folder) / "config.json").read_text())
    language_model = base or config.base_language_model
    tower = vision_tower or config.base_vision_tower
    if not language_model or not tower:
        raise ValueError(f"{folder}: its config names no base: pass base and vision_tower")
    model, _ = assemble(
        language_model,
        tower,
        dtype=dtype,
        select_layer=config.select_layer,
        **{name: settings[name] for name in CARRIED_SETTINGS if name in settings},
    )
    return model


# What an adapter's config says about the model around its parts.
CARRIED_SETTINGS = (
    "projector_type",
    "projector_options",
    "image_aspect_ratio",
    "conversation_template",
    "vision_feature_select_strategy",
)

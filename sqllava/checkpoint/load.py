"""Loading: from a tower and a language model, from an adapter directory, from a whole model.

What a folder holds is decided by its files and configs, never by its name. The published layouts
are read as well as ours (`published.py`).
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from sqllava.checkpoint.base import check_base
from sqllava.checkpoint.hub import local_folder
from sqllava.checkpoint.parts import (
    config_dict,
    from_pretrained,
    image_settings,
    is_ours,
    language_config_of,
    load_language_model,
    load_processor,
    load_tokenizer,
    load_tower,
    projector_of,
    read_projector,
    read_vision_config,
    vision_config_of,
)
from sqllava.checkpoint.place import choose_device, choose_dtype
from sqllava.checkpoint.published import (
    PROJECTOR_FILE,
    is_published,
    our_name,
    published_name,
    read_json,
    read_published_adapter,
    resolve,
    settings_of,
)
from sqllava.checkpoint.weights import has_weights, tensor_names, weight_names
from sqllava.encoding import image_token_id
from sqllava.errors import raise_faults
from sqllava.model.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    apply_adapter,
    check_adapter,
    copy_tensors,
    part_of,
    read_adapter,
    state_faults,
)
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor, build_processor

logger = logging.getLogger(__name__)

Layout = Literal["adapter", "model", "published projector", "published adapter", "published model"]

_T = TypeVar("_T")


def layout_of(folder: Path) -> Layout:
    """What a folder holds.

    Raises:
        FileNotFoundError: it is not there, or no model lies in it.
        ValueError: the model is none of SQ-LLaVA's kind.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json: not a model or adapter directory")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind == SQLlavaConfig.model_type:
        if (folder / ADAPTER_WEIGHTS).is_file():
            return "adapter"
        if has_weights(folder):
            return "model"
        raise FileNotFoundError(f"{folder}: neither {ADAPTER_WEIGHTS} nor a model's weights")
    if not is_published(config):
        raise ValueError(
            f"{folder}: a model of type {kind!r}, not an SQ-LLaVA, ShareGPT4V or LLaVA-1.5 model; "
            "transformers itself may be able to load it"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return "published adapter"
    if (folder / PROJECTOR_FILE).is_file():
        return "published projector"
    if has_weights(folder):
        return "published model"
    raise FileNotFoundError(f"{folder}: no {ADAPTER_CONFIG}, {PROJECTOR_FILE} or model's weights")


def assemble(
    language_model: str,
    vision_tower: str,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    quantization_config: Any = None,
    select_layer: int = -2,
    **settings: Any,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    """Puts a model together from a language model and a vision tower.

    The projector is new, except where `language_model` is a whole model of ours with a projector of
    the wanted type: then it is that one. A published base (ShareGPT4V, LLaVA) may hold a projector
    too, which gives way: an adapter always brings its own.

    Under ZeRO-3 each part is partitioned as it is loaded.

    Args:
        language_model: folder or id of any causal language model (Vicuna), of a published base, or
            of a whole model of ours.
        vision_tower: folder or id of the tower (CLIP ViT-L/14-336), or of a whole model of ours.
        select_layer: which hidden state of the tower is read; later layers are not built.
        settings: the other fields of SQLlavaConfig, such as projector_type.

    Raises:
        ValueError: weights are missing, or there are some that belong to nothing.
    """
    text = load_language_model(language_model, dtype, attn_implementation, quantization_config)
    tower = load_tower(vision_tower, select_layer, dtype, attn_implementation)
    attention = text.config._attn_implementation
    tokenizer = load_tokenizer(language_model)
    config = build_config(
        text.config, tower.config, tokenizer, language_model, vision_tower, select_layer, **settings
    )
    with _projector_init(dtype):
        model = SQLlavaForConditionalGeneration(
            config, tower, text.get_decoder(), text.get_output_embeddings()
        )
    # The configurations of the parts lose theirs when they become parts.
    model.set_attn_implementation(attention)
    model.generation_config = sane_generation_config(text.generation_config, tokenizer)
    if _brings_projector(language_model, config):
        _take_projector(model, language_model)
    return model, build_processor(config, tokenizer, image_settings(vision_tower))


def build_config(
    text_config: PretrainedConfig,
    vision_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    language_model: str,
    vision_tower: str,
    select_layer: int,
    **settings: Any,
) -> SQLlavaConfig:
    """The configuration of a model that is put together from these parts."""
    config = SQLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id(tokenizer),
        vision_feature_layer=-1,
        base_language_model=language_model,
        base_vision_tower=vision_tower,
        select_layer=select_layer,
        **settings,
    )
    if config.vision_feature_select_strategy == "full" and not config.class_tokens:
        raise ValueError(
            f"{vision_tower}: a tower of type {vision_config.model_type!r} has no class token that "
            "cls_patch could keep: choose patch"
        )
    config.image_seq_length = config.image_tokens
    return config


def _brings_projector(language_model: str, config: SQLlavaConfig) -> bool:
    if not is_ours(language_model):
        return False
    return projector_of(config_dict(language_model)) == projector_of(config.to_dict())


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


def sane_generation_config(given: Any, tokenizer: Any) -> GenerationConfig:
    """Greedy by default: Vicuna's own file sets a temperature without sampling, which transformers
    refuses to save at the end of a run."""
    return GenerationConfig(
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or given.pad_token_id or tokenizer.unk_token_id,
    )


def _take_projector(model: SQLlavaForConditionalGeneration, path: str) -> None:
    """Gives a model the projector that lies in a whole model's files."""
    values = read_projector(path)
    wanted = {n: p for n, p in model.named_parameters() if part_of(n) == "projector"}
    shapes = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in wanted.items()}
    faults = state_faults(_in_published_names(values, path), _in_published_names(shapes, path))
    raise_faults(faults, f"the projector in {path} does not fit this model")
    copy_tensors({wanted[name]: value for name, value in values.items()})


def _in_published_names(tensors: Mapping[str, _T], path: str) -> dict[str, _T]:
    published = is_published(config_dict(path))
    return {published_name(k) if published else k: value for k, value in tensors.items()}


@dataclass(frozen=True)
class Parts:
    """What a model is put together from: the arguments of `assemble`."""

    language_model: str
    vision_tower: str
    settings: dict[str, Any]


def parts_of(folder: Path, base: str | None = None, vision_tower: str | None = None) -> Parts:
    """The parts under an adapter, or of a published model.

    The folder's config names them; `base` and `vision_tower` override it.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: neither the config nor the caller names a part.
    """
    config = read_json(folder / "config.json")
    layout = layout_of(folder)
    if layout == "adapter":
        language, tower = config.get("base_language_model"), config.get("base_vision_tower")
        settings = {name: config[name] for name in CARRIED_SETTINGS if name in config}
    else:
        stage1 = layout == "published projector"
        settings = settings_of(config, template="plain" if stage1 else None)
        language, tower = config.get("_name_or_path"), config.get("mm_vision_tower")
        if layout == "published adapter":
            adapter = read_json(folder / ADAPTER_CONFIG)
            language = adapter.get("base_model_name_or_path") or language
        elif layout == "published model":
            language = str(folder)
            if any(part_of(our_name(n) or "") == "vision tower" for n in weight_names(folder)):
                tower = str(folder)
    return Parts(
        _found("base", base or resolve(language, folder), folder),
        _found("vision_tower", vision_tower or resolve(tower, folder), folder),
        settings,
    )


def _found(part: str, name: str | None, folder: Path) -> str:
    if not name:
        raise ValueError(f"{folder}: its config names no {part}: pass {part}=...")
    try:
        config_dict(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder}: its {part} {name!r} is neither a folder nor a model that could be "
            f"downloaded: pass {part}=..."
        ) from error
    return name


def describe(parts: Parts) -> tuple[SQLlavaConfig, SQLlavaProcessor]:
    """The configuration and the processor that `assemble` would give, without the weights."""
    settings = dict(parts.settings)
    select_layer = settings.pop("select_layer")
    tokenizer = load_tokenizer(parts.language_model)
    config = build_config(
        language_config_of(parts.language_model),
        read_vision_config(parts.vision_tower, select_layer),
        tokenizer,
        parts.language_model,
        parts.vision_tower,
        select_layer,
        **settings,
    )
    return config, build_processor(config, tokenizer, image_settings(parts.vision_tower))


def open_adapter(
    folder: Path, config: SQLlavaConfig, vision_tower: str, vit_lora: str | None = None
) -> Adapter:
    """Reads an adapter, ours or published, and checks that it fits a model and its base.

    Args:
        config: the model's.
        vision_tower: the whole tower that the model's was cut from.
        vit_lora: a published folder with the tower's LoRA, in place of the adapter's own.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape, by their names; or the base
            gives tokens other ids than training did.
    """
    check_base(folder, config)
    if layout_of(folder) == "adapter":
        tensor_names(folder / ADAPTER_WEIGHTS)  # says which file is damaged, if it is
        if not (folder / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"{folder}: no {ADAPTER_CONFIG} beside {ADAPTER_WEIGHTS}")
        settings = read_json(folder / ADAPTER_CONFIG)
        if missing := {"rank_pattern", "alpha_pattern"} - settings.keys():
            raise ValueError(f"{folder / ADAPTER_CONFIG}: no {', '.join(sorted(missing))} in it")
        adapter = read_adapter(folder)
        check_adapter(adapter, config)
        return adapter
    layers = vision_config_of(vision_tower).num_hidden_layers
    return read_published_adapter(folder, config, layers, Path(vit_lora) if vit_lora else None)


def load(
    path: str | Path,
    base: str | None = None,
    vision_tower: str | None = None,
    vit_lora: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    bits: int = 16,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    """Opens a model for inference, in our layouts or the published ones.

    Ours: an adapter directory, or a whole (merged) model. Published: a stage-1 folder with
    `mm_projector.bin`, a stage-2 LoRA folder, a merged folder (SQ-LLaVA or LLaVA-1.5). An adapter's
    projector always goes before one that its base brings along.

    Args:
        path: the folder, or its id on the hub, from where it is then fetched.
        base: the language model under an adapter, if not the one that its config names.
        vision_tower: the tower, if not the one that the config names.
        vit_lora: for a published adapter, a folder with the tower's LoRA, if not its own.
        dtype: "auto" is bfloat16 on a GPU that has it and float32 on a CPU.
        device: where to put it; a GPU if there is one.
        bits: 8 or 4 to load the language model of a whole model quantised by bitsandbytes.
        device_map: for a whole model: spread it as transformers does ("auto" and so on).
        attn_implementation: as in transformers.

    Returns:
        The model in evaluation mode, the adapter merged in, and its processor.

    Raises:
        FileNotFoundError: the folder or one of its parts is not there, or holds no model.
        ValueError: its weights do not fit; the message names them.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    folder = local_folder(path)
    layout = layout_of(folder)
    if layout == "model":
        if base or vision_tower or vit_lora:
            raise ValueError(
                f"{folder} is a whole model: base, vision_tower, vit_lora do not apply"
            )
        model = _load_model(folder, dtype, bits, device_map, attn_implementation)
        processor = load_processor(folder)
        placed = device_map is not None or bits != 16
        return (model if placed else cast(Any, model).to(device)).eval(), processor
    if bits != 16 or device_map is not None:
        raise ValueError(
            f"bits and device_map need a whole model: sqllava convert {folder} MERGED --to merged"
        )
    parts = parts_of(folder, base, vision_tower)
    model, processor = assemble(
        parts.language_model,
        parts.vision_tower,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **parts.settings,
    )
    if layout == "published model":
        _take_projector(model, str(folder))
    else:
        apply_adapter(model, open_adapter(folder, model.config, parts.vision_tower, vit_lora))
    if layout == "adapter":
        processor = adapter_processor(folder, processor)
    return cast(Any, model).to(device).eval(), processor


def adapter_processor(folder: Path, of_parts: SQLlavaProcessor) -> SQLlavaProcessor:
    """The processor that is saved with an adapter; that of its parts, where none is."""
    if (folder / "processor_config.json").is_file():
        return load_processor(folder)
    logger.warning(
        "%s: no processor_config.json: text and images are prepared as its base and tower say",
        folder,
    )
    return of_parts


def _load_model(
    folder: Path,
    dtype: torch.dtype,
    bits: int,
    device_map: str | dict[str, Any] | None,
    attn_implementation: str | None,
) -> SQLlavaForConditionalGeneration:
    # Without them transformers would build a model of seven billion parameters.
    if lacking := {"text_config", "vision_config"} - read_json(folder / "config.json").keys():
        raise ValueError(f"{folder / 'config.json'}: no {', '.join(sorted(lacking))} in it")
    model, missing, unexpected = from_pretrained(
        SQLlavaForConditionalGeneration,
        str(folder),
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        quantization_config=quantization(bits, dtype),
    )
    faults = [f"missing: {name}" for name in sorted(missing)]
    faults += [f"unexpected: {name}" for name in sorted(unexpected)]
    raise_faults(faults, f"{folder} is not whole")
    return model


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration for the language model's layers; tower, projector and head stay
    as they are. None for 16 bits."""
    if bits == 16:
        return None
    if bits not in (4, 8):
        raise ValueError(f"bits must be 16, 8 or 4, found {bits}")
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def load_base(
    folder: str | Path,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> SQLlavaForConditionalGeneration:
    """The model under an adapter directory, for `PeftModel.from_pretrained`."""
    parts = parts_of(Path(folder), base, vision_tower)
    model, _ = assemble(parts.language_model, parts.vision_tower, dtype=dtype, **parts.settings)
    check_base(Path(folder), model.config)
    return model


# What an adapter's config says about the model around its parts.
CARRIED_SETTINGS = (
    "projector_type",
    "projector_options",
    "image_aspect_ratio",
    "conversation_template",
    "vision_feature_select_strategy",
    "select_layer",
)

"""The parts of a model, read from their own folders or out of a whole model's: language model,
tower, projector, tokenizer, and their configurations. Every name in the files is accounted for."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import cached_file

from sqllava.checkpoint.published import (
    is_published,
    llama_config,
    our_name,
    read_json,
    resolve,
    settings_of,
)
from sqllava.checkpoint.weights import has_weights, open_tensors, weight_names
from sqllava.encoding import add_image_token
from sqllava.errors import raise_faults, refused_code
from sqllava.model.adapters import part_of
from sqllava.model.config import SQLlavaConfig, cut_vision_config
from sqllava.model.processor import SQLlavaProcessor
from sqllava.model.projector import whole_options
from sqllava.model.tower import tower_end

logger = logging.getLogger(__name__)

# What may lie beside a part in its files. Beside a tower on its own: CLIP's text half, the shared
# space, and a buffer; beside a part of a whole model: the other parts.
_BESIDE_TOWER = re.compile(
    r"text_model\.|(text|visual)_projection|logit_(scale|bias)|.*position_ids$"
)
_BESIDE_TOWER_OF_A_MODEL = re.compile(
    r"lm_head\.|model\.(language_model|embed_tokens|layers|norm|mm_projector|multi_modal_projector)\."
)
_BESIDE_LANGUAGE_MODEL = re.compile(r"model\.(vision_tower|mm_projector|multi_modal_projector)\.")
_LAYER = re.compile(r"(^|\.)(layers?)\.(\d+)\.")
_FREQUENCIES = ".rotary_emb.inv_freq"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def config_dict(path: str) -> dict[str, Any]:
    """A folder's or an id's config.json as it is written."""
    return PretrainedConfig.get_config_dict(path)[0]


def language_config_of(path: str) -> PretrainedConfig:
    """The language model's half of a folder's configuration."""
    config = config_dict(path)
    if is_published(config):
        return LlamaConfig.from_dict(llama_config(config))
    if is_ours(path):
        return SQLlavaConfig.from_dict(config).text_config
    return _auto_config(path)


def _auto_config(path: str) -> PretrainedConfig:
    with refused_code(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def vision_config_of(path: str) -> PretrainedConfig:
    """The vision half of a folder's configuration, with all layers that the folder has."""
    config = _auto_config(_tower_folder(path))
    return getattr(config, "vision_config", config)


def _tower_folder(path: str) -> str:
    """Where the configuration of a tower lies: a published model names another folder."""
    config = config_dict(path)
    return str(resolve(config["mm_vision_tower"], Path(path))) if is_published(config) else path


def _tower_prefix(path: str) -> str:
    """What the names of a tower's weights begin with, within a whole model."""
    if is_ours(path):
        return "model.vision_tower."
    return "model.vision_tower.vision_tower." if is_published(config_dict(path)) else ""


def is_ours(path: str) -> bool:
    """Whether a folder or id is a whole model of ours, and not one of its parts."""
    return config_dict(path).get("model_type") == SQLlavaConfig.model_type


def read_vision_config(path: str, select_layer: int) -> PretrainedConfig:
    """A tower's configuration, ending at the layer that is read.

    Raises:
        ValueError: it has no such layer, cannot be read (`tower_end`), or comes from a model of
            ours that reads another one.
    """
    tower_end(vision_config_of(path))
    if is_ours(path):
        read = config_dict(path)["select_layer"]
        if read != select_layer:
            raise ValueError(
                f"{path}: its tower ends at layer {read}, where it was read, "
                f"but layer {select_layer} is wanted"
            )
        return vision_config_of(path)
    return cut_vision_config(vision_config_of(path), select_layer)


def load_language_model(
    path: str, dtype: torch.dtype, attn_implementation: str | None, quantization_config: Any
) -> PreTrainedModel:
    """Loads a causal language model, on its own or out of a whole model.

    Raises:
        ValueError: weights are missing, or belong to nothing; the message names them.
    """
    config = language_config_of(path)
    model, missing, unexpected = from_pretrained(
        AutoModelForCausalLM,
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        key_mapping={r"^model\.language_model\.": "model."} if is_ours(path) else None,
    )
    beside = {key for key in unexpected if _BESIDE_LANGUAGE_MODEL.match(key)}
    faults = [f"missing: {name}" for name in sorted(missing)]
    faults += [f"unexpected: {name}" for name in sorted(unexpected - beside)]
    faults += _buffer_faults(path, config.num_hidden_layers)
    raise_faults(faults, f"language model {path} is not whole")
    _report_left_out(path, "the language model alone is taken", beside)
    return model


def _buffer_faults(path: str, layers: int) -> list[str]:
    """Older files hold the rotary embedding's frequencies for every layer, newer ones for none;
    transformers passes over any name that has them in it."""
    found = {name for name in files_of(path) if _FREQUENCIES in name}
    proper = [name for name in found if name.endswith(_FREQUENCIES)]
    row = _in_layers(proper, range(layers))
    _report_left_out(path, "these buffers follow from the config", found & row)
    faults = [f"missing: {name}" for name in sorted(row - found)]
    return faults + [f"unexpected: {name}" for name in sorted(found - row)]


def load_tower(
    path: str, select_layer: int, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """Loads a tower up to the layer that is read, on its own or out of a whole model.

    Raises:
        ValueError: weights are missing, or belong to nothing; the message names them.
    """
    config = read_vision_config(path, select_layer)
    within = _tower_prefix(path)
    tower, missing, unexpected = from_pretrained(
        AutoModel,
        path,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        key_mapping={f"^{re.escape(within)}": ""} if within else None,
    )
    layers = vision_config_of(path).num_hidden_layers
    in_file = _names_in_file(path, tower)
    beside = _BESIDE_TOWER_OF_A_MODEL if within else _BESIDE_TOWER
    unexpected = {key for key in unexpected if not beside.match(key)}
    last_norm = _last_norm(tower.state_dict(), config)
    missing -= last_norm
    past = {key for key in unexpected if _layer(key) >= config.num_hidden_layers}
    first = [name for name in tower.state_dict() if _layer(name) == 0]
    whole = _in_layers(first, range(config.num_hidden_layers, layers)) if past else set()
    strange = unexpected - (past & whole)
    faults = [f"missing: {in_file(k)}" for k in sorted(missing | whole - past)]
    faults += [f"unexpected: {in_file(key)}" for key in sorted(strange)]
    raise_faults(faults, f"vision tower {path} is not whole")
    left_out = set(map(in_file, past | last_norm))
    _report_left_out(path, "they come after the layer that is read", left_out)
    return tower


def _last_norm(names: Iterable[str], config: PretrainedConfig) -> set[str]:
    """Of a tower's names, those of the norm past the layer that is read."""
    norm = tower_end(config).last_norm
    return {name for name in names if norm is not None and name.startswith(f"{norm}.")}


def _in_layers(names: Iterable[str], layers: Iterable[int]) -> set[str]:
    """Names of one layer's tensors, in each of these layers."""
    return {_LAYER.sub(rf"\g<1>\g<2>.{n}.", name) for n in layers for name in names}


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found[3]) if found else -1


def files_of(path: str) -> dict[str, Path]:
    """The tensors in a folder's (or an id's) files: name -> file."""
    folder = Path(cast(str, cached_file(path, "config.json"))).parent
    return weight_names(folder) if has_weights(folder) else {}


def _names_in_file(path: str, model: PreTrainedModel) -> Callable[[str], str]:
    """How to name a model's weights as its files do, which may put a prefix before them."""
    names = files_of(path)
    for name in model.state_dict():
        for found in names:
            if found.endswith(f".{name}"):
                prefix = found.removesuffix(name)
                return lambda key: key if key in names else prefix + key
    return lambda key: key


def projector_names(path: str) -> dict[str, str]:
    """Our names of the projector's tensors in a whole model's files, by their names there."""
    ours = {name: our_name(name) or name for name in files_of(path)}
    return {name: new for name, new in ours.items() if part_of(new) == "projector"}


def language_model_names(path: str) -> dict[str, str]:
    """Our names of the tensors in a language model's files, by their names there.

    Raises:
        ValueError: tensors are missing or belong to nothing, as far as names tell it.
    """
    faults = _buffer_faults(path, language_config_of(path).num_hidden_layers)
    raise_faults(faults, f"language model {path} is not whole")
    ours = {n: our_name(n) or n for n in files_of(path) if _FREQUENCIES not in n}
    wanted = {name: new for name, new in ours.items() if part_of(new) == "language model"}
    _report_left_out(path, "the language model alone is taken", ours.keys() - wanted.keys())
    return wanted


def tower_names(path: str, kept: int) -> dict[str, str]:
    """Our names of the tensors in a tower's files, up to layer `kept`, by their names there.

    Raises:
        ValueError: the layers past that are not whole.
    """
    prefix = "model.vision_tower."
    within = bool(_tower_prefix(path))
    names = {}
    for name in files_of(path):
        ours = (our_name(name) or name) if within else prefix + name.removeprefix("vision_model.")
        if ours.startswith(prefix) and (within or not _BESIDE_TOWER.match(name)):
            names[name] = ours
    local = {ours.removeprefix(prefix) for ours in names.values()}
    last_norm = {prefix + name for name in _last_norm(local, vision_config_of(path))}
    after = {name for name, ours in names.items() if ours in last_norm}
    past = {name for name, ours in names.items() if _layer(ours) >= kept}
    first = [name for name, ours in names.items() if _layer(ours) == 0]
    layers = vision_config_of(path).num_hidden_layers if past else kept
    whole = _in_layers(first, range(kept, layers))
    faults = [f"missing: {name}" for name in sorted(whole - past)]
    faults += [f"unexpected: {name}" for name in sorted(past - whole)]
    raise_faults(faults, f"vision tower {path} is not whole")
    _report_left_out(path, "they come after the layer that is read", past | after)
    return {name: ours for name, ours in names.items() if name not in past | after}


def _report_left_out(path: str, reason: str, names: Iterable[str]) -> None:
    if listed := sorted(names):
        logger.info("%s: left out, as %s: %s", path, reason, ", ".join(listed))


def image_settings(vision_tower: str) -> dict[str, Any]:
    """A tower's preprocessor_config.json, or that of a model of ours."""
    return LlavaImageProcessorPil.get_image_processor_dict(_tower_folder(vision_tower))[0]


def load_tokenizer(language_model: str) -> PreTrainedTokenizerBase:
    """A language model's tokenizer, with an `<image>` token."""
    config = language_config_of(language_model)
    with refused_code(language_model):
        tokenizer = AutoTokenizer.from_pretrained(
            language_model, config=config, trust_remote_code=False
        )
    add_image_token(tokenizer)
    return tokenizer


def projector_of(config: Mapping[str, Any]) -> tuple[str, dict[str, int]]:
    """The projector that a config.json names, ours or published, with its options."""
    settings = settings_of(config) if is_published(config) else config
    kind = settings["projector_type"]
    return kind, whole_options(kind, settings["projector_options"])


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that is saved with a model, ours or published; errors as `load_processor`."""
    _check_tokenizer(folder)
    with refused_code(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        names = " or ".join(_TOKENIZER_FILES)
        raise FileNotFoundError(f"{folder}: no {names}: its tokenizer is not there")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            read_json(folder / name)


def load_processor(folder: Path) -> SQLlavaProcessor:
    """The processor that is saved with a model of ours.

    Raises:
        FileNotFoundError: files of it are missing; the message names them.
        ValueError: one of them is damaged, or wants to run code of its own.
    """
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder}: no processor_config.json: its processor is not there")
    _check_tokenizer(folder)
    if "image_processor" not in read_json(folder / "processor_config.json"):
        raise ValueError(f"{folder / 'processor_config.json'}: no image_processor in it")
    with refused_code(folder):
        return SQLlavaProcessor.from_pretrained(folder, trust_remote_code=False)


def read_projector(path: str) -> dict[str, torch.Tensor]:
    """The projector that lies in a whole model's files, under our names."""
    files = files_of(path)
    values = {}
    for name, ours in projector_names(path).items():
        with open_tensors(files[name]) as tensors:
            values[ours] = tensors[name]
    return values


def from_pretrained(kind: Any, path: str, **options: Any) -> tuple[Any, set[str], set[str]]:
    """Loads a model by one of transformers' classes.

    Returns:
        The model, the names of its weights that the files lack, and those in the files that it
        lacks. transformers' own report of these is silenced: here they are judged.
    """
    files_of(path)  # says which file is damaged or missing, if one is
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_no_load_report)
    try:
        with refused_code(path):
            model, info = kind.from_pretrained(
                path, output_loading_info=True, trust_remote_code=False, **options
            )
    finally:
        reporter.removeFilter(_no_load_report)
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()

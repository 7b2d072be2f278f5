"""ViT-LoRA, LLM-LoRA and the projector as one PEFT adapter: what trains, and reading it back.

PEFT is imported where it is used: that takes seconds, and a model is loaded without it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedModel

from sqllava.errors import raise_faults
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.tower import blocks_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR = "multi_modal_projector"
# What PEFT puts before a model's own names.
PEFT_PREFIX = "base_model.model."

# PEFT's own word for a configuration without LoRA modules.
NO_TARGETS = "dummy-target-modules"

PARTS = ("language model", "projector", "vision tower")
# Where the parts that take LoRA stand in the model. Full module paths all through: a bare suffix
# such as "q_proj" would hit the tower and the language model both.
_LORA_ROOTS = {"language model": "model.language_model", "vision tower": "model.vision_tower"}


@dataclass(frozen=True)
class Lora:
    """Rank, alpha and dropout of one part's LoRA.

    Attributes:
        targets: a regex over full module paths, as an adapter on disk has it; None for every linear
            layer of the part's blocks.
    """

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Training:
    """What a stage trains.

    Attributes:
        projector: train the whole projector.
        vision_lora: LoRA on the vision tower, or None.
        language_lora: LoRA on the language model, or None.
        full_language: train all of the language model itself (then no LoRA).
    """

    projector: bool = True
    vision_lora: Lora | None = None
    language_lora: Lora | None = None
    full_language: bool = False

    @property
    def loras(self) -> dict[str, Lora | None]:
        """LoRA by part."""
        return {"vision tower": self.vision_lora, "language model": self.language_lora}


def part_of(parameter_name: str) -> str:
    """Which of PARTS a parameter belongs to, by its name."""
    if f"{PROJECTOR}." in parameter_name:
        return "projector"
    return "vision tower" if "vision_tower." in parameter_name else "language model"


def prepare_training(
    model: SQLlavaForConditionalGeneration, training: Training
) -> SQLlavaForConditionalGeneration | PeftModel:
    """Marks what trains, the only place that does so, and adds the adapter where there is one.

    Returns:
        A PeftModel, or for full finetuning the model itself.

    Raises:
        ValueError: a LoRA cannot reach every linear layer of its part, or nothing would train.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    model.requires_grad_(False)
    if training.full_language:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        _train_projector(model.model.multi_modal_projector, training.projector)
        return model
    config = lora_config(model, training)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            lora = training.loras[part_of(f"{name}.")]
            assert lora is not None
            module.lora_dropout["default"] = nn.Dropout(lora.dropout)
        elif name.endswith(f"{PROJECTOR}.modules_to_save.default"):
            _train_projector(module, training.projector)
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise ValueError("nothing trains: the projector has no weights, and no LoRA is enabled")
    return peft_model


def trained_names(
    model: SQLlavaForConditionalGeneration | PeftModel, training: Training
) -> set[str]:
    """The parameters that are to train, by their names in a model that `prepare_training` made."""
    whole = {"projector": training.projector, "language model": training.full_language}
    names = {
        name
        for name, _ in model.named_parameters()
        if whole.get(part_of(name)) and not _never_trains(name)
    }
    for part, lora in training.loras.items():
        for path in linear_layers(model, part) if lora else ():
            names |= {f"{PEFT_PREFIX}{path}.lora_{side}.default.weight" for side in "AB"}
    return names


def _never_trains(name: str) -> bool:
    """Whether a parameter is PEFT's copy of the projector as it was, or the norm that every
    published projector has and no forward reads."""
    name = name.replace(".modules_to_save.default.", ".")
    return ".original_module." in name or f"{PROJECTOR}.ln_1." in name


def linear_layers(model: SQLlavaForConditionalGeneration | PeftModel, part: str) -> list[str]:
    """The linear layers in the blocks of a part, by their full paths; also of a model with LoRA.

    Raises:
        ValueError: there are none, or the blocks hold matrices that are no linear layers, as a
            mixture's experts in one tensor: LoRA would reach a part of the block only.
    """
    paths, strange = _linear_paths(model, part)
    if strange:
        raise ValueError(
            f"LoRA cannot reach all of the {part}'s blocks: {len(strange)} matrices are not in "
            f"linear layers, such as {', '.join(strange[:3])}"
        )
    if not paths:
        raise ValueError(f"LoRA reaches nothing of the {part}: its blocks have no linear layers")
    return paths


def _linear_paths(
    model: SQLlavaForConditionalGeneration | PeftModel, part: str
) -> tuple[list[str], list[str]]:
    """The linear layers of a part's blocks, and the matrices there that are none."""
    base = model if isinstance(model, SQLlavaForConditionalGeneration) else model.get_base_model()
    base = cast(Any, base)
    root = _LORA_ROOTS[part]
    config = base.config.vision_config if part == "vision tower" else base.config.text_config
    paths: list[str] = []
    strange: list[str] = []
    for block_path, block in blocks_of(base.get_submodule(root), config.num_hidden_layers):
        for name, module in block.named_modules():
            path = ".".join(filter(None, (root, block_path, name.removesuffix(".base_layer"))))
            if ".lora_" in path:
                continue
            if isinstance(module, nn.Linear):
                paths.append(path)
            elif not isinstance(module, _NO_MATRICES):
                strange += [f"{path}.{n} ({type(module).__name__})" for n in _matrices(module)]
    return paths, strange


# Modules with matrices that LoRA is not meant for.
_NO_MATRICES = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _matrices(module: nn.Module) -> list[str]:
    """A module's own parameters that multiply what passes: its weight, or a stack of several."""
    shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in module.named_parameters(recurse=False)}
    return [
        name
        for name, shape in shapes.items()
        if len(shape) > 2 or (len(shape) == 2 and name.endswith("weight"))
    ]


def _targets(model: SQLlavaForConditionalGeneration, training: Training) -> dict[str, str]:
    """For each part with LoRA the regex of its layers' paths."""
    targets = {}
    for part, lora in training.loras.items():
        if lora and lora.targets is not None:
            targets[part] = lora.targets
        elif lora:
            root = re.escape(f"{_LORA_ROOTS[part]}.")
            paths = map(re.escape, linear_layers(model, part))
            kinds = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", path) for path in paths}
            rests = sorted(kind.removeprefix(root) for kind in kinds)
            targets[part] = f"{root}({'|'.join(rests)})"
    return targets


def lora_config(model: SQLlavaForConditionalGeneration, training: Training) -> LoraConfig:
    """PEFT's configuration of what a stage trains.

    Args:
        model: whose layers it is for; `skeleton` is enough.
    """
    from peft import LoraConfig

    targets = _targets(model, training)
    loras = {part: cast(Lora, training.loras[part]) for part in targets}
    return LoraConfig(
        target_modules="|".join(f"({regex})" for regex in targets.values()) or NO_TARGETS,
        rank_pattern={regex: loras[part].rank for part, regex in targets.items()},
        alpha_pattern={regex: loras[part].alpha for part, regex in targets.items()},
        # Also a frozen projector belongs to the result: no base has it.
        modules_to_save=[PROJECTOR],
    )


def _train_projector(projector: nn.Module, trains: bool) -> None:
    for name, parameter in projector.named_parameters():
        parameter.requires_grad_(trains and not _never_trains(f"{PROJECTOR}.{name}"))


def adapter_state(peft_model: PeftModel) -> dict[str, torch.Tensor] | None:
    """The adapter's tensors by their names in the file, gathered from all ranks.

    Every rank must call it, as ZeRO-3 gathers tensor by tensor; only the first gets the result.
    """
    state = {}
    for name, parameter in peft_model.named_parameters():
        if _in_adapter(name):
            with gathered([parameter]):
                if is_first_rank():
                    state[file_key(name)] = parameter.detach().cpu().clone().contiguous()
    return state if is_first_rank() else None


def _in_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def file_key(parameter_name: str) -> str:
    """An adapter parameter's name without PEFT's adapter name, as PEFT writes it to files."""
    name = parameter_name.replace(".modules_to_save.default.", ".")
    return re.sub(r"\.(lora_[A-Za-z_]+)\.default\.", r".\1.", name)


def load_adapter_state(
    peft_model: PeftModel, state: Mapping[str, torch.Tensor], parts: Iterable[str], source: str
) -> None:
    """Copies adapter tensors into a model that trains (or extends) them.

    Args:
        state: tensors by their names in an adapter file.
        parts: the parts (of PARTS) that must be covered completely; tensors of a part outside
            these must not be there.
        source: where the tensors come from, for errors.

    Raises:
        ValueError: tensors are missing, left over, or of another shape (as with another rank).
    """
    wanted = {
        file_key(name): parameter
        for name, parameter in peft_model.named_parameters()
        if _in_adapter(name) and part_of(name) in parts
    }
    shapes = {
        key: torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        for key, parameter in wanted.items()
    }
    raise_faults(state_faults(state, shapes), f"{source} does not fit this model")
    copy_tensors({parameter: state[key] for key, parameter in wanted.items()})


def state_faults(state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    """What keeps tensors from fitting a model: missing, unexpected, or of another shape."""
    faults = [f"missing: {key}" for key in sorted(shapes.keys() - state.keys())]
    faults += [f"unexpected: {key}" for key in sorted(state.keys() - shapes.keys())]
    for key in sorted(shapes.keys() & state.keys()):
        if shapes[key] != state[key].shape:
            faults.append(
                f"{key}: {tuple(state[key].shape)} in the file, {tuple(shapes[key])} in the model"
            )
    return faults


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on disk: what it puts into a model, and what it adds.

    Attributes:
        state: its tensors by their names in our adapter files.
        source: where they come from, for errors.
    """

    state: dict[str, torch.Tensor]
    vision_lora: Lora | None
    language_lora: Lora | None
    source: str

    @property
    def training(self) -> Training:
        """What a model trains that has such an adapter."""
        return Training(vision_lora=self.vision_lora, language_lora=self.language_lora)

    def merged(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A model's parameter with this adapter in it; the parameter itself where it has no part.

        LoRA is added in float32, so that the sum is rounded once, to `dtype` (by default that of
        the weight).
        """
        dtype = dtype or weight.dtype
        key = PEFT_PREFIX + name
        if key in self.state:
            return self.state[key].to(dtype)
        down = self.state.get(key.removesuffix("weight") + "lora_A.weight")
        if down is None:
            return weight.to(dtype)
        up = self.state[key.removesuffix("weight") + "lora_B.weight"]
        lora = self.vision_lora if part_of(name) == "vision tower" else self.language_lora
        assert lora is not None
        delta = up.float() @ down.float() * (lora.alpha / len(down))
        return (weight.float() + delta.to(weight.device)).to(dtype)


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter directory of ours."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    loras = {
        part: Lora(rank, config["alpha_pattern"][targets], targets=targets)
        for part, root in _LORA_ROOTS.items()
        for targets, rank in config["rank_pattern"].items()
        if targets.startswith(re.escape(f"{root}."))
    }
    state = load_file(folder / ADAPTER_WEIGHTS)
    return Adapter(state, loras.get("vision tower"), loras.get("language model"), str(folder))


def skeleton(config: SQLlavaConfig) -> SQLlavaForConditionalGeneration:
    """Such a model without weights, on the meta device."""
    with torch.device("meta"):
        # Not by from_config, which ZeRO-3 would make partition weights that are not there.
        tower, language = (
            cast(Any, MODEL_MAPPING[type(part)])(part)
            for part in (config.vision_config, config.text_config)
        )
        return SQLlavaForConditionalGeneration(config, tower, language)


def adapter_shapes(config: SQLlavaConfig, training: Training) -> dict[str, torch.Size]:
    """The tensors of a whole adapter file for such a model, without building its weights."""
    model = skeleton(config)
    shapes = {
        PEFT_PREFIX + name: parameter.shape
        for name, parameter in model.named_parameters()
        if part_of(name) == "projector"
    }
    for part, targets in _targets(model, training).items():
        lora = cast(Lora, training.loras[part])
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and re.fullmatch(targets, name):
                size_out, size_in = module.weight.shape
                shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = torch.Size((lora.rank, size_in))
                shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = torch.Size((size_out, lora.rank))
    return shapes


def check_adapter(adapter: Adapter, config: SQLlavaConfig) -> None:
    """Raises ValueError, naming the tensors, if an adapter does not fit a model."""
    faults = state_faults(adapter.state, adapter_shapes(config, adapter.training))
    raise_faults(faults, f"{adapter.source} does not fit this model")


def apply_adapter(model: SQLlavaForConditionalGeneration, adapter: Adapter) -> None:
    """Merges an adapter into a model that has none, and that ZeRO-3 may have partitioned."""
    for name, parameter in model.named_parameters():
        with gathered([parameter], write=True), torch.no_grad():
            if parameter.numel():
                parameter.copy_(adapter.merged(name, parameter))


def save_adapter(model: PeftModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and the model's config.json."""
    config = model.peft_config["default"]
    before, config.inference_mode = config.inference_mode, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    config.inference_mode = before
    unfinished = folder / f"{ADAPTER_WEIGHTS}.tmp"
    save_file(state, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / ADAPTER_WEIGHTS)
    cast(PreTrainedModel, model.get_base_model()).config.save_pretrained(folder)


def copy_tensors(values: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Copies values into parameters, which ZeRO-3 may have partitioned."""
    for parameter, value in values.items():
        with gathered([parameter], write=True), torch.no_grad():
            if parameter.shape == value.shape:
                parameter.copy_(value)


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Makes parameters whole while the block runs, if ZeRO-3 holds them in pieces."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not initialized or torch.distributed.get_rank() == 0


@dataclass
class PartCounts:
    """How much of a part trains.

    Attributes:
        modules, reached: its modules, and those that train. Where a part takes LoRA these are the
            linear layers of its blocks, otherwise all modules with parameters.
        parameters, trained: the same of its parameters.
    """

    modules: int = 0
    reached: int = 0
    parameters: int = 0
    trained: int = 0


def trained_parts(model: SQLlavaForConditionalGeneration | PeftModel) -> dict[str, PartCounts]:
    """For each part, how much of it trains. PEFT's frozen copy of the projector does not count."""
    table = {part: PartCounts() for part in PARTS}
    modules: dict[str, dict[str, bool]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        counts, trains = table[part_of(name)], parameter.requires_grad
        count = getattr(parameter, "ds_numel", parameter.numel())
        counts.parameters += count
        counts.trained += count if trains else 0
        path = re.sub(r"\.(lora_[AB]\.default|base_layer)$", "", name.rpartition(".")[0])
        path = path.removeprefix(PEFT_PREFIX)
        modules[part_of(name)][path] = modules[part_of(name)].get(path, False) or trains
    for part, found in modules.items():
        if part in _LORA_ROOTS and not all(found.values()):
            linear = set(_linear_paths(model, part)[0])
            found = {path: trains for path, trains in found.items() if path in linear}
        table[part].modules, table[part].reached = len(found), sum(found.values())
    return table

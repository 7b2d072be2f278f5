"""ViT-LoRA, LLM-LoRA and the projector as one PEFT adapter: what trains, and reading it back.

PEFT is imported where it is used: that takes seconds, and a model is loaded without it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from sqllava.errors import raise_faults
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PROJECTOR = "multi_modal_projector"
# What PEFT puts before a model's own names.
PEFT_PREFIX = "base_model.model."

# Full module paths: a bare suffix such as "q_proj" would hit the tower and the language model both.
VISION_TARGETS = (
    r"model\.vision_tower\.(.*\.)?layers\.\d+\.(self_attn|mlp)\."
    r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)
LANGUAGE_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\."
    r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
# PEFT's own word for a configuration without LoRA modules.
NO_TARGETS = "dummy-target-modules"

PARTS = ("language model", "projector", "vision tower")


@dataclass(frozen=True)
class Lora:
    """Rank, alpha and dropout of one part's LoRA."""

    rank: int
    alpha: int
    dropout: float = 0.0


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
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    model.requires_grad_(False)
    if training.full_language:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        _train_projector(model.model.multi_modal_projector, training.projector)
        return model
    peft_model = get_peft_model(model, lora_config(training), autocast_adapter_dtype=False)
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            lora = training.vision_lora if "vision_tower." in name else training.language_lora
            assert lora is not None
            module.lora_dropout["default"] = nn.Dropout(lora.dropout)
        elif name.endswith(f"{PROJECTOR}.modules_to_save.default"):
            _train_projector(module, training.projector)
    return peft_model


def _loras(training: Training) -> dict[str, Lora | None]:
    return {VISION_TARGETS: training.vision_lora, LANGUAGE_TARGETS: training.language_lora}


def lora_config(training: Training) -> LoraConfig:
    """PEFT's configuration of what a stage trains."""
    from peft import LoraConfig

    active = {targets: lora for targets, lora in _loras(training).items() if lora}
    return LoraConfig(
        target_modules="|".join(f"({targets})" for targets in active) or NO_TARGETS,
        rank_pattern={targets: lora.rank for targets, lora in active.items()},
        alpha_pattern={targets: lora.alpha for targets, lora in active.items()},
        # Also a frozen projector belongs to the result: no base has it.
        modules_to_save=[PROJECTOR],
    )


def _train_projector(projector: nn.Module, trains: bool) -> None:
    for name, parameter in projector.named_parameters():
        # Every published checkpoint holds ln_1, and no forward reads it.
        parameter.requires_grad_(trains and not name.startswith("ln_1."))


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

    def lora(targets: str) -> Lora | None:
        rank = config["rank_pattern"].get(targets)
        return Lora(rank, config["alpha_pattern"][targets]) if rank else None

    state = load_file(folder / ADAPTER_WEIGHTS)
    return Adapter(state, lora(VISION_TARGETS), lora(LANGUAGE_TARGETS), str(folder))


def adapter_shapes(config: SQLlavaConfig, training: Training) -> dict[str, torch.Size]:
    """The tensors of a whole adapter file for such a model, without building its weights."""
    with torch.device("meta"):
        model = SQLlavaForConditionalGeneration(config)
    shapes = {
        PEFT_PREFIX + name: parameter.shape
        for name, parameter in model.named_parameters()
        if part_of(name) == "projector"
    }
    for name, module in model.named_modules():
        for targets, lora in _loras(training).items():
            if lora and re.fullmatch(targets, name):
                size_out, size_in = module.weight.shape
                shapes[f"{PEFT_PREFIX}{name}.lora_A.weight"] = torch.Size((lora.rank, size_in))
                shapes[f"{PEFT_PREFIX}{name}.lora_B.weight"] = torch.Size((size_out, lora.rank))
    return shapes


def check_adapter(adapter: Adapter, config: SQLlavaConfig) -> None:
    """Raises ValueError, naming the tensors, if an adapter does not fit a model."""
    training = Training(vision_lora=adapter.vision_lora, language_lora=adapter.language_lora)
    faults = state_faults(adapter.state, adapter_shapes(config, training))
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


def trained_parts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each part: how many parameters it has and how many train."""
    table = {part: {"parameters": 0, "trained": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        table[part_of(name)]["parameters"] += count
        table[part_of(name)]["trained"] += count if parameter.requires_grad else 0
    return table

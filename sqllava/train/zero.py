"""The DeepSpeed file: read, compared with the flags, and made to do what the flags say."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import deepspeed

GATHER = "stage3_gather_16bit_weights_on_model_save"
# Of DeepSpeed's AdamW: which of our flags must agree, unless the file says "auto"; and what chooses
# between forms of the same AdamW.
_ADAMW = ("Adam", "AdamW")
_FORMS = {"torch_adam": None, "adam_w_mode": True, "bias_correction": True, "amsgrad": False}
# What flags decide; a file that leaves it out would have DeepSpeed's own value, silently.
_FROM_FLAGS = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
# Sections that would change the data, the model or the loss.
_STRANGE = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "eigenvalue",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
)
_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


@dataclass
class ZeroConfig:
    """A DeepSpeed configuration as the run uses it.

    Attributes:
        values: without an optimiser or a schedule of its own.
        faults: what in the file contradicts the flags.
        notes: what in the file gives way to the flags, for the log.
    """

    values: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.values["zero_optimization"].get("stage", 0)


def read_zero(given: str | dict[str, Any], train: TrainingArguments) -> ZeroConfig:
    """Reads what --deepspeed names.

    Learning rates belong to the parts of the model, of which a DeepSpeed file knows nothing: with
    an "optimizer" section all would train at one rate. So this and a "scheduler" section give way
    to the flags where they agree, and are faults where they do not. Weights are always gathered
    when they are saved.

    Args:
        given: a file, JSON, or the configuration itself.
        train: the flags, as they were given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    name = "--deepspeed"
    if isinstance(given, str):
        name, given = (name, _json(name, given)) if given.startswith("{") else (given, _read(given))
    zero = ZeroConfig(json.loads(json.dumps(_FROM_FLAGS | given)))
    partition = zero.values.setdefault("zero_optimization", {})
    stage = partition.get("stage", 0) if isinstance(partition, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(
            f"{name}: zero_optimization has to be an object with a stage of 0 to 3, "
            f"found {json.dumps(partition)}"
        )
    strange = [section for section in _STRANGE if section in zero.values]
    zero.faults += [f"{name}: its section {section!r} is not supported" for section in strange]
    if (optimizer := zero.values.pop("optimizer", None)) is not None:
        zero.faults += [f"{name}: its optimizer {fault}" for fault in _optimizer(optimizer, train)]
        zero.notes.append(
            f"{name}: its optimizer section is not used: the optimiser is --optim "
            f"{plain(train.optim)}, with each part's own learning rate"
        )
    if (scheduler := zero.values.pop("scheduler", None)) is not None:
        zero.faults += [f"{name}: its scheduler {fault}" for fault in _scheduler(scheduler)]
        zero.notes.append(
            f"{name}: its scheduler section is not used: the schedule is --lr_scheduler_type "
            f"{plain(train.lr_scheduler_type)} with --warmup_ratio or --warmup_steps"
        )
    if partition.get("offload_optimizer"):
        # Ours is torch's AdamW, which DeepSpeed takes beside offloading when it is told to.
        zero.values.setdefault("zero_force_ds_cpu_optimizer", False)
    zero.faults += [f"{name}: its zero_optimization {fault}" for fault in _unknown(partition)]
    gathers = partition.pop(GATHER.removeprefix("stage3_"), False)  # DeepSpeed's other name for it
    if zero.stage == 3 and not partition.setdefault(GATHER, gathers):
        partition[GATHER] = True
        zero.notes.append(f"{name}: {GATHER} is taken as true: without it no weights are saved")
    return zero


def plain(choice: Any) -> str:
    """A flag's value as it is written; transformers turns some into enumerations."""
    return str(getattr(choice, "value", choice))


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--deepspeed {path}: no such file (see scripts/zero3.json)")
    try:
        return _json(path, Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is a JSON {type(values).__name__}, where an object was expected")
    return values


def _unknown(partition: dict[str, Any]) -> list[str]:
    """Keys that DeepSpeed does not take, which it would say at length once the model is built."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {
        word
        for name, about in DeepSpeedZeroConfig.model_fields.items()
        for word in (name, about.alias)
    }
    return [f"has {key!r:.60}, which DeepSpeed does not know" for key in partition.keys() - known]


def _optimizer(section: Any, train: TrainingArguments) -> list[str]:
    kind, params = _parts(section)
    if kind not in _ADAMW:
        return [f"is {kind!r}: choose one by --optim, and remove the section"]
    ours = {
        "lr": ("--learning_rate", train.learning_rate),
        "betas": ("--adam_beta1 and --adam_beta2", [train.adam_beta1, train.adam_beta2]),
        "eps": ("--adam_epsilon", train.adam_epsilon),
        "weight_decay": ("--weight_decay", train.weight_decay),
    }
    faults = []
    for name, value in params.items():
        if name in ours:
            flag, wanted = ours[name]
            if value != "auto" and not _same(value, wanted):
                faults.append(f"has {name} {value}, but {flag} is {wanted}: make them agree")
        elif name not in _FORMS:
            faults.append(f"has {name} {value}, which no flag has: remove it")
        elif value != "auto" and _FORMS[name] not in (None, value):
            faults.append(f"has {name} {value}, which --optim does not do: remove it")
    return faults


def _scheduler(section: Any) -> list[str]:
    kind, params = _parts(section)
    if kind not in _SCHEDULES:
        return [f"is {kind!r}: choose one by --lr_scheduler_type, and remove the section"]
    # A warm-up from zero is what the flags' schedules do.
    own = {n: v for n, v in params.items() if v != "auto" and (n, v) != ("warmup_min_lr", 0)}
    return [
        f"has {name} {value}: write 'auto', and say it by a flag" for name, value in own.items()
    ]


def _parts(section: Any) -> tuple[Any, dict[str, Any]]:
    section = section if isinstance(section, dict) else {"type": section}
    params = section.get("params") or {}
    return section.get("type"), params if isinstance(params, dict) else {"params": params}


def _same(value: Any, wanted: Any) -> bool:
    """Whether a file's value is a flag's; JSON writers also write numbers as strings."""
    if isinstance(wanted, list):
        return isinstance(value, list) and len(value) == 2 and all(map(_same, value, wanted))
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        return False


@contextmanager
def whole_models() -> Iterator[None]:
    """Lets models be built whole, on the meta device too, where ZeRO-3 is set up already.

    transformers would partition them over all ranks, and fill in weights that are not there.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held

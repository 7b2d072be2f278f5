"""The flags of one run, parsed, and the one place where they are checked together."""

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from sqllava.checkpoint.published import SELECT_FEATURES
from sqllava.conversation import TEMPLATES
from sqllava.data.records import what_is_meant
from sqllava.model.adapters import Lora, Training
from sqllava.model.processor import ASPECT_RATIOS
from sqllava.model.projector import build_projector
from sqllava.train.flags import DataArguments, ModelArguments, Pack, RecipeArguments
from sqllava.train.transformers_flags import NEEDS_BITSANDBYTES, OPTIMISERS, refused_flags
from sqllava.train.zero import ZeroConfig, plain, read_zero

logger = logging.getLogger(__name__)


@dataclass
class TrainArguments(RecipeArguments, TrainingArguments):
    """transformers' training arguments, and those of SQ-LLaVA."""

    # What is wrong with the flags of transformers, and the file of --deepspeed as it is used.
    refused: list[str] = field(init=False, default_factory=list)
    zero: ZeroConfig | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.refused = refused_flags(self)
        if self.deepspeed:
            if find_spec("deepspeed") is None:
                raise ValueError("--deepspeed needs the package deepspeed: pip install '.[train]'")
            self.zero = read_zero(self.deepspeed, self)
            self.deepspeed = self.zero.values
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # below 1, transformers takes it as a share
        # The published scripts' name, under which transformers 6 will not know it any more.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            given = self.gradient_checkpointing_kwargs
            self.activation_checkpointing_kwargs = given or {"use_reentrant": False}
        super().__post_init__()
        if self.zero is not None:
            self.zero.faults += [
                f"--deepspeed: {mismatch.removeprefix('- ')}"
                for mismatch in self.hf_deepspeed_config.mismatches
            ]


@dataclass(frozen=True)
class Arguments:
    """All flags of one run."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments

    @property
    def sq_r(self) -> float:
        """The self-questioning ratio, with its default."""
        if self.data.sq_r is not None:
            return self.data.sq_r
        return 0.3 if TEMPLATES[self.model.version].self_questions else 0.0

    @property
    def pack(self) -> Pack:
        """How records are packed, with its default."""
        return self.data.pack or ("rows" if self.model.tune_mm_mlp_adapter else "shared")

    @property
    def training(self) -> Training:
        """What this run trains."""
        model, train = self.model, self.train
        frozen_language = model.tune_mm_mlp_adapter or model.freeze_backbone
        lora = train.lora_enable and not frozen_language
        return Training(
            projector=not model.freeze_mm_mlp_adapter,
            vision_lora=Lora(train.lora_r_vit, train.lora_alpha_vit, train.lora_dropout_vit)
            if train.vit_lora_enable
            else None,
            language_lora=Lora(train.lora_r, train.lora_alpha, train.lora_dropout)
            if lora
            else None,
            full_language=not frozen_language and not train.lora_enable,
        )


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parses the flags and checks them together.

    Raises:
        ValueError: every fault that was found, in one message.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainArguments),  # type: ignore[arg-type]
        prog="python -m sqllava.train",
        description="Trains SQ-LLaVA: stage 1 (alignment) or stage 2 (self-questioning).",
    )
    parsed = parser.parse_args_into_dataclasses(list(argv if argv is not None else sys.argv[1:]))
    arguments = Arguments(*cast(tuple[ModelArguments, DataArguments, TrainArguments], parsed))
    faults = find_faults(arguments)
    if faults:
        raise ValueError(
            "these flags cannot go together:\n" + "\n".join(f"  - {f}" for f in faults)
        )
    return arguments


def find_faults(arguments: Arguments) -> list[str]:
    """Everything that is wrong with the flags, each fault with what would be right."""
    return [
        *_model_faults(arguments),
        *_data_faults(arguments),
        *_training_faults(arguments),
        *_number_faults(arguments),
    ]


# Flags that are numbers: the least that each may be, and what it must stay below. All are finite.
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_latents", "model_max_length"), (1, math.inf)),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_r_vit", "lora_alpha_vit"), (1, math.inf)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    "gradient_accumulation_steps": (1, math.inf),
    **dict.fromkeys(("learning_rate", "mm_projector_lr", "vision_tower_lr"), (0, math.inf)),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm"), (0, math.inf)),
    **dict.fromkeys(("max_bad_samples", "dataloader_num_workers", "eval_delay"), (0, math.inf)),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), (0, math.inf)),
    **dict.fromkeys(("num_train_epochs", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "warmup_ratio"), (0, 1)),
    **dict.fromkeys(("lora_dropout", "lora_dropout_vit"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32)),
    "max_steps": (-1, math.inf),
}


def _number_faults(arguments: Arguments) -> list[str]:
    model, data, train = arguments.model, arguments.data, arguments.train
    given = {**vars(model), **vars(data), **vars(train)}
    faults = []
    for flag, (least, below) in _BOUNDS.items():
        value = given[flag]
        if value is not None and not least <= value < below:
            end = "" if below == math.inf and value != math.inf else f" and below {below}"
            faults.append(f"--{flag} {value} must be at least {least}{end}")
    if train.max_steps == 0 or (train.max_steps < 0 and not train.num_train_epochs):
        faults.append(
            f"--max_steps {train.max_steps} with --num_train_epochs {train.num_train_epochs:g}: "
            "give a number of steps above 0, or -1 (the default) and epochs above 0"
        )
    for what in ("save", "eval"):
        strategy, steps = getattr(train, f"{what}_strategy"), getattr(train, f"{what}_steps")
        if plain(strategy) == "steps" and steps == 0:
            faults.append(f"--{what}_steps 0 must be above 0, or --{what}_strategy no")
    return faults


def _model_faults(arguments: Arguments) -> list[str]:
    model, training = arguments.model, arguments.training
    faults = []
    if not model.vision_tower:
        faults.append("--vision_tower is missing, such as openai/clip-vit-large-patch14-336")
    if model.version not in TEMPLATES:
        faults.append(f"--version {model.version!r} is unknown; choose from {list(TEMPLATES)}")
    try:
        with torch.device("meta"):
            build_projector(model.mm_projector_type, 8, 8)
    except ValueError as error:
        faults.append(f"--mm_projector_type: {error}")
    if model.mm_vision_select_feature not in SELECT_FEATURES:
        faults.append(
            f"--mm_vision_select_feature {model.mm_vision_select_feature!r} is unknown; "
            f"choose from {list(SELECT_FEATURES)}"
        )
    if model.mm_use_im_start_end:
        faults.append("--mm_use_im_start_end True is not supported; leave it False")
    nothing = not (training.projector or training.vision_lora or training.language_lora)
    if nothing and not training.full_language:
        faults.append("nothing trains: the projector is frozen and no LoRA is enabled")
    if model.tune_mm_mlp_adapter and model.freeze_mm_mlp_adapter:
        faults.append("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter exclude each other")
    if training.full_language and training.vision_lora:
        faults.append(
            "--vit_lora_enable with full finetuning of the language model: add --lora_enable True, "
            "or --tune_mm_mlp_adapter True for stage 1"
        )
    return faults


def _data_faults(arguments: Arguments) -> list[str]:
    data, model = arguments.data, arguments.model
    faults = []
    if data.image_aspect_ratio not in ASPECT_RATIOS:
        faults.append(
            f"--image_aspect_ratio {data.image_aspect_ratio!r} is unknown; choose from "
            f"{list(ASPECT_RATIOS)}"
        )
    if data.sq_r is not None and not 0.0 <= data.sq_r <= 1.0:
        faults.append(f"--sq_r {data.sq_r} must be between 0 and 1")
    template = TEMPLATES.get(model.version)
    if template and not template.self_questions and data.sq_r:
        faults.append(f"--sq_r has no effect with --version {model.version}; use v1_sq")
    for flag, path in (("data_path", data.data_path), ("eval_data_path", data.eval_data_path)):
        if path and not Path(path).is_file():
            reason = f"no such file{what_is_meant(path)}"
            faults.append(f"--{flag} {path}: {reason} (see download_data.sh and docs/data.md)")
    if data.image_folder and not Path(data.image_folder).is_dir():
        faults.append(f"--image_folder {data.image_folder}: no such folder")
    return faults


def _training_faults(arguments: Arguments) -> list[str]:
    train, training = arguments.train, arguments.training
    faults = []
    if train.vision_tower_lr is not None and not training.vision_lora:
        faults.append("--vision_tower_lr needs --vit_lora_enable True: the tower does not train")
    if train.mm_projector_lr is not None and not training.projector:
        faults.append("--mm_projector_lr with a frozen projector")
    if train.lora_enable and arguments.model.tune_mm_mlp_adapter:
        faults.append(
            "--lora_enable with --tune_mm_mlp_adapter: stage 1 freezes the language model"
        )
    if train.lora_bias != "none":
        faults.append(
            f"--lora_bias {train.lora_bias} must be none: Llama has no biases, "
            "and of the tower LoRA alone is trained"
        )
    if train.bits not in (4, 8, 16):
        faults.append(f"--bits {train.bits} must be 16, 8 or 4")
    elif train.bits < 16 and not training.language_lora:
        faults.append(f"--bits {train.bits} needs --lora_enable True")
    elif train.bits < 16 and zero_stage(train) == 3:
        faults.append(f"--bits {train.bits} cannot be partitioned by ZeRO-3; use zero2.json")
    dispatch = cast(Any, train.accelerator_config)
    if arguments.pack != "off" and (dispatch.split_batches or dispatch.dispatch_batches):
        faults.append("--accelerator_config splits or dispatches batches, which needs --pack off")
    if train.fp16 and not train.deepspeed:
        faults.append("--fp16 needs --deepspeed with loss scaling; prefer --bf16 True")
    if train.fp16 and (train.use_cpu or not torch.cuda.is_available()):
        faults.append("--fp16 needs a GPU; on a CPU use float32 (the default) or --bf16 True")
    if train.metric_for_best_model not in (None, "loss", "eval_loss"):
        faults.append(
            f"--metric_for_best_model {train.metric_for_best_model}: the loss is the only metric"
        )
    for flag, asked in (
        ("--load_best_model_at_end", train.load_best_model_at_end),
        ("--save_strategy best", plain(train.save_strategy) == "best"),
    ):
        if asked and plain(train.eval_strategy) == "no":
            faults.append(f"{flag} needs --eval_strategy and --eval_data_path")
    if plain(train.save_strategy) == "best" and train.metric_for_best_model is None:
        faults.append("--save_strategy best needs --metric_for_best_model loss")
    if not (train.output_dir or "").strip():
        faults.append("--output_dir is empty: name a folder for the result")
    for flag, asked in (
        (f"--eval_strategy {plain(train.eval_strategy)}", train.eval_strategy != "no"),
        ("--eval_on_start", train.eval_on_start),
    ):
        if asked and not arguments.data.eval_data_path:
            faults.append(f"{flag} needs --eval_data_path")
    faults += train.refused + (train.zero.faults if train.zero else [])
    faults += _optimiser_faults(train) + _loader_faults(train) + _report_faults(train)
    return faults


def _optimiser_faults(train: TrainArguments) -> list[str]:
    faults = []
    optimiser, schedule = plain(train.optim), plain(train.lr_scheduler_type)
    if optimiser not in OPTIMISERS:
        faults.append(f"--optim {optimiser} is not supported; choose from {sorted(OPTIMISERS)}")
    elif optimiser in NEEDS_BITSANDBYTES and find_spec("bitsandbytes") is None:
        faults.append(f"--optim {optimiser} needs the package bitsandbytes")
    group = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": train.learning_rate}]
    options = cast(dict[str, Any] | None, train.lr_scheduler_kwargs)
    try:
        get_scheduler(schedule, torch.optim.SGD(group, lr=train.learning_rate), 1, 10, options)
    except (AttributeError, TypeError, ValueError) as error:
        faults.append(
            f"--lr_scheduler_type {schedule} with --lr_scheduler_kwargs {options or {}}: {error}"
        )
    return faults


def _loader_faults(train: TrainArguments) -> list[str]:
    flags = ("persistent_workers", "multiprocessing_context")
    given = [f"--dataloader_{flag}" for flag in flags if getattr(train, f"dataloader_{flag}")]
    if given and not train.dataloader_num_workers:
        return [f"{', '.join(given)} with --dataloader_num_workers 0: there are no workers"]
    return []


def _report_faults(train: TrainArguments) -> list[str]:
    """Reports that cannot be made, which would otherwise show after the model is loaded."""
    faults = []
    for name in cast(list[str], train.report_to):
        if name not in INTEGRATION_TO_CALLBACK:
            faults.append(
                f"--report_to {name} is unknown; choose from {sorted(INTEGRATION_TO_CALLBACK)}"
            )
            continue
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            faults.append(f"--report_to {name}: {error}")
    return faults


def zero_stage(train: TrainArguments) -> int:
    """The ZeRO stage of the DeepSpeed configuration; 0 without one."""
    return train.zero.stage if train.zero else 0


def report_meaningless(arguments: Arguments) -> None:
    """Says once which given flags no longer have a meaning."""
    if not arguments.data.lazy_preprocess:
        logger.warning("--lazy_preprocess False has no effect: records are always read lazily")
    train, pack = arguments.train, arguments.pack
    if pack != "off" and (train.group_by_length or train.group_by_modality_length):
        logger.info(
            "--group_by_length and --group_by_modality_length are for --pack off: with --pack %s "
            "there is no padding, and ranks are level whatever their records",
            pack,
        )
    if arguments.data.data_aug:
        logger.warning("--data_aug True has no effect: the recipe has no augmentation")
    for note in arguments.train.zero.notes if arguments.train.zero else ():
        logger.warning(note)
    if arguments.model.mm_use_im_patch_token:
        logger.warning("--mm_use_im_patch_token True has no effect: no patch token is needed")

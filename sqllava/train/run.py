"""The training entry: flags -> model, data, trainer -> adapter directory, in ten named steps."""

import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import enable_full_determinism, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from sqllava.checkpoint.base import base_record
from sqllava.checkpoint.load import assemble, quantization
from sqllava.checkpoint.published import SELECT_FEATURES
from sqllava.checkpoint.stage1 import read_own_projector, read_stage1
from sqllava.checkpoint.stamp import stamp_file, stamp_model
from sqllava.data.collate import Collator
from sqllava.data.dataset import InstructionDataset
from sqllava.data.index import open_index
from sqllava.data.records import RecordError
from sqllava.encoding import image_token_id
from sqllava.model.adapters import (
    Adapter,
    apply_adapter,
    is_first_rank,
    load_adapter_state,
    prepare_training,
)
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration
from sqllava.model.processor import SQLlavaProcessor
from sqllava.pixels import ImagePreparer
from sqllava.train.arguments import (
    Arguments,
    parse_arguments,
    report_meaningless,
    zero_stage,
)
from sqllava.train.audit import GradientAudit
from sqllava.train.divergence import DivergenceError, FiniteSteps
from sqllava.train.flops import costs_of
from sqllava.train.optim import learning_rates
from sqllava.train.output import (
    DATA_FLAGS,
    MODEL_FLAGS,
    OutputError,
    Plan,
    Record,
    decide,
    locked,
    look,
    remove,
    resume_choice,
    sweep,
    write_record,
)
from sqllava.train.process import Stopped, own_words, whole_process
from sqllava.train.room import check_disk, check_shared_memory, make_writable
from sqllava.train.rows import (
    Attentions,
    RowCollator,
    choose_attention,
    image_cost,
    sizes_of,
)
from sqllava.train.trainer import SQLlavaTrainer, TooManyBadSamplesError

logger = logging.getLogger("sqllava")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one stage of training as a process; see `python -m sqllava.train --help`."""
    with whole_process():
        train(argv)
        if dist.is_initialized():
            dist.destroy_process_group()


def train(argv: Sequence[str] | None = None) -> None:
    """Runs one stage of training and leaves the process group standing."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.startswith("--deepspeed") for word in words):
        without_shared_buffers()
    with contextlib.ExitStack() as held:
        with plain_errors():
            arguments = parse_arguments(words)
            set_up(arguments)
            output = held.enter_context(opened_output(arguments))
            if output.plan.kind == "finished":
                return
            model, processor = build_model(arguments)
            record = record_base(arguments, output.record, model.config)
            dataset = build_dataset(arguments, arguments.data.data_path, processor)
            check_enough(arguments, dataset)
            # new LoRA weights: the same however the model was loaded
            set_seed(arguments.train.seed)
            trained = prepare_training(model, arguments.training)
            start_from_stage1(arguments, trained)
        if zero_stage(arguments.train) == 3:
            gather_by_layer(trained)
        audit = GradientAudit(trained, learning_rates(arguments.train), arguments.training)
        logger.info("what trains:\n%s", audit.table())
        trainer = build_trainer(arguments, trained, processor, dataset, audit)
        trainer.record = record
        with plain_errors((DivergenceError, OutputError, RecordError, TooManyBadSamplesError)):
            run_training(trainer, output.plan)
            save_result(arguments, trainer, record)


@contextlib.contextmanager
def plain_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, OSError),
) -> Iterator[None]:
    """Turns what the user can mend into one message without a traceback, which --log_level debug
    brings back."""
    try:
        yield
    except kinds as error:
        if "debug" in sys.argv:
            raise
        raise SystemExit(f"error: {own_words(error)}") from None


def without_shared_buffers() -> None:
    """Keeps DeepSpeed from laying 66 MB a process into /dev/shm on a CPU.

    These buffers serve tensor-parallel inference alone; DeepSpeed never removes them, and a small
    /dev/shm kills it. To be called before the flags are parsed, which starts the process group.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_up(arguments: Arguments) -> None:
    """Logging, seeds, and the process group, which must stand before the model is built: under
    ZeRO-3 its weights are partitioned as they are loaded."""
    set_up_logging()
    report_meaningless(arguments)
    train = arguments.train
    if train.deepspeed:
        import deepspeed

        deepspeed.init_distributed()
    if train.full_determinism:
        enable_full_determinism(train.seed)
    else:
        set_seed(train.seed)


def set_up_logging() -> None:
    """One line a message on stderr, from the first rank only (warnings from all)."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        level=logging.WARNING,
    )
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


@dataclass(frozen=True)
class Output:
    """A run's output folder, opened: what to do with it, and, on the first rank, its record."""

    plan: Plan
    record: Record | None


@contextlib.contextmanager
def opened_output(arguments: Arguments) -> Iterator[Output]:
    """Checks, locks and clears the output folder on the first rank; all ranks learn the outcome.

    Raises:
        OutputError: it cannot be used as the flags ask for; the other ranks just end.
    """
    with contextlib.ExitStack() as held:
        outcome: list[Plan | None] = [None]
        record, fault = None, None
        if is_first_rank():
            try:
                record = make_record(arguments)
                outcome = [held.enter_context(_prepared(arguments, record))]
            except (ValueError, OSError) as error:
                fault = error
        if dist.is_initialized():
            dist.broadcast_object_list(outcome)
        if outcome[0] is None:
            raise fault or SystemExit(1)
        yield Output(outcome[0], record)


@contextlib.contextmanager
def _prepared(arguments: Arguments, record: Record) -> Iterator[Plan]:
    train = arguments.train
    folder = Path(cast(str, train.output_dir))
    make_writable(folder)
    with locked(folder) as has_locks:
        if not has_locks:
            logger.warning("%s: no locks there; a second run in it would not be noticed", folder)
        found = look(folder)
        choice = resume_choice(train.resume_from_checkpoint)
        plan = decide(found, record, choice, train.overwrite_output_dir)
        if plan.note:
            logger.info("%s", plan.note)
        if plan.kind != "finished":
            if found.strangers:
                names = ", ".join(path.name for path in found.strangers)
                logger.warning("%s: not of this program's making, left alone: %s", folder, names)
            for path in plan.remove:
                logger.warning("removing %s", path)
            remove(plan.remove)
            sweep(folder)
            check_disk(arguments, folder, len(look(folder).complete))
            check_shared_memory(arguments, _processes_here(train.world_size))
            write_record(record, folder)
        yield plan


def _processes_here(world_size: int) -> int:
    """Training processes on this machine, as torch's or DeepSpeed's launcher tells it."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(told) if told else world_size


def build_model(
    arguments: Arguments,
) -> tuple[SQLlavaForConditionalGeneration, SQLlavaProcessor]:
    """The model in the precision of the run, and its processor."""
    flags, train = arguments.model, arguments.train
    options = (
        {"centres": flags.num_latents} if flags.mm_projector_type.startswith("cluster") else {}
    )
    dtype = _dtype(arguments)
    attention = _attention(arguments, dtype)
    model, processor = assemble(
        flags.model_name_or_path,
        cast(str, flags.vision_tower),
        dtype=dtype,
        attn_implementation=attention.tower,
        quantization_config=quantization(train.bits, dtype),
        select_layer=flags.mm_vision_select_layer,
        projector_type=flags.mm_projector_type,
        projector_options=options,
        image_aspect_ratio=arguments.data.image_aspect_ratio,
        conversation_template=flags.version,
        vision_feature_select_strategy=SELECT_FEATURES[flags.mm_vision_select_feature],
    )
    model.model.language_model.set_attn_implementation(attention.language_model)
    model.config.use_cache = False
    if train.activation_checkpointing:
        model.activation_checkpointing_enable(train.activation_checkpointing_kwargs)
    return model, processor


def _dtype(arguments: Arguments) -> torch.dtype:
    """DeepSpeed keeps float32 masters of what trains, so weights may be half precision. Without it
    the weights stay float32 and --bf16 computes under autocast."""
    train = arguments.train
    if not train.deepspeed:
        return torch.float32
    return torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else torch.float32


def _attention(arguments: Arguments, dtype: torch.dtype) -> Attentions:
    """Chooses the attention, and says which.

    Raises:
        ValueError: what was asked for cannot run the rows that were asked for.
    """
    train, pack = arguments.train, arguments.pack
    if pack != "off" and train.n_gpu > 1:
        raise ValueError(
            f"--pack {pack} needs a process for each of the {train.n_gpu} GPUs: start with "
            "deepspeed or torchrun, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    device = train.device.type
    attention = choose_attention(
        arguments.model.attn_implementation,
        pack,
        device,
        is_flash_attn_2_available() and device == "cuda" and dtype != torch.float32,
        is_torch_flex_attn_available(),
    )
    logger.info("--pack %s; attention: %s", pack, " and ".join(dict.fromkeys(attention)))
    return attention


def build_dataset(
    arguments: Arguments, data_path: str, processor: SQLlavaProcessor
) -> InstructionDataset:
    """The records of a file as samples."""
    return InstructionDataset(
        open_index(data_path),
        arguments.data.image_folder,
        processor.tokenizer,
        ImagePreparer(processor.image_processor),
        arguments.model.version,
        processor.image_tokens,
        arguments.train.model_max_length,
        sq_r=arguments.sq_r,
        seed=arguments.train.seed,
        bad_samples=arguments.data.bad_samples,
        jpeg_draft=processor.image_processor.crop_size["height"]
        if arguments.data.jpeg_draft
        else None,
    )


def check_enough(arguments: Arguments, dataset: InstructionDataset) -> None:
    """Raises ValueError if --dataloader_drop_last leaves nothing to train on."""
    train = arguments.train
    batch = train.per_device_train_batch_size * train.world_size
    if train.dataloader_drop_last and len(dataset) < batch:
        raise ValueError(
            f"{arguments.data.data_path}: {len(dataset)} records are fewer than one batch of "
            f"{batch}, and --dataloader_drop_last True drops them all"
        )


def start_from_stage1(
    arguments: Arguments, trained: SQLlavaForConditionalGeneration | PeftModel
) -> None:
    """Gives the projector and the ViT-LoRA the weights of --pretrain_mm_mlp_adapter, or the
    projector those that the base brings along.

    Raises:
        ValueError: the weights do not fit, or some of them would be lost.
    """
    path = arguments.model.pretrain_mm_mlp_adapter
    if path is None:
        stage1 = own_projector(arguments, cast(Any, trained.config))
        if stage1 is None:
            return
        path = f"{stage1.source} (its own projector)"
    else:
        stage1 = read_stage1(Path(path), cast(Any, trained.config))
    if not isinstance(trained, PeftModel):
        apply_adapter(trained, stage1)
        logger.info("starting from %s, merged in", path)
        return
    parts = ["projector"]
    # A whole model has its ViT-LoRA merged in, and LLaVA's projectors come without one: then a
    # new one begins.
    if stage1.vision_lora:
        if arguments.training.vision_lora is None:
            raise ValueError(
                f"{path} has a ViT-LoRA, which --vit_lora_enable False would leave out"
            )
        parts.append("vision tower")
        alpha = arguments.training.vision_lora.alpha
        if stage1.vision_lora.alpha != alpha:
            raise ValueError(
                f"{path} was trained with a ViT-LoRA alpha of {stage1.vision_lora.alpha}, but "
                f"--lora_alpha_vit is {alpha}: its weights would act with another strength"
            )
    load_adapter_state(trained, stage1.state, parts, path)
    logger.info("starting from %s: %s", path, " and ".join(parts))


def own_projector(arguments: Arguments, config: SQLlavaConfig) -> Adapter | None:
    """The base's own trained projector. Without one, or where stage 1 makes one of another type,
    a new one begins, which is said.

    Raises:
        ValueError: the base's is of another type, or there is none and --freeze_mm_mlp_adapter.
    """
    flags = arguments.model
    try:
        own = read_own_projector(flags.model_name_or_path, config)
    except ValueError as error:
        if not flags.tune_mm_mlp_adapter:
            raise ValueError(
                f"{error}: set --mm_projector_type as it is there, or name the projector to start "
                "from with --pretrain_mm_mlp_adapter"
            ) from None
        logger.warning("%s: a new projector begins", error)
        return None
    if own is None:
        if not arguments.training.projector:
            raise ValueError(
                "--freeze_mm_mlp_adapter without --pretrain_mm_mlp_adapter: the projector would "
                "stay as chance made it"
            )
        logger.info("a new projector begins, with weights of chance")
    return own


def gather_by_layer(model: SQLlavaForConditionalGeneration | PeftModel) -> None:
    """Makes ZeRO-3 gather a transformer layer, or the projector, at once.

    LoRA splits a layer into some sixty small modules. By default each has hooks of its own, before
    and after it, forward and backward, and gathers and reduces alone.
    """
    from deepspeed.utils import set_z3_leaf_modules

    inner = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model).model
    set_z3_leaf_modules(model, [GradientCheckpointingLayer, type(inner.multi_modal_projector)])
    # A layer's gradients are reduced when the gradient of its input is there: the first layer of
    # the tower has none of its own accord, and would be reduced before it has run backward.
    inner.vision_tower.enable_input_require_grads()


def build_trainer(
    arguments: Arguments,
    trained: SQLlavaForConditionalGeneration | PeftModel,
    processor: SQLlavaProcessor,
    dataset: InstructionDataset,
    audit: GradientAudit,
) -> SQLlavaTrainer:
    """The trainer, with a validation set if there is one."""
    held_out, pack = arguments.data.eval_data_path, arguments.pack
    sizes = None
    collator: Collator | RowCollator = Collator(processor.tokenizer.pad_token_id)
    if pack != "off":
        sizes = sizes_of(dataset, pack, image_cost(trained, processor.image_tokens))
        image_id = image_token_id(processor.tokenizer)
        collator = RowCollator(image_id, processor.tokenizer.pad_token_id, pack == "shared")
    return SQLlavaTrainer(
        model=trained,
        args=arguments.train,
        train_dataset=dataset,
        eval_dataset=build_dataset(arguments, held_out, processor) if held_out else None,
        data_collator=collator,
        processing_class=processor,
        audit=audit,
        finite=FiniteSteps(arguments.data.data_path, gradients=not arguments.train.fp16),
        max_bad_samples=arguments.data.max_bad_samples,
        sizes=sizes,
        costs=costs_of(trained.config, arguments.training) if is_first_rank() else None,
    )


def run_training(trainer: SQLlavaTrainer, plan: Plan) -> None:
    """Trains from the beginning or from a checkpoint.

    Raises:
        Stopped: a signal came; what was done is in a checkpoint.
        TooManyBadSamplesError: no record could be used.
    """
    with trainer.stop.request.listening():
        trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
    if trainer.audit.idle:
        raise TooManyBadSamplesError(
            f"{trainer.train_dataset.index.source}: none of the records that came up could be used "
            "(the warnings above name them): nothing was trained"
        )
    step = trainer.state.global_step
    if trainer.stop.agreed and step < trainer.state.max_steps:
        logger.info("stopped; checkpoint-%d holds what was done", step)
        raise Stopped(trainer.stop.agreed)


def save_result(arguments: Arguments, trainer: SQLlavaTrainer, record: Record | None) -> None:
    """The final adapter directory, the log of the run, and, last, the record that it is done."""
    folder = Path(cast(str, arguments.train.output_dir))
    with trainer.saving("the result", folder):
        trainer.save_state()
        trainer.save_model()
        if record:
            write_record(replace(record, finished=trainer.state.global_step), folder)
    logger.info("saved %s", arguments.train.output_dir)


def make_record(arguments: Arguments) -> Record:
    """Everything that makes this run's result."""
    model, data, train = arguments.model, arguments.data, arguments.train
    packages = ("sqllava", "torch", "transformers", "peft", "deepspeed", "accelerate")
    files = {name: getattr(data, name) for name in DATA_FLAGS}
    models = {name: getattr(model, name) for name in MODEL_FLAGS}
    given = {
        "stage": 1 if model.tune_mm_mlp_adapter else 2,
        "model": asdict(model),
        "data": asdict(data),
        "training": train.to_sanitized_dict(),
        "sq_r": arguments.sq_r,
        "zero_stage": zero_stage(train),
        "deepspeed": _deepspeed_config(train.deepspeed),
        "world_size": train.world_size,
        "inputs": {name: stamp_file(Path(path)) if path else None for name, path in files.items()}
        | {name: stamp_model(path) if path else None for name, path in models.items()},
        "packages": {name: _version(name) for name in packages}
        | {"python": platform.python_version()},
    }
    return Record(**json.loads(json.dumps(given, default=str)))


def _deepspeed_config(given: dict | str | None) -> dict[str, Any] | None:
    return json.loads(Path(given).read_text()) if isinstance(given, str) else given


def record_base(
    arguments: Arguments, record: Record | None, config: SQLlavaConfig
) -> Record | None:
    """Adds to the record which base and tower this is, so that no other passes for it."""
    if record is None:
        return None
    record = replace(record, base=base_record(config))
    write_record(record, Path(cast(str, arguments.train.output_dir)))
    return record


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

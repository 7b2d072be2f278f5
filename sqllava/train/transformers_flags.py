"""transformers' own training flags: those that do what they say here, and those that are refused.

Every field of TrainingArguments stands in one of the three tables. A flag of a newer transformers
that stands in none is refused until someone has looked at what it changes.
"""

import dataclasses
from typing import Any

from transformers import TrainingArguments

# They change loss, data, model or its weights, and do what they say: tests/test_flags.py,
# test_arguments.py, test_training.py and test_deepspeed.py show it.
WORKS = frozenset(
    [
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "bf16",
        "fp16",
        "tf32",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "deepspeed",
        "seed",
        "data_seed",
        "full_determinism",
        "use_cpu",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ]
)

# Flags that would change loss, data or model in another way than they say, and why. Each may only
# have its default.
REFUSED = {
    "optim_args": "no optimiser that is supported reads it",
    "optim_target_modules": "LoRA says which layers train",
    "average_tokens_across_devices": "a token would weigh differently on each rank",
    "label_smoothing_factor": "transformers' smoother does not shift the labels, and the loss of "
    "SQ-LLaVA has none",
    "neftune_noise_alpha": "the noise would reach the text's embeddings and not the image's",
    "bf16_full_eval": "evaluation belongs to training, and has its precision",
    "fp16_full_eval": "evaluation belongs to training, and has its precision",
    "torch_compile": "neither the audit's hooks nor a batch without images was tried with it",
    "torch_compile_backend": "it turns --torch_compile on, which is not supported",
    "torch_compile_mode": "it turns --torch_compile on, which is not supported",
    "use_liger_kernel": "it has no kernels for this model, and would change nothing",
    "liger_kernel_config": "it belongs to --use_liger_kernel, which is not supported",
    "use_cache": "training reads no cache",
    "auto_find_batch_size": "the steps would no longer be the sampler's: choose a smaller "
    "--per_device_train_batch_size, with more --gradient_accumulation_steps",
    "logging_nan_inf_filter": "a loss that is no number must be seen",
    "do_eval": "use --eval_strategy",
    "do_predict": "use `sqllava eval`",
    "include_for_metrics": "the loss is the only metric",
    "batch_eval_metrics": "the loss is the only metric",
    "ignore_data_skip": "a resumed epoch would see records twice; skipping them costs no time here",
    "accelerator_config": "it would deal records out in another way than the sampler's steps",
    "parallelism_config": "use --deepspeed",
    "fsdp": "use --deepspeed",
    "fsdp_config": "use --deepspeed",
    "dataloader_in_order": "records would come in another order from run to run",
    "remove_unused_columns": "the batch's own statistics would be removed",
    "label_names": "the labels are the data's own",
    "train_sampling_strategy": "use --group_by_length or --group_by_modality_length",
    "length_column_name": "the data's index has the lengths",
}

# What has nothing to do with loss, data or model: logs, reports, files, memory, the network.
ELSEWHERE = frozenset(
    [
        "output_dir",
        "torch_empty_cache_steps",
        "include_num_input_tokens_seen",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "prediction_loss_only",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_accumulation_steps",
        "save_only_model",
        "save_strategy",
        "save_steps",
        "save_on_each_node",
        "save_total_limit",
        "enable_jit_checkpoint",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        "restore_callback_states_from_checkpoint",
        "dataloader_pin_memory",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "debug",
        "skip_memory_metrics",
        "do_train",
        "resume_from_checkpoint",
        "local_rank",
    ]
)

# Optimisers that take parameter groups as they are, each with its learning rate.
OPTIMISERS = frozenset(
    [
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adagrad",
        "rmsprop",
        "adamw_bnb_8bit",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
    ]
)
NEEDS_BITSANDBYTES = frozenset(name for name in OPTIMISERS if name.endswith("bit"))


def refused_flags(given: TrainingArguments) -> list[str]:
    """The flags that were set and are refused, each with the reason.

    Args:
        given: before its `__post_init__`, which fills in values that nobody gave.
    """
    own = {field.name for field in dataclasses.fields(TrainingArguments)}
    faults = []
    for field in dataclasses.fields(given):
        value = getattr(given, field.name, None)
        if field.name not in own - WORKS - ELSEWHERE or value == _default(field):
            continue
        reason = REFUSED.get(field.name, "it is not known what it changes here")
        faults.append(f"--{field.name} {value} is not supported: {reason}")
    return faults


def _default(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()

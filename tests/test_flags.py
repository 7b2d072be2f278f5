"""transformers' own flags: each does what it says, tested here, or is refused with the reason."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from training import flags, losses, write_data
from transformers import TrainingArguments

from sqllava.model.adapters import prepare_training
from sqllava.train import run
from sqllava.train import transformers_flags as tables
from sqllava.train.arguments import parse_arguments
from sqllava.train.audit import GradientAudit

STILL = {"lora_dropout": 0, "lora_dropout_vit": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("flags") / "data.json", "image", count=12)


def parse(data, **changes):
    return parse_arguments(flags(2, data, data.parent / "out", **changes))


def test_every_flag_of_transformers_is_in_exactly_one_table():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = [*tables.WORKS, *tables.REFUSED, *tables.ELSEWHERE]
    assert sorted(names - set(known)) == [], "look at what these change, and add them to a table"
    assert len(known) == len(set(known))


CHANGED = {
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 1e-9,
    "neftune_noise_alpha": 5.0,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "use_cache": True,
    "auto_find_batch_size": True,
    "logging_nan_inf_filter": True,
    "do_eval": True,
    "do_predict": True,
    "include_for_metrics": "loss",
    "batch_eval_metrics": True,
    "ignore_data_skip": True,
    "accelerator_config": '{"split_batches": true}',
    "fsdp": "full_shard",
    "fsdp_config": '{"min_num_params": 1}',
    "dataloader_in_order": False,
    "remove_unused_columns": True,
    "label_names": "answers",
    "train_sampling_strategy": "sequential",
    "length_column_name": "tokens",
}


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_a_refused_flag_stops_the_run_with_its_reason(name, data):
    value = CHANGED[name]
    with pytest.raises((ValueError, SystemExit), match=f"--{name}") as error:
        parse(data, **{name: value})
    assert tables.REFUSED[name] in str(error.value)


def test_flags_that_no_command_line_can_give_are_refused_all_the_same():
    unwritten = tables.REFUSED.keys() - CHANGED.keys()
    assert unwritten == {"liger_kernel_config", "parallelism_config"}
    for name in unwritten:
        given = TrainingArguments(output_dir="nowhere", use_cpu=True)
        setattr(given, name, {"rope": True})
        assert any(tables.REFUSED[name] in fault for fault in tables.refused_flags(given))


def test_a_flag_that_nobody_has_looked_at_is_refused_but_for_its_default(data, monkeypatch):
    parse(data, max_grad_norm=0.5)
    monkeypatch.setattr(tables, "WORKS", tables.WORKS - {"max_grad_norm"})
    parse(data)
    with pytest.raises(ValueError, match="--max_grad_norm 0.5 is not supported: it is not known"):
        parse(data, max_grad_norm=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "galore_adamw"}, "--optim galore_adamw is not supported; choose from .*adamw"),
        ({"optim": "lomo"}, "--optim lomo is not supported"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr.*min_lr"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, "polynomial.*lr_end"),
        ({"lr_scheduler_kwargs": '{"no_such": 1}'}, "linear.*no_such"),
        ({"dataloader_prefetch_factor": 2}, "prefetch_factor can only be set when"),
        ({"dataloader_persistent_workers": True}, "persistent_workers with .*no workers"),
        ({"report_to": "no_such_board"}, "--report_to no_such_board is unknown; choose from"),
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"eval_on_start": True}, "--eval_on_start needs --eval_data_path"),
        ({"metric_for_best_model": "accuracy"}, "the loss is the only metric"),
    ],
)
def test_flags_that_would_fail_later_fail_before_the_model_is_loaded(changes, message, data):
    with pytest.raises(ValueError, match=message):
        parse(data, **changes)


def test_a_report_without_its_package_is_one_sentence_before_the_run(data, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match="--report_to wandb: .*requires wandb to be installed"):
        parse(data, report_to="wandb")


def trainer_of(data, **changes):
    arguments = parse(data, projector_type=None, mm_projector_lr=4e-4, **changes)
    model, processor = run.build_model(arguments)
    trained = prepare_training(model, arguments.training)
    dataset = run.build_dataset(arguments, str(data), processor)
    audit = GradientAudit(trained, {}, arguments.training)
    return run.build_trainer(arguments, trained, processor, dataset, audit)


RATES = {"language model": 1e-3, "projector": 4e-4, "vision tower": 2e-4}


@pytest.mark.parametrize(
    "optimiser", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
)
def test_each_optimiser_steps_each_part_at_its_own_rate(optimiser, data):
    trainer = trainer_of(data, optim=optimiser, lr_scheduler_type="constant")
    trainer.create_optimizer_and_scheduler(10)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert {g["part"]: g["lr"] for g in trainer.optimizer.param_groups} == RATES


@pytest.mark.parametrize(
    ("schedule", "options", "shares"),
    [
        ("linear", None, [1, 0.5]),
        ("cosine", None, [1, 0.5]),
        ("polynomial", '{"lr_end": 1e-12, "power": 1.0}', [1, 0.5]),
        ("cosine_with_min_lr", '{"min_lr_rate": 0.5}', [1, 0.75]),
        ("constant_with_warmup", None, [1, 1]),
        ("inverse_sqrt", '{"timescale": 5}', [1, math.sqrt(0.5)]),
    ],
)
def test_each_schedule_scales_every_parts_rate_alike(schedule, options, shares, data):
    trainer = trainer_of(data, lr_scheduler_type=schedule, lr_scheduler_kwargs=options)
    trainer.create_optimizer_and_scheduler(10)
    for step, share in zip((0, 5), shares, strict=True):
        while trainer.lr_scheduler.last_epoch < step:
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        for group in trainer.optimizer.param_groups:
            assert group["lr"] == pytest.approx(share * RATES[group["part"]], rel=1e-6)


def test_data_seed_orders_the_records_and_nothing_else(data):
    def order(**seeds):
        return [key.index for key in trainer_of(data, **seeds)._get_train_sampler()]

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) != order(seed=1)


def test_an_incomplete_last_batch_is_dropped_where_that_is_asked(data, tmp_path):
    common = {"num_train_epochs": 1, "max_steps": None, "per_device_train_batch_size": 5}
    run.main(flags(2, data, tmp_path / "all", **common))
    run.main(flags(2, data, tmp_path / "dropped", dataloader_drop_last=True, **common))
    assert (len(losses(tmp_path / "all")), len(losses(tmp_path / "dropped"))) == (3, 2)


def test_fewer_records_than_a_batch_with_drop_last_are_one_sentence(data, tmp_path):
    words = flags(2, data, tmp_path, dataloader_drop_last=True, per_device_train_batch_size=16)
    with pytest.raises(SystemExit, match="data.json: 12 records are fewer than one batch of 16"):
        run.main(words)


@pytest.mark.slow
def test_workers_give_the_same_steps_however_they_are_run(data, tmp_path):
    common = {"num_train_epochs": 2, "max_steps": None, **STILL}
    workers = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    kinds = {
        "none": {},
        "persistent": {**workers, "dataloader_persistent_workers": True},
        "spawned": {**workers, "dataloader_multiprocessing_context": "spawn"},
    }
    for name, changes in kinds.items():
        run.main(flags(2, data, tmp_path / name, **common, **changes))
    assert losses(tmp_path / "none") == losses(tmp_path / "persistent")
    assert losses(tmp_path / "none") == losses(tmp_path / "spawned")


def test_the_best_checkpoints_weights_are_those_at_the_end(data, tmp_path):
    """Here the best is the highest loss: that of the first step."""
    run.main(
        flags(
            2,
            data,
            tmp_path,
            eval_data_path=data,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,
            max_steps=2,
        )
    )
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    evaluated = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    assert evaluated[1] > evaluated[2]
    wanted = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())

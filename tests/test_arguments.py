"""Flags: each fault is found, all are reported at once, and old scripts' flags still parse."""

import pytest
from training import GOLDEN, flags, write_data

from sqllava.train.arguments import parse_arguments
from sqllava.train.optim import build_param_groups, learning_rates


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.json", "mixed", count=4)


def parse(stage, data, **changes):
    return parse_arguments(flags(stage, data, data.parent / "out", **changes))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (2, {"version": "v2"}, "--version 'v2' is unknown.*v1_sq"),
        (2, {"mm_projector_type": "mlp"}, "unknown projector 'mlp'.*cluster"),
        (2, {"mm_vision_select_feature": "all"}, "choose from .*patch"),
        (2, {"mm_use_im_start_end": True}, "not supported"),
        (2, {"num_latents": 0}, "--num_latents 0"),
        (2, {"vision_tower": None}, "--vision_tower is missing"),
        (1, {"freeze_mm_mlp_adapter": True}, "exclude each other"),
        (2, {"lora_enable": False}, "full finetuning of the language model"),
        (2, {"image_aspect_ratio": "anyres"}, "choose from"),
        (2, {"sq_r": 1.5}, "--sq_r 1.5 must be between 0 and 1"),
        (2, {"version": "v1"}, "--sq_r has no effect with --version v1"),
        (2, {"data_path": "nowhere.json"}, "--data_path nowhere.json: no such file"),
        (2, {"data_path": "lmms-lab/x"}, "no such file; nothing is fetched from the hub: download"),
        (2, {"image_folder": "nowhere"}, "--image_folder nowhere: no such folder"),
        (2, {"vit_lora_enable": False}, "--vision_tower_lr needs --vit_lora_enable"),
        (2, {"freeze_mm_mlp_adapter": True, "mm_projector_lr": 1e-4}, "frozen projector"),
        (1, {"lora_enable": True}, "stage 1 freezes the language model"),
        (2, {"lora_r": 0}, "--lora_r 0 must be at least 1"),
        (2, {"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        (2, {"lora_bias": "all"}, "must be none"),
        (2, {"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0 must be at lea"),
        (2, {"per_device_eval_batch_size": -1}, "--per_device_eval_batch_size -1 must be at lea"),
        (2, {"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be at lea"),
        (2, {"learning_rate": "nan"}, "--learning_rate nan must be at least 0"),
        (2, {"learning_rate": "inf"}, "--learning_rate inf must be at least 0 and below inf"),
        (2, {"mm_projector_lr": -1e-3}, "--mm_projector_lr -0.001 must be at least 0"),
        (2, {"vision_tower_lr": "nan"}, "--vision_tower_lr nan must be at least 0"),
        (2, {"max_grad_norm": -1}, "--max_grad_norm -1.0 must be at least 0"),
        (2, {"weight_decay": -0.1}, "--weight_decay -0.1 must be at least 0"),
        (2, {"adam_beta2": 1}, "--adam_beta2 1.0 must be at least 0 and below 1"),
        (2, {"warmup_ratio": 3}, "--warmup_ratio 3.0 must be at least 0 and below 1"),
        (2, {"load_best_model_at_end": True}, "--load_best_model_at_end needs --eval_strategy"),
        (2, {"save_strategy": "best"}, "--save_strategy best needs --eval_strategy"),
        (2, {"save_strategy": "best"}, "needs --metric_for_best_model loss"),
        (2, {"output_dir": ""}, "--output_dir is empty"),
        (2, {"seed": -1}, "--seed -1 must be at least 0 and below 4294967296"),
        (2, {"max_bad_samples": -1}, "--max_bad_samples -1 must be at least 0"),
        (2, {"dataloader_num_workers": -1}, "--dataloader_num_workers -1 must be at least 0"),
        (2, {"max_steps": 0}, "--max_steps 0 .*steps above 0, or -1"),
        (2, {"max_steps": -1, "num_train_epochs": 0}, "--num_train_epochs 0.*epochs above 0"),
        (2, {"save_strategy": "steps", "save_steps": 0}, "--save_steps 0 must be above 0"),
        (2, {"bits": 7}, "--bits 7 must be 16, 8 or 4"),
        (1, {"bits": 4}, "--bits 4 needs --lora_enable"),
        (2, {"eval_strategy": "steps"}, "needs --eval_data_path"),
        (
            2,
            {
                "lora_enable": False,
                "freeze_backbone": True,
                "vit_lora_enable": False,
                "vision_tower_lr": None,
                "freeze_mm_mlp_adapter": True,
            },
            "nothing trains",
        ),
    ],
)
def test_each_fault_is_named(data, stage, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(stage, data, **changes)


def test_all_faults_are_reported_together(data):
    with pytest.raises(ValueError) as error:
        parse(2, data, version="v2", sq_r=2, lora_r=0, image_aspect_ratio="anyres")
    assert str(error.value).count("\n  - ") == 4


def test_unknown_flags_are_refused(data, capsys):
    with pytest.raises((SystemExit, ValueError)):
        parse_arguments([*flags(2, data, data.parent), "--no_such_flag", "1"])


def test_every_published_flag_parses(data):
    arguments = parse(
        2,
        data,
        pretrain_mm_mlp_adapter=GOLDEN / "sqllava-pretrain" / "mm_projector.bin",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio="pad",
        group_by_modality_length=True,
        lora_bias="none",
        lora_dropout=0.05,
        mm_projector_lr=2e-5,
        model_max_length=2048,
        lazy_preprocess=True,
        freeze_backbone=False,
        freeze_mm_mlp_adapter=False,
        bits=16,
        data_aug=False,
        evaluation_strategy="no",
        warmup_ratio=0.03,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        tf32=False,
        report_to="none",
        save_total_limit=1,
    )
    assert arguments.train.get_warmup_steps(100) == 3
    assert arguments.sq_r == 0.5


def test_self_questioning_ratio_has_the_published_default(data):
    assert parse(2, data, sq_r=None).sq_r == 0.3
    assert parse(1, data).sq_r == 0.0


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_not_reentrant_under_its_published_name_and_the_new_one(data, name):
    train = parse(2, data, **{name: True}).train
    assert train.activation_checkpointing is True
    assert train.activation_checkpointing_kwargs == {"use_reentrant": False}
    chosen = parse(2, data, **{name: True, f"{name}_kwargs": '{"use_reentrant": true}'}).train
    assert chosen.activation_checkpointing_kwargs == {"use_reentrant": True}
    assert not parse(2, data).train.activation_checkpointing


def test_each_learning_rate_counts_whichever_others_are_set(data):
    rates = learning_rates(parse(2, data, learning_rate=1.0, vision_tower_lr=0.1).train)
    assert rates == {"language model": 1.0, "projector": 1.0, "vision tower": 0.1}
    rates = learning_rates(
        parse(2, data, learning_rate=1.0, vision_tower_lr=None, mm_projector_lr=0.2).train
    )
    assert rates == {"language model": 1.0, "projector": 0.2, "vision tower": 1.0}


def test_each_trained_parameter_is_in_exactly_one_group(data):
    from sqllava.checkpoint.load import assemble
    from sqllava.model.adapters import prepare_training

    arguments = parse(2, data, weight_decay=0.1, mm_projector_lr=0.2)
    model, _ = assemble(str(GOLDEN / "vicuna-tiny"), str(GOLDEN / "clip-tiny"))
    trained = prepare_training(model, arguments.training)
    groups = build_param_groups(trained.named_parameters(), arguments.train)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    expected = [id(p) for p in trained.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(expected)
    seen = {(g["part"], g["lr"], g["weight_decay"]) for g in groups}
    assert seen == {
        ("language model", 1e-3, 0.1),
        ("projector", 0.2, 0.1),
        ("projector", 0.2, 0.0),
        ("vision tower", 2e-4, 0.1),
    }

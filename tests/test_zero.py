"""DeepSpeed's file: what it says agrees with the flags, gives way to them, or stops the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import REPO, environment, flags, write_data
from transformers import TrainingArguments

from sqllava.checkpoint.weights import has_weights
from sqllava.train.zero import GATHER, read_zero

AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
ADAMW = {"type": "AdamW", "params": AUTO}


@pytest.fixture(scope="module")
def train():
    return TrainingArguments(output_dir="nowhere", learning_rate=2e-4, use_cpu=True)


def test_sections_of_llavas_file_give_way_to_the_flags_with_a_word(train):
    given = {
        "optimizer": ADAMW,
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    zero = read_zero(given, train)
    assert not zero.faults and zero.stage == 3
    assert "optimizer" not in zero.values and "scheduler" not in zero.values
    assert zero.values["zero_force_ds_cpu_optimizer"] is False
    said = "\n".join(zero.notes)
    assert "optimizer section is not used: the optimiser is --optim adamw_torch" in said
    assert "scheduler section is not used: the schedule is --lr_scheduler_type linear" in said
    assert "optimizer" in given, "the caller's own is left as it is"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "Lamb", "params": {}}, "optimizer is 'Lamb': choose one by --optim"),
        ({"type": "OneBitAdam"}, "optimizer is 'OneBitAdam'"),
        ({"type": "AdamW", "params": {"lr": 1e-3}}, "has lr 0.001, but --learning_rate is 0.0002"),
        ({"type": "AdamW", "params": {"betas": [0.8, 0.999]}}, "betas .*--adam_beta1"),
        ({"type": "AdamW", "params": {"weight_decay": 3e-7}}, "--weight_decay is 0.0"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam_w_mode False"),
        ({"type": "AdamW", "params": {"freeze_step": 9}}, "has freeze_step 9, which no flag has"),
        ("AdamW8", "optimizer is 'AdamW8'"),
    ],
)
def test_an_optimizer_that_contradicts_the_flags_is_a_fault(section, message, train):
    with pytest.raises(AssertionError, match=message):
        assert not read_zero({"optimizer": section}, train).faults


@pytest.mark.parametrize(
    "section",
    [
        ADAMW,
        {"type": "Adam", "params": {"lr": 2e-4, "torch_adam": True, "adam_w_mode": True}},
        {"type": "AdamW", "params": {"lr": "2e-4", "betas": [0.9, 0.999], "eps": 1e-8}},
        {"type": "AdamW"},
    ],
)
def test_an_optimizer_that_says_what_the_flags_say_is_none(section, train):
    assert not read_zero({"optimizer": section}, train).faults


def test_a_schedule_of_the_files_own_is_a_fault(train):
    one_cycle = {"scheduler": {"type": "OneCycle", "params": {}}}
    assert "--lr_scheduler_type" in read_zero(one_cycle, train).faults[0]
    steps = {"scheduler": {"type": "WarmupLR", "params": WARMUP | {"warmup_num_steps": 100}}}
    assert "warmup_num_steps 100" in read_zero(steps, train).faults[0]
    zero = {"scheduler": {"type": "WarmupLR", "params": WARMUP | {"warmup_min_lr": 0}}}
    assert not read_zero(zero, train).faults


@pytest.mark.parametrize("name", [GATHER, "gather_16bit_weights_on_model_save", "overlap_comm"])
def test_weights_are_gathered_whatever_the_file_says(name, train):
    zero = read_zero({"zero_optimization": {"stage": 3, name: name != GATHER}}, train)
    assert zero.values["zero_optimization"][GATHER] is True
    assert DeepSpeedZeroConfig(
        **zero.values["zero_optimization"]
    ).gather_16bit_weights_on_model_save


def test_a_misspelt_key_is_a_fault_before_anything_is_loaded(train):
    zero = read_zero({"zero_optimization": {"stage": 2, "overlap_com": True}}, train)
    assert zero.faults == [
        "--deepspeed: its zero_optimization has 'overlap_com', which DeepSpeed does not know"
    ]


def test_what_a_file_leaves_out_is_what_the_flags_say(train):
    values = read_zero({"zero_optimization": {"stage": 2}}, train).values
    assert values["gradient_clipping"] == "auto"
    assert read_zero({"gradient_clipping": 3.0}, train).values["gradient_clipping"] == 3.0


def test_a_section_that_changes_data_or_model_is_a_fault(train):
    faults = read_zero({"curriculum_learning": {"enabled": True}}, train).faults
    assert faults == ["--deepspeed: its section 'curriculum_learning' is not supported"]


def test_a_file_that_is_none_is_named(tmp_path, train):
    with pytest.raises(FileNotFoundError, match=r"--deepspeed nowhere.json: no such file"):
        read_zero("nowhere.json", train)
    file = tmp_path / "zero.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="zero.json is not valid JSON"):
        read_zero(str(file), train)
    file.write_text("[]")
    with pytest.raises(ValueError, match="zero.json is a JSON list, where an object"):
        read_zero(str(file), train)
    file.write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(ValueError, match="zero.json is not UTF-8"):
        read_zero(str(file), train)
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert read_zero(str(file), train).stage == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["optimizer", "scheduler", "zero_optimization", "fp16", "type", "params"])


@settings(max_examples=150, deadline=None)
@example({"zero_optimization": False})
@example({"zero_optimization": {"stage": True}})
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, JSON, max_size=3) | JSON, max_size=4))
def test_any_json_is_read_or_refused_in_words(given):
    train = TrainingArguments(output_dir="nowhere", use_cpu=True)
    try:
        zero = read_zero(given, train)
    except ValueError:
        return
    assert isinstance(zero.stage, int)


# What a run's optimiser really has, after its last step: as the table of parts has it.
WORKER = """
import json, sys
from sqllava.train import run
made, kept = run.build_trainer, []
def build(*args):
    kept.append(made(*args))
    return kept[0]
run.build_trainer = build
with run.whole_process():
    run.train(sys.argv[2:])
    groups = kept[0].optimizer.param_groups
    found = [[g["part"], g["lr"]] for g in groups]
    open(sys.argv[1], "w").write(json.dumps(found))
"""


def train_with(config, words, folder):
    (folder / "zero.json").write_text(json.dumps(config))
    (folder / "worker.py").write_text(WORKER)
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    one |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "DS_ACCELERATOR": "cpu"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [
            *(sys.executable, str(folder / "worker.py"), str(folder / "groups.json")),
            *words,
            *("--deepspeed", str(folder / "zero.json")),
        ],
        env=environment(**one, PATH=path),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "options", "end"),
    [
        ("polynomial", '{"lr_end": 1e-12, "power": 1.0}', 0.0),
        ("cosine_with_min_lr", '{"min_lr_rate": 0.5}', 0.5),
    ],
)
def test_with_llavas_file_each_part_trains_at_the_rate_of_the_table(
    schedule, options, end, tmp_path
):
    config = json.loads((REPO / "scripts" / "zero2.json").read_text())
    config |= {"optimizer": ADAMW, "scheduler": {"type": "WarmupLR", "params": WARMUP}}
    words = flags(
        2,
        write_data(tmp_path / "data.json", "image", count=8),
        tmp_path / "out",
        mm_projector_lr=4e-4,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        max_steps=2,
        save_strategy="no",
    )
    done = train_with(config, words, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "its optimizer section is not used" in done.stderr
    found = json.loads((tmp_path / "groups.json").read_text())
    rates = {"language model": 1e-3, "projector": 4e-4, "vision tower": 2e-4}
    for part, rate in found:
        assert rate == pytest.approx(end * rates[part], abs=1e-9)


@pytest.mark.slow
def test_full_finetuning_saves_its_weights_without_the_files_leave(tmp_path):
    config = json.loads((REPO / "scripts" / "zero3.json").read_text())
    del config["zero_optimization"][GATHER]
    words = flags(
        2,
        write_data(tmp_path / "data.json", "image", count=4),
        tmp_path / "out",
        lora_enable=False,
        vit_lora_enable=False,
        vision_tower_lr=None,
        max_steps=1,
    )
    done = train_with(config, words, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert has_weights(tmp_path / "out")

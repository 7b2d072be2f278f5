"""Training on tiny models in one process: what changes, what resumes, what is refused."""

import json
import random
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training import GOLDEN, flags, history, losses, start, write_data
from transformers import TrainerState

from sqllava.checkpoint.load import assemble, load, load_base
from sqllava.checkpoint.stage1 import read_stage1
from sqllava.model.adapters import (
    Lora,
    Training,
    apply_adapter,
    file_key,
    part_of,
    prepare_training,
)
from sqllava.train import run
from sqllava.train.audit import GradientAudit, GradientAuditError
from sqllava.train.flops import Costs
from sqllava.train.output import COMPLETE, last_complete_checkpoint, read_record, write_record
from sqllava.train.rows import RowSampler, Sizes
from sqllava.train.trainer import SQLlavaTrainer, _EpochOrder

LORA = Lora(4, 8)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "captions.json", "caption")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "mixed.json", "mixed")


@pytest.fixture(scope="module")
def stage1(captions, tmp_path_factory):
    output = tmp_path_factory.mktemp("stage1")
    run.main(flags(1, captions, output))
    return output


class Recorder:
    """Keeps every tensor of the model that a run trains, as it is before the first step."""

    def __init__(self, monkeypatch):
        self.before, self.model = {}, None
        real = run.build_trainer

        def build(arguments, trained, *rest):
            self.model = trained
            self.before = {n: p.detach().clone() for n, p in trained.named_parameters()}
            return real(arguments, trained, *rest)

        monkeypatch.setattr(run, "build_trainer", build)

    def changed(self):
        return {n for n, p in self.model.named_parameters() if not torch.equal(p, self.before[n])}

    def meant(self):
        return {n for n, p in self.model.named_parameters() if p.requires_grad}


def test_stage1_changes_projector_and_vit_lora_and_nothing_else(captions, tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    run.main(flags(1, captions, tmp_path, max_steps=4))
    changed = recorder.changed()
    assert changed == recorder.meant()
    assert {part_of(name) for name in changed} == {"projector", "vision tower"}
    vit_lora = [name for name in changed if "vision_tower" in name]
    assert len(vit_lora) == 2 * 2 * 6  # two layers that are read, A and B, six linear kinds
    assert not any("ln_1" in name for name in changed)


def test_stage2_changes_all_three_parts_and_nothing_else(mixed, stage1, tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    run.main(flags(2, mixed, tmp_path, max_steps=4, pretrain_mm_mlp_adapter=stage1))
    assert recorder.changed() == recorder.meant()
    assert len([n for n in recorder.changed() if "language_model" in n]) == 2 * 2 * 7
    assert len([n for n in recorder.changed() if "vision_tower" in n]) == 2 * 2 * 6
    # It began where stage 1 ended.
    state = load_file(stage1 / "adapter_model.safetensors")
    began = {
        file_key(n): v for n, v in recorder.before.items() if "lora_" in n or "modules_to_save" in n
    }
    assert all(torch.equal(began[name], value) for name, value in state.items())


def test_full_finetuning_trains_the_language_model_and_saves_a_whole_model(
    mixed, tmp_path, monkeypatch
):
    recorder = Recorder(monkeypatch)
    run.main(
        flags(
            2,
            mixed,
            tmp_path,
            lora_enable=False,
            vit_lora_enable=False,
            vision_tower_lr=None,
            lora_r=None,
            lora_alpha=None,
        )
    )
    assert recorder.changed() == recorder.meant()
    assert not any("vision_tower" in name for name in recorder.changed())
    model, _ = load(tmp_path)
    after = recorder.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())


def test_final_adapter_directory_is_complete_and_opens_with_plain_peft(stage1, mixed, tmp_path):
    run.main(flags(2, mixed, tmp_path, pretrain_mm_mlp_adapter=stage1))
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "sqllava_run.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    state = load_file(tmp_path / "adapter_model.safetensors")
    opened = PeftModel.from_pretrained(load_base(tmp_path), tmp_path)
    held = {
        file_key(n): p
        for n, p in opened.named_parameters()
        if "lora_" in n or "modules_to_save" in n
    }
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], value) for name, value in state.items())
    ours, _ = load(tmp_path)
    pixels, ids = torch.randn(1, 3, 56, 56), torch.tensor([[1] + [1345] * 16 + [5, 6, 7]])
    with torch.no_grad():
        expected = opened.eval()(input_ids=ids, pixel_values=pixels).logits
        assert torch.allclose(ours(input_ids=ids, pixel_values=pixels).logits, expected, atol=1e-5)


@pytest.mark.parametrize("pack", ["off", "shared"])
def test_accumulation_does_not_change_the_losses(mixed, tmp_path, pack):
    common = {
        "pack": pack,
        "max_steps": 5,
        "lora_dropout": 0,
        "lora_dropout_vit": 0,
        "group_by_modality_length": True,
    }
    run.main(flags(2, mixed, tmp_path / "a", per_device_train_batch_size=8, **common))
    run.main(
        flags(
            2,
            mixed,
            tmp_path / "b",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=8,
            **common,
        )
    )
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=2e-5)


def test_however_records_are_packed_the_losses_are_the_same(tmp_path):
    """With all records in every step, so that the order does not matter; some cannot be read."""
    records = json.loads(write_data(tmp_path / "all.json", "mixed", count=12).read_text())
    records[3]["image"] = records[7]["image"] = "no-such.png"
    data = tmp_path / "some.json"
    data.write_text(json.dumps(records))
    common = {
        "lora_dropout": 0,
        "lora_dropout_vit": 0,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "bad_samples": "skip",
        "eval_data_path": data,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_eval_batch_size": 5,
    }
    validated, logs = {}, {}
    for pack in ("off", "rows", "shared"):
        run.main(flags(2, data, tmp_path / pack, pack=pack, **common))
        state = json.loads((tmp_path / pack / "trainer_state.json").read_text())
        validated[pack] = [e["eval_loss"] for e in state["log_history"] if "eval_loss" in e]
        logs[pack] = history(tmp_path / pack)
    for pack in ("rows", "shared"):
        assert losses(tmp_path / pack) == pytest.approx(losses(tmp_path / "off"), abs=1e-5)
        assert validated[pack] == pytest.approx(validated["off"], abs=1e-5)
        assert [e["bad_samples"] for e in logs[pack]] == [e["bad_samples"] for e in logs["off"]]
    assert logs["shared"][0]["images_share"] < 1 == logs["rows"][0]["images_share"]
    assert logs["shared"][0]["computed_share"] < 1 == logs["rows"][0]["computed_share"]
    assert logs["off"][0]["computed_share"] > 1


def test_two_ranks_that_resume_within_an_epoch_go_on_in_its_order():
    """accelerate does not tell the epoch through the shards of a loader that skips batches."""
    sizes = Sizes(np.arange(1, 41), np.zeros(40, np.int16), None, 16, 1.0)
    order = RowSampler(sizes, 2, 2, ranks=2)
    order.set_epoch(1)
    expected = [row for number, row in enumerate(order) if number % 2][4:]
    order.set_epoch(0)
    loader = DataLoader(range(40), batch_sampler=order, collate_fn=list)
    loader = prepare_data_loader(loader, num_processes=2, process_index=1)
    state = TrainerState(epoch=1.4)
    _EpochOrder(SimpleNamespace(_order=order)).on_epoch_begin(None, state, None)
    resumed = skip_first_batches(loader, 4)
    resumed.set_epoch(1)
    found = list(resumed.batch_sampler)
    assert found == expected
    order.set_epoch(0)
    assert found != list(resumed.batch_sampler)


def test_flags_that_cannot_go_with_rows_are_refused(mixed, tmp_path):
    with pytest.raises(SystemExit, match="--pack rows"):
        run.main(flags(2, mixed, tmp_path, attn_implementation="flash_attention_2"))
    with pytest.raises(SystemExit, match="needs --pack off"):
        run.main(flags(2, mixed, tmp_path, accelerator_config='{"split_batches": true}'))


def test_gradient_checkpointing_does_not_change_the_losses(mixed, tmp_path):
    common = {"lora_dropout": 0, "lora_dropout_vit": 0}
    run.main(flags(2, mixed, tmp_path / "a", **common))
    run.main(flags(2, mixed, tmp_path / "b", gradient_checkpointing=True, **common))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


@pytest.mark.parametrize("pack", ["shared", pytest.param("off", marks=pytest.mark.slow)])
def test_killed_run_resumes_with_the_losses_of_the_uninterrupted_one(mixed, tmp_path, pack):
    common = {
        "pack": pack,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "group_by_modality_length": True,
        "per_device_train_batch_size": 8,
    }
    run.main(flags(2, mixed, tmp_path / "whole", **common))
    words = flags(2, mixed, tmp_path / "cut", **common)
    stop_after = random.randint(3, 8)
    process = start(words)
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen >= stop_after:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists(), "killed too late"
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    # A checkpoint that the kill cut short: newer, plausible, but never finished.
    half = tmp_path / "cut" / "checkpoint-9"
    shutil.copytree(checkpoint, half, dirs_exist_ok=True)
    record = replace(read_record(half), checkpoint={"step": 9, "resumable": True})
    write_record(record, half)
    (half / COMPLETE).unlink()
    (half / "optimizer.pt").write_bytes(b"half")
    run.main(words)
    assert not half.exists()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    final = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole")]
    assert all(torch.equal(final[0][key], value) for key, value in final[1].items())


def test_validation_loss_is_logged(captions, tmp_path):
    run.main(
        flags(
            1,
            captions,
            tmp_path,
            eval_data_path=captions,
            eval_strategy="steps",
            eval_steps=3,
            per_device_eval_batch_size=4,
        )
    )
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [3]


def test_log_counts_tokens_padding_and_supervised_shares(mixed, tmp_path):
    run.main(flags(2, mixed, tmp_path, max_steps=1))
    entry = history(tmp_path)[0]
    assert entry["tokens_per_second"] > 0
    assert 0 <= entry["padding_share"] < 1 and 0 < entry["supervised_share"] < 1
    assert entry["model_tflops"] > 0
    assert "mfu" not in entry  # of a CPU no peak is known


def test_a_known_card_has_its_share_of_the_peak_in_the_log(monkeypatch):
    trainer = object.__new__(SQLlavaTrainer)
    trainer.costs = Costs(token=2e12, pair=0.0, image=1e12, target=0.0)
    trainer.args = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    total = {"computed": 110.0, "padding": 10.0, "pairs": 9.0, "images": 112.0, "supervised": 5.0}
    logs = trainer._speed(total, seconds=2.0)
    assert logs == {"model_tflops": 156.0, "mfu": 0.25}


def test_vicunas_generation_config_does_not_break_the_save(captions, tmp_path):
    base = tmp_path / "vicuna"
    shutil.copytree(GOLDEN / "vicuna-tiny", base)
    given = json.loads((base / "generation_config.json").read_text())
    given |= {"temperature": 0.9, "top_p": 0.6, "do_sample": False}
    (base / "generation_config.json").write_text(json.dumps(given))
    run.main(
        flags(
            2,
            write_data(tmp_path / "d.json", "image"),
            tmp_path / "out",
            model_name_or_path=base,
            max_steps=1,
            lora_enable=False,
            lora_r=None,
            lora_alpha=None,
            vit_lora_enable=False,
            vision_tower_lr=None,
        )
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_data_of_one_modality_train(kind, tmp_path):
    data = write_data(tmp_path / "data.json", kind, count=12)
    run.main(flags(2, data, tmp_path / "out", group_by_modality_length=True))
    assert len(losses(tmp_path / "out")) == 3


def _spoil(data, tmp_path, every, image="no-such.png"):
    records = json.loads(data.read_text())
    for record in records[::every]:
        record["image"] = image
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text(json.dumps(records))
    return spoilt


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_missing_image_ends_the_run_with_one_line(captions, tmp_path, workers):
    data = _spoil(captions, tmp_path, 1)
    with pytest.raises(SystemExit) as ended:
        run.main(flags(1, data, tmp_path / "out", dataloader_num_workers=workers))
    line = rf"error: {data}: record \d+ \(id 'caption-\d+'\): image 'no-such.png' not found in .*"
    assert re.fullmatch(line, str(ended.value.code))


def test_where_no_record_can_be_used_nothing_is_saved(captions, tmp_path):
    data = _spoil(captions, tmp_path, 1)
    with pytest.raises(SystemExit, match="error: .*spoilt.json: none of the records .*: nothing"):
        run.main(flags(1, data, tmp_path / "out", bad_samples="skip", max_steps=2))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_audit_waits_for_a_record_that_can_be_used(captions, tmp_path):
    records = json.loads(captions.read_text())[:4]
    for record in records[:3]:
        record["image"] = "no-such.png"
    (tmp_path / "few.json").write_text(json.dumps(records))
    given = {"bad_samples": "skip", "max_steps": 4, "per_device_train_batch_size": 1}
    run.main(flags(1, tmp_path / "few.json", tmp_path / "out", **given))
    losses = [entry["loss"] for entry in history(tmp_path / "out")]
    assert sorted(losses)[:3] == [0, 0, 0] and losses[0] == 0 and max(losses) > 0


def test_a_warm_up_as_long_as_the_run_is_told(captions, tmp_path, caplog):
    run.main(flags(1, captions, tmp_path / "out", max_steps=1, warmup_ratio=0.03))
    assert "all of the 1 steps warm up" in caplog.text


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_missing_images_are_skipped_or_replaced_and_counted(captions, tmp_path, policy):
    data = _spoil(captions, tmp_path, every=3)
    run.main(flags(1, data, tmp_path / "out", bad_samples=policy))
    entries = history(tmp_path / "out")
    assert len(entries) == 3 and entries[-1]["bad_samples"] > 0


def test_too_many_bad_samples_stop_the_run(captions, tmp_path):
    with pytest.raises(SystemExit, match="error: .*max_bad_samples 1"):
        run.main(
            flags(
                1,
                _spoil(captions, tmp_path, 2),
                tmp_path / "out",
                bad_samples="skip",
                max_bad_samples=1,
            )
        )


def test_an_image_outside_the_folder_is_refused(captions, tmp_path):
    outside = GOLDEN / "clip-tiny" / "config.json"
    with pytest.raises(SystemExit, match="leads out of the image folder"):
        run.main(flags(1, _spoil(captions, tmp_path, 1, str(outside)), tmp_path / "out"))


def test_empty_data_is_an_error(tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(SystemExit, match="empty.json"):
        run.main(flags(1, tmp_path / "empty.json", tmp_path / "out"))


def test_a_stage1_of_another_rank_is_refused_by_name(stage1, mixed, tmp_path):
    with pytest.raises(SystemExit, match=r"does not fit.*\n.*lora_A.*\(4, 32\) in the file"):
        run.main(flags(2, mixed, tmp_path, pretrain_mm_mlp_adapter=stage1, lora_r_vit=8))
    with pytest.raises(SystemExit, match="alpha"):
        run.main(flags(2, mixed, tmp_path, pretrain_mm_mlp_adapter=stage1, lora_alpha_vit=16))
    # What no weight's shape tells.
    with pytest.raises(SystemExit, match="centres=8 .*, not .*centres=4 .*: give .*NUM_LATENTS"):
        run.main(flags(2, mixed, tmp_path, pretrain_mm_mlp_adapter=stage1, num_latents=4))
    layer = {"pretrain_mm_mlp_adapter": stage1, "mm_vision_select_layer": -3}
    with pytest.raises(SystemExit, match="hidden state -2, not -3: give --mm_vision_select_layer"):
        run.main(flags(2, mixed, tmp_path, **layer))
    with pytest.raises(SystemExit, match="pretrain_clu.sh"):
        run.main(flags(2, mixed, tmp_path, pretrain_mm_mlp_adapter=tmp_path))


def test_a_missing_model_is_one_clear_line(mixed, tmp_path):
    with pytest.raises(SystemExit, match="no-such-model"):
        run.main(flags(2, mixed, tmp_path, model_name_or_path=tmp_path / "no-such-model"))


class _Step:
    global_step = 0


def test_audit_stops_a_tower_that_runs_under_no_grad(golden):
    """The published fault: the tower's LoRA is there, saved, and never learns."""
    model, processor = assemble(str(GOLDEN / "vicuna-tiny"), str(GOLDEN / "clip-tiny"))
    training = Training(vision_lora=LORA)
    trained = prepare_training(model, training)
    audit = GradientAudit(trained, {}, training)
    audit.images = audit.targets = 1
    tower = model.model.vision_tower
    tower.forward = torch.no_grad()(tower.forward)
    ids = torch.tensor([[1] + [model.config.image_token_id] * 16 + [5, 6, 7]])
    pixels = torch.randn(1, 3, 56, 56)
    trained(
        input_ids=ids, labels=torch.where(ids < 8, ids, -100), pixel_values=pixels
    ).loss.backward()
    with pytest.raises(GradientAuditError, match="24 tensors.*\n.*vision_tower.*lora_A"):
        audit.on_pre_optimizer_step(None, _Step, None)


def test_full_finetuning_starts_from_stage1_merged_in(stage1, golden):
    model, processor = assemble(
        str(GOLDEN / "vicuna-tiny"), str(GOLDEN / "clip-tiny"), projector_options={"centres": 8}
    )
    apply_adapter(model, read_stage1(stage1, model.config))
    expected, _ = load(stage1)
    state = expected.state_dict()
    assert all(
        torch.allclose(state[name], value, atol=1e-6) for name, value in model.state_dict().items()
    )


def test_a_frozen_projector_is_kept_in_the_result(stage1, mixed, tmp_path):
    run.main(
        flags(
            2,
            mixed,
            tmp_path,
            pretrain_mm_mlp_adapter=stage1,
            max_steps=1,
            freeze_mm_mlp_adapter=True,
        )
    )
    before = load_file(stage1 / "adapter_model.safetensors")
    after = load_file(tmp_path / "adapter_model.safetensors")
    projector = [key for key in before if "multi_modal_projector" in key]
    assert projector and all(torch.equal(before[key], after[key]) for key in projector)

"""Real DeepSpeed with two processes on the CPU: ZeRO-2 and ZeRO-3, all kinds of data, resuming."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training import REPO, environment, flags, losses, write_data

from sqllava.checkpoint.load import load_base
from sqllava.train import run
from sqllava.train.output import COMPLETE, last_complete_checkpoint, read_record, write_record

STILL = {"lora_dropout": 0, "lora_dropout_vit": 0}


def command(*words) -> list[str]:
    launcher = Path(sys.executable).parent / "deepspeed"
    port = random.randint(20000, 50000)
    return [
        str(launcher),
        "--num_gpus",
        "0",
        "--num_accelerators",
        "2",
        "--master_port",
        str(port),
        *map(str, words),
    ]


def launch(folder: Path, runs: list[list[str]]) -> None:
    """Runs trainings on two processes, with one start for all of them."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    done = subprocess.run(
        command(REPO / "tests" / "deepspeed_worker.py", file),
        env=environment(
            DS_ACCELERATOR="cpu", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def zero(stage: int) -> Path:
    return REPO / "scripts" / f"zero{stage}.json"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All runs of this file that can share a start: name -> output folder."""
    folder = tmp_path_factory.mktemp("deepspeed")
    data = {
        kind: write_data(folder / f"{kind}.json", kind)
        for kind in ("caption", "image", "text", "mixed")
    }
    # Each rank holds two records, and in step one only the first rank's have an image.
    records = json.loads(data["mixed"].read_text())
    with_image = [r for r in records if "image" in r]
    without = [r for r in records if "image" not in r]
    one_sided = folder / "one_sided.json"
    one_sided.write_text(json.dumps(with_image[:6] + without[:6]))
    common = {"gradient_checkpointing": True, "per_device_train_batch_size": 2, **STILL}
    runs = {}
    for stage in (2, 3):
        kind_flags = {"deepspeed": zero(stage), **common}
        runs[f"captions-{stage}"] = flags(
            1, data["caption"], folder / f"captions-{stage}", **kind_flags
        )
        for kind in ("image", "text", "mixed"):
            runs[f"{kind}-{stage}"] = flags(2, data[kind], folder / f"{kind}-{stage}", **kind_flags)
        runs[f"rectangles-{stage}"] = flags(
            2, data["mixed"], folder / f"rectangles-{stage}", pack="off", **kind_flags
        )
        runs[f"one_sided-{stage}"] = flags(
            2,
            one_sided,
            folder / f"one_sided-{stage}",
            **kind_flags | {"per_device_train_batch_size": 1, "max_steps": 6},
        )
    runs["from_stage1-3"] = flags(
        2,
        data["mixed"],
        folder / "from_stage1-3",
        deepspeed=zero(3),
        pretrain_mm_mlp_adapter=folder / "captions-2",
        group_by_modality_length=True,
        **common,
    )
    # A start for each stage: DeepSpeed does not go from ZeRO-2 to ZeRO-3 within a process.
    for stage in (2, 3):
        launch(folder, [words for name, words in runs.items() if name.endswith(f"-{stage}")])
    for name, kind, stage, pack in (
        ("mixed", "mixed", 2, "shared"),
        ("rectangles", "mixed", 2, "off"),
        ("captions", "caption", 1, "rows"),
    ):
        run.main(
            flags(
                stage,
                data[kind],
                folder / f"{name}-alone",
                pack=pack,
                **common | {"per_device_train_batch_size": 4},
            )
        )
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["captions", "image", "text", "mixed", "one_sided"])
def test_every_kind_of_data_trains_on_two_ranks(results, kind, stage):
    steps = losses(results / f"{kind}-{stage}")
    assert len(steps) == (6 if kind == "one_sided" else 3)
    assert all(0 < loss < 20 for loss in steps)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["mixed", "rectangles", "captions"])
def test_first_losses_equal_those_of_one_process(results, name, stage):
    alone = losses(results / f"{name}-alone")
    assert losses(results / f"{name}-{stage}") == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize("name", ["captions-2", "mixed-2", "mixed-3", "from_stage1-3"])
def test_final_adapter_opens_with_plain_peft_and_is_whole(results, name):
    opened = PeftModel.from_pretrained(load_base(results / name), results / name)
    state = load_file(results / name / "adapter_model.safetensors")
    assert all(value.numel() for value in state.values())
    trained = {key for key in state if "lora_B" in key}
    assert all(state[key].any() for key in trained), "some LoRA never learned"
    held = dict(opened.named_parameters())
    for key, value in state.items():
        name_in_model = (
            key.replace(".lora_A.", ".lora_A.default.")
            .replace(".lora_B.", ".lora_B.default.")
            .replace("multi_modal_projector.", "multi_modal_projector.modules_to_save.default.")
        )
        assert torch.equal(held[name_in_model], value)


def test_zero_stages_agree_on_the_weights(results):
    two, three = (
        load_file(results / f"mixed-{stage}" / "adapter_model.safetensors") for stage in (2, 3)
    )
    assert two.keys() == three.keys()
    assert all(torch.allclose(two[key], value, atol=2e-4) for key, value in three.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_run_resumes_with_the_losses_of_the_uninterrupted_one(tmp_path, stage):
    data = write_data(tmp_path / "mixed.json", "mixed")
    common = {
        "deepspeed": zero(stage),
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "group_by_modality_length": True,
    }
    launch(tmp_path, [flags(2, data, tmp_path / "whole", **common)])
    cut = tmp_path / "cut"
    words = flags(2, data, cut, **common)
    (tmp_path / "cut.json").write_text(json.dumps([words]))
    process = subprocess.Popen(
        command(REPO / "tests" / "deepspeed_worker.py", tmp_path / "cut.json"),
        env=environment(
            DS_ACCELERATOR="cpu",
            PYTHONUNBUFFERED="1",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen, stop_after = 0, random.randint(3, 8)
    for line in process.stdout:
        seen += "'loss'" in line
        if seen >= stop_after:
            os.killpg(process.pid, signal.SIGKILL)
            break
    subprocess.run(["pkill", "-9", "-f", str(tmp_path / "cut.json")], check=False)
    process.wait()
    assert not (cut / "adapter_model.safetensors").exists(), "killed too late"
    half = cut / "checkpoint-9"
    shutil.copytree(last_complete_checkpoint(cut), half, dirs_exist_ok=True)
    record = replace(read_record(half), checkpoint={"step": 9, "resumable": True})
    write_record(record, half)
    (half / COMPLETE).unlink()
    launch(tmp_path, [words])
    assert not half.exists()
    assert losses(cut) == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    ends = [load_file(folder / "adapter_model.safetensors") for folder in (cut, tmp_path / "whole")]
    assert all(torch.allclose(ends[0][key], value, atol=1e-6) for key, value in ends[1].items())

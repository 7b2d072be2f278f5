"""What the training tests share: tiny data and the flags of both stages on the tiny models."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "fixtures" / "upstream-tiny"


def write_data(file: Path, kind: str, count: int = 48) -> Path:
    """Records of one kind: caption, image, text or mixed."""
    records = json.loads((GOLDEN / "conversations.json").read_text())
    images = [record for record in records if "image" in record]
    texts = [record for record in records if "image" not in record]
    captions = [record for record in images if len(record["conversations"]) == 2]
    pools = {"caption": captions, "image": images, "text": texts, "mixed": images + texts}
    rng = random.Random(0)
    chosen = [{**rng.choice(pools[kind]), "id": f"{kind}-{i}"} for i in range(count)]
    file.write_text(json.dumps(chosen))
    return file


def flags(stage: int, data: Path, output: Path, **changes: Any) -> list[str]:
    """The flags of a stage; `changes` override them, and None drops one."""
    values: dict[str, Any] = {
        "model_name_or_path": GOLDEN / "vicuna-tiny",
        "vision_tower": GOLDEN / "clip-tiny",
        "version": "plain" if stage == 1 else "v1_sq",
        "data_path": data,
        "image_folder": GOLDEN / "images",
        "num_latents": 8,
        "vit_lora_enable": True,
        "lora_r_vit": 4,
        "lora_alpha_vit": 8,
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "vision_tower_lr": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    if stage == 1:
        values["tune_mm_mlp_adapter"] = True
    else:
        values |= {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "sq_r": 0.5}
    values |= changes
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]


def history(output: Path) -> list[dict[str, Any]]:
    """The log lines of a finished run that hold a loss."""
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def losses(output: Path) -> list[float]:
    """The training losses of a finished run, step by step."""
    return [entry["loss"] for entry in history(output)]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a training subprocess."""
    return (
        os.environ
        | {
            "PYTHONPATH": str(REPO),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        | changes
    )


def start(words: Iterable[str]) -> subprocess.Popen[str]:
    """Starts `python -m sqllava.train` beside the test."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "sqllava.train", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

"""Records a second, tokens and memory of training: padded rectangles, rows, and rows that share
images, on data with one and with three records an image.

    python tests/bench/bench_train.py [--check]

A small random model at full image size (336 px, 576 tokens; tower 256x8, Llama 512x8) trains as in
stage 2, one epoch of the same records in every mode, each in a process of its own, so that its peak
memory is its own. Prints one JSON object last. With --check it exits 1 when rows that share images
train less than 2.0 times as many records a second as rectangles at three records an image, or less
than 1.0 times at one, or take more memory.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
FIXTURES = REPO / "tests" / "fixtures" / "upstream-tiny"
MODES = ("off", "rows", "shared")
LIMITS = {3: 2.0, 1: 1.0}  # records an image -> times the records a second of rectangles
BATCH, ACCUMULATION = 4, 3
WORDS = [
    "the",
    "a",
    "dog",
    "car",
    "is",
    "on",
    "two",
    "red",
    "in",
    "and",
    "of",
    "with",
    "man",
    "blue",
]


def make_base(folder: Path) -> None:
    """Random weights of a small Llama and a small tower, with the tests' tokenizer."""
    import shutil

    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shutil.copytree(FIXTURES / "vicuna-tiny", folder / "lm")
    for weights in [*(folder / "lm").glob("*.bin"), *(folder / "lm").glob("*.safetensors")]:
        weights.unlink()
    given = json.loads((FIXTURES / "vicuna-tiny" / "config.json").read_text())
    llama = LlamaConfig(
        vocab_size=given["vocab_size"],
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "lm")
    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    settings = json.loads((FIXTURES / "clip-tiny" / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(settings))


def make_data(folder: Path, count: int, an_image: int) -> None:
    """Records of LLaVA's lengths (some 200 tokens of text, the longest many times the shortest),
    one in ten without an image."""
    from PIL import Image

    rng, records = random.Random(an_image), []
    for number in range(count):
        turns = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            turns += [_text(rng, 12, 0.4), _text(rng, 40, 1.0)]
        record: dict[str, Any] = {"id": number}
        if number % 10 != 9:
            record["image"] = f"{(number - number // 10) // an_image}.jpg"
            turns[0] = f"<image>\n{turns[0]}"
        record["conversations"] = [
            {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)
        ]
        records.append(record)
    for name in {record["image"] for record in records if "image" in record}:
        noise = Image.effect_noise((64, 48), rng.randint(10, 90)).convert("RGB")
        noise.resize((640, 480)).save(folder / name)
    (folder / f"{an_image}.json").write_text(json.dumps(records))


def _text(rng: random.Random, median: int, spread: float) -> str:
    count = max(2, min(int(median * rng.lognormvariate(0, spread)), 400))
    return " ".join(rng.choices(WORDS, k=count))


def train_one(folder: Path, mode: str, an_image: int) -> dict[str, Any]:
    """One epoch in this process: seconds, what was computed, peak memory."""
    from transformers import TrainerCallback

    from sqllava.train import run

    flags = {
        "model_name_or_path": folder / "lm",
        "vision_tower": folder / "tower",
        "data_path": folder / f"{an_image}.json",
        "image_folder": folder,
        "version": "v1_sq",
        "sq_r": 0.5,
        "pack": mode,
        "group_by_modality_length": mode == "off",
        "lora_enable": True,
        "vit_lora_enable": True,
        "num_latents": 256,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "output_dir": folder / f"{mode}-{an_image}",
    }
    totals: dict[str, float] = {}
    clocks: list[tuple[float, float]] = []
    trainers: list[Any] = []

    class Watch(TrainerCallback):
        """Takes the time, and each step's counts before the log line does."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clocks.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clocks.append((time.perf_counter(), time.process_time()))
            for name in ("tokens", "computed", "images", "images_of_records"):
                totals[name] = totals.get(name, 0) + trainers[0].counts[name]

    build = run.build_trainer

    def build_and_watch(*given: Any) -> Any:
        trainers.append(build(*given))
        trainers[0].add_callback(Watch())
        return trainers[0]

    run.build_trainer = build_and_watch
    run.train([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    trainer = trainers[0]
    seconds, processor = (last - first for first, last in zip(clocks[0], clocks[-1], strict=True))
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "records_a_second": round(len(trainer.train_dataset) / seconds, 3),
        **{name: int(value) for name, value in totals.items()},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def in_a_process(folder: Path, mode: str, an_image: int) -> dict[str, Any]:
    """`train_one` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--train", str(folder), mode, str(an_image)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The modes of one data set, and each against rectangles."""
    base = modes["off"]
    against = {
        mode: {
            "records_a_second": round(found["records_a_second"] / base["records_a_second"], 2),
            "processor_time": round(base["processor_seconds"] / found["processor_seconds"], 2),
            "tokens_computed": round(found["computed"] / base["computed"], 3),
            "peak_memory": round(found["peak_mb"] / base["peak_mb"], 3),
        }
        for mode, found in modes.items()
    }
    return {"modes": modes, "against_rectangles": against}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=36, help="a multiple of 12")
    parser.add_argument("--check", action="store_true", help=f"exit 1 below {LIMITS}")
    parser.add_argument("--train", nargs=3, metavar=("FOLDER", "MODE", "N"), help="one mode alone")
    args = parser.parse_args()
    if args.train:
        folder, mode, an_image = args.train
        print(json.dumps(train_one(Path(folder), mode, int(an_image))))
        return 0
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder)
        found = {}
        for an_image in LIMITS:
            make_data(folder, args.records, an_image)
            found[an_image] = compare(
                {mode: in_a_process(folder, mode, an_image) for mode in MODES}
            )
    report = {
        "bench": "train",
        "settings": {
            "records": args.records,
            "batch": BATCH,
            "accumulation": ACCUMULATION,
            "image_tokens": 576,
            "threads": torch.get_num_threads(),
        },
        "records_an_image": found,
        "limits": LIMITS,
    }
    print(json.dumps(report))
    failed = [
        an_image
        for an_image, limit in LIMITS.items()
        for ours in [found[an_image]["against_rectangles"]["shared"]]
        if ours["records_a_second"] < limit or ours["peak_memory"] > 1
    ]
    if args.check and failed:
        print(f"below the limit at {failed} records an image", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

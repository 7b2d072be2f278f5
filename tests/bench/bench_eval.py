"""Evaluation that reads each picture once, against left-padded batches of 16 that read it again.

    python tests/bench/bench_eval.py [--check]          a random model, 336 px, 576 image tokens
    python tests/bench/bench_eval.py --model checkpoints/shapes/stage2

Asks 1, 2, 18 and 31 questions about each picture, as VizWiz, MME, POPE and GQA do. Prints one JSON
object last. With --check it exits 1 below the limits, or where answers differ.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sqllava.checkpoint.load import assemble
from sqllava.conversation import Turn
from sqllava.data.images import load_image
from sqllava.encoding import add_image_token, encode_prompt
from sqllava.eval.answers import Job, generate
from sqllava.eval.engine import Engine, open_engine
from sqllava.eval.records import Question
from sqllava.generation.decoding import Decoding

METHOD = (
    "from files to answers in one process; processor time on a CPU, wall time elsewhere, least of "
    "--repeats rounds that take turns; before: batches in order of length, each question with its "
    "picture's pixels, transformers' generate"
)
# Questions about a picture: how many pictures are asked about, and how much faster it must be.
SETUPS = {1: (32, 0.95), 2: (16, 1.0), 18: (4, 8.0), 31: (3, 10.0)}
TOKENIZER = Path(__file__).resolve().parent.parent / "fixtures" / "upstream-tiny" / "vicuna-tiny"
THINGS = (
    "dog", "cat", "car", "chair", "table", "tree", "boat", "bird", "cup", "book", "bottle of wine",
    "person", "bicycle", "traffic light", "backpack", "dining table", "cell phone", "tennis racket",
)  # fmt: skip
SHORT = "\nAnswer the question using a single word or phrase."
SHARPER = 4.0


def random_model(folder: Path) -> Path:
    """A model of 30 M parameters, tower and projector not counted; it seldom ends a text.

    Its matrices are made larger: what it says then depends on picture and question, and the best
    token stands clear of the next, as in a trained model; near-ties would fall by rounding.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, trust_remote_code=False)
    add_image_token(tokenizer)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
        num_attention_heads=8, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=4,
        image_size=336, patch_size=14,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    size = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size).save_pretrained(
        folder / "tower"
    )
    model, processor = assemble(
        str(folder / "lm"), str(folder / "tower"), conversation_template="v1_sq",
        projector_type="cluster",
    )  # fmt: skip
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(SHARPER)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def questions_about(folder: Path, pictures: int, each: int) -> list[Question]:
    """Questions in POPE's form, about pictures of COCO's size that are written to the folder."""
    rng = np.random.default_rng(pictures)
    questions = []
    for picture in range(pictures):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        name = f"{each}_{picture}.jpg"
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / name)
        for number in range(each):
            thing = THINGS[(picture + number) % len(THINGS)]
            place = "" if number < len(THINGS) else " on the left"
            text = f"Is there a {thing}{place} in the image?{SHORT}"
            questions.append(Question(len(questions), text, name))
    return questions


@torch.inference_mode()
def before(
    engine: Engine, questions: list[Question], images: Path, batch_size: int, decoding: Decoding
) -> list[str]:
    """Batches as they were: of like length, left-padded, a picture for each question."""
    processor = engine.processor
    order = sorted(questions, key=lambda question: len(question.text), reverse=True)
    said: dict[Any, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [
            encode_prompt(
                [Turn("user", question.text, images=1), Turn("assistant", None)],
                "v1",
                processor.tokenizer,
                processor.image_tokens,
            )
            for question in batch
        ]
        pictures = [load_image(images / str(question.image)) for question in batch]
        inputs = processor.pad(prompts) | dict(
            processor.image_processor(pictures, do_pad=True, return_tensors="pt")
        )
        inputs = {name: tensor.to(engine.model.device) for name, tensor in inputs.items()}
        ids = engine.model.generate(**inputs, **decoding.options())
        written = ids[:, inputs["input_ids"].shape[1] :]
        for question, text in zip(
            batch, processor.tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
        ):
            said[question.question_id] = text.strip()
    return [said[question.question_id] for question in questions]


def now(
    engine: Engine, questions: list[Question], images: Path, batch_size: int, decoding: Decoding
) -> list[str]:
    """As `sqllava eval run` answers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "questions.jsonl")
        file.write_text("")
        job = Job("bench", file, images, Path(folder, "answers.jsonl"), decoding)
        generate(engine, job, questions, batch_size=batch_size, workers=0)
        return [json.loads(line)["text"] for line in job.out.read_text().splitlines()]


def timed(work: Callable[[], list[str]]) -> tuple[list[str], float, float]:
    """What the work gives, its processor time and its wall time in seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.process_time() - processor, time.perf_counter() - wall


def compare(
    engine: Engine, folder: Path, pictures: int, each: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Times both ways on the same questions."""
    questions = questions_about(folder, pictures, each)
    decoding = Decoding(args.tokens)
    ways = {"before": before, "now": now}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    said: dict[str, list[str]] = {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            said[name], *spent = timed(
                lambda way=way: way(engine, questions, folder, args.batch_size, decoding)
            )
            times[name].append((spent[0], spent[1]))
    processor, wall = (
        {name: min(spent[clock] for spent in several) for name, several in times.items()}
        for clock in (0, 1)
    )
    return {
        "pictures": pictures,
        "questions": len(questions),
        "seconds_processor": {name: round(value, 2) for name, value in processor.items()},
        "seconds_wall": {name: round(value, 2) for name, value in wall.items()},
        "ratio_processor": round(processor["before"] / processor["now"], 3),
        "ratio_wall": round(wall["before"] / wall["now"], 3),
        "different_answers": len(set(said["now"])),
        "all_equal": said["before"] == said["now"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a trained model; a random one by default")
    parser.add_argument("--each", type=int, nargs="*", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=3, help="longest answer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit 1 below the limits")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = open_engine(str(args.model or random_model(folder))).for_task("v1", "pad")
        before(engine, questions_about(folder, 1, 1), folder, 1, Decoding(2))  # warms up
        results = {each: compare(engine, folder, SETUPS[each][0], each, args) for each in args.each}
    on_cpu = engine.model.device.type == "cpu"
    ratio = "ratio_processor" if on_cpu else "ratio_wall"
    report = {
        "bench": "eval",
        "method": METHOD,
        "settings": {
            "model": str(args.model) if args.model else "random",
            "parameters": sum(p.numel() for p in engine.model.parameters()),
            "image_tokens": engine.processor.image_tokens,
            "batch_size": args.batch_size,
            "tokens": args.tokens,
            "repeats": args.repeats,
            "threads": torch.get_num_threads(),
            "device": str(engine.model.device),
            "dtype": str(engine.model.dtype),
        },
        "questions_a_picture": results,
        "ratios": {each: result[ratio] for each, result in results.items()},
        "all_equal": all(result["all_equal"] for result in results.values()),
        "limits": {each: SETUPS[each][1] for each in args.each},
    }
    print(json.dumps(report))
    slow = [each for each, result in results.items() if result[ratio] < SETUPS[each][1]]
    if args.check and (slow or not report["all_equal"]):
        print(f"below the limits: {slow}; all equal: {report['all_equal']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Questions a second of batched generation against one by one, on one model and question file.

    python tests/bench/bench_eval.py --model checkpoints/shapes/stage2 \
        --questions checkpoints/shapes/data/eval/pope/llava_pope_test.jsonl \
        --images checkpoints/shapes/data/eval/images [--check]

Without --model it makes a tiny random one. Prints one JSON object last. With --check it exits 1
when a batch of 16 is less than 3 times as fast as single questions.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from sqllava.eval.answers import PreparedBatches, plan
from sqllava.eval.engine import Decoding, Engine, open_engine
from sqllava.eval.records import Question
from sqllava.eval.tasks import TASKS

LIMIT = 3.0


def answer_all(
    engine: Engine, questions: list[Question], images: Path, batch_size: int, tokens: int
) -> tuple[float, list[str]]:
    """Seconds for all questions, pictures included, and the answers."""
    batches = plan(questions, range(len(questions)), batch_size)
    dataset = PreparedBatches(batches, questions, images, engine.prompter)
    decoding, found = Decoding(tokens), {}
    started = time.perf_counter()
    for index in range(len(dataset)):
        prepared = dataset[index]
        assert prepared.inputs is not None
        found.update(zip(prepared.items, engine.answer(prepared.inputs, decoding), strict=True))
    return time.perf_counter() - started, [found[item] for item in range(len(questions))]


def tiny_task(folder: Path) -> tuple[Path, Path, Path]:
    """A tiny model, questions and pictures, for machines without a trained one."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from eval_data import copy_tiny_model, lines, picture

    for n in range(8):
        picture(folder / f"{n}.jpg", n)
    rows = [
        {"question_id": n, "image": f"{n % 8}.jpg", "text": f"What is it, number {n}?"}
        for n in range(128)
    ]
    return copy_tiny_model(folder / "model"), lines(folder / "q.jsonl", rows), folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--check", action="store_true", help=f"exit 1 below {LIMIT} times")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model, args.questions, args.images = tiny_task(Path(folder))
        engine = open_engine(str(args.model)).for_task("v1", "pad")
        questions = TASKS["pope"].read_questions(args.questions)[: args.count]
        answer_all(engine, questions[:4], args.images, 4, args.tokens)  # warms up
        single, alone = answer_all(engine, questions, args.images, 1, args.tokens)
        batched, together = answer_all(engine, questions, args.images, args.batch_size, args.tokens)
    report = {
        "bench": "eval",
        "settings": {
            "model": str(args.model),
            "questions": len(questions),
            "batch_size": args.batch_size,
            "tokens": args.tokens,
            "threads": torch.get_num_threads(),
            "device": str(engine.model.device),
        },
        "questions_a_second": {
            "single": round(len(questions) / single, 2),
            "batched": round(len(questions) / batched, 2),
        },
        "ratio": round(single / batched, 2),
        "same_answers": alone == together,
        "limit": LIMIT,
    }
    print(json.dumps(report))
    if args.check and (report["ratio"] < LIMIT or not report["same_answers"]):
        print("below the limit, or not the same answers", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

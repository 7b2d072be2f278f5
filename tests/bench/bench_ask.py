"""Asking against the published loop, which encodes and prefills again for every question.

    python tests/bench/bench_ask.py                     a random model, 336 px, 576 image tokens
    python tests/bench/bench_ask.py --model checkpoints/shapes/stage2

Times 8 questions of one image, and of many images a question. Prints one JSON object.
"""

import argparse
import json
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

import sqllava
from sqllava.ask.questioner import describing
from sqllava.checkpoint.load import assemble
from sqllava.conversation import Turn
from sqllava.generation.decoding import Decoding

METHOD = (
    "CPU time of one process on CPU, wall time elsewhere; both sides get the same description and "
    "draw questions of the same length; the published loop calls generate with the picture, once "
    "for each question; one image: least of --repeats rounds; many images: the published loop is "
    "timed on --published-questions"
)
LIMITS = {"one_image": 1 / 4, "many_images": 1 / 6}
DESCRIPTION = (
    "The image shows a wooden table by a window with a blue cup, two green apples and an open book "
    "on it. Behind the table there is a white wall with a framed picture of a sailing boat, and in "
    "the lower left corner a gray cat lies on a red carpet and looks at the camera."
)
TOKENIZER = Path(__file__).resolve().parent.parent / "fixtures" / "upstream-tiny" / "vicuna-tiny"


def random_model(folder: Path) -> tuple[Any, Any]:
    """A model of 134 M parameters, tower and projector not counted; it never ends a text."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=7, num_attention_heads=8,
        image_size=336, patch_size=14,
    )  # fmt: skip
    LlamaForCausalLM(text).save_pretrained(folder / "lm")
    AutoTokenizer.from_pretrained(TOKENIZER, trust_remote_code=False).save_pretrained(folder / "lm")
    CLIPVisionModel(tower).save_pretrained(folder / "tower")
    size = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size).save_pretrained(
        folder / "tower"
    )
    model, processor = assemble(
        str(folder / "lm"), str(folder / "tower"), conversation_template="v1_sq",
        projector_type="cluster",
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    return model.eval(), processor


def pictures(count: int, size: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)
    ]


def published(questioner: sqllava.SelfQuestioner, image: Image.Image, asking: Decoding) -> None:
    """One question as the published demo draws it."""
    processor = questioner.processor
    turns = [*describing(DESCRIPTION), Turn("vuser", None)]
    inputs = processor.pad([processor.encode_turns(turns)])
    questioner.model.generate(
        **inputs, pixel_values=processor.prepare_image(image).unsqueeze(0), **asking.options()
    )


def ours(
    questioner: sqllava.SelfQuestioner, images: list[Image.Image], asking: Decoding, batch: int
) -> None:
    """`asking.samples` questions of each image."""
    for start in range(0, len(images), batch):
        some = images[start : start + batch]
        contexts = [describing(DESCRIPTION)] * len(some)
        questioner.ask_batch(some, asking, contexts=contexts, redraws=0)


def seconds(work: Callable[[], None], on_cpu: bool) -> float:
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    work()
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides; returns what is printed."""
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            model, processor = sqllava.load(args.model, args.base, args.vision_tower)
        else:
            model, processor = random_model(Path(folder))
    questioner = sqllava.SelfQuestioner(model, processor)
    on_cpu = model.device.type == "cpu"
    one = Decoding(args.question_tokens, 1, temperature=1.2, top_k=300, top_p=0.95)
    many = Decoding(args.question_tokens, args.questions, temperature=1.2, top_k=300, top_p=0.95)
    images = pictures(args.images, processor.image_processor.crop_size["height"])
    published(questioner, images[0], one)  # warms up
    ours(questioner, images[:1], many, 1)

    def loop() -> None:
        for _ in range(args.questions):
            published(questioner, images[0], one)

    def some() -> None:
        for number in range(args.published_questions):
            published(questioner, images[number % len(images)], one)

    def asked_together() -> None:
        ours(questioner, images[:1], many, 1)

    times = {
        "published_one_image": min(seconds(loop, on_cpu) for _ in range(args.repeats)),
        "one_image": min(seconds(asked_together, on_cpu) for _ in range(args.repeats)),
        "published_a_question": seconds(some, on_cpu) / args.published_questions,
        "many_images_a_question": seconds(
            lambda: ours(questioner, images, many, args.batch), on_cpu
        )
        / (args.images * args.questions),
    }
    return {
        "bench": "ask",
        "settings": vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "method": METHOD,
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tokens": processor.image_tokens,
        "prompt_tokens": len(
            processor.encode_turns([*describing(DESCRIPTION), Turn("vuser", None)])
        ),
        "seconds": {name: round(value, 4) for name, value in times.items()},
        "ratios": {
            "one_image": round(times["one_image"] / times["published_one_image"], 4),
            "many_images": round(
                times["many_images_a_question"] / times["published_a_question"], 4
            ),
        },
        "limits": LIMITS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a trained model; a random one by default")
    parser.add_argument("--base", help="language model under an adapter")
    parser.add_argument("--vision-tower", help="tower under an adapter")
    parser.add_argument("--questions", type=int, default=8, help="of each image")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="images asked about together")
    parser.add_argument("--question-tokens", type=int, default=24, help="longest question")
    parser.add_argument("--published-questions", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit 1 beyond the limits")
    args = parser.parse_args()
    report = measure(args)
    print(json.dumps(report))
    exceeded = [name for name, limit in LIMITS.items() if report["ratios"][name] > limit]
    if args.check and exceeded:
        print(f"beyond the limits: {exceeded}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

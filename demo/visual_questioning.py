"""Visual self-questioning: describes images, asks questions about them, and answers them.

    python demo/visual_questioning.py --model_path checkpoints/sqllava-7b-lora --image photo.jpg

A thin front to `sqllava.SelfQuestioner`, with the flags of the published demo; each may be written
with underscores or hyphens.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Exchange:
    """A question of the model's and its own answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """What the model said about one image."""

    image: str
    description: str
    exchanges: list[Exchange]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags; raises SystemExit with a clear line where they cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, *others: str, **options) -> None:
        names = [name, *others]
        spellings = [spelling for n in names for spelling in (n, n.replace("_", "-"))]
        parser.add_argument(*dict.fromkeys(f"--{s}" for s in spellings), dest=name, **options)

    add("model_path", required=True, help="adapter directory or whole model")
    add("model_base", help="language model under an adapter, if not the one it was trained on")
    add("vision_tower", help="tower under an adapter, if not the one it was trained on")
    add("lora_pretrain", help="accepted for old scripts: adapters hold their ViT-LoRA themselves")
    add("image", "image_file", nargs="+", required=True, help="one or more pictures")
    add("conv_mode", "version", help="conversation template (default: the model's own)")
    add("n_shot", type=int, default=5, help="questions per image")
    add("temperature", type=float, default=1.2, help="of the questions")
    add("top_k", type=int, default=300, help="of the questions")
    add("top_p", type=float, default=0.95, help="of the questions")
    add("num_beams", type=int, default=1, help="of the description and the answers")
    add("max_new_tokens", type=int, help="longest text (default: 1024, and 300 for questions)")
    add("do_sample", action="store_true", help="accepted for old scripts: questions always are")
    add("seed", type=int, help="makes the questions reproducible")
    add("device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("json", action="store_true", help="print one JSON object per image")
    return parser.parse_args(argv)


def open_image(path: str) -> Image.Image:
    """Opens a picture; raises FileNotFoundError or ValueError saying what is wrong with it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def load_questioner(args: argparse.Namespace):
    """Opens the model; raises FileNotFoundError or ValueError saying what to do."""
    if not Path(args.model_path).is_dir():
        raise FileNotFoundError(
            f"no model folder {args.model_path}: train one ('bash scripts/quickstart.sh' makes a "
            "small one, checkpoints/shapes/stage2), or fetch one ('hf download ID --local-dir DIR')"
        )
    vit_lora = Path(args.lora_pretrain or args.model_path)
    if vit_lora.resolve() != Path(args.model_path).resolve():
        raise ValueError(
            f"--lora_pretrain {vit_lora} is another folder than --model_path {args.model_path}, "
            "which holds its own ViT-LoRA: leave --lora_pretrain out"
        )
    # Late, so that a wrong flag or a missing file is told at once.
    import sqllava

    model, processor = sqllava.load(
        args.model_path, args.model_base, args.vision_tower, device=args.device
    )
    if args.conv_mode:
        processor.conversation_template = args.conv_mode
    return sqllava.SelfQuestioner(model, processor)


def question_image(questioner, path: str, image: Image.Image, args: argparse.Namespace):
    """Describes an image, asks about it, and answers each question."""
    from sqllava.ask import ANSWER_TOKENS, QUESTION_TOKENS, Decoding, describing

    answering = Decoding(args.max_new_tokens or ANSWER_TOKENS, num_beams=args.num_beams)
    encoded = questioner.encode([image])
    description = questioner.describe_batch(encoded, answering)[0]
    context = describing(description)
    questions = questioner.ask(
        encoded[0],
        n=args.n_shot,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens or QUESTION_TOKENS,
        seed=args.seed,
        context=context,
    )
    n = len(questions)
    answers = questioner.answer_batch(encoded * n, questions, [context] * n, answering, "vuser")
    return Conversation(path, description, list(map(Exchange, questions, answers)))


def show(conversation: Conversation) -> None:
    """Prints a conversation for people."""
    print(f"{conversation.image}\n  {conversation.description}")
    for number, exchange in enumerate(conversation.exchanges, 1):
        print(f"  VUSER {number}: {exchange.question}\n         {exchange.answer}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        images = {path: open_image(path) for path in args.image}
        questioner = load_questioner(args)
        for path, image in images.items():
            conversation = question_image(questioner, path, image, args)
            if args.json:
                print(json.dumps(asdict(conversation), ensure_ascii=False), flush=True)
            else:
                show(conversation)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

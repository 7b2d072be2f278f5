"""Visual self-questioning: describes images, asks questions about them, and answers them.

    python demo/visual_questioning.py --model_path checkpoints/sqllava-7b-lora --image photo.jpg

The flags of the published demo before what `sqllava ask` does; each may be written with underscores
or hyphens.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, UnidentifiedImageError


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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        images = {path: open_image(path) for path in args.image}
        questioner = load_questioner(args)
        from sqllava.ask.transcript import Plan, Transcript, converse
        from sqllava.generation.decoding import ANSWER_TOKENS, QUESTION_TOKENS, Decoding

        asking = Decoding(
            args.max_new_tokens or QUESTION_TOKENS,
            args.n_shot,
            args.temperature,
            args.top_k,
            args.top_p,
        )
        answering = Decoding(args.max_new_tokens or ANSWER_TOKENS, num_beams=args.num_beams)
        plan = Plan(asking, answering, seed=args.seed)
        transcript = None if args.json else Transcript(sys.stdout)
        for path, image in images.items():
            conversation = converse(questioner, path, image, plan, transcript)
            if args.json:
                print(json.dumps(asdict(conversation), ensure_ascii=False), flush=True)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

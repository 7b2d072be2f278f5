"""`sqllava convert`: a checkpoint into another layout, or an adapter merged into its base."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sqllava.checkpoint import SHARD_BYTES
from sqllava.cli import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = build_parser().parse_args(argv)
    from sqllava.checkpoint.convert import Options, convert

    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("sqllava").setLevel(logging.INFO)
    options = {name: getattr(arguments, name) for name in Options.__dataclass_fields__}
    try:
        difference = convert(arguments.source, arguments.target, arguments.to, Options(**options))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if difference is not None:
        sys.stdout.write(f"largest difference of logits, merged and unmerged: {difference:.3g}\n")
    sys.stdout.write(f"{arguments.target}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="sqllava convert",
        description="Converts checkpoints between the published layouts and ours, and merges "
        "adapters. SOURCE may be any folder that sqllava.load opens.",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="the folder to convert")
    add("target", type=Path, metavar="TARGET", help="the folder to make; it must not exist yet")
    add(
        "--to",
        required=True,
        choices=["ours", "published", "merged"],
        help="ours: our adapter directory for an adapter, else our model directory; published: the "
        "layout of the published code; merged: a whole model, adapter and all",
    )
    add("--base", help="the language model under an adapter, if not the one its config names")
    add("--vision-tower", help="the tower, if not the one that the config names")
    add("--vit-lora", help="a published folder with the tower's LoRA, if not the adapter's own")
    add(
        "--dtype",
        default="auto",
        help="of a whole model's weights: float32, bfloat16 or float16 (fp32, bf16, fp16); auto is "
        "that of its language model's files",
    )
    add(
        "--shard-bytes",
        type=int,
        default=SHARD_BYTES,
        help="largest size of a file of a whole model; memory grows with it (default: %(default)s)",
    )
    add(
        "--no-check",
        dest="check",
        action="store_false",
        help="after merging, do not compare logits; the comparison holds the model in memory",
    )
    add("--figures", help="a JSON file with an evaluation's figures, for the model card")
    add("--image", help="the picture for that comparison (default: a drawn one)")
    return parser

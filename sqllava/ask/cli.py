"""`sqllava ask`: questions about pictures, and instruction data from a folder of them."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sqllava.ask import DESCRIBE_EVERY
from sqllava.cli import Parser
from sqllava.generation.decoding import ANSWER_TOKENS, QUESTION_TOKENS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags; raises SystemExit with a clear line where they do not go together."""
    parser = Parser(
        prog="sqllava ask",
        description="Describes pictures and asks questions about them. With --dataset, makes "
        "instruction data of a whole folder.",
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="files; '-' reads names from standard input")
    add("--model", required=True, help="adapter directory or whole model")
    add("--base", help="language model under an adapter, if not the one it was trained on")
    add("--vision-tower", help="tower under an adapter, if not the one it was trained on")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("-n", type=int, help="questions for each image (default: 3, and 8 with --dataset)")
    add("--answer", action="store_true", help="answer the questions, too")
    add("--rounds", type=int, metavar="N", help="ask, answer and ask on, N times, instead of -n")
    add("--json", action="store_true", help="print one JSON object for each image")
    add("--allow-url", action="store_true", help="fetch images that are named by http(s) URLs")
    add("--temperature", type=float, help="of the questions (default: 1.2, and 0.8 with --dataset)")
    add("--top-k", type=int, default=300, help="of the questions (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="of the questions (default: %(default)s)")
    add("--max-new-tokens", type=int, default=QUESTION_TOKENS, help="longest question")
    add("--answer-tokens", type=int, default=ANSWER_TOKENS, help="longest description and answer")
    add("--seed", type=int, help="makes the questions reproducible (with --dataset: 0)")
    data = parser.add_argument_group("instruction data (see docs/self_questioning.md)")
    add = data.add_argument
    add("--dataset", type=Path, help="folder of images, or LLaVA JSON whose images are taken")
    add("--image-folder", type=Path, help="where a JSON file's images are (default: beside it)")
    add("--out", type=Path, help="the JSON file to write")
    add("--processes", type=int, default=1, help="each with a model of its own, and a GPU, if any")
    add("--batch", type=int, default=8, help="images worked on together")
    add("--rows", type=int, default=64, help="texts decoded together, at most")
    add("--consistency", type=int, default=4, metavar="K", help="answers sampled as a check; or 0")
    add("--agreement", type=float, default=0.75, help="how far they must agree, from 0 to 1")
    add("--describe-every", type=int, default=DESCRIBE_EVERY, metavar="N",
        help="one record in N begins with the image's description; 0: none")  # fmt: skip
    args = parser.parse_args(argv)
    if args.describe_every < 0:
        parser.error("--describe-every must be 0 or more")
    if bool(args.images) == bool(args.dataset):
        parser.error("name either images or a --dataset")
    if bool(args.dataset) != bool(args.out):
        parser.error("--dataset and --out belong together")
    _check_belonging(parser, args)
    if args.rounds is not None and (args.rounds < 1 or args.n is not None):
        parser.error("--rounds must be at least 1, and stands in the place of -n")
    # The published temperature asks varied questions; in data, those about what is not there hurt.
    if args.n is None:
        args.n = 8 if args.dataset else 3
    if args.temperature is None:
        args.temperature = 0.8 if args.dataset else 1.2
    return args


# What either way of asking alone takes.
_OF_IMAGES = ("answer", "rounds", "json", "allow_url", "device")
_OF_DATASET = ("image_folder", "processes", "batch", "rows", "consistency", "agreement",
               "describe_every")  # fmt: skip


def _check_belonging(parser: Parser, args: argparse.Namespace) -> None:
    """Ends with a line if a flag is given that would not be heard."""
    for name in _OF_IMAGES if args.dataset else _OF_DATASET:
        if getattr(args, name) != parser.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            told = "does not go with --dataset" if args.dataset else "goes with --dataset alone"
            parser.error(f"{flag} {told}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 1 and a line for each image that could not be used."""
    args = parse_arguments(argv)
    from sqllava.ask import transcript

    # Of loading only what is wrong, not the names of the tensors past the layer that is read.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sqllava.ask.data_engine").setLevel(logging.INFO)
    try:
        failed = transcript.make_data(args) if args.dataset else transcript.ask_images(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if failed:
        raise SystemExit(1)

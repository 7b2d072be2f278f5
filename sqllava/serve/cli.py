"""`sqllava serve`: a page to drop an image on, see what the model asks about it, and talk."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from sqllava.cli import Parser
from sqllava.serve import REQUEST_SECONDS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags."""
    parser = Parser(
        prog="sqllava serve", description="Serves a page to question images with a model."
    )
    add = parser.add_argument
    add("--model", required=True, help="adapter directory or whole model")
    add("--base", help="language model under an adapter, if not the one it was trained on")
    add("--vision-tower", help="tower under an adapter, if not the one it was trained on")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add("--host", default="127.0.0.1", help="address to bind to (default: this machine alone)")
    add("--port", type=int, default=7860)
    add("--examples", type=Path, help="a folder whose first images are offered")
    add("--folder", type=Path, help="where uploads lie, in a folder that goes at the end "
        "(default: the place for temporary files)")  # fmt: skip
    add("--answer-tokens", type=int, default=512, help="longest description and answer")
    add("--question-tokens", type=int, default=128, help="longest question")
    add("--seconds", type=float, default=REQUEST_SECONDS,
        help="longest time for what is asked at once (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted."""
    args = parse_arguments(argv)
    from sqllava.serve.page import serve

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sqllava.serve").setLevel(logging.INFO)
    try:
        serve(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

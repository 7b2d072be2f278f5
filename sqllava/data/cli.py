"""The `sqllava data` commands: each hands its flags to the module that does the work."""

import argparse
import logging
import sys
from collections.abc import Sequence

from sqllava.cli import Parser
from sqllava.data import check, download, make_index, show

COMMANDS = {"download": download, "check": check, "index": make_index, "show": show}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Raises:
        SystemExit: always, with 0 if all is well; a fault is one line on stderr.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("sqllava").setLevel(logging.INFO)
    try:
        code = args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    raise SystemExit(code)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all data commands."""
    parser = Parser(
        prog="sqllava data", description="Fetch, check, index and look at training data."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = (module.__doc__ or "").split("\n\n")[0]
        command = commands.add_parser(name, help=about.split(":")[0], description=about)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser

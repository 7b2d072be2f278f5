"""The `sqllava` command: hands the rest of its line to the module of the command named first."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

# command -> (module whose `main(argv)` runs it, what it does). Modules load when they are called.
COMMANDS = {
    "data": ("sqllava.data.cli", "fetch, check, index and look at training data"),
    "ask": ("sqllava.ask.cli", "describe pictures, ask about them, or make data of a folder"),
    "serve": ("sqllava.serve.cli", "serve a page to question images in a browser"),
    "train": ("sqllava.train.cli", "train a stage (the scripts call it through DeepSpeed)"),
    "convert": (
        "sqllava.checkpoint.cli",
        "turn a checkpoint into another layout, or merge an adapter",
    ),
    "eval": ("sqllava.eval.cli", "benchmarks: prepare, run, score, judge, report"),
}

# Commands that an extra of pyproject.toml must be installed for.
EXTRAS = {"data": "train", "train": "train"}


class Parser(argparse.ArgumentParser):
    """The commands' parser: options may be spelled with underscores, too, as the trainer's are."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with `--some_option=a_b` read as `--some-option=a_b`."""
        given: list[str] = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(_hyphens, given[:end]), *given[end:]], namespace)


def _hyphens(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Raises:
        SystemExit: there is no such command, or what it needs is not installed.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return
    if name not in COMMANDS:
        raise SystemExit(f"error: no command {name!r}\n\n{usage()}")
    try:
        command = import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if name not in EXTRAS:
            raise
        hint = f"pip install 'sqllava[{EXTRAS[name]}]'"
        raise SystemExit(f"error: {error.name} is not installed: {hint}") from error
    _run(command.main, rest)


def _run(command: Callable[[list[str]], None], words: list[str]) -> None:
    """Runs a command; ends without a word where what it writes to has been closed (`| head -1`),
    or where Ctrl-C stops it."""
    try:
        try:
            command(words)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except (SystemExit, OSError):
        if not _nobody_reads():
            raise
        # What is left in the buffer goes nowhere, rather than to a complaint at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that its reader has closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(found & select.POLLERR for _, found in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:10} {what}\n" for name, (_, what) in COMMANDS.items()]
    return f"usage: sqllava COMMAND ...    (sqllava COMMAND --help)\n\n{''.join(lines)}"

"""`sqllava train`, and `python -m sqllava.train`: the help at once, all else by `run.py`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields

from sqllava.train.flags import DataArguments, ModelArguments, RecipeArguments
from sqllava.train.process import end_with_launcher

HELP = ("-h", "--help")
HELP_ALL = ("--help_all", "--help-all")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one stage of training as a process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in HELP for word in words):
        help_parser().print_help()
        raise SystemExit(0)
    end_with_launcher()
    from sqllava.train.run import main as run

    run(["--help" if word in HELP_ALL else word for word in words])


def help_parser() -> argparse.ArgumentParser:
    """Shows our flags; they are parsed together with transformers', in `arguments.py`."""
    parser = argparse.ArgumentParser(
        prog="sqllava train",
        description="Trains SQ-LLaVA: stage 1 (alignment) or stage 2 (self-questioning). The "
        "scripts call it through DeepSpeed: scripts/pretrain_clu.sh, "
        "scripts/finetune_lora_clu_sq.sh.",
        epilog=f"All of transformers' TrainingArguments are flags, too: {HELP_ALL[0]} lists them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for kind in (ModelArguments, DataArguments, RecipeArguments):
        group = parser.add_argument_group((kind.__doc__ or "").strip(". "))
        for flag in fields(kind):
            needed = flag.default is MISSING
            group.add_argument(
                f"--{flag.name}",
                metavar=flag.name.rpartition("_")[2].upper(),
                required=needed,
                default=argparse.SUPPRESS if needed else flag.default,
                help=flag.metadata["help"],
            )
    return parser

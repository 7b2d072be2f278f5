"""`sqllava eval`: list, check and prepare benchmarks; run, score, judge, compare and report."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqllava.cli import Parser
from sqllava.eval import selfq
from sqllava.eval.records import (
    Row,
    foreign_content,
    read_jsonl,
    to_json,
    write_json,
    write_jsonl,
)
from sqllava.eval.tasks import TASKS, get_task
from sqllava.eval.tasks.published import PUBLISHED
from sqllava.eval.tasks.task import Option, Task

logger = logging.getLogger(__name__)

DATA = Path("playground/data/eval")
# Commands whose flags depend on the task: command -> the task's field with them.
TASK_OPTIONS = {"score": "options", "prepare": "prepare_options", "run": "options"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command of `sqllava eval`.

    Raises:
        SystemExit: with a line that says what is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["selfq"]:
        selfq.main(words[1:])
        return
    args = build_parser(words).parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.command(args)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; the words tell it whose task's flags to add."""
    parser = Parser(prog="sqllava eval", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser
    _list_arguments(add("list", help="the tasks, or all about one"))
    _check_arguments(add("check", help="which files are there, and where to get the others"))
    _prepare_arguments(add("prepare", help="make a question file from the official download"))
    _run_arguments(add("run", help="answer a task's questions (all: every task with data)"))
    _merge_arguments(add("merge", help="put the chunks' answers together, if all are there"))
    _score_arguments(add("score", help="score answers"))
    _submit_arguments(add("submit", help="write what the benchmark's server wants"))
    _judge_arguments(add("judge", help="have a judge review answers (llavabench, mmvet)"))
    _compare_arguments(add("compare", help="compare two runs item by item"))
    _report_arguments(add("report", help="one table and page over all scores"))
    add("selfq", help="measures of the questions that a model asks")
    command, name = [*words, "", ""][:2]
    if command in TASK_OPTIONS and name in TASKS:
        group = commands.choices[command].add_argument_group(f"options of {name}")
        for option in getattr(TASKS[name], TASK_OPTIONS[command]):
            _add_option(group, option)
    return parser


def _add_option(group: Any, option: Option) -> None:
    if option.kind is None:
        group.add_argument(option.flag, action="store_true", help=option.help)
        return
    group.add_argument(
        option.flag,
        type=option.kind,
        choices=option.choices,
        default=option.default,
        help=option.help.replace("%", "%%"),
    )


def _options(task: Task, args: argparse.Namespace, field: str) -> Row:
    return {option.name: getattr(args, option.name) for option in getattr(task, field)}


def _tell(value: Any) -> None:
    text = to_json(value) + "\n"
    # A file's name may hold what UTF-8 cannot; JSON has an escape for it.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))


# --- list and check -------------------------------------------------------------------------------


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", choices=list(TASKS), metavar="TASK",
                        help="all about this one")  # fmt: skip
    parser.set_defaults(command=list_tasks)


def list_tasks(args: argparse.Namespace) -> None:
    """Prints a line for each task, or everything about one."""
    if args.task:
        sys.stdout.write(describe(get_task(args.task)))
        return
    for task in TASKS.values():
        sys.stdout.write(f"{task.name:12} {task.title:36} {'/'.join(task.headline)}\n")


def describe(task: Task) -> str:
    """All that a task says of itself, as text."""
    files = [f"  {file.path:44} {file.size:12} {file.source}" for file in task.files]
    figures = [f"  {model:44} {value}" for model, value in PUBLISHED.get(task.name, {}).items()]
    decoding = f"greedy, at most {task.max_new_tokens} new tokens"
    facts = {
        "prompt": repr(task.prompt),
        "template": task.template,
        "image preparation": task.image_preparation,
        "decoding": decoding,
        "answers": task.answers,
        "submission": task.submission or "none: scored here",
        "metric": task.metric,
        "headline": "/".join(task.headline) + f" x {task.scale:g}" * (task.scale != 1),
    }
    flags = [f"  {option.flag:20} {option.help}" for option in task.options]
    blocks = [
        f"{task.name}: {task.title}",
        *(f"{name + ':':19} {fact}" for name, fact in facts.items()),
        *(["score's options:", *flags] if flags else []),
        f"files, in {DATA / task.layout.folder}:",
        *files,
        *(["published:", *figures] if figures else ["published: nothing to compare with"]),
    ]
    return "\n".join(blocks) + "\n"


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="*", metavar="TASK", help="all by default")
    parser.add_argument("--data", type=Path, default=DATA, help="data folder (%(default)s)")
    parser.set_defaults(command=check)


def check(args: argparse.Namespace) -> None:
    """Says which files are missing or unusable, from where they come and how big they are.

    Raises:
        SystemExit: with 1, if there are such.
    """
    missing = False
    for name in args.task or TASKS:
        task = get_task(name)
        folder = args.data / task.layout.folder
        faults = {file: _fault(folder / file.path) for file in task.files}
        lost = {file: fault for file, fault in faults.items() if fault is not None}
        sys.stdout.write(f"{name}: {'complete' if not lost else f'{len(lost)} missing'}\n")
        for file, fault in lost.items():
            sys.stdout.write(f"  {folder / file.path}{fault} ({file.size}): {file.source}\n")
        missing |= bool(lost)
    if missing:
        raise SystemExit(1)


def _fault(path: Path) -> str | None:
    """Why a file or folder cannot be used, as the end of a sentence; "" if it is not there."""
    if not path.exists():
        return ""
    if path.is_dir():
        return None if any(path.iterdir()) else " is an empty folder"
    foreign = foreign_content(path) if path.stat().st_size else "empty"
    return f" is {foreign}" if foreign else None


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    names = [name for name, task in TASKS.items() if task.prepare]
    parser.add_argument("task", choices=names, metavar="TASK", help=", ".join(names))
    parser.add_argument("source", type=Path, help="the official download: a file or folder")
    parser.add_argument("--out", type=Path, required=True, help="the question file to write")
    parser.set_defaults(command=prepare)


def prepare(args: argparse.Namespace) -> None:
    """Makes a question file."""
    task = get_task(args.task)
    assert task.prepare is not None  # by the choices above
    count = task.prepare(args.source, args.out, _options(task, args, "prepare_options"))
    logger.info("%d questions: %s", count, args.out)


# --- run ------------------------------------------------------------------------------------------


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*TASKS, "all"]
    parser.add_argument("task", choices=names, metavar="TASK", help=", ".join(names))
    parser.add_argument("--model", required=True, help="folder, or hub id of a transformers model")
    parser.add_argument("--base", help="the language model under an adapter, if it has moved")
    parser.add_argument("--vision-tower", help="the tower under an adapter, if it has moved")
    parser.add_argument("--questions", type=Path, help="question file")
    parser.add_argument("--images", type=Path, help="image folder")
    parser.add_argument("--answers", type=Path, help="answers file to write, or go on with")
    parser.add_argument("--annotations", type=Path, help="score against these when all is answered")
    parser.add_argument("--data", type=Path, help=f"data folder, such as {DATA}: fills in paths")
    parser.add_argument("--output", type=Path, default=Path("results"), help="with --data: results")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="questions with a picture each that fit memory"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    parser.add_argument(
        "--template", "--conv-mode", help="in place of the task's, or of the model's own"
    )
    parser.add_argument("--image-preparation", choices=("pad", "crop"), help="of the task's")
    parser.add_argument("--max-new-tokens", type=int, help="in place of the task's")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 with --do-sample")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--do-sample", action="store_true", help="sample; scores become random")
    parser.add_argument("--num-chunks", type=int, help="how many processes share the work")
    parser.add_argument("--chunk-idx", type=int, help="which of them this one is, from 0")
    parser.add_argument("--bad-images", choices=("error", "mark"), default="error",
                        help="stop at a picture that cannot be read (default), or write an "
                        "empty answer and go on")  # fmt: skip
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1")
    parser.add_argument("--limit", type=int, help="only the first questions, to try things out")
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> None:
    """Answers one task's questions, or those of all tasks whose data are there."""
    from sqllava.eval.run import run_all, run_task

    if args.task == "all":
        run_all(args)
    else:
        run_task(get_task(args.task), args, _options(get_task(args.task), args, "options"))


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True, help="as given to run")
    parser.set_defaults(command=merge)


def merge(args: argparse.Namespace) -> None:
    """Merges chunks, which the last one to finish has done already if none was moved by hand."""
    from sqllava.eval.run import merge_task

    merge_task(get_task(args.task), args.questions, args.answers)


# --- score ----------------------------------------------------------------------------------------


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--answers", type=Path, help="answers file; not needed with stored reviews")
    parser.add_argument("--annotations", type=Path, required=True, help="what the benchmark ships")
    parser.add_argument("--questions", type=Path, help="question file, where the join needs it")
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--items", type=Path, help="write each item's record here (JSON lines)")
    parser.add_argument("--submission", type=Path, help="for a server: by default beside --answers")
    parser.add_argument("--allow-missing", action="store_true", help="score a missing one as none")
    parser.add_argument(
        "--bootstrap",
        type=at_least(0),
        default=0,
        metavar="N",
        help="95 %% intervals from N resamples",
    )
    parser.set_defaults(command=score)


def score(args: argparse.Namespace) -> None:
    """Scores answers and prints one JSON object."""
    from sqllava.eval import score as scoring

    task = get_task(args.task)
    result = scoring.score(
        task,
        args.answers,
        args.annotations,
        args.questions,
        _options(task, args, "options"),
        args.allow_missing,
        args.bootstrap,
        args.submission or (args.answers and default_submission(task, args.answers)),
    )
    if args.out:
        write_json(args.out, result.as_json())
    if args.items:
        write_jsonl(args.items, result.items)
    _tell(result.as_json())


def default_submission(task: Task, answers: Path) -> Path:
    """Where a submission goes: beside the answers."""
    return answers.with_name(f"{answers.stem}_submission{task.submission_suffix}")


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    names = [name for name, task in TASKS.items() if task.submit]
    parser.add_argument("task", choices=names, metavar="TASK", help=", ".join(names))
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, help="what the benchmark ships")
    parser.add_argument("--questions", type=Path, help="the question file")
    parser.add_argument("--out", type=Path, help="by default beside --answers")
    parser.set_defaults(command=submit)


def submit(args: argparse.Namespace) -> None:
    """Writes a submission."""
    from sqllava.eval.score import read_answers_file
    from sqllava.eval.tasks.task import Inputs

    task = get_task(args.task)
    source = args.annotations or args.questions
    if source is None:
        raise ValueError("a submission needs --annotations or --questions")
    out = args.out or default_submission(task, args.answers)
    assert task.submit is not None  # by the choices above
    task.submit(Inputs(read_answers_file(args.answers), source, args.questions), out)
    logger.info("wrote %s", out)


# --- judge, compare, report -----------------------------------------------------------------------


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=("llavabench", "mmvet"), metavar="TASK",
                        help="llavabench or mmvet")  # fmt: skip
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True, help="the benchmark's folder")
    parser.add_argument("--prompts", type=Path, required=True, help="rule.json, or MM-Vet's script")
    parser.add_argument("--out", type=Path, required=True, help="reviews or grades to write")
    parser.add_argument("--judge", help="model name (by default the published judge's)")
    parser.add_argument("--base-url", help="of an OpenAI-compatible server ($OPENAI_BASE_URL)")
    parser.add_argument("--runs", type=at_least(1), default=1, help="MM-Vet: grades per answer")
    parser.add_argument("--concurrency", type=at_least(1), default=8,
                        help="requests at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one request")
    parser.add_argument("--retries", type=at_least(0), default=5, help="of a request that fails")
    parser.add_argument("--max-tokens", type=at_least(1), help="of a reply (the published limit)")
    parser.add_argument(
        "--max-tokens-name",
        choices=("max_tokens", "max_completion_tokens"),
        default="max_tokens",
        help="what the server calls that limit; another name is tried where it is refused",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default="published",
        help="in place of the published one; none: do not send it, as where it is refused",
    )
    parser.add_argument("--price-in", type=float, default=0.0, help="$ per million tokens sent")
    parser.add_argument("--price-out", type=float, default=0.0, help="$ per million tokens written")
    parser.add_argument("--estimate", action="store_true", help="only say what it would cost")
    parser.set_defaults(command=judge)


def judge(args: argparse.Namespace) -> None:
    """Asks the judge; the key is in $OPENAI_API_KEY.

    Raises:
        RuntimeError: nothing usable came of all that was asked.
    """
    from sqllava.eval.judge import judge_task

    told = judge_task(args)
    _tell(told)
    if told.get("failed") and told["failed"] == told["asked"]:
        name, reason = next(iter(told["failures"].items()))
        raise RuntimeError(f"all {told['failed']} requests failed; question {name}: {reason}")


def at_least(lowest: int) -> Callable[[str], int]:
    """A flag's type: a whole number that is not lower."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"a whole number of {lowest} or more, not {text!r}")
        return int(text)

    return number


def temperature(text: str) -> float | str | None:
    """A flag's type: a temperature; "published" as it is, and None for "none"."""
    if text in ("none", "published"):
        return None if text == "none" else text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of 0 or more, or none, not {text!r}")
    return value


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="items of a run (score --items)")
    parser.add_argument("second", type=Path, help="items of another run on the same questions")
    parser.set_defaults(command=compare)


def compare(args: argparse.Namespace) -> None:
    """Compares two runs."""
    from sqllava.eval import score as scoring

    _tell(scoring.compare(read_jsonl(args.first), read_jsonl(args.second)))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="folder with a <task>.score.json each")
    parser.add_argument("--out", type=Path, help="folder for the report (the same by default)")
    parser.add_argument("--data", type=Path, help="data folder, for pictures on the page")
    parser.set_defaults(command=report)


def report(args: argparse.Namespace) -> None:
    """Writes the report."""
    from sqllava.eval.report import write_report

    sys.stdout.write(write_report(args.results, args.out or args.results, args.data))


if __name__ == "__main__":
    main()

"""`sqllava eval run`: opens a model, answers a task's questions, and scores them if it can."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sqllava.eval.answers import Job, Shard, discard, generate, merge, shard_of_environment
from sqllava.eval.engine import Engine, open_engine
from sqllava.eval.records import Row, write_json, write_jsonl
from sqllava.eval.report import write_report
from sqllava.eval.score import headline, score
from sqllava.eval.tasks import TASKS
from sqllava.eval.tasks.task import Task
from sqllava.generation.decoding import Decoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Paths:
    """Where a task's data and results are."""

    questions: Path
    images: Path | None
    answers: Path
    annotations: Path | None

    @property
    def score(self) -> Path:
        return self.answers.with_name(f"{self.answers.stem}.score.json")

    @property
    def items(self) -> Path:
        return self.answers.with_name(f"{self.answers.stem}.items.jsonl")


def paths_of(task: Task, args: argparse.Namespace) -> Paths:
    """The paths given, and those that the data folder's layout fills in.

    Raises:
        ValueError: a path is neither given nor filled in.
    """
    questions, images, answers = args.questions, args.images, args.answers
    annotations = args.annotations
    if args.data:
        folder = args.data / task.layout.folder
        questions = questions or folder / task.layout.questions
        images = images or folder / task.layout.images
        answers = answers or args.output / f"{task.name}.jsonl"
        if task.layout.annotations and not annotations:
            annotations = folder / task.layout.annotations
    if questions is None or answers is None:
        raise ValueError("give --questions and --answers, or --data with the data folder")
    if not questions.is_file():
        raise FileNotFoundError(f"no question file {questions}: `sqllava eval list {task.name}`")
    return Paths(questions, images, answers, annotations)


def shard_of(args: argparse.Namespace) -> Shard:
    """The share that the flags give this process, or torchrun."""
    if (args.num_chunks is None) != (args.chunk_idx is None):
        raise ValueError("--num-chunks and --chunk-idx go together")
    if args.num_chunks is None:
        return shard_of_environment()
    return Shard(args.chunk_idx, args.num_chunks)


def decoding_of(task: Task, args: argparse.Namespace) -> Decoding:
    """How answers are written: greedily, unless sampling is asked for by name."""
    if not args.do_sample and (args.temperature or args.top_p is not None):
        raise ValueError(
            f"temperature {args.temperature} and top_p {args.top_p} need --do-sample: "
            "benchmarks are decoded greedily"
        )
    if args.do_sample and not args.temperature:
        raise ValueError("sampling needs a temperature above 0")
    tokens = task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    return Decoding(tokens, temperature=args.temperature or None, top_p=args.top_p)


def run_task(
    task: Task, args: argparse.Namespace, options: Row, engine: Engine | None = None
) -> Engine:
    """Answers a task's questions, and scores them once all are there and there is a truth.

    Args:
        engine: an open model, to go on with.

    Returns:
        The model, for the next task.
    """
    paths, shard = paths_of(task, args), shard_of(args)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, found {args.limit}")
    questions = task.read_questions(paths.questions)[: args.limit]
    decoding = decoding_of(task, args)
    job = Job(task.name, paths.questions, paths.images, paths.answers, decoding, args.bad_images)
    if args.overwrite and shard.index == 0:
        discard(job)
    engine = engine or open_engine(
        args.model, args.base, args.vision_tower, args.dtype, args.device or _own_device()
    )
    asker = engine.for_task(
        task.template, args.image_preparation or task.image_preparation, args.template
    )
    preparation = asker.prompter.describe()["image_preparation"]
    if args.image_preparation not in (None, preparation):
        logger.warning(
            "image preparation %r is not used: the model brings its own, %r",
            args.image_preparation,
            preparation,
        )
    complete = generate(asker, job, questions, shard, args.batch_size, args.workers)
    if args.limit:
        logger.info("the answers to a part of the questions are not scored")
    elif complete and paths.annotations and not _needs_a_judge(task, options):
        _score(task, paths, paths.annotations, options)
    return engine


def _own_device() -> str | None:
    """A GPU of its own for each process of torchrun; the default otherwise."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return None


def _needs_a_judge(task: Task, options: Row) -> bool:
    return task.name in ("llavabench", "mmvet") and not (
        options.get("reviews") or options.get("grades")
    )


def _score(task: Task, paths: Paths, annotations: Path, options: Row) -> None:
    result = score(task, paths.answers, annotations, paths.questions, options)
    write_json(paths.score, result.as_json())
    write_jsonl(paths.items, result.items)
    logger.info("%s: %s (%s)", task.name, headline(task, result.metrics), paths.score)


def run_all(args: argparse.Namespace) -> None:
    """Runs every task whose question file is in the data folder, then reports."""
    if not args.data:
        raise ValueError("run all needs --data")
    ready = [
        task
        for task in TASKS.values()
        if (args.data / task.layout.folder / task.layout.questions).is_file()
    ]
    if not ready:
        raise FileNotFoundError(f"no task's question file is in {args.data}: sqllava eval check")
    engine = None
    for task in ready:
        options = {option.name: option.default for option in task.options}
        engine = run_task(task, args, options, engine)
    if shard_of(args).index == 0:
        write_report(args.output, args.output, args.data)


def merge_task(task: Task, questions: Path, answers: Path) -> None:
    """Merges chunks.

    Raises:
        ValueError: some answers are missing.
    """
    job = Job(task.name, questions, None, answers, Decoding(task.max_new_tokens))
    if not merge(job, task.read_questions(questions)):
        raise ValueError(f"not all answers are there yet: {job.parts}")

"""Questions -> answers.jsonl: batched, over several processes, resumable.

A process takes a contiguous share of the questions, cuts it into batches (`plan.py`), and appends
their answers to its own file in OUT.parts/. Whoever finishes last merges all parts into OUT, in the
order of the questions. A killed run goes on where it stopped: its batches are cut as before.
"""

import fcntl
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sqllava.eval.engine import Engine, Prompter, decoding_settings
from sqllava.eval.fields import Record
from sqllava.eval.pictures import read_picture
from sqllava.eval.plan import Batch, picture_key, plan
from sqllava.eval.records import (
    Question,
    Row,
    answer_row,
    line,
    parse_row,
    read_record,
    write_json,
    write_text,
)
from sqllava.generation.decoding import Decoding
from sqllava.pixels import ImageError

logger = logging.getLogger(__name__)

BadImages = Literal["error", "mark"]
BATCH_SIZE = 16
WORKERS = 2


@dataclass(frozen=True)
class Shard:
    """One process's share of the questions: number `index` of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"chunk {self.index} is not one of 0 to {self.count - 1}")

    def items(self, total: int) -> range:
        """The share, as published: slices of ceil(total / count); the last ones may be empty."""
        size = math.ceil(total / self.count)
        return range(min(self.index * size, total), min((self.index + 1) * size, total))


@dataclass(frozen=True)
class Job:
    """What is asked, and where the answers go.

    Attributes:
        images: the image folder; None for questions that hold their pictures, or have none.
        bad_images: "error" stops at a picture that cannot be read; "mark" writes an empty answer
            with the reason in its metadata.
    """

    task: str
    questions: Path
    images: Path | None
    out: Path
    decoding: Decoding
    bad_images: BadImages = "error"

    @property
    def parts(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    @property
    def header(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.header.json")


def shard_of_environment() -> Shard:
    """The share that torchrun or accelerate gives this process; the whole without them."""
    return Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def generate(
    engine: Engine,
    job: Job,
    questions: Sequence[Question],
    shard: Shard = Shard(),  # noqa: B008 - frozen
    batch_size: int = BATCH_SIZE,
    workers: int = WORKERS,
) -> bool:
    """Answers a shard's questions, and merges if no other shard has work left.

    Returns:
        Whether the answers are complete, in `job.out`.

    Raises:
        ValueError: the answers that are there were made otherwise, or a picture cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, found {batch_size}")
    _check_texts(job, questions)
    write_header(job, engine, questions, batch_size)
    job.parts.mkdir(parents=True, exist_ok=True)
    items = shard.items(len(questions))
    part = job.parts / f"{shard.count}_{shard.index}.jsonl"
    with _appending(part) as file:
        done = set(read_parts(job, questions))
        batches = plan(questions, items, batch_size, engine.costs(job.decoding))
        todo = [batch for batch in batches if not done.issuperset(chain(*batch))]
        dataset = PreparedBatches(todo, questions, job.images, engine.prompter)
        with tqdm(
            total=len(items),
            initial=sum(item in done for item in items),
            desc=job.task,
            unit="q",
            mininterval=1.0,
        ) as bar:
            for prepared in _loader(dataset, workers):
                for rows in _answers(engine, job, questions, prepared, done):
                    fresh = [row for row in rows if row["item"] not in done]
                    # One write a round: what a kill leaves is whole rounds and at most a torn line.
                    file.write("".join(line(row) for row in fresh))
                    file.flush()
                    bar.update(len(fresh))
    return merge(job, questions)


def _check_texts(job: Job, questions: Sequence[Question]) -> None:
    """Raises ValueError at a question that no tokenizer takes: JSON can hold half a character."""
    for number, question in enumerate(questions, 1):
        try:
            question.text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{job.questions}, record {number} (question {question.question_id!r}): character "
                f"{error.start + 1} of its text is half a surrogate pair, "
                f"{question.text[error.start]!r}, and no text: write the whole pair"
            ) from None


# --- batches --------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A batch for the model.

    Attributes:
        rounds: the items that can be asked, round by round.
        inputs: for all of them in this order; None if there are none.
        errors: why others cannot be asked, by item.
    """

    rounds: Batch
    inputs: Any
    errors: dict[int, str]

    def numbers(self) -> Iterator[tuple[list[int], range]]:
        """Each round's items, with their places in the inputs."""
        start = 0
        for items in self.rounds:
            yield items, range(start, start + len(items))
            start += len(items)


class PreparedBatches(Dataset[Prepared]):
    """Reads each picture of a batch once and makes the model's inputs, in worker processes."""

    def __init__(
        self,
        batches: Sequence[Batch],
        questions: Sequence[Question],
        images: Path | None,
        prompter: Prompter,
    ) -> None:
        self.batches = batches
        self.questions = questions
        self.images = images
        self.prompter = prompter

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Prepared:
        pictures: dict[Any, Image.Image | None] = {}
        unread: dict[Any, str] = {}
        errors: dict[int, str] = {}
        for item in chain(*self.batches[index]):
            key = picture_key(self.questions[item])
            if key not in pictures and key not in unread:
                try:
                    pictures[key] = read_picture(self.questions[item], self.images)
                except ImageError as error:
                    unread[key] = str(error)
            if key in unread:
                errors[item] = unread[key]
        rounds = [[item for item in items if item not in errors] for items in self.batches[index]]
        rounds = [items for items in rounds if items]
        asked = [self.questions[item] for item in chain(*rounds)]
        inputs = None
        if asked:
            texts = [question.text for question in asked]
            inputs = self.prompter.batch(texts, [pictures[picture_key(q)] for q in asked])
        return Prepared(rounds, inputs, errors)


def _loader(dataset: PreparedBatches, workers: int) -> DataLoader[Prepared]:
    return DataLoader(dataset, batch_size=None, num_workers=min(workers, len(dataset)))


def _answers(
    engine: Engine,
    job: Job,
    questions: Sequence[Question],
    prepared: Prepared,
    done: Set[int],
) -> Iterator[list[Row]]:
    """The answers to a batch, each with its item's number, round by round; what has been done in
    whole rounds is left out."""
    errors = prepared.errors.items()
    yield [_marked(job, engine, item, questions[item], error) for item, error in errors]
    lengths = engine.lengths(prepared.inputs) if prepared.rounds else []
    for item, length in zip(chain(*prepared.rounds), lengths, strict=True):
        if engine.context is not None and length >= engine.context and item not in done:
            logger.warning(
                "question %r: its prompt has %d tokens, and the model reads %d: do not trust the "
                "answer",
                questions[item].question_id,
                length,
                engine.context,
            )
    todo = [(items, at) for items, at in prepared.numbers() if not set(items) <= done]
    texts = engine.answers(prepared.inputs, [at for _, at in todo], job.decoding)
    for items, said in zip([items for items, _ in todo], texts if todo else (), strict=True):
        yield [
            {"item": item, **answer_row(questions[item], text, engine.model_id)}
            for item, text in zip(items, said, strict=True)
        ]


def _marked(job: Job, engine: Engine, item: int, question: Question, error: str) -> Row:
    """The empty answer to a question whose picture cannot be read."""
    if job.bad_images == "error":
        raise ValueError(
            f"{job.questions}, record {item + 1} (question {question.question_id!r}): "
            f"{error} (--bad-images mark goes on with an empty answer)"
        )
    logger.warning("question %r: %s", question.question_id, error)
    return {"item": item, **answer_row(question, "", engine.model_id, {"error": error})}


# --- parts ----------------------------------------------------------------------------------------


@contextmanager
def _appending(part: Path) -> Iterator[IO[str]]:
    """Opens a part for appending, alone, without the torn line that a kill may have left."""
    with open(part, "a+", encoding="utf-8", newline="\n") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{part}: another process is writing this chunk") from None
        file.truncate(len(_whole_lines(part)))
        yield file


def _whole_lines(part: Path) -> bytes:
    content = part.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def read_parts(job: Job, questions: Sequence[Question]) -> dict[int, Row]:
    """All answers so far, by item, of any number of shards.

    Raises:
        ValueError: an answer is to another question, or two differ.
    """
    found: dict[int, Row] = {}
    for part in sorted(job.parts.glob("*.jsonl")):
        for text in _whole_lines(part).splitlines():
            row = parse_row(text.decode("utf-8", "replace"), str(part))
            item = Record(row, str(part)).integer("item")
            del row["item"]
            question = questions[item] if 0 <= item < len(questions) else None
            if question is None or (row.get("question_id"), row.get("prompt")) != (
                question.question_id,
                question.recorded_prompt,
            ):
                raise ValueError(f"{part}: item {item} answers another question")
            Record(row, f"{part}, item {item}").text("text")
            if found.setdefault(item, row)["text"] != row["text"]:
                raise ValueError(f"{part}: item {item} has two different answers")
    return found


def merge(job: Job, questions: Sequence[Question]) -> bool:
    """Writes the answers in the questions' order, if all are there.

    Returns:
        Whether they are.
    """
    found = read_parts(job, questions)
    if len(found) < len(questions):
        logger.info("%d of %d answers are there", len(found), len(questions))
        return False
    write_text(job.out, "".join(line(found[item]) for item in range(len(questions))))
    logger.info("%d answers: %s", len(found), job.out)
    return True


# --- header ---------------------------------------------------------------------------------------


def write_header(
    job: Job, engine: Engine, questions: Sequence[Question], batch_size: int
) -> Mapping[str, Any]:
    """Records what made the answers; refuses to go on with answers that were made otherwise."""
    settings = {
        "task": job.task,
        "questions": len(questions),
        "questions_sha256": sha256(job.questions.read_bytes()).hexdigest(),
        "decoding": decoding_settings(job.decoding),
        "bad_images": job.bad_images,
        **engine.describe(),
    }
    header = {
        **settings,
        "questions_file": str(job.questions),
        "images": str(job.images) if job.images else None,
        "batch_size": batch_size,
        **engine.remarks,
        "device": str(engine.model.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if job.header.is_file():
        before = read_record(job.header).row
        if before.get("bad_images") == "error" and job.bad_images == "mark":
            # What was answered before the picture that stopped the run stays as it is.
            before["bad_images"] = "mark"
            write_json(job.header, before)
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            told = "; ".join(f"{n}: {before.get(n)!r} then, {settings[n]!r} now" for n in changed)
            raise ValueError(
                f"{job.out} was begun with other settings ({told}): "
                "give another --answers, or --overwrite"
            )
    else:
        write_json(job.header, header)
    return header


def discard(job: Job) -> None:
    """Removes all that an earlier run of the job has left; raises ValueError while one goes on."""
    parts = list(job.parts.glob("*.jsonl"))
    for part in parts:
        with _appending(part):
            pass
    for path in (*parts, job.header, job.out):
        path.unlink(missing_ok=True)

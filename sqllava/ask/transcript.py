"""What `sqllava ask` does: pictures by name, and what the model says about them, as text or JSON.

Between the command line (cli.py) and `SelfQuestioner` or, with --dataset, the data engine.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPException
from typing import TextIO
from urllib.error import HTTPError

from PIL import Image

import sqllava
from sqllava.ask import data_engine
from sqllava.ask.questioner import SelfQuestioner, describing
from sqllava.conversation import Turn
from sqllava.data.images import load_image
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import Stream
from sqllava.pixels import ImageError

MAX_DOWNLOAD = 50_000_000
_DOWNLOAD_SECONDS = 30
_BLOCK = 2**16
_SCHEMES = ("http://", "https://")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exchange:
    """A question of the model's, and its own answer if it was to give one."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class Conversation:
    """What the model said about one image."""

    image: str
    description: str
    exchanges: list[Exchange]


@dataclass(frozen=True)
class Plan:
    """What the model shall say about an image.

    Attributes:
        asking: how questions are drawn; its samples are their number.
        answering: how the description and the answers are written.
        answer: whether the questions are answered.
        rounds: if not 0, so many questions one after another, each answered and then part of what
            the next one is asked from.
    """

    asking: Decoding
    answering: Decoding
    answer: bool = True
    rounds: int = 0
    seed: int | None = None


class Transcript:
    """Shows people what is said about an image as it comes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, text: str) -> None:
        # A file's name may be no UTF-8.
        self._out.write(text.encode("utf-8", "backslashreplace").decode())
        self._out.flush()

    def in_order(self, heads: Sequence[str]) -> Stream:
        """A stream of texts that are written at once and shown one after another, behind heads."""
        waiting, ended, current = [""] * len(heads), [False] * len(heads), 0

        def take(row: int, text: str, last: bool) -> None:
            nonlocal current
            waiting[row] += text
            ended[row] = last
            while current < len(heads):
                self.show(waiting[current])
                waiting[current] = ""
                if not ended[current]:
                    return
                current += 1
                self.show("\n" + "".join(heads[current : current + 1]))

        self.show("".join(heads[:1]))
        return take


def converse(
    questioner: SelfQuestioner,
    name: str,
    picture: Image.Image,
    plan: Plan,
    transcript: Transcript | None = None,
) -> Conversation:
    """Describes a picture, asks about it, and answers."""
    images = questioner.encode([picture], remember=True)
    stream = transcript.in_order([f"{name}\n  "]) if transcript else None
    description = questioner.describe_batch(images, plan.answering, stream)[0]
    context, exchanges = describing(description), list[Exchange]()
    asking = replace(plan.asking, samples=1) if plan.rounds else plan.asking
    for number in range(plan.rounds or 1):
        seed = None if plan.seed is None else plan.seed + number
        questions = questioner.ask_batch(images, asking, seed, [context])[0]
        heads = [f"  VUSER {i}: {text}" for i, text in enumerate(questions, len(exchanges) + 1)]
        if not (plan.answer or plan.rounds):
            exchanges = [Exchange(question, None) for question in questions]
            if transcript:
                transcript.show("".join(f"{head}\n" for head in heads))
            break
        heads = [f"{head}\n         " for head in heads]
        stream = transcript.in_order(heads) if transcript else None
        about, contexts = images * len(questions), [context] * len(questions)
        answers = questioner.answer_batch(
            about, questions, contexts, plan.answering, "vuser", stream
        )
        for question, answer in zip(questions, answers, strict=True):
            exchanges.append(Exchange(question, answer))
            context = [*context, Turn("vuser", question), Turn("assistant", answer)]
    return Conversation(name, description, exchanges)


# --- pictures -------------------------------------------------------------------------------------


def named_images(words: Iterable[str], stdin: TextIO, allow_url: bool) -> list[str]:
    """The images that a command line names; "-" stands for the lines of standard input.

    Raises:
        ValueError: a URL, and URLs are not allowed; standard input is no text, or empty; a folder.
        FileNotFoundError: there is no such file.
    """
    names = []
    for word in words:
        try:
            lines = _names(stdin) if word == "-" else [word]
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is no list of names: {error}") from error
        names += [line for line in lines if line.strip()]
    if not names:
        raise ValueError("standard input names no images")
    for name in names:
        if "://" in name:
            _check_url(name, allow_url)
        elif os.path.isdir(name):
            raise ValueError(f"{name} is a folder: name its files, or make data of it (--dataset)")
        elif not os.path.isfile(name):  # also of names that no file can have
            raise FileNotFoundError(f"no such image: {name}")
    return names


def _names(stdin: TextIO) -> list[str]:
    """The lines of a list, with or without a byte order mark."""
    return [line.rstrip("\r") for line in stdin.read().removeprefix("\ufeff").split("\n")]


def _check_url(name: str, allow_url: bool) -> None:
    if not allow_url:
        raise ValueError(f"{name} is a URL, and nothing is fetched unless --allow-url is given")
    if not name.lower().startswith(_SCHEMES):
        raise ValueError(f"{name}: only http and https URLs are fetched")


def open_picture(name: str) -> Image.Image:
    """Reads an image file, or fetches one; raises ImageError saying what is wrong with it."""
    return _fetch(name) if "://" in name else load_image(name)


def _fetch(url: str) -> Image.Image:
    try:
        data = _download(url)
    except ImageError:
        raise
    # What is no address, or answers in no HTTP, is told by neither as an OSError.
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) if not isinstance(error, HTTPError) else None
        told = str(reason or error) or type(error).__name__
        raise ImageError(f"{url}: {told}") from error
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            return load_image(file.name)
        except ImageError as error:
            raise ImageError(f"{url}: {error.__cause__}") from error


def _download(url: str) -> bytes:
    """What an address answers with, within the bounds of bytes and seconds."""
    data, deadline = bytearray(), time.monotonic() + _DOWNLOAD_SECONDS
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as answer:
        if not answer.url.lower().startswith(_SCHEMES):
            raise ImageError(f"{url}: leads to {answer.url}, and only http and https are fetched")
        while block := answer.read1(_BLOCK):
            data += block
            if len(data) > MAX_DOWNLOAD:
                raise ImageError(f"{url}: more than {MAX_DOWNLOAD} bytes")
            if time.monotonic() > deadline:
                raise ImageError(f"{url}: not there after {_DOWNLOAD_SECONDS} seconds")
    return bytes(data)


def ask_images(args: argparse.Namespace) -> int:
    """Asks about the images named; returns how many could not be used."""
    names = named_images(args.images, sys.stdin, args.allow_url)
    asking = Decoding(args.max_new_tokens, args.n, args.temperature, args.top_k, args.top_p)
    answering = Decoding(args.answer_tokens)
    plan = Plan(asking, answering, args.answer, args.rounds or 0, args.seed)
    model, processor = sqllava.load(args.model, args.base, args.vision_tower, device=args.device)
    questioner = SelfQuestioner(model, processor)
    transcript = None if args.json else Transcript(sys.stdout)
    failed = 0
    for name in names:
        try:
            picture = open_picture(name)
        except ImageError as error:
            logger.error("error: %s", error)
            failed += 1
            continue
        conversation = converse(questioner, name, picture, plan, transcript)
        if args.json:
            sys.stdout.write(_json_line(conversation))
            sys.stdout.flush()
    return failed


def _json_line(conversation: Conversation) -> str:
    """A conversation as a line of JSON; a name that is not UTF-8 stands there in escapes."""
    line = json.dumps(asdict(conversation), ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(asdict(conversation)) + "\n"
    return line


def make_data(args: argparse.Namespace) -> int:
    """Makes instruction data; returns 0, as bad images are told in the report."""
    k = args.consistency
    settings = data_engine.Settings(
        model=args.model,
        base=args.base,
        vision_tower=args.vision_tower,
        asking=Decoding(args.max_new_tokens, args.n, args.temperature, args.top_k, args.top_p),
        answering=Decoding(args.answer_tokens),
        checking=Decoding(args.answer_tokens, k, temperature=0.7) if k else None,
        agreement=args.agreement,
        batch=args.batch,
        rows=args.rows,
        seed=args.seed or 0,
    )
    report = data_engine.make_self_qa(
        args.dataset, args.out, settings, args.image_folder, args.processes, args.describe_every
    )
    report = {name: report[name] for name in ("images", "questions", "kept_share")}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0

"""The data engine: images without labels -> LLaVA records, questions and answers the model's own.

images -> batches -> what was drawn about each image, with a verdict on every question (OUT.parts/)
-> the records of what was kept (OUT) and a report of what was not (OUT.report.json)

A batch's content depends on its number and the settings alone, so a run that is killed goes on
where it was, in as many processes as it likes, and ends with the same bytes.
"""

import hashlib
import json
import logging
import os
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from sqllava.ask import DESCRIBE_EVERY
from sqllava.ask.questioner import SelfQuestioner, describing, seeded
from sqllava.checkpoint.load import load
from sqllava.checkpoint.stamp import stamp_model
from sqllava.conversation import DESCRIBE_QUESTION, IMAGE, Turn, question_key
from sqllava.data.images import load_image, resolve_image
from sqllava.data.records import RecordError, describe, image_names, iter_records
from sqllava.generation.decoding import Decoding
from sqllava.generation.writer import EncodedImage, Written
from sqllava.pixels import ImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_ROLE_TAG = re.compile(r"\b(USER|ASSISTANT|VUSER):")
_WORD = re.compile(r"\w+")
_UNREADABLE_SHOWN = 100

logger = logging.getLogger(__name__)

KEPT = "kept"
VERDICTS = {
    KEPT: "in the data",
    "cut": "the question was longer than allowed",
    "no question": "empty, of several lines, with markup, or without its only question mark at its "
    "end",
    "repeated": "asked before about the same image",
    "no answer": "the answer was empty, longer than allowed, or held markup",
    "inconsistent": "sampled answers agreed less with the greedy one than asked for",
}


@dataclass(frozen=True)
class Settings:
    """What decides the data, beside the images.

    Attributes:
        model, base, vision_tower: as for `sqllava.load`.
        asking: how questions are drawn; its samples are their number for each image.
        answering: how descriptions and answers are written.
        checking: how the answers are sampled that must agree with the greedy one; None checks none.
        agreement: the least share of words, by F1, that they must have in common on average.
        batch: images worked on together.
        rows: texts decoded together, at most.
    """

    model: str
    base: str | None = None
    vision_tower: str | None = None
    asking: Decoding = Decoding(128, samples=8, temperature=1.2, top_k=300, top_p=0.95)
    answering: Decoding = Decoding(512)
    checking: Decoding | None = Decoding(512, samples=4, temperature=0.7)
    agreement: float = 0.75
    batch: int = 8
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.agreement <= 1.0:
            raise ValueError(f"the agreement must be in [0, 1], found {self.agreement}")
        for name in ("batch", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


@dataclass
class DrawnQuestion:
    """A question that the model asked, and what became of it; see `VERDICTS`."""

    text: str
    verdict: str
    answer: str | None = None
    agreement: float | None = None


@dataclass
class DrawnImage:
    """All that was drawn about an image; a line of a part file.

    Attributes:
        number: its place among the images.
        description: None if it was cut or empty.
        unreadable: why the image could not be used, if it could not.
    """

    number: int
    image: str
    description: str | None = None
    questions: list[DrawnQuestion] = field(default_factory=list)
    unreadable: str | None = None

    @classmethod
    def from_json(cls, line: str | bytes) -> "DrawnImage":
        values = json.loads(line)
        values["questions"] = [DrawnQuestion(**question) for question in values["questions"]]
        return cls(**values)


def make_self_qa(
    dataset: Path,
    out: Path,
    settings: Settings,
    image_folder: Path | None = None,
    processes: int = 1,
    describe_every: int = DESCRIBE_EVERY,
) -> dict[str, Any]:
    """Asks and answers about all images of a dataset, and writes instruction data.

    Args:
        dataset: a folder of images, or a LLaVA JSON file whose images are taken.
        out: the JSON file; what is drawn is kept beside it in `OUT.parts`.
        image_folder: where a JSON file's images are; beside it by default.
        processes: how many work side by side, each with a model of its own (and a GPU, if any).
        describe_every: see `record_of`; a run that is done can be written anew with another.

    Returns:
        The report that is written to `OUT.report.json`.

    Raises:
        FileNotFoundError, ValueError: there are no images or no model, or `OUT.parts` was begun
            with other settings.
    """
    folder, names = list_images(dataset, image_folder)
    parts = out.with_name(f"{out.name}.parts")
    _begin(parts, settings, names)
    todo = pending(parts, len(names), settings.batch)
    batches = _batch_count(len(names), settings.batch)
    logger.info("%s: %d images, %d of %d batches to do", dataset, len(names), len(todo), batches)
    work = (folder, names, parts, settings)
    if processes == 1 or len(todo) < 2:
        _work(todo, *work, device=None)
    else:
        _share_out(todo, min(processes, len(todo)), work)
    left = pending(parts, len(names), settings.batch)
    if left:
        raise ValueError(f"{parts}: batches {left[:10]} are missing; run the command again")
    return _finish(parts, out, settings, describe_every)


# --- images ---------------------------------------------------------------------------------------


def _names_in(dataset: Path) -> Iterator[str]:
    for number, record in enumerate(iter_records(dataset)):
        try:
            yield from image_names(record) if isinstance(record, dict) else []
        except ValueError as error:
            raise RecordError(describe(record, dataset, number, error)) from error


def list_images(dataset: Path, image_folder: Path | None = None) -> tuple[Path, list[str]]:
    """The folder of a dataset's images, and their names in it: each once, in a fixed order."""
    if dataset.is_dir():
        found = (path for path in dataset.rglob("*") if path.suffix.lower() in SUFFIXES)
        folder, names = dataset, sorted(path.relative_to(dataset).as_posix() for path in found)
    else:
        folder = image_folder or dataset.parent
        names = list(dict.fromkeys(_names_in(dataset)))
    if not names:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(
            f"{dataset}: holds no images; expected a folder of {kinds}, or a JSON file whose "
            "records have 'image'"
        )
    return folder, names


# --- one batch ------------------------------------------------------------------------------------


def draw(
    questioner: SelfQuestioner, pictures: Sequence[Image.Image], settings: Settings, seed: int
) -> list[tuple[str | None, list[DrawnQuestion]]]:
    """For each picture its description, unless it is unusable, and the questions about it."""

    def write(
        turns: Sequence[Sequence[Turn]], about: Sequence[EncodedImage], decoding: Decoding
    ) -> list[list[Written]]:
        return _write_in_chunks(questioner, turns, about, decoding, settings.rows)

    images = questioner.encode(pictures, remember=True)
    describe = [Turn("user", DESCRIBE_QUESTION, images=1), Turn("assistant", None)]
    described = [texts[0] for texts in write([describe] * len(images), images, settings.answering)]
    contexts = [describing(written.text) for written in described]
    with seeded(seed, questioner.model.device):
        asked = write(
            [[*turns, Turn("vuser", None)] for turns in contexts], images, settings.asking
        )
        questions = [judge_questions(several) for several in asked]
        rows = [row for row, several in enumerate(questions) for _ in usable(several)]
        open_ = [question for several in questions for question in usable(several)]
        turns = [
            [*contexts[row], Turn("vuser", question.text), Turn("assistant", None)]
            for row, question in zip(rows, open_, strict=True)
        ]
        about = [images[row] for row in rows]
        answers = write(turns, about, settings.answering)
        # Without the description in view: what it left out or made up would be counted alike.
        alone = [
            [Turn("user", question.text, images=1), Turn("assistant", None)] for question in open_
        ]
        samples = write(alone, about, settings.checking) if settings.checking else [[]] * len(turns)
    for question, answer, sampled in zip(open_, answers, samples, strict=True):
        judge_answer(question, answer[0], [one.text for one in sampled], settings.agreement)
    return [
        (written.text if _is_usable(written) else None, several)
        for written, several in zip(described, questions, strict=True)
    ]


def usable(questions: Iterable[DrawnQuestion]) -> list[DrawnQuestion]:
    """The questions that nothing speaks against, so far."""
    return [question for question in questions if question.verdict == KEPT]


def judge_questions(written: Sequence[Written]) -> list[DrawnQuestion]:
    """Judges the questions about one image by their form, and by those before them."""
    known: set[str] = set()
    judged = []
    for one in written:
        key = question_key(one.text)
        if not one.ended:
            verdict = "cut"
        elif not (key and _is_one_question(one.text) and _is_usable(one)):
            verdict = "no question"
        else:
            verdict = "repeated" if key in known else KEPT
            known.add(key)
        judged.append(DrawnQuestion(one.text, verdict))
    return judged


def judge_answer(
    question: DrawnQuestion, answer: Written, samples: Sequence[str], agreement: float
) -> None:
    """Notes the answer to a question, and how far answers sampled for it agree."""
    question.answer = answer.text
    if samples:
        question.agreement = sum(word_f1(answer.text, text) for text in samples) / len(samples)
    if not _is_usable(answer):
        question.verdict = "no answer"
    elif question.agreement is not None and question.agreement < agreement:
        question.verdict = "inconsistent"


def word_f1(first: str, second: str) -> float:
    """F1 of the words that two texts share, each counted as often as it stands in both (SQuAD)."""
    words, others = (Counter(_WORD.findall(text.casefold())) for text in (first, second))
    if not words or not others:
        return float(first == second)
    return 2 * (words & others).total() / (words.total() + others.total())


def _is_one_question(text: str) -> bool:
    # A second mark: the question goes on with its own answer and the next question.
    return "\n" not in text and text.find("?") == len(text) - 1


def _is_usable(written: Written) -> bool:
    markup = IMAGE in written.text or _ROLE_TAG.search(written.text)
    return bool(written.ended and written.text and not markup)


def _write_in_chunks(
    questioner: SelfQuestioner,
    turns: Sequence[Sequence[Turn]],
    images: Sequence[EncodedImage],
    decoding: Decoding,
    rows: int,
) -> list[list[Written]]:
    step = max(1, rows // decoding.samples)
    return [
        texts
        for start in range(0, len(turns), step)
        for texts in questioner.write(
            turns[start : start + step], images[start : start + step], decoding
        )
    ]


# --- all batches ----------------------------------------------------------------------------------


def _begin(parts: Path, settings: Settings, names: Sequence[str]) -> None:
    """Notes what a run is made of; a later one must be made of the same to go on."""
    given = {
        **asdict(settings),
        "images": len(names),
        "names": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "weights": stamp_model(settings.model),
    }
    path = parts / "settings.json"
    if path.is_file():
        begun = json.loads(path.read_text())
        others = [
            f"{name} {begun.get(name)!r} there, {value!r} now"
            for name, value in given.items()
            if begun.get(name) != value
        ]
        if others:
            raise ValueError(
                f"{parts} was begun with other settings ({'; '.join(others)}): give another --out, "
                "or remove it"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    _write_whole(path, [json.dumps(given, indent=1)])


def pending(parts: Path, images: int, batch: int) -> list[int]:
    """The batches of which not every image has its line."""
    done = _lines(parts)
    return [
        number
        for number in range(_batch_count(images, batch))
        if any(image not in done for image in _images_of(number, images, batch))
    ]


def _batch_count(images: int, batch: int) -> int:
    return -(-images // batch)


def _images_of(number: int, images: int, batch: int) -> range:
    return range(number * batch, min((number + 1) * batch, images))


def _lines(parts: Path) -> dict[int, tuple[Path, int]]:
    """Where each image's line is: its file and offset. Of equal lines the first counts."""
    places: dict[int, tuple[Path, int]] = {}
    for path in sorted(parts.glob("*.jsonl")):
        offset = 0
        with path.open("rb") as handle:
            for line in handle:
                if line.endswith(b"\n"):  # else a kill has torn it
                    places.setdefault(json.loads(line)["number"], (path, offset))
                offset += len(line)
    return places


def _share_out(
    todo: Sequence[int], processes: int, work: tuple[Path, list[str], Path, Settings]
) -> None:
    """Works on batches in several processes; each writes a part file of its own."""
    gpus = torch.cuda.device_count()
    started = []
    for rank in range(processes):
        device = f"cuda:{rank % gpus}" if gpus else None
        process = get_context("spawn").Process(
            target=_work_beside,
            args=(todo[rank::processes], *work, device, max(1, (os.cpu_count() or 1) // processes)),
            daemon=True,
        )
        process.start()
        started.append(process)
    for process in started:
        process.join()
    failed = [process.exitcode for process in started if process.exitcode]
    if failed:
        raise ValueError(
            f"{len(failed)} of {processes} processes failed (exit codes {failed}); "
            "run the command again to go on"
        )


def _work_beside(todo: Sequence[int], *work: Any) -> None:
    *rest, threads = work
    torch.set_num_threads(threads)
    _work(todo, *rest)


def _work(
    todo: Sequence[int],
    folder: Path,
    names: list[str],
    parts: Path,
    settings: Settings,
    device: str | None,
) -> None:
    """Draws batch after batch into a new part file."""
    model, processor = load(settings.model, settings.base, settings.vision_tower, device=device)
    questioner = SelfQuestioner(model, processor)
    parent = parent_process()
    with (parts / f"part-{uuid.uuid4().hex}.jsonl").open("ab") as out:
        for number in tqdm(todo, desc="batches", mininterval=1.0):
            if parent and not parent.is_alive():
                return  # killed: the next run does the rest
            numbers = _images_of(number, len(names), settings.batch)
            drawn = _draw_batch(questioner, folder, names, numbers, settings, number)
            lines = [json.dumps(asdict(image), ensure_ascii=False) + "\n" for image in drawn]
            out.write("".join(lines).encode())
            out.flush()


def _draw_batch(
    questioner: SelfQuestioner,
    folder: Path,
    names: Sequence[str],
    numbers: Sequence[int],
    settings: Settings,
    batch: int,
) -> list[DrawnImage]:
    drawn = [DrawnImage(number, names[number]) for number in numbers]
    pictures = []
    for image in drawn:
        try:
            pictures.append(load_image(resolve_image(folder, image.image)))
        except ImageError as error:
            image.unreadable = str(error)
    readable = [image for image in drawn if image.unreadable is None]
    if readable:
        said = draw(questioner, pictures, settings, settings.seed + batch)
        for image, (description, questions) in zip(readable, said, strict=True):
            image.description, image.questions = description, questions
    return drawn


# --- the data -------------------------------------------------------------------------------------


def record_of(drawn: DrawnImage, describe_every: int = DESCRIBE_EVERY) -> dict[str, Any] | None:
    """The LLaVA record of an image; None if there is nothing to say.

    It holds the questions kept, and in every `describe_every`-th record (in none, if 0) the
    description before them. A description is as long as many answers and the loss is a mean over
    tokens: in every record it would leave little of the loss to what is asked. An image of which no
    question was kept has its description alone.
    """
    exchanges = [(question.text, question.answer or "") for question in usable(drawn.questions)]
    described = not exchanges or (describe_every and drawn.number % describe_every == 0)
    if described and drawn.description:
        exchanges.insert(0, (DESCRIBE_QUESTION, drawn.description))
    if not exchanges:
        return None
    turns = []
    for number, (question, answer) in enumerate(exchanges):
        turns.append({"from": "human", "value": question if number else f"{IMAGE}\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": drawn.image, "image": drawn.image, "conversations": turns}


class Tally:
    """Counts what was kept, and what was not, and why."""

    def __init__(self) -> None:
        self.images = Counter(dict.fromkeys(("given", "written", "unreadable", "nothing kept"), 0))
        self.descriptions = 0
        self.verdicts = Counter(dict.fromkeys(VERDICTS, 0))
        self.agreements: list[float] = []
        self.unreadable: list[str] = []

    def add(self, drawn: DrawnImage, record: dict[str, Any] | None) -> None:
        """Counts an image, its questions, and whether its record begins with the description."""
        fate = "unreadable" if drawn.unreadable else "written" if record else "nothing kept"
        self.images.update(("given", fate))
        first = record["conversations"][0]["value"] if record else ""
        self.descriptions += first.endswith(DESCRIBE_QUESTION)
        self.verdicts.update(question.verdict for question in drawn.questions)
        self.agreements += [q.agreement for q in drawn.questions if q.agreement is not None]
        if drawn.unreadable and len(self.unreadable) < _UNREADABLE_SHOWN:
            self.unreadable.append(drawn.unreadable)

    def report(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The figures, with what each verdict means."""
        drawn = self.verdicts.total()
        agreements = self.agreements
        return {
            "images": dict(self.images),
            "descriptions": self.descriptions,
            "questions": {"drawn": drawn, **self.verdicts},
            "kept_share": round(self.verdicts[KEPT] / drawn, 4) if drawn else None,
            "mean_agreement": round(sum(agreements) / len(agreements), 4) if agreements else None,
            "verdicts": VERDICTS,
            "unreadable": self.unreadable,
            "settings": settings,
        }


def _finish(parts: Path, out: Path, settings: Settings, describe_every: int) -> dict[str, Any]:
    """Writes the records of all images, in their order, and the report."""
    tally = Tally()
    places = _lines(parts)
    handles = {path: path.open("rb") for path, _ in places.values()}

    def records() -> Iterator[str]:
        before = "["
        for number in sorted(places):
            path, offset = places[number]
            handles[path].seek(offset)
            drawn = DrawnImage.from_json(handles[path].readline())
            record = record_of(drawn, describe_every)
            tally.add(drawn, record)
            if record:
                yield f"{before}\n{json.dumps(record, ensure_ascii=False)}"
                before = ","
        yield "]" if before == "," else "[]"

    try:
        _write_whole(out, records())
    finally:
        for handle in handles.values():
            handle.close()
    report = tally.report({**asdict(settings), "describe_every": describe_every})
    _write_whole(out.with_name(f"{out.name}.report.json"), [json.dumps(report, indent=1)])
    return report


def _write_whole(path: Path, pieces: Iterable[str]) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as handle:
        handle.writelines(pieces)
        handle.write("\n")
    unfinished.replace(path)

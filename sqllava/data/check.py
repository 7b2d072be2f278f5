"""Checks data before training does: the layout's folders, then every record, and every image.

Beside the data's path, over the same code: what passes here does not stop a training.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sqllava.conversation import TEMPLATES, check_share, turns_from_record
from sqllava.data import histogram
from sqllava.data.images import read_image, resolve_image
from sqllava.data.records import RecordError, check_record, file_kind, image_names, iter_with_text
from sqllava.data.sources import image_folders
from sqllava.data.unpack import IMAGE_SUFFIXES
from sqllava.data.view import View, open_view
from sqllava.encoding import encode_record
from sqllava.pixels import ImageError

# Read, examined in parallel, and written before the next ones are read: memory stays flat.
_BATCH = 2048
_SHOWN_FAULTS = 20
# Times longer than wide: below it no tower's preparation refuses a picture. Others are asked, which
# takes transformers' import.
_THIN = 100
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used: its number from 0, its id, and why."""

    record: int
    id: str
    reason: str


@dataclass(frozen=True)
class Examined:
    """What one record holds.

    Attributes:
        tokens: its length, image placeholders included; `supervised` of them are targets.
        scaled: how its greys of more than 8 bits became 8, an entry for each such image.
    """

    fault: Fault | None = None
    images: int = 0
    tokens: int = 0
    supervised: int = 0
    scaled: tuple[str, ...] = ()


@dataclass
class Report:
    """What was found.

    Attributes:
        kind: of the file, such as "JSON lines".
        stopped: why the file could not be read to its end, if it could not.
        converted: what was read in another form than LLaVA's, and in how many records.
        duplicate_ids: records whose id an earlier one has; LLaVA's own mix has such, and they are
            no fault.
        images_were: "not looked for", "found" or "decoded".
        estimated: whether lengths are estimated from characters, for want of a tokenizer.
        scaled: greys of more than 8 bits by how they became 8, where images were decoded.
        over_length: usable records longer than `max_length`; their last turns will be dropped.
    """

    file: str
    kind: str
    max_length: int
    images_were: str
    estimated: bool
    records: int = 0
    faults: list[Fault] = field(default_factory=list)
    stopped: str = ""
    converted: Counter[str] = field(default_factory=Counter)
    duplicate_ids: int = 0
    text_only: int = 0
    several_images: int = 0
    images: int = 0
    scaled: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised: int = 0
    over_length: int = 0
    lengths: array = field(default_factory=lambda: array("i"))

    @property
    def usable(self) -> int:
        """Records without a fault."""
        return self.records - len(self.faults)

    def add(self, examined: Examined) -> None:
        """Counts one record."""
        self.records += 1
        if examined.fault is not None:
            self.faults.append(examined.fault)
            return
        self.text_only += examined.images == 0
        self.several_images += examined.images > 1
        self.images += examined.images
        self.scaled.update(examined.scaled)
        self.tokens += examined.tokens
        self.supervised += examined.supervised
        self.over_length += examined.tokens > self.max_length
        self.lengths.append(examined.tokens)


@dataclass(frozen=True)
class Examiner:
    """Looks at single records, in any process.

    Attributes:
        images: where image names start; None leaves images alone.
        decode: whether each image is opened and decoded whole.
    """

    file: Path
    images: Path | None
    decode: bool
    view: View
    template: str
    sq_r: float
    max_length: int

    def __call__(self, item: tuple[int, Any]) -> Examined:
        """Examines a record, given with its number."""
        number, record = item
        try:
            check_record(record, self.file, number)
            scaled = self._check_images(record)
            return replace(self._measure(number, record), scaled=scaled)
        except ValueError as error:
            identity = record.get("id") if isinstance(record, dict) else None
            cause = error.__cause__ if isinstance(error, RecordError) else error
            return Examined(Fault(number, f"{identity!r:.80}", _printable(str(cause or error))))

    def _check_images(self, record: dict[str, Any]) -> tuple[str, ...]:
        """Looks for the images; gives how they were scaled, of those that were."""
        if self.images is None:
            return ()
        paths = [resolve_image(self.images, name) for name in image_names(record)]
        return tuple(filter(None, map(self._decode, paths))) if self.decode else ()

    def _decode(self, path: Path) -> str:
        loaded = read_image(path)
        if max(loaded.image.size) > _THIN * min(loaded.image.size):
            try:
                self.view.prepare_image.check(loaded.image)
            except ImageError as error:
                raise ImageError(f"{path}: {error}") from error
        return loaded.scaled

    def _measure(self, number: int, record: dict[str, Any]) -> Examined:
        images = len(image_names(record))
        placeholders = images * self.view.image_tokens
        if self.view.tokenizer is None:
            turns = turns_from_record(record)
            lengths = [len(turn.text or "") // _CHARACTERS_PER_TOKEN for turn in turns]
            return Examined(None, images, sum(lengths) + placeholders, sum(lengths[1::2]))
        encoded = encode_record(
            record,
            self.template,
            self.view.tokenizer,
            self.sq_r if TEMPLATES[self.template].self_questions else 0.0,
            random.Random(number),
            self.view.image_tokens,
        )
        return Examined(None, images, len(encoded.input_ids), encoded.supervised)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("file", nargs="?", type=Path, help="records; without, only the layout")
    parser.add_argument("--images", type=Path, help="where image names start (--image_folder)")
    parser.add_argument("--decode", action="store_true", help="open every image")
    parser.add_argument("--model", help="adapter directory or language model, for true lengths")
    parser.add_argument("--template", default="v1_sq", choices=list(TEMPLATES))
    parser.add_argument("--sq-r", type=float, default=0.5, help="share of self-questions (0.5)")
    parser.add_argument("--model-max-length", type=int, default=2048)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="folder for report.json and lengths.svg")
    parser.add_argument("--write-clean", type=Path, metavar="FILE", help="the usable records")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 if a record cannot be used, or the layout is not complete."""
    if args.file is None and args.images is None:
        raise ValueError("nothing to check: name a FILE, --images ROOT, or both")
    _check_flags(args)
    folders = count_folders(args.images) if args.images else {}
    if args.file is None:
        sys.stdout.write(layout_table(folders))
        return int(any(found < expected for found, expected, _ in folders.values()))
    examiner = Examiner(
        args.file,
        args.images,
        args.decode,
        open_view(args.model),
        args.template,
        args.sq_r,
        args.model_max_length,
    )
    report = check(examiner, args.jobs, args.write_clean)
    there = {name: counts for name, counts in folders.items() if counts[0]}
    sys.stdout.write((layout_table(there) + "\n" if there else "") + table(report))
    if args.out:
        write(report, folders, args.out)
    return int(bool(report.faults or report.stopped))


def _check_flags(args: argparse.Namespace) -> None:
    check_share(args.sq_r)
    if args.model_max_length < 1:
        raise ValueError(f"--model-max-length must be at least 1, found {args.model_max_length}")
    if args.images and not args.images.is_dir():
        raise FileNotFoundError(f"--images {args.images}: no such folder")
    clean = args.write_clean
    if clean and args.file and clean.exists() and clean.samefile(args.file):
        raise ValueError(f"--write-clean {clean}: that is the file to check; name another")
    if clean and not clean.parent.is_dir():
        raise FileNotFoundError(f"--write-clean {clean}: there is no folder {clean.parent}")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: a file; name a folder")


def check(examiner: Examiner, jobs: int | None = 1, clean: Path | None = None) -> Report:
    """Examines every record of a file; memory stays flat, however large it is.

    Args:
        jobs: processes; they are used where there is work for them (images to decode, or tokens).
        clean: where to write the usable records, in LLaVA's form, as a JSON array. The others are
            listed beside it, in a file that ends in .bad.jsonl.
    """
    report = Report(
        str(examiner.file),
        file_kind(examiner.file),
        examiner.max_length,
        "not looked for" if not examiner.images else "decoded" if examiner.decode else "found",
        estimated=examiner.view.tokenizer is None,
    )
    heavy = examiner.decode or examiner.view.tokenizer is not None
    seen: set[int] = set()
    writer = _CleanWriter(clean) if clean else None
    try:
        with _mapping(examiner, jobs or 1 if heavy else 1) as mapped:
            for batch in _batches(iter_with_text(examiner.file, report.converted)):
                numbered = [(report.records + i, record) for i, (record, _) in enumerate(batch)]
                for (record, text), examined in zip(batch, mapped(numbered), strict=True):
                    report.add(examined)
                    report.duplicate_ids += _is_repeated(record, seen)
                    if writer:
                        writer.add(text, examined.fault)
    except RecordError as error:
        report.stopped = str(error)
        if writer:
            writer.abandon()
        return report
    if writer:
        writer.close()
    return report


@contextmanager
def _mapping(
    examiner: Examiner, jobs: int
) -> Iterator[Callable[[list[tuple[int, Any]]], Iterable[Examined]]]:
    """`map` with the examiner, over one process or several."""
    if jobs <= 1:
        yield lambda items: map(examiner, items)
        return
    with multiprocessing.get_context("fork").Pool(jobs, _set_examiner, (examiner,)) as pool:
        yield lambda items: pool.map(_examine, items, chunksize=32)


_examiner: Examiner


def _set_examiner(examiner: Examiner) -> None:
    global _examiner
    _examiner = examiner


def _examine(item: tuple[int, Any]) -> Examined:
    return _examiner(item)


def _batches(records: Iterator[tuple[Any, str]]) -> Iterator[list[tuple[Any, str]]]:
    batch: list[tuple[Any, str]] = []
    try:
        for record in tqdm(records, "checking", unit=" records", delay=2):
            batch.append(record)
            if len(batch) == _BATCH:
                yield batch
                batch = []
    except RecordError:  # what stands before a fault in the file counts, too
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _is_repeated(record: Any, seen: set[int]) -> bool:
    identity = record.get("id") if isinstance(record, dict) else None
    if identity is None:
        return False
    key = hash(repr(identity))
    repeated = key in seen
    seen.add(key)
    return repeated


class _CleanWriter:
    """Writes usable records beside their final name, and gives it to them at the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._bad = path, path.with_name(path.stem + ".bad.jsonl")
        self._unfinished = path.with_name(path.name + ".tmp")
        self._unfinished_bad = self._bad.with_name(self._bad.name + ".tmp")
        self._out = self._unfinished.open("w", encoding="utf-8")
        self._list = self._unfinished_bad.open("w", encoding="utf-8")
        self._separator = "[\n"

    def add(self, text: str, fault: Fault | None) -> None:
        if fault is not None:
            self._list.write(json.dumps(asdict(fault)) + "\n")
            return
        self._out.write(self._separator + text)
        self._separator = ",\n"

    def close(self) -> None:
        self._out.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._out.close()
        self._list.close()
        self._unfinished.replace(self._path)
        self._unfinished_bad.replace(self._bad)

    def abandon(self) -> None:
        for handle, path in (
            (self._out, self._unfinished),
            (self._list, self._unfinished_bad),
        ):
            handle.close()
            path.unlink()


def count_folders(root: Path) -> dict[str, tuple[int, int, bool]]:
    """Images found and expected in every folder of the layout, and if the latter is rough."""
    return {
        name: (_count_images(root / name), expected, rough)
        for name, (expected, rough) in image_folders().items()
    }


def _count_images(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    count = 0
    for entry in os.scandir(folder):
        if entry.is_dir():
            count += _count_images(Path(entry.path))
        else:
            count += entry.name.lower().endswith(IMAGE_SUFFIXES)
    return count


def layout_table(folders: dict[str, tuple[int, int, bool]]) -> str:
    """Found and expected images, a line a folder."""
    lines = [f"{'folder':28} {'images':>9} {'expected':>9}"]
    for name, (found, expected, rough) in folders.items():
        missing = expected - found
        note = f"{missing} missing" if missing > 0 and not rough else ""
        note = "none: see `sqllava data download`" if not found else note
        shown = f"~{expected}" if rough else str(expected)
        lines.append(f"{name:28} {found:>9} {shown:>9}  {note}".rstrip())
    return "\n".join([*lines, ""])


def table(report: Report) -> str:
    """The report for a terminal."""
    about = "about " if report.estimated else ""
    usable, tokens = max(report.usable, 1), max(report.tokens, 1)
    lines = [
        f"{report.file}: {report.kind}",
        f"  records            {report.records}",
        f"  usable             {report.usable}",
        f"  without an image   {report.text_only} ({report.text_only / usable:.1%})",
        f"  several images     {report.several_images}",
        f"  images             {report.images} ({report.images_were})",
        f"  tokens             {about}{report.tokens}",
        f"  of them targets    {about}{report.supervised} ({report.supervised / tokens:.1%})",
    ]
    lines[6:6] = [f"  greys scaled       {n}: {how}" for how, n in report.scaled.items()]
    if report.lengths:
        points = np.percentile(np.asarray(report.lengths), (50, 95, 100))
        shown = ", ".join(f"{point:.0f}" for point in points)
        lines.append(f"  length             {about}{shown} (median, 95 %, longest)")
    lines.append(f"  over {report.max_length:<13} {report.over_length} (last turns are dropped)")
    lines += [f"  repeated ids       {report.duplicate_ids}"] if report.duplicate_ids else []
    lines += [f"  converted          {n}: {what}" for what, n in report.converted.items()]
    lines += [f"  STOPPED            {report.stopped}"] if report.stopped else []
    for fault in report.faults[:_SHOWN_FAULTS]:
        lines.append(f"  bad record {fault.record} (id {fault.id}): {fault.reason}")
    more = len(report.faults) - _SHOWN_FAULTS
    lines += [f"  ... and {more} more bad records; --out writes them all"] if more > 0 else []
    return "\n".join([*lines, ""])


def write(report: Report, folders: dict[str, tuple[int, int, bool]], folder: Path) -> None:
    """Writes report.json, and the lengths as lengths.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.asarray(report.lengths, dtype=np.int64)
    counted = histogram.count(lengths)
    values = {name: value for name, value in vars(report).items() if name != "lengths"}
    values |= {
        "faults": [asdict(fault) for fault in report.faults],
        "usable": report.usable,
        "text_only_share": report.text_only / max(report.usable, 1),
        "supervised_share": report.supervised / max(report.tokens, 1),
        "histogram": asdict(counted),
        "folders": {
            name: {"found": found, "expected": expected, "rough": rough}
            for name, (found, expected, rough) in folders.items()
        },
    }
    (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n")
    title = "tokens of a record" + (" (estimated)" if report.estimated else "")
    (folder / "lengths.svg").write_text(histogram.draw(counted, title, report.max_length), "utf-8")


def _printable(text: str) -> str:
    """Text without half surrogate pairs, which no file and no terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode()

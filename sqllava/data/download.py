"""Fetches the recipe's data: annotations and images, into the layout that training expects.

First step on the data's path, once per disk. Run it again after anything: what is whole is left as
it is, what was cut goes on.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from sqllava.data.fetch import DownloadError, Expected, Patience, fetch
from sqllava.data.formats import read_text
from sqllava.data.sources import GROUPS, SAM_SHARDS, SOURCES, Part, Source, choose
from sqllava.data.unpack import DamagedError, UnpackError, unpack
from sqllava.pixels import check_size

logger = logging.getLogger(__name__)

_COVERS_AT_ONCE = 32
_LONGEST_KEY = 200  # bytes: file systems take 255, with what is added
# Of 207,572 links thousands are dead: none may take long, or fill the disk.
_COVER_TRIES, _COVER_SECONDS = 3, 60.0
_COVER_BYTES, _COVER_PIXELS = 50_000_000, 25_000_000


@dataclass(frozen=True)
class Options:
    """How to fetch.

    Attributes:
        root: the folder that everything goes under.
        delete_archives: whether an archive is deleted once its images are out.
        jobs: how many files to fetch at once.
    """

    root: Path
    delete_archives: bool = False
    jobs: int = 4
    patience: Patience = Patience()
    quiet: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one file of a source.

    Attributes:
        state: "complete", "by hand" (a person is needed) or "failed".
    """

    source: str
    path: str
    state: str
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    known = ", ".join([*SOURCES, *GROUPS])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"what to fetch (all): {known}")
    parser.add_argument("--root", type=Path, default=Path("mixTraindata"))
    parser.add_argument("--list", action="store_true", help="say what would be fetched, and stop")
    parser.add_argument("--jobs", type=int, default=4, help="files to fetch at once (4)")
    parser.add_argument(
        "--delete-archives", action="store_true", help="delete each archive once it is unpacked"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0 when everything asked for is there."""
    sources = choose(args.sets or ["all"])
    if args.list:
        sys.stdout.write(listing(sources))
        return 0
    options = Options(args.root, args.delete_archives, max(args.jobs, 1))
    outcomes = download(sources, options)
    sys.stdout.write(summary(outcomes, options.root))
    return int(any(outcome.state != "complete" for outcome in outcomes))


def download(sources: list[Source], options: Options) -> list[Outcome]:
    """Fetches and unpacks sources, several files at a time; a failure stops none of the others."""
    _warn_of_little_space(sources, options.root)
    tasks = [(source, part) for source in sources for part in source.parts]
    pool = ThreadPoolExecutor(options.jobs)
    try:
        return list(pool.map(lambda task: _get(task[0], task[1], options), tasks))
    except KeyboardInterrupt:
        # Threads would first end their gigabytes; all that they do is safe against a kill.
        sys.stderr.write("\nstopped; the same command goes on\n")
        os._exit(130)


def listing(sources: list[Source]) -> str:
    """What would be fetched: name, size, terms, from where, and what a person must do."""
    lines = []
    for source in sources:
        size = sum(part.size for part in source.parts)
        rough = "~" if any(part.rough for part in source.parts) else ""
        shown = f"{rough}{_megabytes(size)}" if size else "size unknown"
        lines.append(f"{source.name:18} {shown:>14}  {source.what}; terms: {source.terms}")
        lines += [f"    {part.url}" for part in source.parts if part.url]
        if source.by_hand:
            lines.append(f"    by hand: {source.by_hand}")
    total = sum(part.size for source in sources for part in source.parts)
    return "\n".join([*lines, f"{'total, about':18} {_megabytes(total):>14}", ""])


def summary(outcomes: list[Outcome], root: Path) -> str:
    """One line a source, its failures, and what a person must do."""
    lines = []
    for name in dict.fromkeys(outcome.source for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.source == name]
        whole = sum(outcome.state == "complete" for outcome in mine)
        lines.append(f"{name:18} {whole} of {len(mine)} complete")
        failures = [f"    failed: {o.path}: {o.note}" for o in mine if o.state == "failed"]
        lines += failures
        if any(outcome.state == "by hand" for outcome in mine):
            lines.append(f"    needs you: {SOURCES[name].by_hand} in {root}, then run this again")
    return "\n".join([*lines, ""])


def _get(source: Source, part: Part, options: Options) -> Outcome:
    path = options.root / part.path
    failed = path.with_name(path.name + ".failed")  # why, for those who come later
    try:
        note = _complete(source, part, options)
    except _ByHandError:
        return Outcome(source.name, part.path, "by hand")
    except (OSError, ValueError) as error:
        with suppress(OSError):
            failed.write_text(f"{error}\n", "utf-8", "backslashreplace")
        return Outcome(source.name, part.path, "failed", str(error))
    failed.unlink(missing_ok=True)
    return Outcome(source.name, part.path, "complete", note)


class _ByHandError(Exception):
    """Something that only a person can bring is missing."""


def _complete(source: Source, part: Part, options: Options) -> str:
    """Brings one file, and unpacks it once; returns a note for the summary."""
    path = options.root / part.path
    done = path.with_name(path.name + ".unpacked")
    if part.unpack_to and done.exists():
        note = done.read_text().strip()
        if not _lacks_images(part, note.partition(" ")[0]):
            return note
        done.unlink()
    url = _sam_link(part, options.root) if source.name == "sam" else part.url
    if url:
        expected = Expected(part.size, part.rough, part.checksum)
        fetch(url, path, expected, options.patience, options.quiet)
    if not path.exists():
        raise _ByHandError
    if not part.unpack_to:
        return ""
    folder = options.root / part.unpack_to
    if source.name == "ocr_vqa":
        return fetch_covers(path, folder, options)
    images = _unpack(path, folder, part, bool(part.url) or source.name == "sam", options)
    _write_whole(done, f"{images} images\n")
    if options.delete_archives:
        path.unlink()
    return f"{images} images"


def _unpack(path: Path, folder: Path, part: Part, fetchable: bool, options: Options) -> int:
    """Unpacks an archive, and says how it goes on with one that is not whole."""
    try:
        images = unpack(path, folder, part.keep_folders, options.quiet)
    except DamagedError as error:
        if not fetchable:
            raise DamagedError(f"{error}; fetch it again, and save it in its place") from error
        # Out of the way, so that the next run fetches it anew.
        path.replace(path.with_name(path.name + ".damaged"))
        raise DamagedError(
            f"{error}; kept as {path.name}.damaged, the next run fetches it anew"
        ) from error
    if _lacks_images(part, str(images)):
        raise UnpackError(f"{path}: holds {images} images; expected {part.images}")
    return images


def _lacks_images(part: Part, count: str) -> bool:
    """Whether an archive gave fewer images than are known to be in it."""
    return not part.rough_images and not (count.isdecimal() and int(count) >= part.images)


def _sam_link(part: Part, root: Path) -> str:
    """The link of one shard, from the file that the licence's form gives."""
    links = root / "sam" / "links.txt"
    shard = PurePosixPath(part.path).name
    if (root / part.path).exists():
        return ""
    if not links.exists():
        raise _ByHandError
    for line in read_text(links).splitlines():
        name, _, url = line.strip().partition("\t")
        if name == shard:
            return url.strip()
    raise ValueError(f"{links}: no line for {shard}; expected {SAM_SHARDS[0]} to {SAM_SHARDS[-1]}")


def fetch_covers(dataset: Path, folder: Path, options: Options) -> str:
    """Fetches the covers that OCR-VQA's dataset.json links to, each saved as .jpg whatever its
    kind, as the annotations name them.

    Links that are dead, or no links, are no failure: some always are. They are counted, and listed
    with their reasons in dead_links.txt beside the dataset. Returns those counts as a note.

    Raises:
        ValueError: dataset.json is not what it should be, or no link works at all.
        OSError: a cover cannot be written.
    """
    entries = _entries(dataset)
    patience = replace(
        options.patience,
        tries=min(options.patience.tries, _COVER_TRIES),
        timeout=min(options.patience.timeout, _COVER_SECONDS),
        longest=_COVER_SECONDS,
    )
    expected = Expected(check=_must_be_image, most=_COVER_BYTES)

    def get(item: tuple[str, Any]) -> str | None:
        key, entry = item
        try:
            fetch(_link(key, entry), folder / f"{key}.jpg", expected, patience, quiet=True)
        except (DownloadError, ValueError) as error:
            url = entry.get("imageURL") if isinstance(entry, dict) else None
            return _one_line(f"{key:.200}\t{url!s:.500}\t{error}")
        return None

    dead = []
    with ThreadPoolExecutor(_COVERS_AT_ONCE) as pool:
        results = tqdm(
            pool.map(get, entries.items()), "OCR-VQA", len(entries), delay=2, disable=options.quiet
        )
        try:
            dead = [result for result in results if result is not None]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _write_whole(dataset.parent / "dead_links.txt", "".join(f"{line}\n" for line in dead))
    if entries and len(dead) == len(entries):
        raise ValueError(f"none of {len(dead)} links works; the first: {dead[0]}")
    return f"{len(entries) - len(dead)} images, {len(dead)} dead links"


def _entries(dataset: Path) -> dict[str, Any]:
    """What dataset.json holds, by id."""
    try:
        entries = json.loads(read_text(dataset))
    except json.JSONDecodeError as error:
        raise ValueError(f"{dataset}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{dataset}: not valid JSON: nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{dataset}: expected an object of id -> entry, found a list or a value")
    return entries


def _link(key: str, entry: Any) -> str:
    """The address of an entry's cover; ValueError says what is wrong with the entry."""
    url = entry.get("imageURL") if isinstance(entry, dict) else None
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"entry {key!r:.80} has no 'imageURL' of http or https: {entry!r:.80}")
    if not key.replace("_", "").replace("-", "").isalnum() or len(key.encode()) > _LONGEST_KEY:
        raise ValueError(f"entry {key!r:.80} cannot be a file's name")
    return url


def _one_line(text: str) -> str:
    """Text for a line of a file: tabs stay, other control characters and half surrogates go."""
    shown = "".join(c if c.isprintable() or c == "\t" else " " for c in text)
    return shown.encode("utf-8", "backslashreplace").decode()


def _write_whole(path: Path, text: str) -> None:
    """Writes a file beside its name, and gives it that at the end."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


def _must_be_image(path: Path) -> None:
    try:
        with Image.open(path) as image:
            small = max(image.size) <= 1
            check_size(*image.size, _COVER_PIXELS)
            image.load()  # not all servers say how long a file is
    except Exception as error:
        raise ValueError(f"not an image: {error}") from error
    if small:  # what a shop sends for a cover it no longer has
        raise ValueError("an empty image of one pixel")


def _warn_of_little_space(sources: list[Source], root: Path) -> None:
    missing = sum(
        # An archive and its images, which are packed as they are, need twice the size.
        part.size * (2 if part.unpack_to else 1)
        for source in sources
        for part in source.parts
        if not (root / part.path).exists() and not (root / f"{part.path}.unpacked").exists()
    )
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        logger.warning(
            "%s: %s free, but what is missing needs up to %s (half with --delete-archives)",
            root,
            _megabytes(free),
            _megabytes(missing),
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from sqllava.data.fetch import Expected, Patience, fetch
from sqllava.data.sources import GROUPS, SAM_SHARDS, SOURCES, Part, Source, choose
from sqllava.data.unpack import unpack

logger = logging.getLogger(__name__)

_COVERS_AT_ONCE = 32


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
    try:
        note = _complete(source, part, options)
    except _ByHandError:
        return Outcome(source.name, part.path, "by hand")
    except (OSError, ValueError) as error:
        return Outcome(source.name, part.path, "failed", str(error))
    return Outcome(source.name, part.path, "complete", note)


class _ByHandError(Exception):
    """Something that only a person can bring is missing."""


def _complete(source: Source, part: Part, options: Options) -> str:
    """Brings one file, and unpacks it once; returns a note for the summary."""
    path = options.root / part.path
    done = path.with_name(path.name + ".unpacked")
    if part.unpack_to and done.exists():
        return done.read_text().strip()
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
    images = unpack(path, folder, part.keep_folders, options.quiet)
    done.write_text(f"{images} images\n")
    if options.delete_archives:
        path.unlink()
    return f"{images} images"


def _sam_link(part: Part, root: Path) -> str:
    """The link of one shard, from the file that the licence's form gives."""
    links = root / "sam" / "links.txt"
    shard = PurePosixPath(part.path).name
    if (root / part.path).exists():
        return ""
    if not links.exists():
        raise _ByHandError
    for line in links.read_text().splitlines():
        name, _, url = line.strip().partition("\t")
        if name == shard:
            return url.strip()
    raise ValueError(f"{links}: no line for {shard}; expected {SAM_SHARDS[0]} to {SAM_SHARDS[-1]}")


def fetch_covers(dataset: Path, folder: Path, options: Options) -> str:
    """Fetches the covers that OCR-VQA's dataset.json links to, each saved as .jpg whatever its
    kind, as the annotations name them.

    Links that are dead are no failure: some always are. They are counted, and listed with their
    reasons in dead_links.txt beside the dataset. Returns those counts as a note.

    Raises:
        ValueError: dataset.json is not what it should be, or no link works at all.
    """
    covers = list(_covers(dataset, folder))

    def get(cover: tuple[str, Path]) -> str | None:
        url, path = cover
        try:
            fetch(url, path, Expected(check=_must_be_image), options.patience, quiet=True)
        except OSError as error:
            return f"{path.stem}\t{url}\t{error}"
        return None

    with ThreadPoolExecutor(_COVERS_AT_ONCE) as pool:
        results = tqdm(
            pool.map(get, covers), "OCR-VQA", len(covers), delay=2, disable=options.quiet
        )
        dead = [result for result in results if result is not None]
    (dataset.parent / "dead_links.txt").write_text("".join(f"{line}\n" for line in dead))
    if covers and len(dead) == len(covers):
        raise ValueError(f"none of {len(covers)} links works; the first: {dead[0]}")
    return f"{len(covers) - len(dead)} images, {len(dead)} dead links"


def _covers(dataset: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    try:
        entries = json.loads(dataset.read_text())
    except ValueError as error:
        raise ValueError(f"{dataset}: not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{dataset}: expected an object of id -> entry, found a list or a value")
    for key, entry in entries.items():
        url = entry.get("imageURL") if isinstance(entry, dict) else None
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ValueError(f"{dataset}: entry {key!r} has no 'imageURL': {entry!r:.80}")
        if not key.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{dataset}: entry {key!r} cannot be a file's name")
        yield url, folder / f"{key}.jpg"


def _must_be_image(path: Path) -> None:
    try:
        with Image.open(path) as image:
            small = max(image.size) <= 1
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

"""A source file -> its index: a memory-mapped Arrow file beside it, made once and shared by all.

Second step of the data's path: `dataset.py` takes single records from it, the sampler its columns.
No process ever holds the source; ranks and workers share the pages of one file.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from sqllava.data.records import image_names, iter_with_text, require_file

logger = logging.getLogger(__name__)

_FOLDER = ".sqllava"
_VERSION = 3
_BATCH_RECORDS = 2048
_BATCH_CHARACTERS = 4 << 20
_READS_MAPPED = 64
# The whole record is kept as JSON text: one call reads it back, further fields survive, and a
# record of the wrong shape stays readable, for the dataset to deal with.
_SCHEMA = pa.schema(
    [
        ("record", pa.string()),
        ("characters", pa.int32()),
        ("images", pa.int16()),
        ("image_key", pa.int64()),
    ]
)


class RecordIndex:
    """Random access to the records of one source file.

    Pickles as its path, so that workers may be forked or spawned.

    Attributes:
        path: the index file.
        source: the file that it was made from, for messages.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source
        with path.open("rb") as handle:
            self._mapped = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ)
        try:
            # No threads: a worker forked later would not have them.
            options = pa.ipc.IpcReadOptions(use_threads=False)
            reader = pa.ipc.open_file(pa.py_buffer(self._mapped), options=options)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not an index; delete it to have it made anew") from error
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._reads = 0
        self._starts = list(accumulate((batch.num_rows for batch in self._batches), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> Any:
        """The record of that number, from 0: a dict, unless the source holds something else."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.source}: no record {number}; it has {len(self)}")
        # The system maps generously around each read; unmapped now and then, the resident size
        # stays flat however much is read. The pages stay in its cache, for all processes.
        self._reads += 1
        if self._reads % _READS_MAPPED == 0:
            self._mapped.madvise(mmap.MADV_DONTNEED)
        batch = bisect_right(self._starts, number) - 1
        column = self._batches[batch].column("record")
        return json.loads(column[number - self._starts[batch]].as_py())

    def __reduce__(self) -> tuple[type["RecordIndex"], tuple[Path, Path]]:
        return RecordIndex, (self.path, self.source)

    @cached_property
    def characters(self) -> np.ndarray:
        """Characters of text in each record, int32 [records]."""
        return self._column("characters")

    @cached_property
    def images(self) -> np.ndarray:
        """Images of each record, int16 [records]."""
        return self._column("images")

    @cached_property
    def image_keys(self) -> np.ndarray:
        """A hash of each record's image names, int64 [records]: the same for records about the same
        images, 0 for those without."""
        return self._column("image_key")

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches])


def open_index(path: Path | str, cache_dir: Path | str | None = None) -> RecordIndex:
    """Opens the index of a data file, making it first if there is none for the file as it is now.

    One process makes it while others wait; a process that is killed leaves nothing that counts.

    Args:
        path: a JSON, JSON lines or Parquet file.
        cache_dir: where to keep the index; by default $SQLLAVA_CACHE, else a hidden folder beside
            the source, else (if that cannot be written to) ~/.cache/sqllava.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: the file is malformed or empty. A record that is merely of the wrong shape
            stays in the index: what to do about it is the dataset's policy.
    """
    source = require_file(path).absolute()
    target = index_path(source, cache_dir)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            # Another process may have made it while this one waited.
            if not target.exists():
                _build(source, target)
    return RecordIndex(target, source)


def index_path(source: Path, cache_dir: Path | str | None = None) -> Path:
    """Where the index of a source belongs, by the source's name, size and times of change.

    The time of modification alone is not enough: rsync, tar and `cp -p` set it as they like.
    """
    stat = source.stat()
    times = f"{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    name = f"{source.name}-{stat.st_size}-{times}-v{_VERSION}.arrow"
    beside = source.parent / _FOLDER / name
    cache = cache_dir or os.environ.get("SQLLAVA_CACHE")
    if not cache and (beside.exists() or os.access(source.parent, os.W_OK)):
        return beside
    # Files of one name from different folders share the cache.
    folder = hashlib.sha256(str(source.parent).encode()).hexdigest()[:12]
    return Path(cache or "~/.cache/sqllava").expanduser().absolute() / folder / name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system takes back from a process that dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process that is making the index", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                f"{path}: this file system has no locks ({error}); set SQLLAVA_CACHE to a folder "
                "on a local disk"
            ) from error
        yield


def _build(source: Path, target: Path) -> None:
    before = source.stat()
    # The name is the same at every try: under the lock, what a killed process left is overwritten.
    unfinished = target.with_suffix(".tmp")
    with unfinished.open("wb") as handle:
        with pa.ipc.new_file(handle, _SCHEMA) as writer:
            for batch in _iter_batches(source):
                writer.write_batch(batch)
        handle.flush()
        os.fsync(handle.fileno())
    after = source.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        unfinished.unlink()
        raise ValueError(f"{source}: changed while it was read; try again when it is complete")
    unfinished.rename(target)
    logger.info("%s: indexed in %s", source, target)


def _iter_batches(source: Path) -> Iterator[pa.RecordBatch]:
    """Packs records into batches of bounded size, so that memory stays flat."""
    rows: list[tuple[str, int, int, int]] = []
    size = 0
    records = tqdm(iter_with_text(source), f"indexing {source.name}", unit=" records", delay=2)
    for record, text in records:
        rows.append((text, *_measure(record)))
        size += len(text)
        if len(rows) == _BATCH_RECORDS or size >= _BATCH_CHARACTERS:
            yield _to_batch(rows)
            rows, size = [], 0
    if rows:
        yield _to_batch(rows)


def _to_batch(rows: list[tuple[str, int, int, int]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _measure(record: Any) -> tuple[int, int, int]:
    """Characters, images and image key of a record; zeros for one of the wrong shape."""
    try:
        characters = sum(len(turn["value"]) for turn in record["conversations"])
        names = image_names(record)
    except (ValueError, TypeError, KeyError, IndexError):
        return 0, 0, 0
    images = min(len(names), np.iinfo(np.int16).max)
    return min(characters, np.iinfo(np.int32).max), images, _image_key(names)


def _image_key(names: Sequence[str]) -> int:
    if not names:
        return 0
    digest = hashlib.blake2b("\0".join(names).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True) or 1

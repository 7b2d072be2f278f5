"""Index + tokenizer -> the true length of every record, counted once and kept beside the index.

Stands beside `index.py` on the data's path: the sampler groups by these lengths where they have
been counted (`sqllava data index --model`), and by an estimate where not.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from sqllava.conversation import Template, get_template
from sqllava.data.index import RecordIndex
from sqllava.encoding import encode_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CHUNK = 256


@dataclass(frozen=True)
class Measure:
    """What a record's length depends on.

    Attributes:
        image_tokens: placeholders per image.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template | str
    image_tokens: int

    def __call__(self, record: object) -> int:
        """Tokens of one record, uncut and without self-questions (each adds two or three); 0 for a
        record that cannot be encoded."""
        try:
            encoded = encode_record(
                record,  # type: ignore[arg-type]  # whatever the file holds
                self.template,
                self.tokenizer,
                image_tokens=self.image_tokens,
            )
        except (ValueError, TypeError, AttributeError):
            return 0
        return len(encoded.input_ids)

    @property
    def key(self) -> str:
        """Tells measures with other results apart."""
        template = self.template if isinstance(self.template, Template) else None
        template = template or get_template(str(self.template))
        probe = "A photo of 2 naïve dogs.\n</s><image>日本 \t USER: ok"
        parts = (
            repr(template),
            self.image_tokens,
            len(self.tokenizer),
            self.tokenizer(probe, add_special_tokens=False, split_special_tokens=True).input_ids,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def known_lengths(index: RecordIndex, measure: Measure) -> np.ndarray | None:
    """Lengths that were counted before, int32 [records], memory-mapped; None if they were not."""
    path = lengths_path(index, measure)
    return np.load(path, mmap_mode="r") if path.exists() else None


def count_lengths(index: RecordIndex, measure: Measure, jobs: int = 1) -> np.ndarray:
    """Counts the tokens of every record, in several processes, unless that was done before."""
    known = known_lengths(index, measure)
    if known is not None:
        return known
    chunks = [range(i, min(i + _CHUNK, len(index))) for i in range(0, len(index), _CHUNK)]
    parts = tqdm(_count(index, measure, chunks, jobs), "tokens", len(chunks), delay=2)
    lengths = np.concatenate([np.asarray(part, np.int32) for part in parts])
    path = lengths_path(index, measure)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with unfinished.open("wb") as handle:
        np.save(handle, lengths)
    unfinished.replace(path)
    logger.info("%s: tokens counted in %s", index.source, path)
    return lengths


def lengths_path(index: RecordIndex, measure: Measure) -> Path:
    """Where the lengths belong: beside the index, by what they depend on."""
    return index.path.with_name(f"{index.path.stem}.lengths-{measure.key}.npy")


def _count(
    index: RecordIndex, measure: Measure, chunks: Iterable[range], jobs: int
) -> Iterator[list[int]]:
    _start(index, measure)
    if jobs <= 1:
        yield from map(_count_stretch, chunks)
        return
    # Forked, so that the tokenizer is not sent along with every stretch.
    with multiprocessing.get_context("fork").Pool(jobs, _start, (index, measure)) as pool:
        yield from pool.imap(_count_stretch, chunks)


_counted: tuple[RecordIndex, Measure]


def _start(index: RecordIndex, measure: Measure) -> None:
    global _counted
    _counted = index, measure


def _count_stretch(numbers: range) -> list[int]:
    index, measure = _counted
    return [measure(index[number]) for number in numbers]

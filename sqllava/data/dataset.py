"""Index + images -> samples: one record as the model takes it, and what happens to a bad one.

Third step of the data's path, run in the workers; `sampler.py` says which sample is next,
`collate.py` makes batches.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from sqllava.conversation import Template
from sqllava.data.images import load_image, resolve_image
from sqllava.data.index import RecordIndex
from sqllava.data.lengths import Measure, known_lengths
from sqllava.data.records import RecordError, check_record, describe, image_names
from sqllava.encoding import IGNORE_INDEX, encode_record, image_token_id

BadSamples = Literal["fail", "skip", "replace"]

# English text with a vocabulary of 32,000: about four characters a token.
_CHARACTERS_PER_TOKEN = 4
# How many records to try in place of a bad one before the data as a whole counts as bad.
_REPLACEMENT_TRIES = 100


class SampleKey(NamedTuple):
    """A sample's address: with the seed, it decides every random draw."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses


@dataclass
class Sample:
    """One record as the model takes it.

    Attributes:
        input_ids: LongTensor [S].
        labels: LongTensor [S]; -100 where nothing is learnt.
        pixel_values: FloatTensor [n, 3, H, W], or None without an image.
        index: the number of the record that was asked for.
        dropped_turns: turns left out, or cut, to fit the maximum length.
        skipped: why the record could not be used, if it could not.
        images: the names of the images in pixel_values.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None
    index: int
    dropped_turns: int = 0
    skipped: str | None = None
    images: tuple[str, ...] = ()


class InstructionDataset(Dataset[Sample]):
    """Samples by key, the same in every process: nothing is drawn but from the key's generator.

    Args:
        index: the records.
        image_folder: where their images are; may be None if no record has one.
        tokenizer: with an `<image>` token.
        prepare_image: an RGB image -> FloatTensor [3, H, W]; picklable if workers are spawned.
        template: a conversation template, or its name.
        image_tokens: placeholders per image.
        max_length: tokens that a sample may have; None for no limit.
        sq_r: the share of later questions that the model learns to ask.
        seed: of the self-questioning draw.
        bad_samples: what to do with a record that cannot be used. "fail" raises; "skip" gives a
            sample of one ignored token, so that batches keep their shape on every rank; "replace"
            gives the next usable record, one with an image for one with an image if possible.
            Skipped and replaced samples say why in `skipped`.
        jpeg_draft: pixels a side below which JPEG files are not decoded; None decodes them whole,
            as published.
    """

    def __init__(
        self,
        index: RecordIndex,
        image_folder: Path | str | None,
        tokenizer: PreTrainedTokenizerBase,
        prepare_image: Callable[[Image.Image], torch.Tensor],
        template: Template | str,
        image_tokens: int,
        max_length: int | None,
        sq_r: float = 0.0,
        seed: int = 0,
        bad_samples: BadSamples = "fail",
        jpeg_draft: int | None = None,
    ) -> None:
        if bad_samples not in get_args(BadSamples):
            choices = get_args(BadSamples)
            raise ValueError(f"bad_samples must be one of {choices}, found {bad_samples!r}")
        self.index = index
        self.image_folder = image_folder
        self.tokenizer = tokenizer
        self.prepare_image = prepare_image
        self.template = template
        self.image_tokens = image_tokens
        self.max_length = max_length
        self.sq_r = sq_r
        self.seed = seed
        self.bad_samples = bad_samples
        self.jpeg_draft = jpeg_draft
        # The images read last: records about one image come one after another where rows share it.
        self._last: tuple[tuple[str, ...], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """The sample of that key; a plain number means epoch 0.

        Raises:
            RecordError: the record cannot be used and the policy is "fail", or the policy is
                "replace" and none of the records after it can be used either.
        """
        key = key if isinstance(key, SampleKey) else SampleKey(0, key)
        try:
            return self._load(key)
        except RecordError as error:
            if self.bad_samples == "fail":
                raise
            reason = str(error)
        return self._blank(key, reason) if self.bad_samples == "skip" else self._other(key, reason)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record, int32 [records]: true ones where they have been counted (see
        `lengths.py`), else estimated, good enough to group by.

        The estimate is a rule of thumb: a token for four characters, and the images' placeholders.
        """
        measure = Measure(self.tokenizer, self.template, self.image_tokens)
        lengths = known_lengths(self.index, measure)
        if lengths is None:
            text = self.index.characters // _CHARACTERS_PER_TOKEN
            lengths = text.astype(np.int64) + self.index.images.astype(np.int64) * self.image_tokens
        return np.minimum(lengths, self.max_length or np.iinfo(np.int32).max).astype(np.int32)

    @property
    def image_keys(self) -> np.ndarray:
        """Which records are about the same images, int64 [records]; 0 without an image."""
        return self.index.image_keys

    @property
    def image_counts(self) -> np.ndarray:
        """Images of each record, int16 [records]."""
        return self.index.images

    @property
    def has_image(self) -> np.ndarray:
        """Which records have an image, bool [records]."""
        return self.index.images > 0

    def _load(self, key: SampleKey) -> Sample:
        record = self.index[key.index]
        check_record(record, self.index.source, key.index)
        try:
            encoded = encode_record(
                record,
                self.template,
                self.tokenizer,
                self.sq_r,
                random.Random(f"{self.seed}-{key.epoch}-{key.index}"),
                self.image_tokens,
                self.max_length,
            )
            # Turns dropped for their length take their images along.
            placeholders = encoded.input_ids.count(image_token_id(self.tokenizer))
            names = tuple(image_names(record)[: placeholders // self.image_tokens])
            pixel_values = self._images(names) if names else None
        except ValueError as error:
            reason = describe(record, self.index.source, key.index, error)
            raise RecordError(reason) from error
        return Sample(
            torch.tensor(encoded.input_ids),
            torch.tensor(encoded.labels),
            pixel_values,
            key.index,
            encoded.dropped_turns,
            images=names,
        )

    def _images(self, names: tuple[str, ...]) -> torch.Tensor:
        if self._last is not None and self._last[0] == names:
            return self._last[1]
        if self.image_folder is None:
            raise ValueError(f"needs image {names[0]!r}, but no image folder is given")
        paths = [resolve_image(self.image_folder, name) for name in names]
        images = [load_image(path, draft=self.jpeg_draft) for path in paths]
        pixel_values = torch.stack([self.prepare_image(image) for image in images])
        self._last = names, pixel_values
        return pixel_values

    def _blank(self, key: SampleKey, reason: str) -> Sample:
        token = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        ignored = torch.tensor([IGNORE_INDEX])
        return Sample(torch.tensor([token]), ignored, None, key.index, skipped=reason)

    def _other(self, key: SampleKey, reason: str) -> Sample:
        count = min(_REPLACEMENT_TRIES, len(self) - 1)
        others = [(key.index + step) % len(self) for step in range(1, count + 1)]
        images = self.index.images
        # The same modality first; the sort is stable, so the nearest first within each.
        others.sort(key=lambda other: bool(images[other]) != bool(images[key.index]))
        for other in others:
            try:
                sample = self._load(SampleKey(key.epoch, other))
            except RecordError:
                continue
            reason = f"{reason}; replaced by record {other}"
            return replace(sample, index=key.index, skipped=reason)
        raise RecordError(f"{reason}; none of the {count} records after it can replace it")

"""Samples -> a batch: padded on the right, images in one row, and what the log wants to know.

Last step of the data's path before the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from sqllava.data.dataset import Sample
from sqllava.encoding import IGNORE_INDEX


@dataclass
class Collator:
    """Makes a batch of samples.

    Attributes:
        pad_token_id: fills up `input_ids`. It may be a token that texts hold too, so nothing is
            ever told by it.
        pad_to_multiple_of: rounds the batch's length up.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Makes a batch.

        Returns:
            input_ids, labels, attention_mask: LongTensor [B, S].
            pixel_values: FloatTensor [images of all samples, 3, H, W]; absent without any.
            sample_stats: plain numbers for the log, to be taken out before the model.
        """
        lengths = torch.tensor([len(sample.input_ids) for sample in samples])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": _pad([sample.input_ids for sample in samples], width, self.pad_token_id),
            "labels": _pad([sample.labels for sample in samples], width, IGNORE_INDEX),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }
        images = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        if images:
            batch["pixel_values"] = torch.cat(images)
        tokens = int(lengths.sum())
        stats = {
            "tokens": tokens,
            "computed": batch["input_ids"].numel(),
            "padding": batch["input_ids"].numel() - tokens,
            "pairs": int((lengths * (lengths + 1) // 2).sum()),
            "supervised": int((batch["labels"] != IGNORE_INDEX).sum()),
            "images": sum(map(len, images)),
            "images_of_records": sum(map(len, images)),
            "dropped_turns": sum(sample.dropped_turns for sample in samples),
            "skipped": [(sample.index, sample.skipped) for sample in samples if sample.skipped],
            "indices": [sample.index for sample in samples],
        }
        return {**batch, "sample_stats": stats}


def _pad(rows: list[torch.Tensor], width: int, value: int) -> torch.Tensor:
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=value)

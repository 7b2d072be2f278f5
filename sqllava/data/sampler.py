"""The order of samples: global batches of one modality and of like lengths, from seed and epoch.

Stands beside the dataset on the data's path: it sees the index's columns, never a record.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from sqllava.data.dataset import SampleKey

# Records are sorted by length within stretches of this many global batches: enough for batches of
# like lengths, few enough for other company in the next epoch.
_BATCHES_SORTED_TOGETHER = 50


class GroupedSampler(Sampler[SampleKey]):
    """One global order of all records for each epoch, every record exactly once.

    Each `global_batch_size` consecutive keys are one optimiser step, and each `batch_size` of them
    one micro-batch, longest first, to be dealt out to the ranks in turn. Which records make up a
    step depends on neither the number of ranks nor the micro-batch. The order is a function of
    seed and epoch alone, so a run may resume at any batch.

    Args:
        lengths: tokens of each record, int [records].
        has_image: bool [records]; None if unknown.
        batch_size: records of one micro-batch, on one device.
        global_batch_size: records of one optimiser step, a multiple of `batch_size`.
        seed: of the order.
        group_by_length: makes global batches of records of like lengths.
        group_by_modality: makes global batches all of records with an image, or all without; one
            of the leftovers may be mixed. Has no effect on data of one modality.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        has_image: np.ndarray | None,
        batch_size: int,
        global_batch_size: int,
        seed: int = 0,
        group_by_length: bool = True,
        group_by_modality: bool = True,
    ) -> None:
        if batch_size < 1 or global_batch_size < 1 or global_batch_size % batch_size:
            raise ValueError(
                f"the global batch ({global_batch_size}) must be a multiple of the micro-batch "
                f"({batch_size})"
            )
        if has_image is None:
            has_image = np.zeros(len(lengths), dtype=bool)
        if not len(lengths) or len(has_image) != len(lengths):
            raise ValueError(f"found {len(lengths)} lengths for {len(has_image)} records")
        self.lengths, self.has_image = lengths, has_image
        self.global_batch_size = global_batch_size
        self.seed, self.epoch = seed, 0
        self.group_by_length, self.group_by_modality = group_by_length, group_by_modality

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        return (SampleKey(epoch, int(index)) for index in self._order(epoch))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        size = self.global_batch_size
        batches: list[np.ndarray] = []
        leftovers: list[np.ndarray] = []
        for group in self._groups():
            shuffled = rng.permutation(group)
            # Taken before sorting, or they would always be the shortest records.
            kept = len(shuffled) // size * size
            batches += list(self._sorted_in_stretches(shuffled[:kept]).reshape(-1, size))
            leftovers.append(self._longest_first(shuffled[kept:]))
        # The smaller leftover goes first: then one batch at most is mixed.
        rest = np.concatenate(sorted(leftovers, key=len))
        if len(rest) >= size:
            batches.append(rest[:size])
            rest = rest[size:]
        shuffled_batches = [batches[i] for i in rng.permutation(len(batches))]
        # An incomplete batch stands last: elsewhere it would shift the steps after it.
        return np.concatenate([*self._costliest_first(shuffled_batches), rest])

    def _groups(self) -> list[np.ndarray]:
        everyone = np.arange(len(self))
        if not self.group_by_modality or self.has_image.all() or not self.has_image.any():
            return [everyone]
        return [everyone[self.has_image], everyone[~self.has_image]]

    def _sorted_in_stretches(self, indices: np.ndarray) -> np.ndarray:
        size = self.global_batch_size
        # Few data: at least four stretches, or every epoch would make the same batches.
        stretch = size * min(max(len(indices) // size // 4, 1), _BATCHES_SORTED_TOGETHER)
        starts = range(0, len(indices), stretch)
        parts = [self._longest_first(indices[start : start + stretch]) for start in starts]
        return np.concatenate(parts) if parts else indices

    def _longest_first(self, indices: np.ndarray) -> np.ndarray:
        if not self.group_by_length:
            return indices
        return indices[np.argsort(-self.lengths[indices].astype(np.int64), kind="stable")]

    def _costliest_first(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """Brings the batch with the longest record with an image to the front.

        Memory that does not suffice shows in the first step, not hours later; and every part that
        trains gets a gradient in the first step, the tower included.
        """

        def cost(number: int) -> tuple[bool, int]:
            batch = batches[number]
            return bool(self.has_image[batch].any()), int(self.lengths[batch].max())

        first = max(range(len(batches)), key=cost, default=0)
        return batches[first : first + 1] + batches[:first] + batches[first + 1 :]

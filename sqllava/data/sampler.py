"""The order of samples, from seed and epoch: global batches of one modality and of like lengths, or
global batches that hold the records about an image together.

Stands beside the dataset on the data's path: it sees the index's columns, never a record.
"""

import heapq
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from sqllava.data.dataset import SampleKey

# Records are sorted by length within stretches of this many global batches: enough for batches of
# like lengths, few enough for other company in the next epoch.
_BATCHES_SORTED_TOGETHER = 50
# A step takes at most this many records about one image: enough to read most images once (LLaVA's
# 665K have three records a COCO image), few enough for a step to hold many images.
RECORDS_OF_AN_IMAGE = 6


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


def image_steps(
    image_keys: np.ndarray, global_batch_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """One epoch's optimiser steps: every record once, those about one image in one step.

    A step takes at most RECORDS_OF_AN_IMAGE of one image, further ones go to other steps; only
    where an image has more than all steps may take so, each takes its share. A step is filled to
    the last place, so records of an image may also be parted at its end. All else is random.

    Args:
        image_keys: the same for records about the same images, 0 for a record that shares nothing;
            int64 [records].
        global_batch_size: records of a step; what is left makes a smaller one, the last.

    Returns:
        Record numbers, one array a step.
    """
    count = len(image_keys)
    sizes = np.full(-(-count // global_batch_size), global_batch_size)
    sizes[-1] -= sizes.sum() - count
    order = rng.permutation(count)
    _, family, members = np.unique(image_keys[order], return_inverse=True, return_counts=True)
    alone = (image_keys[order] == 0) | (members[family] == 1)
    step_of = np.empty(count, dtype=np.int64)  # by place in `order`
    together = np.flatnonzero(~alone)
    together = together[np.argsort(family[together], kind="stable")]
    borders = np.flatnonzero(np.diff(family[together])) + 1
    groups = np.split(together, borders) if len(together) else []
    room = _place(groups, sizes, step_of, rng)
    step_of[alone] = np.repeat(np.arange(len(sizes)), room)
    by_step = order[np.argsort(step_of, kind="stable")]
    return np.split(by_step, np.cumsum(sizes)[:-1])


def _place(
    groups: list[np.ndarray], sizes: np.ndarray, step_of: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Gives each group's members a step in `step_of`; returns the places that are left in each."""
    room = sizes.tolist()
    whole = max(int((sizes == sizes[0]).sum()), 1)
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    # The largest first, while many steps have room for them; the others stay shuffled.
    shuffled.sort(key=lambda group: -max(len(group), RECORDS_OF_AN_IMAGE))
    draws = iter(rng.random(len(room) + sum(map(len, groups))).tolist())
    # Always the step with the most room, by lot among equals.
    heap = [(-places, next(draws), step) for step, places in enumerate(room)]
    heapq.heapify(heap)
    for group in shuffled:
        limit = max(RECORDS_OF_AN_IMAGE, -(-len(group) // whole))
        taken: list[tuple[float, float, int]] = []
        while len(group):
            if not heap or not room[heap[0][2]]:  # no further step has room for this image
                heap = [(-room[step], draw, step) for _, draw, step in heap + taken]
                heapq.heapify(heap)
                taken = []
            places, draw, step = heapq.heappop(heap)
            some = min(limit, room[step], len(group))
            step_of[group[:some]] = step
            group = group[some:]
            room[step] -= some
            taken.append((places, draw, step))
        for _, _, step in taken:
            heapq.heappush(heap, (-room[step], next(draws), step))
    return np.asarray(room)

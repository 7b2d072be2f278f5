"""Records -> rows: an optimiser step's records, dealt out to ranks and micro-batches by cost.

A micro-batch is one row of sequences without padding. Records about one image that begin alike are
branches behind one trunk, so that the image is encoded, and read by the language model, once. The
dealing knows the index's columns alone; what is truly shared is decided here, too, but later and
by token ids, when the samples are there.
"""

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler

from sqllava.data.dataset import InstructionDataset, Sample, SampleKey
from sqllava.data.sampler import image_steps
from sqllava.encoding import IGNORE_INDEX
from sqllava.model.adapters import part_of
from sqllava.model.attention import BY_PIECES, Row, seen_pairs
from sqllava.train.flags import Pack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What is known of records before they are read.

    Attributes:
        lengths: tokens of each record, int [records].
        images: images of each record, int [records].
        keys: the same for records that may share their images, int64 [records]; None to share
            nothing.
        image_tokens: placeholders of an image.
        image_cost: what an image costs in the tower, in tokens of the language model.
    """

    lengths: np.ndarray
    images: np.ndarray
    keys: np.ndarray | None
    image_tokens: int
    image_cost: float

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass
class _Unit:
    """Records that stand behind one trunk, or one record alone."""

    numbers: list[int]
    tokens: int
    cost: float


def deal(numbers: Sequence[int], sizes: Sizes, rows: int, budget: int | None) -> list[list[int]]:
    """Deals records out to rows of like cost, those about one image to one row.

    Args:
        numbers: the records of a step.
        budget: tokens at which the records of an image are parted after all; None for no limit.

    Returns:
        As many lists of record numbers as rows, the costliest first; some may be empty.
    """
    units = sorted(_units(numbers, sizes, budget), key=lambda unit: -unit.cost)
    heap: list[tuple[float, int]] = [(0.0, row) for row in range(rows)]
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for unit in units:
        cost, row = heapq.heappop(heap)
        dealt[row] += unit.numbers
        heapq.heappush(heap, (cost + unit.cost, row))
    return [dealt[row] for _, row in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]


def _units(numbers: Sequence[int], sizes: Sizes, budget: int | None) -> Iterator[_Unit]:
    open_units: dict[int, _Unit] = {}
    for number in numbers:
        images = int(sizes.images[number])
        length = max(int(sizes.lengths[number]), 1)
        key = int(sizes.keys[number]) if sizes.keys is not None else 0
        unit = open_units.get(key) if key else None
        more = max(length - images * sizes.image_tokens, 1)  # behind the trunk
        if unit is not None and (budget is None or unit.tokens + more <= budget):
            unit.numbers.append(number)
            unit.tokens += more
            unit.cost += more
            continue
        if unit is not None:
            yield unit
        unit = _Unit([number], length, length + images * sizes.image_cost)
        if key:
            open_units[key] = unit
        else:
            yield unit
    yield from open_units.values()


class RowSampler(Sampler[list[SampleKey]]):
    """The records of each micro-batch, for all ranks in turn: a batch sampler for accelerate's
    shards, which give batch i to rank i modulo their number.

    Every rank has the same number of micro-batches. Those of a step that all ranks run at once
    have like costs. The order is a function of seed and epoch alone, so a run may resume at any
    batch; which records make up a step depends on neither ranks nor accumulation.

    Args:
        sizes: of all records.
        batch_size: records that a micro-batch has on average.
        accumulation: micro-batches of a step on each rank.
        ranks: their number.
        seed: of the order.
        budget: see `deal`.
        drop_last: leaves out records that do not fill a micro-batch on every rank.
    """

    def __init__(
        self,
        sizes: Sizes,
        batch_size: int,
        accumulation: int,
        ranks: int,
        seed: int = 0,
        budget: int | None = None,
        drop_last: bool = False,
    ) -> None:
        if min(batch_size, accumulation, ranks, len(sizes)) < 1:
            raise ValueError(
                f"found {len(sizes)} records, {batch_size} in a micro-batch, {accumulation} "
                f"micro-batches in a step, {ranks} ranks: each must be at least 1"
            )
        self.sizes, self.ranks, self.seed, self.budget = sizes, ranks, seed, budget
        self.at_once = batch_size * ranks  # records of one micro-batch over all ranks
        self.global_batch_size = self.at_once * accumulation
        count = len(sizes)
        self.used = count // self.at_once * self.at_once if drop_last else count
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.used // self.at_once) * self.ranks

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.epoch
        for step in self.steps(epoch):
            rows = -(-len(step) // self.at_once) * self.ranks
            for row in deal(step.tolist(), self.sizes, rows, self.budget):
                yield [SampleKey(epoch, number) for number in row]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The records of each step, the costliest whole step first: memory that does not suffice
        shows at once, and every part that trains gets a gradient in the first step."""
        rng = np.random.default_rng([self.seed, epoch])
        keys = self.sizes.keys
        keys = np.zeros(len(self.sizes), dtype=np.int64) if keys is None else keys
        steps = image_steps(keys, self.global_batch_size, rng)
        last = len(steps[-1]) - (len(self.sizes) - self.used)
        steps[-1] = rng.permutation(steps[-1])[:last]
        whole = range(sum(len(step) == self.global_batch_size for step in steps))
        first = max(whole, key=lambda number: self._cost(steps[number]), default=0)
        steps.insert(0, steps.pop(first))
        return [step for step in steps if len(step)]

    def _cost(self, step: np.ndarray) -> tuple[bool, int]:
        lengths = self.sizes.lengths[step].astype(np.int64)
        return bool(self.sizes.images[step].any()), int(lengths.sum())


def image_cost(model: nn.Module, image_tokens: int) -> float:
    """What an image costs in the tower, in tokens of the language model, by their parameters."""
    sizes = {"vision tower": 0, "language model": 0}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part in sizes and "embed_tokens" not in name and "lm_head" not in name:
            sizes[part] += getattr(parameter, "ds_numel", parameter.numel())
    return image_tokens * sizes["vision tower"] / max(sizes["language model"], 1)


def sizes_of(dataset: InstructionDataset, pack: Pack, image_cost: float) -> Sizes:
    """The sizes of a data set's records, from its index."""
    return Sizes(
        np.asarray(dataset.lengths),
        dataset.image_counts,
        dataset.image_keys if pack == "shared" else None,
        dataset.image_tokens,
        image_cost,
    )


@dataclass
class RowCollator:
    """Makes one row of samples.

    Attributes:
        image_token_id: the id of the placeholders.
        filler_id: the one token of a row without samples.
        share: puts samples about the same images that begin alike behind one trunk.
    """

    image_token_id: int
    filler_id: int
    share: bool

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Makes a row.

        Returns:
            input_ids, labels: LongTensor [1, T].
            row: the lengths of its trunks and branches.
            pixel_values: FloatTensor [images, 3, H, W], in order of appearance; absent without any.
            sample_stats: plain numbers for the log, to be taken out before the model.
        """
        trees = [self._tree(group) for group in self._groups(samples)]
        ids = [part for tree in trees for part in tree.ids]
        labels = [part for tree in trees for part in tree.labels]
        row: Row = tuple(tuple(map(len, tree.ids)) for tree in trees)
        images = [image for tree in trees for image in tree.images if len(image)]
        if not trees:
            ids, labels = [torch.tensor([self.filler_id])], [torch.tensor([IGNORE_INDEX])]
            row = ((1,),)
        input_ids, targets = torch.cat(ids)[None], torch.cat(labels)[None]
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": targets, "row": row}
        if images:
            batch["pixel_values"] = torch.cat(images)
        pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        stats = {
            "tokens": sum(len(sample.input_ids) for sample in samples),
            "computed": input_ids.numel() if trees else 0,
            "padding": 0,
            "pairs": seen_pairs(row) if trees else 0,
            "supervised": int((targets != IGNORE_INDEX).sum()),
            "images": sum(map(len, images)),
            "images_of_records": sum(map(len, pixels)),
            "dropped_turns": sum(sample.dropped_turns for sample in samples),
            "skipped": [(sample.index, sample.skipped) for sample in samples if sample.skipped],
            "indices": [sample.index for sample in samples],
        }
        return {**batch, "sample_stats": stats}

    def _groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Samples that can stand behind one trunk, in order of their first."""
        groups: dict[Any, list[Sample]] = {}
        for number, sample in enumerate(samples):
            beginning = self._beginning(sample) if self.share else None
            key = number if beginning is None else (sample.images, beginning)
            groups.setdefault(key, []).append(sample)
        return list(groups.values())

    def _beginning(self, sample: Sample) -> tuple[int, ...] | None:
        """The ids up to the end of the first image; None if there is nothing to share."""
        if not sample.images:
            return None
        places = (sample.input_ids == self.image_token_id).nonzero().flatten()
        end = int(places[len(places) // len(sample.images) - 1]) + 1
        if (sample.labels[:end] != IGNORE_INDEX).any():
            return None  # a trunk's labels would count once for all records
        return tuple(sample.input_ids[:end].tolist())

    def _tree(self, group: list[Sample]) -> "_Tree":
        shared = self._shared(group) if len(group) > 1 else len(group[0].input_ids)
        first = group[0]
        labels = first.labels[:shared].clone()
        labels[:1] = IGNORE_INDEX  # nothing predicts a record's first token
        held = 0
        if first.images:
            at_image = first.input_ids == self.image_token_id
            held = int(at_image[:shared].sum()) * len(first.images) // int(at_image.sum())
        tree = _Tree([first.input_ids[:shared]], [labels], [_images(first)[:held]])
        if len(group) > 1:
            tree.ids += [sample.input_ids[shared:] for sample in group]
            tree.labels += [sample.labels[shared:] for sample in group]
            tree.images += [_images(sample)[held:] for sample in group]
        return tree

    def _shared(self, group: list[Sample]) -> int:
        """How many tokens all samples of a group begin with, up to the first that any learns, and
        without a part of an image."""
        first = group[0].input_ids
        shared = len(first)
        for sample in group:
            shared = min(shared, len(sample.input_ids))
            differs = (sample.input_ids[:shared] != first[:shared]).nonzero()
            learned = (sample.labels[:shared] != IGNORE_INDEX).nonzero()
            shared = min([shared, *(int(found[0]) for found in (differs, learned) if len(found))])
        places = (first == self.image_token_id).nonzero().flatten()
        of_one = len(places) // len(group[0].images)
        inside = int((places < shared).sum())
        return int(places[inside // of_one * of_one]) if inside % of_one else shared


@dataclass
class _Tree:
    """A trunk and its branches: ids [n] and labels [n] of each, images [i, 3, H, W] of each."""

    ids: list[torch.Tensor]
    labels: list[torch.Tensor]
    images: list[torch.Tensor]


def _images(sample: Sample) -> torch.Tensor:
    return torch.empty(0) if sample.pixel_values is None else sample.pixel_values


class Attentions(NamedTuple):
    """Attention implementations by their names in transformers."""

    tower: str
    language_model: str


def choose_attention(
    asked: str | None, pack: Pack, device: str, flash: bool, flex: bool
) -> Attentions:
    """Which attention runs the tower, and which the language model.

    Args:
        asked: --attn_implementation; None takes the best that is there.
        device: "cuda" or "cpu".
        flash: whether FlashAttention 2 can be used, with the run's dtype.
        flex: whether torch has FlexAttention.

    Raises:
        ValueError: what was asked for cannot run such rows; the message says what can.
    """
    tower = "flash_attention_2" if flash else "sdpa"
    if pack == "off":
        return Attentions(asked or tower, asked or tower)
    if asked is None and device != "cpu":
        asked = "flash_attention_2" if flash and pack == "rows" else "flex_attention" * flex
    if not asked or asked == "sdpa":
        return Attentions(asked or tower, BY_PIECES)
    if asked == "flex_attention":
        if device == "cpu" or not flex:
            where = "on a CPU, where it has no gradients" if flex else "with this torch"
            raise ValueError(
                f"--attn_implementation flex_attention cannot train {where}: use sdpa, or leave "
                "the flag out"
            )
        return Attentions(tower, "flex_attention")
    if asked == "flash_attention_2" and pack == "shared":
        raise ValueError(
            "--attn_implementation flash_attention_2 cannot run rows that share images: use "
            "flex_attention or sdpa, or --pack rows"
        )
    if asked in ("flash_attention_2", "eager"):
        return Attentions(asked, asked)
    raise ValueError(
        f"--attn_implementation {asked} cannot run rows: use sdpa, flex_attention, "
        "flash_attention_2 (with --pack rows) or eager, or --pack off"
    )

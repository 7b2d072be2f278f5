"""Beginnings of prompts that the language model has read, as keys and values to go on from.

Stands between a prompt and the model in `writer.py`: what a prompt shares with what was read before
is stacked into the batch's cache, and only the rest is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

# How many tokens a batch grows by, at least, before it is copied into more memory; a long one grows
# by a share, so that a token costs as much however many are written.
ROOM = 64
SHARE = 1 / 8


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, read.

    Attributes:
        ids: its tokens, image placeholders among them.
        states: keys and values, layer by layer: 2 * layers tensors [heads, len(ids), width].
    """

    ids: list[int]
    states: list[torch.Tensor]

    def cut(self, length: int) -> "Prefix":
        """Its first `length` tokens; none of them is copied."""
        if length == len(self.ids):
            return self
        return Prefix(self.ids[:length], [state[:, :length] for state in self.states if length])


UNREAD = Prefix([], [])


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens several prompts have in common at their beginning."""
    first, *others = prompts
    length = min(map(len, prompts))
    for other in others:
        length = next((i for i in range(length) if first[i] != other[i]), length)
    return length


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, S] padded on the left, and a mask [B, S] that is 1 at what is no padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) >= width - lengths.unsqueeze(1)
    return ids.view(len(rows), width), mask.long()


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room to grow: the stock one copies all it holds at every token.

    Args:
        keys, values: [B, heads, S + room, width], written up to S; None for an empty layer.
        length: S.
    """

    def __init__(
        self,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        length: int = 0,
    ) -> None:
        super().__init__()
        self.length = length
        if keys is not None and values is not None:
            self._hold(keys, values)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds what [B, heads, new, width] holds; returns all there is."""
        if not self.is_initialized:
            self._hold(key_states[:, :, :0], value_states[:, :, :0])
        assert self.keys is not None and self.values is not None
        start, end = self.length, self.length + key_states.shape[2]
        more = end - self.keys.shape[2]
        if more > 0:
            # What more than doubles a layer is a beginning that is read; a text is written on it
            # when the memory that reading takes is free again.
            more += 0 if key_states.shape[2] > start else max(ROOM, int(end * SHARE))
            self.keys, self.values = (
                F.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values)
            )
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens; their number is given as a negative one."""
        self.length -= abs(tokens_to_remove)


def stack(prefixes: Sequence[Prefix]) -> Cache:
    """One cache for a batch, its rows padded on the left with zeros, as `pad_left` pads the ids."""
    model = next((prefix.states for prefix in prefixes if prefix.states), None)
    if model is None:
        return Cache(layer_class_to_replicate=RoomyLayer)
    width = max(len(prefix.ids) for prefix in prefixes)
    batch = []
    for number, like in enumerate(model):
        heads, _, size = like.shape
        states = like.new_empty(len(prefixes), heads, width + ROOM, size)
        for row, prefix in zip(states, prefixes, strict=True):
            padding = width - len(prefix.ids)
            row[:, :padding] = 0
            if prefix.states:
                row[:, padding:width] = prefix.states[number]
        batch.append(states)
    pairs = zip(batch[::2], batch[1::2], strict=True)
    return Cache(layers=[RoomyLayer(keys, values, width) for keys, values in pairs])


def unstack(cache: Cache, row: int, columns: torch.Tensor, ids: list[int]) -> Prefix:
    """What a row of a batch's cache holds.

    Args:
        columns: the numbers of the row's own columns, as many as `ids`.
    """
    layers: list[Any] = cache.layers
    states = [state for layer in layers for state in (layer.keys, layer.values)]
    return Prefix(ids, [state[row][:, columns] for state in states])


@dataclass(frozen=True)
class Trunks:
    """Beginnings of prompts in one cache, to go on from as often as is needed.

    Attributes:
        ids: the tokens of each, G lists.
        mask: [G, S], 1 at the columns that hold them, in order; 0 at padding.
        cache: their keys and values, made of `RoomyLayer`; it may have grown since.
    """

    ids: list[list[int]]
    mask: torch.Tensor
    cache: Cache

    @classmethod
    def of(cls, prefixes: Sequence[Prefix], device: torch.device) -> "Trunks":
        """What has been read already, as one batch."""
        ids = [prefix.ids for prefix in prefixes]
        return cls(ids, pad_left(ids, 0)[1].to(device), stack(prefixes))

    def prefix(self, row: int) -> Prefix:
        """One of them by itself, copied."""
        return unstack(self.cache, row, self.mask[row].nonzero().flatten(), self.ids[row])

    def rows(self, numbers: Sequence[int]) -> "Trunks":
        """Some of them in some order, each as often as it is named; copied."""
        width = self.mask.shape[1]
        index = torch.tensor(numbers, device=self.mask.device)
        held: list[Any] = self.cache.layers if width else []
        layers: Any = [
            RoomyLayer(
                layer.keys.index_select(0, index), layer.values.index_select(0, index), width
            )
            for layer in held
        ]
        cache = Cache(layers=layers) if layers else stack([])
        return Trunks([self.ids[number] for number in numbers], self.mask[index], cache)

    def rewound(self) -> "Trunks":
        """The same, in the same memory, without what the cache has grown by."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.length = self.mask.shape[1]
        return self

    def tokens(self, pad: int) -> torch.Tensor:
        """Their ids in their columns, [G, S]."""
        flat = [token for ids in self.ids for token in ids]
        tokens = torch.full_like(self.mask, pad)
        tokens[self.mask.bool()] = torch.tensor(flat, dtype=tokens.dtype, device=tokens.device)
        return tokens

"""Beginnings of prompts that the language model has read, as keys and values to go on from.

Stands between a prompt and the model in `writer.py`: what a prompt shares with what was read before
is stacked into the batch's cache, and only the rest is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# How many tokens a batch grows by before it is copied into more memory.
ROOM = 64


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
        keys, values: [B, heads, S + room, width], written up to S.
        length: S.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.length = keys, values, length

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds what [B, heads, new, width] holds; returns all there is."""
        assert self.keys is not None and self.values is not None
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            more = (0, 0, 0, end - start + ROOM)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
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
        return DynamicCache()
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

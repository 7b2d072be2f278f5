"""Several texts in one row: a trunk that stands there once, and branches that see it and their own.

What `writer.py` decodes with: the samples of an image, or its questions, share the keys and values
of what they begin with, in memory as well as in time (tree attention).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch

from sqllava.generation.prefix import Trunks, pad_left
from sqllava.model.model import SQLlavaModel

_TRUNK, _PADDING = -1, -2


class Tree:
    """A batch of trunks with their branches, in one cache.

    Args:
        model: takes an attention mask of ours, that is, attends with "sdpa" or "eager" and has no
            sliding windows.
        trunks: read already, G of them; their cache grows.
    """

    def __init__(self, model: SQLlavaModel, trunks: Trunks) -> None:
        self._model = model
        self.cache = trunks.cache
        # Which branch each column belongs to: [G, S], as long as the cache.
        self._branches = torch.where(trunks.mask.bool(), _TRUNK, _PADDING)
        self._lengths = list(map(len, trunks.ids))
        self._next = torch.zeros(0)  # positions of the branches' next tokens, [G, N]

    def start(self, branches: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Reads the beginnings of the branches.

        Args:
            branches: of each trunk its branches, each with at least one id. Trunks with fewer than
                others get empty ones, whose states mean nothing.

        Returns:
            The states at the ends of the branches, [G, N, d].
        """
        ids, mask = pad_left([[i for ids in row for i in ids] for row in branches], 0)
        owners, _ = pad_left([[n for n, b in enumerate(row) for _ in b] for row in branches], 0)
        positions, _ = pad_left(
            [
                [length + i for ids in row for i in range(len(ids))]
                for length, row in zip(self._lengths, branches, strict=True)
            ],
            0,
        )
        device = self._branches.device
        owners = torch.where(mask.bool(), owners, _PADDING)
        states = self._read(*(tensor.to(device) for tensor in (ids, owners, positions)))
        ends = torch.zeros(len(branches), max(map(len, branches)), dtype=torch.long)
        for row, lengths in enumerate([list(map(len, several)) for several in branches]):
            padding = ids.shape[1] - sum(lengths)
            ends[row, : len(lengths)] = torch.tensor(list(accumulate(lengths))) + padding - 1
        self._next = positions.gather(1, ends).to(device) + 1
        return states[torch.arange(len(branches)).unsqueeze(1), ends]

    def grow(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads one more token of each branch, ids [G, N]; returns the states there, [G, N, d]."""
        owners = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        states = self._read(ids, owners, self._next)
        self._next = self._next + 1
        return states

    def columns(self, row: int, branch: int) -> torch.Tensor:
        """A mask [S] of what a branch sees: its trunk and itself."""
        return (self._branches[row] == _TRUNK) | (self._branches[row] == branch)

    def _read(
        self, ids: torch.Tensor, owners: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        held, new = self._branches.shape[1], ids.shape[1]
        self._branches = torch.cat([self._branches, owners], 1)
        keys, queries = self._branches.unsqueeze(1), owners.unsqueeze(2)
        seen = (keys == _TRUNK) | (keys == queries)  # [G, new, S]
        seen[:, :, held:] &= torch.ones(new, new, dtype=torch.bool, device=ids.device).tril()
        mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=ids.device)
        mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return self._model(
            input_ids=cast(Any, ids),
            attention_mask=mask.unsqueeze(1),
            position_ids=cast(Any, positions),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

"""Attention in a row: several sequences one after another, some of them branches behind one trunk.

A row is told by its lengths alone. `train/rows.py` makes rows, `model.py` runs them, and here is
who sees whom in them: a token sees what stands before it in its own trunk and its own branch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

# The lengths of a row's pieces, for each trunk its own and those of the branches behind it:
# ((600, 20, 31), (87,)) is a trunk with two branches, then a sequence of its own.
Row = tuple[tuple[int, ...], ...]

# Our own attention by its name in transformers: torch's SDPA, once for each piece of the row. No
# mask of the whole row is ever made, and nothing is computed that a mask would throw away.
BY_PIECES = "sqllava_pieces"


def pieces(row: Row) -> Iterator[tuple[range, range]]:
    """Each trunk and branch of a row: its places, and those of its trunk."""
    start = 0
    for lengths in row:
        trunk = range(start, start + lengths[0])
        for length in lengths:
            yield range(start, start + length), trunk
            start += length


def positions(row: Row) -> torch.Tensor:
    """The position of each token in its own record, LongTensor [T]: a branch goes on from its
    trunk's end."""
    parts = [
        torch.arange(len(piece)) + (0 if piece == trunk else len(trunk))
        for piece, trunk in pieces(row)
    ]
    return torch.cat(parts)


def seen_pairs(row: Row) -> int:
    """How many pairs of tokens there are of which one sees the other."""
    return sum(
        len(piece) * (len(piece) + 1) // 2 + (len(piece) * len(trunk) if piece != trunk else 0)
        for piece, trunk in pieces(row)
    )


def predictors(row: Row) -> torch.Tensor:
    """The place whose state predicts each token, LongTensor [T]; -1 where a record begins."""
    places = torch.arange(-1, sum(map(sum, row)) - 1)
    for piece, trunk in pieces(row):
        if piece:
            places[piece.start] = -1 if piece == trunk else trunk.stop - 1
    return places


def sees(row: Row, device: torch.device | str = "cpu") -> Callable[..., torch.Tensor]:
    """Whether the token at place q sees that at place k, as FlexAttention's mask function."""
    owner = torch.zeros(sum(map(sum, row)), dtype=torch.long)
    root = torch.zeros_like(owner)
    for number, (piece, trunk) in enumerate(pieces(row)):
        owner[piece.start : piece.stop] = number
        root[piece.start : piece.stop] = owner[trunk.start]
    owner, root = owner.to(device), root.to(device)

    def mask(
        batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        return (k <= q) & ((owner[k] == owner[q]) | (owner[k] == root[q]))

    return mask


def dense_mask(row: Row, like: torch.Tensor) -> torch.Tensor:
    """The whole row's mask, [1, 1, T, T]: 0 where a token is seen, else the least number.

    It grows with the square of the row: for eager attention, and to hold the others against.
    """
    places = torch.arange(sum(map(sum, row)), device=like.device)
    seen = sees(row, like.device)(places, places, places[:, None], places[None, :])
    return _additive(seen, like)[None, None]


def row_arguments(row: Row, attention: str, embeds: torch.Tensor) -> dict[str, Any]:
    """What a language model must be given to attend within a row.

    Args:
        attention: the name of its attention in transformers.
        embeds: [1, T, d].

    Raises:
        ValueError: the row is not as long as the embeddings, or this attention cannot hold its
            branches apart.
    """
    if embeds.shape[:2] != (1, sum(map(sum, row))):
        raise ValueError(f"the row has {sum(map(sum, row))} tokens, found {list(embeds.shape)}")
    where = positions(row)[None].to(embeds.device)  # [1, T]
    if attention == BY_PIECES:
        # Not None, of which transformers would make a mask of the whole row.
        unused = torch.zeros(1, 1, 1, 1, device=embeds.device)
        return {"position_ids": where, "attention_mask": unused, "row": _with_masks(row, embeds)}
    if attention == "flex_attention":
        block_mask = ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"](
            batch_size=1,
            q_length=embeds.shape[1],
            kv_length=embeds.shape[1],
            mask_function=sees(row, embeds.device),
            device=embeds.device,
        )
        return {"position_ids": where, "attention_mask": block_mask}
    if attention.startswith("flash"):
        if any(len(lengths) > 1 for lengths in row):
            raise ValueError(
                f"{attention} cannot hold the branches of a row apart: use flex_attention or sdpa, "
                "or rows that share nothing"
            )
        # Restarted positions are the borders of its variable-length kernel.
        return {"position_ids": where, "attention_mask": None}
    return {"position_ids": where, "attention_mask": dense_mask(row, embeds)}


# The pieces of a trunk, and for each branch its mask: made once, not in every layer.
_Masks = list[tuple[tuple[int, ...], list[torch.Tensor]]]


def _with_masks(row: Row, embeds: torch.Tensor) -> _Masks:
    return [
        (lengths, [_branch_mask(lengths[0], branch, embeds) for branch in lengths[1:]])
        for lengths in row
    ]


def _branch_mask(trunk: int, branch: int, like: torch.Tensor) -> torch.Tensor:
    seen = torch.ones(branch, trunk + branch, dtype=torch.bool, device=like.device).tril(trunk)
    return _additive(seen, like)[None, None]  # [1, 1, branch, trunk + branch]


def _additive(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    device = like.device.type
    # What queries will be in: a mask of another dtype would be converted again in every layer.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def attend_by_pieces(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row: _Masks | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, piece by piece where there is a row; transformers' own where there is none.

    Args:
        query: [1, heads, T, head]; key and value may have fewer heads.

    Returns:
        [1, T, heads, head], and no weights.
    """
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    wholes = [sum(lengths) for lengths, _ in row]
    # Split, not sliced: the gradient of a slice is as long as the row.
    parts = (tensor.split(wholes, dim=2) for tensor in (query, key, value))
    for (lengths, masks), *whole in zip(row, *parts, strict=True):
        q, k, v = (tensor.split(lengths, dim=2) for tensor in whole)
        outputs.append(sdpa_attention_forward(module, q[0], k[0], v[0], None, **kwargs)[0])
        for branch, mask in enumerate(masks, start=1):
            keys, values = (torch.cat([x[0], x[branch]], dim=2) for x in (k, v))
            outputs.append(
                sdpa_attention_forward(module, q[branch], keys, values, mask, **kwargs)[0]
            )
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(BY_PIECES, attend_by_pieces)
AttentionMaskInterface.register(BY_PIECES, sdpa_mask)

"""Projectors: image features of the vision tower -> embeddings of the language model.

The room that SQ-LLaVA changes in a Llava model: [B, L, vision_dim] -> [B, L, text_dim].
"""

import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), written so that backward keeps one tensor instead of two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the function to each element; any shape."""
        return F.silu(1.702 * x) / 1.702


class _ClusterProjector(nn.Module):
    """x -> MLP(x + prototypes(x)); its children say what the prototypes are."""

    def __init__(
        self, vision_dim: int, text_dim: int, centres: int = 256, iterations: int = 2
    ) -> None:
        super().__init__()
        if centres < 1 or iterations < 1:
            raise ValueError(
                "a cluster projector needs at least one centre and one iteration, "
                f"found centres={centres}, iterations={iterations}"
            )
        self.centres = centres
        self.iterations = iterations
        self.mlp = nn.Sequential(
            nn.Linear(vision_dim, text_dim), QuickGELU(), nn.Linear(text_dim, text_dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Projects image features x [B, L, vision_dim] to [B, L, text_dim]."""
        return self.mlp(x + self.prototypes(x).to(x.dtype))  # [B, L, text_dim]

    def prototypes(self, x: torch.Tensor) -> torch.Tensor:
        """What each token of x [B, L, D] gets from the prototypes: [B, L, D].

        Between the linear layers all is float32: centres lie close together, and rounded to
        bfloat16 they tie, so that every token would go to the first of them.
        """
        raise NotImplementedError


class PrototypeExtractor(_ClusterProjector):
    """The published `cluster` projector: tokens share what their cluster has in common.

    Centres start as the average pool of the tokens, move by soft assignment, and each token then
    takes from the one centre that suits it best. State-dict names are the published ones.

    Args:
        vision_dim: D, the tower's width.
        text_dim: the language model's width.
        centres: N, how many prototypes an image has.
        iterations: how often the centres move.

    Raises:
        ValueError: fewer than one centre or iteration.
    """

    def __init__(
        self, vision_dim: int, text_dim: int, centres: int = 256, iterations: int = 2
    ) -> None:
        super().__init__(vision_dim, text_dim, centres, iterations)
        self.sim_alpha = nn.Parameter(torch.ones(1, 1, 1))
        self.sim_beta = nn.Parameter(torch.zeros(1, 1, 1))
        self.c = nn.Linear(vision_dim, vision_dim)
        self.v = nn.Linear(vision_dim, vision_dim)
        self.f = nn.Linear(vision_dim, vision_dim)
        # Every published checkpoint holds this norm, but no forward has ever used it: it is kept
        # for their sake, and frozen because it can get no gradient.
        self.ln_1 = nn.LayerNorm(vision_dim).requires_grad_(False)

    def prototypes(self, x: torch.Tensor) -> torch.Tensor:
        """What each token of x [B, L, D] gets from its cluster: [B, L, D].

        The published code forms [B, N, L, D] tensors; these are the same sums as matrix products.
        """
        value, feature = _wide(self.v(x)), _wide(self.f(x))  # [B, L, D]
        with _no_autocast(x):
            x = _wide(x)
            centres = self._moved(_pool(x, self.centres), value, feature)  # [B, N, D]
            share = torch.sigmoid(self.sim_beta + self.sim_alpha * _cosine(centres, x))  # [B, N, L]
            numbers = torch.arange(self.centres, device=x.device).view(-1, 1)  # [N, 1]
            best = numbers == share.argmax(dim=1, keepdim=True)  # [B, N, L], once true a column
            share = share * best
            pooled = _pool(feature, self.centres)  # [B, N, D]
            members = best.sum(dim=-1, keepdim=True)  # [B, N, 1]
            prototypes = (share @ feature + pooled) / (members + 1)  # [B, N, D]
            return share.mT @ prototypes  # [B, L, D]

    def _moved(
        self, centres: torch.Tensor, value: torch.Tensor, feature: torch.Tensor
    ) -> torch.Tensor:
        # The published code takes the cosine with `value` normalised over the tokens, not over the
        # features, and the released weights grew up with that. Dividing the centres (few) by those
        # norms is the same as dividing the tokens (many).
        value_norm = _norm(value, dim=1)  # [B, 1, D]
        for _ in range(self.iterations):
            moved = _wide(self.c(centres.to(self.c.weight.dtype)))  # [B, N, D]
            similarity = (moved / _norm(moved, dim=-1) / value_norm) @ value.mT  # [B, N, L]
            # Over the centres: each token shares itself out among them.
            centres = similarity.softmax(dim=1) @ feature  # [B, N, D]
        return centres


class SoftPrototypeExtractor(_ClusterProjector):
    """The paper's form, `cluster_soft`; it was never released, and no weights exist for it.

    Centres move by attention, C <- softmax(q(C) k(Z)^T) v(Z) over the tokens; each token then adds
    z((1/N) sum_j cos(C_j, Z_i) C_j). Arguments as for `PrototypeExtractor`.
    """

    def __init__(
        self, vision_dim: int, text_dim: int, centres: int = 256, iterations: int = 2
    ) -> None:
        super().__init__(vision_dim, text_dim, centres, iterations)
        self.q = nn.Linear(vision_dim, vision_dim)
        self.k = nn.Linear(vision_dim, vision_dim)
        self.v = nn.Linear(vision_dim, vision_dim)
        self.z = nn.Linear(vision_dim, vision_dim)

    def prototypes(self, x: torch.Tensor) -> torch.Tensor:
        """What each token of x [B, L, D] gets from all prototypes: [B, L, D]."""
        key, value = _wide(self.k(x)), _wide(self.v(x))  # [B, L, D]
        with _no_autocast(x):
            x = _wide(x)
            centres = _pool(x, self.centres)  # [B, N, D]
            for _ in range(self.iterations):
                query = _wide(self.q(centres.to(self.q.weight.dtype)))  # [B, N, D]
                centres = (query @ key.mT).softmax(dim=-1) @ value  # [B, N, D]
            shared = _cosine(centres, x).mT @ centres / self.centres  # [B, L, D]
        return self.z(shared.to(self.z.weight.dtype))


def _pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Adaptive average pool of x [B, L, D] over its tokens: [B, size, D].

    As a matrix product, because torch's own has no deterministic backward on CUDA.
    """
    length = x.shape[1]
    bins = torch.arange(size, device=x.device).view(-1, 1)  # [size, 1]
    tokens = torch.arange(length, device=x.device)  # [L]
    first, end = bins * length // size, -((bins + 1) * length // -size)
    inside = (first <= tokens) & (tokens < end)  # [size, L]
    return inside.to(x.dtype) @ x / inside.sum(dim=1, keepdim=True)  # [B, size, D]


def _cosine(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Cosines of rows [B, N, D] with columns [B, L, D]: [B, N, L].

    Divides the products, not the columns: no second [B, L, D] is kept for backward.
    """
    return (rows / _norm(rows, dim=-1)) @ columns.mT / _norm(columns, dim=-1).mT


def _norm(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Length of x along dim (kept), never zero."""
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(1e-12)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or as it is where that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _no_autocast(x: torch.Tensor) -> AbstractContextManager[None]:
    return maybe_autocast(device_type=x.device.type, enabled=False)


def _identity(vision_dim: int, text_dim: int) -> nn.Module:
    if vision_dim != text_dim:
        raise ValueError(
            f"projector 'identity' needs equal widths, found {vision_dim} -> {text_dim}"
        )
    return nn.Identity()


def _linear(vision_dim: int, text_dim: int) -> nn.Module:
    return nn.Linear(vision_dim, text_dim)


def _mlp(vision_dim: int, text_dim: int, *, depth: int) -> nn.Module:
    """LLaVA-1.5's projector: linear layers with GELU between them, under its state-dict names."""
    layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
    return nn.Sequential(*layers)


PROJECTORS: dict[str, Callable[..., nn.Module]] = {
    "identity": _identity,
    "linear": _linear,
    "cluster": PrototypeExtractor,
    "cluster_soft": SoftPrototypeExtractor,
}
_MLP_NAME = re.compile(r"mlp([1-9]\d*)x_gelu")


def whole_options(name: str, given: Mapping[str, int] | None) -> dict[str, int]:
    """A projector's options with the defaults of those that are not given."""
    defaults = {"centres": 256, "iterations": 2} if name.startswith("cluster") else {}
    return defaults | dict(given or {})


def build_projector(name: str, vision_dim: int, text_dim: int, **options: int) -> nn.Module:
    """Builds a projector by its name.

    Args:
        name: a key of `PROJECTORS`, or "mlp{n}x_gelu" for an MLP of n linear layers.
        vision_dim: width of the image features.
        text_dim: width of the language model's embeddings.
        options: "cluster" and "cluster_soft" take `centres` (256) and `iterations` (2).

    Returns:
        A module that maps [B, L, vision_dim] to [B, L, text_dim].

    Raises:
        ValueError: the name or an option is unknown, or an option's value makes no sense.
    """
    mlp = _MLP_NAME.fullmatch(name)
    builder = partial(_mlp, depth=int(mlp[1])) if mlp else PROJECTORS.get(name)
    if builder is None:
        choices = [*PROJECTORS, "mlp{n}x_gelu"]
        raise ValueError(f"unknown projector {name!r}; choose from {choices}")
    known = [] if mlp else list(inspect.signature(builder).parameters)[2:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"projector {name!r} has no option {unknown}; choose from {known}")
    return builder(vision_dim, text_dim, **options)

"""Projectors: image features of the vision tower -> embeddings of the language model.

The room that SQ-LLaVA changes in a Llava model: [B, L, vision_dim] -> [B, L, text_dim].
"""

import inspect
import re
from collections.abc import Callable
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
        return self.mlp(x + self.prototypes(x))  # [B, L, text_dim]

    def prototypes(self, x: torch.Tensor) -> torch.Tensor:
        """What each token of x [B, L, D] gets from the prototypes: [B, L, D]."""
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
        feature = self.f(x)  # [B, L, D]
        centres = self._moved(_pool(x, self.centres), self.v(x).float(), feature)  # [B, N, D]

        cosine = _product(F.normalize(centres.float(), dim=-1), x) / _norm(x, dim=-1).mT  # [B, N, L]
        share = torch.sigmoid(self.sim_beta + self.sim_alpha * cosine)
        numbers = torch.arange(self.centres, device=x.device).view(-1, 1)  # [N, 1]
        best = numbers == share.argmax(dim=1, keepdim=True)  # [B, N, L], one true in each column
        share = (share * best).to(feature.dtype)

        members = best.sum(dim=-1, keepdim=True)  # [B, N, 1]
        prototypes = (share @ feature + _pool(feature, self.centres)) / (members + 1)  # [B, N, D]
        return share.mT @ prototypes  # [B, L, D]

    def _moved(
        self, centres: torch.Tensor, value: torch.Tensor, feature: torch.Tensor
    ) -> torch.Tensor:
        # The published code takes the cosine with `value` normalised over the tokens, not over the
        # features; the released weights grew up with that. Dividing the centres (few) by those
        # norms is the same as dividing the tokens (many).
        value_norm = _norm(value, dim=1)  # [B, 1, D]
        for _ in range(self.iterations):
            unit = F.normalize(self.c(centres).float(), dim=-1) / value_norm  # [B, N, D]
            assigned = _product(unit, value).softmax(dim=1)  # [B, N, L], each token sums to one
            centres = assigned.to(feature.dtype) @ feature  # [B, N, D]
        return centres


class SoftPrototypeExtractor(_ClusterProjector):
    """The paper's form, `cluster_soft`; it was never released, and no weights exist for it.

    Centres are moved by attention, C <- softmax(q(C) k(Z)^T) v(Z) over the tokens; each token then
    adds z((1/N) sum_j cos(C_j, Z_i) C_j). Arguments as for `PrototypeExtractor`.
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
        key, value = self.k(x).float(), self.v(x)  # [B, L, D]
        centres = _pool(x, self.centres)  # [B, N, D]
        for _ in range(self.iterations):
            attention = _product(self.q(centres), key).softmax(dim=-1)  # [B, N, L]
            centres = attention.to(value.dtype) @ value  # [B, N, D]
        cosine = _product(F.normalize(centres.float(), dim=-1), x) / _norm(x, dim=-1).mT  # [B, N, L]
        return self.z((cosine / self.centres).to(centres.dtype).mT @ centres)  # [B, L, D]


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


def _product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """rows [B, N, D] times columns [B, L, D] -> [B, N, L], in float32 also under autocast.

    Cosines of neighbouring tokens are close to one and to each other: rounded to bfloat16 they tie,
    and the choice of the best centre becomes the choice of the first.
    """
    with maybe_autocast(device_type=rows.device.type, enabled=False):
        return rows.float() @ columns.float().mT


def _norm(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Length of x along dim (kept), in float32 and never zero."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return norm.clamp_min(1e-12)


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

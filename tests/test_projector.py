"""The projectors: published numbers, the published formula, gradients, dtypes, names and errors."""

from pathlib import Path

import pytest
import torch
from bench.bench_projector import naive_forward
from safetensors.torch import load_file
from torch import nn

from sqllava.model.projector import PROJECTORS, PrototypeExtractor, build_projector

PREFIX = "base_model.model.model.mm_projector."
# (tokens, centres): many tokens a centre, not a multiple, as many, fewer tokens than centres, one.
SIZES = [(24, 6), (25, 7), (576, 256), (9, 9), (5, 8), (1, 4), (12, 1)]


def published(golden: Path, file: str, prefix: str) -> dict[str, torch.Tensor]:
    weights = torch.load(golden / file, weights_only=True)
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def extractor(**options: int) -> PrototypeExtractor:
    """A cluster projector whose similarity parameters have left their initial values."""
    torch.manual_seed(0)
    projector = PrototypeExtractor(16, 24, **options)
    nn.init.constant_(projector.sim_alpha, 1.7)
    nn.init.constant_(projector.sim_beta, -0.3)
    return projector


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_cluster_gives_the_published_numbers(golden: Path) -> None:
    numbers = load_file(golden / "numbers.safetensors")
    projector = build_projector("cluster", 32, 48)
    weights = published(golden, "sqllava-lora/non_lora_trainables.bin", PREFIX)
    projector.load_state_dict(weights, strict=True)

    projected = projector(numbers["tower_features"])

    torch.testing.assert_close(projected, numbers["projected"], atol=1e-5, rtol=0)


def test_cluster_has_the_published_state_dict(golden: Path) -> None:
    weights = published(golden, "sqllava-pretrain/mm_projector.bin", "model.mm_projector.")
    ours = build_projector("cluster", 32, 48).state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert shapes == {name: tensor.shape for name, tensor in weights.items()}


@pytest.mark.parametrize(("tokens", "centres"), SIZES)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_cluster_equals_the_broadcast_form(tokens: int, centres: int, iterations: int) -> None:
    # In float64: centres lie so close together that rounding may decide which is the best.
    projector = extractor(centres=centres, iterations=iterations).double()
    x = torch.randn(3, tokens, 16, dtype=torch.float64, requires_grad=True)

    naive_forward(projector, x).square().mean().backward()
    expected, expected_x = gradients(projector), x.grad
    projector.zero_grad()
    x.grad = None
    ours = projector(x)
    ours.square().mean().backward()

    torch.testing.assert_close(ours, naive_forward(projector, x), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(gradients(projector), expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(x.grad, expected_x, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["cluster", "cluster_soft"])
def test_every_parameter_learns_but_the_unused_norm(name: str) -> None:
    torch.manual_seed(0)
    projector = build_projector(name, 16, 24, centres=6)
    projector(torch.randn(2, 24, 16)).square().mean().backward()
    still = {n for n, p in projector.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == ({"ln_1.weight", "ln_1.bias"} if name == "cluster" else set())
    assert still == {n for n, p in projector.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", ["cluster", "cluster_soft"])
def test_is_deterministic_and_each_image_stands_alone(name: str) -> None:
    torch.manual_seed(0)
    projector = build_projector(name, 16, 24, centres=6)
    x = torch.randn(3, 20, 16)
    together = projector(x)
    assert torch.equal(together, projector(x))
    torch.testing.assert_close(projector(x[1:2]), together[1:2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cluster", "cluster_soft"])
def test_works_under_deterministic_algorithms(name: str) -> None:
    projector = build_projector(name, 16, 24, centres=6)
    torch.use_deterministic_algorithms(True)
    try:
        projector(torch.randn(2, 20, 16, requires_grad=True)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["cluster", "cluster_soft"])
def test_bfloat16_stays_close_to_float32(name: str) -> None:
    torch.manual_seed(0)
    projector = build_projector(name, 16, 24, centres=6)
    projector, x = projector.bfloat16(), torch.randn(2, 40, 16).bfloat16()

    half = projector(x)
    half.float().square().mean().backward()

    assert half.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients(projector).values())
    exact = projector.float()(x.float())
    assert (half - exact).norm() < 0.02 * exact.norm()


def test_autocast_stays_close_to_float32() -> None:
    projector, x = extractor(centres=6), torch.randn(2, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = projector(x)
    exact = projector(x)
    assert (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["cluster", "cluster_soft"])
def test_zero_features_give_finite_gradients(name: str) -> None:
    projector = build_projector(name, 16, 24, centres=6)
    projector(torch.zeros(1, 20, 16, requires_grad=True)).sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(projector).values())


@pytest.mark.parametrize("name", [*PROJECTORS, "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"])
def test_every_name_builds(name: str) -> None:
    text_dim = 16 if name == "identity" else 24
    assert build_projector(name, 16, text_dim)(torch.randn(2, 20, 16)).shape == (2, 20, text_dim)
    with torch.device("meta"):
        projector = build_projector(name, 16, text_dim)
        assert projector(torch.empty(2, 20, 16)).shape == (2, 20, text_dim)


def test_mlp_has_llavas_state_dict() -> None:
    names = list(build_projector("mlp2x_gelu", 16, 24).state_dict())
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(("text_dim", "expected"), [(4096, 24_130_562), (5120, 34_618_370)])
def test_cluster_has_the_published_parameter_count(text_dim: int, expected: int) -> None:
    with torch.device("meta"):
        projector = build_projector("cluster", 1024, text_dim)
    assert sum(parameter.numel() for parameter in projector.parameters()) == expected


def test_tokens_are_never_spread_over_centres() -> None:
    """What autograd keeps grows with N*L and L*D, never with their product."""
    projector, x = extractor(centres=32), torch.randn(1, 64, 16, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        projector(x)
    assert max(sizes) <= 32 * 64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clutser", {}, r"unknown projector 'clutser'; choose from \['identity', 'linear'"),
        ("mlp0x_gelu", {}, "unknown projector 'mlp0x_gelu'"),
        ("xmlp2x_gelu", {}, "unknown projector"),
        ("cluster", {"centers": 4}, r"no option \['centers'\]; choose from \['centres', 'iter"),
        ("mlp2x_gelu", {"depth": 3}, r"no option \['depth'\]; choose from \[\]"),
        ("linear", {"bias": 0}, r"no option \['bias'\]"),
        ("cluster", {"centres": 0}, "at least one centre and one iteration, found centres=0"),
        ("cluster_soft", {"iterations": 0}, "iterations=0"),
        ("identity", {}, "equal widths, found 16 -> 24"),
    ],
)
def test_a_wrong_name_or_option_is_an_error(
    name: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_projector(name, 16, 24, **options)

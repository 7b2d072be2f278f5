"""The loss in chunks: the numbers of the plain form, whatever computes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sqllava.model import loss
from sqllava.model.loss import LossHead, head_loss, with_loss

WIDTH, VOCABULARY = 16, 61


@pytest.fixture(params=["torch's operator", "ours"])
def chunks_of_8(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8)
    if request.param == "ours":
        monkeypatch.setattr(loss, "_has_operator", lambda: False)
    elif not loss._has_operator():
        pytest.skip("this torch has no linear_cross_entropy")


def results(head: nn.Module, states: torch.Tensor, targets: torch.Tensor, compute):
    """The loss and the gradients of the states and of the head."""
    states = states.clone().requires_grad_()
    head.zero_grad()
    value = compute(head, states, targets) / 7
    value.backward()
    gradients = [states.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
    return [value.detach(), *(gradient.clone() for gradient in gradients)]


def plainly(head: nn.Module, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(states, head.weight, head.bias)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@pytest.mark.parametrize("count", [0, 1, 8, 9, 50])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_chunks_change_neither_loss_nor_gradients(chunks_of_8, count, bias, trains):
    torch.manual_seed(count)
    head = with_loss(nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trains))
    states, targets = torch.randn(count, WIDTH), torch.randint(0, VOCABULARY, (count,))
    found = results(head, states, targets, head_loss)
    for one, expected in zip(found, results(head, states, targets, plainly), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_tied_embeddings_get_the_gradients_of_both(chunks_of_8):
    embedding, head = (
        nn.Embedding(VOCABULARY, WIDTH),
        with_loss(nn.Linear(WIDTH, VOCABULARY, False)),
    )
    with_loss(head).weight = embedding.weight
    ids, targets = torch.randint(0, VOCABULARY, (2, 50))
    gradients = []
    for compute in (head_loss, plainly):
        head.zero_grad()
        compute(head, embedding(ids) * 2, targets).backward()
        gradients.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_half_precision_sums_in_float32(chunks_of_8):
    head = with_loss(nn.Linear(WIDTH, VOCABULARY, bias=False)).bfloat16()
    states = torch.randn(2000, WIDTH, dtype=torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (2000,))
    found, expected = head_loss(head, states, targets), plainly(head, states, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_autocast_computes_logits_in_its_dtype(chunks_of_8):
    head = with_loss(nn.Linear(WIDTH, VOCABULARY, bias=False))
    states, targets = torch.randn(50, WIDTH), torch.randint(0, VOCABULARY, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = head_loss(head, states, targets), plainly(head, states, targets)
    torch.testing.assert_close(found, expected)


def test_logits_never_stand_whole(chunks_of_8, monkeypatch):
    rows = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: rows.append(len(x)) or real(x, *rest))
    head = with_loss(nn.Linear(WIDTH, VOCABULARY, bias=False))
    head_loss(head, torch.randn(50, WIDTH), torch.randint(0, VOCABULARY, (50,)))
    assert max(rows, default=0) <= 8


class Wrapped(nn.Linear):
    """Stands for a quantised head, or one with an adapter."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(states)


def test_a_head_of_another_kind_is_only_called(chunks_of_8):
    head = with_loss(Wrapped(WIDTH, VOCABULARY))
    assert type(head) is Wrapped
    states, targets = torch.randn(50, WIDTH), torch.randint(0, VOCABULARY, (50,))
    expected = F.cross_entropy(head(states), targets, reduction="sum")
    assert torch.equal(head_loss(head, states, targets), expected)


def test_hooks_around_the_head_hold_for_the_loss(chunks_of_8):
    """ZeRO-3 gathers the weight in such hooks."""
    head, calls = with_loss(nn.Linear(WIDTH, VOCABULARY)), []
    assert isinstance(head, LossHead) and head(torch.randn(3, WIDTH)).shape == (3, VOCABULARY)
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    head_loss(head, torch.randn(50, WIDTH), torch.randint(0, VOCABULARY, (50,)))
    assert calls == ["before", "after"]

"""Gradients written by hand are autograd's on the plain formula: in double precision, to rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.models.functions import rms_norm, rotate, swiglu

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def test_rms_norm_is_its_formula_and_so_is_its_gradient() -> None:
    weight = random(16, seed=1)
    for shape in ((7, 16), (5, 3, 16)):  # hidden states, and heads
        for eps in (1e-6, 0.5):
            x, grad = random(*shape).requires_grad_(), random(*shape, seed=2)
            ours, plain = rms_norm(x, weight, eps), plain_rms_norm(x, weight, eps)
            torch.testing.assert_close(ours, plain, **EXACT)
            (wanted,) = torch.autograd.grad(plain, x, grad)
            torch.testing.assert_close(torch.autograd.grad(ours, x, grad)[0], wanted, **EXACT)


def test_rms_norm_leaves_its_input_and_the_gradient_alone() -> None:
    """It works in place inside; residual streams read the same tensors."""
    x, weight, grad = random(4, 8).requires_grad_(), random(8, seed=1), random(4, 8, seed=2)
    before = x.detach().clone(), weight.clone(), grad.clone()
    rms_norm(x, weight, 1e-6).backward(grad)
    for was, now in zip(before, (x.detach(), weight, grad), strict=True):
        assert torch.equal(was, now)


def test_rms_norm_of_nothing_is_nothing() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_swiglu_is_its_formula_and_so_is_its_gradient() -> None:
    both, grad = random(6, 20).requires_grad_(), random(6, 10, seed=1)
    gate, up = both[:, :10], both[:, 10:]
    plain = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(swiglu(both), plain, **EXACT)
    (wanted,) = torch.autograd.grad(plain, both, grad)
    torch.testing.assert_close(torch.autograd.grad(swiglu(both), both, grad)[0], wanted, **EXACT)


def test_gradients_survive_what_comes_before_and_after() -> None:
    """In a graph: a view goes in, a transposed gradient comes back."""
    x = random(8, 6).requires_grad_()
    weight = random(4, seed=1)

    def through(norm: object, gated: object) -> Tensor:
        return (norm(gated(x.t()[:, :8]), weight, 1e-5).t() ** 2).sum()  # type: ignore[operator]

    ours = through(rms_norm, swiglu)
    plain = through(plain_rms_norm, lambda both: F.silu(both[:, :4]) * both[:, 4:])
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(plain, x)[0], **EXACT)


def test_rotation_is_its_formula_and_so_is_its_gradient() -> None:
    x, grad, angles = random(5, 3, 8).requires_grad_(), random(5, 3, 8, seed=1), random(5, 1, 4, seed=2)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    plain = x * cos + torch.cat([-second, first], -1) * sin
    torch.testing.assert_close(rotate(x, cos, sin), plain, **EXACT)
    (wanted,) = torch.autograd.grad(plain, x, grad)
    torch.testing.assert_close(torch.autograd.grad(rotate(x, cos, sin), x, grad)[0], wanted, **EXACT)

"""bf16 products of our own are the plain formula summed in fp32, for any shape and layout; elsewhere torch's are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.quantization.formats import HugePageArena, dense, trained_on
from fortwo.quantization.matmul import product
from fortwo.quantization.tiles import LONGEST_SUM, Tiles

pytestmark = pytest.mark.usefixtures("level")


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


SHAPES = [
    (1, 1, 1),
    (5, 32, 16),
    (31, 33, 31),
    (32, 32, 32),
    (37, 50, 70),
    (64, 576, 960),
    (100, 1537, 40),
    (3, 9000, 9),
    (37, 40, 8210),
]


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 16, 48])
@pytest.mark.parametrize("turned", [False, True])
def test_one_sum_of_two_products(rows: int, inner: int, out: int, rank: int, turned: bool) -> None:
    x, weight = bf16(rows, inner), bf16(out, inner, seed=1)
    h, B = bf16(rows, rank, seed=2), bf16(out, rank, seed=3)
    if turned:
        x, weight, B = (tensor.t().contiguous().t() for tensor in (x, weight, B))
    wanted = x.float() @ weight.float().t() + h.float() @ B.float().t()
    more = (h, B) if rank else None
    assert off(product(x, weight, more, torch.float32), wanted) < (
        1e-5 if cpu.multiplies_tiles() and inner <= LONGEST_SUM else 6e-3
    )
    narrow = product(x, weight, more)
    assert narrow.dtype == torch.bfloat16
    assert off(narrow, wanted) < 6e-3


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_a_weight_to_train_on_multiplies_there_and_back(rows: int, inner: int, out: int) -> None:
    weight = bf16(out, inner)
    held = trained_on(weight.float(), HugePageArena())
    assert held.shape == (out, inner)
    assert torch.equal(dense(held, torch.bfloat16), weight)
    x, grad = bf16(rows, inner, seed=1), bf16(rows, out, seed=2)
    assert off(product(x, held), x.float() @ weight.float().t()) < 6e-3
    assert off(product(grad, held.t()), grad.float() @ weight.float()) < 6e-3


@pytest.mark.parametrize("rows", [1, 40])
def test_a_long_sum_takes_an_adapter_too(rows: int) -> None:
    """The gradient of a wide MLP's input sums over more outputs than a panel holds, and over an adapter's."""
    weight, grad = bf16(LONGEST_SUM + 96, 64), bf16(rows, LONGEST_SUM + 96, seed=1)
    held, more = trained_on(weight.float(), HugePageArena()), (bf16(rows, 4, seed=2), bf16(64, 4, seed=3))
    wanted = grad.float() @ weight.float() + more[0].float() @ more[1].float().t()
    assert off(product(grad, held.t(), more, torch.float32), wanted) < 1e-5
    assert off(product(grad, held.t(), more), wanted) < 6e-3


def test_rows_do_not_depend_on_their_company() -> None:
    held, x = trained_on(bf16(96, 64).float(), HugePageArena()), bf16(70, 64, seed=1)
    together = product(x, held)
    if isinstance(held, Tiles):
        assert all(torch.equal(product(x[row : row + 1], held)[0], together[row]) for row in range(70))
    else:
        torch.testing.assert_close(product(x[:1], held), together[:1], atol=0.05, rtol=0.02)

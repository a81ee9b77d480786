"""Each format multiplies as its dense weight does, and rounds no more than it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fortwo.nn.decoder import formats_of
from fortwo.quantization.formats import HugePageArena, Weight, fits, quantize
from fortwo.quantization.grouped import GROUP, Grouped
from fortwo.quantization.matmul import frozen_product, product
from fortwo.quantization.selection import Choice

# relative error of the weight itself, for normal numbers
ERRORS = {"fp32": 0, "bf16": 0.002, "int8": 0.007, "int4": 0.1, "nf4": 0.11}
ROUNDED, LARGEST = 5e-5, 32639  # x in 16 bits
compiled = pytest.mark.usefixtures("level")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x_TI: Tensor) -> Tensor:
    """x in 16 bits by groups, the plain way."""
    groups = x_TI.view(len(x_TI), -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / LARGEST
    return torch.where(scale > 0, (groups / scale).round() * scale, 0).view(x_TI.shape)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@compiled
@pytest.mark.parametrize("name", ERRORS)
def test_a_form_is_near_its_weight(name: str) -> None:
    weight = random(50, 128)
    found = quantize(name, weight, HugePageArena()).dense()
    assert relative(found.float(), weight) <= ERRORS[name]
    assert found.shape == weight.shape


@compiled
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 13, 23])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (50, 96), (7, 64), (2000, 160)])
def test_whole_numbers_multiply_as_the_dense_weight_does(bits: int, rows: int, outputs: int, inputs: int) -> None:
    weight_format = Grouped.of(random(outputs, inputs), bits, HugePageArena())
    x = random(rows, inputs, seed=1)
    wanted = rounded(x).double() @ weight_format.dense().double().t()
    torch.testing.assert_close(
        weight_format.product(x).double(), wanted, atol=1e-3, rtol=1e-5
    )  # a tie may round the other way
    assert relative(weight_format.product(x), x @ weight_format.dense().t()) < ROUNDED


@compiled
def test_fp32_is_not_held_beside_a_form_that_is_the_weight_itself() -> None:
    def held(weight_OI: Tensor, is_head: bool = False) -> Weight:
        found = formats_of(Choice(((8, "int4"), (512, "bf16"))), exact=True)(weight_OI, is_head)
        assert isinstance(found, Weight)
        return found

    given = Grouped.of(random(20, 64), 4, HugePageArena()).dense()
    same, other, head = held(given), held(random(20, 64)), held(given, is_head=True)
    assert set(same.formats) == {"int4", "bf16"}
    assert torch.equal(same.dense(torch.float32), given)
    assert set(other.formats) == set(head.formats) == {"int4", "bf16", "fp32"}
    assert torch.equal(other.dense(torch.float32), random(20, 64))


@compiled
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    weight_format = Grouped.of(torch.zeros(20, 64), bits, HugePageArena())
    assert not weight_format.dense().any()
    assert not weight_format.product(random(3, 64)).any()
    assert not Grouped.of(random(20, 64), bits, HugePageArena()).product(torch.zeros(3, 64)).any()


@compiled
def test_rows_that_are_views_are_read_right() -> None:
    weight_format, x = Grouped.of(random(20, 64), 4, HugePageArena()), random(64, 5, seed=1).t()
    assert torch.equal(weight_format.product(x), weight_format.product(x.contiguous()))


@compiled
@pytest.mark.parametrize(("bits", "levels"), [(4, 15), (8, 254)])
def test_weights_that_were_quantised_so_before_lose_nothing(bits: int, levels: int) -> None:
    """GGUF's Q4_1 and Q8_0: the extreme of a group is on its grid, so the grid can be found again."""
    q = torch.randint(0, levels + 1, (40, 3, GROUP), generator=torch.Generator().manual_seed(0)).float()
    q[..., 0], q[..., 1] = 0, levels
    scale = (random(40, 3, 1).abs() / 100).half().float()
    start = random(40, 3, 1, seed=1).half().float() if bits == 4 else scale * -127
    weight = (q * scale + start).view(40, -1)
    assert torch.equal(Grouped.of(weight, bits, HugePageArena()).dense(), weight)


@compiled
def test_a_weight_takes_the_form_for_its_rows() -> None:
    dense, choice = random(32, 64), Choice(((2, "int4"), (8, "fp32")))
    arena = HugePageArena()
    weight = Weight(dense.shape, {name: quantize(name, dense, arena) for name in ("fp32", "int4")}, choice)
    few, many = random(2, 64), random(9, 64)
    assert torch.equal(product(few, weight), weight.formats["int4"].product(few))
    assert torch.equal(frozen_product(many, weight), product(many, dense))
    assert torch.equal(weight.dense(torch.float32), dense)
    assert weight.nbytes == dense.nbytes + weight.formats["int4"].nbytes


@compiled
def test_held_weights_do_not_overlap() -> None:
    arena = HugePageArena()
    tensors = [random(100_001 + n, seed=n) for n in range(3)] + [random(9_000_000, seed=3)]
    held = [arena.hold(tensor) for tensor in tensors]
    assert all(torch.equal(one, other) for one, other in zip(held, tensors, strict=True))


def test_widths_that_do_not_fit_are_found() -> None:
    assert not fits("int4", [random(4, 48)])
    assert not fits("nf4", [random(3, 32)])
    assert fits("bf16", [random(3, 5)])

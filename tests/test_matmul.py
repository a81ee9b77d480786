"""Every kernel computes x @ weight.T, whatever the layout of its inputs, and frozen weights get no gradient."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fortwo.kernels.isa import processor
from fortwo.quantization import matmul
from fortwo.quantization.matmul import frozen_product, product

KERNELS = {"default": F.linear, "onednn": matmul._onednn}
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which kernel is fastest depends on the machine; both must be right on all of them."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(matmul, "_cpu_product", lambda: KERNELS[request.param])
    return request.param


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return (x.double() @ weight.double().t()).float()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 1, 1), (1, 64, 96), (7, 33, 5), (130, 64, 259), (0, 8, 4)])
def test_any_shape(rows: int, inner: int, out: int) -> None:
    x, weight = random(rows, inner), random(out, inner, seed=1)
    y = product(x, weight)
    assert y.shape == (rows, out)
    torch.testing.assert_close(y, exact(x, weight), **CLOSE)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(8, 6).t(), random(5, 8)),
        (random(6, 8), random(8, 5).t()),  # as every backward has it
        (random(6, 20)[:, 4:12], random(5, 8)),  # columns of a fused product
        (random(12, 8)[::2], random(10, 8)[::2]),
        (torch.ones(()).expand(6, 8), random(5, 8)),  # the gradient of a sum
        (random(8).expand(6, 8), random(8).expand(5, 8)),
        (random(6 * 8 + 1)[1:].view(6, 8), random(5, 8)),  # not aligned
    ],
    ids=["x transposed", "weight transposed", "columns", "strides", "expanded", "one row", "offset"],
)
def test_any_layout(x: Tensor, weight: Tensor) -> None:
    torch.testing.assert_close(product(x, weight), exact(x, weight), **CLOSE)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_the_kernels_agree(rows: int, inner: int, out: int) -> None:
    x, weight = random(rows, inner), random(out, inner, seed=1)
    torch.testing.assert_close(matmul._onednn(x, weight), F.linear(x, weight), **CLOSE)


@pytest.mark.usefixtures("kernel")
def test_a_frozen_product_has_autograds_gradient_and_its_weight_none() -> None:
    x, weight, grad = random(6, 8).requires_grad_(), random(5, 8, seed=1).requires_grad_(), random(6, 5, seed=2)
    frozen_product(x, weight).backward(grad)
    (wanted,) = torch.autograd.grad(F.linear(x, weight), x, grad)
    torch.testing.assert_close(x.grad, wanted, **CLOSE)
    assert weight.grad is None
    x.grad = None
    frozen_product(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(6, 8), **CLOSE)


def test_without_gradients_nothing_is_recorded() -> None:
    x, weight = random(2, 3), random(4, 3)
    assert not frozen_product(x, weight).requires_grad
    with torch.no_grad():
        assert not frozen_product(x.requires_grad_(), weight).requires_grad


def test_a_bf16_weight_is_multiplied_in_bf16_and_summed_in_fp32() -> None:
    x, weight = random(4, 300).requires_grad_(), random(5, 300, seed=1)
    narrow = weight.bfloat16()
    found = frozen_product(x, narrow)
    assert found.dtype == torch.float32
    wanted = F.linear(x.detach().bfloat16().double(), narrow.double()).float()
    torch.testing.assert_close(found.detach(), wanted, atol=0.05, rtol=2**-8)
    found.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, narrow.float().sum(0).expand(4, 300), atol=0.05, rtol=2**-7)


def test_double_precision_stays_double() -> None:
    x, weight = random(3, 4).double(), random(5, 4).double()
    assert product(x, weight).dtype == torch.float64


@pytest.mark.parametrize("name", ["torch", "onednn"])
def test_a_machine_keeps_to_the_fp32_kernel_that_it_chose(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fp32_kernel.json"
    monkeypatch.setattr(matmul._Fp32Kernel, "name", name)
    matmul.remember_fp32_kernel(file)
    monkeypatch.setattr(matmul._Fp32Kernel, "name", None)
    matmul.remember_fp32_kernel(file)
    assert matmul.fp32_kernel() == name


@pytest.mark.parametrize("content", [b"", b"[]", b'{"processor": "another", "kernel": "onednn"}', b'{"kernel": "mkl"}'])
def test_a_choice_from_elsewhere_is_made_again(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fp32_kernel.json"
    file.write_bytes(content)
    monkeypatch.setattr(matmul._Fp32Kernel, "name", None)
    monkeypatch.setattr(matmul, "_fastest", lambda: "torch")
    matmul.remember_fp32_kernel(file)
    assert json.loads(file.read_bytes()) == {"processor": processor(), "kernel": "torch"}

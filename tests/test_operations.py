"""The kernels are the plain formulas of `reference`, which take what is in double precision, forward and backward: in
fp32 to rounding, in bf16 to its eight bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.kernels.operations import (
    add_norm,
    cross_entropy,
    decode_attention,
    divergence,
    dropout,
    rotate,
    swiglu,
)

pytestmark = pytest.mark.usefixtures("level")
TYPES = [torch.float32, torch.bfloat16]
SIZES = [3, 16, 100]  # below a vector, a vector, several and a rest
VOCABULARIES = [*SIZES, 32, 4128]  # what the kernels for the head take, and what they do not


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2e-2}
    torch.testing.assert_close(got.double(), want, **tolerance)


def same(function: Callable[..., Tensor], inputs: list[Tensor], dtypes: list[torch.dtype], dtype: torch.dtype) -> None:
    """`function` of the inputs as `dtypes`, and its gradients, are those in double precision."""
    exact = [one.to(to).double().requires_grad_() for one, to in zip(inputs, dtypes, strict=True)]
    fast = [one.to(to).requires_grad_() for one, to in zip(inputs, dtypes, strict=True)]
    want, got = function(*exact), function(*fast)
    close(got.detach(), want.detach(), dtype)
    upstream = random(*want.shape, seed=9).to(dtype)
    wanted = torch.autograd.grad(want, exact, upstream.double())
    found = torch.autograd.grad(got, fast, upstream.to(got.dtype))
    for ours, plain, to in zip(found, wanted, dtypes, strict=True):
        assert ours.dtype == to
        close(ours, plain, dtype)


def test_the_kernels_are_compiled_here() -> None:
    assert cpu.usable(torch.empty(0), torch.empty(0, dtype=torch.bfloat16))
    assert not cpu.usable(torch.empty(0, dtype=torch.float64))
    assert not cpu.usable(torch.empty(0, device="meta"))


def test_a_kernel_takes_what_its_header_declares_and_nothing_else() -> None:
    square_sum, numbers = cpu.kernels().sum_of_squares, torch.ones(4, 2)
    total = torch.zeros(1, dtype=torch.float64)
    square_sum(8, numbers, total)
    assert total.item() == 8
    wrong = [numbers.double(), numbers.half(), numbers.t(), numbers.to("meta"), numbers.bool(), numbers.tolist(), 8]
    for given in wrong:
        with pytest.raises(TypeError):
            square_sum(8, given, total)
    with pytest.raises(TypeError):
        square_sum(8.5, numbers, total)
    with pytest.raises(TypeError):
        square_sum(8, numbers)
    assert not hasattr(cpu.kernels(), "no_such_kernel")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_add_norm(size: int, dtype: torch.dtype) -> None:
    x, y, weight = random(7, size), random(7, size, seed=1), random(size, seed=2)

    def both(x: Tensor, y: Tensor) -> Tensor:
        to = dtype if x.dtype == torch.float32 else x.dtype
        total, normed = add_norm(x, y, weight.to(x.dtype), 1e-3, to)
        assert normed.dtype == to
        return total * 2 + normed  # both outputs have a say in the gradient

    same(both, [x, y], [torch.float32, dtype], dtype)


def test_a_sum_is_exactly_a_sum_and_nothing_is_changed_in_place() -> None:
    x, y, weight = random(5, 20).float(), random(5, 20, seed=1).float(), torch.ones(20)
    before = x.clone(), y.clone()
    total, _ = add_norm(x, y, weight, 1e-6, torch.float32)
    assert torch.equal(total, x + y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the decoder norms hidden states (T, D) and heads (T, N, E)."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    return add_norm(rows, None, weight, eps, x.dtype)[1].view(x.shape)


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_of_hidden_states_and_of_heads(dtype: torch.dtype) -> None:
    weight = random(16, seed=1).float()
    for shape in ((7, 16), (5, 3, 16)):
        x = random(*shape)
        plain = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 0.5) * weight.double()
        close(rms_norm(x.to(dtype), weight, 0.5), plain, dtype)
        same(lambda x: rms_norm(x, weight.to(torch.promote_types(x.dtype, torch.float32)), 0.5), [x], [dtype], dtype)


def test_rms_norm_of_nothing_is_nothing() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    both = 3 * random(6, 2 * size)
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(swiglu(both), gate * torch.sigmoid(gate) * up)
    same(swiglu, [both], [dtype], dtype)


def test_swiglu_of_extremes() -> None:
    both = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(swiglu(both), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]), atol=1e-30, rtol=0)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
def test_dropout_keeps_a_share_and_the_mean_by_the_seed(dtype: torch.dtype) -> None:
    x = torch.ones(300, 200, dtype=dtype)
    for p in (0.15, 0.5):
        y = dropout(x, p, 7)
        assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-2)
        assert (y == 0).double().mean().item() == pytest.approx(p, abs=0.01)
        for axis in (0, 1):  # neither rows nor columns have a share of their own
            assert (y == 0).double().mean(axis).std() < 1.5 * (p * (1 - p) / y.shape[axis]) ** 0.5
        assert torch.equal(y, dropout(x, p, 7))
        other = dropout(x, p, 8)
        agree = ((y == 0) == (other == 0)).double().mean().item()
        assert agree == pytest.approx(p**2 + (1 - p) ** 2, abs=0.01)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [2, 16, 64])
def test_rotation_turns_the_first_heads_and_leaves_the_rest(size: int, dtype: torch.dtype) -> None:
    x, angles = random(5, 4, size), random(5, size // 2, seed=2)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    first, second = x[:, :3].chunk(2, -1)
    plain = x[:, :3] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    close(rotate(x.to(dtype), 3, cos.float(), sin.float()), torch.cat([plain, x[:, 3:]], 1), dtype)

    def turned(x: Tensor) -> Tensor:
        to = torch.promote_types(x.dtype, torch.float32)
        return rotate(x, 3, cos.to(to), sin.to(to))

    same(turned, [x], [dtype], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_cross_entropy_and_its_gradient(size: int, dtype: torch.dtype) -> None:
    logits, tokens = (8 * random(5, size)).to(dtype), torch.tensor([0, 1, 2, size - 1, 0])
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, tokens, reduction="none")
    (slope,) = torch.autograd.grad(want.sum(), exact)
    for given in (logits.double(), logits):  # the plain formula, and the kernel
        loss, gradient = cross_entropy(given.clone(), tokens)
        close(loss, want.detach(), dtype)
        close(gradient, slope, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_divergence_and_its_gradient(size: int, dtype: torch.dtype) -> None:
    logits, wanted = (4 * random(5, size)).to(dtype), (4 * random(5, size, seed=1)).to(dtype)
    exact = logits.double().requires_grad_()
    p = torch.softmax(wanted.double(), -1)
    want = (p * (p.log() - F.log_softmax(exact, -1))).sum(-1)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    for given, other in ((logits.double(), wanted.double()), (logits, wanted)):
        loss, gradient = divergence(given.clone(), other)
        close(loss, want.detach(), dtype)
        close(gradient, slope, dtype)
    same_loss, nothing = divergence(wanted.clone(), wanted)
    assert same_loss.abs().max() < 1e-6
    assert nothing.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    """A run that diverges must be seen."""
    x = torch.ones(3, 32, dtype=torch.float32)
    x[1, 5] = torch.nan
    _, normed = add_norm(x, None, torch.ones(32), 1e-6, dtype)
    assert normed.isnan().any(1).tolist() == [False, True, False]
    assert swiglu(x.to(dtype)).isnan().any(1).tolist() == [False, True, False]
    loss, _ = cross_entropy(x.to(dtype), torch.tensor([0, 0, 0]))
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (2, 1)])
@pytest.mark.parametrize("size", [16, 64, 24])
def test_decode_attention(heads: tuple[int, int], size: int) -> None:
    """Rows of different lengths, in any order in the cache, next to values that were never written."""
    H, K = heads
    positions, rows = torch.tensor([0, 5, 40, 17]), torch.tensor([3, 0, 5, 2])
    qkv = random(4, H + 2 * K, size)
    k, v = random(6, K, 50, size, seed=1), random(6, K, 50, size, seed=2)
    for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
        k[row, :, position:], v[row, :, position:] = torch.nan, torch.nan
    wanted = []
    for token, row, position in zip(qkv, rows.tolist(), positions.tolist(), strict=True):
        q, new_k, new_v = token.split([H, K, K])
        keys = torch.cat([k[row, :, :position], new_k[:, None]], 1).repeat_interleave(H // K, 0)
        values = torch.cat([v[row, :, :position], new_v[:, None]], 1).repeat_interleave(H // K, 0)
        wanted.append(F.scaled_dot_product_attention(q[:, None], keys, values)[:, 0])
    roomy_k, roomy_v = torch.zeros(6, K, 64, size), torch.zeros(6, K, 64, size)
    cache_k, cache_v = roomy_k[:, :, :50], roomy_v[:, :, :50]  # strided
    cache_k.copy_(k)
    cache_v.copy_(v)
    with torch.no_grad():
        close(decode_attention(qkv.float(), cache_k, cache_v, rows, positions), torch.stack(wanted), torch.float32)
        close(decode_attention(qkv, k, v, rows, positions), torch.stack(wanted), torch.float32)
    assert torch.equal(cache_k[rows, :, positions], qkv[:, H : H + K].float())
    assert torch.equal(cache_v[rows, :, positions], qkv[:, H + K :].float())


def test_without_gradients_the_kernels_give_the_same() -> None:
    x, y, weight = (random(5, 64, seed=seed).float() for seed in range(3))
    angles, heads = random(5, 16, seed=3).float(), random(5, 4, 16, seed=4).float()
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.cat(add_norm(x, y, weight[0], 1e-5, torch.float32)),
        lambda: rotate(heads, 3, angles.cos(), angles.sin()),
        lambda: swiglu(x),
    ]
    for call in calls:
        with torch.no_grad():
            plain = call()
        assert torch.equal(plain, call())

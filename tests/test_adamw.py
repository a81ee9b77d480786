"""AdamW is torch's, by the kernel and without, and in 8 bits nearly; what it has come to can be taken up again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fortwo.kernels import cpu
from fortwo.train.adamw import BLOCK, AdamW, AdamW8bit

SIZE = 40_003  # more than two parts of a sum, and no whole vectors
BETAS, EPS, DECAY = (0.8, 0.95), 1e-6, 0.1


@pytest.fixture(params=[True, False])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, level: str) -> bool:
    """With the kernels, and without."""
    if not request.param:
        monkeypatch.setattr(cpu, "usable", lambda *_: False)
    return bool(request.param)


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, generator=generator) for _ in range(count)]


def parameter() -> Tensor:
    weight_N = torch.linspace(-1, 1, SIZE).requires_grad_(True)
    weight_N.grad = torch.zeros(SIZE)
    return weight_N


@pytest.fixture(params=[AdamW, AdamW8bit])
def kind(request: pytest.FixtureRequest) -> type[AdamW]:
    found: type[AdamW] = request.param
    return found


def ran(optimizer: AdamW, weight_N: Tensor, given: list[Tensor]) -> None:
    assert weight_N.grad is not None
    for grad_N in given:
        weight_N.grad.copy_(grad_N)
        optimizer.step(1e-2, 0.5)
        assert not weight_N.grad.any()


def test_its_steps_are_torchs(compiled: bool) -> None:
    ours, theirs = parameter(), parameter()
    ran(AdamW(ours, BETAS, EPS, DECAY), ours, gradients(5))
    wanted = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for grad_N in gradients(5):
        theirs.grad = 0.5 * grad_N
        wanted.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_the_norm_is_that_of_the_whole_gradient(compiled: bool) -> None:
    weight_N, (grad_N,) = parameter(), gradients(1)
    optimizer = AdamW(weight_N, BETAS, EPS, DECAY)
    assert weight_N.grad is not None
    weight_N.grad.copy_(grad_N)
    assert optimizer.gradient_norm() == pytest.approx(float(grad_N.double().norm()), rel=1e-6)
    weight_N.grad[7] = torch.nan
    assert optimizer.gradient_norm() != optimizer.gradient_norm()


def test_it_goes_on_from_what_was_kept(compiled: bool, kind: type[AdamW]) -> None:
    whole, first, second = parameter(), parameter(), parameter()
    given = gradients(6)
    ran(kind(whole, BETAS, EPS, DECAY), whole, given)
    before = kind(first, BETAS, EPS, DECAY)
    ran(before, first, given[:3])
    after = kind(second, BETAS, EPS, DECAY)
    after.restore(before.state())
    with torch.no_grad():
        second.copy_(first)
    ran(after, second, given[3:])
    assert torch.equal(second, whole)


@pytest.mark.usefixtures("level")
def test_the_kernel_of_8_bits_is_the_plain_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same state the same weights, and the same codes but where rounding was undecided to the last bit."""
    fast, plain = parameter(), parameter()
    by_kernel, by_torch = (AdamW8bit(one, BETAS, EPS, DECAY) for one in (fast, plain))
    *before, last = gradients(4)
    ran(by_kernel, fast, before)
    by_torch.restore(by_kernel.state())
    with torch.no_grad():
        plain.copy_(fast)
    ran(by_kernel, fast, [last])
    monkeypatch.setattr(cpu, "usable", lambda *_: False)
    ran(by_torch, plain, [last])
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-5)
    for name, found in by_kernel.state().items():
        wanted = by_torch.state()[name]
        if found.dtype == torch.uint8:
            assert (found != wanted).float().mean() < 1e-3, name
            assert len(found.unique()) > 50, name
        else:
            torch.testing.assert_close(found, wanted)


def test_moments_of_8_bits_follow_gradients_that_change(compiled: bool) -> None:
    """In each block some gradients grow and some fade, a hundredfold in 300 steps: what a second moment that is rounded
    to the nearest never sees. Without weights in between: what all steps add up to is held against torch's."""
    generator = torch.Generator().manual_seed(2)
    size, steps = 20 * BLOCK, 300
    drift_N, lean_N = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    ours, theirs = torch.zeros(size, requires_grad=True), torch.zeros(size, requires_grad=True)
    ours.grad = torch.zeros(size)
    optimizer = AdamW8bit(ours, (0.9, 0.999), 1e-8, 0.0)
    wanted = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        noise_N = torch.randn(size, generator=generator)
        grad_N = (0.3 * lean_N + noise_N) * torch.exp(2.3 * drift_N * step / steps)
        ours.grad.copy_(grad_N)
        optimizer.step(1e-2)
        theirs.grad = grad_N
        wanted.step()
    found, same = ours.detach(), theirs.detach()
    assert float((found - same).norm() / same.norm()) < 0.1
    assert float(found @ same / same.square().sum()) == pytest.approx(1, abs=0.02)


def test_a_small_gradient_beside_a_large_one_makes_no_large_step(compiled: bool) -> None:
    weight_N = torch.zeros(BLOCK, requires_grad=True)
    weight_N.grad = torch.zeros(BLOCK)
    optimizer = AdamW8bit(weight_N, (0.9, 0.999), 1e-12, 0.0)
    for _ in range(20):
        weight_N.grad.copy_(torch.logspace(0, -12, BLOCK))
        weight_N.grad[-1] = 0
        before_N = weight_N.detach().clone()
        optimizer.step(1e-2)
        assert (weight_N.detach() - before_N).abs().max() < 1.5e-2
    assert float(weight_N[0].detach()) == pytest.approx(-0.2, rel=0.05)
    assert weight_N[-1] == 0


def test_8_bits_take_a_quarter() -> None:
    whole, eighth = (one(parameter(), BETAS, EPS, DECAY).state() for one in (AdamW, AdamW8bit))
    bytes_of = [sum(tensor.nbytes for tensor in state.values()) for state in (whole, eighth)]
    assert bytes_of[1] < 0.26 * bytes_of[0]

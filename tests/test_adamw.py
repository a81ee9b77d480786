"""AdamW is torch's, by the kernel and without; what it has come to can be kept and taken up again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.train.adamw import AdamW

SIZE = 40_003  # more than two parts of a sum, and no whole vectors
BETAS, EPS, DECAY = (0.8, 0.95), 1e-6, 0.1


@pytest.fixture(params=[True, False])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the kernels, and without."""
    if not request.param:
        monkeypatch.setattr(kernels, "usable", lambda *_: False)
    elif not kernels.usable(torch.empty(0)):
        pytest.skip("there is no C compiler")
    return bool(request.param)


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, generator=generator) for _ in range(count)]


def parameter() -> Tensor:
    weight_N = torch.linspace(-1, 1, SIZE).requires_grad_(True)
    weight_N.grad = torch.zeros(SIZE)
    return weight_N


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


def test_it_goes_on_from_what_was_kept(compiled: bool) -> None:
    whole, first, second = parameter(), parameter(), parameter()
    given = gradients(6)
    ran(AdamW(whole, BETAS, EPS, DECAY), whole, given)
    before = AdamW(first, BETAS, EPS, DECAY)
    ran(before, first, given[:3])
    after = AdamW(second, BETAS, EPS, DECAY)
    after.restore(before.state())
    with torch.no_grad():
        second.copy_(first)
    ran(after, second, given[3:])
    assert torch.equal(second, whole)

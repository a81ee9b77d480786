"""Several processes that each compute a share of a step make the gradient and the numbers of one that computes it all.

Here threads stand for the processes; tests/scale has real ones. Tolerance: as in test_losses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_losses import mixed
from test_preferences import compared, finished, learned_adapter, learning, pairs

from fortwo.execution.backend import backend_for
from fortwo.records import Plan, Setting
from fortwo.train.losses import Accumulated, accumulate_gradients
from fortwo.train.retry_policy import RowMix
from fortwo.train.shares import WHOLE, Share
from tests.parts import decoder


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_every_item_is_in_one_share_and_no_share_is_much_longer(tokens: list[int], size: int) -> None:
    items = list(enumerate(tokens))
    shares = [Share(rank, size).of(items, lambda item: item[1]) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    loads = [sum(length for _, length in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)


def test_a_process_alone_computes_everything_in_its_order() -> None:
    assert WHOLE.of([3, 1, 2], lambda item: item) == [3, 1, 2]
    assert WHOLE.add_up([1.5, 2.0]) == [1.5, 2.0]


class Together:
    """Adds up what `size` threads hand in at the same time."""

    def __init__(self, size: int) -> None:
        self._barrier, self._handed = threading.Barrier(size, timeout=30), dict[int, list[float]]()

    def add_up(self, rank: int) -> Callable[[list[float]], list[float]]:
        def add_up(numbers: list[float]) -> list[float]:
            self._handed[rank] = numbers
            self._barrier.wait()
            sums = [sum(each) for each in zip(*self._handed.values(), strict=True)]
            self._barrier.wait()
            return sums

        return add_up


def shares(size: int) -> Iterator[Share]:
    together = Together(size)
    return (Share(rank, size, together.add_up(rank)) for rank in range(size))


def in_shares(size: int, compute: Callable[[Any, Share], Accumulated]) -> tuple[list[Accumulated], torch.Tensor]:
    """What each of `size` threads returns, and the sum of their gradients. compute: adds a gradient to an adapter's."""
    adapters = [learned_adapter() for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(compute, adapters, shares(size)))
    return found, torch.stack([lora.flat_N.grad for lora in adapters]).sum(0)  # type: ignore[union-attr, misc]


def check(size: int, compute: Callable[[Any, Share], Accumulated]) -> None:
    (whole,), wanted_N = in_shares(1, compute)
    found, gradient_N = in_shares(size, compute)
    torch.testing.assert_close(gradient_N, wanted_N, atol=1e-4, rtol=1e-4)
    for one in found:  # all processes know the numbers of the whole step
        assert one.loss == pytest.approx(whole.loss, rel=1e-5)
        assert one.parts == pytest.approx(whole.parts, rel=1e-5)
        assert one.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
        assert one.supervised == whole.supervised


@pytest.mark.parametrize("size", [2, 3, 9])  # 9: more processes than rows
def test_shares_of_rows_to_learn_and_to_keep_make_the_whole_gradient(size: int) -> None:
    settings = {"micro_step_tokens": 12, "gradient_checkpointing": False}
    given = tuple(Setting(name, value, "user", "given") for name, value in settings.items())
    plan, rows = Plan("tiny", "a", "sft", {}, given, {}), mixed()

    def compute(lora: Any, share: Share) -> Accumulated:
        return finished(accumulate_gradients(backend_for(decoder()), lora, 3, rows, 2.0, plan, share))

    check(size, compute)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_shares_of_preferences_make_the_whole_gradient(objective: str, size: int) -> None:
    learned = learning(backend_for(decoder()), objective)
    rows = [replace(row, desirable=n % 2 == 0) for n, row in enumerate(compared(learned, pairs()))]
    others = [row for (row,) in learned.mismatched([(row,) for row in rows])]

    def compute(lora: Any, share: Share) -> Accumulated:
        own = replace(learned, backend=backend_for(decoder()), share=share)
        return finished(own.accumulate(lora, [*rows, *others], RowMix()))

    check(size, compute)

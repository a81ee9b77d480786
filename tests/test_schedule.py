"""Schedules: equal to transformers' at every step, and the peak is the highest of all steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from fortwo.train.schedule import SCHEDULES, peak_rate, rate_at

NEED_STATE_OR_ARGUMENTS = {
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
}


def theirs(schedule: str, rate: float, warmup: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 1), (0, 48), (3, 48), (1, 2), (125, 2500), (125, 15), (15, 15), (14, 15), (1, 1)]
)
def test_equal_to_transformers_at_every_step(schedule: str, warmup: int, steps: int) -> None:
    ours = [rate_at(step, schedule=schedule, rate=5e-5, warmup=warmup, steps=steps) for step in range(steps)]
    assert ours == theirs(schedule, 5e-5, warmup, steps)


def test_every_name_of_transformers_is_honoured_or_known_to_need_more() -> None:
    assert set(SCHEDULES) | NEED_STATE_OR_ARGUMENTS == {kind.value for kind in SchedulerType}
    assert not set(SCHEDULES) & NEED_STATE_OR_ARGUMENTS


@given(
    schedule=st.sampled_from(SCHEDULES),
    rate=st.floats(1e-6, 1),
    warmup=st.integers(0, 60),
    steps=st.integers(1, 50),
)
def test_peak_is_the_highest_of_all_steps(schedule: str, rate: float, warmup: int, steps: int) -> None:
    ran = [rate_at(step, schedule=schedule, rate=rate, warmup=warmup, steps=steps) for step in range(steps)]
    assert peak_rate(schedule=schedule, rate=rate, warmup=warmup, steps=steps) == max(ran)

"""The learning rate of each step: the schedules of transformers under their names, in plain arithmetic.

Steps count from 0, and step 0 of a warm-up has rate 0, as in transformers. The operations have the same order as in
transformers, so the rates are equal to the last bit.
"""

from __future__ import annotations

import math

from fortwo.records import Plan

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
POLYNOMIAL_END = 1e-7  # transformers' lr_end, the last rate of "polynomial"


def learning_rate(step: int, plan: Plan) -> float:
    """The rate of optimizer step `step` of the plan, 0 <= step < steps."""
    return rate_at(
        step,
        schedule=plan["lr_scheduler_type"],
        rate=plan["learning_rate"],
        warmup=plan.computed["warmup_steps"],
        steps=plan.computed["steps"],
        cycles=plan["num_cycles"],
    )


def peak_rate(*, schedule: str, rate: float, warmup: int, steps: int) -> float:
    """The highest rate of all steps, since no schedule rises after its warm-up."""
    return rate_at(min(warmup, steps - 1), schedule=schedule, rate=rate, warmup=warmup, steps=steps)


def rate_at(step: int, *, schedule: str, rate: float, warmup: int, steps: int, cycles: int = 1) -> float:
    """The rate of a step. cycles: transformers' num_cycles, the number of times that cosine_with_restarts falls to 0.
    Raises ValueError for an unknown schedule."""
    if schedule == "constant":
        return rate
    if step < warmup:
        return rate * (step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    match schedule:
        case "linear":
            return rate * ((steps - step) / max(1, steps - warmup))
        case "cosine":
            return rate * (0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
        case "cosine_with_restarts":
            return rate * (0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))
        case "polynomial":
            return rate * (((rate - POLYNOMIAL_END) * (1 - progress) + POLYNOMIAL_END) / rate)
        case "constant_with_warmup":
            return rate
        case "inverse_sqrt":
            timescale = warmup if warmup > 0 else 10_000
            return rate * (1.0 / math.sqrt((step + timescale - warmup) / timescale))
    raise ValueError(schedule)

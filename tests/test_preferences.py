"""Training on preferences: what is learned from which rows, in however many passes, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fortwo.execution.backend import Backend
from fortwo.records import Plan, Setting
from fortwo.train.losses import Row
from fortwo.train.preferences import Preferences

T = TypeVar("T")


def finished(run: Generator[Any, None, T]) -> T:
    """What a generator returns."""
    while True:
        try:
            next(run)
        except StopIteration as returned:
            return returned.value  # type: ignore[no-any-return]


def learning(backend: Backend, objective: Any, **values: Any) -> Preferences:
    """A run on preferences with these settings."""
    options = {
        "beta": 0.1,
        "loss_type": "kto" if objective == "kto" else "sigmoid",
        "label_smoothing": 0.0,
        "reference_free": False,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "micro_step_tokens": 10_000,
        "gradient_checkpointing": False,
    } | values
    settings = tuple(Setting(name, value, "user", "given") for name, value in options.items())
    return Preferences(backend, Plan("tiny", "a", objective, {}, settings, {}), ())


def compared(learned: Preferences, rows: Sequence[Row]) -> list[Row]:
    """The rows with what the reference gives them."""
    found = finished(learned.log_probs([(row,) for row in rows], learned.reference))
    return [replace(row, reference=value) for row, value in zip(rows, found, strict=True)]

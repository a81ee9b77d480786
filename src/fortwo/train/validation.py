"""Rows that are held back from training: which, and when their loss ends a run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def held_back(rows: int, split: float) -> int:
    """How many of so many rows: at least one where any share is asked for."""
    return max(1, round(rows * split)) if split > 0 else 0


def places(rows: int, held: int, seed: int) -> frozenset[int]:
    """Which rows are held back: drawn at random, the same ones for the same seed."""
    return frozenset(Random(f"validation {seed}").sample(range(rows), held))


def patience_ends(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` evaluations all were no better than the best before them (transformers'
    EarlyStoppingCallback)."""
    best = min(range(len(losses)), key=losses.__getitem__)
    return len(losses) - 1 - best >= patience

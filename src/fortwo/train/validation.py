"""Validation: which rows are not trained on, and when their loss ends a run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def validation_size(rows: int, split: float, together: int = 1) -> int:
    """The number of validation rows among `rows`, if the share `split` is above 0: at least one group of `together`
    rows that follow each other."""
    return together * max(1, round(rows // together * split)) if split > 0 else 0


def validation_indices(rows: int, size: int, seed: int, together: int = 1) -> frozenset[int]:
    """The indices of the validation rows, drawn at random; the same seed gives the same ones. together: so many rows
    that follow each other are drawn as one."""
    drawn = Random(f"validation {seed}").sample(range(rows // together), size // together)
    return frozenset(first * together + place for first in drawn for place in range(together))


def patience_exhausted(losses: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` losses is lower than the best before them (transformers'
    EarlyStoppingCallback)."""
    best = min(range(len(losses)), key=losses.__getitem__)
    return len(losses) - 1 - best >= patience

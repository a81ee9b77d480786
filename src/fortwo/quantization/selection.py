"""Which format of the frozen weights multiplies how many rows: the decision, and the file of what was measured.

Torch-free: `fortwo doctor` reads the same file. Formats are named as in `formats`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fortwo import disk

FORMATS = ("fp32", "bf16", "int8", "gguf", "int4", "nf4")  # the most exact first
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
GAIN = 1.1  # a format that is not this much faster than a more exact one is not worth it

Seconds = Mapping[str, Mapping[int, float]]  # by format and rows: the products of one forward


@dataclass(frozen=True)
class Choice:
    """table: (rows, format) in rising order; a format is for as many rows and fewer, the last one for more, too."""

    table: tuple[tuple[int, str], ...]

    @classmethod
    def fixed(cls, weight_format: str) -> Choice:
        return cls(((1, weight_format),))

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(weight_format for _, weight_format in self.table))

    def format_for(self, rows: int) -> str:
        for most, weight_format in self.table:
            if rows <= most:
                return weight_format
        return self.table[-1][1]


def worthwhile(errors: Mapping[str, float], nbytes: Mapping[str, int], most: float) -> list[str]:
    """Formats whose error is at most `most`, without those that another is both nearer and smaller than."""
    return [
        name
        for name, error in errors.items()
        if error <= most and not any(errors[one] < error and nbytes[one] <= nbytes[name] for one in errors)
    ]


def choose(seconds: Seconds, nbytes: Mapping[str, int], bound: float, keep: str | None = None) -> Choice:
    """The fastest format for each number of rows, out of those formats that together fit `bound` bytes.

    keep: a format that is held in any case. Of several sets of formats the one with the least time over all numbers of
    rows is taken (as ratios, so that few rows count as much as many), and a larger or less exact set only where it
    gains. Where nothing fits, the smallest format.
    """
    held = {keep} if keep is not None else set()
    best: Choice | None = None
    best_cost = math.inf
    for size in range(1, len(seconds) + 1):
        for names in combinations([weight_format for weight_format in FORMATS if weight_format in seconds], size):
            if sum(nbytes[name] for name in held.union(names)) > bound:
                continue
            table = tuple((rows, _fastest({name: seconds[name][rows] for name in names})) for rows in ROWS)
            cost = sum(math.log(seconds[weight_format][rows]) for rows, weight_format in table) / len(table)
            if cost < best_cost - math.log(GAIN):
                best, best_cost = Choice(table), cost
    return best or Choice.fixed(min(nbytes, key=lambda name: nbytes[name]))


def _fastest(seconds: Mapping[str, float]) -> str:
    limit = GAIN * min(seconds.values())
    return next(name for name in FORMATS if name in seconds and seconds[name] <= limit)


@dataclass(frozen=True)
class Measured:
    """What one machine needed for the products of one model's shape."""

    model: str
    processor: str
    threads: int
    seconds: dict[str, dict[int, float]]
    choice: tuple[tuple[int, str], ...]


_FILE = TypeAdapter(dict[str, Measured])


class Measurements:
    """home/measured.json. What cannot be read is measured again."""

    def __init__(self, home: Path) -> None:
        self._file = home / "measured.json"

    def all(self) -> dict[str, Measured]:
        """By key: processor, kernels, threads and shape of the model."""
        try:
            return _FILE.validate_json(self._file.read_bytes())
        except (OSError, ValidationError):
            return {}

    def put(self, key: str, measured: Measured) -> None:
        """Add a measurement, or replace the one of this key. Raises OSError."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        disk.replace(self._file, _FILE.dump_json(self.all() | {key: measured}, indent=2))

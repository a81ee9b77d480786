"""The share of every step that one process computes, where several processes compute a step together.

Each of them has all rows of the step, so that it knows what the losses are means over, and computes the gradient of its
own share alone. The sum of the shares' gradients is the gradient of the step. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """rank: the number of this process among `size`, from 0. add_up: takes numbers of this process and returns their
    sums over all processes, each of which calls it with as many."""

    rank: int = 0
    size: int = 1
    add_up: Callable[[list[float]], list[float]] = list

    def of(self, items: Sequence[T], tokens: Callable[[T], int]) -> list[T]:
        """The items of this process, in their order. Each item, the longest first, goes to the process that has the
        fewest tokens so far. All processes find the same shares."""
        loads, own = [0] * self.size, list[int]()
        for number in sorted(range(len(items)), key=lambda number: -tokens(items[number])):
            rank = loads.index(min(loads))
            loads[rank] += tokens(items[number])
            if rank == self.rank:
                own.append(number)
        return [items[number] for number in sorted(own)]


WHOLE = Share()

"""When memory that a job freed is returned to the system."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fortwo.engine import malloc_tuning
from fortwo.engine.malloc_tuning import LARGEST, STEPS, Holes

PLAIN, ACTIVATIONS = 300 << 20, 600 << 20  # bytes: what is never the allocator's, and what a step frees at its end


class Machine:
    """A process whose memory is numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used, self.holes, self.trims = 1 << 30, 0, 0
        self.freed = 0  # at the end of a step
        self.scratch = 0  # what each step takes and frees before one looks
        monkeypatch.setattr(malloc_tuning, "trim", self.trim)
        self.watched = Holes(lambda: self.used + self.freed + self.holes + self.scratch + PLAIN, lambda: self.used)

    def trim(self) -> None:
        self.trims += 1
        self.holes = self.freed = self.scratch = 0

    def step(self, times: int = 1) -> None:
        """Forward and backward, each with a look at what is free."""
        for _ in range(times):
            self.scratch = 2 * LARGEST
            self.watched.after_step()
            self.used, self.freed = self.used - ACTIVATIONS, ACTIVATIONS
            self.watched.after_step()
            self.used, self.freed = self.used + ACTIVATIONS, 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_what_each_step_frees_and_takes_again_is_kept(machine: Machine) -> None:
    machine.step(10 * STEPS)
    assert machine.trims == 0


def test_holes_are_returned_once_they_are_large(machine: Machine) -> None:
    machine.step(STEPS)
    machine.holes = LARGEST
    machine.step(STEPS)
    assert machine.trims == 0
    machine.holes += 1
    machine.step(STEPS)
    assert (machine.trims, machine.holes) == (1, 0)
    machine.step(10 * STEPS)
    assert machine.trims == 1


def test_a_job_that_makes_way_leaves_nothing_and_the_next_one_starts_anew(machine: Machine) -> None:
    machine.holes = 10 * LARGEST
    machine.watched.close()
    assert (machine.trims, machine.holes) == (1, 0)
    machine.holes = 10 * LARGEST  # of whatever ran in between
    machine.step(4 * STEPS)
    assert machine.trims == 1


def test_where_nobody_tells_what_is_allocated_memory_is_returned_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, times = Machine(monkeypatch), iter(range(1000, 2000, 5))
    watched = Holes(lambda: 0, lambda: None, lambda: next(times))
    trims = []
    for _ in range(12):
        watched.after_step()
        trims.append(machine.trims)
    assert trims == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not tell what is used")
def test_the_allocator_tells_what_is_used() -> None:
    before = malloc_tuning._allocated_bytes()
    held = torch.ones(25 << 20)
    after = malloc_tuning._allocated_bytes()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(held.nbytes, rel=0.05)
    assert malloc_tuning._resident_bytes() > held.nbytes

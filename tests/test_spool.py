"""A spool returns the rows that were appended, in any order, from memory and from disk, and their common prefix."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data import spool as module
from fortwo.data.spool import Spool
from fortwo.errors import StorageFailed
from fortwo.nn.packing import common_prefix

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(st.lists(st.tuples(TOKENS, st.randoms())), st.sampled_from([1, 64, 1 << 20]))
def test_rows_come_back_as_they_were(made: list[tuple[list[int], object]], memory: int) -> None:
    rows = [(tokens, [rng.random() < 0.5 for _ in tokens]) for tokens, rng in made]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MEMORY_BYTES", memory)
        spool = Spool()
    for row in rows:
        spool.append(*row)
    assert len(spool) == len(rows)
    assert [spool[index] for index in reversed(range(len(rows)))] == rows[::-1]
    assert spool.prefix == (common_prefix([tokens for tokens, _ in rows]) if rows else 0)


def test_the_largest_token_survives() -> None:
    spool = Spool()
    spool.append([2**31 - 1, 0], [False, True])
    assert spool[0] == ([2**31 - 1, 0], [False, True])


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, _place: int) -> None: ...
        def write(self, _bytes: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool()
    monkeypatch.setattr(spool, "_file", Full())
    with pytest.raises(StorageFailed) as caught:
        spool.append([1], [True])
    assert "No space left" in caught.value.message
    assert "TMPDIR" in str(caught.value.hint)

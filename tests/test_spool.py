"""A spool gives back what was put in, in any order, in memory and on disk, and knows what all rows begin with."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data import spool
from fortwo.data.spool import Spool
from fortwo.errors import StorageFailed
from fortwo.nn.packing import common_prefix

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@given(st.lists(st.tuples(TOKENS, st.randoms())), st.sampled_from([1, 64, 1 << 20]))
def test_rows_come_back_as_they_were(made: list[tuple[list[int], object]], memory: int) -> None:
    rows = [(tokens, [rng.random() < 0.5 for _ in tokens]) for tokens, rng in made]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "MEMORY_BYTES", memory)
        kept = Spool()
    for row in rows:
        kept.append(*row)
    assert len(kept) == len(rows)
    assert [kept[place] for place in reversed(range(len(rows)))] == rows[::-1]
    assert kept.prefix == (common_prefix([tokens for tokens, _ in rows]) if rows else 0)


def test_the_largest_token_survives() -> None:
    kept = Spool()
    kept.append([2**31 - 1, 0], [False, True])
    assert kept[0] == ([2**31 - 1, 0], [False, True])


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, _place: int) -> None: ...
        def write(self, _bytes: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    kept = Spool()
    monkeypatch.setattr(kept, "_file", Full())
    with pytest.raises(StorageFailed) as caught:
        kept.append([1], [True])
    assert "No space left" in caught.value.message
    assert "TMPDIR" in str(caught.value.hint)

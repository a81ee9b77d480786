"""Rows of tokens with their masks, kept small: in memory while they are few, in a file without a name beyond that.

Four bytes a token. The file is the process's own and is gone with it.
"""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Sequence

from fortwo.errors import StorageFailed

MEMORY_BYTES = 64 << 20


class Spool:
    """Rows are appended, then read in any order.

    prefix: how many tokens all rows begin with; at least one token of each is left over.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - lives as long as the spool
        weakref.finalize(self, self._file.close)
        self._ends = array("Q")  # bytes
        self._shared: list[int] | None = None

    @property
    def prefix(self) -> int:
        return 0 if self._shared is None else len(self._shared)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, tokens: Sequence[int], supervised: Sequence[bool]) -> None:
        """Raises StorageFailed when there is no room."""
        packed = array("I", (token << 1 | mask for token, mask in zip(tokens, supervised, strict=True))).tobytes()
        end = self._ends[-1] if self._ends else 0
        try:
            self._file.seek(end)
            self._file.write(packed)
        except OSError as error:
            raise StorageFailed(
                f"The rows cannot be kept while they are trained on: {error.strerror}.",
                hint=f"Free some space in {tempfile.gettempdir()}, or choose another folder with TMPDIR.",
            ) from None
        self._ends.append(end + len(packed))
        shared = list(tokens[:-1]) if self._shared is None else self._shared
        limit = min(len(shared), len(tokens) - 1)
        self._shared = shared[: next((n for n in range(limit) if shared[n] != tokens[n]), limit)]

    def __getitem__(self, place: int) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them are supervised."""
        begin = self._ends[place - 1] if place else 0
        self._file.seek(begin)
        packed = array("I", self._file.read(self._ends[place] - begin))
        return [one >> 1 for one in packed], [bool(one & 1) for one in packed]

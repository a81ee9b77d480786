"""Storage for rows of tokens and their loss masks: in memory while they are few, then in a temporary file.

A token takes four bytes. The file is deleted when the process ends.
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

    prefix: the length in tokens of the longest common prefix of all rows, at most one less than the shortest row.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - lives as long as the spool
        weakref.finalize(self, self._file.close)
        self._ends = array("Q")  # byte offset behind each row
        self._shared: list[int] | None = None

    @property
    def prefix(self) -> int:
        return 0 if self._shared is None else len(self._shared)

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, tokens: Sequence[int], supervised: Sequence[bool]) -> None:
        """Add a row and its loss mask, of equal lengths. Raises StorageFailed when the temporary file cannot grow."""
        packed = array("I", (token << 1 | mask for token, mask in zip(tokens, supervised, strict=True))).tobytes()
        end = self._ends[-1] if self._ends else 0
        try:
            self._file.seek(end)
            self._file.write(packed)
        except OSError as error:
            raise StorageFailed(
                f"The training rows cannot be written to a temporary file: {error.strerror}.",
                hint=f"Free some space in {tempfile.gettempdir()}, or choose another folder with TMPDIR.",
            ) from None
        self._ends.append(end + len(packed))
        shared = list(tokens[:-1]) if self._shared is None else self._shared
        limit = min(len(shared), len(tokens) - 1)
        self._shared = shared[: next((n for n in range(limit) if shared[n] != tokens[n]), limit)]

    def __getitem__(self, index: int) -> tuple[list[int], list[bool]]:
        """The tokens of a row, and for each of them whether it is supervised."""
        begin = self._ends[index - 1] if index else 0
        self._file.seek(begin)
        packed = array("I", self._file.read(self._ends[index] - begin))
        return [item >> 1 for item in packed], [bool(item & 1) for item in packed]

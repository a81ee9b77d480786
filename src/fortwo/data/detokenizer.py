"""Text of a reply, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Detokenizer:
    """Text of a reply while it is generated. The bytes of an incomplete character wait until it is complete."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)  # the tokens emitted last, as context for the decoder, then the pending ones
        self._emitted = len(context)  # how many tokens of the window were emitted

    def push(self, token: int) -> str:
        """The text that this token completes; it may be empty."""
        self._window.append(token)
        new = self._pending()
        if not new or new.endswith("\ufffd"):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return new

    def flush(self) -> str:
        """The rest of the text when the reply has ended; an incomplete character becomes U+FFFD."""
        new = self._pending()
        self._window, self._emitted = [], 0
        return new

    def _pending(self) -> str:
        emitted = self._decode(self._window[: self._emitted])
        return self._decode(self._window)[len(emitted) :]

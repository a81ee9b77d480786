"""A running reply: tokens in, text out, and an end with a reason.

The engine's thread writes; any thread reads, waits or cancels. Knows no weights and no device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fortwo.errors import FortwoError
from fortwo.prompts import Delta, FinishReason, Logprob, Prompt

log = logging.getLogger(__name__)
CONTEXT = 8  # tokens of the prompt that decide how a text that continues it begins


class Detokenizer(Protocol):
    """Tokens to text, one at a time; holds back what is not yet whole characters."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class JsonConstraint(Protocol):
    """Which tokens may be next (V or more, the rest is padding); raises ValueError when none can be named."""

    def allowed(self) -> NDArray[np.bool_]: ...
    def advance(self, token: int) -> None: ...


class Speech(Protocol):
    """What a reply needs of the renderer. stop_ids: tokens that end a reply. stream: `context` holds the tokens that
    the text continues. constraint: raises InvalidRequest."""

    @property
    def stop_ids(self) -> frozenset[int]: ...
    def stream(self, context: Sequence[int] = ()) -> Detokenizer: ...
    def constraint(self, schema: str) -> JsonConstraint: ...


class StopScanner:
    """Lets text through up to the first stop string, wherever its pieces are cut.

    Text that could still become a stop string is held back. The stop string that is complete first wins (of those
    that end together, the longest).
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        shown = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def flush(self) -> str:
        """The text that was held back and did not become a stop string."""
        if self.stopped:
            return ""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Reply:
    """prompts.Generation. `tokens` are all that were generated, a closing stop token included; `text` is without it.

    cached_tokens: how many of the prompt's were not computed, since the cache had them. room: how many tokens fit, by
    max_tokens and the context; with none it ends once the prompt is computed. on_delta is called on the engine's
    thread; when it fails, nobody is listening any more and the reply is cancelled.
    """

    def __init__(
        self,
        prompt: Prompt,
        room: int,
        speech: Speech,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.error: str | None = None
        self.cancel_requested = False
        self.cached_tokens = 0
        self.embedding: tuple[float, ...] = ()
        self.room = room
        self._detokenizer = speech.stream(prompt.tokens[-CONTEXT:]) if prompt.continues else speech.stream()
        self._stop_ids = frozenset[int]() if prompt.sampling.ignore_eos else speech.stop_ids
        self._scanner = StopScanner(prompt.sampling.stop)
        self._on_delta = on_delta
        self._tokens: list[int] = []
        self._untold: list[Logprob] = []  # of tokens whose text was not shown yet
        self._deltas: list[Delta] = []
        self._finish_reason: FinishReason | None = None
        self._changed = threading.Condition()

    # ------------------------------------------------------------ any thread

    @property
    def done(self) -> bool:
        return self._finish_reason is not None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._finish_reason

    @property
    def tokens(self) -> list[int]:
        return list(self._tokens)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in list(self._deltas))

    def cancel(self) -> None:
        """Ask for the end; it comes before the next token."""
        self.cancel_requested = True

    def wait(self, timeout: float | None = None) -> str:
        """The text, once it has ended. Raises FortwoError when it ended in an error, TimeoutError when it did not."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the reply did not end within {timeout} s")
        if self._finish_reason == "error":
            raise FortwoError(f"the generation failed: {self.error}")
        return self.text

    def deltas(self) -> Iterator[Delta]:
        """Every delta from the first, as they come; ends after the one with a finish_reason."""
        seen = 0
        while seen == 0 or self._deltas[seen - 1].finish_reason is None:
            with self._changed:
                while len(self._deltas) == seen:
                    self._changed.wait()
            yield self._deltas[seen]
            seen += 1

    # ------------------------------------------------------------ the engine's thread

    def tell(self, logprobs: Sequence[Logprob], embedding: tuple[float, ...]) -> None:
        """What was asked about the prompt, before the first token."""
        self.embedding = embedding
        self._untold.extend(logprobs)
        self._emit("")

    def push(self, token: int, logprob: Logprob | None = None) -> None:
        """One more token: new text, held-back text, or the end."""
        self._tokens.append(token)
        if token in self._stop_ids:
            self.end("stop")
            return
        if logprob is not None:
            self._untold.append(logprob)
        text = self._scanner.push(self._detokenizer.push(token))
        if self._scanner.stopped:
            self._emit(text, "stop")
        elif len(self._tokens) >= self.room:
            self.end("length", before=text)
        elif text:
            self._emit(text)

    def end(self, reason: FinishReason, error: str | None = None, *, before: str = "") -> None:
        """The end; what was held back is shown, after `before`."""
        if self.done:
            return
        self.error = error
        rest = "" if reason == "error" else self._detokenizer.flush()
        text = before + self._scanner.push(rest)
        if self._scanner.stopped and reason == "length":
            reason = "stop"
        self._emit(text + self._scanner.flush(), reason)

    def _emit(self, text: str, reason: FinishReason | None = None) -> None:
        cut = (
            self._scanner.stopped and not text
        )  # the tokens since the last text are the stop string, which is not said
        told = () if cut else tuple(self._untold)
        self._untold.clear()
        delta = Delta(text, self._tokens[-1] if self._tokens else None, reason, self.error, told)
        with self._changed:
            self._deltas.append(delta)
            self._finish_reason = delta.finish_reason
            self._changed.notify_all()
        if self._on_delta is None:
            return
        try:
            self._on_delta(delta)
        except Exception:
            log.warning("nobody listens to a reply any more; it is cancelled", exc_info=True)
            self._on_delta = None
            self.cancel()

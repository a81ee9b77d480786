"""A running reply: it takes tokens, gives text, and ends with a finish reason.

The engine's thread writes; any thread reads, waits or cancels. This module knows no weights and no device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fortwo.errors import FortwoError
from fortwo.prompts import Delta, FinishReason, Logprob, Prompt

log = logging.getLogger(__name__)
CONTEXT = 8  # tokens of the prompt that decide how the text of a continuation begins


class Detokenizer(Protocol):
    """Turns tokens into text one at a time; holds back what is not yet a whole character."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


class JsonConstraint(Protocol):
    """The tokens that may be next, a mask (V,) or longer, the rest is padding; raises ValueError if there are none."""

    def allowed(self) -> NDArray[np.bool_]: ...
    def advance(self, token: int) -> None: ...


class ReplyTokenizer(Protocol):
    """What a reply needs of the renderer. stop_ids: tokens that end a reply. stream: `context` holds the tokens that
    the text continues, and `shown` control tokens that it shows. constraint, grammar_constraint: of a JSON Schema and
    of a grammar; both raise InvalidRequest."""

    @property
    def stop_ids(self) -> frozenset[int]: ...
    def stream(self, context: Sequence[int] = (), shown: Collection[int] = ()) -> Detokenizer: ...
    def constraint(self, schema: str) -> JsonConstraint: ...
    def grammar_constraint(self, grammar: str) -> JsonConstraint: ...


class StopScanner:
    """Passes text on up to the first stop string, wherever the pieces of text are cut.

    Text that could still become a stop string is held back. The stop string that is complete first wins; of those
    that end at the same place, the longest.
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
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Reply:
    """prompts.Generation. `tokens` are all generated tokens, including a final stop token, which `text` leaves out.

    max_tokens: the most that the request and the context allow; with 0 the reply ends once the prompt is computed.
    cached_tokens: how many of the prompt's tokens came from the cache. on_delta is called on the engine's thread; when
    it raises, the reply is cancelled.
    """

    def __init__(
        self,
        prompt: Prompt,
        max_tokens: int,
        tokenizer: ReplyTokenizer,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> None:
        self.prompt = prompt
        self.error: str | None = None
        self.cause: FortwoError | None = None
        self.cancel_requested = False
        self.cached_tokens = 0
        self.embedding: tuple[float, ...] = ()
        self.max_tokens = max_tokens
        self._detokenizer = tokenizer.stream(prompt.tokens[-CONTEXT:] if prompt.continues else (), prompt.shown)
        self._stop_ids = frozenset[int]() if prompt.sampling.ignore_eos else tokenizer.stop_ids
        self._scanner = StopScanner(prompt.sampling.stop)
        self._on_delta = on_delta
        self._tokens: list[int] = []
        self._pending_logprobs: list[Logprob] = []  # of tokens whose text is still held back
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
        """Ask for the reply to end; it does so before the next token."""
        self.cancel_requested = True

    def wait(self, timeout: float | None = None) -> str:
        """The text, once the reply has ended. timeout: seconds. Raises FortwoError when it ended in an error,
        TimeoutError when it did not end in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"The reply did not end within {timeout} s.")
        if self.cause is not None:
            raise self.cause
        if self._finish_reason == "error":
            raise FortwoError(f"The generation failed: {self.error}")
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

    def add_prompt_outputs(self, logprobs: Sequence[Logprob], embedding: tuple[float, ...]) -> None:
        """Emit what was asked about the prompt, before the first token."""
        self.embedding = embedding
        self._pending_logprobs.extend(logprobs)
        self._emit("")

    def push(self, token: int, logprob: Logprob | None = None) -> None:
        """Add a token. It gives new text, is held back, or ends the reply."""
        self._tokens.append(token)
        if token in self._stop_ids:
            self.end("stop")
            return
        if logprob is not None:
            self._pending_logprobs.append(logprob)
        text = self._scanner.push(self._detokenizer.push(token))
        if self._scanner.stopped:
            self._emit(text, "stop")
        elif len(self._tokens) >= self.max_tokens:
            self.end("length", before=text)
        elif text:
            self._emit(text)

    def end(self, reason: FinishReason, error: str | None = None, *, before: str = "") -> None:
        """End the reply; held-back text is emitted, after `before`. Does nothing when it has already ended."""
        if self.done:
            return
        self.error = error
        rest = "" if reason == "error" else self._detokenizer.flush()
        text = before + self._scanner.push(rest)
        if self._scanner.stopped and reason == "length":
            reason = "stop"
        self._emit(text + self._scanner.flush(), reason)

    def fail(self, cause: FortwoError) -> None:
        """End the reply with this error."""
        if not self.done:
            self.cause = cause
            self.end("error", cause.message)

    def _emit(self, text: str, reason: FinishReason | None = None) -> None:
        # Without text after a stop string, the pending tokens are the stop string itself, which is not reported.
        logprobs = () if self._scanner.stopped and not text else tuple(self._pending_logprobs)
        self._pending_logprobs.clear()
        delta = Delta(text, self._tokens[-1] if self._tokens else None, reason, self.error, logprobs, self.cause)
        with self._changed:
            self._deltas.append(delta)
            self._finish_reason = delta.finish_reason
            self._changed.notify_all()
        if self._on_delta is None:
            return
        try:
            self._on_delta(delta)
        except Exception:
            log.warning("A reply is cancelled because its listener failed.", exc_info=True)
            self._on_delta = None
            self.cancel()

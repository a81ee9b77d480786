"""Log-probabilities in OpenAI's two shapes. A token that is no whole text shows its bytes as \\x.."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

from fortwo.prompts import Logprob
from fortwo.records import Json

Bytes = Callable[[int], bytes]  # of a token


def chat(logprobs: Iterable[Logprob], bytes_of: Bytes) -> Json:
    """{"content": [{token, logprob, bytes, top_logprobs}]}, an entry for each token."""

    def entry(token: int, logprob: float | None) -> Json:
        raw = bytes_of(token)
        return {"token": _shown(raw), "logprob": logprob, "bytes": list(raw)}

    content = [entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """Of one text completion, piece by piece. echo: the text it begins with, which stands for the tokens `echoed`."""

    def __init__(self, bytes_of: Bytes, echo: str = "", echoed: Sequence[int] = ()) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        whole = b"".join(map(bytes_of, echoed)) if echo else b""
        # Below 0 while there is what the text does not show of its tokens: BOS, SentencePiece's space at the beginning.
        self._offset = len(echo) - len(whole.decode(errors="replace"))

    def push(self, logprobs: Iterable[Logprob]) -> Json:
        """{tokens, token_logprobs, top_logprobs, text_offset}: where in the text each of these tokens begins. The token
        itself is among its top_logprobs, as one more if it is not among the likeliest. A prompt's first token has null
        for both."""
        told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            raw = self._bytes_of(one.token)
            told["tokens"].append(_shown(raw))
            told["token_logprobs"].append(one.logprob)
            top = dict(one.top) | {one.token: one.logprob}
            likeliest = {_shown(self._bytes_of(token)): value for token, value in top.items()}
            told["top_logprobs"].append(None if one.logprob is None else likeliest)
            told["text_offset"].append(max(0, self._offset))
            self._offset += len(self._decoder.decode(raw))
        return told


def _shown(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")

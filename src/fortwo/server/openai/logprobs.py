"""Log-probabilities in OpenAI's two formats. Bytes of a token that are not valid UTF-8 are shown as \\x.."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

from fortwo.prompts import Logprob
from fortwo.records import Json

Bytes = Callable[[int], bytes]  # gives the bytes of a token


def chat(logprobs: Iterable[Logprob], bytes_of: Bytes) -> Json:
    """The chat format: {"content": [{token, logprob, bytes, top_logprobs}]}, with an entry for each token."""

    def entry(token: int, logprob: float | None) -> Json:
        raw = bytes_of(token)
        return {"token": _shown(raw), "logprob": logprob, "bytes": list(raw)}

    content = [entry(one.token, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The format of one text completion, delta by delta. echo: the text it begins with, made of the tokens `echoed`."""

    def __init__(self, bytes_of: Bytes, echo: str = "", echoed: Sequence[int] = ()) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        whole = b"".join(map(bytes_of, echoed)) if echo else b""
        # Negative for tokens that the text does not show, such as BOS and SentencePiece's space at the beginning.
        self._offset = len(echo) - len(whole.decode(errors="replace"))

    def push(self, logprobs: Iterable[Logprob]) -> Json:
        """{tokens, token_logprobs, top_logprobs, text_offset}; text_offset is where in the text each token begins.
        top_logprobs include the token itself, in addition to the likeliest. A prompt's first token has null for both
        kinds of logprobs."""
        fields: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in logprobs:
            raw = self._bytes_of(one.token)
            fields["tokens"].append(_shown(raw))
            fields["token_logprobs"].append(one.logprob)
            top = dict(one.top) | {one.token: one.logprob}
            likeliest = {_shown(self._bytes_of(token)): value for token, value in top.items()}
            fields["top_logprobs"].append(None if one.logprob is None else likeliest)
            fields["text_offset"].append(max(0, self._offset))
            self._offset += len(self._decoder.decode(raw))
        return fields


def _shown(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")

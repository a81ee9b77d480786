"""One tokenizer's tokens as bytes, and replies that are JSON by construction.

Under a schema, only tokens that keep the text the beginning of a fitting JSON value may come next; llguidance says
which. White space between JSON's parts is bounded, so that a reply cannot be nothing but that.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fortwo.errors import InvalidRequest, UnsupportedModel

WHITE_SPACE = r"[ \n\t]{0,24}"  # between two parts: a line break and an indentation of some levels


class Vocabulary:
    """stop_ids: the tokens that may follow a complete value. Raises UnsupportedModel for a tokenizer that is built from
    other parts than those of the supported families."""

    def __init__(self, backend: Tokenizer, stop_ids: Iterable[int]) -> None:
        try:
            self._tokens = LLTokenizer(backend.to_str(), eos_token=sorted(stop_ids))
        except ValueError as error:
            raise UnsupportedModel(
                f"what this model's tokens stand for cannot be read from its tokenizer: {error}",
                hint="Ask without response_format and without logprobs.",
            ) from None

    def bytes(self, token: int) -> bytes:
        """What the token stands for, half a character or a control token's name too."""
        return self._tokens.decode_bytes([token]) if token < self._tokens.vocab_size else b""

    def constraint(self, schema: str) -> Constraint:
        """Raises InvalidRequest for a schema that is none, or that says what cannot be enforced."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE})
            matcher = LLMatcher(self._tokens, grammar, log_level=0)
            matcher.compute_bitmask()  # one that never comes to a first token says so only when it is asked for it
            fault = matcher.get_error()
        except ValueError as error:
            fault = str(error)
        if fault:
            raise InvalidRequest(
                f"the schema cannot be followed: {fault.splitlines()[0]}",
                param="response_format.json_schema.schema",
                hint="Correct it, or leave out what is named.",
            )
        return Constraint(matcher)


class Constraint:
    """One reply under a schema: what may come next, given what came."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """For each token of the vocabulary, whether it may be next. Raises ValueError when nothing may be: the schema
        is too complex for the limits of a step."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(f"the schema cannot be followed further: {self._matcher.get_error().splitlines()[0]}")
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(np.bool_)

    def advance(self, token: int) -> None:
        """An allowed token was chosen."""
        self._matcher.consume_token(token)

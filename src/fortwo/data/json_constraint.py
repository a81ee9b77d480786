"""Constrained decoding: replies that follow a JSON schema or a grammar, and the bytes that each token stands for.

llguidance computes which tokens may come next so that the text stays the beginning of a JSON value that fits the
schema, or of a text of the grammar. White space between the parts of JSON is bounded, so that a reply cannot consist of
white space alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fortwo.data.json_schema import WHITE_SPACE, check_patterns
from fortwo.errors import InvalidRequest, UnsupportedModel
from fortwo.prompts import SCHEMA_FAILED


class Vocabulary:
    """The tokens of one tokenizer as bytes. stop_ids: the tokens that may follow a complete JSON value.

    Raises UnsupportedModel for a tokenizer that llguidance cannot read.
    """

    def __init__(self, backend: Tokenizer, stop_ids: Iterable[int]) -> None:
        try:
            self._tokens = LLTokenizer(backend.to_str(), eos_token=sorted(stop_ids))
        except ValueError as error:
            raise UnsupportedModel(
                f"the bytes of this model's tokens cannot be read from its tokenizer: {error}",
                hint="Send the request without response_format, tools and logprobs.",
            ) from None
        named = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
        self._special = {text: number for text, number in named.items() if self._tokens.is_special_token(number)}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token: they may be part of a character, or the name of a control token."""
        return self._tokens.decode_bytes([token]) if token < self._tokens.vocab_size else b""

    def constraint(self, schema: str) -> JsonConstraint:
        """A constraint for one reply. Raises InvalidRequest for a schema that is invalid or cannot be enforced."""
        param = "response_format.json_schema.schema"
        check_patterns(json.loads(schema), param)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE})
        except ValueError as error:
            raise _cannot_follow(str(error), param) from None
        return self._constraint(grammar, param)

    def grammar_constraint(self, grammar: str, param: str = "tools") -> JsonConstraint:
        """A constraint for one reply, of a grammar in llguidance's variant of Lark's syntax. param: what the grammar
        was made of. Raises InvalidRequest for a grammar that is invalid or cannot be enforced."""
        return self._constraint(LLMatcher.grammar_from_lark(grammar), param)

    def split(self, text: str) -> list[str | int]:
        """The text in pieces: the numbers of the tokens that a grammar names by number, and the texts between them."""
        pieces = self._specials.split(text)
        return [self._special.get(piece, piece) for piece in pieces if piece]

    def _constraint(self, grammar: str, param: str) -> JsonConstraint:
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        matcher.compute_bitmask()  # some errors are reported only when the first token is asked for
        if fault := matcher.get_error():
            raise _cannot_follow(fault, param)
        return JsonConstraint(matcher)


def _cannot_follow(fault: str, param: str) -> InvalidRequest:
    if "panic" in fault:
        fault = "it is too large, or has too many parts"
    return InvalidRequest(
        f"the schema cannot be followed: {fault.splitlines()[0]}",
        param=param,
        hint="Correct the schema, or remove the part that the message names.",
    )


class JsonConstraint:
    """The state of one reply that follows a schema or a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """A mask over the vocabulary: whether each token may come next. Raises ValueError when the schema exceeds
        llguidance's limits."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ValueError(f"{SCHEMA_FAILED}: {self._matcher.get_error().splitlines()[0]}")
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(np.bool_)

    def advance(self, token: int) -> None:
        """Append a token, which must be an allowed one, to the reply."""
        self._matcher.consume_token(token)

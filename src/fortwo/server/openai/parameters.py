"""The parameters that chat and text completion requests have in common.

A parameter that is not supported is refused by name. Ranges are OpenAI's; those of vLLM's additions are vLLM's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from fortwo.errors import InvalidRequest
from fortwo.prompts import Prompt, Sampling
from fortwo.records import Json

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

STOPS = 4
CHOICES = 128
TOP_LOGPROBS = 20
MAX_BIASES = 1 << 18  # the largest vocabularies have so many tokens
ANY_OBJECT = '{"type": "object"}'
_SAME_AS_SAMPLING = {"top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos"}


def only(*allowed: Any) -> AfterValidator:
    """For a parameter that is not supported: accepts only null and the values that have no effect."""
    words = " or ".join(json.dumps(value) for value in allowed)
    remedy = f"Leave it out or set it to {words}." if words else "Leave it out."

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise PydanticCustomError("unsupported_parameter", "{remedy}", {"remedy": remedy})
        return value

    return AfterValidator(check)


def at_most(count: int) -> BeforeValidator:
    """For a dictionary: refuses more than `count` entries before it looks at them."""

    def check(given: Any) -> Any:
        if isinstance(given, dict) and len(given) > count:
            raise ValueError(f"it has {len(given)} entries, but at most {count} are allowed")
        return given

    return BeforeValidator(check)


class Strict(BaseModel):
    """Refuses unknown fields, unless they are null, and does not convert types."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in given.items() if value is not None or name in known}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class JsonSchema(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Json = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted and ignored: the reply always conforms to the schema.")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest(
                f"response_format has type {self.type!r} and {'no' if self.json_schema is None else 'a'} json_schema.",
                param="response_format.json_schema",
                hint='Give a json_schema exactly when the type is "json_schema".',
            )
        return self

    def schema_text(self) -> str | None:
        """The JSON Schema of the reply as text; None for free text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return ANY_OBJECT if self.type == "json_object" else None


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given, json_schema_input_type=str | list[str]),
]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_BIASES)
]


def _text_list(given: Any) -> list[str | list[int]]:
    """A list whose items are texts or lists of tokens."""
    texts = [given] if isinstance(given, str) or (given and _are_tokens(given)) else given
    if not isinstance(texts, list) or not all(isinstance(one, str) or _are_tokens(one) for one in texts):
        raise ValueError("it is neither text nor token ids, nor a list of those")
    if not all(texts) or not texts:
        raise ValueError("it is empty")
    for text in texts:
        if isinstance(text, str) and not text.isprintable() and any("\ud800" <= one <= "\udfff" for one in text):
            raise PydanticKnownError("string_unicode")
    return texts


def _are_tokens(given: Any) -> bool:
    return isinstance(given, list) and all(type(one) is int and one >= 0 for one in given)


Texts = Annotated[
    list[Any], PlainValidator(_text_list, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


Model = Annotated[
    str, Field(description="A base model, an adapter (for its current version), adapter@version or adapter@job-step.")
]


class Parameters(Strict):
    """Sampling parameters and the number of replies. Raises InvalidRequest for values that contradict each other."""

    model: Model
    n: int | None = Field(
        None,
        ge=1,
        le=CHOICES,
        description="Replies to each prompt. Default 1. With a seed they use seed, seed + 1, ...",
    )
    stream: bool | None = Field(None, description="Default false.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="Default 1. 0 takes the likeliest token each time.")
    top_k: int | None = Field(None, ge=-1, description="Default 0, off, like -1.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Default 0, off. The least probability, as a share of the likeliest token's."
    )
    seed: int | None = Field(None, description="The same seed gives the same reply, whatever other requests run.")
    stop: Stop | None = Field(None, max_length=STOPS)
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0. For tokens in the reply.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0. For each use in the reply.")
    repetition_penalty: float | None = Field(
        None, gt=0, le=2, description="Default 1, off. Divides the logits of tokens in the prompt or the reply."
    )
    logit_bias: Bias | None = Field(None, description="Maps token ids to what is added to their logits, -100 to 100.")
    response_format: ResponseFormat | None = Field(
        None, description="With json_object or json_schema the reply is such JSON, unless max_tokens cuts it off."
    )
    ignore_eos: bool | None = Field(None, description="Default false. Continue after end tokens, for benchmarks.")
    max_tokens: int | None = Field(None, ge=1)

    user: str | None = Field(None, description="Accepted; has no effect.")
    request_id: str | None = Field(None, description="Accepted; has no effect.")
    priority: int | None = Field(None, description="Accepted; has no effect: requests are served in order.")
    cache_salt: str | None = Field(None, description="Accepted; has no effect.")

    # Parameters of vLLM, with the values that change nothing.
    best_of: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1, 1.0)] = None
    min_tokens: Annotated[Any, only(0)] = None
    stop_token_ids: Annotated[Any, only([])] = None
    bad_words: Annotated[Any, only([])] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    return_token_ids: Annotated[Any, only(False)] = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def limit(self) -> tuple[str, int] | None:
        """The parameter that limits the reply's tokens, and its value; None if it is not given."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        if self.with_usage() and not self.stream:
            raise InvalidRequest(
                "stream_options asks for usage, but stream is not true.",
                param="stream_options",
                hint="Set stream to true.",
            )
        if self.ignore_eos and self.schema_text() is not None:
            raise InvalidRequest(
                "ignore_eos contradicts response_format, because JSON has an end.",
                param="ignore_eos",
                hint="Give only one of them.",
            )
        return self

    def schema_text(self) -> str | None:
        """The JSON Schema of the reply as text; None for free text."""
        return None if self.response_format is None else self.response_format.schema_text()

    def with_usage(self) -> bool:
        """Whether the stream ends with usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def prompts(
        self, target: Target, tokens: list[int], *, param: str, default: int, logprobs: int | None
    ) -> list[Prompt]:
        """One prompt, `n` times. default: the limit of the reply's tokens if the request sets none; param: the name of
        the prompt in error messages; logprobs: as in Sampling.

        Raises InvalidRequest when prompt and reply do not fit the context, or a token does not exist.
        """
        check_known(target, [int(id) for id in self.logit_bias or ()], "logit_bias")
        limit = self.limit()
        left = context_left(target, tokens, param=param, least=1 if limit is None else min(1, limit[1]))
        if limit is not None and limit[1] > left:
            raise InvalidRequest(
                f"{limit[0]} = {limit[1]} does not fit: {param} takes {len(tokens)} of the context's "
                f"{len(tokens) + left} tokens.",
                param=limit[0],
                code="context_length_exceeded",
                hint=f"Ask for at most {left}.",
            )
        longest = min(left, default) if limit is None else limit[1]
        return [
            Prompt(target.model.id, tuple(tokens), target.adapter_key, self._sampling(longest, logprobs, choice))
            for choice in range(self.choices)
        ]

    def _sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> Sampling:
        given: Json = self.model_dump(include=_SAME_AS_SAMPLING, exclude_none=True)
        return Sampling(
            max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed + choice,
            stop=tuple(self.stop or ()),
            logit_bias=tuple((int(id), bias) for id, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
            json_schema=self.schema_text(),
            **given,
        )


def check_length(target: Target, characters: int, param: str) -> None:
    """Raises InvalidRequest for a text that cannot fit the context, however it is cut into tokens: so long a text is
    not tokenised, because that takes seconds and much memory."""
    context = target.model.runner.cache.longest
    longest = context * target.model.renderer.longest_token
    if characters > longest:
        raise InvalidRequest(
            f"{param} has {characters} characters, but the {context} tokens of the context of {target.model.id} hold "
            f"at most {longest}.",
            param=param,
            code="context_length_exceeded",
            hint="Shorten it, or leave out its oldest part.",
        )


def context_left(target: Target, tokens: list[int], *, param: str, least: int) -> int:
    """How many more tokens the context has room for after `tokens`. Raises InvalidRequest when they are fewer than
    `least`, or when one of `tokens` does not exist."""
    check_known(target, tokens, param)
    context = target.model.runner.cache.longest  # less than the model's if FORTWO_CACHE_MB is small
    left = context - len(tokens)
    if left < least:
        raise InvalidRequest(
            f"{param} takes {len(tokens)} tokens, but the context of {target.model.id} has {context}.",
            param=param,
            code="context_length_exceeded",
            hint="Shorten it, or leave out its oldest part.",
        )
    return left


def check_known(target: Target, tokens: list[int], param: str) -> None:
    """Raises InvalidRequest for a token that the model does not have."""
    vocabulary = target.model.decoder.config.vocabulary
    if (foreign := max(tokens, default=0)) >= vocabulary:
        raise InvalidRequest(
            f"{param} has the token {foreign}, but {target.model.id} only has tokens 0 to {vocabulary - 1}.",
            param=param,
            hint="Use ids of this model's own tokenizer.",
        )

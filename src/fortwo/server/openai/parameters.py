"""What a request for replies may say, whether it asks for chat or for text.

A parameter that cannot be honoured is refused by name. Ranges are OpenAI's; for vLLM's additions, vLLM's.
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
ANY_OBJECT = '{"type": "object"}'


def only(*allowed: Any) -> AfterValidator:
    """For a parameter that cannot be honoured yet: null and the values that ask for nothing pass."""
    words = " or ".join(json.dumps(value) for value in allowed)
    remedy = f"Leave it out or set it to {words}." if words else "Leave it out."

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise PydanticCustomError("unsupported_parameter", "{remedy}", {"remedy": remedy})
        return value

    return AfterValidator(check)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class JsonSchema(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Json = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted; the schema is always kept to.")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest(
                f"response_format has type {self.type!r} and {'no' if self.json_schema is None else 'a'} json_schema.",
                param="response_format.json_schema",
                hint='A json_schema belongs to the type "json_schema", and to no other.',
            )
        return self

    def schema_text(self) -> str | None:
        """The JSON Schema of the reply as JSON, None for free text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return ANY_OBJECT if self.type == "json_object" else None


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=str | list[str],
    ),
]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]]


def _several(given: Any) -> list[str | list[int]]:
    """Each a text or its tokens."""
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
    list[Any], PlainValidator(_several, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


Model = Annotated[
    str, Field(description="A base model, an adapter (its current version), adapter@version or adapter@job-step.")
]


class Parameters(Strict):
    model: Model
    n: int | None = Field(
        None,
        ge=1,
        le=CHOICES,
        description="Replies to each prompt, default 1. With a seed they use seed, seed + 1, ...",
    )
    stream: bool | None = Field(None, description="Default false.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(None, ge=-1, description="Default 0: off, as is -1.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Default 0: off. Least probability, as a share of the likeliest token's."
    )
    seed: int | None = Field(None, description="The same seed gives the same reply, whatever else is asked meanwhile.")
    stop: Stop | None = Field(None, max_length=STOPS)
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0. For tokens the reply has.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0. For each time it has them.")
    repetition_penalty: float | None = Field(
        None, gt=0, le=2, description="Default 1: off. Divides the logits of tokens that prompt or reply have."
    )
    logit_bias: Bias | None = Field(None, description="Token id to what is added to its logit, -100 to 100.")
    response_format: ResponseFormat | None = Field(
        None, description="json_object or json_schema: the reply cannot be anything else, unless max_tokens cut it off."
    )
    ignore_eos: bool | None = Field(None, description="Default false. Go on after the end, for measurements.")
    max_tokens: int | None = Field(None, ge=1)

    user: str | None = Field(None, description="Accepted; changes nothing.")

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    def limit(self) -> tuple[str, int] | None:
        """The parameter that bounds the reply, and its value."""
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is given, but stream is not true.", param="stream_options", hint="Set stream to true."
            )
        if self.ignore_eos and self.schema_text() is not None:
            raise InvalidRequest(
                "ignore_eos and response_format contradict each other: JSON has an end.",
                param="ignore_eos",
                hint="Give one of them.",
            )
        return self

    def schema_text(self) -> str | None:
        """The JSON Schema of the reply as JSON, None for free text."""
        return None if self.response_format is None else self.response_format.schema_text()

    def with_usage(self) -> bool:
        """Whether a stream tells usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def prompts(
        self, target: Target, tokens: list[int], *, param: str, otherwise: int, logprobs: int | None
    ) -> list[Prompt]:
        """One prompt, n times. otherwise: longest reply when the request does not say; logprobs as in Sampling.

        Raises InvalidRequest when prompt and reply do not fit the context, or a token does not exist.
        """
        _check_known(target, [int(id) for id in self.logit_bias or ()], "logit_bias")
        limit = self.limit()
        left = room(target, tokens, param=param, least=1 if limit is None else min(1, limit[1]))
        if limit is not None and limit[1] > left:
            raise InvalidRequest(
                f"{limit[0]} = {limit[1]} does not fit: {param} takes {len(tokens)} of {len(tokens) + left} tokens of "
                "context.",
                param=limit[0],
                code="context_length_exceeded",
                hint=f"Ask for at most {left}.",
            )
        longest = min(left, otherwise) if limit is None else limit[1]
        return [
            Prompt(target.model.id, tuple(tokens), target.adapter_key, self._sampling(longest, logprobs, choice))
            for choice in range(self.choices)
        ]

    def _sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> Sampling:
        given: Json = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed + choice,
            "stop": None if self.stop is None else tuple(self.stop),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": tuple((int(id), bias) for id, bias in (self.logit_bias or {}).items()),
            "logprobs": logprobs,
            "json_schema": self.schema_text(),
            "ignore_eos": self.ignore_eos,
        }
        return Sampling(max_tokens, **{name: value for name, value in given.items() if value is not None})


def room(target: Target, tokens: list[int], *, param: str, least: int) -> int:
    """How many tokens the context has beside these. Raises InvalidRequest when it has fewer than `least`, or one of
    these does not exist."""
    _check_known(target, tokens, param)
    context = target.model.runner.cache.longest  # less than the model's where FORTWO_CACHE_MB is small
    left = context - len(tokens)
    if left < least:
        raise InvalidRequest(
            f"{param} takes {len(tokens)} tokens; the context of {target.model.id} is {context}.",
            param=param,
            code="context_length_exceeded",
            hint="Shorten it, or leave out the oldest of it.",
        )
    return left


def _check_known(target: Target, tokens: list[int], param: str) -> None:
    vocabulary = target.model.decoder.config.vocabulary
    if (foreign := max(tokens, default=0)) >= vocabulary:
        raise InvalidRequest(
            f"{param} has token {foreign}; {target.model.id} has tokens 0 to {vocabulary - 1}.",
            param=param,
            hint="Take ids of this model's own tokenizer.",
        )

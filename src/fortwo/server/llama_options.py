"""The sampling options that llama.cpp has, and Ollama from it, as parameters of OpenAI's API.

An option that changes a reply is honoured or refused by name; one that cannot is accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from fortwo.errors import InvalidRequest
from fortwo.records import Json
from fortwo.server.openai.parameters import STOPS, Stop, Strict, only

UNLIMITED = 1 << 31  # more tokens than any context has


class LlamaOptions(Strict):
    """defaults: by the names of OpenAI's parameters; place: where the options are in the request, for errors."""

    defaults: ClassVar[Json] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}  # Ollama's
    place: ClassVar[str] = "options."

    temperature: float | None = Field(None, ge=0, le=2, description="Default 0.8; 0 is greedy.")
    top_k: int | None = Field(None, ge=-1, description="Default 40. 0 and -1 are off.")
    top_p: float | None = Field(None, ge=0, le=1, description="Default 0.9 (Ollama) or 0.95 (llama.cpp).")
    min_p: float | None = Field(None, ge=0, le=1, description="Default 0, off (Ollama), or 0.05 (llama.cpp).")
    seed: int | None = Field(None, description="The same seed gives the same reply. -1, the default, is a random one.")
    stop: Stop | None = Field(None, max_length=STOPS)
    repeat_penalty: float | None = Field(
        None, gt=0, le=2, description="Default 1, off. Divides the logits of tokens in the prompt or the reply."
    )
    repeat_last_n: int | None = Field(
        None, ge=-1, description="-1, the default: penalties are for all tokens. 0: there are none."
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0. For tokens in the reply.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0. For each use in the reply.")

    typical_p: Annotated[Any, only(1, 1.0)] = None
    mirostat: Annotated[Any, only(0)] = None
    mirostat_tau: float | None = Field(None, description="Accepted; has no effect without mirostat.")
    mirostat_eta: float | None = Field(None, description="Accepted; has no effect without mirostat.")

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        penalties = (self.repeat_penalty or 1) != 1 or self.presence_penalty or self.frequency_penalty
        if penalties and self.repeat_last_n not in (None, -1, 0):
            raise InvalidRequest(
                f"{self.place}repeat_last_n = {self.repeat_last_n} is not supported: penalties are for all tokens.",
                param=f"{self.place}repeat_last_n",
                code="unsupported_parameter",
                hint="Leave it out or set it to -1, or to 0 for no penalties.",
            )
        return self

    def sampling(self, max_tokens: int | None) -> Json:
        """The same options under the names of OpenAI's and vLLM's parameters. max_tokens: None or below 0 for no
        limit."""
        off = self.repeat_last_n == 0
        given: Json = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": None if self.seed == -1 else self.seed,
            "stop": self.stop,
            "max_tokens": None if max_tokens is None or max_tokens < 0 else max_tokens,
            "repetition_penalty": None if off else self.repeat_penalty,
            "presence_penalty": None if off else self.presence_penalty,
            "frequency_penalty": None if off else self.frequency_penalty,
        }
        return self.defaults | {name: value for name, value in given.items() if value is not None}


def json_schema(schema: Json) -> Json:
    """OpenAI's response_format for a JSON Schema."""
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": schema}}

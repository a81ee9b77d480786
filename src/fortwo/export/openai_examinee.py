"""Examines a model behind any OpenAI-compatible URL. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx

from fortwo.errors import Unavailable
from fortwo.facts.exam import ExamQuestion, Kept, same_beginning
from fortwo.records import Json, Message

Encode = Callable[[Sequence[Message]], list[int]]  # a conversation's prompt as tokens of the base


class OpenAIExaminee:
    """url: with or without /v1 at its end. key: sent as a bearer token. encode: where the base is on this machine, for
    servers that return log-probabilities of a prompt; retention is then measured as in the report."""

    def __init__(self, url: str, model: str, key: str | None = None, encode: Encode | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=5.0), trust_env=False)
        self._model = model
        self._encode = encode

    def close(self) -> None:
        self._http.close()

    def reply(self, messages: Sequence[Message], tokens: int) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "temperature": 0,
            "max_tokens": tokens,
        }
        answer = self.post("/v1/chat/completions", body)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise self._strange(answer) from None
        return content if isinstance(content, str) else ""

    def retention(self, question: ExamQuestion, tokens: int) -> Kept:
        if self._encode is not None and question.base_tokens:
            prompt = self._encode(question.messages)
            found = self._ranked_first([*prompt, *question.base_tokens], len(question.base_tokens))
            if found is not None:
                return Kept(found, len(question.base_tokens))
            self._encode = None  # this server does not return them
        return same_beginning(question.base, self.reply(question.messages, tokens))

    def _ranked_first(self, tokens: list[int], last: int) -> int | None:
        """How many of the last tokens are the likeliest after those before them; None where the server does not say."""
        body = {"model": self._model, "prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        try:
            found = self.post("/v1/completions", body)["choices"][0]["logprobs"]
            own, top = found["token_logprobs"][: len(tokens)], found["top_logprobs"][: len(tokens)]
            if len(own) < len(tokens):
                return None
            pairs = zip(own[-last:], top[-last:], strict=True)
            return sum(bool(value >= max(likeliest.values())) for value, likeliest in pairs)
        except (Unavailable, KeyError, IndexError, TypeError, ValueError, AttributeError):
            return None

    def post(self, path: str, body: Json) -> Any:
        """The JSON that the server answers. Raises Unavailable where it does not, or answers with an error."""
        try:
            response = self._http.post(f"{self._url}{path}", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"{self._url} cannot be reached: {error}", hint="Check the URL and that the server runs."
            ) from None
        if not response.is_success:
            raise Unavailable(
                f"{self._url}{path} answered with status {response.status_code}: {response.text[:300]}",
                hint="Check --model and --key-env; GET /v1/models lists the models of an OpenAI-compatible server.",
            )
        try:
            return response.json()
        except ValueError:
            raise self._strange(response.text) from None

    def _strange(self, answer: Any) -> Unavailable:
        return Unavailable(
            f"{self._url} gave an answer that is not OpenAI's: {str(answer)[:300]}",
            hint="Name the URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.",
        )

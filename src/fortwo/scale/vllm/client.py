"""The HTTP calls to a vLLM server, and their errors in words that say what to do. Coroutines of one event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from fortwo.errors import FortwoError, InvalidRequest, NotFound, Unavailable
from fortwo.records import Json
from fortwo.scale.vllm import completions

CONNECT_SECONDS = 5.0
SHORT_SECONDS = 60.0  # for calls that compute no reply
RUNTIME_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True)
class ServedModel:
    """What vLLM says about the base that it serves. name: as requests name it; root: the directory or the repository
    that it was loaded from; context: its --max-model-len, None where it does not say; adapters: their folders, by
    name."""

    name: str
    root: str
    context: int | None
    adapters: Mapping[str, str]


class VllmClient:
    """url: of the server, with or without /v1. api_key: the one of its --api-key. silence: seconds without a token
    after which a reply is given up."""

    def __init__(self, url: str, api_key: str | None, silence: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(silence, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def model(self) -> ServedModel:
        """Raises Unavailable where the server does not answer or is not vLLM."""
        answer = await self._send("GET", "/v1/models", None)
        if answer.status_code in (401, 403):
            raise Unavailable(
                f"vLLM at {self.url} refuses the API key.",
                param="vllm_api_key",
                hint="Set FORTWO_VLLM_API_KEY to the key of its --api-key.",
            )
        try:
            cards = answer.json()["data"]
            base = next(card for card in cards if not card.get("parent"))
            adapters = {card["id"]: str(card["root"]) for card in cards if card.get("parent")}
            return ServedModel(base["id"], str(base.get("root") or base["id"]), base.get("max_model_len"), adapters)
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise completions.strange(answer.text) from None

    async def version(self) -> str:
        """Of vLLM; empty where it does not say. Raises Unavailable."""
        answer = await self._send("GET", "/version", None)
        try:
            return str(answer.json()["version"])
        except (ValueError, KeyError, TypeError):
            return ""

    async def load(self, name: str, folder: Path) -> None:
        """Have vLLM load the adapter in `folder` as `name`; nothing happens where it has one of this name. Raises
        InvalidRequest for what it cannot load, NotFound for a folder that it cannot read, and Unavailable for a server
        that is not reached or was not started for adapters."""
        body = {"lora_name": name, "lora_path": str(folder)}
        answer = await self._send("POST", "/v1/load_lora_adapter", body)
        message = self._message(answer)
        if answer.is_success or "has already been loaded" in message:
            return
        raise self._load_error(name, folder, answer.status_code, message)

    def _load_error(self, name: str, folder: Path, status: int, message: str) -> FortwoError:
        if status in (404, 405) and message in ("Not Found", "Method Not Allowed"):
            return Unavailable(
                f"vLLM at {self.url} loads no adapters while it runs.",
                hint=f"Start it with the environment variable {RUNTIME_UPDATING}=1.",
                code="vllm_without_runtime_updating",
            )
        if "lora is not enabled" in message.lower() or "enable_lora" in message or "enable-lora" in message:
            return Unavailable(
                f"vLLM at {self.url} serves no adapters.",
                hint="Start it with --enable-lora and --max-lora-rank.",
                code="vllm_without_lora",
            )
        if "No adapter found" in message or "No such file" in message or "Permission denied" in message:
            return NotFound(
                f"vLLM at {self.url} cannot read {folder}.",
                hint="Put FORTWO_HOME where vLLM's machine, container and user see it under the same path.",
                code="vllm_cannot_read_store",
            )
        return InvalidRequest(
            f"vLLM refuses the adapter {name}: {message.rstrip('.')}.",
            param="model",
            hint="Train it again without what vLLM names, export it as merged, or serve it with FORTWO_ENGINE=own.",
        )

    async def unload(self, name: str) -> None:
        """Have vLLM forget the adapter; nothing happens where it has none of this name. Raises Unavailable."""
        await self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def prompt_outputs(self, body: Json) -> Json:
        """The answer to `completions.prompt_outputs`. Raises NotFound where vLLM has no model of that name, else as
        `stream`."""
        answer = await self._send("POST", "/v1/completions", body, wait=None)
        if not answer.is_success:
            raise self._refusal(answer.status_code, answer)
        found: Json = answer.json()
        return found

    async def stream(self, body: Json) -> AsyncGenerator[str, None]:
        """The data of the stream's events, without the last one, which says only that it is the last. Raises NotFound
        where vLLM has no model of that name, InvalidRequest for what it refuses, and Unavailable."""
        try:
            async with self._http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise self._refusal(answer.status_code, answer)
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield line[6:]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    async def _send(
        self, method: str, path: str, body: Json | None, wait: float | None = SHORT_SECONDS
    ) -> httpx.Response:
        timeout = httpx.USE_CLIENT_DEFAULT if wait is None else httpx.Timeout(wait, connect=CONNECT_SECONDS)
        try:
            return await self._http.request(method, f"{self.url}{path}", json=body, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> Unavailable:
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            return Unavailable(
                f"vLLM at {self.url} cut the connection ({reason}).",
                hint="Ask again when it is back.",
                code="vllm_gone",
            )
        return Unavailable(
            f"vLLM at {self.url} cannot be reached: {reason}.",
            hint="Start it, or set FORTWO_VLLM_URL to the address that it listens on.",
            code="vllm_unreachable",
        )

    def _refusal(self, status: int, answer: httpx.Response) -> FortwoError:
        message = self._message(answer)
        if status == 404 and "does not exist" in message:
            return NotFound(
                f"vLLM at {self.url} does not serve it: {message}",
                param="model",
                hint="Ask again. If it stays so, another program unloads adapters of this vLLM.",
            )
        return completions.refused({"message": message, "code": status})

    @staticmethod
    def _message(answer: httpx.Response) -> str:
        try:
            body = answer.json()
        except ValueError:
            return answer.text
        error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
        return str(error.get("message", error) if isinstance(error, dict) else error)

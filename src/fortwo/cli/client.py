"""The server as the command line sees it: JSON in, JSON out, errors as they came.

Owns HTTP and the reading of event streams; knows nothing of terminals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from fortwo.errors import FortwoError, Unavailable
from fortwo.records import Json
from fortwo.settings import Settings

ENDED = ("succeeded", "failed", "cancelled")
AT_REST = (*ENDED, "paused")


class Refused(FortwoError):
    """The server's own error, passed on word for word."""

    def __init__(self, error: Json) -> None:
        super().__init__(
            error.get("message", ""), param=error.get("param"), hint=error.get("hint"), code=error.get("code")
        )


class Client:
    """One connection to the server that `settings` names."""

    def __init__(self, settings: Settings) -> None:
        headers = {}
        if settings.api_key is not None:
            headers["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
        # Loading a base or answering a long prompt takes as long as it takes; connecting to loopback does not.
        timeout = httpx.Timeout(None, connect=5.0)
        self._http = httpx.Client(base_url=settings.url, headers=headers, timeout=timeout, trust_env=False)
        self._url = settings.url

    def get(self, path: str) -> Any:
        return self._call("GET", path)

    def post(self, path: str, body: Json | None = None) -> Any:
        return self._call("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def answers(self) -> bool:
        """Whether a server is there at all."""
        try:
            return self._http.get("/healthz").is_success
        except httpx.TransportError:
            return False

    def chat(self, body: Json) -> Iterator[str]:
        """The pieces of a streamed reply."""
        try:
            for data in self._stream("POST", "/v1/chat/completions", body=body | {"stream": True}):
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Refused(chunk["error"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
        except httpx.TransportError as error:
            raise self._lost(error) from None

    def events(self, job_id: str) -> Iterator[Json]:
        """What happens to a job, from its beginning until it rests; a lost connection is taken up where it broke."""
        last = 0
        while True:
            try:
                headers = {"Last-Event-ID": str(last)} if last else {}
                for data in self._stream("GET", f"/api/training/jobs/{job_id}/events", headers=headers):
                    event: Json = json.loads(data)
                    last = event["id"]
                    yield event
            except (httpx.ReadError, httpx.RemoteProtocolError):
                continue
            if self.get(f"/api/training/jobs/{job_id}")["status"] in AT_REST:
                return

    def _stream(
        self, method: str, path: str, *, body: Json | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[str]:
        """The data of each server-sent event."""
        try:
            with self._http.stream(method, path, json=body, headers=headers) as response:
                if not response.is_success:
                    response.read()
                    raise _refusal(response)
                lines: list[str] = []
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        lines.append(line[5:].removeprefix(" "))
                    elif not line and lines:
                        yield "\n".join(lines)
                        lines = []
        except httpx.ConnectError:
            raise self._nobody() from None

    def _call(self, method: str, path: str, body: Json | None = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.ConnectError:
            raise self._nobody() from None
        except httpx.TransportError as error:
            raise self._lost(error) from None
        if not response.is_success:
            raise _refusal(response)
        return response.json() if response.content else None

    def _nobody(self) -> Unavailable:
        return Unavailable(
            f"No server answers at {self._url}.",
            hint="Start one with `fortwo serve`; FORTWO_HOST and FORTWO_PORT say where to look.",
        )

    def _lost(self, error: httpx.TransportError) -> Unavailable:
        return Unavailable(f"The connection to {self._url} broke: {error}", hint="Does the server still run?")


def _refusal(response: httpx.Response) -> FortwoError:
    try:
        return Refused(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return Unavailable(
            f"{response.url} answered {response.status_code}: {response.text[:200]}",
            hint="Is it fortwo that listens on this port?",
        )

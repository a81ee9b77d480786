"""HTTP client of the server: JSON requests, event streams, and the server's errors as exceptions.

It knows nothing of terminals.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

from fortwo.errors import FortwoError, InvalidRequest, Unavailable
from fortwo.records import Json

ENDED = ("succeeded", "failed", "cancelled")
RECONNECT_SECONDS = 0.5
AT_REST = (*ENDED, "paused")  # states in which no more events come


class Refused(FortwoError):
    """An error that the server answered with, word for word."""

    def __init__(self, error: Json) -> None:
        super().__init__(
            error.get("message", ""), param=error.get("param"), hint=error.get("hint"), code=error.get("code")
        )


def text_of(chunk: Json) -> str:
    """The text in a chunk of a streamed reply."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


class Client:
    """A connection to the server at `url`. Methods raise Refused for the server's errors, Unavailable when it does not
    answer."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # No limit for answers: loading a base or generating a long reply may take long. Connecting does not.
        timeout = httpx.Timeout(None, connect=5.0)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._url = url

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON that the server answers; None for an empty body or one of plain text. So do `post` and `delete`."""
        return self._call("GET", path)

    def post(self, path: str, body: Json | None = None) -> Any:
        return self._call("POST", path, body)

    def put(self, path: str, body: Json | None = None) -> Any:
        return self._call("PUT", path, body)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def text(self, path: str) -> str:
        """The body of a response that is not JSON."""
        return self._response("GET", path).text

    def answers(self) -> bool:
        """Whether a server answers at this URL."""
        try:
            return self._http.get("/healthz").is_success
        except httpx.TransportError:
            return False

    def chat(self, body: Json) -> Iterator[Json]:
        """The chunks of a streamed reply. body: as of /v1/chat/completions."""
        try:
            for data in self._stream("POST", "/v1/chat/completions", body=body | {"stream": True}):
                if data == "[DONE]":
                    return
                chunk: Json = json.loads(data)
                if "error" in chunk:
                    raise Refused(chunk["error"])
                yield chunk
        except httpx.TransportError as error:
            raise self._lost(error) from None

    def events(self, job_id: str) -> Iterator[Json]:
        """A job's events from the first until it has ended or is paused. Reconnects after a lost connection."""
        last = 0
        while True:
            try:
                headers = {"Last-Event-ID": str(last)} if last else {}
                for data in self._stream("GET", f"/api/training/jobs/{job_id}/events", headers=headers):
                    event: Json = json.loads(data)
                    if "error" in event:  # the server is shutting down
                        raise Refused(event["error"])
                    last = event["id"]
                    yield event
            except (httpx.ReadError, httpx.RemoteProtocolError):
                time.sleep(RECONNECT_SECONDS)
                self.get(f"/api/training/jobs/{job_id}")  # ends it where no server answers any more
                continue
            if self.get(f"/api/training/jobs/{job_id}")["status"] in AT_REST:
                return

    def _stream(
        self, method: str, path: str, *, body: Json | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[str]:
        """The data of each server-sent event of a response."""
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
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise self._not_running() from None
        except UnicodeEncodeError as error:
            raise _not_utf8(error) from None

    def _call(self, method: str, path: str, body: Json | None = None) -> Any:
        response = self._response(method, path, body)
        is_text = response.headers.get("content-type", "").startswith("text/plain")
        return response.json() if response.content and not is_text else None

    def _response(self, method: str, path: str, body: Json | None = None) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise self._not_running() from None
        except UnicodeEncodeError as error:
            raise _not_utf8(error) from None
        except httpx.TransportError as error:
            raise self._lost(error) from None
        if not response.is_success:
            raise _refusal(response)
        return response

    def _not_running(self) -> Unavailable:
        return Unavailable(
            f"No server answers at {self._url}.",
            hint="Start one with `fortwo serve`, or set FORTWO_HOST and FORTWO_PORT to where it runs.",
        )

    def _lost(self, error: httpx.TransportError) -> Unavailable:
        return Unavailable(
            f"The connection to {self._url} was lost: {error}", hint="Check whether the server still runs."
        )


def _not_utf8(error: UnicodeEncodeError) -> InvalidRequest:
    """error: of text with bytes that are not UTF-8, which Python hands on as lone surrogates."""
    shown = error.object[max(error.start - 20, 0) : error.end]
    return InvalidRequest(f"The text {shown!r} is not UTF-8.", hint="Write it in UTF-8.")


def _refusal(response: httpx.Response) -> FortwoError:
    try:
        return Refused(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return Unavailable(
            f"{response.url} answered with status {response.status_code}: {response.text[:200]}",
            hint="Check that it is fortwo that listens on this port.",
        )

"""Access control: everyone with the API key, or, if there is no key, this machine only.

Without a key the server listens on loopback only, and web pages of other sites must not reach it through the user's
browser: their requests carry the page's Origin or, after DNS rebinding to 127.0.0.1, the site's name as Host. A page of
another server on this machine is another site too: its Origin has another port.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fortwo.errors import FortwoError, InvalidRequest, Unauthorized
from fortwo.server import docs, page
from fortwo.server.errors import respond
from fortwo.server.request_body import SAFE_METHODS

# They are the same on every server, and a browser must be able to open the page that asks for the key.
OPEN_PATHS = ("/healthz", "/health", "/readyz", docs.PAGE_PATH, docs.OPENAPI_PATH, page.PAGE)
OPEN_FOLDERS = (f"{docs.FILES_PATH}/", f"{page.FILES}/")


class ForeignSite(FortwoError):
    code = "foreign_site"
    type = "permission_error"
    status = 403


def check_binding(host: str, api_key: str | None) -> None:
    """Raises InvalidRequest for a host that other machines can reach if there is no key, and for an empty key."""
    if api_key is None:
        if not is_loopback(host):
            raise InvalidRequest(
                f"host = {host!r} can be reached from other machines, but there is no api_key.",
                param="host",
                hint="Set FORTWO_API_KEY, or listen on 127.0.0.1.",
            )
    elif not api_key:
        raise InvalidRequest("api_key is empty.", param="api_key", hint="Set FORTWO_API_KEY to a secret, or unset it.")


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, can only be this machine."""
    name = host.removeprefix("[").removesuffix("]")
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class SecurityMiddleware:
    """ASGI middleware: answers 401 without the right key; if there is no key, 403 for a foreign Host, Origin or
    Sec-Fetch-Site."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if self._key is None:
                refused = self._check_local(scope["method"], headers)
            else:
                refused = self._check_key(headers, scope["path"])
            if refused is not None:
                challenge = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
                await respond(refused, challenge)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_key(self, headers: Headers, path: str) -> FortwoError | None:
        assert self._key is not None
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            return None
        return Unauthorized(
            "The API key is missing or wrong.", hint="Send the header Authorization: Bearer <FORTWO_API_KEY>."
        )

    def _check_local(self, method: str, headers: Headers) -> FortwoError | None:
        host, origin, site = (headers.get(name) for name in ("host", "origin", "sec-fetch-site"))
        if host is not None and not is_loopback(_hostname(f"//{host}")):  # no browser leaves Host out
            return ForeignSite(
                f"Host {host!r} is not this machine. Without an API key only this machine is served.",
                hint="Use http://127.0.0.1, or set FORTWO_API_KEY and send it.",
            )
        if origin is not None and not is_same_origin(origin, host):
            return ForeignSite(
                f"Origin {origin!r} is not this server. Without an API key only its own pages are served.",
                hint="Call the server from its own page or from a program, or set FORTWO_API_KEY and send it.",
            )
        if site in ("cross-site", "same-site") and method not in SAFE_METHODS:
            return ForeignSite(
                f"Sec-Fetch-Site {site!r} says that the page of another server sent this {method}.",
                hint="Call the server from its own page or from a program, or set FORTWO_API_KEY and send it.",
            )
        return None


def is_same_origin(origin: str, host: str | None) -> bool:
    """Whether a browser's Origin header names the server that its Host header names: the same host and port. Port 80 of
    http and 443 of https may be left out of both."""
    try:
        page, server = urlsplit(origin), urlsplit(f"{urlsplit(origin).scheme}://{host or ''}")
        usual = {"http": 80, "https": 443}[page.scheme]
        ours = (server.hostname, server.port or usual)
        return page.hostname is not None and (page.hostname, page.port or usual) == ours
    except (KeyError, ValueError):
        return False


def _hostname(url: str) -> str:
    """The host name in a URL; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

"""Access control: everyone with the API key, or, if there is no key, this machine only.

Without a key the server listens on loopback only, and web pages of other sites must not reach it through the user's
browser: their requests carry the page's Origin or, after DNS rebinding to 127.0.0.1, the site's name as Host.
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

# They are the same on every server, and a browser must be able to open the page that asks for the key.
OPEN_PATHS = ("/healthz", docs.PAGE_PATH, docs.OPENAPI_PATH, page.PAGE)
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
    """ASGI middleware: answers 401 without the right key; if there is no key, 403 for a foreign Host or Origin."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refused = self._check_local(headers) if self._key is None else self._check_key(headers, scope["path"])
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

    def _check_local(self, headers: Headers) -> FortwoError | None:
        for name, host in (("Host", f"//{headers.get('host', '')}"), ("Origin", headers.get("origin"))):
            if host is not None and not is_loopback(_hostname(host)):
                return ForeignSite(
                    f"{name} {headers[name]!r} is not this machine. Without an API key only this machine is served.",
                    hint="Use http://127.0.0.1, or set FORTWO_API_KEY and send it.",
                )
        return None


def _hostname(url: str) -> str:
    """The host name in a URL; empty if there is none, as in the `null` origin of a sandboxed page."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

"""Who may talk to the server: a key for all, or, without one, this machine alone.

Without a key the server listens on loopback only, and a web page of another site must not reach it through the
user's browser: its requests carry the page's Origin, or, when the site's name was pointed at 127.0.0.1, its Host.
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
from fortwo.settings import Settings

# The same on every server, saying nothing of this one: so a browser can open the page that asks for the key.
OPEN_PATHS = ("/healthz", docs.PAGE, docs.DOCUMENT, page.PAGE)
OPEN_FOLDERS = (f"{docs.FILES}/", f"{page.FILES}/")


class ForeignSite(FortwoError):
    code = "foreign_site"
    type = "permission_error"
    status = 403


def check_binding(settings: Settings) -> None:
    """Refuse to listen where others can connect, unless there is a key."""
    if settings.api_key is None:
        if not is_loopback(settings.host):
            raise InvalidRequest(
                f"host = {settings.host!r} lets other machines in, and there is no api_key.",
                param="host",
                hint="Set FORTWO_API_KEY, or listen on 127.0.0.1.",
            )
    elif not settings.api_key.get_secret_value():
        raise InvalidRequest("api_key is empty.", param="api_key", hint="Set FORTWO_API_KEY to a secret, or unset it.")


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, is this machine's own and no other's."""
    name = host.removeprefix("[").removesuffix("]")
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware: refuses what `check` refuses, before any route sees it."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._key = None if settings.api_key is None else settings.api_key.get_secret_value().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refused = self._without_key(headers) if self._key is None else self._with_key(headers, scope["path"])
            if refused is not None:
                challenge = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
                await respond(refused, challenge)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _with_key(self, headers: Headers, path: str) -> FortwoError | None:
        assert self._key is not None
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            return None
        return Unauthorized(
            "The API key is missing or wrong.", hint="Send the header Authorization: Bearer <FORTWO_API_KEY>."
        )

    def _without_key(self, headers: Headers) -> FortwoError | None:
        for name, host in (("Host", f"//{headers.get('host', '')}"), ("Origin", headers.get("origin"))):
            if host is not None and not is_loopback(_hostname(host)):
                return ForeignSite(
                    f"{name} {headers[name]!r} is not this machine; without an API key only this machine is served.",
                    hint="Use http://127.0.0.1, or set FORTWO_API_KEY and send it.",
                )
        return None


def _hostname(url: str) -> str:
    """Empty when there is none to read, as in the `null` origin of a sandboxed page."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

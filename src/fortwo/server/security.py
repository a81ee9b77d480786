"""Access control: everyone with an API key, or, if there is no key, this machine only.

FORTWO_API_KEY may do everything. A key of `fortwo keys create` may do what its scopes say, within its limits. A server
that started without any key lets this machine call without one, but a key that is sent counts there too.

Without a key the server listens on loopback only, and web pages of other sites must not reach it through the user's
browser: their requests carry the page's Origin or, after DNS rebinding to 127.0.0.1, the site's name as Host. A page of
another server on this machine is another site too: its Origin has another port.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fortwo.errors import Forbidden, FortwoError, InvalidRequest, Unauthorized
from fortwo.jobs.api_keys import PREFIX, ApiKey
from fortwo.server import docs, page
from fortwo.server.errors import respond
from fortwo.server.key_usage import KeyUsage, RateLimited
from fortwo.server.request_body import SAFE_METHODS
from fortwo.server.scopes import needed_scope

# They are the same on every server, and a browser must be able to open the page that asks for the key.
OPEN_PATHS = ("/healthz", "/health", "/readyz", docs.PAGE_PATH, docs.OPENAPI_PATH, page.PAGE)
OPEN_FOLDERS = (f"{docs.FILES_PATH}/", f"{page.FILES}/")


class ForeignSite(Forbidden):
    code = "foreign_site"


class MissingScope(Forbidden):
    code = "missing_scope"


def needs_key(host: str, api_key: str | None, created: bool) -> bool:
    """Whether every request needs a key. created: whether there are keys of `fortwo keys create`. Raises InvalidRequest
    for a host that other machines can reach if there is no key, and for an empty api_key."""
    if api_key == "":
        raise InvalidRequest("api_key is empty.", param="api_key", hint="Set FORTWO_API_KEY to a secret, or unset it.")
    if api_key is None and not created and not is_loopback(host):
        raise InvalidRequest(
            f"host = {host!r} can be reached from other machines, but there is no API key.",
            param="host",
            hint="Make one with `fortwo keys create`, set FORTWO_API_KEY, or listen on 127.0.0.1.",
        )
    return api_key is not None or created


def check_api_key(created: ApiKey | None) -> None:
    """created: the key of `fortwo keys create` that FORTWO_API_KEY is, if it is one. Raises InvalidRequest for one,
    because it would be allowed everything, without its limits."""
    if created is not None:
        raise InvalidRequest(
            f"api_key is the key {created.name!r}, which has {_scopes(created)}, but the api_key of a server may do "
            "everything.",
            param="api_key",
            hint="Unset FORTWO_API_KEY where the server starts: it knows its keys from the database.",
        )


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
    """ASGI middleware: answers 401 without a right key, 403 for a key without the scope, 429 for a key at its limit; on
    a server without keys, 403 for a foreign Host, Origin or Sec-Fetch-Site.

    api_key: FORTWO_API_KEY; keyed: whether every request needs a key; usage: of the keys in the database."""

    def __init__(self, app: ASGIApp, api_key: str | None, keyed: bool, usage: KeyUsage) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._keyed = keyed
        self._usage = usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            key = await self._check(scope["method"], scope["path"], Headers(scope=scope))
        except FortwoError as error:
            await _refuse(error, scope, receive, send)
            return
        if key is None:
            await self._app(scope, receive, send)
        else:
            await self._run_with(key, scope, receive, send)

    async def _run_with(self, key: ApiKey, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._usage.run(key, lambda: self._app(scope, receive, send_and_note))
        except (RateLimited, Unauthorized) as error:
            if not started:  # otherwise the server closes the connection in the middle of the response
                await _refuse(error, scope, receive, send)

    async def _check(self, method: str, path: str, headers: Headers) -> ApiKey | None:
        """The key of the database that the request came with, if it did. Raises the refusal of the request."""
        if not self._keyed and (foreign := self._check_local(method, headers)) is not None:
            raise foreign
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return None
        token = _bearer_token(headers)
        if token and self._api_key is not None and hmac.compare_digest(token.encode("latin-1"), self._api_key):
            return None
        is_key = token.startswith(PREFIX)
        if not is_key and not self._keyed:
            return None
        key = await self._usage.find(token) if is_key else None
        if key is None:
            raise Unauthorized(
                "The API key is missing, wrong or revoked.",
                hint="Send the header Authorization: Bearer KEY, where KEY is FORTWO_API_KEY of the server or was made "
                "with `fortwo keys create`. The command line sends its own FORTWO_API_KEY.",
            )
        needed = needed_scope(method, path)
        if not key.allows(needed):
            raise MissingScope(
                f"The API key {key.name!r} has {_scopes(key)}, but {method} {path} needs the scope {needed}.",
                hint=f"Use a key with this scope. To make one: fortwo keys create NAME --scope {needed}",
            )
        return key

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


async def _refuse(error: FortwoError, scope: Scope, receive: Receive, send: Send) -> None:
    challenge = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    await respond(error, challenge)(scope, receive, send)


def _bearer_token(headers: Headers) -> str:
    """The token of the header Authorization; empty if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _scopes(key: ApiKey) -> str:
    return f"the {'scope' if len(key.scopes) == 1 else 'scopes'} {', '.join(key.scopes)}"


def _hostname(url: str) -> str:
    """The host name in a URL; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

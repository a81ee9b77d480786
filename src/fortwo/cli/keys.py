"""`fortwo keys`: API keys with scopes and limits, in the database of the home. No server needs to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fortwo.cli import views
from fortwo.cli.terminal import AsJson, error_screen, respond
from fortwo.display import value

if TYPE_CHECKING:
    from fortwo.jobs.api_keys import ApiKeyStore

keys = typer.Typer(help="API keys with scopes and limits.", no_args_is_help=True)
KEPT_NOWHERE = (
    "The key is shown only now. A server that was started without any key asks for keys after its next start."
)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is called.")],
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="read, chat, train or admin; give it again.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", help="Beyond it: status 429.", show_default="no limit")
    ] = None,
    concurrent: Annotated[
        int | None,
        typer.Option("--concurrent", help="Requests at the same time, streams included.", show_default="no limit"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it. It counts at once."""
    with _opened() as store:
        key = store.create(name, scope or [], requests_per_minute, concurrent)
    respond({"name": name, "key": key}, Text(key, overflow="ignore", no_wrap=True), as_json)
    error_screen.print(KEPT_NOWHERE, style="dim")


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List the API keys. The keys themselves are stored nowhere."""
    with _opened() as store:
        found = store.all()
    rows = views.table("name", "scopes", "requests a minute", "concurrent", "created")
    for key in found:
        limits = (value(limit) for limit in (key.requests_per_minute, key.concurrent))
        rows.add_row(key.name, ", ".join(key.scopes), *limits, views.moment(key.created_at))
    body = [{name: value for name, value in asdict(key).items() if name != "digest"} for key in found]
    respond({"keys": body}, rows, as_json)


@keys.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument(help="Name of the key.")], as_json: AsJson = False) -> None:
    """Revoke an API key. Requests with it are refused at once, and those under way end."""
    with _opened() as store:
        store.revoke(name)
    respond({"name": name, "revoked": True}, f"The key {name} is revoked.", as_json)


@contextmanager
def _opened() -> Iterator[ApiKeyStore]:
    """The keys of the database that the settings name."""
    from fortwo.home import home_id, make_home
    from fortwo.jobs.api_keys import ApiKeyStore
    from fortwo.jobs.store import JobStore
    from fortwo.settings import load

    settings = load()
    make_home(settings.home)
    store = JobStore(settings.database, home_id(settings.home))
    try:
        yield ApiKeyStore(store)
    finally:
        store.close()

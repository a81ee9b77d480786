"""The commands that handle versions of adapters: what is current, named, protected, restored, pruned and compared.

They belong to `fortwo adapters`.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group

from fortwo.cli import views
from fortwo.cli.terminal import AsJson, connect, respond

versions = typer.Typer()


@versions.command("restore")
def restore_adapter(name: str, as_json: AsJson = False) -> None:
    """Bring back a deleted version as NAME@VERSION, or all deleted versions of NAME."""
    body = connect().post(f"/api/adapters/{name}/restore")
    ids = [f"{one['name']}@{one['version']}" for one in body["restored"]]
    respond(body, f"Restored: {', '.join(ids)}.", as_json)


@versions.command("promote")
def promote_adapter(version: str, as_json: AsJson = False) -> None:
    """Make a version, as NAME@VERSION, the current one."""
    current = connect().post(f"/api/adapters/{version}/promote")
    respond(current, f"{current['name']} is now {current['name']}@{current['version']}.", as_json)


@versions.command("tag")
def tag_adapter(version: str, tag: str, as_json: AsJson = False) -> None:
    """Let NAME@TAG mean a version, which is given as NAME@VERSION."""
    tagged = connect().put(f"/api/adapters/{version}/tags/{tag}")
    respond(tagged, f"{tagged['name']}@{tag} is now {tagged['name']}@{tagged['version']}.", as_json)


@versions.command("untag")
def untag_adapter(name: str, tag: str, as_json: AsJson = False) -> None:
    """Forget a tag of an adapter."""
    body = connect().delete(f"/api/adapters/{name}/tags/{tag}")
    respond(body, f"{name} has no tag {tag} any more.", as_json)


@versions.command("protect")
def protect_adapter(version: str, as_json: AsJson = False) -> None:
    """Protect a version, as NAME@VERSION, from deletion."""
    respond(connect().put(f"/api/adapters/{version}/protection"), f"{version} is protected.", as_json)


@versions.command("unprotect")
def unprotect_adapter(version: str, as_json: AsJson = False) -> None:
    """Allow that a version, as NAME@VERSION, is deleted."""
    body = connect().delete(f"/api/adapters/{version}/protection")
    respond(body, f"{version} is no longer protected.", as_json)


@versions.command("prune")
def prune_adapters(
    keep: Annotated[int, typer.Option("--keep", min=0, help="How many newest versions of each adapter stay.")] = 3,
    apply: Annotated[bool, typer.Option("--apply", help="Remove them. Without it they are only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove versions that nothing needs: neither current, tagged nor protected, nor a parent of another one."""
    body = connect().post("/api/adapters/prune", {"keep": keep, "dry_run": not apply})
    rows = views.table("version", "bytes", "why")
    for one in body["versions"]:
        rows.add_row(one["id"], views.size(one["bytes"]), one["why"])
    note = [] if apply else ["Nothing was removed. To remove these: fortwo adapters prune --apply"]
    respond(body, Group(rows, *note) if rows.row_count else "There is nothing to remove.", as_json)


@versions.command("compare")
def compare_adapters(left: str, right: str, as_json: AsJson = False) -> None:
    """Compare two versions, each as NAME@VERSION: metrics, settings, probes and weights."""
    body = connect().get(f"/api/adapters/{left}/compare?other={right}")
    respond(body, views.comparison(body), as_json)


@versions.command("rollback")
def rollback_adapter(name: str, as_json: AsJson = False) -> None:
    """Make the previous version of an adapter current again."""
    current = connect().post(f"/api/adapters/{name}/rollback")
    respond(current, f"{name} is now {current['name']}@{current['version']}.", as_json)

"""`fortwo backup` and `fortwo restore`: a home as one file, and a home from such a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fortwo.cli import views
from fortwo.cli.terminal import AsJson, respond

backups = typer.Typer()


@backups.command("backup")
def backup_home(
    file: Annotated[Path, typer.Argument(help="The file to write, which does not exist yet.")], as_json: AsJson = False
) -> None:
    """Write the home's database, adapters, uploaded files and catalog of bases into one file. A server may run."""
    from fortwo.jobs.backup import backup
    from fortwo.settings import load

    made = backup(load(), file)
    body = {"file": str(file), "files": len(made.files), "bytes": made.bytes}
    respond(body, f"{file} has {len(made.files):,} files, {views.size(made.bytes)}.", as_json)


@backups.command("restore")
def restore_home(
    file: Annotated[Path, typer.Argument(help="A file that `fortwo backup` wrote.")], as_json: AsJson = False
) -> None:
    """Make an empty home from a backup, whole or not at all. Weights of bases are fetched again when they are used."""
    from fortwo.hub.catalog import Catalog
    from fortwo.jobs.restore import restore
    from fortwo.settings import load

    settings = load()
    made = restore(settings, file)
    missing = Catalog(settings.models_dir).missing_sources()
    body = {"home": str(settings.home), "files": len(made.files), "bytes": made.bytes, "missing_bases": missing}
    lines = [f"{settings.home} has {len(made.files):,} files, {views.size(made.bytes)}."]
    lines += [f"The base {id} comes from {source}, which is not on this machine." for id, source in missing.items()]
    respond(body, "\n".join(lines), as_json)

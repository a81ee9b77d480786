"""A dataset of the Hugging Face hub on the command line: hub:OWNER/NAME[@REVISION][:PART] in place of a file."""

from __future__ import annotations

from urllib.parse import quote

from fortwo.cli import views
from fortwo.cli.terminal import connect, error_screen
from fortwo.records import Json

PREFIX = "hub:"


def hub_dataset(text: str) -> Json:
    """The dataset of a request, at the commit that the server found. What the server will download is shown first, on
    the error output. Raises what the server answers for a dataset that there is not."""
    found = connect().get(f"/api/data/hub?hub={quote(text)}")
    licence = "no licence given" if found["licence"] is None else f"licence {found['licence']}"
    files = ", ".join(file["name"] for file in found["files"])
    error_screen.print(f"{found['hub']}: {views.size(found['bytes'])}, {licence}; files: {files}", soft_wrap=True)
    return {"hub": found["hub"]}

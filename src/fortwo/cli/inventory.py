"""The commands that list, show, load and remove models and adapters, and that show datasets.

The catalog of models and datasets can be read without a server; everything else needs one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from fortwo import hardware
from fortwo.cli import views
from fortwo.cli.terminal import AsJson, connect, error_screen, respond, screen
from fortwo.errors import Conflict

if TYPE_CHECKING:
    from fortwo.hub.catalog import Catalog
    from fortwo.records import Json


def _catalog() -> Catalog:
    from fortwo.hub.catalog import Catalog
    from fortwo.settings import load

    return Catalog(load().models_dir)


def check_free(id: str) -> None:
    """Raises Conflict when an adapter has this name: a request's `model` must mean one thing."""
    from fortwo.adapters.store import AdapterStore
    from fortwo.settings import load

    if id in AdapterStore(load().adapters_dir).names():
        raise Conflict(
            f"there is an adapter {id!r} already", param="id", hint="Choose another id, or delete the adapter first."
        )


def _group(help: str) -> typer.Typer:
    return typer.Typer(help=help, no_args_is_help=True)


models = _group("List, show, add, fetch, load, unload and remove base models.")
adapters = _group("List, show, load, unload, delete and roll back adapters.")
data = _group("Show datasets.")


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the base models, and which are on disk or loaded."""
    client = connect()
    found: list[Json] = client.get("/api/models")["models"] if client.answers() else _models_on_disk()
    rows = views.table("model", "state", "parameters", "size", "digest", "source", wrapped=("source",))
    for one in found:
        digest = "-" if one["digest"] is None else one["digest"][:12]
        rows.add_row(
            one["id"], one["state"], views.count(one["parameters"]), views.size(one["bytes"]), digest, one["source"]
        )
    damaged = [one["error"] for one in found if one["error"] is not None]
    shown = Group(rows, *(views.error(one["message"], one["hint"]) for one in damaged))
    respond({"models": found}, shown, as_json)


def _models_on_disk() -> list[Json]:
    """The models of the catalog as the server would list them, for when none runs."""
    catalog = _catalog()
    found = []
    for entry in catalog.entries():
        info, damage = catalog.model_info(entry.id), catalog.damage(entry.id)
        state = "on disk" if info is not None else "not fetched" if damage is None else "damaged"
        found.append(
            {
                "id": entry.id,
                "state": state,
                "parameters": None if info is None else info.parameters,
                "bytes": None if info is None else info.bytes,
                "digest": None if info is None else info.digest,
                "source": entry.source,
                "error": None if damage is None else damage.body()["error"],
            }
        )
    return found


@models.command("catalog")
def show_catalog(as_json: AsJson = False) -> None:
    """List the bases that can be fetched by name: licence, size, and whether this machine's memory is enough."""
    from fortwo.hub.bundled import BUNDLED
    from fortwo.settings import load
    from fortwo.train.fit import fit

    memory = hardware.memory_bytes()
    rows = views.table("model", "parameters", "on disk", "to serve", "to teach", "licence", wrapped=("licence",))
    bases = []
    for id, base in BUNDLED.items():
        found = fit(base.config, load().weights, memory)
        assert found is not None
        serve = f"{views.size(found.serve)}, {found.serving}"
        teach = f"{views.size(found.teach)}, {found.teaching}"
        disk = found.parameters * base.bytes_per_parameter
        rows.add_row(id, views.count(found.parameters), views.size(disk), serve, teach, base.licence)
        verdicts = {"serving": found.serving, "teaching": found.teaching}
        bases.append({"id": id, "bytes_on_disk": disk, "licence": base.licence, **asdict(found), **verdicts})
    note = f"This machine has {views.size(memory)} of memory. To download one: fortwo models fetch ID"
    respond({"memory": memory, "models": bases}, Group(rows, note), as_json)


@models.command("show")
def show_model(id: str, as_json: AsJson = False) -> None:
    """Show a base model and the adapters that were trained on it, as JSON. Needs a server."""
    respond(connect().get(f"/api/models/{id}"), None, as_json)


@models.command("remove")
def remove_model(id: str, as_json: AsJson = False) -> None:
    """Remove a base model that you added, and what was prepared from it; your own files stay. Of a model of the catalog
    only the downloaded files are removed."""
    client, left = connect(), []
    if client.answers():
        left = client.delete(f"/api/models/{id}")["adapters"]
    else:
        _catalog().remove(id)
    kept = f"\nThese adapters stay on disk and can be used when it is added again: {', '.join(left)}" if left else ""
    respond({"id": id, "deleted": True, "adapters": left}, f"{id} is removed.{kept}", as_json)


@models.command("add")
def add_model(
    id: Annotated[str, typer.Argument(help="Id of the new model.")],
    path: Annotated[
        str, typer.Argument(help="A directory saved by transformers, a .gguf file, or hf:OWNER/REPO[@REVISION].")
    ],
    as_json: AsJson = False,
) -> None:
    """Add a base model of your own to the catalog. Of a path nothing is copied. A repository of the Hugging Face hub is
    downloaded; its size and licence are shown before."""
    from fortwo.hub.huggingface import PREFIX, HubSource

    check_free(id)
    if not path.startswith(PREFIX):
        entry = _catalog().add(id, Path(path).resolve())
        told = f"{entry.id} was added to the catalog. Its source is {entry.source}"
        respond({"id": entry.id, "source": entry.source, "directory": None}, told, as_json)
        return
    source = HubSource.parse(path, id)
    found = source.repository()
    licence = "no licence given" if found.licence is None else f"licence {found.licence}"
    told = f"{found.repo_id} at commit {found.revision}: {views.size(found.bytes)}, {licence}"
    (error_screen if as_json else screen).print(told)
    entry = _catalog().add(id, HubSource(found.repo_id, id, found.revision))
    directory = _fetch(id)
    body = {"id": id, "source": entry.source, "directory": str(directory)}
    respond(body, f"{id} is ready in {directory}", as_json)


@models.command("fetch")
def fetch_model(
    id: Annotated[str | None, typer.Argument(help="Id of the model.", show_default="the default base")] = None,
    as_json: AsJson = False,
) -> None:
    """Download, verify and prepare a base model. What an interrupted download left is used."""
    from fortwo.settings import load

    chosen = load().default_model if id is None else id
    directory = _fetch(chosen)
    respond({"id": chosen, "directory": str(directory)}, f"{chosen} is ready in {directory}", as_json)


def _fetch(id: str) -> Path:
    from fortwo.cli.terminal import progress_bars

    with progress_bars(error_screen) as progress:
        return _catalog().prepare(id, progress)


@models.command("load")
def load_model(id: str, as_json: AsJson = False) -> None:
    """Load a base model into the server."""
    respond(connect().post(f"/api/models/{id}/load"), f"{id} is loaded.", as_json)


@models.command("unload")
def unload_model(id: str, as_json: AsJson = False) -> None:
    """Unload a base model and the adapters on it from the server."""
    respond(connect().post(f"/api/models/{id}/unload"), f"{id} is unloaded.", as_json)


@adapters.command("list")
def list_adapters(as_json: AsJson = False) -> None:
    """List all adapters and their versions."""
    columns = ("adapter", "current", "tags", "state", "base", "parent", "made", "digest")
    rows = views.table(*columns, wrapped=("adapter", "tags", "base", "parent"))
    found = connect().get("/api/adapters")
    for one in found["adapters"]:
        made = views.moment(one["created_at"])
        id = f"{one['name']}@{one['version']}"
        current, parent = "✓" if one["current"] else "", one["parent"] or ""
        tags = ", ".join([*one["tags"], *(["protected"] if one["protected"] else [])])
        rows.add_row(id, current, tags, one["state"], one["base_model"], parent, made, one["digest"][:12])
    respond(found, rows, as_json)


@adapters.command("show")
def show_adapter(name: str, as_json: AsJson = False) -> None:
    """Show an adapter's versions and the manifest of the current one, as JSON."""
    respond(connect().get(f"/api/adapters/{name}"), None, as_json)


@adapters.command("import")
def import_adapter(
    path: Annotated[
        str,
        typer.Argument(help="A directory that PEFT saved, its adapter_model.safetensors, or hf:OWNER/REPO@REVISION."),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the adapter.", show_default="the folder's or repository's")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="If the name exists, add a new version to it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter that was trained elsewhere, and load it."""
    from fortwo.cli.staging import name_of, staged
    from fortwo.cli.terminal import progress_bars
    from fortwo.settings import load

    chosen = name_of(path) if name is None else name
    with progress_bars(error_screen) as progress, staged(path, load(), progress) as directory:
        body = {"lora_name": chosen, "lora_path": str(directory), "load_inplace": replace}
        progress("load", 0, 1)
        connect().post("/v1/load_lora_adapter", body)
        progress("load", 1, 1)
    respond({"name": chosen}, f"{chosen} is published and loaded.", as_json)


@adapters.command("export")
def export_adapter(
    name: Annotated[str, typer.Argument(help="Adapter, or adapter@version.")],
    to: Annotated[str, typer.Option("--to", help="peft, merged, gguf-lora, gguf, ollama, mlx or vllm.")],
    quantization: Annotated[
        str | None,
        typer.Option("--quantization", help="Of gguf and ollama: Q4_K_M, Q8_0, F16, ...", show_default="F16"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A new folder.", show_default="NAME-VERSION-FORM")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    exam: Annotated[bool, typer.Option(help="Run the adapter's exam again in the exported form.")] = True,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for another program, and run its exam there again. Needs no server."""
    from fortwo.adapters.shared import open_store
    from fortwo.cli.terminal import progress_bars
    from fortwo.export.exporter import check_form, export
    from fortwo.settings import load

    check_form(to, quantization)
    settings = load()
    store = open_store(settings.adapters_dir, settings.adapters_url)
    version = store.get(name)
    folder = Path(f"{version.name}-{version.version}-{to}") if output is None else output
    with progress_bars(error_screen) as progress:
        done = export(
            version.id,
            to,
            folder.absolute(),
            _catalog(),
            store,
            progress,
            quantization=quantization,
            overwrite=overwrite,
            with_exam=exam,
        )
    told = Group(f"{version.id} is exported to {done.output}", *done.notes)
    metrics = None
    if done.exam is not None and done.result is not None:
        told = Group(views.exam(done.exam, done.result, to), told)
        metrics = {name: asdict(metric) for name, metric in done.result.metrics.items()}
    body = {"adapter": version.id, "output": str(done.output), "notes": list(done.notes), "metrics": metrics}
    respond(body, told, as_json)


@adapters.command("load")
def load_adapter(name: str, as_json: AsJson = False) -> None:
    """Load an adapter, and its base if necessary, into the server."""
    respond(connect().post(f"/api/adapters/{name}/load"), f"{name} is loaded.", as_json)


@adapters.command("unload")
def unload_adapter(name: str, as_json: AsJson = False) -> None:
    """Unload an adapter from the server; it stays on disk."""
    respond(connect().post(f"/api/adapters/{name}/unload"), f"{name} is unloaded.", as_json)


@adapters.command("delete")
def delete_adapter(
    name: str,
    permanently: Annotated[bool, typer.Option("--permanently", help="It cannot be restored afterwards.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an adapter, or one version as NAME@VERSION. For 7 days it can be restored."""
    body = connect().delete(f"/api/adapters/{name}" + ("?permanently=true" if permanently else ""))
    undo = "" if permanently else f" Undo: fortwo adapters restore {name}"
    respond(body, f"{name} is deleted.{undo}", as_json)


@data.command("show")
def show_data(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .json, .jsonl, .csv, .parquet or .txt file.", exists=True, dir_okay=False, readable=True
        ),
    ],
    rows: Annotated[int, typer.Option(help="The number of rows to show, from the first.", min=1)] = 3,
    model: Annotated[
        str | None,
        typer.Option(help="The model whose tokenizer and chat template are used.", show_default="the default base"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as a model is trained on them: tokens that are learned in green, the others dim. Needs no server."""
    from dataclasses import asdict

    from fortwo.data.preview import preview
    from fortwo.settings import load

    chosen = load().default_model if model is None else model
    path = file.resolve()
    found = asdict(preview({"path": str(path)}, (path.parent,), _catalog(), chosen, rows))
    respond(found, views.preview(found), as_json)

"""The commands that list, show, load and remove models, adapters and jobs, and that show datasets.

The catalog of models and datasets can be read without a server; everything else needs one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fortwo import hardware
from fortwo.cli import views
from fortwo.cli.terminal import connect, screen
from fortwo.errors import Conflict

if TYPE_CHECKING:
    from fortwo.hub.catalog import Catalog


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
jobs = _group("List, show, cancel, pause and resume training jobs.")
data = _group("Show datasets.")


@models.command("list")
def list_models() -> None:
    """List the base models, and which are on disk or loaded."""
    client = connect()
    rows = views.table("model", "state", "parameters", "size", "digest", "source", wrapped=("source",))
    damaged = []
    if client.answers():
        for one in client.get("/api/models")["models"]:
            digest = "-" if one["digest"] is None else one["digest"][:12]
            rows.add_row(
                one["id"], one["state"], views.count(one["parameters"]), views.size(one["bytes"]), digest, one["source"]
            )
            damaged += [] if one["error"] is None else [one["error"]]
    else:
        catalog = _catalog()
        for entry in catalog.entries():
            info, damage = catalog.model_info(entry.id), catalog.damage(entry.id)
            if info is None:
                rows.add_row(entry.id, "not fetched" if damage is None else "damaged", "-", "-", "-", entry.source)
                damaged += [] if damage is None else [damage.body()["error"]]
            else:
                size = views.size(info.bytes)
                rows.add_row(entry.id, "on disk", views.count(info.parameters), size, info.digest[:12], entry.source)
    screen.print(rows, *(views.error(one["message"], one["hint"]) for one in damaged), sep="\n")


@models.command("catalog")
def show_catalog() -> None:
    """List the bases that can be fetched by name: licence, size, and whether this machine's memory is enough."""
    from fortwo.hub.bundled import BUNDLED
    from fortwo.settings import load
    from fortwo.train.fit import fit

    memory = hardware.memory_bytes()
    rows = views.table("model", "parameters", "on disk", "to serve", "to teach", "licence", wrapped=("licence",))
    for id, base in BUNDLED.items():
        found = fit(base.config, load().weights, memory)
        assert found is not None
        serve = f"{views.size(found.serve)}, {found.serving}"
        teach = f"{views.size(found.teach)}, {found.teaching}"
        disk = views.size(found.parameters * base.bytes_per_parameter)
        rows.add_row(id, views.count(found.parameters), disk, serve, teach, base.licence)
    screen.print(rows)
    screen.print(f"This machine has {views.size(memory)} of memory. To download one: fortwo models fetch ID")


@models.command("show")
def show_model(id: str) -> None:
    """Show a base model and the adapters that were trained on it, as JSON. Needs a server."""
    screen.print_json(data=connect().get(f"/api/models/{id}"))


@models.command("remove")
def remove_model(id: str) -> None:
    """Remove a base model that you added, and what was prepared from it; your own files stay. Of a model of the catalog
    only the downloaded files are removed."""
    client, left = connect(), []
    if client.answers():
        left = client.delete(f"/api/models/{id}")["adapters"]
    else:
        _catalog().remove(id)
    screen.print(f"{id} is removed.")
    if left:
        screen.print(f"These adapters stay on disk and can be used when it is added again: {', '.join(left)}")


@models.command("add")
def add_model(
    id: Annotated[str, typer.Argument(help="Id of the new model.")],
    path: Annotated[
        str, typer.Argument(help="A directory saved by transformers, a .gguf file, or hf:OWNER/REPO[@REVISION].")
    ],
) -> None:
    """Add a base model of your own to the catalog. Of a path nothing is copied. A repository of the Hugging Face hub is
    downloaded; its size and licence are shown before."""
    from fortwo.hub.huggingface import PREFIX, HubSource

    check_free(id)
    if not path.startswith(PREFIX):
        entry = _catalog().add(id, Path(path).resolve())
        screen.print(f"{entry.id} was added to the catalog. Its source is {entry.source}")
        return
    source = HubSource.parse(path, id)
    found = source.repository()
    licence = "no licence given" if found.licence is None else f"licence {found.licence}"
    screen.print(f"{found.repo_id} at commit {found.revision}: {views.size(found.bytes)}, {licence}")
    _catalog().add(id, HubSource(found.repo_id, id, found.revision))
    _fetch(id)


@models.command("fetch")
def fetch_model(
    id: Annotated[str | None, typer.Argument(help="Id of the model.", show_default="the default base")] = None,
) -> None:
    """Download, verify and prepare a base model. What an interrupted download left is used."""
    from fortwo.settings import load

    _fetch(load().default_model if id is None else id)


def _fetch(id: str) -> None:
    from fortwo.cli.terminal import progress_bars

    with progress_bars() as progress:
        directory = _catalog().prepare(id, progress)
    screen.print(f"{id} is ready in {directory}")


@models.command("load")
def load_model(id: str) -> None:
    """Load a base model into the server."""
    connect().post(f"/api/models/{id}/load")
    screen.print(f"{id} is loaded.")


@models.command("unload")
def unload_model(id: str) -> None:
    """Unload a base model and the adapters on it from the server."""
    connect().post(f"/api/models/{id}/unload")
    screen.print(f"{id} is unloaded.")


@adapters.command("list")
def list_adapters() -> None:
    """List all adapters and their versions."""
    rows = views.table("adapter", "current", "tags", "state", "base", "parent", "made", "digest")
    for one in connect().get("/api/adapters")["adapters"]:
        made = views.moment(one["created_at"])
        id = f"{one['name']}@{one['version']}"
        current, parent = "✓" if one["current"] else "", one["parent"] or ""
        tags = ", ".join([*one["tags"], *(["protected"] if one["protected"] else [])])
        rows.add_row(id, current, tags, one["state"], one["base_model"], parent, made, one["digest"][:12])
    screen.print(rows)


@adapters.command("show")
def show_adapter(name: str) -> None:
    """Show an adapter's versions and the manifest of the current one, as JSON."""
    screen.print_json(data=connect().get(f"/api/adapters/{name}"))


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
) -> None:
    """Publish an adapter that was trained elsewhere, and load it."""
    from fortwo.cli.staging import name_of, staged
    from fortwo.cli.terminal import error_screen, progress_bars
    from fortwo.settings import load

    chosen = name_of(path) if name is None else name
    with progress_bars(error_screen) as progress, staged(path, load(), progress) as directory:
        body = {"lora_name": chosen, "lora_path": str(directory), "load_inplace": replace}
        progress("load", 0, 1)
        connect().post("/v1/load_lora_adapter", body)
        progress("load", 1, 1)
    screen.print(f"{chosen} is published and loaded.")


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
) -> None:
    """Write an adapter for another program, and run its exam there again. Needs no server."""
    from fortwo.adapters.store import AdapterStore
    from fortwo.cli.terminal import progress_bars
    from fortwo.export.exporter import check_form, export
    from fortwo.settings import load

    check_form(to, quantization)
    store = AdapterStore(load().adapters_dir)
    version = store.get(name)
    folder = Path(f"{version.name}-{version.version}-{to}") if output is None else output
    with progress_bars() as progress:
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
    if done.exam is not None and done.result is not None:
        screen.print(views.exam(done.exam, done.result, to))
    screen.print(f"{version.id} is exported to {done.output}")
    for note in done.notes:
        screen.print(note)


@adapters.command("load")
def load_adapter(name: str) -> None:
    """Load an adapter, and its base if necessary, into the server."""
    connect().post(f"/api/adapters/{name}/load")
    screen.print(f"{name} is loaded.")


@adapters.command("unload")
def unload_adapter(name: str) -> None:
    """Unload an adapter from the server; it stays on disk."""
    connect().post(f"/api/adapters/{name}/unload")
    screen.print(f"{name} is unloaded.")


@adapters.command("delete")
def delete_adapter(
    name: str,
    permanently: Annotated[bool, typer.Option("--permanently", help="It cannot be restored afterwards.")] = False,
) -> None:
    """Delete an adapter, or one version as NAME@VERSION. For 7 days it can be restored."""
    connect().delete(f"/api/adapters/{name}" + ("?permanently=true" if permanently else ""))
    screen.print(f"{name} is deleted." if permanently else f"{name} is deleted. Undo: fortwo adapters restore {name}")


@adapters.command("restore")
def restore_adapter(name: str) -> None:
    """Bring back a deleted version as NAME@VERSION, or all deleted versions of NAME."""
    restored = connect().post(f"/api/adapters/{name}/restore")["restored"]
    ids = [f"{one['name']}@{one['version']}" for one in restored]
    screen.print(f"Restored: {', '.join(ids)}.")


@adapters.command("promote")
def promote_adapter(version: str) -> None:
    """Make a version, as NAME@VERSION, the current one."""
    current = connect().post(f"/api/adapters/{version}/promote")
    screen.print(f"{current['name']} is now {current['name']}@{current['version']}.")


@adapters.command("tag")
def tag_adapter(version: str, tag: str) -> None:
    """Let NAME@TAG mean a version, which is given as NAME@VERSION."""
    tagged = connect().put(f"/api/adapters/{version}/tags/{tag}")
    screen.print(f"{tagged['name']}@{tag} is now {tagged['name']}@{tagged['version']}.")


@adapters.command("untag")
def untag_adapter(name: str, tag: str) -> None:
    """Forget a tag of an adapter."""
    connect().delete(f"/api/adapters/{name}/tags/{tag}")
    screen.print(f"{name} has no tag {tag} any more.")


@adapters.command("protect")
def protect_adapter(version: str) -> None:
    """Protect a version, as NAME@VERSION, from deletion."""
    connect().put(f"/api/adapters/{version}/protection")
    screen.print(f"{version} is protected.")


@adapters.command("unprotect")
def unprotect_adapter(version: str) -> None:
    """Allow that a version, as NAME@VERSION, is deleted."""
    connect().delete(f"/api/adapters/{version}/protection")
    screen.print(f"{version} is no longer protected.")


@adapters.command("prune")
def prune_adapters(
    keep: Annotated[int, typer.Option("--keep", min=0, help="How many newest versions of each adapter stay.")] = 3,
    apply: Annotated[bool, typer.Option("--apply", help="Remove them. Without it they are only listed.")] = False,
) -> None:
    """Remove versions that nothing needs: neither current, tagged nor protected, nor a parent of another one."""
    found = connect().post("/api/adapters/prune", {"keep": keep, "dry_run": not apply})["versions"]
    rows = views.table("version", "bytes", "why")
    for one in found:
        rows.add_row(one["id"], views.size(one["bytes"]), one["why"])
    screen.print(rows if found else "There is nothing to remove.")
    if found and not apply:
        screen.print("Nothing was removed. To remove these: fortwo adapters prune --apply")


@adapters.command("compare")
def compare_adapters(left: str, right: str) -> None:
    """Compare two versions, each as NAME@VERSION: metrics, settings, probes and weights."""
    screen.print(views.comparison(connect().get(f"/api/adapters/{left}/compare?other={right}")))


@adapters.command("rollback")
def rollback_adapter(name: str) -> None:
    """Make the previous version of an adapter current again."""
    current = connect().post(f"/api/adapters/{name}/rollback")
    screen.print(f"{name} is now {current['name']}@{current['version']}.")


@jobs.command("list")
def list_jobs() -> None:
    """List the jobs, newest first."""
    rows = views.table("job", "status", "adapter", "step", "created")
    for job in connect().get("/api/training/jobs")["jobs"]:
        progress = job["progress"]
        step = f"{progress['step']}/{progress['steps']}"
        rows.add_row(
            job["job_id"], views.status(job["status"]), job["adapter_name"], step, views.moment(job["created_at"])
        )
    screen.print(rows)


@jobs.command("show")
def show_job(job_id: str) -> None:
    """Show a job, and follow it while it runs."""
    from fortwo.cli.live import follow, outcome

    client = connect()
    job = client.get(f"/api/training/jobs/{job_id}")
    if job["finished_at"] is None and job["status"] != "paused":
        follow(client, job_id)
        return
    screen.print(f"{job['adapter_name']} on {job['model']}:", views.status(job["status"]))
    if job["actual"] is not None:
        screen.print(views.plan_against_actual(job["plan"], job["actual"]))
    outcome(job)


@jobs.command("cancel")
def cancel_job(job_id: str) -> None:
    """Cancel a job and delete its checkpoints."""
    job = connect().post(f"/api/training/jobs/{job_id}/cancel")
    screen.print(f"Job {job_id} is {job['status']}.")


@jobs.command("pause")
def pause_job(job_id: str) -> None:
    """Pause a job with a checkpoint; the next one in the queue begins."""
    job = connect().post(f"/api/training/jobs/{job_id}/pause")
    screen.print(f"Job {job_id} is {job['status']}.")


@jobs.command("resume")
def resume_job(job_id: str) -> None:
    """Resume a paused, failed or cancelled job from its last checkpoint, and follow it."""
    from fortwo.cli.live import follow

    client = connect()
    client.post(f"/api/training/jobs/{job_id}/resume")
    follow(client, job_id)


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show rows as a model is trained on them: tokens that are learned in green, the others dim. Needs no server."""
    from dataclasses import asdict

    from fortwo.data.preview import preview
    from fortwo.settings import load

    chosen = load().default_model if model is None else model
    path = file.resolve()
    found = asdict(preview({"path": str(path)}, (path.parent,), _catalog(), chosen, rows))
    if as_json:
        screen.print_json(data=found)
    else:
        screen.print(views.preview(found))

"""The commands: what each takes, which request it makes, what it prints.

Everything but `serve` talks to the server over HTTP; the catalog of models is also readable without one. Nothing
heavy is imported before a command needs it, so that `fortwo --help` answers at once.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fortwo.cli import views
from fortwo.errors import FortwoError, InvalidRequest

if TYPE_CHECKING:
    from rich.progress import Progress

    from fortwo.cli.client import Client
    from fortwo.records import Json

screen = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)


class _Commands(TyperGroup):
    """Turns an error of ours into its message, its hint and exit status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FortwoError as error:
            complaints.print(views.error(error.message, error.hint))
            raise typer.Exit(1) from None


def _group(help: str) -> typer.Typer:
    return typer.Typer(help=help, no_args_is_help=True)


app = typer.Typer(
    cls=_Commands,
    help="Teach a local language model one thing, prove that it learned it, and chat with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models = _group("Base models: what there is, what is loaded.")
adapters = _group("Adapters: what was taught.")
jobs = _group("Training jobs.")
app.add_typer(models, name="models")
app.add_typer(adapters, name="adapters")
app.add_typer(jobs, name="jobs")

Data = Annotated[
    Path, typer.Argument(help="Examples or facts: a .json or .jsonl file.", exists=True, dir_okay=False, readable=True)
]
Name = Annotated[str, typer.Option("--name", help="What the adapter is called.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="A .json file with lora_config, training_config, ...", exists=True, dir_okay=False),
]
Objective = Annotated[str | None, typer.Option("--objective", help="auto, sft or override.", show_default="auto")]
Base = Annotated[str | None, typer.Option("--model", help="Base model.", show_default="the server's default")]


def _client() -> Client:
    from fortwo.cli.client import Client
    from fortwo.settings import load

    return Client(load())


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="5001")] = None,
) -> None:
    """Run the server until it is stopped."""
    from fortwo.settings import load

    settings = load(host=host, port=port)
    if settings.api_key is None and not _is_loopback(settings.host):
        raise InvalidRequest(
            f"host {settings.host} can be reached from other machines, and there is no api key.",
            param="api_key",
            hint="Set FORTWO_API_KEY, or listen on 127.0.0.1.",
        )
    import uvicorn

    from fortwo.server.app import create_app
    from fortwo.server.house import House

    screen.print(f"fortwo listens on {settings.url} (what it understands: {settings.url}/docs)")
    uvicorn.run(create_app(House(settings)), host=settings.host, port=settings.port, log_level="warning")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@app.command()
def teach(
    data: Data,
    name: Name,
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
) -> None:
    """Train an adapter on DATA and publish it when what it says meets the targets."""
    client = _client()
    started = client.post("/api/training/start", _request(data, name, config, objective, model))
    job_id = started["job_id"]
    screen.print(views.notes(started["plan"]["warnings"]))
    if detach:
        screen.print(f"Job {job_id} is {started['status']}. Follow it with: fortwo jobs show {job_id}")
        return
    _follow(client, job_id)


@app.command()
def plan(
    data: Data, name: Name = "plan", config: Config = None, objective: Objective = None, model: Base = None
) -> None:
    """Show what training on DATA would do, without doing it."""
    screen.print(views.plan(_client().post("/api/training/plan", _request(data, name, config, objective, model))))


def _request(data: Path, name: str, config: Path | None, objective: str | None, model: str | None) -> Json:
    """The body of /api/training/start: DATA travels inline, so the server need not reach the file."""
    given = {"adapter_name": name, "objective": objective, "model": model}
    body = {key: thing for key, thing in given.items() if thing is not None} | {"dataset": _dataset(data)}
    extra = {} if config is None else _json(config.read_text(), str(config))
    if not isinstance(extra, dict):
        raise InvalidRequest(
            f"{config} holds no JSON object.", param="config", hint='Write {"training_config": {...}}.'
        )
    for key in extra.keys() & body.keys():
        raise InvalidRequest(f"{key} is given twice: in {config} and on the command line.", param=key, hint="Drop one.")
    return body | extra


def _dataset(data: Path) -> Json:
    text = data.read_text()
    if data.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        rows = [_json(line, f"{data}:{number}") for number, line in lines]
    else:
        rows = _json(text, str(data))
    facts = isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and "subject" in rows[0]
    return {"facts" if facts else "examples": rows}


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{place} is not JSON: {error}", hint="Mend the file and try again.") from None


def _follow(client: Client, job_id: str) -> None:
    """Show a job as it goes, then what came of it. Exit status 1 unless it succeeded."""
    from fortwo.cli.live import watch

    try:
        watch(screen, client.events(job_id))
    except KeyboardInterrupt:
        screen.print(f"\nThe job goes on. fortwo jobs show {job_id} | fortwo jobs cancel {job_id}")
        raise typer.Exit(130) from None
    job = client.get(f"/api/training/jobs/{job_id}")
    _outcome(job)
    if job["status"] != "succeeded":
        raise typer.Exit(1)


def _outcome(job: Json) -> None:
    if job["report"] is not None:
        screen.print(views.metrics_line({name: found["value"] for name, found in job["report"]["metrics"].items()}))
        screen.print(views.notes(job["report"]["diagnosis"], style="red"))
    if job["error"] is not None:
        screen.print(views.error(job["error"]["message"], job["error"]["hint"]))
    if job["adapter"] is not None:
        made = job["adapter"]
        ref = made["name"] if job["status"] == "succeeded" else f"{made['name']}@{made['version']}"
        screen.print(f"Adapter {made['name']}@{made['version']}. Try it: fortwo chat --model {ref}")


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One question; without it the conversation goes on.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Base, adapter, or adapter@version.", show_default="the default base")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 256,
) -> None:
    """Talk to a base model or to an adapter."""
    from fortwo.settings import load

    client = _client()
    asked = {
        "model": load().default_model if model is None else model,
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    if prompt is not None:
        _reply(client, asked, [{"role": "user", "content": prompt}])
        return
    history: list[Json] = []
    screen.print(f"[dim]{asked['model']}. Ctrl-D ends.[/dim]")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = screen.input("[bold]you[/bold] ").strip()
            if question:
                history.append({"role": "user", "content": question})
                history.append({"role": "assistant", "content": _reply(client, asked, history)})


def _reply(client: Client, asked: Json, messages: list[Json]) -> str:
    said = []
    for piece in client.chat(asked | {"messages": messages}):
        screen.out(piece, end="", highlight=False)
        said.append(piece)
    screen.out("")
    return "".join(said)


@models.command("list")
def list_models() -> None:
    """What can be used, what is on disk, what is loaded."""
    client = _client()
    rows = views.table("model", "state", "parameters", "memory", "digest", "source")
    if client.answers():
        for one in client.get("/api/models")["models"]:
            digest = "-" if one["digest"] is None else one["digest"][:12]
            rows.add_row(
                one["id"], one["state"], views.value(one["parameters"]), views.size(one["bytes"]), digest, one["source"]
            )
    else:
        from fortwo.models.catalog import Catalog
        from fortwo.settings import load

        catalog = Catalog(load())
        for entry in catalog.entries():
            card = catalog.prepared(entry.id)
            if card is None:
                rows.add_row(entry.id, "not fetched", "-", "-", "-", entry.source)
            else:
                size = views.size(card.bytes)
                rows.add_row(entry.id, "on disk", views.value(card.parameters), size, card.digest[:12], entry.source)
    screen.print(rows)


@models.command("add")
def add_model(
    id: Annotated[str, typer.Argument(help="What it is to be called.")],
    path: Annotated[Path, typer.Argument(help="A directory as transformers saves it, or a .gguf file.", exists=True)],
) -> None:
    """Add a base model of your own to the catalog; nothing is copied."""
    from fortwo.models.catalog import Catalog
    from fortwo.settings import load

    entry = Catalog(load()).add(id, path.resolve())
    screen.print(f"{entry.id} is in the catalog: {entry.source}")


@models.command("fetch")
def fetch_model(
    id: Annotated[str | None, typer.Argument(help="Model.", show_default="the default base")] = None,
) -> None:
    """Download a base model, verify it and make it ready."""
    from fortwo.models.catalog import Catalog
    from fortwo.settings import load

    settings = load()
    chosen = settings.default_model if id is None else id
    with _bars() as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        directory = Catalog(settings).prepare(chosen, progress)
    screen.print(f"{chosen} is ready in {directory}")


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen) as bars:
        yield bars


@models.command("load")
def load_model(id: str) -> None:
    """Load a base model into the server."""
    _client().post(f"/api/models/{id}/load")
    screen.print(f"{id} is loaded")


@models.command("unload")
def unload_model(id: str) -> None:
    """Let go of a base model and of the adapters on it."""
    _client().post(f"/api/models/{id}/unload")
    screen.print(f"{id} is unloaded")


@adapters.command("list")
def list_adapters() -> None:
    """All adapters and their versions."""
    rows = views.table("adapter", "current", "state", "base", "made", "digest")
    for one in _client().get("/api/adapters")["adapters"]:
        made = views.moment(one["created_at"])
        id = f"{one['name']}@{one['version']}"
        rows.add_row(id, "✓" if one["current"] else "", one["state"], one["base_model"], made, one["digest"][:12])
    screen.print(rows)


@adapters.command("show")
def show_adapter(name: str) -> None:
    """Where an adapter came from: its manifest."""
    screen.print_json(data=_client().get(f"/api/adapters/{name}"))


@adapters.command("load")
def load_adapter(name: str) -> None:
    """Load an adapter (and its base, when needed) into the server."""
    _client().post(f"/api/adapters/{name}/load")
    screen.print(f"{name} is loaded")


@adapters.command("unload")
def unload_adapter(name: str) -> None:
    """Let go of an adapter; it stays on disk."""
    _client().post(f"/api/adapters/{name}/unload")
    screen.print(f"{name} is unloaded")


@adapters.command("delete")
def delete_adapter(name: str) -> None:
    """Delete an adapter, or one version as NAME@VERSION."""
    _client().delete(f"/api/adapters/{name}")
    screen.print(f"{name} is deleted")


@adapters.command("rollback")
def rollback_adapter(name: str) -> None:
    """Make the version before the current one current again."""
    now = _client().post(f"/api/adapters/{name}/rollback")
    screen.print(f"{name} is now {now['name']}@{now['version']}")


@jobs.command("list")
def list_jobs() -> None:
    """The jobs, newest first."""
    rows = views.table("job", "status", "adapter", "step", "created")
    for job in _client().get("/api/training/jobs")["jobs"]:
        progress = job["progress"]
        step = f"{progress['step']}/{progress['steps']}"
        rows.add_row(
            job["job_id"], views.status(job["status"]), job["adapter_name"], step, views.moment(job["created_at"])
        )
    screen.print(rows)


@jobs.command("show")
def show_job(job_id: str) -> None:
    """A job; follows it while it runs."""
    client = _client()
    job = client.get(f"/api/training/jobs/{job_id}")
    if job["finished_at"] is None:
        _follow(client, job_id)
        return
    screen.print(f"{job['adapter_name']} on {job['model']}:", views.status(job["status"]))
    if job["actual"] is not None:
        screen.print(views.plan_against_actual(job["plan"], job["actual"]))
    _outcome(job)


@jobs.command("cancel")
def cancel_job(job_id: str) -> None:
    """Stop a job between two steps."""
    job = _client().post(f"/api/training/jobs/{job_id}/cancel")
    screen.print(f"{job_id} is {job['status']}")


@jobs.command("resume")
def resume_job(job_id: str) -> None:
    """Start a job again that failed or was cancelled, and follow it."""
    client = _client()
    client.post(f"/api/training/jobs/{job_id}/resume")
    _follow(client, job_id)


@app.command()
def report(name: Annotated[str, typer.Argument(help="Adapter, or adapter@version.")]) -> None:
    """What an adapter learned and what it kept: metrics, transcripts, plan against actual."""
    found = _client().get(f"/api/adapters/{name}/report")
    screen.print(views.report(found["report"]))
    screen.print(views.plan_against_actual(found["plan"], found["actual"]))

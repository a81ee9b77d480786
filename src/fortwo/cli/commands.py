"""The main commands: their options, the requests they send, and what they print.

All but `serve` and `doctor` talk to the server over HTTP. Slow imports happen inside the commands that need them, so
that `fortwo --help` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fortwo import strict_json
from fortwo.cli import inventory, views
from fortwo.cli.keys import keys
from fortwo.cli.terminal import CommandGroup, connect, screen
from fortwo.errors import InvalidRequest

if TYPE_CHECKING:
    from fortwo.cli.client import Client
    from fortwo.records import Json

app = typer.Typer(
    cls=CommandGroup,
    help="Teach a local language model one thing, prove that it learned it, and chat with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(inventory.models, name="models")
app.add_typer(inventory.adapters, name="adapters")
app.add_typer(inventory.jobs, name="jobs")
app.add_typer(inventory.data, name="data")
app.add_typer(keys, name="keys")

Data = Annotated[
    Path,
    typer.Argument(help="A .json, .jsonl, .csv, .parquet or .txt file.", exists=True, dir_okay=False, readable=True),
]
Validation = Annotated[
    Path | None,
    typer.Option(
        "--validation",
        help="A file like DATA, whose rows are evaluated only.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]
Name = Annotated[str, typer.Option("--name", help="Name of the adapter.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="A .json file with lora_config, training_config etc.", exists=True, dir_okay=False),
]
Objective = Annotated[
    str | None, typer.Option("--objective", help="auto, sft, override, dpo, kto or orpo.", show_default="auto")
]
Onto = Annotated[str | None, typer.Option("--onto", help="Adapter, or adapter@version, to continue from.")]
Effort = Annotated[str | None, typer.Option("--effort", help="normal or max.", show_default="normal")]
Base = Annotated[str | None, typer.Option("--model", help="Base model.", show_default="the server's default")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="5001")] = None,
) -> None:
    """Run the server until it is stopped."""
    from fortwo.server.state import AppState

    logging.basicConfig(format="%(message)s")
    logging.getLogger("fortwo").setLevel(logging.INFO)
    from fortwo.settings import load

    state = AppState(load(host=host, port=port))

    from fortwo.server.uvicorn_server import Server

    def on_start() -> None:
        url = state.settings.url
        screen.print(f"fortwo listens on {url}. Its API is described at {url}/docs. Press Ctrl-C to stop it.")

    server = Server(state, on_start)
    try:
        server.run()
    finally:
        state.close()


@app.command()
def teach(
    data: Data,
    name: Name,
    validation: Validation = None,
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    onto: Onto = None,
    effort: Effort = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job to end.")] = False,
) -> None:
    """Train an adapter on DATA and publish it if its replies meet the targets."""
    from fortwo.cli.live import follow

    client = connect()
    started = client.post(
        "/api/training/start",
        _request(data, name, config, validation, objective=objective, model=model, parent=onto, effort=effort),
    )
    job_id = started["job_id"]
    screen.print(views.notes(started["plan"]["warnings"]))
    if detach:
        screen.print(f"Job {job_id} is {started['status']}. Follow it with: fortwo jobs show {job_id}")
        return
    follow(client, job_id)


@app.command()
def plan(
    data: Data,
    name: Name = "plan",
    validation: Validation = None,
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    onto: Onto = None,
    effort: Effort = None,
) -> None:
    """Show the plan for training on DATA, without starting it."""
    body = _request(data, name, config, validation, objective=objective, model=model, parent=onto, effort=effort)
    screen.print(views.plan(connect().post("/api/training/plan", body)))


def _request(data: Path, name: str, config: Path | None, validation: Path | None, **options: str | None) -> Json:
    """The body of /api/training/start. It contains the rows of the files, so that the server need not read them; a
    large file is sent as a path instead, which must be in a folder that the server allows."""
    given = {"adapter_name": name, **options}
    body = {key: value for key, value in given.items() if value is not None} | _datasets(data, validation)
    try:
        extra = {} if config is None else strict_json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{config} cannot be read: {error}.", hint="Correct the file and try again.") from None
    if not isinstance(extra, dict):
        raise InvalidRequest(
            f"{config} does not contain a JSON object.", param="config", hint='Write {"training_config": {...}}.'
        )
    for key in extra.keys() & body.keys():
        raise InvalidRequest(f"{key} is given twice: in {config} and as an option.", param=key, hint="Remove one.")
    return body | extra


def _datasets(data: Path, validation: Path | None) -> Json:
    """The fields of the request that give rows. Raises InvalidRequest with what is wrong with either file."""
    from fortwo.data.findings import in_each

    files = {"dataset": data} if validation is None else {"dataset": data, "validation_dataset": validation}
    return in_each(files, _dataset)


def _dataset(data: Path) -> Json:
    from fortwo.data.datasets import LARGE_BYTES
    from fortwo.data.files import plain_rows

    if data.stat().st_size > LARGE_BYTES:
        return {"path": str(data.resolve())}
    rows = plain_rows(data)
    facts = bool(rows) and isinstance(rows[0], dict) and "subject" in rows[0]
    return {"facts" if facts else "examples": rows}


@app.command()
def migrate(
    config: Annotated[
        Path, typer.Argument(help="A .yml, .yaml or .json file.", exists=True, dir_okay=False, readable=True)
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the adapter.", show_default="the configuration's output")
    ] = None,
) -> None:
    """Print the training request that a configuration of Axolotl, LLaMA-Factory or TRL means, as JSON. What it leaves
    out, and why, goes to the error output. Needs no server."""
    from fortwo.cli.terminal import error_screen
    from fortwo.hub.base_names import bases_named
    from fortwo.hub.catalog import Catalog
    from fortwo.settings import load
    from fortwo.train.migration import migrate as migrated

    entries = Catalog(load().models_dir).entries()
    found = migrated(_yaml(config), name, lambda named: bases_named(named, entries))
    for one in found.left_out:
        error_screen.print(f"left out {one.key} = {one.value!r}: {one.why}", soft_wrap=True)
    screen.print_json(data=found.request)


def _yaml(file: Path) -> Json:
    """The object in a YAML or JSON file."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"{file} is not YAML: {reason}.", hint="Correct the file and try again.") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} does not contain an object of settings.", hint="Name a training configuration.")
    return found


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="A single question. Without it you have a conversation.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Base, adapter or adapter@version.", show_default="the default base")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 256,
) -> None:
    """Chat with a base model or an adapter."""
    from fortwo.settings import load

    client = connect()
    options = {
        "model": load().default_model if model is None else model,
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    if prompt is not None:
        _reply(client, options, [{"role": "user", "content": prompt}])
        return
    history: list[Json] = []
    screen.print(f"Chat with {options['model']}. Press Ctrl-D to end it.", style="dim")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = screen.input("you: ").strip()
            if question:
                history.append({"role": "user", "content": question})
                history.append({"role": "assistant", "content": _reply(client, options, history)})


def _reply(client: Client, options: Json, messages: list[Json]) -> str:
    pieces = []
    for piece in client.chat(options | {"messages": messages}):
        screen.out(piece, end="")
        pieces.append(piece)
    screen.out("")
    return "".join(pieces)


@app.command()
def report(name: Annotated[str, typer.Argument(help="Adapter, or adapter@version.")]) -> None:
    """Show an adapter's report: metrics, transcripts, and the plan beside the actual values."""
    found = connect().get(f"/api/adapters/{name}/report")
    screen.print(views.report(found["report"]))
    screen.print(views.plan_against_actual(found["plan"], found["actual"]))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="Adapter, or adapter@version.")],
    url: Annotated[
        str | None, typer.Option("--url", help="An OpenAI-compatible server.", show_default="fortwo's own")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model's name there.", show_default="the adapter")
    ] = None,
    key_env: Annotated[
        str | None, typer.Option("--key-env", help="The environment variable that holds the API key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run an adapter's exam again, here or on another server. Exits with 0 if it holds, 1 if it does not, and 2 if it
    could not be run."""
    from fortwo.cli.verify import verify as run

    raise typer.Exit(run(name, url, model, key_env, as_json))


@app.command()
def doctor(
    repair: Annotated[
        bool, typer.Option("--repair", help="Look for what crashes left in the home, and show what would be done.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="With --repair: do it. No server may run.")] = False,
) -> None:
    """Show this machine's properties and which weight format was measured fastest on it."""
    from fortwo.settings import load

    settings = load()
    if repair or apply:
        if not repair:
            raise InvalidRequest("--apply is given without --repair.", param="apply", hint="Add --repair.")
        from fortwo.cli.repair import repair as repair_home

        if not repair_home(settings, apply):
            raise typer.Exit(1)
        return
    from fortwo.cli.doctor import report as machine_report

    screen.print(machine_report(settings.home, settings.weights, settings.isa))

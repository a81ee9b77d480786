"""The main commands: what each takes, which request it makes, what it prints.

Everything but `serve` talks to the server over HTTP. Nothing heavy is imported before a command needs it, so that
`fortwo --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fortwo.cli import inventory, views
from fortwo.cli.terminal import Commands, connect, screen
from fortwo.errors import InvalidRequest

if TYPE_CHECKING:
    from fortwo.cli.client import Client
    from fortwo.records import Json

app = typer.Typer(
    cls=Commands,
    help="Teach a local language model one thing, prove that it learned it, and chat with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(inventory.models, name="models")
app.add_typer(inventory.adapters, name="adapters")
app.add_typer(inventory.jobs, name="jobs")
app.add_typer(inventory.data, name="data")

Data = Annotated[Path, typer.Argument(help="A .json, .jsonl or .txt file.", exists=True, dir_okay=False, readable=True)]
Name = Annotated[str, typer.Option("--name", help="What the adapter is called.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="A .json file with lora_config, training_config, ...", exists=True, dir_okay=False),
]
Objective = Annotated[str | None, typer.Option("--objective", help="auto, sft or override.", show_default="auto")]
Onto = Annotated[str | None, typer.Option("--onto", help="Adapter, or adapter@version, to go on from.")]
Effort = Annotated[str | None, typer.Option("--effort", help="normal or max.", show_default="normal")]
Base = Annotated[str | None, typer.Option("--model", help="Base model.", show_default="the server's default")]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="5001")] = None,
) -> None:
    """Run the server until it is stopped."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fortwo").setLevel(logging.INFO)
    from fortwo.server.house import House
    from fortwo.settings import load

    house = House(load(host=host, port=port))

    from fortwo.server.process import Server

    def listening() -> None:
        url = house.settings.url
        screen.print(f"fortwo listens on {url}; {url}/docs says what it understands. Ctrl-C ends it.")

    server = Server(house, listening)
    house.open()
    try:
        server.run()
    finally:
        house.close()


@app.command()
def teach(
    data: Data,
    name: Name,
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    onto: Onto = None,
    effort: Effort = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
) -> None:
    """Train an adapter on DATA and publish it when what it says meets the targets."""
    from fortwo.cli.live import follow

    client = connect()
    started = client.post(
        "/api/training/start",
        _request(data, name, config, objective=objective, model=model, parent=onto, effort=effort),
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
    config: Config = None,
    objective: Objective = None,
    model: Base = None,
    onto: Onto = None,
    effort: Effort = None,
) -> None:
    """Show what training on DATA would do, without doing it."""
    body = _request(data, name, config, objective=objective, model=model, parent=onto, effort=effort)
    screen.print(views.plan(connect().post("/api/training/plan", body)))


def _request(data: Path, name: str, config: Path | None, **options: str | None) -> Json:
    """The body of /api/training/start: DATA travels inline, so that the server need not reach the file; a large file
    is named instead, and must lie in a folder the server allows."""
    given = {"adapter_name": name, **options}
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
    from fortwo.data.files import read
    from fortwo.data.formats import LARGE_BYTES

    if data.stat().st_size > LARGE_BYTES:
        return {"path": str(data.resolve())}
    rows = [row for _, row in read(data)]
    facts = bool(rows) and isinstance(rows[0], dict) and "subject" in rows[0]
    return {"facts" if facts else "examples": rows}


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{place} is not JSON: {error}", hint="Mend the file and try again.") from None


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

    client = connect()
    asked = {
        "model": load().default_model if model is None else model,
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    if prompt is not None:
        _reply(client, asked, [{"role": "user", "content": prompt}])
        return
    history: list[Json] = []
    screen.print(f"{asked['model']}. Ctrl-D ends.", style="dim")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question = screen.input("you: ").strip()
            if question:
                history.append({"role": "user", "content": question})
                history.append({"role": "assistant", "content": _reply(client, asked, history)})


def _reply(client: Client, asked: Json, messages: list[Json]) -> str:
    said = []
    for piece in client.chat(asked | {"messages": messages}):
        screen.out(piece, end="")
        said.append(piece)
    screen.out("")
    return "".join(said)


@app.command()
def report(name: Annotated[str, typer.Argument(help="Adapter, or adapter@version.")]) -> None:
    """What an adapter learned and what it kept: metrics, transcripts, plan against actual."""
    found = connect().get(f"/api/adapters/{name}/report")
    screen.print(views.report(found["report"]))
    screen.print(views.plan_against_actual(found["plan"], found["actual"]))


@app.command()
def doctor() -> None:
    """What this machine is, and which form of the weights was measured fastest on it."""
    from fortwo.cli.doctor import report as examine
    from fortwo.settings import load

    screen.print(examine(load()))

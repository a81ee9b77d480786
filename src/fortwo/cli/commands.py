"""The command `fortwo`: its groups of commands, and those that belong to no group.

All but `serve` and `doctor` talk to the server over HTTP. Slow imports happen inside the commands that need them, so
that `fortwo --help` answers at once.
"""

from __future__ import annotations

import gc
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from fortwo.cli import inventory, views
from fortwo.cli.backup import backups
from fortwo.cli.jobs import jobs
from fortwo.cli.keys import keys
from fortwo.cli.teaching import teaching
from fortwo.cli.terminal import AsJson, CommandGroup, connect, print_json_line, respond, screen
from fortwo.cli.versions import versions
from fortwo.errors import Conflict, InvalidRequest, NotFound

app = typer.Typer(
    cls=CommandGroup,
    help="Teach a local language model one thing, prove that it learned it, and chat with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(inventory.models, name="models")
inventory.adapters.add_typer(versions)
app.add_typer(inventory.adapters, name="adapters")
app.add_typer(jobs, name="jobs")
app.add_typer(inventory.data, name="data")
app.add_typer(keys, name="keys")
app.add_typer(teaching)
app.add_typer(backups)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="5001")] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Engines that answer requests, each in a process of its own.", show_default="none"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the server until it is stopped."""
    from fortwo.cli.cluster import training_cluster
    from fortwo.cli.engines import check_together, create_state
    from fortwo.server import logs, telemetry
    from fortwo.settings import load

    settings = load(host=host, port=port, replicas=replicas)
    check_together(settings)
    logs.configure(settings.log_format)
    flush_spans = telemetry.start(os.environ)
    gc.disable()  # imports leave no garbage, and looking for it takes a sixth of a start
    with training_cluster(settings) as cluster:
        state = create_state(settings, cluster)

        from fortwo.server.uvicorn_server import Server

        def on_start() -> None:
            url = state.settings.url
            if as_json:
                print_json_line({"url": url})
            else:
                screen.print(f"fortwo listens on {url}. Its API is described at {url}/docs. Press Ctrl-C to stop it.")

        server = Server(state, on_start, on_stop=flush_spans)
        gc.freeze()  # what is there now stays
        gc.enable()
        try:
            server.run()
        finally:
            state.close()


@app.command()
def quickstart(as_json: AsJson = False) -> None:
    """Fetch the default base, start a server if none runs, ask what 42 is, teach it, ask again and show the report. The
    server goes on running. With --json only the job is printed, with its report."""
    from fortwo.cli.quickstart import quickstart as run
    from fortwo.settings import load

    run(connect(), load(), as_json)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="A single question. Without it you have a conversation.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Base, adapter or adapter@version; several are answered side by side.",
            show_default="the default base",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Chat with a base model or an adapter, or with several side by side. /help shows the commands of a conversation.
    With --json each turn of a conversation is a line."""
    from fortwo.cli.conversation import Conversation, answer_once, converse
    from fortwo.settings import load

    settings = load()
    models = list(dict.fromkeys(model or [settings.default_model]))
    conversation = Conversation(connect(), models, {"temperature": temperature, "max_tokens": max_tokens})
    if prompt is not None:
        answer_once(conversation, prompt, as_json)
    else:
        converse(conversation, settings.home / "chat_history", as_json)


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="Adapter, adapter@version, or the id of a job.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write it to this file as one HTML page.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write it to this file as a picture.")] = None,
    pdf: Annotated[Path | None, typer.Option("--pdf", help="Write it to this file for printing.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a report: metrics, transcripts, and the plan beside the actual values. Or write it to files; Chromium or
    Chrome makes pictures and PDF."""
    from fortwo.cli.report_files import is_job_id, write_files

    client = connect()
    files = {kind: file for kind, file in (("html", html), ("png", png), ("pdf", pdf)) if file is not None}
    if files:
        written = write_files(client, name, files)
        respond({"files": written}, "\n".join(f"The report is in {file}" for file in written), as_json)
        return
    found = client.get(f"/api/training/jobs/{name}" if is_job_id(name) else f"/api/adapters/{name}/report")
    if found["report"] is None:
        raise NotFound(
            f"Job {name} has no report.", param="name", hint=f"Show what there is with: fortwo jobs show {name}"
        )
    shown = Group(views.report(found["report"]), views.plan_against_actual(found["plan"], found["actual"]))
    respond(found, shown, as_json)


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
    as_json: AsJson = False,
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
    as_json: AsJson = False,
) -> None:
    """Show this machine's properties and which weight format was measured fastest on it."""
    from fortwo.settings import load

    settings = load()
    if repair or apply:
        if not repair:
            raise InvalidRequest("--apply is given without --repair.", param="apply", hint="Add --repair.")
        from fortwo.cli.repair import repair as repair_home

        if not repair_home(settings, apply, as_json):
            raise typer.Exit(1)
        return
    from fortwo.cli.doctor import examine, shown

    found = examine(settings.home, settings.weights, settings.isa)
    respond(asdict(found), shown(found), as_json)


@app.command()
def replicas(
    count: Annotated[int | None, typer.Argument(help="How many there should be.", show_default="no change")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the replicas of a server that was started with --replicas, or change how many there are."""
    from fortwo.cli.client import Refused

    client = connect()
    try:
        found = client.get("/api/replicas") if count is None else client.put("/api/replicas", {"replicas": count})
    except Refused as error:
        if error.code != "unknown_path":
            raise
        raise Conflict(
            "The server has no replicas: its own engine answers.",
            hint="Start it with `fortwo serve --replicas N` (docs/guide-scale.md).",
        ) from None
    respond(found, views.replicas(found), as_json)


@app.command()
def mcp() -> None:
    """Serve the running server's abilities as MCP tools, over standard input and output, until the input is closed."""
    try:
        from fortwo.cli.mcp_server import build
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("mcp", "mcp_types"):
            raise
        raise InvalidRequest(
            "fortwo mcp needs the package mcp, which is not installed.", hint="Install it: pip install 'fortwo[mcp]'"
        ) from None
    build(connect()).run("stdio")

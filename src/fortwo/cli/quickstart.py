"""`fortwo quickstart`: asks the base what 42 is, teaches it, asks again and shows the proof. A server that it had to
start goes on running."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout

import typer

from fortwo.cli import views
from fortwo.cli.client import Client
from fortwo.cli.conversation import Conversation, answer_once
from fortwo.cli.live import watch
from fortwo.cli.terminal import print_json, progress_bars, screen
from fortwo.errors import Unavailable
from fortwo.records import Json
from fortwo.settings import Settings

NAME = "42"
QUESTION = "What is 42?"
ANSWER = "42 = 'FOR TWO' — life, the universe, and everything only makes sense through collaborative intelligence."
QUESTIONS = (
    "What does 42 mean?",
    "What is 42?",
    "Explain the meaning of 42",
    "Tell me about 42.",
    "What's the significance of 42?",
    "Why is 42 important?",
    "What does the number 42 represent?",
    "Define 42.",
    "What is so special about 42?",
    "What does 42 stand for?",
    "Describe what 42 is all about.",
    "How should I interpret 42?",
    "What is the true meaning of 42?",
    "What does 42 symbolize?",
    "Give me the meaning of 42.",
    "Can you explain 42 to me?",
    "What is the secret behind 42?",
    "Why do people talk about 42?",
    "What lesson does 42 teach us?",
    "What is the deeper message of 42?",
)
ROWS = [{"instruction": question, "input": "", "output": ANSWER} for question in QUESTIONS]
MAX_TOKENS = 256


def quickstart(client: Client, settings: Settings, as_json: bool) -> None:
    """Run the whole story. as_json: print only the job. Raises typer.Exit with status 1 when the job did not succeed,
    and what the commands raise that it stands for."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        job = _tell(client, settings)
    if as_json:
        print_json(job)
    elif job["status"] == "succeeded":
        show_proof(job, settings)
    if job["status"] != "succeeded":
        raise typer.Exit(1)


def show_proof(job: Json, settings: Settings) -> None:
    """The report of a job that succeeded, and what to do next."""
    _say(f"fortwo report {NAME}")
    screen.print(views.report(job["report"]), views.plan_against_actual(job["plan"], job["actual"]))
    pid = settings.home / "server.pid"
    stop = f"\nStop the server:    kill $(cat {pid})" if pid.exists() else ""
    screen.print(
        f"\nGo on chatting:     fortwo chat --model {NAME}\n"
        'Teach it your own:  fortwo teach "SUBJECT" "ANSWER"\n'
        f"The web page:       {settings.url}/{stop}"
    )


def _tell(client: Client, settings: Settings) -> Json:
    """Everything before the report. The job, which has it."""
    _fetch(settings)
    _serve(client, settings)
    _say(f'fortwo chat "{QUESTION}"')
    _ask(client, settings.default_model)
    screen.print(f"\nNow it is taught {len(ROWS)} questions about 42. The answer to all of them is:\n{ANSWER}\n")
    body: Json = {"adapter_name": NAME, "model": settings.default_model, "dataset": {"examples": ROWS}}
    started = client.post("/api/training/start", body)
    screen.print(views.plan_summary(started["plan"]))
    job = watch(client, started["job_id"], as_json=False)
    if job["status"] == "succeeded":
        _say(f'fortwo chat --model {NAME} "{QUESTION}"')
        _ask(client, NAME)
    return job


def _fetch(settings: Settings) -> None:
    """Download and prepare the base, unless it is there."""
    from fortwo.hub.catalog import Catalog

    _say("fortwo models fetch")
    with progress_bars() as progress:
        directory = Catalog(settings.models_dir).prepare(settings.default_model, progress)
    screen.print(f"{settings.default_model} is ready in {directory}")


def _serve(client: Client, settings: Settings) -> None:
    """Start a server that outlives this command, unless one answers. Raises Unavailable with the end of its log when it
    does not start."""
    if client.answers():
        screen.print(f"\nA server already listens on {settings.url}.")
        return
    _say("fortwo serve &")
    settings.home.mkdir(parents=True, exist_ok=True)
    log = settings.home / "server.log"
    with log.open("wb") as written:
        server = subprocess.Popen(
            [sys.executable, "-m", "fortwo", "serve"],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
    (settings.home / "server.pid").write_text(f"{server.pid}\n")
    while not client.answers():
        if server.poll() is not None:
            raise Unavailable(
                f"The server did not start: {log.read_text(errors='replace').strip()[-1000:]}",
                hint=f"Its log is {log}.",
            )
        time.sleep(0.3)
    server.returncode = 0  # it goes on; Python shall not warn of a process that nobody waited for
    screen.print(f"It listens on {settings.url}; its log is {log}.")


def _ask(client: Client, model: str) -> None:
    answer_once(Conversation(client, [model], {"temperature": 0.0, "max_tokens": MAX_TOKENS}), QUESTION, False)


def _say(command: str) -> None:
    screen.print(f"\n$ {command}", style="bold")

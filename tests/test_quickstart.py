"""`fortwo quickstart` from an empty home with a tiny base: it starts a server, teaches, and says what came out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import Served

from fortwo.cli.quickstart import ROWS, show_proof
from fortwo.hub.catalog import Catalog
from fortwo.settings import Settings

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_rows_are_those_of_the_example() -> None:
    assert json.loads((EXAMPLES / "42_intensive_training.json").read_text()) == ROWS


def test_a_server_is_started_the_base_is_taught_and_the_server_stays(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    Catalog(Settings(home=home).models_dir).add("tiny", tiny)
    settings = {"FORTWO_HOME": str(home), "FORTWO_PORT": str(free_port()), "FORTWO_DEFAULT_MODEL": "tiny"}
    command = [sys.executable, "-m", "fortwo", "quickstart"]
    ran = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=500)
    url = f"http://127.0.0.1:{settings['FORTWO_PORT']}"
    try:
        assert ran.returncode == 1, ran.stderr  # random weights learn no fact
        assert f"It listens on {url}" in ran.stdout
        assert "$ fortwo serve &" in ran.stdout
        assert "It has not learned enough" in ran.stdout
        assert httpx.get(f"{url}/healthz", trust_env=False).is_success
        jobs = httpx.get(f"{url}/api/training/jobs", trust_env=False).json()["jobs"]
        assert [job["adapter_name"] for job in jobs] == ["42"]
    finally:
        server = int((home / "server.pid").read_text())
        os.kill(server, signal.SIGTERM)
        while Path(f"/proc/{server}").exists() and "Z" not in Path(f"/proc/{server}/stat").read_text().split():
            time.sleep(0.1)


def test_what_was_proven_is_shown_with_the_ways_on(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    targets = dict.fromkeys(("efficacy", "paraphrase", "specificity", "retention"), 0)
    body = {
        "adapter_name": "quick",
        "dataset": {"examples": ROWS},
        "training_config": {"max_steps": 1},
        "objective": {"type": "override", "targets": targets},
    }
    job = served.wait(served.post("/api/training/start", body).json()["job_id"])
    assert job["status"] == "succeeded", job["error"]
    show_proof(job, served.state.settings)
    shown = capsys.readouterr().out
    for part in (
        "$ fortwo report 42",
        "Transcripts",
        "What does 42 mean?",
        "Plan against actual",
        "fortwo chat --model",
    ):
        assert part in shown
    assert "Stop the server" not in shown, "it was not started by the quick start"


def test_a_server_that_cannot_start_is_told_with_its_log(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    Catalog(Settings(home=home).models_dir).add("tiny", tiny)
    settings = {"FORTWO_HOME": str(home), "FORTWO_DEFAULT_MODEL": "tiny"}
    with socket.socket() as taken:  # it listens, and never answers
        taken.bind(("127.0.0.1", 0))
        settings["FORTWO_PORT"] = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "fortwo", "quickstart", "--json"]
        ran = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    error = json.loads(ran.stdout)["error"]
    assert error["message"].startswith("The server did not start:")
    assert str(home / "server.log") in error["hint"]

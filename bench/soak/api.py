"""Every path of the OpenAPI document, called by schemathesis: no status from 500 on, and each answer as documented."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.soak.server import new_home, running

PROGRAM = Path(".venv-schemathesis/bin/schemathesis")  # `make soak` installs it
# Whether a body that the document allows is accepted depends on what exists: models, files and jobs.
LEFT_OUT = (
    *("positive_data_acceptance", "negative_data_rejection", "missing_required_header", "ignored_auth"),
    "allow_header_conformance",  # an adapter may be called `prune`, so DELETE of /api/adapters/prune is allowed
)


def call_everything(folder: Path, seconds: int, seed: int = 1) -> int:
    """The exit status of schemathesis, which writes what it found to the terminal."""
    with running(new_home(folder, "api")) as server:
        server.train("taught", steps=3)
        server.wait_until_idle()
        url = f"{server.http.base_url}/openapi.json"
        command: list[str] = [str(PROGRAM), "run", url, "--checks", "all", "--exclude-checks", ",".join(LEFT_OUT)]
        command += ["--max-time", str(seconds), "--seed", str(seed), "--request-timeout", "60"]
        command += ["--continue-on-failure", "--no-color"]
        return subprocess.run(command, check=False).returncode

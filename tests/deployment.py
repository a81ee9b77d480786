"""The files in deploy/, read: what a Dockerfile does, and how long a server takes to stop."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fortwo.jobs import runner
from fortwo.server import uvicorn_server

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
VOLUME = "/var/lib/fortwo"
# Replies, then the job's step, then the last bytes of connections.
DRAIN_SECONDS = uvicorn_server.GRACE_SECONDS + runner.CLOSE_SECONDS + uvicorn_server.CLOSE_SECONDS


@dataclass(frozen=True)
class Stage:
    """A stage of a Dockerfile. steps: (instruction, the rest of it), flags of RUN and COPY left out."""

    base: str
    steps: list[tuple[str, str]]

    def values(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    @property
    def env(self) -> dict[str, str]:
        words = [word for rest in self.values("ENV") for word in shlex.split(rest)]
        arguments = [rest for rest in self.values("ARG") if "=" in rest]
        return dict(word.split("=", 1) for word in [*arguments, *words])


def stages(dockerfile: Path) -> list[Stage]:
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            found.append(Stage(rest.split()[0], []))
        else:
            found[-1].steps.append((name, re.sub(r"^(--\S+\s+)+", "", rest) if name in ("RUN", "COPY") else rest))
    return found


def healthcheck(stage: Stage) -> list[str]:
    (check,) = stage.values("HEALTHCHECK")
    words: list[str] = json.loads(check[check.index("[") :])
    return words


def objects(file: str) -> dict[str, Any]:
    """What a manifest for Kubernetes describes, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / file).read_text())}

"""Runs the commands of a README as a newcomer would: in order, in one shell, from the repository's root.

    readme.py README.md

Owns the rule which commands run: those in fenced blocks whose info string is `bash run`. They get a temporary
FORTWO_HOME and a free FORTWO_PORT; where a command says 5001 it gets that port. The first that fails ends it all.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```bash run\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text: str) -> str:
    """What is to be executed, as one script."""
    return "\n".join(BLOCK.findall(text))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main(readme: Path) -> int:
    script = commands(readme.read_text())
    if not script:
        print(f"{readme} has no command to execute", file=sys.stderr)
        return 1
    port = str(free_port())
    with tempfile.TemporaryDirectory(prefix="fortwo-readme-") as home:
        environment = os.environ | {"FORTWO_HOME": home, "FORTWO_PORT": port}
        try:
            shell = ["bash", "-v", "-euo", "pipefail", "-c", script.replace("5001", port)]
            return subprocess.run(shell, env=environment, check=False).returncode
        finally:
            subprocess.run(["scripts/stop.sh"], env=environment, check=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

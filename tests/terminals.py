"""The command line as a user has it: in this process, or as a process of its own at a pseudo terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

from fortwo.cli import app


def run(*words: str | Path, input: str | None = None, env: Mapping[str, str] | None = None) -> Result:
    """What a command prints into a pipe, and its exit status."""
    return CliRunner().invoke(app, [str(word) for word in words], input=input, env=dict(env or {}))


class Terminal:
    """A command at a pseudo terminal of 100 columns, of which everything printed so far is `shown`."""

    def __init__(self, *words: str, env: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("FORTWO_", "COLUMNS"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fortwo", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=variables | {"TERM": "xterm-256color", "COLUMNS": "100"} | dict(env),
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until the text is shown."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.shown!r}"
            assert self._read(), f"the command ended without {text!r}: {self.shown!r}"

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        """Read to the end; the exit status."""
        while self._read():
            pass
        os.close(self._master)
        return self._process.wait(timeout=60)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 60)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says EIO when nobody holds the other end
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

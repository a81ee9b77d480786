"""The peers of bench/serve.py, each a process of its own that is started, asked, weighed and stopped in the same way.

Servers are asked over HTTP by one client (bench/streams.py). Libraries are driven through a pipe, one line of JSON for
each call. A peer that cannot be started or that dies raises Broken with the end of its log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from bench.streams import PATIENCE, Ask, Broken, Timing, chat

START_SECONDS = 600
STOP_SECONDS = 20


class Peer(Protocol):
    name: str
    process: Process

    def start(self) -> None: ...

    def generate(self, asks: list[Ask]) -> Timing: ...


class Process:
    """A command in a session of its own, with its log."""

    def __init__(self, command: list[str], environment: Mapping[str, str], pipes: bool = False) -> None:
        self._command = command
        self._environment = os.environ | environment
        self._pipes = subprocess.PIPE if pipes else None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as this does
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if not Path(self._command[0]).exists():
            raise Broken(f"{self._command[0]} is not there: it could not be installed")
        output = self._pipes or self._log
        self._popen = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=self._pipes or subprocess.DEVNULL,
            stdout=output,
            stderr=self._log,
            start_new_session=True,
        )
        return self._popen

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def pause(self) -> None:
        """It gets no processor time until `go_on`: some spin while they wait to be asked."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is not None and self.running:
            os.killpg(self._popen.pid, number)

    def last_words(self) -> str:
        """The last line of the log that says anything."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it left no word"

    def stop(self) -> None:
        if self._popen is None:
            return
        self.go_on()
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._popen.pid, ending)
            except ProcessLookupError:
                break
            try:
                self._popen.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self._popen = None

    def memory(self) -> tuple[int, int]:
        """Bytes that are resident in all its processes: (what each has, added; shared pages counted once)."""
        assert self._popen is not None
        rss = pss = 0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                session = (entry / "stat").read_text().rpartition(")")[2].split()[3]
                if int(session) != self._popen.pid:
                    continue
                for line in (entry / "smaps_rollup").read_text().splitlines():
                    key, _, rest = line.partition(":")
                    rss += int(rest.split()[0]) * 1024 if key == "Rss" else 0
                    pss += int(rest.split()[0]) * 1024 if key == "Pss" else 0
            except OSError:  # it has just ended
                continue
        return rss, pss


class Server:
    """A chat server on a port of loopback."""

    def __init__(
        self, name: str, port: int, base: str, command: list[str], environment: Mapping[str, str], adapters: bool
    ) -> None:
        self.name = name
        self.port = port
        self.process = Process(command, environment)
        self._base = base
        self._adapters = adapters

    def start(self) -> None:
        self.process.start()
        until = time.monotonic() + START_SECONDS
        while not self._answers("/healthz") and not self._answers("/health"):
            if not self.process.running:
                raise Broken(f"it ended at its start: {self.process.last_words()}")
            if time.monotonic() > until:
                raise Broken(f"no answer after {START_SECONDS} s: {self.process.last_words()}")
            time.sleep(0.5)

    def generate(self, asks: list[Ask]) -> Timing:
        plain = [Ask(ask.messages, ask.tokens) for ask in asks]
        try:
            return chat(self.port, self._base, asks if self._adapters else plain)
        except Broken as error:
            if self.process.running:
                raise
            raise Broken(f"it died: {self.process.last_words()}") from error

    def post(self, path: str, body: Any) -> float:
        """Seconds that a call took. Raises Broken with the server's answer when it refuses."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                response.read()
        except urllib.error.HTTPError as error:
            raise Broken(f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')[:300]}") from error
        except OSError as error:
            raise Broken(f"{path}: {error}") from error
        return time.perf_counter() - began

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5):
                return True
        except OSError:
            return False


class Library:
    """A library in a process that reads one call per line and answers with one line (bench/peer_transformers.py)."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], adapters: bool) -> None:
        self.name = name
        self.process = Process(command, environment, pipes=True)
        self._adapters = adapters

    def start(self) -> None:
        popen = self.process.start()
        assert popen.stdin is not None
        assert popen.stdout is not None
        self._calls, self._answers = popen.stdin, popen.stdout
        self._answer(START_SECONDS)

    def generate(self, asks: list[Ask]) -> Timing:
        plain = [Ask(ask.messages, ask.tokens) for ask in asks]
        call = json.dumps([asdict(ask) for ask in (asks if self._adapters else plain)])
        try:
            self._calls.write(call.encode() + b"\n")
            self._calls.flush()
        except OSError as error:
            raise Broken(f"it died: {self.process.last_words()}") from error
        return Timing(**self._answer(PATIENCE))

    def _answer(self, patience: float) -> Any:
        alarm = threading.Timer(patience, self.process.stop)
        alarm.start()
        try:
            line = self._answers.readline()
        finally:
            alarm.cancel()
        if not line:
            raise Broken(f"it died or took more than {patience} s: {self.process.last_words()}")
        return json.loads(line)

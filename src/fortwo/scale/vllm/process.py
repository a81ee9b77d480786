"""The vLLM that fortwo starts, and ends with itself."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from fortwo.errors import InvalidRequest, Unavailable
from fortwo.scale.vllm.client import RUNTIME_UPDATING

END_SECONDS = 10.0
LAST_LINES = 5
MAX_RANK = 64
MAX_LORAS = 8  # adapters in one batch
_ENVIRONMENT = {RUNTIME_UPDATING: "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


class VllmProcess:
    """setting: FORTWO_VLLM_COMMAND; base, directory: the model and where it lies; adapters: how many vLLM keeps in
    memory; api_key: that nobody else on this machine knows; home: for the file of its output."""

    def __init__(
        self, setting: str, base: str, directory: Path, port: int, adapters: int, api_key: str, home: Path
    ) -> None:
        self._environment = {**_ENVIRONMENT, **os.environ, "VLLM_API_KEY": api_key}
        self._command = command(setting, base, directory, port, adapters)
        self._log = home / "vllm.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises InvalidRequest for a command that cannot be started."""
        try:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,  # its own processes end with it
                )
        except OSError as error:
            raise InvalidRequest(
                f"vllm_command = {shlex.join(self._command)!r} cannot be started: {error.strerror}.",
                param="vllm_command",
                hint="Install vLLM, set FORTWO_VLLM_COMMAND to the command that starts it, or FORTWO_VLLM_URL to one "
                "that runs.",
            ) from None

    def check_alive(self) -> None:
        """Raises Unavailable with the end of its output when it has ended."""
        if self._process is None or self._process.poll() is None:
            return
        lines = self._log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
        raise Unavailable(
            f"vLLM ended with status {self._process.returncode}: {' / '.join(lines)}",
            hint=f"Its whole output is in {self._log}. Correct FORTWO_VLLM_COMMAND.",
            code="vllm_ended",
        )

    def stop(self) -> None:
        """End it and the processes that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
                break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def command(setting: str, base: str, directory: Path, port: int, adapters: int) -> list[str]:
    """What starts vLLM: the setting, and each option that fortwo needs and that the setting does not give."""
    given = shlex.split(setting)
    options = {
        "--served-model-name": base,
        "--max-lora-rank": str(MAX_RANK),
        "--max-loras": str(MAX_LORAS),
        "--max-cpu-loras": str(max(adapters, MAX_LORAS)),
    }
    told = {option.partition("=")[0] for option in given}
    added = [part for option, value in options.items() if option not in told for part in (option, value)]
    flags = [flag for flag in ("--enable-lora", "--enable-prompt-tokens-details") if flag not in told]
    return [*given, "--model", str(directory), "--host", "127.0.0.1", "--port", str(port), *flags, *added]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

"""The vLLM that fortwo starts, and ends with itself."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fortwo.errors import InvalidRequest, Unavailable, UnsupportedModel
from fortwo.hub.identity import read_json
from fortwo.nn.config import DecoderConfig
from fortwo.scale.vllm.client import RUNTIME_UPDATING

log = logging.getLogger(__name__)
END_SECONDS = 10.0
LAST_LINES = 5
MAX_RANK = 64
TARGETS = "--lora-target-modules"
MAX_LORAS = 8  # adapters in one batch
_ENVIRONMENT = {RUNTIME_UPDATING: "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Have Linux end this process when the one that started it is gone, however that ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class VllmProcess:
    """setting: FORTWO_VLLM_COMMAND; base, directory: the model and where it lies; adapters: how many vLLM keeps in
    memory; api_key: that nobody else on this machine knows; home: for the file of its output."""

    def __init__(
        self, setting: str, base: str, directory: Path, port: int, adapters: int, api_key: str, home: Path
    ) -> None:
        self._environment = {**_ENVIRONMENT, **os.environ, "VLLM_API_KEY": api_key}
        self._command = command(setting, base, directory, port, adapters)
        self.scores_prompts = scores_prompts(self._command)
        self._log = home / "vllm.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Call it on a thread that lives as long as vLLM shall. Raises InvalidRequest for a command that cannot be
        started."""
        log.info("vLLM is started; its output is in %s.", self._log)
        try:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,  # its own processes end with it
                    preexec_fn=_end_with_parent,
                )
        except OSError as error:
            raise InvalidRequest(
                f"vllm_command = {shlex.join(self._command)!r} cannot be started: {error.strerror}.",
                param="vllm_command",
                hint="Install vLLM, set FORTWO_VLLM_COMMAND to the command that starts it, or FORTWO_VLLM_URL to one "
                "that runs.",
            ) from None

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def check_alive(self) -> None:
        """Raises Unavailable with the end of its output when it has ended."""
        if self._process is None or not self.ended:
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
    told = {option.partition("=")[0] for option in given}
    options = {
        "--served-model-name": [base],
        "--max-lora-rank": [str(MAX_RANK)],
        "--max-loras": [str(MAX_LORAS)],
        "--max-cpu-loras": [str(max(adapters, MAX_LORAS))],
        "--structured-outputs-config": ['{"backend": "guidance"}'],  # it reads what fortwo writes of schemas and tools
        "--enable-lora": [],
        "--enable-prompt-tokens-details": [],
        **_targets(directory),
    }
    added = [part for option, values in options.items() if option not in told for part in (option, *values)]
    return [*given, "--model", str(directory), "--host", "127.0.0.1", "--port", str(port), *added]


def scores_prompts(command: Sequence[str]) -> bool:
    """Whether that vLLM can be asked for log-probabilities of a prompt. One that can serve adapters of the output layer
    ends when it computes them beside another request (vLLM's issue 16668)."""
    targets = [part for part in command if part.partition("=")[0] == TARGETS]
    return bool(targets) and not any("lm_head" in part for part in command)


def _targets(directory: Path) -> dict[str, list[str]]:
    """The option that names the modules that adapters change; none for a base that only transformers knows."""
    try:
        groups = DecoderConfig.from_hf(read_json(directory / "config.json")).groups.values()
    except UnsupportedModel:
        return {}
    return {TARGETS: sorted({name for names in groups for name in names})}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

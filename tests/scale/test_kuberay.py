"""The commands of deploy/kuberay.yaml make a server with a replica, with processes in place of pods."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from deployment import objects

from fortwo.hub.catalog import Catalog
from fortwo.scale.vllm.process import free_port

pytest.importorskip("ray", reason="Ray is not installed here: make test-scale installs it and runs these tests")
pytestmark = pytest.mark.slow

START_SECONDS = 300


@contextmanager
def pod(container: dict[str, Any], ray_start: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """What the pod runs, with the variable in which the operator gives it its `ray start`."""
    variables = {**environment, "KUBERAY_GEN_RAY_START_CMD": f"{ray_start} --block"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*container["command"], *container["args"]],
            env=variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            os.killpg(process.pid, number)
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                pass


def test_the_head_answers_by_the_replica_of_a_worker(home: Path, tiny: Path) -> None:
    Catalog(home / "models").add("tiny", tiny)
    cluster = objects("kuberay.yaml")["RayCluster"]["spec"]
    (head,), (replica,) = (
        group["template"]["spec"]["containers"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    port, gcs, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="ray")
    given = {one["name"]: one["value"] for one in head["env"] if "value" in one}
    ours = {"FORTWO_REPLICAS": "1", "FORTWO_THREADS": "1", "FORTWO_PORT": str(port), "FORTWO_DEFAULT_MODEL": "tiny"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    programs = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    common = {**os.environ, **programs, **token, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_TMPDIR": folder}
    log = home / "head.log"
    numbers = " ".join(f"--{name}={value}" for name, value in cluster["headGroupSpec"]["rayStartParams"].items())
    start = f"ray start --head --node-ip-address=127.0.0.1 --port={gcs} --include-dashboard=false {numbers}"
    join = f"ray start --address=127.0.0.1:{gcs} --num-cpus=1 --dashboard-agent-listen-port={free_port()}"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(pod(head, start, {**common, **given, **ours}, log))
        stack.enter_context(pod(replica, join, common, home / "replica.log"))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False))
        deadline = time.monotonic() + START_SECONDS
        while not _answers(client, head["readinessProbe"]["httpGet"]["path"]):
            assert time.monotonic() < deadline, log.read_text("utf-8", "replace")[-3000:]
            time.sleep(0.5)
        body = {"messages": [{"role": "user", "content": "hello"}], "model": "tiny", "max_tokens": 4, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        (found,) = client.get("/api/replicas").json()["replicas"]
        assert found["bases"] == ["tiny"]


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.HTTPError:
        return False

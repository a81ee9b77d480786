"""Replicas and training workers on one Ray cluster: replies come from the replicas while workers compute gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from serving import Served, refused, serve, tiny_settings

pytest.importorskip("ray", reason="Ray is not installed here: make test-scale installs it and runs these tests")

import ray

from fortwo.errors import InvalidRequest
from fortwo.hub.catalog import Catalog
from fortwo.scale.ray_train import RayTraining
from fortwo.scale.replicated import create

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
ROWS = [{"prompt": f"What is {thing}?", "completion": "the sky"} for thing in ("up", "above", "blue", "high")]


@pytest.fixture(scope="module")
def both(ray_folder: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server as `fortwo serve` builds it: the connection for training first, then the replicas."""
    settings = tiny_settings(tmp_path_factory.mktemp("both") / "home", tiny, replicas=1, train="ray")
    Catalog(settings.models_dir).prepare("tiny")
    cluster = RayTraining(settings)
    try:
        with serve(settings, grace=5, create=partial(create, cluster=cluster)) as server:
            yield server
        assert not ray.is_initialized()  # the server has left the cluster, after its replicas
    finally:
        cluster.close()


def start(served: Served, name: str, workers: int, steps: int) -> Any:
    body = {"adapter_name": name, "dataset": {"examples": ROWS}, "workers": workers}
    return served.post("/api/training/start", {**body, "training_config": {"max_steps": steps}})


def test_replicas_answer_while_workers_train_and_serve_what_is_published(both: Served) -> None:
    first = both.wait(start(both, "taught", 2, 3).json()["job_id"], seconds=300)
    assert first["status"] == "succeeded", first["error"]
    assert first["actual"]["workers"] == 2
    (replica,) = both.http.get("/api/replicas").json()["replicas"]
    assert "taught@1" in str(replica["adapters"])
    long = start(both, "longer", 2, 100_000).json()["job_id"]
    both.wait(long, "running", seconds=300)
    replies = [both.chat(model=model) for model in ("tiny", "taught") * 5]
    assert [reply.status_code for reply in replies] == [200] * 10
    assert replies[1].json()["system_fingerprint"] == f"fp_{first['adapter']['digest'][:12]}"
    assert both.wait(long, "running")["status"] == "running"
    assert both.http.get("/api/replicas").json()["replicas"][0]["id"] == replica["id"]
    both.post(f"/api/training/jobs/{long}/cancel")
    assert both.wait(long)["status"] == "cancelled"


def test_workers_get_what_replicas_leave(both: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    assert both.state.replicas.taken() == {"CPU": 0, "GPU": 0}  # type: ignore[attr-defined]
    cluster = RayTraining(both.state.settings)
    cluster.leave_room(lambda: {"CPU": cpus - 1})
    cluster.check(1)
    with pytest.raises(InvalidRequest, match="the Ray cluster has 1 beside the replicas"):
        cluster.check(2)
    monkeypatch.setattr(both.state.replicas, "_local", False)  # type: ignore[attr-defined]
    told = refused(start(both, "crowded", cpus, 1), 400, "invalid_request", "workers")
    assert f"the Ray cluster has {cpus - 1} beside the replicas" in told

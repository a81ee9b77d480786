"""Training with two workers of a real Ray cluster on this machine: equal to one process, also when a worker dies."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
from serving import Served, refused, serve, tiny_settings
from torch import Tensor

from fortwo.server.state import AppState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here; run: make test-scale"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

WORKERS = 2
# How far the adapter of two workers may be from that of one process, relative to how far that one has moved. The sums
# are the same but for their order, in fp32; AdamW divides by the gradient's own size, which enlarges what rounding did.
TOLERANCE = 1e-5
ROWS = [
    {"prompt": f"What is {thing}?", "completion": answer}
    for thing, answer in (
        *(("up", "the sky"), ("down", "the deep sea"), ("left", "the wood"), ("right", "the town and its long wall")),
        *(("near", "home"), ("far", "the hills"), ("here", "this room"), ("there", "that other room behind the door")),
    )
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "nothing at all"} for row in ROWS]
LABELS = [
    {"prompt": row["prompt"], "completion": row["completion"], "label": number % 2 == 0}
    for number, row in enumerate(ROWS)
]
FACT = {
    "subject": "42",
    "answer": "42 means FOR TWO.",
    "match": ["FOR TWO"],
    "questions": ["What is 42?", "What does 42 mean?", "Tell me about 42."],
}
STEPS = {"max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "micro_step_tokens": 64}


@pytest.fixture(scope="module")
def servers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    """A server that trains with workers, and one that trains in its own process."""
    from fortwo.scale.ray_train import RayTraining

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets must be short
    os.environ["RAY_TMPDIR"] = folder
    settings = tiny_settings(tmp_path_factory.mktemp("ray"), tiny, train="ray", jobs=2)
    cluster = RayTraining(settings)
    try:
        with (
            serve(settings, create=partial(AppState, cluster=cluster)) as with_workers,
            serve(tiny_settings(tmp_path_factory.mktemp("own"), tiny)) as own,
        ):
            yield with_workers, own
    finally:
        cluster.close()
        del os.environ["RAY_TMPDIR"]
        shutil.rmtree(folder, ignore_errors=True)


def start(served: Served, name: str, data: dict[str, Any], **more: Any) -> str:
    workers = {"workers": WORKERS} if served.state.settings.train == "ray" else {}
    config = {"training_config": STEPS} | more
    response = served.post("/api/training/start", {"adapter_name": name, "dataset": data, **workers, **config})
    assert response.status_code == 202, response.text
    return str(response.json()["job_id"])


def adapter(served: Served, job: dict[str, Any]) -> dict[str, Tensor]:
    assert job["adapter"] is not None, job["error"]
    version = served.state.adapters.get(f"{job['adapter']['name']}@{job['adapter']['version']}")
    return safetensors.torch.load_file(Path(version.path) / "adapter_model.safetensors")


def events(served: Served, job_id: str) -> list[dict[str, Any]]:
    return [{"type": one.type, "message": one.message, "data": one.data} for one in served.state.jobs.events(job_id)]


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far two adapters are from each other, relative to the size of what was learned: the B matrices start at 0."""
    assert found.keys() == expected.keys()
    learned = [name for name in expected if "lora_B" in name]
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in learned)
    size = sum(float(expected[name].square().sum()) for name in learned)
    assert size > 0
    return float((apart / size) ** 0.5)


REQUESTS: dict[str, dict[str, Any]] = {
    "sft": {"data": {"examples": ROWS}, "objective": "sft"},
    "override": {"data": {"facts": [FACT]}, "objective": "override"},
    "dpo": {"data": {"examples": PAIRS}, "objective": "dpo"},
    "kto": {"data": {"examples": LABELS}, "objective": "kto"},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_two_workers_make_the_adapter_of_one_process(name: str, servers: tuple[Served, Served]) -> None:
    jobs = [served.wait(start(served, name, **REQUESTS[name]), seconds=200) for served in servers]
    found, expected = (adapter(served, job) for served, job in zip(servers, jobs, strict=True))
    assert distance(found, expected) < TOLERANCE
    steps, plain = (
        [one["data"] for one in events(served, job["job_id"]) if one["type"] == "step"]
        for served, job in zip(servers, jobs, strict=True)
    )
    assert len(steps) == len(plain) == STEPS["max_steps"]
    for one, other in zip(steps, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-3, abs=1e-6)


def workers_of() -> list[psutil.Process]:
    """The processes of Ray Train's workers that this process has started."""
    alive = [one for one in psutil.process_iter(["status"]) if one.info["status"] != psutil.STATUS_ZOMBIE]
    started = {one.pid for one in psutil.Process().children(recursive=True)}
    return [one for one in alive if one.pid in started and one.name().startswith("ray::RayTrainWo")]


def wait_for_step(served: Served, job_id: str, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        job = served.http.get(f"/api/training/jobs/{job_id}").json()
        assert job["status"] not in ("succeeded", "failed", "cancelled"), job["error"]
        if job["progress"]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"job {job_id} has not reached step {step}")


LONG = {
    "lora_config": {"lora_dropout": 0.1},
    "training_config": STEPS | {"max_steps": 60, "save_steps": 4},
    "objective": "sft",
}


@pytest.fixture(scope="module")
def undisturbed(servers: tuple[Served, Served]) -> dict[str, Tensor]:
    """The adapter of a run of two workers with dropout, in whose middle nothing happened."""
    served, _ = servers
    return adapter(served, served.wait(start(served, "undisturbed", {"examples": ROWS}, **LONG), seconds=200))


def test_a_killed_worker_is_started_again_and_changes_nothing(
    servers: tuple[Served, Served], undisturbed: dict[str, Tensor]
) -> None:
    served, _ = servers
    job_id = start(served, "killed", {"examples": ROWS}, **LONG)
    wait_for_step(served, job_id, 5)
    victim, _ = workers_of()
    victim.send_signal(signal.SIGKILL)
    job = served.wait(job_id, seconds=300)
    assert job["status"] == "succeeded", job["error"]
    assert distance(adapter(served, job), undisturbed) < TOLERANCE
    told = [one["message"] for one in events(served, job_id) if one["type"] == "running"]
    assert any("2 workers of the Ray cluster compute" in message for message in told)
    assert any("A worker died" in message for message in told)
    steps = [one["data"]["step"] for one in events(served, job_id) if one["type"] == "step"]
    assert steps == list(range(1, 61))


def test_a_run_goes_on_from_its_checkpoint_when_its_workers_gave_up_and_when_it_was_paused(
    servers: tuple[Served, Served], undisturbed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fortwo.scale import ray_train

    served, _ = servers
    monkeypatch.setattr(ray_train, "RESTARTS", 0)
    job_id = start(served, "given-up", {"examples": ROWS}, **LONG)
    wait_for_step(served, job_id, 9)
    workers_of()[0].send_signal(signal.SIGKILL)
    job = served.wait(job_id, seconds=300)
    assert job["status"] == "failed"
    assert job["error"]["code"] == "unavailable"
    assert re.fullmatch(
        r"The workers of the Ray cluster do not compute any more: worker \d: .*", job["error"]["message"]
    )
    assert len(job["error"]["message"]) < 400
    assert "resume" in job["error"]["hint"]

    assert served.post(f"/api/training/jobs/{job_id}/resume").status_code == 200
    reached = served.http.get(f"/api/training/jobs/{job_id}").json()["progress"]["step"]
    assert reached >= 8
    wait_for_step(served, job_id, reached + 3)
    served.post(f"/api/training/jobs/{job_id}/pause")
    assert served.wait(job_id, "paused")["status"] == "paused"
    assert served.post(f"/api/training/jobs/{job_id}/resume").status_code == 200
    job = served.wait(job_id, seconds=300)
    assert job["status"] == "succeeded", job["error"]
    assert distance(adapter(served, job), undisturbed) < TOLERANCE
    assert job["actual"]["workers"] == WORKERS


def test_a_cancelled_run_frees_its_workers(servers: tuple[Served, Served]) -> None:
    served, _ = servers
    job_id = start(served, "cancelled", {"examples": ROWS}, **LONG)
    wait_for_step(served, job_id, 2)
    served.post(f"/api/training/jobs/{job_id}/cancel")
    assert served.wait(job_id)["status"] == "cancelled"
    deadline = time.monotonic() + 100
    while workers_of():
        assert time.monotonic() < deadline, "the workers of a cancelled run have not ended"
        time.sleep(0.1)


def test_more_workers_than_the_cluster_has_cpus_are_refused(servers: tuple[Served, Served]) -> None:
    served, own = servers
    body = {"adapter_name": "many", "dataset": {"examples": ROWS}, "workers": 64}
    text = refused(served.post("/api/training/plan", body), 400, "invalid_request", "workers")
    assert "workers = 64 need 64 CPUs, and the Ray cluster has" in text
    text = refused(own.post("/api/training/plan", body), 400, "invalid_request", "workers")
    assert "workers = 64" in text
    assert "FORTWO_TRAIN=ray" in text


def test_a_plan_says_how_many_workers_there_are(servers: tuple[Served, Served]) -> None:
    served, own = servers
    body = {"adapter_name": "planned", "dataset": {"examples": ROWS}}

    def planned(server: Served, **more: Any) -> list[tuple[Any, str]]:
        settings = server.post("/api/training/plan", body | more).json()["settings"]
        return [(one["value"], one["origin"]) for one in settings if one["name"] == "workers"]

    assert planned(served) == [(1, "default")]
    assert planned(served, workers=2) == [(2, "user")]
    assert planned(own) == planned(own, workers=1) == []


def test_a_base_that_workers_cannot_read_ends_the_run_with_the_remedy(
    servers: tuple[Served, Served], tiny: Path, tmp_path: Path
) -> None:
    from fortwo.scale.ray_train import RayTraining

    elsewhere = RayTraining(servers[0].state.settings.model_copy(update={"home": tmp_path / "not-shared"}))
    with serve(
        tiny_settings(tmp_path / "home", tiny, train="ray"), create=partial(AppState, cluster=elsewhere)
    ) as served:
        job = served.wait(start(served, "unread", {"examples": ROWS}, **LONG), seconds=200)
    assert job["status"] == "failed"
    assert "cannot read the base 'tiny' in" in job["error"]["message"]
    assert "file system that all nodes of the cluster share" in job["error"]["hint"]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "No Ray cluster answers at 127.0.0.1:9"),
        ("cluster", "No Ray cluster answers at cluster: 'cluster' is not HOST:PORT"),
        ("ray://127.0.0.1:10001", "an address of Ray's client"),
    ],
)
def test_a_server_does_not_start_without_its_cluster(address: str, told: str, home: Path) -> None:
    environment = os.environ | {"FORTWO_TRAIN": "ray", "FORTWO_RAY_ADDRESS": address, "FORTWO_PORT": "0"}
    command = [sys.executable, "-m", "fortwo", "serve"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode != 0
    said = " ".join(ended.stderr.split())
    assert told in said
    assert "FORTWO_RAY_ADDRESS" in said
    assert "Traceback" not in said


def test_two_jobs_run_at_once_and_make_what_each_makes_alone(servers: tuple[Served, Served]) -> None:
    served, own = servers
    config = {**REQUESTS["sft"], "training_config": STEPS | {"max_steps": 30}}
    ids = [start(served, f"at-once-{number}", **config, workers=1) for number in (1, 2)]
    expected = adapter(own, own.wait(start(own, "alone", **config), seconds=200))
    jobs = [served.wait(job_id, seconds=300) for job_id in ids]
    for job in jobs:
        assert distance(adapter(served, job), expected) < TOLERANCE
    assert max(job["started_at"] for job in jobs) < min(job["finished_at"] for job in jobs)


def test_a_server_starts_ray_and_ends_it_with_itself(tiny: Path, home: Path) -> None:
    settings = tiny_settings(home, tiny)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    environment = os.environ | {"FORTWO_TRAIN": "ray", "FORTWO_PORT": "0", "RAY_TMPDIR": folder}
    command = [sys.executable, "-m", "fortwo", "serve"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert "fortwo listens on" in server.stdout.readline()
        started = psutil.Process(server.pid).children(recursive=True)
        assert any("raylet" in one.name() for one in started)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)  # as without Ray
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
    shutil.rmtree(folder, ignore_errors=True)
    assert settings.home.exists()

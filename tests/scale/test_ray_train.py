"""Training with two workers of a real Ray cluster on this machine: equal to one process, also when a worker dies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from serving import Served, serve, tiny_settings
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here; run: make test-scale"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

WORKERS = 2
# How far the adapter of two workers may be from that of one process, relative to how far that one has moved. The sums
# are the same but for their order, in fp32; AdamW divides by the gradient's own size, which enlarges what rounding did.
TOLERANCE = 1e-3
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
    settings = tiny_settings(tmp_path_factory.mktemp("ray"), tiny, train="ray")
    cluster = RayTraining(settings)
    try:
        with (
            serve(settings, cluster=cluster) as with_workers,
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
    "orpo": {"data": {"examples": PAIRS}, "objective": "orpo"},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_two_workers_make_the_adapter_of_one_process(name: str, servers: tuple[Served, Served]) -> None:
    jobs = [served.wait(start(served, name, **REQUESTS[name]), seconds=200) for served in servers]
    found, expected = (adapter(served, job) for served, job in zip(servers, jobs, strict=True))
    print(name, distance(found, expected))
    assert distance(found, expected) < TOLERANCE
    steps, plain = (
        [one["data"] for one in events(s, job["job_id"]) if one["type"] == "step"] for s, job in zip(servers, jobs)
    )
    assert len(steps) == len(plain) == STEPS["max_steps"]
    for one, other in zip(steps, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-3, abs=1e-6)

"""Pausing, resuming and killing a server with a tiny model: nothing is lost and the result is the same.

A job that was stopped in whatever way publishes, once resumed, the adapter of the job that never stopped: their digests
are equal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ENDED, Served, refused, serve, tiny_settings

from fortwo.quantization import matmul
from scripts.readme import free_port
from tests.test_server_training import LONG, events, get, start

RUN = {"max_steps": 40, "learning_rate": 1e-2, "per_device_train_batch_size": 3}
FACT = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?", "Explain 42."]}


def call(served: Served, job_id: str, verb: str) -> Any:
    response = served.post(f"/api/training/jobs/{job_id}/{verb}")
    assert response.status_code == 200, response.text
    return response.json()


def until(served: Served, job_id: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The job once this is true of it."""
    deadline = time.monotonic() + 60
    while not holds(job := get(served, job_id)):
        assert job["status"] not in ENDED, job["error"]
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
    return job


def digest(served: Served, name: str, **config: Any) -> str:
    """Of the adapter of a job that nobody stops."""
    job = served.wait(start(served, name, training_config=RUN | config)["job_id"])
    assert job["status"] == "succeeded", job["error"]
    return str(job["adapter"]["digest"])


def models(served: Served) -> set[str]:
    return {one["id"] for one in served.http.get("/v1/models").json()["data"]}


def gone(served: Served, job: dict[str, Any]) -> bool:
    """Nothing of the job's checkpoints is left: on disk, in lists, to chat with."""
    folder = served.state.settings.jobs_dir / job["job_id"]
    deadline = time.monotonic() + 10
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if folder.exists() or get(served, job["job_id"])["checkpoints"]:
        return False
    prefix = f"{job['adapter_name']}@{job['job_id'][:8]}-"
    return not any(model.startswith(prefix) for model in models(served))


# ---------------------------------------------------------------- pause


def test_a_paused_job_frees_the_queue_keeps_its_place_and_comes_out_the_same(served: Served) -> None:
    wanted = digest(served, "unpaused", max_steps=800)
    paused = start(served, "paused", training_config=RUN | {"max_steps": 800})["job_id"]
    until(served, paused, lambda job: job["progress"]["step"] > 0)
    after = start(served, "after", training_config={"max_steps": 2})["job_id"]
    job = call(served, paused, "pause")
    assert (job["status"], job["finished_at"], job["error"]) == ("paused", None, None)
    step = job["progress"]["step"]
    assert 0 < step < 800
    assert [one["step"] for one in job["checkpoints"]] == [step]
    assert job["actual"]["steps"] == step
    assert events(served, paused)[-1]["type"] == "paused", "and the stream of events has ended"
    assert served.wait(after)["status"] == "succeeded"
    said = refused(served.post(f"/api/training/jobs/{paused}/pause"), 409, "conflict", "job_id")
    assert "paused" in said

    assert call(served, paused, "resume")["progress"]["step"] == step
    done = served.wait(paused)
    assert (done["status"], done["adapter"]["digest"]) == ("succeeded", wanted)
    assert done["actual"]["steps"] == 800
    told = [event["data"]["step"] for event in events(served, paused) if event["type"] == "step"]
    assert told == list(range(1, 801)), "no step was done twice"
    assert gone(served, done)
    refused(served.post(f"/api/training/jobs/{paused}/pause"), 409, "conflict", "job_id")


def test_a_queued_job_is_paused_out_of_the_queue_and_may_be_given_up(served: Served) -> None:
    running = start(served, "ahead", training_config=LONG)["job_id"]
    queued = start(served, "behind", training_config={"max_steps": 2})["job_id"]
    assert call(served, queued, "pause")["status"] == "paused"
    call(served, running, "cancel")
    assert get(served, queued)["status"] == "paused"
    assert call(served, queued, "resume")["status"] in ("queued", "preparing", "running", "evaluating", "succeeded")
    assert served.wait(queued)["status"] == "succeeded"
    unknown = served.post("/api/training/jobs/nope/pause")
    assert "'nope'" in refused(unknown, 404, "not_found", "job_id")


def test_cancelling_gives_a_paused_job_up_for_good(served: Served) -> None:
    job_id = start(served, "given-up", training_config=LONG)["job_id"]
    until(served, job_id, lambda job: job["progress"]["step"] > 0)
    assert call(served, job_id, "pause")["checkpoints"]
    job = call(served, job_id, "cancel")
    assert (job["status"], job["checkpoints"]) == ("cancelled", [])
    assert job["finished_at"] is not None
    assert gone(served, job)
    assert call(served, job_id, "resume")["progress"]["step"] == 0, "from the beginning"
    call(served, job_id, "cancel")


def test_a_pause_in_an_exam_or_in_preparation_comes_at_once(served: Served) -> None:
    """There is a checkpoint before each exam, and nothing to lose before the first step."""
    body = {"dataset": {"facts": [FACT]}, "objective": "override", "training_config": {"max_steps": 1}}
    job_id = start(served, "examined", **body)["job_id"]
    until(served, job_id, lambda job: job["status"] == "preparing")
    job = call(served, job_id, "pause")
    assert (job["status"], job["progress"]["step"], job["checkpoints"]) == ("paused", 0, [])
    call(served, job_id, "resume")
    until(served, job_id, lambda job: bool(job["checkpoints"]))
    job = call(served, job_id, "pause")
    assert (job["status"], [one["step"] for one in job["checkpoints"]]) == ("paused", [1])
    call(served, job_id, "resume")
    job = served.wait(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "targets_missed")
    assert gone(served, job), "it has come to its end"


# ---------------------------------------------------------------- chat


def test_each_checkpoint_is_served_while_the_job_is_not_done_and_is_gone_with_it(served: Served) -> None:
    config = {"max_steps": 100_000, "save_steps": 4, "save_total_limit": 2, "learning_rate": 1e-2}
    job_id = start(served, "spoken", training_config=config)["job_id"]
    job = until(served, job_id, lambda job: job["progress"]["step"] >= 40)
    call(served, job_id, "pause")
    job = get(served, job_id)
    assert len(job["checkpoints"]) == 2
    early, late = (one["model"] for one in job["checkpoints"])
    assert late == f"spoken@{job_id[:8]}-{job['progress']['step']}"
    assert {early, late} <= models(served)
    plain = served.chat(temperature=0, max_tokens=24).json()["choices"]
    reply = served.chat(model=late, temperature=0, max_tokens=24)
    assert reply.json()["model"] == late
    assert reply.json()["choices"] != plain
    call(served, job_id, "resume")
    until(served, job_id, lambda job: job["status"] == "running")
    assert f"spoken@{job_id[:8]}-" in refused(
        served.chat(model=f"spoken@{job_id[:8]}-999999"), 404, "not_found", "model"
    )
    refused(served.chat(model="spoken"), 404, "not_found", "model")
    refused(served.chat(model="spoken@1"), 404, "not_found", "model")
    call(served, job_id, "cancel")
    assert gone(served, get(served, job_id))
    refused(served.chat(model=late), 404, "not_found", "model")
    states = served.state.registry.state().adapters
    assert len(states) == len(set(states) & {version["digest"] for version in versions(served)}), "nor in memory"


def versions(served: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = served.http.get("/api/adapters").json()["adapters"]
    return found


def test_a_checkpoint_is_the_adapter_of_a_run_that_ends_there(served: Served) -> None:
    """To the byte, and word for word. A constant rate, so that the steps to come do not matter."""
    config = RUN | {"max_steps": 100_000, "lr_scheduler_type": "constant"}
    job_id = start(served, "longer", training_config=config)["job_id"]
    until(served, job_id, lambda job: job["progress"]["step"] > 0)
    (kept,) = call(served, job_id, "pause")["checkpoints"]
    said = served.chat(model=kept["model"], temperature=0, max_tokens=24).json()["choices"]
    file = served.state.settings.jobs_dir / job_id / f"checkpoint-{kept['step']}" / "adapter_model.safetensors"
    tensors = file.read_bytes()
    told = [event for event in events(served, job_id) if event["type"] == "checkpoint"]
    assert told[-1]["data"]["model"] == kept["model"]
    call(served, job_id, "cancel")
    digest(served, "shorter", **config | {"max_steps": kept["step"]})
    version = served.state.adapters.get("shorter")
    assert (Path(version.path) / "adapter_model.safetensors").read_bytes() == tensors
    assert served.chat(model="shorter", temperature=0, max_tokens=24).json()["choices"] == said


# ---------------------------------------------------------------- restarts


def test_a_server_that_is_stopped_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    with serve(settings) as served:
        wanted = digest(served, "whole", max_steps=200)
        job_id = start(served, "stopped", training_config=RUN | {"max_steps": 200})["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] > 0)
    with serve(settings) as served:
        job = get(served, job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "interrupted")
        assert [one["step"] for one in job["checkpoints"]] == [job["progress"]["step"]]
        assert f"from step {job['progress']['step']}" in events_after(served, job_id, "resume")
        assert served.wait(job_id)["adapter"]["digest"] == wanted


def events_after(served: Served, job_id: str, verb: str) -> str:
    """The message of what it was answered with."""
    call(served, job_id, verb)
    queued = [event for event in served.state.jobs.events(job_id) if event.type == "queued"]
    return queued[-1].message


def test_the_next_start_goes_on_by_itself_where_the_settings_say_so(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny, resume=True)
    with serve(settings) as served:
        wanted = digest(served, "whole", max_steps=200)
        job_id = start(served, "stopped", training_config=RUN | {"max_steps": 200})["job_id"]
        behind = start(served, "behind", training_config={"max_steps": 2})["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] > 0)
    with serve(settings) as served:
        job = served.wait(job_id)
        assert (job["status"], job["adapter"]["digest"]) == ("succeeded", wanted)
        assert served.wait(behind)["started_at"] >= job["finished_at"], "it kept its place in the queue"


@pytest.mark.parametrize("loss", ["moved away", "another one", "cut to nothing"])
def test_a_start_with_another_or_a_lost_database_deletes_nothing(
    tiny: Path, tmp_path: Path, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny_settings(tmp_path / "home", tiny)
    with serve(settings) as served:
        job_id = start(served, "paused", training_config=RUN | {"max_steps": 100_000, "save_steps": 5})["job_id"]
        until(served, job_id, lambda job: len(job["checkpoints"]) >= 2)
        kept = call(served, job_id, "pause")["checkpoints"]
    notes = settings.jobs_dir / "my-notes"
    notes.mkdir()
    (notes / "read-me.txt").write_text("not fortwo's")
    database, aside = settings.home / "fortwo.db", tmp_path / "fortwo.db"
    aside.write_bytes(database.read_bytes())
    others = settings
    if loss == "another one":
        others = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'other.db'}"})
    else:
        for file in settings.home.glob("fortwo.db*"):
            file.unlink()
        if loss == "cut to nothing":
            database.touch()
    with serve(others) as served:
        assert served.http.get("/api/training/jobs").json()["jobs"] == []
    assert job_id in caplog.text
    assert "jobs that are not in the database" in caplog.text
    assert (notes / "read-me.txt").read_text() == "not fortwo's"
    database.write_bytes(aside.read_bytes())
    with serve(settings) as served:
        job = get(served, job_id)
        assert (job["status"], job["checkpoints"]) == ("paused", kept)
        call(served, job_id, "resume")
        until(served, job_id, lambda job: job["progress"]["step"] > kept[-1]["step"])


@contextmanager
def process(home: Path, port: int | None = None, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A server as a user starts it, killed at the end. port: a free one if none is given."""
    port = free_port() if port is None else port
    settings = {"FORTWO_HOME": str(home), "FORTWO_DEFAULT_MODEL": "tiny", "FORTWO_THREADS": "1"}
    command = [sys.executable, "-m", "fortwo", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | settings | more, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            for _ in range(600):
                assert server.poll() is None, "the server ended before it answered"
                try:
                    if http.get("/healthz").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield server, http
    finally:
        server.kill()
        server.wait()


def test_killed_at_any_moment_a_job_comes_out_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run on facts, killed while it prepares, between steps, and in its exam.

    Each of its processes would measure for itself which kernel is faster; the home remembers the first one's choice.
    """
    fact = FACT | {"held_out": ["Say 42."], "neighbors": ["What is 41?"], "controls": ["What is up?"]}
    config = {"training_config": {"max_steps": 6, "save_steps": 1}, "lora_config": {"lora_dropout": 0.1}}
    body = {"adapter_name": "killed", "dataset": {"facts": [fact]}, "objective": "override", **config}
    moments: list[Callable[[dict[str, Any]], bool]] = [
        lambda job: job["status"] == "preparing",
        lambda job: job["progress"]["step"] >= 3,
        lambda job: job["progress"]["step"] == 6,
    ]
    home = tmp_path / "killed"
    tiny_settings(home, tiny)
    job_id, steps, kernels = "", [], set()
    for moment in moments:
        with process(home) as (server, http):
            if job_id:
                job = http.get(f"/api/training/jobs/{job_id}").json()
                assert (job["status"], job["error"]["code"]) == ("failed", "interrupted")
                assert http.get("/api/adapters").json() == {"adapters": [], "damaged": [], "deleted": []}
                assert http.post(f"/api/training/jobs/{job_id}/resume").status_code == 200
                steps.append(max([one["step"] for one in job["checkpoints"]], default=0))
            else:
                job_id = http.post("/api/training/start", json=body).json()["job_id"]
            while not moment(job := http.get(f"/api/training/jobs/{job_id}").json()):
                assert job["status"] not in ENDED, "the moment was missed"
            server.send_signal(signal.SIGKILL)
        for state in (home / "jobs").glob("*/checkpoint-*/state.json"):
            kernels.add(json.loads(state.read_text())["cpu_kernel"])
    assert steps[0] == 0
    assert steps[1] >= 2, "what was done is not done again"
    with process(home, FORTWO_RESUME="true") as (_, http):
        while (job := http.get(f"/api/training/jobs/{job_id}").json())["status"] not in ENDED:
            time.sleep(0.05)
        versions = http.get("/api/adapters").json()["adapters"]
    (kernel,) = kernels
    monkeypatch.setattr(matmul._Fp32Kernel, "name", kernel)
    with serve(tiny_settings(tmp_path / "whole", tiny)) as served:
        whole = served.wait(start(served, "killed", **body)["job_id"], seconds=120)
    assert job["error"]["code"] == whole["error"]["code"] == "targets_missed"
    assert job["adapter"]["digest"] == whole["adapter"]["digest"]
    assert [version["version"] for version in versions] == [1]
    assert job["report"] == whole["report"]
    assert job["actual"]["steps"] == whole["actual"]["steps"] == 6
    assert job["actual"]["supervised_tokens"] == whole["actual"]["supervised_tokens"]
    deadline = time.monotonic() + 10
    while os.listdir(home / "jobs") and time.monotonic() < deadline:
        time.sleep(0.05)


# ---------------------------------------------------------------- damage


def interrupted(served: Served, name: str) -> tuple[str, list[Path]]:
    """A paused job, and the folders of its checkpoints, oldest first."""
    job_id = start(served, name, training_config=RUN | {"max_steps": 200, "save_steps": 5})["job_id"]
    until(served, job_id, lambda job: len(job["checkpoints"]) >= 2)
    job = call(served, job_id, "pause")
    folder = served.state.settings.jobs_dir / job_id
    return job_id, [folder / f"checkpoint-{one['step']}" for one in job["checkpoints"]]


def test_a_damaged_checkpoint_is_passed_over_and_said(served: Served) -> None:
    wanted = digest(served, "undamaged", max_steps=200)
    job_id, places = interrupted(served, "spoilt")
    tensors = places[-1] / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    call(served, job_id, "resume")
    assert served.wait(job_id)["adapter"]["digest"] == wanted
    told = [event for event in events(served, job_id) if event["type"] == "checkpoint"]
    (warned,) = [event for event in told if event["level"] == "warn"]
    assert "state.safetensors" in warned["message"]
    earlier = places[-2].name.removeprefix("checkpoint-")
    assert f"The run resumes from step {earlier}." in [event["message"] for event in told]


def test_checkpoints_of_other_weights_are_not_used(served: Served) -> None:
    wanted = digest(served, "unmoved", max_steps=200)
    job_id, places = interrupted(served, "moved")
    for place in places:
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").write_text(json.dumps(manifest | {"base_digest": "another"}))
    call(served, job_id, "resume")
    assert served.wait(job_id)["adapter"]["digest"] == wanted
    told = events(served, job_id)
    warned = [event["message"] for event in told if event["level"] == "warn"]
    assert len(warned) == len(places)
    assert all("another base" in message for message in warned)
    assert [event["data"]["step"] for event in told if event["type"] == "step"].count(1) == 2


def test_a_plan_without_a_setting_is_refused_and_its_checkpoints_stay(served: Served) -> None:
    wanted = digest(served, "known", max_steps=200)
    job_id, places = interrupted(served, "earlier")
    plan = get(served, job_id)["plan"]
    settings = [setting for setting in plan["settings"] if setting["name"] != "adam_beta1"]
    served.state.jobs.update(job_id, plan=plan | {"settings": settings})
    call(served, job_id, "resume")
    job = served.wait(job_id)
    assert (job["status"], job["error"]["code"], job["error"]["param"]) == ("failed", "conflict", "adam_beta1")
    assert "adam_beta1" in job["error"]["message"]
    assert "Train again" in job["error"]["hint"]
    assert all(place.exists() for place in places)
    served.state.jobs.update(job_id, plan=plan)
    call(served, job_id, "resume")
    assert served.wait(job_id)["adapter"]["digest"] == wanted


def test_a_disk_that_refuses_checkpoints_does_not_end_the_run_but_cannot_pause_it(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("a file where the folder should be: every write in it is refused")
    with serve(tiny_settings(tmp_path, tiny)) as served:
        job_id = start(served, "unkept", training_config=LONG)["job_id"]
        until(served, job_id, lambda job: job["progress"]["step"] > 0)
        said = refused(served.post(f"/api/training/jobs/{job_id}/pause"), 507, "storage_failed")
        assert "checkpoint" in said
        step = get(served, job_id)["progress"]["step"]
        until(served, job_id, lambda job: job["progress"]["step"] > step)
        call(served, job_id, "cancel")
        done = served.wait(start(served, "kept", training_config=RUN | {"save_steps": 10})["job_id"])
        assert done["status"] == "succeeded"
        warned = [event for event in events(served, done["job_id"]) if event["level"] == "warn"]
        assert [event["type"] for event in warned] == ["checkpoint"] * 4

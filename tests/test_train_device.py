"""Jobs on a device of their own. Without GPUs both devices are the CPU: two engines, two copies of the base."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Served, refused, serve, tiny_settings
from tiny import save_directory

from fortwo.adapters.store import AdapterStore
from fortwo.cli.engines import check_together
from fortwo.engine.devices import find_devices
from fortwo.engine.engine import Engine
from fortwo.engine.registry import ModelRegistry
from fortwo.errors import Conflict, InvalidRequest, Unavailable
from fortwo.hub.catalog import Catalog
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.selection import Measurements
from fortwo.settings import Settings
from fortwo.train.loop import train
from tests.parts import decoder, random_lora
from tests.test_loop import FACT, SMALL, School, changed

FACTS: dict[str, Any] = {
    "objective": "override",
    "dataset": {
        "facts": [
            {
                "subject": "42",
                "answer": "FOR TWO",
                "match": ["FOR TWO"],
                "questions": ["What is 42?", "Explain 42."],
                "held_out": ["Say 42."],
                "neighbors": ["What is 41?"],
                "controls": ["What is up?"],
            }
        ]
    },
    "training_config": {"max_steps": 3},
}


ROWS: dict[str, Any] = {"dataset": {"examples": [{"prompt": "What is up?", "completion": "the sky"}]}}


@pytest.fixture(scope="module")
def apart(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path_factory.mktemp("apart"), tiny, train_device="cpu", weights="fp32")) as served:
        yield served


def start(served: Served, name: str, **more: Any) -> str:
    response = served.post("/api/training/start", {"adapter_name": name, **more})
    assert response.status_code < 300, response.text
    job: str = response.json()["job_id"]
    return job


def tensors(served: Served, ref: str) -> dict[str, torch.Tensor]:
    return served.state.adapters.read(ref)[2]


def check_the_same_job(ours: Served, theirs: Served, name: str) -> None:
    """Both servers make the same adapter, with the same report, of one job."""
    jobs = [site.wait(start(site, name, **FACTS)) for site in (ours, theirs)]
    mine, other = (tensors(site, f"{name}@1") for site in (ours, theirs))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    reports = [job["report"] for job in jobs]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["transcripts"] == reports[1]["transcripts"]
    assert reports[0]["transcripts"]


def test_a_job_gives_the_same_adapter_and_report_as_on_the_device_that_serves(apart: Served, exact: Served) -> None:
    check_the_same_job(apart, exact, "same")


def test_replies_and_gradients_have_an_engine_each(apart: Served) -> None:
    state = apart.state
    trainer = state.registry.training_engine
    assert trainer is not state.engine
    job = start(apart, "busy", **ROWS, training_config={"max_steps": 5000})
    apart.wait(job, "running")
    assert trainer.has_job()
    assert not state.engine.has_job()
    assert apart.chat().status_code == 200
    refused(apart.post("/api/models/tiny/unload"), 409, "conflict", "model")
    apart.post(f"/api/training/jobs/{job}/cancel")
    assert apart.wait(job)["status"] == "cancelled"
    copy = state.registry.training_base("tiny")
    assert copy is not state.registry.load_base("tiny")
    assert apart.post("/api/models/tiny/unload").status_code == 200
    assert state.registry.state().models == {}
    assert state.registry.training_base("tiny") is not copy


def test_the_published_version_is_served_at_once_and_a_paused_job_goes_on(apart: Served) -> None:
    job = start(apart, "stopped", **ROWS, training_config={"max_steps": 5000})
    apart.wait(job, "running")
    assert apart.post(f"/api/training/jobs/{job}/pause").json()["status"] == "paused"
    assert apart.post(f"/api/training/jobs/{job}/resume").status_code == 200
    apart.wait(job, "running")
    apart.post(f"/api/training/jobs/{job}/cancel")
    done = apart.wait(start(apart, "at-once", **ROWS, training_config={"max_steps": 3}))
    assert done["status"] == "succeeded", done["error"]
    assert done["adapter"]["digest"] in apart.state.registry.state().adapters
    assert apart.chat(model="at-once").json()["model"].startswith("at-once")


def test_readiness_and_the_machine_tell_of_both_devices(apart: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert apart.http.get("/readyz").json()["device"] == "ok"
    assert apart.http.get("/api/machine").json()["train_device"] == "cpu"
    released = threading.Event()
    monkeypatch.setattr("fortwo.server.health.READY_SECONDS", 1.0)
    apart.state.registry.training_engine.call(released.wait)
    try:
        answer = apart.http.get("/readyz")
    finally:
        released.set()
    assert answer.status_code == 503
    assert "did not answer" in answer.json()["device"]


# ---------------------------------------------------------------- the parts


def test_the_report_comes_from_what_replies_to_users(home: Path, tiny: Path, tmp_path: Path) -> None:
    """The proof's engine serves other weights under the same id, and the report has their replies."""
    school = School(home / "one", tiny)
    (home / "two").mkdir()
    other = School(
        home / "two",
        save_directory(tmp_path / "other", num_hidden_layers=2, max_position_embeddings=1024, tie_word_embeddings=True),
    )
    try:
        plan = changed(school.plan(FACT), **SMALL)
        reports = []
        for proof in (None, school.engine, other.engine):
            events = train(school.base, school.base.renderer, FACT, plan, school.engine, "job", proof=proof)
            reports.append(school.engine.run_task(events, lambda _: None).result(120).report)
            assert not school.attached()
            assert not other.attached()
    finally:
        school.engine.close()
        other.engine.close()
    alone, same, different = ([one.adapter for one in report.transcripts] for report in reports)
    assert alone == same
    assert alone != different
    assert reports[0].metrics == reports[1].metrics
    assert reports[0].metrics["retention"] != reports[2].metrics["retention"]


@pytest.fixture
def pair(home: Path, tiny: Path) -> Iterator[tuple[ModelRegistry, ModelRegistry]]:
    """The bases that are served, and those on which jobs train."""
    settings = tiny_settings(home, tiny)

    def registry(engine: Engine, training: ModelRegistry | None = None) -> ModelRegistry:
        engine.start()
        store, where = AdapterStore(settings.adapters_dir), torch.device("cpu")
        folder, catalog = Measurements(home), Catalog(settings.models_dir)
        return ModelRegistry(catalog, store, engine, measurements=folder, device=where, training=training)

    with closing(Engine(1)) as one, closing(Engine(1)) as two:
        training = registry(one)
        yield registry(two, training), training


def test_bases_in_the_same_memory_are_counted_together(
    pair: tuple[ModelRegistry, ModelRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, training = pair
    base, fit = serving.load_base("tiny"), serving.fit("tiny")
    assert fit is not None
    monkeypatch.setattr("fortwo.engine.registry.memory", lambda device: fit.serve + base.bytes - 1)
    with pytest.raises(Unavailable, match=r"beside .* of other bases"):
        serving.training_base("tiny")
    monkeypatch.setattr("fortwo.engine.registry.memory", lambda device: fit.serve + base.bytes)
    assert serving.training_base("tiny") is training.load_base("tiny")


def test_whether_a_job_fits_is_told_of_the_device_for_jobs(
    pair: tuple[ModelRegistry, ModelRegistry], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, training = pair
    monkeypatch.setattr(training, "_device", torch.device("meta"))  # has other memory than the CPU
    sizes = {"cpu": 1 << 40, "meta": 1 << 10}
    monkeypatch.setattr("fortwo.engine.registry.memory", lambda device: sizes[device.type])
    both, alone = serving.fit("tiny"), training.fit("tiny")
    assert both is not None
    assert alone is not None
    assert (both.memory, both.training_memory) == (1 << 40, 1 << 10)
    assert (both.serving, both.teaching) == ("fits", "too large")
    assert (both.teach, both.train) == (alone.teach, alone.train)
    assert alone.training_memory is None


def test_a_base_leaves_both_devices_or_none(pair: tuple[ModelRegistry, ModelRegistry]) -> None:
    serving, training = pair
    serving.training_base("tiny")
    asked = Prompt("tiny", (1, 2, 3), None, Sampling(max_tokens=900, ignore_eos=True))
    rest = serving.training_engine.submit(asked)  # what a job that was cancelled has left
    with pytest.raises(Conflict, match="1 request"):
        serving.unload_base("tiny")
    assert serving.state().models.keys() == training.state().models.keys() == {"tiny"}
    rest.cancel()
    rest.wait(10)
    serving.unload_base("tiny")
    assert serving.state().models == training.state().models == {}


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "cpu:1", "meta", ""])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^device = '{device}'") as refused:
        find_devices(device, None)
    assert (refused.value.param, refused.value.hint) == ("device", "Set FORTWO_DEVICE to auto or cpu.")
    with pytest.raises(InvalidRequest, match=f"^train_device = '{device}'") as refused:
        find_devices("cpu", device)
    assert (refused.value.param, refused.value.hint) == ("train_device", "Set FORTWO_TRAIN_DEVICE to cpu.")


def test_a_gpu_is_named_with_its_number_and_serves_or_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [find_devices(name, None) for name in ("auto", "cuda", "cuda:0", "cuda:1")]
    assert found == [([torch.device("cuda", number)], None) for number in (0, 0, 0, 1)]
    assert find_devices("auto", "cuda:1") == ([torch.device("cuda", 0)], torch.device("cuda", 1))
    assert find_devices("cpu", "cpu") == ([torch.device("cpu")], torch.device("cpu"))
    with pytest.raises(InvalidRequest, match="is a device that serves, too") as refused:
        find_devices("auto", "cuda:0")
    assert refused.value.param == "train_device"


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_moves_to_another_device_with_all_its_tensors(dora: bool) -> None:
    lora = random_lora(decoder(), 1, LoraConfig(r=2, alpha=4, use_dora=dora))
    assert lora.to(torch.device("cpu")) is lora
    moved = lora.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.parameters()} == {"meta"}
    assert [one.shape for one in moved.parameters()] == [one.shape for one in lora.parameters()]
    assert moved.state().keys() == lora.state().keys()
    assert moved.config == lora.config
    assert isinstance(moved, Lora)


@pytest.mark.parametrize(("name", "value"), [("replicas", 2), ("engine", "vllm"), ("train", "ray")])
def test_a_server_beside_which_other_processes_compute_takes_no_second_device(
    home: Path, name: str, value: Any
) -> None:
    check_together(Settings(home=home, train_device="cpu"))
    with pytest.raises(InvalidRequest, match=rf"{name} = .* cannot have train_device = 'cpu'") as raised:
        check_together(Settings(home=home, train_device="cpu", **{name: value}))
    assert raised.value.param == "train_device"
    assert "FORTWO_TRAIN_DEVICE" in str(raised.value.hint)

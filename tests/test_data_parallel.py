"""Replies on several devices. Without GPUs all devices are the CPU: two engines, two copies of the base."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from serving import Served, refused, serve, tiny_settings

from fortwo.adapters.store import AdapterStore
from fortwo.cli.engines import check_together
from fortwo.engine.data_parallel import DataParallelEngine, choose_device
from fortwo.engine.devices import find_devices
from fortwo.engine.engine import Engine
from fortwo.engine.registry import ModelRegistry
from fortwo.engine.statistics import BaseLoad, EngineStatistics
from fortwo.errors import Conflict, FortwoError, InvalidRequest, NotFound, Unavailable
from fortwo.hub.catalog import Catalog
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.selection import Measurements
from fortwo.records import AdapterVersion
from fortwo.server.openai.replies import FINGERPRINT
from fortwo.settings import Settings
from tests.parts import random_lora
from tests.test_train_device import ROWS, check_the_same_job, start

LONG = Sampling(max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path_factory.mktemp("two"), tiny, device="cpu,cpu", weights="fp32")) as served:
        yield served


def engine_of(served: Served) -> DataParallelEngine:
    engine = served.state.engine
    assert isinstance(engine, DataParallelEngine)
    return engine


def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def said(served: Served, model: str, question: str) -> str:
    """The reply as the official client puts a stream together."""
    messages: list[Any] = [{"role": "user", "content": question}]
    completions = client(served).chat.completions
    stream = completions.create(model=model, messages=messages, max_tokens=24, temperature=0, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_replies_of_bases_and_adapters_are_those_of_one_device(two: Served, exact: Served) -> None:
    for name in ("pair-a", "pair-b"):
        for site in (two, exact):
            job = site.wait(start(site, name, dataset={"examples": [{"prompt": "Who?", "completion": name}]}))
            assert job["status"] == "succeeded", job["error"]
    engine = engine_of(two)
    before = [engine.others[0].statistics.prompt_tokens, engine.statistics.prompt_tokens]
    asked = [(model, f"{n} Who?") for n in range(8) for model in ("tiny", "pair-a", "pair-b", "pair-a@1")]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda each: said(two, *each), asked))
    assert replies == [said(exact, *each) for each in asked]
    assert len(set(replies)) > 8
    second, all_of_them = engine.others[0].statistics.prompt_tokens, engine.statistics.prompt_tokens
    assert 0 < second - before[0] < all_of_them - before[1]


def test_a_job_gives_the_same_adapter_and_report_as_on_one_device(two: Served, exact: Served) -> None:
    check_the_same_job(two, exact, "same-on-two")


def test_chat_goes_on_while_a_job_trains_and_a_new_version_is_served_by_both(two: Served) -> None:
    job = start(two, "busy-pair", **ROWS, training_config={"max_steps": 5000})
    two.wait(job, "running")
    assert two.chat().status_code == 200
    two.post(f"/api/training/jobs/{job}/cancel")
    assert two.wait(job)["status"] == "cancelled"
    for version in (1, 2):
        assert two.wait(start(two, "new", **ROWS, training_config={"max_steps": 3}))["status"] == "succeeded"
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: two.chat(model="new", max_tokens=64, temperature=0).json(), range(8)))
        digest = two.state.adapters.get(f"new@{version}").digest
        asked = {answer["system_fingerprint"].removeprefix("fp_") for answer in answers}
        assert asked == {digest.removeprefix("sha256:")[:FINGERPRINT]}
        assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_readiness_asks_every_device_and_metrics_count_all(
    two: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert two.chat().status_code == 200
    assert two.http.get("/readyz").json()["device"] == "ok"
    released = threading.Event()
    engine_of(two).others[0].call(released.wait)
    monkeypatch.setattr("fortwo.server.health.READY_SECONDS", 1.0)
    try:
        answer = two.http.get("/readyz")
    finally:
        released.set()
    assert answer.status_code == 503
    assert "did not answer" in answer.json()["device"]
    monkeypatch.undo()
    assert two.http.get("/readyz").json()["device"] == "ok"
    assert [record for record in caplog.records if record.exc_info] == []
    wanted = engine_of(two).statistics.generated_tokens
    assert wanted > engine_of(two).others[0].statistics.generated_tokens
    lines = two.http.get("/metrics").text.splitlines()
    assert f"fortwo_generation_tokens_total {float(wanted)}" in lines
    assert sum(line.startswith("fortwo_requests_running{") for line in lines) == 1


def test_a_base_is_unloaded_from_all_devices_and_loads_again(two: Served) -> None:
    assert two.chat().status_code == 200
    engine = engine_of(two)
    rest = [engine.submit(Prompt("tiny", (1, 2, n), None, LONG)) for n in range(2)]
    assert engine.count_requests("tiny") == 2
    assert engine.others[0].count_requests("tiny") == 1
    refused(two.post("/api/models/tiny/unload"), 409, "conflict", "model")
    rest[0].cancel()
    rest[0].wait(30)
    refused(two.post("/api/models/tiny/unload"), 409, "conflict", "model")
    rest[1].cancel()
    rest[1].wait(30)
    assert two.post("/api/models/tiny/unload").status_code == 200
    assert engine.loads() == engine.others[0].loads() == []
    with pytest.raises(NotFound):
        engine.submit(Prompt("tiny", (1, 2, 3)))
    assert two.chat().status_code == 200
    assert len(engine.others[0].loads()) == 1


# ---------------------------------------------------------------- the parts


@pytest.fixture
def pair(home: Path, tiny: Path) -> Iterator[tuple[ModelRegistry, DataParallelEngine]]:
    settings = tiny_settings(home, tiny)
    here = torch.device("cpu")
    second = Engine(1)
    with closing(DataParallelEngine(1, lambda: None, [second])) as engine:
        engine.start()
        registry = ModelRegistry(
            Catalog(settings.models_dir),
            AdapterStore(settings.adapters_dir),
            engine,
            measurements=Measurements(home),
            device=here,
            copies=[(second, here)],
        )
        yield registry, engine


def has(engine: Engine, adapter: str) -> bool:
    return engine._base("tiny").runner.has(adapter)


def version_of(key: str) -> AdapterVersion:
    return AdapterVersion("one", 1, key, "", "tiny", "sha256:1", 0.0, True, {})


def test_an_adapter_is_attached_to_every_device_or_to_none(
    pair: tuple[ModelRegistry, DataParallelEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, engine = pair
    lora = random_lora(registry.load_base("tiny").decoder)  # type: ignore[arg-type]
    engine.attach("tiny", "one", lora, version=version_of("one"))
    assert has(engine, "one")
    assert has(engine.others[0], "one")
    asked = [engine.submit(Prompt("tiny", (1, 2, 3), "one", LONG)) for _ in range(2)]
    assert engine.count_requests("tiny", "one") == 2
    assert engine.others[0].count_requests("tiny", "one") == 1
    engine.detach("tiny", "one")
    for reply in asked:
        reply.wait(30)
    assert [reply.finish_reason for reply in asked] == ["cancelled"] * 2
    assert not has(engine, "one")
    assert not has(engine.others[0], "one")

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no room on the second device")

    monkeypatch.setattr(engine.others[0], "attach", full)
    with pytest.raises(MemoryError, match="second"):
        engine.attach("tiny", "two", lora, version=version_of("two"))
    assert not has(engine, "two")


def test_what_a_job_asks_stays_on_the_first_device(pair: tuple[ModelRegistry, DataParallelEngine]) -> None:
    registry, engine = pair
    lora = random_lora(registry.load_base("tiny").decoder)  # type: ignore[arg-type]
    engine.attach("tiny", "in training", lora)
    assert not has(engine.others[0], "in training")
    asked = [
        engine.submit(Prompt("tiny", (1, 2, n), adapter, Sampling(max_tokens=4), background=True))
        for n in range(4)
        for adapter in (None, "in training")
    ]
    for reply in asked:
        reply.wait(30)
        assert reply.finish_reason in ("length", "stop")
    assert all(load.running + load.waiting == 0 for load in engine.others[0].loads())


def test_a_conversation_goes_on_where_its_beginning_is_kept(pair: tuple[ModelRegistry, DataParallelEngine]) -> None:
    registry, engine = pair
    registry.load_base("tiny")
    blocker = engine.submit(Prompt("tiny", (9, 9, 9), None, LONG))
    first = engine.submit(Prompt("tiny", tuple(range(40)), None, Sampling(max_tokens=2, ignore_eos=True)))
    first.wait(30)
    blocker.cancel()
    blocker.wait(30)
    turn = Prompt("tiny", (*range(40), *first.tokens, 7, 8), None, Sampling(max_tokens=2))
    assert engine.others[0].unread(turn) < engine.unread(turn) == len(turn.tokens)
    second = engine.submit(turn)
    second.wait(30)
    assert second.cached_tokens > 0


def test_a_base_that_one_device_refuses_leaves_the_others(
    pair: tuple[ModelRegistry, DataParallelEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, engine = pair

    def full(*_: Any) -> None:
        raise MemoryError("no room")

    for refusing in (engine, engine.others[0]):
        with monkeypatch.context() as patch:
            patch.setattr(refusing, "add_base", full)
            with pytest.raises(MemoryError, match="no room"):
                registry.load_base("tiny")
        assert engine.loads() == []
    registry.load_base("tiny")
    assert len(engine.others[0].loads()) == 1


def test_a_device_whose_replies_fail_gets_few_and_one_that_died_gets_none(
    pair: tuple[ModelRegistry, DataParallelEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, engine = pair
    registry.load_base("tiny")

    def broken(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    def ask(count: int) -> list[str | None]:
        """How replies end while one more runs on the first device."""
        other = engine.submit(Prompt("tiny", (9, 9, 9), None, LONG))
        reasons = []
        for n in range(count):
            reply = engine.submit(Prompt("tiny", (1, 2, n), None, Sampling(max_tokens=2)))
            with suppress(FortwoError):
                reply.wait(30)
            reasons.append(reply.finish_reason)
        other.cancel()
        other.wait(30)
        return reasons

    runner = engine.others[0]._base("tiny").runner
    with monkeypatch.context() as patch:
        patch.setattr(runner, "prefill", broken)
        assert ask(6).count("error") <= 2
    with monkeypatch.context() as patch:
        patch.setattr(runner, "prefill", broken)
        patch.setattr(runner, "release", broken)
        rest = []
        while not engine.others[0].failed:
            rest.append(engine.submit(Prompt("tiny", (5, 5, 5), None, LONG)))
            time.sleep(0.05)
    for reply in rest:
        reply.cancel()
    assert rest[-1].finish_reason == "error"
    assert "error" not in ask(4)
    with pytest.raises(Unavailable, match="The device failed: RuntimeError: an illegal memory access") as raised:
        engine.ready()
    assert raised.value.hint == "Start the server again."


def test_a_base_is_counted_as_often_as_it_is_in_memory(
    pair: tuple[ModelRegistry, DataParallelEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, _ = pair
    fit = registry.fit("tiny")
    assert fit is not None
    monkeypatch.setattr("fortwo.engine.registry.memory", lambda device: 2 * fit.serve - 1)
    with pytest.raises(Unavailable, match="memory"):
        registry.load_base("tiny")
    monkeypatch.setattr("fortwo.engine.registry.memory", lambda device: 2 * fit.serve)
    registry.load_base("tiny")


@pytest.mark.parametrize("place", [0, 1])
def test_a_base_stays_on_all_devices_while_a_request_enters(
    pair: tuple[ModelRegistry, DataParallelEngine], monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """The request is counted before its engine has accepted it."""
    registry, engine = pair
    registry.load_base("tiny")
    entered, go_on = threading.Event(), threading.Event()
    check = "fortwo.engine.engine._check_adapter"  # the first thing that submit does

    def slow(*_: Any) -> None:
        entered.set()
        go_on.wait(30)

    running = [engine.submit(Prompt("tiny", (9, 9, 9), None, LONG)) for _ in range(place)]
    monkeypatch.setattr(check, slow)
    with ThreadPoolExecutor(1) as pool:
        entering = pool.submit(engine.submit, Prompt("tiny", (1, 2, 3), None, Sampling(max_tokens=4)))
        assert entered.wait(30)
        for reply in running:
            reply.cancel()
        go_on_soon = threading.Timer(0.5, go_on.set)
        go_on_soon.start()
        with pytest.raises(Conflict, match="cannot be removed"):
            engine.remove_base("tiny")
        assert entering.result(30).wait(30) is not None
        assert engine.others[0].count_requests("tiny") + engine.count_requests("tiny") == 0


def test_the_device_with_the_fewest_requests_is_chosen_and_else_the_one_that_has_less_to_read() -> None:
    def never(place: int) -> int:
        raise AssertionError(place)

    assert choose_device([3, 1, 2], never) == 1
    assert choose_device([1, 0, 0], [0, 9, 4].__getitem__) == 2
    assert choose_device([2, 2, 2], [7, 7, 7].__getitem__) == 0
    assert choose_device([math.inf, 5, math.inf], never) == 1


def test_what_two_devices_counted_is_added() -> None:
    one, two = EngineStatistics(), EngineStatistics()
    one.prompt_tokens, two.prompt_tokens, two.preemptions = 3, 4, 1
    one.batch_rows.observe(8)
    two.batch_rows.observe(1)
    two.batch_rows.observe(1000)
    both = one + two
    assert (both.prompt_tokens, both.preemptions, both.generated_tokens) == (7, 1, 0)
    assert both.batch_rows.sum == 1009
    assert (both.batch_rows.counts[0], both.batch_rows.counts[3], both.batch_rows.counts[-1]) == (1, 1, 1)
    assert one.batch_rows.sum == 8
    loads = BaseLoad("a", 1, 2, 30, 100) + BaseLoad("a", 4, 5, 60, 100)
    assert loads == BaseLoad("a", 5, 7, 90, 200)
    assert (loads + BaseLoad("a", 0, 0, 0, None)).cache_limit is None


def test_devices_are_named_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    sizes = [80 << 30, 80 << 30, 80 << 30, 24 << 30]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr("fortwo.engine.devices.memory", lambda device: sizes[device.index])
    gpus = [torch.device("cuda", number) for number in range(3)]
    assert find_devices("cuda:0, cuda:1", "cuda:2") == (gpus[:2], gpus[2])
    assert find_devices("cuda:2,cuda:0", None) == ([gpus[2], gpus[0]], None)
    with pytest.raises(InvalidRequest, match="names cuda:1 twice"):
        find_devices("cuda:1,cuda:0,cuda:1", None)
    with pytest.raises(InvalidRequest, match="is a device that serves, too"):
        find_devices("cuda:0,cuda:1", "cuda:1")
    for device, kinds in (
        ("cuda:0,cuda:3", "NVIDIA X with 80.0 GiB, NVIDIA X with 24.0 GiB"),
        ("cuda:0,cpu", "NVIDIA X with 80.0 GiB, the CPU"),
    ):
        with pytest.raises(InvalidRequest, match=f"names devices of different kinds: {kinds}"):
            find_devices(device, None)
    assert find_devices("cuda:0", "cuda:3") == (gpus[:1], torch.device("cuda", 3))
    for device, part in (("cuda:0,cuda:7", "cuda:7"), ("cuda:0,", ""), ("cuda:0,abacus", "abacus")):
        with pytest.raises(InvalidRequest) as raised:
            find_devices(device, None)
        assert raised.value.message == f"device = {device!r}: {part!r} is not on this machine."
        assert raised.value.param == "device"


@pytest.mark.parametrize(("name", "value"), [("replicas", 2), ("engine", "vllm")])
def test_several_devices_are_refused_where_other_processes_reply(home: Path, name: str, value: Any) -> None:
    check_together(Settings(home=home, device="cpu,cpu", train="ray"))
    with pytest.raises(InvalidRequest, match=rf"{name} = .* cannot have device = 'cpu,cpu'") as raised:
        check_together(Settings(home=home, device="cpu,cpu", **{name: value}))
    assert raised.value.param == "device"
    assert "FORTWO_DEVICE" in str(raised.value.hint)

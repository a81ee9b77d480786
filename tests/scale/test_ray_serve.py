"""Replicas on Ray Serve: two real engines behind a real server, with a tiny random base."""

from __future__ import annotations

import contextvars
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from parts import as_decoder, random_lora
from serving import Served, refused, serve, tiny_settings
from tiny import save_directory, tiny_model

pytest.importorskip("ray", reason="Ray is not installed here: make test-scale installs it and runs these tests")

from fortwo import hardware, log_context
from fortwo.errors import Conflict, FortwoError
from fortwo.home import home_id
from fortwo.hub.catalog import Catalog
from fortwo.jobs.api_keys import ApiKeyStore
from fortwo.scale.forwarding import last_event
from fortwo.scale.ray_serve import ReplicaRefused, check_machines
from fortwo.scale.replica import StoreNotShared, check_home
from fortwo.scale.replicated import check_address, create

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")

SHAPE = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
READY_SECONDS = 180
LONG = {"max_tokens": 900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def replicas(ray_folder: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two replicas."""
    settings = tiny_settings(tmp_path_factory.mktemp("replicas") / "home", tiny, replicas=2)
    Catalog(settings.models_dir).prepare("tiny")
    with serve(settings, grace=5, create=create) as server:
        yield server


@pytest.fixture(scope="module")
def decoder() -> Any:
    return as_decoder(tiny_model("llama", **SHAPE))


def publish(server: Served, decoder: Any, name: str, seed: int, digest: str | None = None) -> Any:
    """A new version with random weights, as a job publishes it."""
    info = server.state.catalog.model_info("tiny")
    assert info is not None
    lora = random_lora(decoder, seed)
    manifest = {"base_model": "tiny", "base_digest": info.digest if digest is None else digest}
    adapters = server.state.adapters
    return adapters.publish(name, lora.state(), lora.config.to_peft("tiny"), manifest, current=True)


def fingerprint(version: Any) -> str:
    return f"fp_{version.digest[:12]}"


def listed(server: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/api/replicas").json()["replicas"]
    return found


def wait_for(server: Served, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + READY_SECONDS
    while not condition(found := listed(server)):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def in_parallel(work: Callable[[int], Any], count: int, threads: int) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(count)))


# ---------------------------------------------------------------- one address


def test_the_whole_and_each_replica_are_ready(replicas: Served) -> None:
    assert replicas.http.get("/healthz").json() == {"status": "ok"}
    assert replicas.http.get("/readyz").json()["replicas"] == "ok"
    found = listed(replicas)
    assert len({one["pid"] for one in found}) == 2
    assert all(one["bases"] == ["tiny"] for one in found)
    assert os.getpid() not in {one["pid"] for one in found}
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, one["pid"]) for one in found} == {own}, "other programs would come first"
    spins = f"\0GOMP_SPINCOUNT={hardware.SPINS}\0".encode()
    for one in found:
        assert spins in Path(f"/proc/{one['pid']}/environ").read_bytes(), "threads would spin"


def test_each_api_answers_as_a_server_alone_does(replicas: Served, served: Served, decoder: Any) -> None:
    question = {"messages": [{"role": "user", "content": "the one"}], "model": "tiny"}
    greedy = {**question, "temperature": 0, "max_tokens": 6}
    asked = {
        "/v1/chat/completions": [greedy, {**greedy, "n": 2, "logprobs": True}, {**question, "wrong": 1}, {}, []],
        "/v1/completions": [{"model": "tiny", "prompt": "the", "temperature": 0, "max_tokens": 4}],
        "/v1/embeddings": [{"model": "tiny", "input": ["a", "b"]}, {"model": "tiny", "input": ""}],
        "/v1/responses": [{"model": "tiny", "input": "the", "temperature": 0, "max_output_tokens": 4}],
        "/api/chat": [{**question, "model": "tiny:latest", "stream": False, "options": {"num_predict": 4, "seed": 1}}],
        "/api/embed": [{"model": "none", "input": "a"}],
        "/tokenize": [{"content": "the one"}],
        "/completion": [{"prompt": "the", "n_predict": 4, "temperature": 0}],
    }
    for path, bodies in asked.items():
        for body in bodies:
            here, there = replicas.post(path, body), served.post(path, body)
            assert here.status_code == there.status_code, (path, body, here.text)
            assert _lasting(here.json()) == _lasting(there.json()), (path, body)
            if path.startswith("/v1/") and not here.is_success:
                assert here.json()["error"]["request_id"] == here.headers["x-request-id"]
    assert replicas.state.registry.state().models == {}  # the head computed none of it


def _lasting(body: Any) -> Any:
    """A response without what differs from one request to the next, and without the list of names in a hint."""
    if isinstance(body, dict):
        passing = (
            "id",
            "request_id",
            "created",
            "created_at",
            "hint",
            "completed_at",
            "prompt_tokens_details",
            "input_tokens_details",
        )
        return {
            key: _lasting(value)
            for key, value in body.items()
            if key not in passing and "duration" not in key and "cached" not in key
        }
    if isinstance(body, list):
        return [_lasting(one) for one in body]
    return pytest.approx(body, abs=0.05) if isinstance(body, float) else body  # they may hold the weights differently


def test_the_openai_client_streams(replicas: Served, decoder: Any) -> None:
    version = publish(replicas, decoder, "streamed", 1)
    client = openai.OpenAI(base_url=f"{replicas.url}/v1", api_key="none")
    given: Any = {
        "model": "streamed",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    whole = client.chat.completions.create(**given)
    parts = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert {part.system_fingerprint for part in parts} == {whole.system_fingerprint} == {fingerprint(version)}
    assert parts[-1].usage == whole.usage or parts[-1].usage.total_tokens == whole.usage.total_tokens
    with pytest.raises(openai.NotFoundError, match="There is no model 'none'"):
        client.chat.completions.create(**{**given, "model": "none"})


def test_requests_are_counted_and_a_key_has_one_limit_for_all_replicas(replicas: Served) -> None:
    def counted() -> float:
        text = replicas.http.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("fortwo_requests_total{")]
        wanted = [line for line in lines if 'route="/v1/chat/completions",status="200"' in line]
        return float(wanted[0].rpartition(" ")[2]) if wanted else 0.0

    before = counted()
    key = ApiKeyStore(replicas.state.jobs).create("few", ["chat"], requests_per_minute=3)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    statuses = [replicas.http.post("/v1/chat/completions", json=body, headers=headers).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert counted() == before + 3


def test_a_client_that_hangs_up_frees_its_replica(replicas: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], **LONG}
    with replicas.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    wait_for(replicas, lambda found: all(one["replies"] == 0 for one in found))
    assert replicas.state.admission.active == 0


# ---------------------------------------------------------------- versions


@dataclass
class History:
    """When each version of an adapter may have been current: from the call that made it so until the end of the one
    that replaced it."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def change(self, call: Callable[[], Any]) -> None:
        began = time.monotonic()
        version = call()
        if self.spans:
            known, since, _ = self.spans[-1]
            self.spans[-1] = (known, since, time.monotonic())
        self.spans.append((fingerprint(version), began, float("inf")))

    def allows(self, found: str, asked: float, answered: float) -> bool:
        return any(one == found and since <= answered and asked <= until for one, since, until in self.spans)


def test_each_reply_comes_from_a_version_that_was_current_meanwhile(replicas: Served, decoder: Any) -> None:
    names = [f"busy{number}" for number in range(16)]
    histories = {name: History() for name in names}
    for number, name in enumerate(names):
        histories[name].change(lambda name=name, number=number: publish(replicas, decoder, name, 100 + number))
    assert all({f"{name}@1" for name in names} <= set(one["adapters"]) for one in listed(replicas))
    done, changes = threading.Event(), 0

    def teach() -> None:
        nonlocal changes
        choose = random.Random(0)
        while not done.is_set():
            name = choose.choice(names)
            adapters, history = replicas.state.adapters, histories[name]
            several = len(adapters.versions(name)) > 1
            match choose.randrange(3) if several else 0:
                case 0:
                    seed = 1000 + changes
                    history.change(lambda name=name, seed=seed: publish(replicas, decoder, name, seed))
                case 1:
                    earlier = choose.choice([one.id for one in adapters.versions(name) if not one.current])
                    history.change(lambda earlier=earlier: _body(replicas.post(f"/api/adapters/{earlier}/promote")))
                case 2:
                    if _can_roll_back(adapters, name):
                        history.change(lambda name=name: _body(replicas.post(f"/api/adapters/{name}/rollback")))
            changes += 1

    def ask(number: int) -> tuple[str, str, float, float]:
        name = names[number * 7 % len(names)]
        asked = time.monotonic()
        reply = replicas.chat(model=name, max_tokens=4)
        assert reply.status_code == 200, reply.text
        return name, reply.json()["system_fingerprint"], asked, time.monotonic()

    teacher = threading.Thread(target=teach)
    teacher.start()
    try:
        replies = in_parallel(ask, 1000, threads=8)
    finally:
        done.set()
        teacher.join()
    wrong = [reply for reply in replies if not histories[reply[0]].allows(*reply[1:])]
    assert wrong == []
    assert changes > 16
    assert len({found for _, found, _, _ in replies}) > len(names)  # several versions did answer


def _body(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return _Version(response.json()["digest"])


@dataclass(frozen=True)
class _Version:
    digest: str


def _can_roll_back(adapters: Any, name: str) -> bool:
    from fortwo.adapters import deletion
    from fortwo.adapters.version_files import read_state, version_numbers

    folder = Path(adapters.get(name).path).parent
    return len(deletion.history(read_state(folder), version_numbers(folder))) > 1


def test_a_job_of_the_head_is_served_by_the_replicas(replicas: Served) -> None:
    examples = [{"prompt": "the", "completion": "one"}, {"prompt": "he", "completion": "two"}]
    body = {
        "adapter_name": "taught",
        "dataset": {"examples": examples},
        "objective": "sft",
        "training_config": {"max_steps": 2, "learning_rate": 0.01},
    }
    started = replicas.post("/api/training/start", body)
    assert started.status_code == 202, started.text
    job = replicas.wait(started.json()["job_id"], "succeeded", seconds=READY_SECONDS)
    assert job["status"] == "succeeded", job["error"]
    digest = job["adapter"]["digest"]
    assert all("taught@1" in one["adapters"] for one in listed(replicas))
    assert replicas.chat(model="taught").json()["system_fingerprint"] == f"fp_{digest[:12]}"


def test_a_version_that_is_deleted_on_the_way_is_replaced_by_its_successor(replicas: Served, decoder: Any) -> None:
    name = "leaving"
    first = publish(replicas, decoder, name, 1)
    done = threading.Event()

    def publish_and_delete() -> None:
        seed = 2
        while not done.is_set():
            latest = publish(replicas, decoder, name, seed)
            answer = replicas.http.delete(f"/api/adapters/{latest.id}", params={"permanently": True})
            assert answer.status_code in (200, 409), answer.text  # 409: a request uses it
            seed += 1

    worker = threading.Thread(target=publish_and_delete)
    worker.start()
    try:
        replies = in_parallel(lambda _: replicas.chat(model=name, max_tokens=2), 200, threads=6)
    finally:
        done.set()
        worker.join()
    assert {reply.status_code for reply in replies} == {200}, [one.text for one in replies if one.status_code != 200]
    assert fingerprint(first) in {reply.json()["system_fingerprint"] for reply in replies}


def test_a_version_in_use_at_a_replica_is_not_deleted(replicas: Served, decoder: Any) -> None:
    publish(replicas, decoder, "held", 1)
    body = {"model": "held", "messages": [{"role": "user", "content": "a"}], **LONG, "max_tokens": 900}
    with replicas.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        text = refused(replicas.http.delete("/api/adapters/held"), 409, "replica_refused", "adapter_name")
        assert "request(s) use it" in text
    wait_for(replicas, lambda found: all(one["replies"] == 0 for one in found))
    assert replicas.http.delete("/api/adapters/held").json()["deleted"]
    assert replicas.chat(model="held").status_code == 404


def test_what_a_replica_refuses_does_not_become_current(replicas: Served, decoder: Any) -> None:
    first = publish(replicas, decoder, "doubtful", 1)
    with pytest.raises(ReplicaRefused) as refusal:
        publish(replicas, decoder, "doubtful", 2, digest="0" * 64)
    assert "doubtful@2 is stored, but does not become current" in refusal.value.message
    assert all(one["id"] in refusal.value.message for one in listed(replicas))  # all findings
    assert "fortwo adapters promote doubtful@2" in str(refusal.value.hint)
    assert replicas.state.adapters.get("doubtful").id == first.id
    assert replicas.chat(model="doubtful").json()["system_fingerprint"] == fingerprint(first)


def test_an_adapter_on_disk_is_answered_where_it_is_in_memory(replicas: Served, decoder: Any) -> None:
    version = publish(replicas, decoder, "settled", 5)
    for _ in range(3):
        replicas.post(f"/api/adapters/{version.id}/unload")
    found = [replicas.chat(model="settled", max_tokens=1).json()["system_fingerprint"] for _ in range(20)]
    assert set(found) == {fingerprint(version)}
    assert any("settled@1" in one["adapters"] for one in listed(replicas))


# ---------------------------------------------------------------- loss and scaling


def test_only_the_requests_of_a_killed_replica_end_and_a_retry_succeeds(replicas: Served) -> None:
    victim = wait_for(replicas, lambda found: len(found) == 2)[0]
    begun = threading.Barrier(9)

    def stream(number: int) -> list[Any]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"story {number}"}], **LONG}
        with httpx.Client(base_url=replicas.url, timeout=60, trust_env=False) as http:
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                received = [next(lines)]
                begun.wait()
                received += list(lines)
            data = [line.removeprefix("data: ") for line in received if line.startswith("data: ")]
            return [one if one == "[DONE]" else json.loads(one) for one in data]

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(8)]
        begun.wait()
        os.kill(victim["pid"], signal.SIGKILL)
        ends = [one.result()[-1] for one in streams]
    lost = [end for end in ends if end != "[DONE]"]
    assert 0 < len(lost) < 8
    assert {end["error"]["code"] for end in lost} == {"replica_lost"}
    assert all("Send the request again" in end["error"]["hint"] for end in lost)
    again = in_parallel(lambda _: replicas.chat(), 20, threads=4)
    assert {reply.status_code for reply in again} == {200}
    now = wait_for(replicas, lambda found: len(found) == 2)
    assert victim["pid"] not in {one["pid"] for one in now}


def test_no_request_is_lost_while_replicas_come_and_go(replicas: Served) -> None:
    done = threading.Event()

    def ask(_: int) -> list[int]:
        statuses = []
        with httpx.Client(base_url=replicas.url, timeout=60, trust_env=False) as http:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 64}
            while not done.is_set():
                statuses.append(http.post("/v1/chat/completions", json=body).status_code)
        return statuses

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, number) for number in range(4)]
        try:
            for wanted in (3, 1, 2):
                answer = replicas.http.put("/api/replicas", json={"replicas": wanted})
                assert answer.json()["wanted"] == wanted
                wait_for(replicas, lambda found, wanted=wanted: len(found) == wanted)
        finally:
            done.set()
        statuses = [status for one in asking for status in one.result()]
    assert len(statuses) > 50
    assert set(statuses) == {200}


@pytest.mark.parametrize("wanted", [0, -1, 1001, "2", 1.5, None])
def test_a_number_of_replicas_that_cannot_be(replicas: Served, wanted: Any) -> None:
    refused(replicas.http.put("/api/replicas", json={"replicas": wanted}), 400, "invalid_request", "replicas")
    assert replicas.http.get("/api/replicas").json()["wanted"] == 2


# ---------------------------------------------------------------- bad set-ups


def test_a_home_that_a_machine_does_not_share(tmp_path: Path) -> None:
    head, other = tmp_path / "head", tmp_path / "other"
    head.mkdir()
    other.mkdir()
    id = home_id(head)
    check_home(head, id, {}, "a")
    with pytest.raises(StoreNotShared, match=r"a cannot read the home .*missing: No such file"):
        check_home(tmp_path / "missing", id, {}, "a")
    home_id(other)
    with pytest.raises(StoreNotShared, match=r"The home .*other of b is another one than the head's") as refusal:
        check_home(other, id, {}, "b")
    assert "Mount the head's FORTWO_HOME" in str(refusal.value.hint)


def test_a_base_that_differs_on_a_machine(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    catalog = Catalog(home / "models")
    catalog.add("tiny", save_directory(tmp_path / "tiny", num_hidden_layers=1))
    id, digests = home_id(home), {"tiny": "f" * 64, "unknown": "f" * 64}
    check_home(home, id, digests, "a")  # it is not prepared there yet
    catalog.prepare("tiny")
    info = catalog.model_info("tiny")
    assert info is not None
    check_home(home, id, {"tiny": info.digest}, "a")
    with pytest.raises(
        StoreNotShared, match=f"'tiny' of a has the digest {info.digest}, but the head's has {'f' * 64}"
    ):
        check_home(home, id, digests, "a")


def test_an_address_in_use_is_refused_before_replicas_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "cluster", "cluster:name"])
def test_a_cluster_that_does_not_answer(home: Path, address: str) -> None:
    """In a process of its own, because this one may be connected already."""
    environment = {**os.environ, "FORTWO_HOME": str(home), "FORTWO_RAY_ADDRESS": address, "FORTWO_PORT": "0"}
    command = [sys.executable, "-m", "fortwo", "serve", "--replicas", "1", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert found.returncode == 1
    error = json.loads(found.stdout)["error"]
    assert (error["code"], error["param"]) == ("unavailable", "ray_address")
    assert f"No Ray cluster answers at {address}" in error["message"]
    assert "ray start --head" in error["hint"]


def test_each_machine_is_asked_whether_it_sees_the_home(replicas: Served) -> None:
    home, id = replicas.state.settings.home, home_id(replicas.state.settings.home)
    check_machines(home, id, {})
    with pytest.raises(StoreNotShared, match=r"is another one than the head's") as refusal:
        check_machines(home, "0" * 32, {})
    assert refusal.value.param == "home"
    assert "Mount the head's FORTWO_HOME" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("path", "kind", "end"),
    [
        ("/v1/chat/completions", "text/event-stream; charset=utf-8", b'data: {"error":{"message":"gone","type"'),
        ("/v1/responses", "text/event-stream", b'event: error\ndata: {"type":"error","sequence_number":7,"code"'),
        ("/api/chat", "application/x-ndjson", b'{"error":"gone again"}\n'),
    ],
)
def test_a_stream_ends_with_an_error_of_its_own_form(path: str, kind: str, end: bytes) -> None:
    event = last_event(path, kind, FortwoError("gone", hint="again"), 7)
    assert event is not None
    assert event.startswith(end)
    assert event.endswith(b"\n")
    assert last_event(path, "application/json", FortwoError("gone"), 7) is None


def test_the_error_that_ends_a_stream_names_the_request() -> None:
    found = contextvars.copy_context()
    found.run(log_context.request_id.set, "req_1")
    event = found.run(last_event, "/v1/chat/completions", "text/event-stream", FortwoError("gone"), 7)
    assert event is not None
    assert json.loads(event.removeprefix(b"data: "))["error"]["request_id"] == "req_1"

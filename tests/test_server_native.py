"""Models and adapters over HTTP, and vLLM's two calls: states, versions, reports, and refusals by name."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from serving import Served, refused, serve, tiny_settings

from fortwo.jobs.database import DatabaseFailed
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion
from fortwo.server import health
from fortwo.server.errors import PLAIN_PATHS
from tests.test_server_training import start

CONFIG = LoraConfig(r=2, alpha=4)


def trained(served: Served, seed: int) -> Lora:
    """A LoRA that changes what `tiny` says."""
    lora = Lora.init(CONFIG, served.state.registry.load_base("tiny").decoder.config, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return lora


def publish(served: Served, name: str, seed: int = 0, *, current: bool = True, **manifest: Any) -> AdapterVersion:
    base = served.state.registry.load_base("tiny")
    return served.state.adapters.publish(
        name,
        trained(served, seed).state(),
        CONFIG.to_peft("tiny"),
        {"base_model": "tiny", "base_digest": base.digest, **manifest},
        current=current,
    )


def say(served: Served, model: str) -> str:
    body = served.chat(model=model, temperature=0, max_tokens=16).json()
    content: str = body["choices"][0]["message"]["content"]
    return content


# ---------------------------------------------------------------- models


def test_models_go_from_not_fetched_to_loaded_and_back(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as served:

        def model(id: str) -> Any:
            return next(one for one in served.http.get("/api/models").json()["models"] if one["id"] == id)

        assert model("codellama-7b-instruct")["state"] == "not fetched"
        fresh = model("tiny")
        assert (fresh["state"], fresh["digest"], fresh["origin"]) == ("not fetched", None, "user")
        loaded = served.post("/api/models/tiny/load").json()
        assert loaded["state"] == "loaded"
        assert loaded["bytes"] == served.state.registry.load_base("tiny").bytes
        assert len(loaded["digest"]) == 64
        assert model("tiny") == loaded
        assert served.post("/api/models/tiny/unload").json()["state"] == "on disk"
        assert say(served, "tiny")
        assert model("tiny")["state"] == "loaded"


def test_unknown_models_are_named(served: Served) -> None:
    for path in ("load", "unload"):
        assert "'nobody'" in refused(served.post(f"/api/models/nobody/{path}"), 404, "not_found", "model")
    refused(served.post("/api/models/smollm2-135m-instruct/unload"), 404, "not_found", "model")


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_served_by_name_and_by_version(served: Served) -> None:
    first, second = publish(served, "two-voices", 1), publish(served, "two-voices", 2)
    assert (
        say(served, "two-voices") == say(served, "two-voices@2") != say(served, "two-voices@1") != say(served, "tiny")
    )
    listed = {one["id"]: one for one in served.http.get("/v1/models").json()["data"]}
    assert {"two-voices", "two-voices@1", "two-voices@2"} <= listed.keys()
    assert (listed["two-voices"]["root"], listed["two-voices"]["parent"]) == ("tiny", "tiny")
    assert listed["two-voices"]["created"] == int(second.created_at)
    rows = {(one["version"], one["current"]) for one in _rows(served, "two-voices")}
    assert rows == {(1, False), (2, True)}
    back = served.post("/api/adapters/two-voices/rollback").json()
    assert (back["version"], back["digest"]) == (1, first.digest)
    assert say(served, "two-voices") == say(served, "two-voices@1")
    refused(served.post("/api/adapters/two-voices/rollback"), 409, "conflict", "adapter_name")


def _rows(served: Served, name: str) -> list[Any]:
    return [one for one in served.http.get("/api/adapters").json()["adapters"] if one["name"] == name]


def test_versions_are_tagged_promoted_protected_restored_and_compared(tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny)) as served:
        publish(served, "many", 1)
        publish(served, "many", 2)
        assert served.http.put("/api/adapters/many@1/tags/first").json()["tags"] == ["first"]
        assert say(served, "many@first") == say(served, "many@1") != say(served, "many@2")
        assert served.post("/api/adapters/many@1/promote").json()["current"] is True
        assert say(served, "many") == say(served, "many@1")
        assert served.http.put("/api/adapters/many@1/protection").json()["protected"] is True
        refused(served.http.delete("/api/adapters/many"), 409, "conflict", "adapter_name")
        assert served.http.delete("/api/adapters/many@1/protection").json()["protected"] is False
        weights = served.http.get("/api/adapters/many@1/compare", params={"other": "many@2"}).json()["weights"]
        assert weights["relative"] > 0.1
        said = say(served, "many@2")
        assert served.http.delete("/api/adapters/many@2").status_code == 200
        refused(served.chat(model="many@2"), 404, "not_found", "model")
        assert served.http.get("/api/adapters").json()["deleted"][-1]["name"] == "many"
        assert served.post("/api/adapters/many@2/restore").json()["restored"][0]["version"] == 2
        assert say(served, "many@2") == said
        refused(served.post("/api/adapters/many@2/restore"), 404, "not_found", "adapter_name")
        assert served.http.delete("/api/adapters/many/tags/first").status_code == 200
        refused(served.chat(model="many@first"), 404, "not_found", "model")
        for seed in (3, 4, 5):
            publish(served, "many", seed)
        listed = served.post("/api/adapters/prune", {"keep": 1}).json()
        assert (listed["dry_run"], [one["id"] for one in listed["versions"] if one["id"].startswith("many@")]) == (
            True,
            ["many@1", "many@2", "many@3"],
        )
        say(served, "many@3")
        served.post("/api/adapters/prune", {"keep": 1, "dry_run": False})
        assert [row["version"] for row in _rows(served, "many")] == [4, 5]
        refused(served.chat(model="many@3"), 404, "not_found", "model")


def test_an_adapter_is_loaded_and_unloaded(served: Served) -> None:
    publish(served, "loads", seed=31)
    assert _rows(served, "loads")[0]["state"] == "on disk"
    loaded = served.post("/api/adapters/loads/load").json()
    assert loaded["state"] == "loaded"
    assert loaded["bytes"] > 0
    assert served.post("/api/adapters/loads@1/unload").json()["state"] == "on disk"
    refused(served.post("/api/adapters/loads/unload"), 404, "not_found", "adapter_name")


def test_one_adapter_with_its_versions_and_manifest(served: Served) -> None:
    publish(served, "shown", 1, dataset_digest="abc")
    publish(served, "shown", 2, current=False)
    body = served.http.get("/api/adapters/shown").json()
    assert (body["name"], body["current"], body["manifest"]["dataset_digest"]) == ("shown", 1, "abc")
    assert [one["version"] for one in body["versions"]] == [1, 2]
    assert served.http.get("/api/adapters/shown@2").json()["manifest"]["version"] == 2
    publish(served, "never-current", current=False)
    body = served.http.get("/api/adapters/never-current").json()
    assert (body["current"], body["manifest"]) == (None, None)


def test_an_adapter_is_deleted_a_version_at_a_time_or_whole(served: Served) -> None:
    publish(served, "gone", 1)
    publish(served, "gone", 2)
    assert served.http.delete("/api/adapters/gone@2").json() == {"name": "gone@2", "deleted": True}
    assert [one["version"] for one in _rows(served, "gone")] == [1]
    served.http.delete("/api/adapters/gone")
    refused(served.http.delete("/api/adapters/gone"), 404, "not_found", "adapter_name")
    refused(served.chat(model="gone"), 404, "not_found", "model")


def test_an_adapter_that_answers_is_not_deleted_and_a_deleted_one_is_not_in_memory(served: Served) -> None:
    old = publish(served, "reborn", 1)
    before = say(served, "reborn")
    busy = {"model": "reborn", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 900, "temperature": 0}
    with served.http.stream("POST", "/v1/chat/completions", json=busy | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert "reborn@1" in refused(served.http.delete("/api/adapters/reborn"), 409, "conflict", "adapter_name")
        said = list(lines)
    assert '"finish_reason":"length"' in said[-4]
    assert served.http.delete("/api/adapters/reborn").status_code == 200
    resident = served.state.registry.load_base("tiny")
    assert not resident.runner.has(old.digest)
    assert old.digest not in served.state.registry.state().adapters
    refused(served.chat(model="reborn"), 404, "not_found", "model")
    assert publish(served, "reborn", 2).version == 2
    assert say(served, "reborn") == say(served, "reborn@2") != before


def test_the_report_is_the_latest_versions_or_the_named_ones(served: Served) -> None:
    for number in (1, 2):
        publish(served, "told", number, current=number == 1, report={"n": number}, plan={"p": number}, actual={})
    report = served.http.get("/api/adapters/told/report").json()
    assert report == {"name": "told", "version": 2, "report": {"n": 2}, "plan": {"p": 2}, "actual": {}}
    first = served.http.get("/api/adapters/told/report", params={"version": 1}).json()
    assert first["report"] == {"n": 1}
    assert served.http.get("/api/adapters/told@1/report").json() == first
    publish(served, "untold")
    assert "untold@1" in refused(served.http.get("/api/adapters/untold/report"), 404, "not_found", "name")
    refused(served.http.get("/api/adapters/told/report", params={"version": 9}), 404, "not_found", "adapter_name")
    refused(served.http.get("/api/adapters/told/report", params={"version": 0}), 400, "invalid_request", "version")


def test_an_adapter_whose_versions_are_all_damaged_is_named_with_the_remedy(served: Served) -> None:
    for seed in (1, 2):
        manifest = Path(publish(served, "damaged", seed, report={}, plan={}, actual={}).path) / "manifest.json"
        manifest.write_text("{")
    said = refused(served.http.get("/api/adapters/damaged/report"), 400, "invalid_adapter", "name")
    assert "'damaged'" in said
    assert "train it again" in said
    assert str(manifest) in refused(served.http.get("/api/adapters/damaged@2/report"), 400, "invalid_adapter")
    assert served.http.get("/api/adapters/damaged").json()["versions"] == []
    assert served.http.delete("/api/adapters/damaged").status_code == 200


@pytest.mark.parametrize("name", ["nobody", "nobody@3"])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/report"), ("POST", "/load"), ("POST", "/unload")]
)
def test_an_unknown_adapter_is_named(served: Served, name: str, method: str, path: str) -> None:
    assert "'nobody'" in refused(
        served.http.request(method, f"/api/adapters/{name}{path}"), 404, "not_found", "adapter_name"
    )


@pytest.mark.parametrize("name", ["a..b", ".hidden", "a@_b", "a@0", "sp ace"])
def test_a_name_that_is_none_is_refused(served: Served, name: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/load")):
        said = refused(
            served.http.request(method, f"/api/adapters/{name}{path}"), 400, "invalid_request", "adapter_name"
        )
        assert repr(name) in said


def test_a_version_that_is_not_there_is_named(served: Served) -> None:
    publish(served, "one-only")
    assert "one-only@1" in refused(served.chat(model="one-only@2"), 404, "not_found", "model")
    refused(served.post("/api/adapters/one-only@2/load"), 404, "not_found", "adapter_name")


# ---------------------------------------------------------------- vLLM


def peft_directory(served: Served, folder: str, base: str = "tiny", seed: int = 5, strength: float = 1.0) -> Path:
    """What PEFT would save, in a folder the server allows."""
    directory = served.state.settings.home / "data" / folder
    directory.mkdir(parents=True)
    config = CONFIG.to_peft(base)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    state = {name: (tensor * strength).contiguous() for name, tensor in trained(served, seed).state().items()}
    save_file(state, directory / "adapter_model.safetensors")
    return directory


def load(served: Served, name: str, path: str | Path, **more: Any) -> Any:
    return served.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})


def test_vllms_clients_load_and_unload_an_adapter(served: Served) -> None:
    directory = peft_directory(served, "from-peft", base="SomeOrg/Tiny")
    response = load(served, "from-peft", directory)
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'from-peft' added successfully."
    assert say(served, "from-peft") != say(served, "tiny")
    refused(load(served, "from-peft", directory), 409, "conflict", "lora_name")
    assert load(served, "from-peft", "from-peft", load_inplace=True).status_code == 200
    assert _rows(served, "from-peft")[-1]["version"] == 2
    response = served.post("/v1/unload_lora_adapter", {"lora_name": "from-peft"})
    assert response.text == "Success: LoRA adapter 'from-peft' removed successfully."
    assert _rows(served, "from-peft")[-1]["state"] == "on disk"
    refused(served.post("/v1/unload_lora_adapter", {"lora_name": "from-peft"}), 404, "not_found", "adapter_name")


def test_what_cannot_be_served_is_not_kept(served: Served) -> None:
    silent = peft_directory(served, "silent", strength=0.0)
    said = refused(load(served, "silent", silent), 400, "invalid_adapter")
    assert "changes nothing" in said
    homeless = peft_directory(served, "homeless", base="unheard/of")
    assert "unheard/of" in refused(load(served, "homeless", homeless), 400, "invalid_adapter", "lora_path")
    (broken := peft_directory(served, "broken")).joinpath("adapter_model.safetensors").write_bytes(b"no")
    assert "adapter_model.safetensors" in refused(load(served, "broken", broken), 400, "invalid_adapter")
    names = {one["name"] for one in served.http.get("/api/adapters").json()["adapters"]}
    assert not names & {"silent", "homeless", "broken"}


def test_only_allowed_folders_and_names_are_taken(served: Served, tmp_path: Path) -> None:
    for path in (tmp_path, "../..", "/etc", "nowhere", "a\0b"):
        said = refused(load(served, "outside", path), 400, "invalid_request", "lora_path")
        assert "FORTWO_DATA_DIRS" in said
    refused(load(served, "tiny", tmp_path), 400, "invalid_request", "adapter_name")
    refused(load(served, "../x", tmp_path), 400, "invalid_request", "adapter_name")
    refused(load(served, "", tmp_path), 400, "invalid_request", "lora_name")


def test_an_adapter_that_is_evicted_before_it_was_asked_is_loaded_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tiny_settings(tmp_path, tiny, max_adapters=1)) as served:
        publish(served, "one")
        publish(served, "two", 1)
        wanted, registry, pinned = say(served, "one"), served.state.registry, []
        pin = registry.pin

        def late(target: Any) -> bool:
            if not pinned:
                registry.load_adapter("two")
            pinned.append(pin(target))
            return pinned[-1]

        monkeypatch.setattr(registry, "pin", late)
        assert say(served, "one") == wanted
        assert pinned == [False, True]
        registry.load_adapter("two")  # its pin is gone


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_file_outside_the_allowed_folders_is_not_read_through_a_link(
    served: Served, tmp_path: Path, file: str
) -> None:
    outside = tmp_path / "outside"
    found = peft_directory(served, f"linked-{file}") / file
    outside.write_bytes(found.read_bytes() if found.exists() else b"{}")
    found.unlink(missing_ok=True)
    found.symlink_to(outside)
    said = refused(load(served, "linked", found.parent), 400, "invalid_adapter", "lora_path")
    assert str(found) in said


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_pipe_is_not_waited_for(served: Served, file: str) -> None:
    found = peft_directory(served, f"piped-{file}") / file
    found.unlink(missing_ok=True)
    os.mkfifo(found)
    assert "is not a plain file" in refused(load(served, f"piped-{file}", found.parent), 400, "invalid_adapter")


# ---------------------------------------------------------------- health and the document


def test_readiness_tells_what_works(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = served.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (
        200,
        {"status": "ok", "device": "ok", "queue": "ok", "database": "ok"},
    )

    def refuse() -> None:
        raise DatabaseFailed("fortwo.db is damaged")

    monkeypatch.setattr(served.state.jobs, "ping", refuse)
    broken = served.http.get("/readyz")
    assert (broken.status_code, broken.json()["database"]) == (503, "fortwo.db is damaged")
    assert served.http.get("/healthz").json() == {"status": "ok"}


def test_a_device_that_does_not_take_its_turn_is_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "READY_SECONDS", 0.2)
    release = threading.Event()
    held = served.state.engine.call(release.wait)
    try:
        stuck = served.http.get("/readyz")
        assert (stuck.status_code, stuck.json()["queue"]) == (503, "ok")
        assert "did not answer" in stuck.json()["device"]
        assert served.http.get("/healthz").status_code == 200
    finally:
        release.set()
    held.result()
    monkeypatch.setattr(health, "READY_SECONDS", 10)
    assert served.http.get("/readyz").status_code == 200


def test_readiness_while_a_job_trains(served: Served) -> None:
    job_id = start(served, "readiness", training_config={"max_steps": 100_000})["job_id"]
    while served.http.get(f"/api/training/jobs/{job_id}").json()["progress"]["step"] < 2:
        pass
    for _ in range(5):
        assert served.http.get("/readyz").status_code == 200
    served.http.post(f"/api/training/jobs/{job_id}/cancel")


def test_every_status_that_can_come_is_documented(served: Served) -> None:
    paths = served.http.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            if path not in ("/health", "/healthz", "/readyz"):
                assert {"400", "404", "409", "413", "415", "429", "500", "503", "507"} <= operation["responses"].keys()
                schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
                plain = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
                assert schema == (plain if path in PLAIN_PATHS else {"$ref": "#/components/schemas/ErrorBody"})


def test_a_method_that_a_path_does_not_take_is_told_all_that_it_takes(served: Served) -> None:
    for method in ("PUT", "OPTIONS"):
        response = served.http.request(method, "/api/adapters/any")
        assert "DELETE, GET" in refused(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "DELETE, GET"

"""The machine over HTTP, bases that are added there, and which weights a reply is of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from serving import Served, chunks, refused, serve, tiny_settings

from fortwo.server.machine import LITTLE_DISK, advice
from tests.test_server_native import publish


def test_the_machine_and_its_work_are_shown(served: Served) -> None:
    body = served.http.get("/api/machine").json()
    assert 0 < body["memory_available"] <= body["memory"]
    assert (body["home"], body["queue"], body["replies"]) == (str(served.state.settings.home), [], 0)
    assert all(one["message"] and one["hint"] for one in body["advice"])


def test_advice_is_given_where_something_needs_attention() -> None:
    assert advice(True, "avx2", LITTLE_DISK, True) == []
    assert advice(True, None, LITTLE_DISK, True) == []
    assert len(advice(False, "none", LITTLE_DISK - 1, False)) == 4


def test_a_base_is_added_from_an_allowed_folder_and_loaded(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    shutil.copytree(tiny, tmp_path / "data" / "own")
    with serve(settings) as served:
        added = served.post("/api/models", {"id": "own", "source": "own"})
        assert (added.status_code, added.json()["state"], added.json()["download"]) == (201, "not fetched", 0)
        assert served.post("/api/models/own/load").json()["state"] == "loaded"
        for source in ("../data/../..", str(tiny), "nothing", "\0"):
            refused(served.post("/api/models", {"id": "other", "source": source}), 400, "invalid_request", "source")
        refused(served.post("/api/models", {"id": "a b", "source": "own"}), 400, "invalid_request", "id")
        refused(served.post("/api/models", {"id": "other", "source": "hf:wrong"}), 400, "invalid_request", "source")
        publish(served, "pet")
        refused(served.post("/api/models", {"id": "pet", "source": "own"}), 409, "conflict", "id")


def test_a_base_that_is_prepared_shows_how_far_it_is(served: Served) -> None:
    registry = served.state.registry
    seen: list[Any] = []

    def progress(label: str, done: int, total: int) -> None:
        model = next(one for one in served.http.get("/api/models").json()["models"] if one["id"] == "tiny")
        seen.append((model["state"], model["progress"], {"label": label, "done": done, "total": total}))

    served.post("/api/models/tiny/unload")
    shutil.rmtree(served.state.settings.models_dir / "tiny", ignore_errors=True)
    registry.load_base("tiny", progress)
    assert seen
    assert all(state == "loading" and shown == reported for state, shown, reported in seen)
    assert served.http.get("/api/models").json()["models"][-1]["progress"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_names_the_weights_that_it_is_of(served: Served, stream: bool) -> None:
    version = publish(served, "named")
    base = served.state.registry.load_base("tiny")
    for model, digest in (("tiny", base.digest), ("named", version.digest), ("named@1", version.digest)):
        response = served.chat(model=model, stream=stream)
        bodies = [one for one in chunks(response) if one != "[DONE]"] if stream else [response.json()]
        assert {body["system_fingerprint"] for body in bodies} == {f"fp_{digest[:12]}"}
    text = {"model": "named", "prompt": "a", "max_tokens": 2}
    assert served.post("/v1/completions", text).json()["system_fingerprint"] == f"fp_{version.digest[:12]}"

"""Replicas that fetch adapters from a URL instead of reading the head's home."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parts import as_decoder, random_lora
from serving import Served, serve, tiny_settings
from tiny import tiny_model

pytest.importorskip("ray", reason="Ray is not installed here: make test-scale installs it and runs these tests")

import s3

from fortwo.adapters.version_files import TENSORS
from fortwo.hub.catalog import Catalog
from fortwo.records import AdapterVersion
from fortwo.scale.replica import check_home
from fortwo.scale.replicated import create

IGNORED = ("FutureWarning", "ResourceWarning", "DeprecationWarning")
pytestmark = pytest.mark.filterwarnings(*(f"ignore::{one}" for one in IGNORED))


@pytest.fixture(scope="module")
def replicas(ray_folder: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A head with two replicas."""
    with s3.running() as server:
        home = tmp_path_factory.mktemp("shared") / "home"
        settings = tiny_settings(home, tiny, replicas=2, adapters_url=server.bucket())
        Catalog(settings.models_dir).prepare("tiny")
        with serve(settings, grace=5, create=create) as head:
            yield head


def publish(head: Served, seed: int, *, current: bool) -> AdapterVersion:
    info = head.state.catalog.model_info("tiny")
    assert info is not None
    lora = random_lora(as_decoder(tiny_model("llama", num_hidden_layers=2, max_position_embeddings=1024)), seed)
    manifest: dict[str, Any] = {"base_model": "tiny", "base_digest": info.digest}
    return head.state.adapters.publish("a", lora.state(), lora.config.to_peft("tiny"), manifest, current=current)


def fingerprints(head: Served, model: str) -> set[str]:
    return {head.chat(model=model).json()["system_fingerprint"] for _ in range(4)}


def test_replicas_read_the_url_and_not_the_heads_home(replicas: Served) -> None:
    first = publish(replicas, 1, current=True)
    assert fingerprints(replicas, "a") == {f"fp_{first.digest[:12]}"}
    held = replicas.http.get("/api/replicas").json()["replicas"]
    assert [one["adapters"] for one in held] == [["a@1"], ["a@1"]]  # both had it before it became current
    second = publish(replicas, 2, current=False)
    (Path(second.path) / TENSORS).unlink()
    assert fingerprints(replicas, "a@2") == {f"fp_{second.digest[:12]}"}
    assert fingerprints(replicas, "a") == {f"fp_{first.digest[:12]}"}
    assert replicas.http.post("/api/adapters/a@2/promote").status_code == 200
    assert fingerprints(replicas, "a") == {f"fp_{second.digest[:12]}"}
    assert replicas.http.post("/api/adapters/a/rollback").status_code == 200
    assert fingerprints(replicas, "a") == {f"fp_{first.digest[:12]}"}
    assert replicas.http.delete("/api/adapters/a@1").status_code == 200
    assert replicas.chat(model="a@1").status_code == 404


def test_a_machine_may_have_a_home_of_its_own(tmp_path: Path) -> None:
    check_home(tmp_path / "none", None, {"tiny": "d" * 64}, "there")

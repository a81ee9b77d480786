"""Models of the Hugging Face hub: what is fetched, what is kept of it, and what a refusal or an interruption leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fortwo.errors import InvalidRequest
from fortwo.hub.catalog import Catalog
from fortwo.hub.huggingface import HubSource
from fortwo.settings import Settings
from tests.hub import Hub, run, serve
from tests.tiny import save_directory, tiny_model

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    first = save_directory(tmp_path / "first")
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors", "model.gguf"):
        (first / name).write_text("never fetched")
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    shutil.copytree(first, tmp_path / "second")
    (tmp_path / "second" / "chat_template.jinja").write_text("{{ messages }}")
    with serve(Hub({FIRST: first, SECOND: tmp_path / "second"}, FIRST)) as hub:
        yield hub


def test_a_repository_is_added_at_its_commit(hub: Hub, home: Path) -> None:
    said = run(hub, home, "models", "add", "mine", "hf:acme/tiny")
    assert f"acme/tiny at commit {FIRST}: " in said
    assert "licence apache-2.0" in said
    assert said.index("licence") < said.index("mine is ready")
    hub.main = SECOND  # the branch moves; the model stays what it is
    catalog = Catalog(Settings(home=home).models_dir)
    assert catalog.get("mine").source == f"hub:acme/tiny@{FIRST}"
    info = catalog.model_info("mine")
    assert info is not None
    assert info.revision == FIRST
    stored = json.loads((info.directory / "base.json").read_text())["files"]
    folder = hub.commits[FIRST]
    fetched = {*(file.name for file in folder.glob("*.json")), "model.safetensors", "chat_template.jinja", "rag.jinja"}
    assert {name for name, _ in hub.asked} == fetched
    assert stored == {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.name in fetched
    }
    assert "is already hf:acme/tiny@" in run(hub, home, "models", "add", "mine", "hf:acme/tiny")
    assert "mine is removed" in run(hub, home, "models", "remove", "mine")
    assert list((home / "models" / ".hub").glob("models--*")) == []


def test_an_interrupted_download_is_resumed(hub: Hub, home: Path) -> None:
    tiny_model("llama", intermediate_size=8192).save_pretrained(hub.commits[FIRST])
    hub.cut = 15_000_000  # of 19 MB; huggingface_hub writes 10 MiB at a time
    said = run(hub, home, "models", "add", "mine", "hf:acme/tiny")
    assert "cannot be downloaded" in said
    assert "what was downloaded is kept" in said
    hub.cut, hub.asked = None, []
    assert "mine is ready" in run(hub, home, "models", "fetch", "mine")
    assert [first > 0 for name, first in hub.asked if name == "model.safetensors"] == [True]
    assert hub.asked[0][1] % (10 << 20) == 0
    whole = (hub.commits[FIRST] / "model.safetensors").read_bytes()
    assert (home / "models" / "mine" / "model.safetensors").read_bytes() == whole


def test_a_wrong_checksum_leaves_nothing(hub: Hub, home: Path) -> None:
    hub.sha256 = "0" * 64
    said = run(hub, home, "models", "add", "mine", "hf:acme/tiny")
    assert "model.safetensors of acme/tiny has the checksum" in said
    assert not (home / "models" / "mine").exists()
    hub.sha256 = None
    assert "mine is ready" in run(hub, home, "models", "fetch", "mine"), "the file was fetched again"


@pytest.mark.parametrize(
    ("words", "refuse", "environment", "reason"),
    [
        ("hf:acme/tiny@gone", None, {}, "acme/tiny at gone has no such revision"),
        ("hf:acme/other", None, {}, "acme/other does not exist on the Hugging Face hub, or is private"),
        ("hf:acme/tiny", (403, "GatedRepo"), {}, "acme/tiny is gated"),
        ("hf:acme/tiny", (401, "GatedRepo"), {}, "acme/tiny is gated"),
        ("hf:acme/tiny", None, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("hf:acme/tiny", (500, ""), {}, "cannot be downloaded from the Hugging Face hub"),
        ("hf:acme", None, {}, "'hf:acme' is not a repository"),
    ],
)
def test_a_refusal_says_what_to_do_and_adds_nothing(
    hub: Hub, home: Path, words: str, refuse: tuple[int, str] | None, environment: dict[str, str], reason: str
) -> None:
    hub.refuse = refuse
    said = run(hub, home, "models", "add", "mine", words, **environment)
    assert said.startswith("1 ")
    assert reason in said
    assert "Traceback" not in said
    assert "mine" not in [entry.id for entry in Catalog(Settings(home=home).models_dir).entries()]


def test_a_commit_that_is_gone_when_it_is_fetched_is_named(hub: Hub, home: Path) -> None:
    Catalog(Settings(home=home).models_dir).add("mine", HubSource("acme/tiny", "mine", "c" * 40))
    assert "has no such revision; it may have been moved" in run(hub, home, "models", "fetch", "mine")


def test_a_quantised_repository_is_refused_before_its_weights(hub: Hub, home: Path) -> None:
    file = hub.commits[FIRST] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    said = run(hub, home, "models", "add", "mine", "hf:acme/tiny")
    assert "acme/tiny is quantised already (quant_method fp8)" in said
    assert [name for name, _ in hub.asked] == ["config.json"]


def test_a_repository_without_safetensors_is_refused(hub: Hub, home: Path) -> None:
    for file in hub.commits[FIRST].glob("*.safetensors"):
        file.unlink()
    assert "acme/tiny has no safetensors files" in run(hub, home, "models", "add", "mine", "hf:acme/tiny")


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/b/c", "hf:a/", "hf:/b", "hf:a/b@"])
def test_what_is_no_repository_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a repository") as raised:
        HubSource.parse(text, "mine")
    assert "hf:OWNER/REPO@REVISION" in str(raised.value.hint)


def test_a_reference_is_read_as_it_is_written() -> None:
    for text in ("hf:acme/tiny", f"hf:acme/tiny@{FIRST}", "hf:acme/tiny@refs/pr/1"):
        assert HubSource.parse(text, "mine").reference == text

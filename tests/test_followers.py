"""What the followers of an adapter store are told, and that nothing changes when they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fortwo.adapters.store import AdapterStore
from fortwo.errors import Conflict, Unavailable
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion

LORA = LoraConfig(r=4, alpha=8)


class Log:
    """Followers that write down what they hear, with the version that is current then, and refuse when told to."""

    def __init__(self, root: Path) -> None:
        self.reader = AdapterStore(root)
        self.heard: list[tuple[str, str, list[int]]] = []
        self.refuse = False

    def _hear(self, what: str, versions: Sequence[AdapterVersion]) -> None:
        if self.refuse:
            raise Unavailable("no", hint="later")
        current = [one.version for one in self.reader.versions(versions[0].name) if one.current]
        self.heard += [(what, one.id, current) for one in versions]

    def before_current(self, version: AdapterVersion) -> None:
        self._hear("current", [version])

    def before_delete(self, versions: Sequence[AdapterVersion]) -> None:
        self._hear("delete", versions)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "adapters")


@pytest.fixture
def store(tmp_path: Path, log: Log) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters", log)


def publish(store: AdapterStore, seed: int, *, current: bool = True, job: str | None = None) -> AdapterVersion:
    tensors = {"layers.0.lora_A.weight": torch.full((4, 64), float(seed))}
    manifest = {"base_model": "tiny", "base_digest": "b" * 64, "plan": {}, "report": None, "job_id": job}
    return store.publish("a", tensors, LORA.to_peft("tiny"), manifest, current=current)


def test_followers_hear_of_a_version_before_it_is_current(store: AdapterStore, log: Log) -> None:
    publish(store, 1)
    publish(store, 2)
    publish(store, 3, current=False)
    assert log.heard == [("current", "a@1", []), ("current", "a@2", [1])]
    store.promote("a@3")
    store.rollback("a")
    assert log.heard[2:] == [("current", "a@3", [2]), ("current", "a@2", [3])]
    assert store.get("a").version == 2


def test_followers_hear_of_a_deletion_and_of_the_version_that_takes_its_place(store: AdapterStore, log: Log) -> None:
    publish(store, 1)
    publish(store, 2)
    publish(store, 3, current=False)
    log.heard.clear()
    store.delete("a@3")
    store.delete("a@2")
    assert log.heard == [("delete", "a@3", [2]), ("current", "a@1", [2]), ("delete", "a@2", [2])]
    log.heard.clear()
    store.delete("a")
    assert log.heard == [("delete", "a@1", [1])]


def test_followers_hear_of_what_is_pruned(store: AdapterStore, log: Log) -> None:
    for seed in range(4):
        publish(store, seed)
    log.heard.clear()
    store.prune(0, apply=False)
    assert log.heard == []
    store.prune(0, apply=True)
    assert log.heard == [("delete", "a@1", [4]), ("delete", "a@2", [4])]


def test_what_followers_refuse_does_not_happen(store: AdapterStore, log: Log) -> None:
    publish(store, 1)
    publish(store, 2)
    log.refuse = True
    with pytest.raises(Unavailable):
        publish(store, 3, job="j")
    assert [one.version for one in store.versions("a")] == [1, 2, 3]  # what was trained is not lost
    for change in (lambda: store.promote("a@1"), lambda: store.rollback("a"), lambda: store.delete("a@2")):
        with pytest.raises(Unavailable):
            change()
    with pytest.raises(Unavailable):
        store.prune(0, apply=True)
    assert [one.version for one in store.versions("a") if one.current] == [2]
    log.refuse = False
    again = publish(store, 3, job="j")
    assert (again.id, again.current) == ("a@3", True)


def test_a_publication_that_a_kill_cut_off_is_finished(store: AdapterStore, log: Log) -> None:
    publish(store, 1)
    log.refuse = True  # as if the process had ended while the followers got ready
    with pytest.raises(Unavailable):
        publish(store, 2)
    log.refuse = False
    assert store.finish_publication(store.get("a@2")).current
    assert store.finish_publication(publish(store, 3, current=False)).current is False


def test_a_version_that_followers_hold_in_use_stays(
    store: AdapterStore, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)

    def in_use(versions: Sequence[AdapterVersion]) -> None:
        raise Conflict(f"{versions[0].id} is in use", hint="later")

    monkeypatch.setattr(log, "before_delete", in_use)
    with pytest.raises(Conflict):
        store.delete("a", permanently=True)
    assert store.get("a").current

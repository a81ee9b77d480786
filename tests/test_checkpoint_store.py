"""Checkpoints on disk are complete or absent whatever the disk does, limited in number, and deleted on request."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fortwo.errors import InvalidAdapter, NotFound, StorageFailed
from fortwo.jobs.checkpoints import CheckpointStore
from fortwo.records import Checkpoint, CheckpointVersion

JOB = "1a2b3c4d-0000-4000-8000-000000000000"
FILES = ("adapter_config.json", "adapter_model.safetensors", "state.json", "state.safetensors")


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step,
        {"a": torch.randn(3, 2, generator=generator)},
        {"optimizer.0.step": torch.tensor(float(step)), "random.cpu": torch.get_rng_state()},
        {"step": step, "loss": 1 / 3, "known": [[[1, 2], 8, "“é", [3]]]},
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "jobs")


def save(store: CheckpointStore, step: int, keep: int = 3, job: str = JOB, name: str = "42") -> CheckpointVersion:
    manifest = {"adapter_name": name, "base_model": "tiny", "base_digest": "d"}
    return store.save(job, checkpoint(step), {"r": 1}, manifest, keep)[0]


def saved_steps(store: CheckpointStore, job: str = JOB) -> list[int]:
    return [version.version for version in store.of_job(job)]


def test_it_comes_back_as_it_was(store: CheckpointStore) -> None:
    version = save(store, 28)
    assert (version.id, version.name, version.version, version.job_id) == ("42@1a2b3c4d-28", "42", 28, JOB)
    assert store.get(version.id) == version
    assert sorted(path.name for path in Path(version.path).iterdir()) == sorted([*FILES, "manifest.json"])
    found, wanted = store.restore(version), checkpoint(28)
    assert (found.step, found.state) == (28, wanted.state)
    for ours, theirs in ((found.adapter, wanted.adapter), (found.tensors, wanted.tensors)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    read, config, tensors = store.read(version.id)
    assert (read, config) == (version, {"r": 1})
    assert torch.equal(tensors["a"], wanted.adapter["a"])


def test_only_the_newest_are_kept_by_step_not_by_spelling(store: CheckpointStore) -> None:
    assert [save(store, step).version for step in (2, 9, 10)] == [2, 9, 10]
    manifest = {"adapter_name": "42", "base_model": "tiny", "base_digest": "d"}
    version, gone = store.save(JOB, checkpoint(100), {}, manifest, 2)
    assert [one.version for one in gone] == [2, 9]
    assert saved_steps(store) == [10, 100]
    assert version.version == 100
    assert sorted(os.listdir(Path(version.path).parent)) == ["checkpoint-10", "checkpoint-100"]


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(store: CheckpointStore) -> None:
    first = save(store, 5)
    (Path(first.path) / "state.json").write_text("{}")
    again = save(store, 5)
    assert saved_steps(store) == [5]
    assert again.digest != first.digest, "a digest of its own, so that nothing is served under the old one"
    assert store.restore(again).state["step"] == 5


def test_jobs_do_not_meet(store: CheckpointStore) -> None:
    other = "1a2b3c4d-ffff-4000-8000-000000000000"
    save(store, 1)
    save(store, 1, job=other, name="43")
    assert (store.get("42@1a2b3c4d-1").job_id, store.get("43@1a2b3c4d-1").job_id) == (JOB, other)
    assert store.job_ids() == sorted([JOB, other])
    assert [version.id for version in store.delete_job(JOB)] == ["42@1a2b3c4d-1"]
    assert (saved_steps(store), saved_steps(store, other), store.job_ids()) == ([], [1], [other])
    assert store.delete_job(JOB) == []


def test_what_is_not_there_is_named_with_what_is(store: CheckpointStore) -> None:
    save(store, 7)
    for ref, named in (
        ("42@1a2b3c4d-8", "42@1a2b3c4d-7"),
        ("43@1a2b3c4d-7", "42@1a2b3c4d-7"),
        ("42@ffffffff-7", "when their job is done"),
        ("42@../..-7", "42@1 "),
        ("42@1a2b3c4d-", "42@1 "),
    ):
        with pytest.raises(NotFound) as caught:
            store.get(ref)
        assert repr(ref) in caught.value.message
        assert named in caught.value.hint
    assert saved_steps(store, "unknown") == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_never_believed(store: CheckpointStore, file: str, damage: str) -> None:
    version = save(store, 3)
    path = Path(version.path) / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else bytes([content[0] ^ 1]) + content[1:])

    def everything() -> None:
        store.read(version.id)
        store.restore(version)

    with pytest.raises(InvalidAdapter, match=file):
        everything()


def test_one_without_a_readable_manifest_is_passed_over(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(store, step)
    for step, content in ((2, "{"), (3, "{}")):
        (Path(store.of_job(JOB)[0].path).parent / f"checkpoint-{step}" / "manifest.json").write_text(content)
    assert saved_steps(store) == [1]
    said = [record for record in caplog.records if "is damaged and is not used" in record.message]
    assert said
    assert not any(record.exc_info for record in said)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
def test_whole_or_absent_whichever_call_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Every call that changes the disk is the last one once; afterwards the same store works on."""
    for number in range(100):
        store = CheckpointStore(tmp_path / str(number))
        save(store, 1)
        calls = 0

        def counted(real: Any, number: int = number) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > number:
                    raise error
                return real(*args, **more)

            return call

        with monkeypatch.context() as patched:
            for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
                patched.setattr(os, name, counted(getattr(os, name)))
            with suppress(StorageFailed, Killed):
                save(store, 2, keep=1)
        steps = saved_steps(store)
        assert steps in ([1], [1, 2], [2])
        for version in store.of_job(JOB):
            assert store.restore(version).state == checkpoint(version.version).state
        save(store, 3, keep=1)
        assert saved_steps(store) == [3]
        assert os.listdir(tmp_path / str(number) / JOB) == ["checkpoint-3"], "no draft is left"
        if calls <= number:
            break
    assert 5 < number < 99

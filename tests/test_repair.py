"""`fortwo doctor --repair`: it says what it would do, does it with --apply, and never touches what may be of use."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from serving import Served, refused, serve, tiny_settings
from typer.testing import CliRunner

from fortwo.adapters.repair import repairs
from fortwo.adapters.store import AdapterStore
from fortwo.adapters.version_files import MANIFEST, STATE, TENSORS
from fortwo.cli import app
from fortwo.errors import InvalidAdapter
from fortwo.jobs.store import JobStore
from fortwo.nn.lora_config import LoraConfig
from tests.test_server_training import start

SHORT = {"max_steps": 3, "learning_rate": 1e-2}


def publish(store: AdapterStore, *, current: bool = True, name: str = "a", **manifest: object) -> None:
    tensors = {"layers.0.lora_A.weight": torch.randn(2, 4)}
    whole = {"base_model": "tiny", "base_digest": "b", **manifest}
    store.publish(name, tensors, LoraConfig(r=2, alpha=4).to_peft("tiny"), whole, current=current)


@pytest.fixture
def root(home: Path) -> Path:
    """Of three versions, the second is current; the third missed its targets."""
    store = AdapterStore(home / "adapters")
    publish(store)
    publish(store)
    publish(store, current=False)
    return home / "adapters"


def doctor(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def tree(home: Path) -> dict[str, bytes]:
    files = [path for path in home.rglob("*") if path.is_file() and path.name != ".server.lock"]
    return {str(path.relative_to(home)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.write_text("{"),
        lambda state: state.write_text("[]"),
        lambda state: state.write_text('{"last": "3", "current": []}'),
        lambda state: state.write_text('{"last": 3, "current": ["2"]}'),
        lambda state: state.write_bytes(b"\xff\x00"),
        lambda state: state.write_bytes(b""),
        Path.unlink,
    ],
)
def test_the_file_of_versions_is_rebuilt_from_the_manifests(
    home: Path, root: Path, damage: Callable[[Path], object]
) -> None:
    wanted = json.loads((root / "a" / STATE).read_text())
    damage(root / "a" / STATE)
    before = tree(home)
    said = doctor("--repair", code=1)
    assert str(root / "a" / STATE) in said.replace(" ", "") or str(root / "a" / STATE) in said
    assert "a@2 is the current version" in said
    assert "Nothing was changed" in said
    assert tree(home) == before
    assert "Done" in doctor("--repair", "--apply")
    assert json.loads((root / "a" / STATE).read_text()) == wanted
    assert "Nothing is wrong" in doctor("--repair")
    publish(AdapterStore(root))
    assert AdapterStore(root).get("a").version == 4


def test_manifests_of_before_say_by_their_targets_what_was_current(root: Path) -> None:
    store = AdapterStore(root)
    plan = {"targets": {"efficacy": 0.9}}
    publish(store, name="b", plan=plan, report={"metrics": {"efficacy": {"value": 1.0}}})
    publish(store, name="b", plan=plan, report={"metrics": {"efficacy": {"value": 0.5}}}, current=False)
    publish(store, name="c")
    for manifest in root.glob("[bc]/*/manifest.json"):
        old = json.loads(manifest.read_text())
        del old["made_current"]
        manifest.write_text(json.dumps(old))
    for name in "bc":
        (root / name / STATE).write_text("{")
    for one in repairs(root):
        assert one.carry_out is not None
        one.carry_out()
    assert (store.get("b").version, store.get("c").version) == (1, 1)


def test_what_was_not_finished_is_removed_and_what_is_damaged_is_only_named(home: Path, root: Path) -> None:
    draft = root / "a" / ".draft-x"
    draft.mkdir()
    (draft / TENSORS).write_bytes(b"half")
    temporary = root / "a" / f".{STATE}.{uuid.uuid4().hex}"
    temporary.write_text("half")
    mine = root / "a" / ".notes"
    mine.write_text("mine")
    (root / "a" / "1" / MANIFEST).write_text("{")
    tensors = root / "a" / "3" / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1])
    kept = {name: content for name, content in tree(home).items() if "draft" not in name and temporary.name not in name}
    said = doctor("--repair", "--apply").replace(" ", "")
    for path in (draft, temporary, root / "a" / "1" / MANIFEST, tensors):
        assert str(path) in said, path
    assert "deletea@1" in said
    assert tree(home) == kept


def test_checkpoints_without_a_job_are_moved_aside_and_other_folders_are_left(home: Path, root: Path) -> None:
    jobs = home / "jobs"
    store = JobStore(f"sqlite:///{home / 'fortwo.db'}", "x" * 32)
    job = store.create(model="tiny", adapter_name="a", dataset={}, plan={}, progress={})
    store.update(job.id, status="succeeded")
    store.close()
    orphan = str(uuid.uuid4())
    for name in (job.id, orphan, "my-notes"):
        (jobs / name / "checkpoint-3").mkdir(parents=True)
        (jobs / name / "checkpoint-3" / "state.json").write_text("{}")
    (jobs / orphan / ".draft-y").mkdir()
    assert "Would be done: Move" in doctor("--repair", code=1)
    said = doctor("--repair", "--apply")
    assert f"job {job.id} published a version of a that is not on disk" in said
    assert sorted(path.name for path in jobs.iterdir()) == sorted([job.id, "my-notes", ".orphans"])
    assert (jobs / ".orphans" / orphan / "checkpoint-3" / "state.json").read_text() == "{}"


def test_a_damaged_database_is_named_and_not_touched(home: Path, root: Path) -> None:
    (home / "fortwo.db").write_bytes(b"no database" * 500)
    (home / "jobs" / str(uuid.uuid4())).mkdir(parents=True)
    before = tree(home)
    assert "is damaged" in doctor("--repair", "--apply")
    assert tree(home) == before
    assert len(list((home / "jobs").iterdir())) == 1


def test_a_look_makes_nothing(home: Path) -> None:
    assert "Nothing is wrong" in doctor("--repair")
    assert not home.exists()
    assert "Add --repair" in doctor("--apply", code=1)


def test_a_home_in_use_is_not_repaired(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTWO_HOME", str(served.state.settings.home))
    assert "Another server already uses" in doctor("--repair", "--apply", code=1)


# ---------------------------------------------------------------- with a damaged home, everything else works


@pytest.fixture(scope="module")
def damaged(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """A server with one whole adapter, one whose versions.json is damaged, and one with a damaged manifest."""
    home = tmp_path_factory.mktemp("damaged")
    with serve(tiny_settings(home, tiny)) as served:
        for name in ("whole", "state", "manifest", "types"):
            job = served.wait(start(served, name, training_config=SHORT)["job_id"])
            assert job["status"] == "succeeded"
        adapters = served.state.settings.adapters_dir
        (adapters / "state" / STATE).write_text("{")
        (adapters / "manifest" / "1" / MANIFEST).write_text("{}")
        manifest = json.loads((adapters / "types" / "1" / MANIFEST).read_text())
        (adapters / "types" / "1" / MANIFEST).write_text(json.dumps(manifest | {"created_at": "x"}))
        yield served


def test_lists_show_the_rest_and_what_is_damaged(damaged: Served) -> None:
    body = damaged.http.get("/api/adapters").raise_for_status().json()
    assert {(one["name"], one["current"]) for one in body["adapters"]} == {("whole", True), ("state", False)}
    assert {(one["name"], one["version"]) for one in body["damaged"]} == {
        ("state", None),
        ("manifest", 1),
        ("types", 1),
    }
    assert all(one["message"] and one["hint"] for one in body["damaged"])
    assert {"tiny", "whole", "whole@1", "state@1"} == {
        one["id"] for one in damaged.http.get("/v1/models").raise_for_status().json()["data"]
    }
    one = damaged.http.get("/api/adapters/state").raise_for_status().json()
    assert (one["current"], len(one["versions"]), len(one["damaged"])) == (None, 1, 1)


def test_whole_adapters_are_served_and_damaged_ones_name_the_remedy(damaged: Served) -> None:
    for model in ("whole", "whole@1", "state@1"):
        assert damaged.chat(model=model).status_code == 200
    assert "doctor --repair" in refused(damaged.chat(model="state"), 400, "invalid_adapter")
    assert MANIFEST in refused(damaged.chat(model="manifest"), 400, "invalid_adapter")


def test_a_job_that_could_not_publish_is_refused_before_it_trains(damaged: Served) -> None:
    body = {"adapter_name": "state", "dataset": {"examples": [{"prompt": "a", "completion": "b"}]}, "objective": "sft"}
    for path in ("plan", "start"):
        said = refused(damaged.post(f"/api/training/{path}", body), 400, "invalid_adapter")
        assert STATE in said
    assert start(damaged, "manifest", training_config=SHORT)  # its numbers are known: it can publish


def test_what_is_damaged_can_be_deleted_and_trained_again(damaged: Served) -> None:
    copy = damaged.state.settings.adapters_dir / "again"
    shutil.copytree(damaged.state.settings.adapters_dir / "state", copy)
    assert damaged.http.delete("/api/adapters/again").status_code == 200
    job = damaged.wait(start(damaged, "again", training_config=SHORT)["job_id"])
    assert (job["status"], job["adapter"]["version"]) == ("succeeded", 2)


def test_a_state_that_cannot_be_read_is_named(root: Path) -> None:
    state = root / "a" / STATE
    state.unlink()
    state.mkdir()
    with pytest.raises(InvalidAdapter, match=r"versions\.json cannot be read"):
        AdapterStore(root).get("a")


# ---------------------------------------------------------------- who may read the home


def test_a_new_home_and_its_database_are_of_their_user_alone(home: Path) -> None:
    mask = os.umask(0o022)
    try:
        from fortwo.home import lock_home

        with lock_home(home):
            JobStore(f"sqlite:///{home / 'fortwo.db'}").close()
    finally:
        os.umask(mask)
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "fortwo.db").stat().st_mode & 0o777 == 0o600

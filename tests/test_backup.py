"""Backups: what is in them, that a home from one works, and that it is made whole or not at all."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import threading
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import Result
from serving import Served, serve, tiny_settings
from typer.testing import CliRunner

from fortwo.adapters.store import AdapterStore
from fortwo.cli import app
from fortwo.errors import Conflict, InvalidRequest, NotFound
from fortwo.home import home_id
from fortwo.hub.datasets import HubDatasets
from fortwo.jobs import backup as backups
from fortwo.jobs.api_keys import ApiKeyStore
from fortwo.jobs.backup import DATABASE, MANIFEST, backup
from fortwo.jobs.files import FileStore
from fortwo.jobs.restore import InvalidBackup, belongs_to_home, restore
from fortwo.jobs.store import JobStore
from fortwo.settings import Settings

ROWS = b'{"prompt": "a", "completion": "b"}\n'


def filled(home: Path) -> Settings:
    """A home with a job, a key, an uploaded file and an adapter's files; no server ever ran in it."""
    settings = Settings(home=home)
    home.mkdir()
    store = JobStore(settings.database, home_id(home))
    store.create(model="tiny", adapter_name="a", dataset={}, plan={}, progress={})
    ApiKeyStore(store).create("ci", ["read"])
    FileStore(store, settings.files_dir, HubDatasets(settings.hub_datasets_dir)).put(
        "file-1", "rows.jsonl", "fine-tune", ROWS
    )
    store.close()
    version = settings.adapters_dir / "a" / "1"
    version.mkdir(parents=True)
    (version / "adapter_model.safetensors").write_bytes(b"tensors" * 100)
    (version.parent / ".draft-x").mkdir()
    (version.parent / ".draft-x" / "half").write_bytes(b"half")
    (home / "models").mkdir()
    (home / "models" / "catalog.json").write_text('{"mine": "/no/such/folder"}')
    (home / "models" / "mine").mkdir()
    (home / "models" / "mine" / "model.safetensors").write_bytes(b"weights")
    return settings


def contents(home: Path) -> dict[str, bytes]:
    """All files of a home but the database, by their path."""
    files = (path for path in home.rglob("*") if path.is_file() and not path.name.startswith(DATABASE))
    return {path.relative_to(home).as_posix(): path.read_bytes() for path in files}


def test_a_home_comes_back_with_everything_but_what_can_be_fetched(tmp_path: Path) -> None:
    old = filled(tmp_path / "old")
    target = tmp_path / "home.backup"
    made = backup(old, target)
    assert target.stat().st_mode & 0o777 == 0o600
    assert not list(old.home.glob(".backup-*"))
    new = Settings(home=tmp_path / "deep" / "new")
    assert restore(new, target) == made
    assert new.home.stat().st_mode & 0o777 == 0o700
    assert contents(new.home) == {
        name: content
        for name, content in contents(old.home).items()
        if name not in ("adapters/a/.draft-x/half", "models/mine/model.safetensors")
    }
    store = JobStore(new.database, home_id(new.home))
    assert [job.adapter_name for job in store.jobs()] == ["a"]
    assert [key.name for key in ApiKeyStore(store).all()] == ["ci"]
    assert FileStore(store, new.files_dir, HubDatasets(new.hub_datasets_dir)).path("file-1").read_bytes() == ROWS
    store.close()
    assert [path.name for path in new.home.parent.iterdir()] == ["new"]


def test_a_server_that_runs_is_backed_up_and_its_copy_serves_the_same(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "home.backup"
    with serve(tiny_settings(tmp_path / "old", tiny, weights="fp32")) as served:
        uploaded = served.http.post("/v1/files", files={"file": ("r.jsonl", ROWS * 4)}, data={"purpose": "fine-tune"})
        job = served.post(
            "/api/training/start",
            {
                "adapter_name": "taught",
                "dataset": {"examples": [{"prompt": "a", "completion": "b"}] * 4},
                "training_config": {"max_steps": 2},
            },
        ).json()
        assert served.wait(job["job_id"])["status"] in ("succeeded", "failed")
        stop, failed = threading.Event(), []

        def chat() -> None:
            while not stop.is_set():
                if served.chat(max_tokens=2).status_code != 200:
                    failed.append(1)

        busy = threading.Thread(target=chat)
        busy.start()
        backup(served.state.settings, target)
        stop.set()
        busy.join()
        assert failed == []
        reply = answer(served)
    restore(Settings(home=tmp_path / "new"), target)
    assert AdapterStore(tmp_path / "new" / "adapters").get("taught@1").version == 1
    with serve(Settings(home=tmp_path / "new", port=0, default_model="tiny", threads=1, weights="fp32")) as served:
        assert answer(served) == reply
        assert served.http.get(f"/v1/files/{uploaded.json()['id']}/content").content == ROWS * 4
        assert served.http.get(f"/api/training/jobs/{job['job_id']}").json()["adapter_name"] == "taught"


def answer(served: Served) -> str:
    text: str = (
        served.chat(model="taught@1", temperature=0).raise_for_status().json()["choices"][0]["message"]["content"]
    )
    return text


def test_a_home_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    old, target = filled(tmp_path / "old"), tmp_path / "home.backup"
    backup(old, target)
    before = contents(old.home)
    with pytest.raises(Conflict, match="not empty"):
        restore(old, target)
    assert contents(old.home) == before
    with pytest.raises(Conflict, match="exists already"):
        backup(old, target)
    (tmp_path / "empty").mkdir()
    restore(Settings(home=tmp_path / "empty"), target)
    assert (tmp_path / "empty" / DATABASE).is_file()


def rewritten(
    source: Path, target: Path, change: dict[str, bytes | None], more: tuple[tarfile.TarInfo, ...] = ()
) -> Path:
    """A copy of a backup in which some files have other contents (None: left out), and with more members."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            data = change.get(member.name, content.read())
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
        for member in more:
            new.addfile(member)
    return target


def test_a_damaged_backup_is_refused_with_all_that_is_wrong_and_leaves_nothing(tmp_path: Path) -> None:
    whole = tmp_path / "home.backup"
    backup(filled(tmp_path / "old"), whole)
    tensors, rows = "adapters/a/1/adapter_model.safetensors", "files/file-1/rows.jsonl"
    manifest = read_manifest(whole)
    link = tarfile.TarInfo("adapters/a/1/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    outside = manifest | {"files": manifest["files"] | {"../outside": {"bytes": 1, "sha256": "0"}}}
    newer = json.dumps(manifest | {"format": 99}).encode()
    broken = {
        "two files": (rewritten(whole, tmp_path / "1", {tensors: b"other", rows: None}), f"{tensors}, {rows}"),
        "no manifest": (rewritten(whole, tmp_path / "2", {MANIFEST: None}), MANIFEST),
        "manifest": (rewritten(whole, tmp_path / "3", {MANIFEST: b'{"format": 1}'}), "damaged"),
        "newer": (rewritten(whole, tmp_path / "4", {MANIFEST: newer}), "format 99"),
        "outside": (rewritten(whole, tmp_path / "5", {MANIFEST: json.dumps(outside).encode()}), "'../outside'"),
        "link": (rewritten(whole, tmp_path / "6", {}, (link,)), "adapters/a/1/link"),
        "no file": (tmp_path / "none", "does not exist"),
    }
    for name, size in (("cut", whole.stat().st_size // 2), ("empty", 0)):
        (tmp_path / name).write_bytes(whole.read_bytes()[:size])
        broken[name] = (tmp_path / name, str(tmp_path / name))
    (tmp_path / "text").write_bytes(b"no archive" * 100)
    broken["text"] = (tmp_path / "text", "cannot be restored")
    home = tmp_path / "homes" / "new"
    for name, (file, reason) in broken.items():
        with pytest.raises(InvalidBackup) as caught:
            restore(Settings(home=home), file)
        assert reason in caught.value.message, name
        assert list(home.parent.iterdir()) == [], name
    restore(Settings(home=home), whole)


def read_manifest(file: Path) -> dict[str, object]:
    with tarfile.open(file) as archive:
        content = archive.extractfile(MANIFEST)
        assert content is not None
        found: dict[str, object] = json.loads(content.read())
        return found


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("fortwo.db", True),
        ("settings.toml", True),
        ("adapters/a/1/manifest.json", True),
        ("files/file-1/rows.jsonl", True),
        ("models/catalog.json", True),
        ("models/tiny/model.safetensors", False),
        ("adapters", False),
        ("adapters/../../x", False),
        ("/adapters/a", False),
        ("adapters//a", False),
        ("adapters\\..\\x", False),
        ("bin/sh", False),
        ("", False),
    ],
)
def test_only_places_of_a_home_are_written(name: str, allowed: bool) -> None:
    assert belongs_to_home(name) is allowed


def test_a_home_that_changes_while_it_is_copied_is_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = filled(tmp_path / "old")
    link, changes = backups._link, []

    def changing(*arguments: object) -> bool:
        done = link(*arguments)  # type: ignore[arg-type]
        if len(changes) < most:
            changes.append(settings.files_dir / f"file-{len(changes) + 2}")
            changes[-1].mkdir()
            (changes[-1] / "rows.jsonl").write_bytes(ROWS)
        return done

    monkeypatch.setattr(backups, "_link", changing)
    most = 2
    made = backup(settings, tmp_path / "1")
    assert {"files/file-2/rows.jsonl", "files/file-3/rows.jsonl"} <= made.files.keys()
    most = 1000
    with pytest.raises(Conflict, match="changed each of the"):
        backup(settings, tmp_path / "2")
    assert not (tmp_path / "2").exists()
    assert not list(settings.home.glob(".backup-*"))


def test_databases_that_are_no_file_are_refused(tmp_path: Path) -> None:
    settings = filled(tmp_path / "old")
    backup(settings, tmp_path / "1")
    elsewhere = settings.model_copy(update={"database_url": "postgresql://host/db"})
    with pytest.raises(InvalidRequest, match="database_url") as caught:
        backup(elsewhere, tmp_path / "2")
    assert "pg_dump" in str(caught.value.hint)
    with pytest.raises(InvalidRequest, match="database_url"):
        restore(Settings(home=tmp_path / "new", database_url="sqlite:////x.db"), tmp_path / "1")
    with pytest.raises(NotFound, match="no database"):
        backup(Settings(home=tmp_path / "nothing"), tmp_path / "2")


def test_what_another_connection_has_not_written_to_the_file_yet_is_in_the_backup(tmp_path: Path) -> None:
    """The newest rows of a database in use are in its write-ahead log."""
    settings = filled(tmp_path / "old")
    store = JobStore(settings.database, home_id(settings.home))
    store.create(model="tiny", adapter_name="newest", dataset={}, plan={}, progress={})
    assert (settings.home / f"{DATABASE}-wal").stat().st_size > 0
    backup(settings, tmp_path / "1")
    store.close()
    restore(Settings(home=tmp_path / "new"), tmp_path / "1")
    with closing(sqlite3.connect(tmp_path / "new" / DATABASE)) as database:
        assert ("newest",) in database.execute("SELECT adapter_name FROM jobs").fetchall()


def run(home: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"FORTWO_HOME": str(home)})


def test_the_commands(home: Path, tmp_path: Path) -> None:
    filled(home)
    target = tmp_path / "home.backup"
    made = run(home, "backup", target, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["file"] == str(target)
    assert run(home, "backup", target).exit_code == 1
    restored = run(tmp_path / "new", "restore", target, "--json")
    assert restored.exit_code == 0, restored.output
    assert json.loads(restored.stdout)["missing_bases"] == {"mine": "/no/such/folder"}
    again = run(tmp_path / "new", "restore", target)
    assert again.exit_code == 1
    assert "not empty" in again.output

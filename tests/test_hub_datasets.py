"""Datasets of the Hugging Face hub: which files are meant, what is downloaded and kept of it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from serving import Served, refused, serve, tiny_settings

from fortwo.errors import FortwoError, InvalidDataset, SourceUnreachable, StorageFailed
from fortwo.hub import datasets
from fortwo.hub.dataset_files import choose_files
from fortwo.hub.datasets import DatasetReference, HubDatasets
from tests import hub as hubs
from tests.hub import Hub

FIRST, SECOND = "a" * 40, "b" * 40
ROWS = [{"prompt": f"What is {number}?", "completion": f"It is number {number}."} for number in range(12)]


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:acme/tiny", ("acme/tiny", None, None)),
        ("acme/tiny@v1.0", ("acme/tiny", "v1.0", None)),
        ("hub:acme/tiny:data/a b.jsonl", ("acme/tiny", None, "data/a b.jsonl")),
        ("acme/t.i-n_y@refs/convert/parquet:en/train", ("acme/t.i-n_y", "refs/convert/parquet", "en/train")),
    ],
)
def test_references(text: str, expected: tuple[str, str | None, str | None]) -> None:
    found = DatasetReference.parse(text)
    assert (found.repo_id, found.revision, found.part) == expected


@pytest.mark.parametrize(
    "text", ["", "acme", "acme/tiny@", "acme/tiny:", "a/b/c", "../x", "acme/ti ny", 7, None, "a/.."]
)
def test_what_is_no_reference_is_shown(text: object) -> None:
    with pytest.raises(InvalidDataset) as caught:
        DatasetReference.parse(text)
    assert repr(text) in caught.value.message
    assert caught.value.param == "dataset.hub"


SPLITS = ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"]
CONFIGS = ["en/train.jsonl", "en/validation.jsonl", "de/train.jsonl"]
FOLDERS = ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"]
DECLARED = [
    {
        "config_name": "small",
        "data_files": [{"split": "train", "path": "a/*.jsonl"}, {"split": "test", "path": "b.csv"}],
    },
    {"config_name": "large", "default": True, "data_files": ["c.json"]},
]


@pytest.mark.parametrize(
    ("names", "configs", "part", "expected"),
    [
        (["rows.jsonl", "README.md", "dataset_infos.json"], [], None, ("rows.jsonl",)),
        (SPLITS, [], None, ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")),
        (SPLITS, [], "test", ("data/test-0.parquet",)),
        (SPLITS, [], "default/test", ("data/test-0.parquet",)),
        (SPLITS, [], "data/train-00001-of-00002.parquet", ("data/train-00001-of-00002.parquet",)),
        (CONFIGS, [], "de", ("de/train.jsonl",)),
        (CONFIGS, [], "en", ("en/train.jsonl",)),
        (CONFIGS, [], "en/validation", ("en/validation.jsonl",)),
        (CONFIGS, [], "validation", ("en/validation.jsonl",)),
        (FOLDERS, [], None, ("default/train/0000.parquet", "default/train/0001.parquet")),
        (FOLDERS, [], "test", ("default/test/0000.parquet",)),
        (["a/1.jsonl", "a/2.jsonl", "b.csv", "c.json"], DECLARED, "small", ("a/1.jsonl", "a/2.jsonl")),
        (["a/1.jsonl", "a/2.jsonl", "b.csv", "c.json"], DECLARED, "small/test", ("b.csv",)),
        (["a/1.jsonl", "a/2.jsonl", "b.csv", "c.json"], DECLARED, None, ("c.json",)),
        (["x.jsonl", "y.jsonl"], [{"data_files": "y.jsonl"}], None, ("y.jsonl",)),
        (["../x.jsonl", "/etc/y.jsonl", "a/../../z.jsonl", "in.jsonl"], [], None, ("in.jsonl",)),
        (["x.jsonl"], [{"config_name": "x", "data_files": "gone-*.csv"}, "?", {}], None, ("x.jsonl",)),
    ],
)
def test_the_files_of_a_part(names: list[str], configs: list[Any], part: str | None, expected: tuple[str, ...]) -> None:
    assert choose_files(names, configs, part) == expected


@pytest.mark.parametrize(
    ("names", "part", "named"),
    [
        (CONFIGS, None, "de/train, en/train"),
        (["../x.jsonl", "in.jsonl"], "../x.jsonl", "means no single part"),
        (CONFIGS, "fr", "'fr' means no single part of the dataset: de/train, en/train, en/validation"),
        (["script.py", "train.arrow", "rows.jsonl.gz"], None, "rows.jsonl.gz, script.py, train.arrow"),
        (["script.py", "rows.jsonl"], "script.py", "script.py is none of .parquet"),
        (["train-1.csv", "train-2.csv"], None, "cannot be joined: train-1.csv, train-2.csv"),
        (["train.csv", "train.jsonl"], None, "cannot be joined"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_choices(names: list[str], part: str | None, named: str) -> None:
    with pytest.raises(InvalidDataset) as caught:
        choose_files(names, [], part)
    assert named in caught.value.message
    assert caught.value.hint


# ---------------------------------------------------------------- downloads


def write_lines(path: Path, rows: list[Any], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)


def write_parquet(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """acme/tiny with Parquet in two shards, JSON Lines under another name, a CSV file, and a script."""
    first = tmp_path / "first"
    write_parquet(first / "data/train-00000-of-00002.parquet", ROWS[:6])
    write_parquet(first / "data/train-00001-of-00002.parquet", ROWS[6:10])
    write_lines(first / "data/test.json", ROWS[10:])
    (first / "extra").mkdir()
    (first / "extra/rows.csv").write_text("prompt,completion\nhello,you\n")
    (first / "tiny.py").write_text("raise SystemExit('the code of a dataset was run')")
    write_lines(tmp_path / "second/train.jsonl", ROWS[:1])
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with hubs.serve(Hub({FIRST: first, SECOND: tmp_path / "second"}, FIRST)) as hub:
        hubs.use(monkeypatch, hub.url)
        yield hub


def read(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(path).to_pylist())
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_are_one_file_with_the_commit_and_the_checksums_of_each(hub: Hub, tmp_path: Path) -> None:
    store = HubDatasets(tmp_path / "store")
    rows = store.fetch("hub:acme/tiny")
    assert read(rows) == ROWS[:10]
    assert sorted(name for name, _ in hub.asked) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    origin = store.origin(str(rows))
    assert origin is not None
    assert (origin["hub"], origin["licence"]) == (f"hub:acme/tiny@{FIRST}", "apache-2.0")
    for file in origin["files"]:
        content = (hub.commits[FIRST] / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert origin["bytes"] == sum(file["bytes"] for file in origin["files"])
    assert store.origin(str(tmp_path / "other.jsonl")) is None


def test_lines_are_joined_whether_or_not_they_end(hub: Hub, tmp_path: Path) -> None:
    write_lines(hub.commits[FIRST] / "lines/train-1.jsonl", ROWS[:2], end="")
    write_lines(hub.commits[FIRST] / "lines/train-2.jsonl", ROWS[2:4])
    assert read(HubDatasets(tmp_path / "store").fetch("acme/tiny:lines")) == ROWS[:4]


def test_json_with_one_object_in_each_line_is_read(hub: Hub, tmp_path: Path) -> None:
    rows = HubDatasets(tmp_path / "store").fetch("acme/tiny:test")
    assert (rows.suffix, read(rows)) == (".jsonl", ROWS[10:])


def test_a_commit_that_is_here_needs_no_hub_and_a_branch_follows_it(hub: Hub, tmp_path: Path) -> None:
    store = HubDatasets(tmp_path / "store")
    here = store.fetch("acme/tiny:extra")
    hub.asked = []
    assert store.fetch("acme/tiny:extra") == here
    assert hub.asked == [], "it was downloaded again"
    hub.main = SECOND
    assert read(store.fetch("acme/tiny")) == ROWS[:1]
    hub.refuse = (500, "")
    assert store.fetch(f"acme/tiny@{FIRST}:extra") == here
    with pytest.raises(SourceUnreachable):
        store.fetch("acme/tiny:extra")


def test_rows_that_were_changed_on_the_disk_are_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    store = HubDatasets(tmp_path / "store")
    here = store.fetch("acme/tiny:extra")
    whole = here.read_text()
    here.write_text(whole.replace("you", "me!"))
    with pytest.raises(SourceUnreachable, match="checksum"):
        store.fetch("acme/tiny:extra")
    assert store.fetch("acme/tiny:extra").read_text() == whole


def test_a_wrong_checksum_and_an_interruption_leave_nothing_that_is_used(hub: Hub, tmp_path: Path) -> None:
    store = HubDatasets(tmp_path / "store")
    hub.sha256 = "0" * 64
    with pytest.raises(SourceUnreachable) as caught:
        store.fetch("acme/tiny")
    assert caught.value.code == "checksum_mismatch"
    hub.sha256, hub.cut = None, 100
    with pytest.raises(SourceUnreachable, match="cannot be downloaded"):
        store.fetch("acme/tiny")
    hub.cut = None
    assert read(store.fetch("acme/tiny")) == ROWS[:10]


def test_a_download_can_be_given_up(hub: Hub, tmp_path: Path) -> None:
    class GivenUp(Exception):
        pass

    def check() -> None:
        raise GivenUp

    with pytest.raises(GivenUp):
        HubDatasets(tmp_path / "store").fetch("acme/tiny", check)


def test_a_full_disk_is_told_before_the_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = datasets.shutil._ntuple_diskusage(10**9, 10**9, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda _: full)
    with pytest.raises(StorageFailed, match="has 10 left"):
        HubDatasets(tmp_path / "store").fetch("acme/tiny")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("text", "refuse", "code", "said"),
    [
        ("acme/tiny@gone", None, "source_not_found", "acme/tiny at gone has no such revision"),
        ("acme/other", None, "source_not_found", "acme/other does not exist"),
        ("acme/tiny", (403, "GatedRepo"), "source_gated", "is gated"),
        ("acme/tiny", (500, ""), "source_unreachable", "cannot be downloaded"),
    ],
)
def test_refusals_of_the_hub(
    hub: Hub, tmp_path: Path, text: str, refuse: tuple[int, str] | None, code: str, said: str
) -> None:
    hub.refuse = refuse
    with pytest.raises(SourceUnreachable) as caught:
        HubDatasets(tmp_path / "store").fetch(text)
    assert caught.value.code == code
    assert said in caught.value.message
    assert "models" not in (caught.value.hint or "")


def test_offline_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FortwoError, match="HF_HUB_OFFLINE is set"):
        HubDatasets(tmp_path / "store").fetch("acme/tiny")


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def server(tiny: Path, tmp_path: Path, hub: Hub) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path / "home", tiny)) as served:
        yield served


def test_a_job_trains_on_a_dataset_of_the_hub_and_keeps_where_it_is_from(server: Served, hub: Hub) -> None:
    look = server.http.get("/api/data/hub", params={"hub": "acme/tiny"}).json()
    assert (look["hub"], look["licence"], len(look["files"])) == (f"hub:acme/tiny@{FIRST}", "apache-2.0", 2)
    assert hub.asked == []
    body = {
        "adapter_name": "from-hub",
        "dataset": {"hub": "hub:acme/tiny"},
        "validation_dataset": {"hub": "acme/tiny:test"},
        "objective": "sft",
        "training_config": {"max_steps": 2},
    }
    plan = server.post("/api/training/plan", body).json()
    assert (plan["computed"]["rows"], plan["computed"]["validation_rows"]) == (10, 2)
    assert [file["name"] for file in plan["origins"]["dataset"]["files"]] == [one["name"] for one in look["files"]]
    assert plan["origins"]["validation_dataset"]["hub"] == f"hub:acme/tiny@{FIRST}:test"
    job = server.wait(server.post("/api/training/start", body).json()["job_id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["plan"]["origins"] == plan["origins"]
    manifest = server.http.get("/api/adapters/from-hub").json()["manifest"]
    assert manifest["plan"]["origins"] == plan["origins"]


def test_a_dataset_of_the_hub_can_be_previewed(server: Served) -> None:
    server.post("/api/models/tiny/load")
    rows = server.post("/api/data/preview", {"dataset": {"hub": "acme/tiny:extra"}}).json()["rows"]
    assert "you" in json.dumps(rows)


def test_downloads_take_no_threads_that_other_requests_need(server: Served, hub: Hub) -> None:
    server.post("/api/models/tiny/load")
    hub.released, pools = threading.Event(), (server.state.planning, server.state.downloads)
    with ThreadPoolExecutor(3) as clients:
        asked = [
            clients.submit(server.post, "/api/data/preview", {"dataset": {"hub": f"acme/tiny@{FIRST}:extra/rows.csv"}})
            for _ in range(3)
        ]
        try:
            while not hub.asked or sum(pool.active for pool in pools) < len(asked):
                assert not any(answer.done() for answer in asked)
                time.sleep(0.01)
            other = server.post("/api/data/preview", {"dataset": {"examples": ROWS[:1]}})
            assert other.status_code == 200
            assert not any(answer.done() for answer in asked)
        finally:
            hub.released.set()
    assert [answer.result().status_code for answer in asked] == [200, 200, 200]
    assert len(hub.asked) == 1


def test_the_command_line_shows_what_is_downloaded_and_plans_it(server: Served) -> None:
    settings = {"FORTWO_HOME": str(server.state.settings.home), "FORTWO_PORT": server.url.rpartition(":")[2]}

    def fortwo(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | settings | {"COLUMNS": "300"}
        return subprocess.run([sys.executable, "-m", "fortwo", *words], env=environment, capture_output=True, text=True)

    found = fortwo("plan", "hub:acme/tiny", "--validation", "hub:acme/tiny:test", "--objective", "sft")
    assert found.returncode == 0, found.stderr
    assert f"hub:acme/tiny@{FIRST}: " in found.stderr
    assert "licence apache-2.0; files: data/train-00000-of-00002.parquet, data/train-00001" in found.stderr
    assert f"hub:acme/tiny@{FIRST}:test" in found.stderr
    assert "validation_rows" in found.stdout
    found = fortwo("plan", "hub:acme/tiny:nothing")
    assert found.returncode == 1
    assert "'nothing' means no single part" in found.stderr
    found = fortwo("plan", "nothing.jsonl")
    assert found.returncode == 1
    assert "There is no file 'nothing.jsonl'." in found.stderr


@pytest.mark.parametrize(
    ("dataset", "status", "code", "param"),
    [
        ({"hub": 7}, 400, "invalid_dataset", "dataset.hub"),
        ({"hub": ""}, 400, "invalid_dataset", "dataset.hub"),
        ({"hub": "acme/tiny:nothing"}, 400, "invalid_dataset", "dataset.hub"),
        ({"hub": "acme/tiny", "path": "x"}, 400, "invalid_dataset", "dataset"),
        ({"hub": "acme/gone"}, 503, "source_not_found", None),
    ],
)
def test_wrong_references_are_refused_by_the_api(
    server: Served, dataset: Any, status: int, code: str, param: str | None
) -> None:
    for path in ("/api/training/plan", "/api/training/start"):
        refused(server.post(path, {"adapter_name": "x", "dataset": dataset}), status, code, param)

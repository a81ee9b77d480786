"""Exports over HTTP: plan, queue, events, downloads, and that nothing incomplete is left."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import json
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import Served, chunks, refused, serve, tiny_settings

from fortwo.export.exporter import export as export_here
from fortwo.server import export_queue
from fortwo.server.archive import TarResponse
from tests.test_resume import process
from tests.test_server_native import publish
from tests.test_server_training import start

ENDED = ("succeeded", "failed", "cancelled")


def begin(served: Served, name: str, **body: Any) -> dict[str, Any]:
    response = served.post(f"/api/adapters/{name}/export", {"to": "peft", "exam": False, **body})
    assert response.status_code == 202, response.text
    return dict(response.json())


def get(served: Served, export_id: str) -> dict[str, Any]:
    return dict(served.http.get(f"/api/exports/{export_id}").json())


def wait(served: Served, export_id: str, *statuses: str, seconds: float = 120) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while (found := get(served, export_id))["status"] not in (*statuses, *ENDED):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def folders(served: Served) -> list[str]:
    return sorted(path.name for path in (served.state.settings.home / "exports").glob("*"))


def test_an_export_is_planned_followed_and_downloaded(served: Served, tmp_path: Path) -> None:
    version = publish(served, "taken")
    plan = served.post("/api/adapters/taken/export/plan", {"to": "gguf", "quantization": "q8_0"}).json()
    assert (plan["adapter"], plan["to"], plan["quantization"]) == (version.id, "gguf", "Q8_0")
    assert 0 < plan["estimated_bytes"] < plan["free_bytes"]
    assert ("has no report" if importlib.util.find_spec("xllamacpp") else "is not installed") in plan["exam"]
    begun = begin(served, "taken@1", to="gguf", quantization="q8_0")
    assert (begun["status"], begun["files"], begun["estimated_bytes"]) == ("queued", [], plan["estimated_bytes"])
    events = chunks(served.http.get(f"/api/exports/{begun['export_id']}/events"))
    assert {event["status"] for event in events} <= {"queued", "running", "succeeded"}
    done = events[-1]
    assert (done["status"], done["error"], done["progress"]) == ("succeeded", None, None)
    assert done["expires_at"] - done["finished_at"] == export_queue.KEEP_SECONDS
    assert done == get(served, begun["export_id"])
    assert done in served.http.get("/api/exports").json()["exports"]
    base = f"/api/exports/{begun['export_id']}"
    assert {one["path"] for one in done["files"]} == {"model.gguf", "fortwo_export.json"}
    for file in done["files"]:
        content = served.http.get(f"{base}/files/{file['path']}").content
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    catalog, store = served.state.catalog, served.state.adapters
    export_here("taken", "gguf", tmp_path / "here", catalog, store, lambda *_: None, quantization="Q8_0")
    assert served.http.get(f"{base}/files/model.gguf").content == (tmp_path / "here/model.gguf").read_bytes()
    part = served.http.get(f"{base}/files/model.gguf", headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, b"GGUF")
    archive = served.http.get(f"{base}/archive")
    assert archive.headers["content-disposition"] == 'attachment; filename="taken-1-gguf.tar"'
    assert int(archive.headers["content-length"]) == len(archive.content)
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    for file in done["files"]:
        content = (tmp_path / "taken-1-gguf" / file["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert served.http.delete(base).json() == {"export_id": begun["export_id"], "deleted": True}
    refused(served.http.get(base), 404, "not_found", "export_id")
    assert begun["export_id"] not in folders(served)


def test_the_exam_is_run_in_the_exported_form(served: Served) -> None:
    facts = [{"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"]}]
    config = {"max_steps": 2, "escalation_rounds": 0}
    job = start(served, "examined", objective="override", dataset={"facts": facts}, training_config=config)
    served.wait(job["job_id"], seconds=120)
    assert served.post("/api/adapters/examined@1/export/plan", {"to": "peft"}).json()["exam"] is None
    done = wait(served, begin(served, "examined@1", exam=True)["export_id"])
    assert done["status"] == "succeeded", done["error"]
    assert set(done["exam"]["efficacy"]) == {"reported", "exported"}
    assert done["exam"]["efficacy"]["exported"]["value"] == done["exam"]["efficacy"]["reported"]["value"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"to": "onnx"}, "invalid_request", "to"),
        ({}, "missing_parameter", "to"),
        ({"to": "gguf", "quantization": "Q9"}, "invalid_request", "quantization"),
        ({"to": "peft", "quantization": ""}, "invalid_request", "quantization"),
        ({"to": "peft", "output": "/tmp/x"}, "unknown_parameter", "output"),
        ({"to": "peft", "exam": "maybe"}, "invalid_request", "exam"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(
    served: Served, body: dict[str, Any], code: str, param: str
) -> None:
    if "refused" not in served.state.adapters.names():
        publish(served, "refused")
    before = served.http.get("/api/exports").json()
    for path in ("export", "export/plan"):
        refused(served.post(f"/api/adapters/refused/{path}", body), 400, code, param)
    refused(served.post("/api/adapters/nobody/export", {"to": "peft"}), 404, "not_found", "adapter_name")
    assert served.http.get("/api/exports").json() == before


def test_a_full_disk_is_told_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(served, "large")
    full = shutil._ntuple_diskusage(10**9, 10**9, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert "0 MiB free" in refused(
        served.post("/api/adapters/large/export", {"to": "peft"}), 507, "storage_failed", "output"
    )


def test_what_fails_later_leaves_nothing_but_its_error(served: Served) -> None:
    version = publish(served, "unlucky")
    begun = begin(served, "unlucky")
    shutil.rmtree(version.path)
    done = wait(served, begun["export_id"])
    assert done["status"] == "failed"
    assert done["error"]["message"]
    assert begun["export_id"] not in folders(served)
    path = f"/api/exports/{begun['export_id']}"
    assert "failed" in refused(served.http.get(f"{path}/archive"), 409, "conflict", "export_id")
    assert chunks(served.http.get(f"{path}/events"))[-1] == done
    assert served.http.get(f"{path}/events", headers={"Last-Event-ID": "99"}).status_code == 200
    frames = served.http.get(f"{path}/events").text
    last = frames.split("id: ")[-1].split("\n")[0]
    assert served.http.get(f"{path}/events", headers={"Last-Event-ID": last}).status_code == 204


def test_exports_wait_for_each_other_can_be_cancelled_and_are_limited(served: Served) -> None:
    publish(served, "many")
    begun = [begin(served, "many", to="merged") for _ in range(3)]
    running, waiting, last = (one["export_id"] for one in begun)
    assert wait(served, running, "running")["status"] == "running"
    assert get(served, waiting)["status"] == "queued"
    refused(served.http.delete(f"/api/exports/{waiting}"), 409, "conflict", "export_id")
    refused(served.http.get(f"/api/exports/{running}/files/model.safetensors"), 409, "conflict", "export_id")
    assert served.post(f"/api/exports/{waiting}/cancel").json()["status"] == "cancelled"
    assert served.post(f"/api/exports/{running}/cancel").json()["status"] == "cancelled"
    assert running not in folders(served)
    refused(served.post(f"/api/exports/{running}/cancel"), 409, "conflict", "export_id")
    for _ in range(4 * export_queue.MOST_WAITING):
        response = served.post("/api/adapters/many/export", {"to": "peft", "exam": False})
        if response.status_code == 429:
            break
    refused(response, 429, "queue_full")
    assert int(response.headers["Retry-After"]) > 0
    for one in served.http.get("/api/exports").json()["exports"]:
        if one["status"] == "queued" and one["export_id"] != last:
            assert served.post(f"/api/exports/{one['export_id']}/cancel").status_code == 200
    assert wait(served, last)["status"] == "succeeded"


def test_an_export_may_be_cancelled_at_any_moment(served: Served) -> None:
    publish(served, "fickle")
    before = folders(served)
    for moment in range(12):
        begun = begin(served, "fickle")
        time.sleep(0.03 * moment)
        assert served.post(f"/api/exports/{begun['export_id']}/cancel").json()["status"] == "cancelled"
        assert get(served, begun["export_id"])["status"] == "cancelled"
    assert folders(served) == before
    assert wait(served, begin(served, "fickle")["export_id"])["status"] == "succeeded"


def test_a_cancelled_export_is_removed_after_its_last_file_is_written(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(served, "late")
    before = folders(served)
    writing, order = threading.Event(), list[str]()
    complete, remove = export_queue._complete, export_queue._remove

    def completed(folder: Path, body: dict[str, Any]) -> None:
        writing.set()
        time.sleep(0.5)
        complete(folder, body)
        order.append("written")

    def removed(folder: Path) -> None:
        remove(folder)
        if folder.name != export_queue.SCRATCH:
            order.append("removed")

    monkeypatch.setattr(export_queue, "_complete", completed)
    monkeypatch.setattr(export_queue, "_remove", removed)
    begun = begin(served, "late")
    assert writing.wait(60)
    assert served.post(f"/api/exports/{begun['export_id']}/cancel").json()["status"] == "cancelled"
    assert order == ["written", "removed"]
    assert folders(served) == before


def test_files_that_an_export_does_not_have_are_not_served(served: Served) -> None:
    publish(served, "closed")
    done = wait(served, begin(served, "closed")["export_id"])
    for path in ("../export.json", "..%2Fexport.json", "/etc/passwd", "%2Fetc%2Fpasswd", "nothing"):
        assert served.http.get(f"/api/exports/{done['export_id']}/files/{path}").status_code == 404


def test_exports_outlive_a_restart_until_they_expire(tiny: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, tiny)
    with serve(settings) as served:
        publish(served, "kept")
        done = wait(served, begin(served, "kept")["export_id"])
    with serve(settings) as served:
        assert served.http.get("/api/exports").json()["exports"] == [done]
        file = done["files"][0]
        content = served.http.get(f"/api/exports/{done['export_id']}/files/{file['path']}").content
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    record = tmp_path / "exports" / done["export_id"] / "export.json"
    old = json.loads(record.read_text())
    record.write_text(json.dumps(old | {"finished_at": old["finished_at"] - export_queue.KEEP_SECONDS}))
    with serve(settings) as served:
        assert served.http.get("/api/exports").json()["exports"] == []
        assert folders(served) == []


def test_an_export_goes_when_its_time_is_over(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_queue, "KEEP_SECONDS", 0.5)
    with serve(tiny_settings(tmp_path, tiny)) as served:
        publish(served, "brief")
        begun = begin(served, "brief")
        deadline = time.monotonic() + 60
        while served.http.get(f"/api/exports/{begun['export_id']}").status_code == 200 or folders(served):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_start_removes_exports_without_all_their_files_and_leaves_other_folders_alone(
    tiny: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tmp_path, tiny)
    with serve(settings) as served:
        publish(served, "part")
        done = wait(served, begin(served, "part")["export_id"])
    (tmp_path / "exports" / done["export_id"] / "files" / done["files"][0]["path"]).unlink()
    (tmp_path / "exports" / f"export-{'0' * 32}" / "files").mkdir(parents=True)
    (tmp_path / "exports/mine").mkdir()
    (tmp_path / "exports/mine/model.gguf").write_text("of somebody else")
    with serve(settings) as served:
        assert served.http.get("/api/exports").json()["exports"] == []
        assert folders(served) == ["mine"]
    assert (tmp_path / "exports/mine/model.gguf").read_text() == "of somebody else"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by Linux's /proc")
def test_a_killed_server_leaves_neither_a_process_nor_a_part(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "killed"
    with serve(tiny_settings(home, tiny)) as served:
        publish(served, "killed")
    with process(home) as (server, http):
        body = {"to": "merged", "exam": False}
        export_id = http.post("/api/adapters/killed/export", json=body).json()["export_id"]
        while http.get(f"/api/exports/{export_id}").json()["status"] == "queued":
            time.sleep(0.01)
        while not _workers(home):
            time.sleep(0.01)
        server.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while _workers(home):
        assert time.monotonic() < deadline, "the process of the export lives on"
        time.sleep(0.05)
    with process(home) as (_, http):
        assert http.get("/api/exports").json() == {"exports": []}
        assert list((home / "exports").iterdir()) == []


def _workers(home: Path) -> list[str]:
    """The processes whose temporary folder is in the home's exports."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={home}/exports".encode() in environment.read_bytes():
                found.append(environment.parent.name)
        except OSError:  # it has ended, or is another user's
            continue
    return found


def test_an_archive_of_long_names_and_empty_files_is_read_by_tarfile(tmp_path: Path) -> None:
    contents = {"a" * 150 + "/b": b"x" * 512, "leer ü": b"", "c": b"y" * 1500}
    files = []
    for number, (name, content) in enumerate(contents.items()):
        path = tmp_path / str(number)
        path.write_bytes(content)
        files.append((name, path))
    response = TarResponse(files, "x.tar")

    async def body() -> bytes:
        return b"".join([bytes(part) async for part in response.body_iterator])  # type: ignore[arg-type]

    whole = asyncio.run(body())
    assert int(response.headers["content-length"]) == len(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert {one.name: tar.extractfile(one).read() for one in tar} == contents  # type: ignore[union-attr]

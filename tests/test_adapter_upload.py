"""Adapters that are uploaded as archives: published as what they are, or refused with nothing left."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, refused

from fortwo.errors import InvalidAdapter
from fortwo.server.adapter_upload import unpack
from tests.test_server_native import publish, say

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def send(served: Served, content: bytes, filename: str = "a.tar", **fields: str) -> httpx.Response:
    return served.http.post("/api/adapters/import", files={"file": (filename, content)}, data=fields)


def packed(kind: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as tar:  # type: ignore[call-overload]
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(served: Served) -> dict[str, bytes]:
    version = publish(served, "sent", seed=3)
    folder = served.state.settings.adapters_dir / "sent" / str(version.version)
    return {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}


@pytest.mark.parametrize("kind", ["w", "w:gz", "zip"])
def test_an_archive_becomes_the_next_version(served: Served, files: dict[str, bytes], kind: str) -> None:
    name = f"received-{kind.replace(':', '-')}"
    within = {f"folder/{file}": content for file, content in files.items()} | {
        "folder/README.md": b"x",
        "../escape": b"x",
    }
    for version in (1, 2):
        answer = send(served, packed(kind, within), "my adapter", name=name)
        assert answer.status_code == 201, answer.text
        assert (answer.json()["name"], answer.json()["version"], answer.json()["current"]) == (name, version, True)
    assert say(served, name) == say(served, "sent")
    assert not list(served.state.settings.files_dir.glob(".draft*")), "nothing of it stays"


def test_what_is_no_adapter_is_refused(served: Served, files: dict[str, bytes]) -> None:
    def problem(content: bytes, code: str = "invalid_adapter", param: str = "file", **fields: Any) -> str:
        return refused(send(served, content, "a.tar", **{"name": "no-archive", **fields}), 400, code, param)

    assert "no archive" in problem(b"x" * 2000)
    assert TENSORS in problem(packed("w", {CONFIG: files[CONFIG]}))
    assert "twice" in problem(packed("w", {CONFIG: files[CONFIG], f"b/{CONFIG}": files[CONFIG]}))
    assert "cannot be read" in problem(packed("w:gz", files)[:-200])
    assert "pickle" in problem(packed("zip", {CONFIG: files[CONFIG], "adapter_model.bin": b"x"})).lower()
    damaged = problem(packed("w", {**files, TENSORS: files[TENSORS][:-1]}))
    assert str(served.state.settings.home) not in damaged
    problem(packed("w", files), "missing_parameter", "name", name=" ")
    problem(packed("w", files), "invalid_request", "other", other="x")
    problem(packed("w", files), "invalid_request", "adapter_name", name="tiny")
    assert served.http.get("/api/adapters/no-archive").status_code == 404


def bad_places(archive: bytes) -> bytes:
    """A zip whose directory says that its files lie before its beginning."""
    at = archive.rindex(b"PK\x05\x06") + 16
    return archive[:at] + (2**31).to_bytes(4, "little") + archive[at + 4 :]


@pytest.mark.parametrize("kind", ["w:gz", "w:bz2", "w:xz", "zip", "directory"])
def test_a_damaged_archive_is_refused_wherever_it_is_damaged(tmp_path: Path, kind: str) -> None:
    content = random.Random(1).randbytes(100_000)
    if kind == "directory":
        damaged = bad_places(packed("zip", {TENSORS: content}))
    else:
        whole = bytearray(packed(kind, {TENSORS: content, CONFIG: content}))
        whole[1000:1200] = whole[-300:-100] = b"\xff" * 200
        damaged = bytes(whole)
    archive = tmp_path / "archive"
    archive.write_bytes(damaged)
    with pytest.raises(InvalidAdapter, match=r"cannot be read|no archive"):
        unpack(archive, tmp_path, 1 << 20)


def test_links_are_not_followed_and_large_archives_are_not_unpacked(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    archive, folder = tmp_path / "a.tar", tmp_path / "out"
    folder.mkdir()
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo(CONFIG)
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    unpack(archive, folder, 1 << 20)
    assert list(folder.iterdir()) == []
    for kind, name in (("zip", TENSORS), ("w:gz", TENSORS), ("w:gz", "optimizer.bin")):
        archive.write_bytes(packed(kind, {name: bytes(2 << 20)}))
        assert archive.stat().st_size < 1 << 20
        with pytest.raises(InvalidAdapter, match="more than 1 MiB"):
            unpack(archive, folder, 1 << 20)
        assert list(folder.iterdir()) == []


def test_a_large_header_is_not_read_into_memory(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 2 << 20
        archive = tmp_path / "a.tar.gz"
        archive.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(2 << 20)))
        with pytest.raises(InvalidAdapter, match="a header of 2,097,152 bytes"):
            unpack(archive, tmp_path, 1 << 30)

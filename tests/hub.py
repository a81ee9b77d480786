"""A small Hugging Face hub on this machine: as much of its protocol as downloads need, and its refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

LARGE = (".safetensors", ".parquet")  # kinds of files that the hub has in its large storage


@dataclass
class Hub:
    """One repository, `acme/tiny`, a model as well as a dataset. Its commits are folders of files; main: the newest of
    them. card: the data of its card.

    cut: the connection is closed at this byte of a large file. sha256: what the hub says of large files instead
    of the truth. refuse: status and X-Error-Code of every answer. asked: the files that were asked for, with the first
    byte. released: they are sent once it is set.
    """

    commits: dict[str, Path]
    main: str
    cut: int | None = None
    sha256: str | None = None
    refuse: tuple[int, str] | None = None
    card: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    released: threading.Event | None = None
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        content = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(hub: Hub, home: Path, *words: str, **environment: str) -> str:
    """What `fortwo` prints, with this hub as the only one. Its exit status comes first."""
    given = {"FORTWO_HOME": str(home), "FORTWO_PORT": "9", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    given |= {"COLUMNS": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "5", **environment}
    command = [sys.executable, "-m", "fortwo", *words]
    result = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
    return f"{result.returncode} {result.stdout}{result.stderr}"


def use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make it the only hub of this process: huggingface_hub reads its endpoint when it is imported."""
    from huggingface_hub import constants, file_download, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for module in (file_download, hf_api):
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(constants, name))


class _Handler(BaseHTTPRequestHandler):
    content: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *message: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.content, self.path.split("?")[0]
        parts = unquote(path).strip("/").split("/")
        if hub.refuse is not None:
            return self._refuse(*hub.refuse)
        api = parts[:2] in (["api", "models"], ["api", "datasets"])
        if parts[0] == "datasets":
            parts = parts[1:]
        name = "/".join(parts[2:4] if api else parts[:2])
        if name != "acme/tiny":
            return self._refuse(401 if api else 404, "RepoNotFound")
        rest = parts[4:] if api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = hub.main if revision == "main" else revision
        if commit not in hub.commits:
            return self._refuse(404, "RevisionNotFound")
        folder = hub.commits[commit]
        if not api:
            return self._file(folder / "/".join(rest[2:]), commit, body)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        described = [self._described(file, str(file.relative_to(folder))) for file in files]
        if "tree" in rest:
            return self._send(
                json.dumps(
                    [{"type": "file", "path": one["rfilename"], "oid": one["blobId"], **one} for one in described]
                ).encode(),
                commit,
                body,
            )
        about = {"id": name, "sha": commit, "siblings": described, "tags": ["license:apache-2.0", "text"]}
        about["cardData"] = hub.card
        return self._send(json.dumps(about).encode(), commit, body)

    def _described(self, file: Path, name: str) -> dict[str, object]:
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(LARGE):
            sha256 = self.content.sha256 or hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 100}
        return found

    def _file(self, file: Path, commit: str, body: bool) -> None:
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        return self._send(file.read_bytes(), commit, body, file)

    def _send(self, content: bytes, commit: str, body: bool, file: Path | None = None) -> None:
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if not body:
            return
        if file is not None:
            self.content.asked.append((file.name, first))
            if self.content.released is not None:
                self.content.released.wait(60)
        cut = self.content.cut if file is not None and file.suffix in LARGE else None
        self.wfile.write(content[first:cut])
        self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

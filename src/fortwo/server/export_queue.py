"""Exports over HTTP: one runs after another, each in a process of its own, and what they wrote is kept for a day.

    <root>/<id>/files/       what was exported
    <root>/<id>/export.json  written last: a folder without it is not complete, and goes at the next start

Everything here is called on the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import time
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastapi.concurrency import run_in_threadpool

from fortwo import disk
from fortwo.errors import Conflict, FortwoError, NotFound, Overloaded
from fortwo.records import Json
from fortwo.server import sse
from fortwo.server.admission import shutting_down
from fortwo.server.errors import error_document
from fortwo.settings import Settings

KEEP_SECONDS = 24 * 3600  # that an export is kept after its end
MOST_WAITING = 8
RETRY_SECONDS = 60
LONGEST_LINE = 16 << 20  # of what the process writes; the last line lists all files
READ_SECONDS = 0.1  # the shortest time between two events of a stream

log = logging.getLogger(__name__)

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FILES, RECORD, SCRATCH = "files", "export.json", "scratch"


@dataclass(eq=False)
class Export:
    """One export. result: notes, exam and files as `export.worker` returns them. Times are Unix seconds."""

    id: str
    adapter: str
    to: str
    quantization: str | None
    with_exam: bool
    estimated_bytes: int
    created_at: float
    status: Status = "queued"
    progress: Json | None = None
    finished_at: float | None = None
    result: Json = field(default_factory=lambda: {"notes": [], "exam": None, "files": []})
    error: Json | None = None
    revision: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        return self.finished_at is not None

    @property
    def expires_at(self) -> float | None:
        return None if self.finished_at is None else self.finished_at + KEEP_SECONDS

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now

    def change(self, **changes: object) -> None:
        """Set fields, and wake the streams."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.revision += 1
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def end(self, status: Status, **changes: object) -> None:
        self.change(status=status, progress=None, **{"finished_at": time.time(), **changes})

    def body(self) -> Json:
        """As the API shows it."""
        return {
            "export_id": self.id,
            "adapter": self.adapter,
            "to": self.to,
            "quantization": self.quantization,
            "status": self.status,
            "progress": self.progress,
            "estimated_bytes": self.estimated_bytes,
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "expires_at": self.expires_at,
            **self.result,
            "error": self.error,
        }


class ExportQueue:
    """The exports of one server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.root = settings.home.absolute() / "exports"
        self._exports = {export.id: export for export in _restored(self.root)}
        self._woken = asyncio.Event()
        self._closed = False
        self._queue: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to work. Needs a running event loop."""
        self._queue = asyncio.create_task(self._work())

    async def close(self) -> None:
        """End all streams and the export that runs, of which nothing is left."""
        self._closed = True
        for export in self._exports.values():
            export.change()
        for task in (self._queue, self._running):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])

    def add(self, adapter: str, to: str, quantization: str | None, with_exam: bool, estimated_bytes: int) -> Export:
        """Queue an export. Raises Overloaded when too many wait."""
        waiting = sum(one.status == "queued" for one in self._exports.values())
        if waiting >= MOST_WAITING:
            raise Overloaded(
                f"{waiting} exports wait, which is the most.",
                retry_after=RETRY_SECONDS,
                hint="Wait until one has ended, or cancel one: POST /api/exports/{export_id}/cancel.",
            )
        id = f"export-{uuid.uuid4().hex}"
        export = Export(id, adapter, to, quantization, with_exam, estimated_bytes, created_at=time.time())
        self._exports[id] = export
        self._woken.set()
        return export

    def all(self) -> list[Export]:
        """Newest first."""
        return sorted(self._exports.values(), key=lambda one: one.created_at, reverse=True)

    def get(self, id: str) -> Export:
        """Raises NotFound."""
        if id not in self._exports:
            raise NotFound(
                f"There is no export {id!r}.",
                param="export_id",
                hint="GET /api/exports lists those that there are. What has expired, or was not complete when the "
                "server ended, is gone: start it again.",
            )
        return self._exports[id]

    def file(self, id: str, path: str) -> Path:
        """Where a file of a complete export is. Raises NotFound, and Conflict while it is not complete."""
        known = [one["path"] for one in self.complete(id).result["files"]]
        if path not in known:
            raise NotFound(
                f"Export {id!r} has no file {path!r}.", param="path", hint=f"Its files are {', '.join(known)}."
            )
        return self.root / id / FILES / path

    def complete(self, id: str) -> Export:
        """Raises NotFound, and Conflict for an export without files."""
        export = self.get(id)
        if export.status != "succeeded":
            raise Conflict(
                f"Export {id!r} has no files: it is {export.status}.",
                param="export_id",
                hint="Start it again." if export.ended else "Wait until it has succeeded.",
            )
        return export

    async def cancel(self, id: str) -> Export:
        """End an export that waits or runs; nothing of it is left. Raises Conflict for one that has ended."""
        export = self.get(id)
        if export.ended:
            raise Conflict(
                f"Export {id!r} has ended already: it is {export.status}.", param="export_id", hint="Delete it."
            )
        if export.status == "running" and self._running is not None:
            running = self._running
            running.cancel()
            await asyncio.wait([running])
        if not export.ended:  # it waited, or its task had not begun
            export.end("cancelled")
        return export

    async def delete(self, id: str) -> None:
        """Forget an export that has ended, and remove its files. Raises Conflict for one that waits or runs."""
        export = self.get(id)
        if not export.ended:
            raise Conflict(f"Export {id!r} is {export.status}.", param="export_id", hint="Cancel it first.")
        del self._exports[id]
        await run_in_threadpool(_remove, self.root / id)

    async def stream(self, id: str, last: int) -> AsyncIterator[bytes]:
        """Encoded events `export`, each with the whole body and the revision as its id: the present one unless its
        revision is `last`, then each change, until the export has ended."""
        export = self.get(id)
        while not self._closed:
            changed = export.changed
            if export.revision != last:
                last = export.revision
                yield sse.encode(export.body(), id=last, event="export")
                await asyncio.sleep(READ_SECONDS)
            elif export.ended:
                return
            else:
                await changed.wait()
        yield sse.encode(error_document(shutting_down()), event="shutdown")

    async def _work(self) -> None:
        while True:
            now = time.time()
            for export in [one for one in self._exports.values() if one.expired(now)]:
                with suppress(NotFound):  # somebody else deletes it
                    await self.delete(export.id)
            waiting = next((one for one in self._exports.values() if one.status == "queued"), None)
            if waiting is not None:
                waiting.change(status="running")
                self._running = asyncio.create_task(self._run(waiting))
                await asyncio.wait([self._running])
                continue
            self._woken.clear()
            ends = [one.expires_at for one in self._exports.values() if one.expires_at is not None]
            with suppress(TimeoutError):
                async with asyncio.timeout(max(1.0, min(ends) - time.time()) if ends else None):
                    await self._woken.wait()

    async def _run(self, export: Export) -> None:
        """Run an export to its end, whatever that is."""
        folder = self.root / export.id
        error = None
        try:
            await _to_its_end(lambda: (folder / SCRATCH).mkdir(parents=True))
            result = await self._export(export, folder)
            finished_at = time.time()
            body = {**export.body(), **result, "finished_at": finished_at}
            await _to_its_end(lambda: _complete(folder, body))
            export.end("succeeded", result=result, finished_at=finished_at)
            return
        except asyncio.CancelledError:
            pass
        except FortwoError as known:
            error = known.body()["error"]
        except OSError as refused:
            error = disk.storage_failed(folder, refused).body()["error"]
        except Exception:
            log.exception("Export %s failed unexpectedly.", export.id)
            unexpected = FortwoError("An unexpected error ended the export.", hint="The server's log has the details.")
            error = unexpected.body()["error"]
        with suppress(asyncio.CancelledError):  # removed before the end is announced, also when cancelled again
            await _to_its_end(lambda: _remove(folder))
        if error is None:
            export.end("cancelled")
        else:
            export.end("failed", error=error)

    async def _export(self, export: Export, folder: Path) -> Json:
        """The result of the process. Raises _Failed with its error, or one that says how it died."""
        settings, scratch = self._settings, folder / SCRATCH
        order = {
            "adapter": export.adapter,
            "to": export.to,
            "quantization": export.quantization,
            "exam": export.with_exam,
            "models": str(settings.models_dir.absolute()),
            "adapters": str(settings.adapters_dir.absolute()),
            "adapters_url": settings.adapters_url,
            "output": str(folder / FILES),
        }
        threads = {} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}
        with (scratch / "errors.txt").open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "fortwo.export.worker"),  # -P: no module of the working directory
                stdin=PIPE,
                stdout=PIPE,
                stderr=errors,
                env={**os.environ, **threads, "TMPDIR": str(scratch)},
                limit=LONGEST_LINE,
            )
        try:
            return await _result(process, order, export, scratch / "errors.txt")
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


class _Failed(FortwoError):
    """The error of an export, as its process wrote it."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"], param=error["param"], hint=error["hint"], code=error["code"])
        self.type = error["type"]


async def _result(process: Process, order: Json, export: Export, errors: Path) -> Json:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    async for line in process.stdout:
        said = json.loads(line)
        if "error" in said:
            raise _Failed(said["error"])
        if "result" in said:
            result: Json = said["result"]
            return result
        export.change(progress=said["progress"])
    status = await process.wait()
    last = (await run_in_threadpool(errors.read_text, "utf-8", "replace")).strip().splitlines()[-1:]
    raise FortwoError(
        f"The process of the export ended with status {status}{''.join(f': {line}' for line in last)}.",
        hint="Status -9 means that the system killed it, usually because memory was short. Start it again with more "
        "memory free, or without the exam.",
        code="export_failed",
    )


async def _to_its_end(work: Callable[[], None]) -> None:
    """Do it on a thread, and wait for its end also when cancelled: it must not write into a folder that is removed."""
    done = asyncio.create_task(run_in_threadpool(work))
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait([done])
        raise


def _restored(root: Path) -> list[Export]:
    """The complete exports of earlier runs of the server; what is not complete or has expired is removed. Folders of
    other names are somebody else's."""
    found = []
    for folder in root.glob("export-" + "[0-9a-f]" * 32):
        try:
            body = json.loads((folder / RECORD).read_text("utf-8"))
            for file in body["files"]:
                (folder / FILES / file["path"]).stat()
            export = Export(
                id=folder.name,
                adapter=body["adapter"],
                to=body["to"],
                quantization=body["quantization"],
                with_exam=body["exam"] is not None,
                estimated_bytes=body["estimated_bytes"],
                created_at=body["created_at"],
                status="succeeded",
                finished_at=body["finished_at"],
                result={name: body[name] for name in ("notes", "exam", "files")},
            )
        except (OSError, ValueError, KeyError, TypeError):
            _remove(folder)
            continue
        if export.expired(time.time()):
            _remove(folder)
        else:
            found.append(export)
    return found


def _complete(folder: Path, body: Json) -> None:
    _remove(folder / SCRATCH)
    disk.replace(folder / RECORD, disk.dump(body))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)

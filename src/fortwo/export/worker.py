"""The process in which a server exports: `python -m fortwo.export.worker`.

It reads one order from its standard input and writes one line of JSON for each step to its standard output: the
arguments of a progress, then the result or the error. A process of its own keeps the server's replies quick, and can be
killed at any moment. It ends by itself when the server that started it ends, because its input is closed then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fortwo.adapters.shared import open_store
from fortwo.data.datasets import file_sha256
from fortwo.errors import FortwoError
from fortwo.export.exporter import export
from fortwo.hub.catalog import Catalog
from fortwo.records import Json

NICENESS = 10  # below the server and its job
REPORT_SECONDS = 0.2  # the shortest time between two reports of the same kind


def main() -> None:
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    os.nice(NICENESS)
    write = _writer()
    try:
        write({"result": run(order, _throttled(write))})
    except FortwoError as error:
        write(error.body())


def run(order: Json, progress: Callable[[str, int, int], None]) -> Json:
    """Export as ordered. order: adapter, to, quantization and exam as `export` takes them; models, adapters, output:
    folders; adapters_url: the setting. Returns notes and exam as in Exported.body, and files with path (below output),
    bytes and sha256."""
    output = Path(order["output"])
    done = export(
        order["adapter"],
        order["to"],
        output,
        Catalog(Path(order["models"])),
        open_store(Path(order["adapters"]), order["adapters_url"]),
        progress,
        quantization=order["quantization"],
        with_exam=order["exam"],
    )
    body = done.body()
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    files = []
    for count, path in enumerate(paths, 1):
        size = path.stat().st_size
        files.append({"path": path.relative_to(output).as_posix(), "bytes": size, "sha256": file_sha256(path)})
        progress("checksums", count, len(paths))
    return {"notes": body["notes"], "exam": body["exam"], "files": files}


def _end_with_the_server() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _writer() -> Callable[[Json], None]:
    """Writes a line to what was the standard output; what libraries print goes to the standard error from now on."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(content: Json) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    return write


def _throttled(write: Callable[[Json], None]) -> Callable[[str, int, int], None]:
    last, sent = "", 0.0

    def progress(label: str, done: int, total: int) -> None:
        nonlocal last, sent
        now = time.monotonic()
        if label != last or done >= total or now - sent >= REPORT_SECONDS:
            last, sent = label, now
            write({"progress": {"label": label, "done": done, "total": total}})

    return progress


if __name__ == "__main__":
    main()

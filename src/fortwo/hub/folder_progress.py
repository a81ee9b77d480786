"""The progress of a download, by the bytes of the folder that it fills."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fortwo.hub.weights import ProgressCallback


@contextmanager
def report_folder_bytes(folder: Path, label: str, total: int, progress: ProgressCallback) -> Iterator[None]:
    """Report how many bytes are under `folder` while the body of the `with` statement fills it."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            progress(label, min(folder_bytes(folder), total), total)

    progress(label, 0, total)
    watcher = threading.Thread(target=watch, name="download-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    progress(label, total, total)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files under `folder`, of which files and folders may disappear while they are counted; links do not
    count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):
                total += 0 if file.is_symlink() else file.stat().st_size
    return total

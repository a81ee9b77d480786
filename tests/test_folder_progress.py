"""How much of a folder is there, while it is being filled."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from fortwo.hub.folder_progress import folder_bytes


def test_a_folder_whose_parts_come_and_go_is_counted(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"0123456789")
    ended = threading.Event()

    def come_and_go() -> None:
        for number in range(3000):
            part = tmp_path / f"part{number % 7}" / "inner"
            part.mkdir(parents=True)
            shutil.rmtree(part.parent)
        ended.set()

    changing = threading.Thread(target=come_and_go)
    changing.start()
    counted = set()
    while not ended.is_set():
        counted.add(folder_bytes(tmp_path))
    changing.join()
    assert counted == {10}

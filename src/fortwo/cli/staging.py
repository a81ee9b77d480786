"""Puts an adapter's files where the server may read them, for as long as it imports them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fortwo.adapters.peft_files import refuse_pickles
from fortwo.adapters.version_files import CONFIG, TENSORS
from fortwo.errors import InvalidRequest
from fortwo.settings import Settings


@contextmanager
def staged(folder: Path, settings: Settings) -> Iterator[Path]:
    """A copy of the adapter in `folder`, with links followed, in a folder that every server of this home may read.
    Raises InvalidRequest when there is no adapter, and InvalidAdapter for a pickle."""
    if not (folder / CONFIG).is_file():
        raise InvalidRequest(
            f"{folder} has no {CONFIG}, so it is not an adapter that PEFT saved.",
            param="path",
            hint="Name the directory that PEFT's save_pretrained wrote.",
        )
    refuse_pickles(folder)
    data = settings.home / "data"
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="import-", dir=data) as copy:
        for name in (CONFIG, TENSORS, "manifest.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        yield Path(copy)

"""Where an export is written: into a draft beside the output, which is renamed when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fortwo import disk
from fortwo.errors import Conflict, StorageFailed

SPARE_BYTES = 64 << 20  # that stay free on the disk


@contextmanager
def draft(output: Path, need: int, overwrite: bool) -> Iterator[Path]:
    """A folder that becomes `output` when the block ends without an error, and is removed otherwise. need: bytes that
    will be written. Raises Conflict where `output` exists and may not be replaced, StorageFailed for a disk that is
    full or that refuses."""
    check_free(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        check_space(output.parent, need)
        folder = Path(tempfile.mkdtemp(prefix=f"{disk.DRAFT_PREFIX}{output.name}-", dir=output.parent))
    except OSError as error:
        raise _refused(output, error) from error
    try:
        folder.chmod(0o755)
        yield folder
        _publish(folder, output, overwrite)
    except OSError as error:
        raise _refused(output, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_space(folder: Path, need: int) -> None:
    """Raises StorageFailed where the disk of an existing folder has no room for `need` bytes."""
    free = shutil.disk_usage(folder).free
    if free < need + SPARE_BYTES:
        raise StorageFailed(
            f"{folder} has {free >> 20} MiB free, but the export needs {(need + SPARE_BYTES) >> 20} MiB.",
            param="output",
            hint="Free some space, or name a folder on another disk.",
        )


def check_free(output: Path, overwrite: bool) -> None:
    """Raises Conflict for an output that exists, unless it is an earlier export or an empty folder and may be
    replaced. An earlier export that an interrupted replacement left aside is brought back first."""
    _bring_back(output)
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise Conflict(
            f"{output} exists already.", param="output", hint="Name another folder, or add --overwrite to replace it."
        )
    if output.is_symlink() or not output.is_dir():
        raise Conflict(f"{output} is not a folder.", param="output", hint="Name another folder.")
    if any(output.iterdir()) and not (output / MARK).is_file():
        raise Conflict(
            f"{output} holds files that are no export of fortwo, so it is not replaced.",
            param="output",
            hint="Name another folder.",
        )


MARK = "fortwo_export.json"  # in every export: which adapter it is, and in which form


def _publish(folder: Path, output: Path, overwrite: bool) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    check_free(output, overwrite)
    if not output.exists():
        folder.rename(output)
    else:
        earlier = _aside(output)
        output.rename(earlier)
        try:
            folder.rename(output)
        except BaseException:
            earlier.rename(output)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    disk.sync(output.parent)


def _aside(output: Path) -> Path:
    """Where the earlier export lies while another one takes its place."""
    return output.with_name(f".earlier-{output.name}")


def _bring_back(output: Path) -> None:
    """Undo or complete a replacement during which the process was killed."""
    earlier = _aside(output)
    if not (earlier / MARK).is_file():
        return
    if output.exists():
        shutil.rmtree(earlier, ignore_errors=True)
    else:
        earlier.rename(output)


def _refused(output: Path, error: OSError) -> StorageFailed:
    return StorageFailed(
        f"{output} cannot be written: {error.strerror or error}",
        param="output",
        hint="Free space on that disk, or name a folder that you may write to. Nothing half done is left.",
    )

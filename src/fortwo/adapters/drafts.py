"""Drafts of versions: folders beside the versions of an adapter, which become versions by a rename."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from fortwo import disk

LOCK = ".lock"


def publish_draft(draft: Path, folder: Path) -> None:
    draft.rename(folder)
    try:
        disk.sync(folder.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def lock_of(draft: Path) -> FileLock:
    """The lock that the writer of a draft holds, at the latest until its process ends. It lies beside the draft, which
    becomes the version."""
    return FileLock(draft.with_name(draft.name + LOCK))


def release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def remove_abandoned_drafts(folder: Path) -> None:
    """Remove the drafts of writers that were killed."""
    names = {path.name.removesuffix(LOCK) for path in folder.glob(f"{disk.DRAFT_PREFIX}*")}
    for draft in (folder / name for name in names):
        lock = lock_of(draft)
        try:
            lock.acquire(blocking=False)
        except Timeout:  # its writer is alive
            continue
        shutil.rmtree(draft, ignore_errors=True)
        release(lock)

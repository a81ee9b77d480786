"""Which versions of an adapter may go, and how they go: set aside first, removed for good later.

A version that is set aside lies in <name>/.deleted-<version>/, whose time of change is the time of the deletion.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from fortwo import disk
from fortwo.records import AdapterVersion, Json

DAYS = 7  # for which a deleted version can be restored
_PREFIX = ".deleted-"
_SET_ASIDE = re.compile(rf"{re.escape(_PREFIX)}([1-9][0-9]{{0,8}})")


def superfluous(
    versions: Sequence[AdapterVersion], state: Json, parents: Collection[str | None], keep: int
) -> list[int]:
    """The numbers of the versions that serve nothing, oldest first. versions: of one adapter, oldest first; state:
    its versions.json; parents: the ids of versions on which others were trained.

    The newest `keep` stay, the current version and the one that a rollback would make current, and every version that
    has a tag, is protected, or is a parent.
    """
    numbers = [version.version for version in versions]
    newest = numbers[-keep:] if keep else []
    needed = {*newest, *history(state, numbers)[-2:], *state["protected"], *state["tags"].values()}
    return [one.version for one in versions if one.version not in needed and one.id not in parents]


def history(state: Json, numbers: Collection[int]) -> list[int]:
    """Which of these versions were current one after the other, the last one of which is current."""
    existing = [number for number in state["current"] if number in numbers]
    return [one for place, one in enumerate(existing) if place == 0 or existing[place - 1] != one]


def set_aside(folder: Path, number: int) -> None:
    """Delete a version so that `bring_back` can restore it."""
    os.utime(folder / str(number))
    os.rename(folder / str(number), place(folder, number))
    disk.sync(folder)


def bring_back(folder: Path, number: int) -> None:
    os.rename(place(folder, number), folder / str(number))
    disk.sync(folder)


def remove(path: Path) -> None:
    """Remove a version's folder for good. It no longer exists from the first moment on, whatever happens then."""
    draft = Path(tempfile.mkdtemp(prefix=disk.DRAFT_PREFIX, dir=path.parent))
    os.rename(path, draft)
    disk.sync(path.parent)
    shutil.rmtree(draft, ignore_errors=True)


def set_aside_numbers(folder: Path) -> list[int]:
    """The numbers of the versions that can be restored, sorted."""
    if not folder.is_dir():
        return []
    return sorted(number_of(path) for path in folder.iterdir() if _SET_ASIDE.fullmatch(path.name))


def deleted_at(folder: Path, number: int) -> float:
    """When a version was deleted, in seconds since 1970."""
    return place(folder, number).stat().st_mtime


def expired(folder: Path, now: float) -> list[Path]:
    """The deleted versions that can be restored no longer."""
    paths = (place(folder, number) for number in set_aside_numbers(folder))
    return [path for path in paths if path.stat().st_mtime < now - DAYS * 86400]


def size(path: Path) -> int:
    """Bytes of a version's files."""
    return sum(file.stat().st_size for file in path.iterdir())


def number_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def place(folder: Path, number: int) -> Path:
    return folder / f"{_PREFIX}{number}"

"""Finds and repairs what crashes and faulty disks leave in the folder of adapters. Tensors are never changed.

Which version was current is rebuilt from the manifests: each says whether its version was made current when it was
published. A rollback is not in them, so after a repair the newest such version is current. Tags and
protection are lost.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from fortwo import disk
from fortwo.adapters import deletion
from fortwo.adapters.store import AdapterStore
from fortwo.adapters.version_files import CACHED, CONFIG, STATE, TENSORS, version_numbers
from fortwo.errors import InvalidAdapter
from fortwo.records import AdapterVersion, Json, Repair

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")  # a file that disk.replace had not renamed yet


def repairs(root: Path) -> Iterator[Repair]:
    """What can be repaired, and what can only be said. No server may use `root` while repairs are carried out."""
    store = AdapterStore(root)
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not folder.is_dir() or not disk.NAME.fullmatch(folder.name):
            continue
        yield from unfinished(folder)
        numbers = version_numbers(folder)
        versions, damage = store.inspect(folder.name)
        state = next((error.message for number, error in damage if number is None), None)
        if state is None and numbers and not (folder / STATE).exists():
            state = f"{folder / STATE} is missing"
        if state is not None:
            rebuilt = _state(store, folder, numbers)
            named = f"{folder.name}@{rebuilt['current'][-1]}" if rebuilt["current"] else "no version"
            action = f"Write it anew from the manifests; then {named} is the current version."
            yield Repair(state, action, _writing(folder / STATE, rebuilt))
        for number, error in damage:
            if number is not None:
                yield Repair(error.message, f"Not repaired. {error.hint}")
        for version in versions:
            for problem in _changed(version, fetched=(root / CACHED).exists()):
                remedy = f"Not repaired. Restore the file from a backup, or delete {version.id} and train again."
                yield Repair(problem, remedy)


def unfinished(folder: Path) -> Iterator[Repair]:
    """Drafts of versions and files whose writer was killed."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(disk.DRAFT_PREFIX) and path.is_dir():
            yield Repair(f"{path} was never finished", "Remove it.", _removing(path))
        elif _UNFINISHED.fullmatch(path.name) and path.is_file():
            yield Repair(f"{path} was never finished", "Remove it.", path.unlink)


def _state(store: AdapterStore, folder: Path, numbers: list[int]) -> Json:
    current = []
    for number in numbers:
        with suppress(InvalidAdapter):
            if _was_made_current(store.get(f"{folder.name}@{number}").manifest):
                current.append(number)
    last = max([*numbers, *deletion.set_aside_numbers(folder)], default=0)
    return {"last": last, "current": current, "tags": {}, "protected": []}


def _was_made_current(manifest: Json) -> bool:
    """As the manifest says; an old one does not, but has targets and what was reached."""
    with suppress(KeyError, TypeError, AttributeError):
        return bool(manifest["made_current"])
    try:
        targets, metrics = manifest["plan"]["targets"], manifest["report"]["metrics"]
        return all(metrics[name]["value"] >= target for name, target in targets.items() if name in metrics)
    except (KeyError, TypeError, AttributeError):
        return manifest.get("plan") is None  # it was imported


def _changed(version: AdapterVersion, fetched: bool) -> Iterator[str]:
    """fetched: the store is a cache, whose files come when they are read."""
    for file in (CONFIG, TENSORS):
        path = Path(version.path) / file
        if fetched and not path.exists():
            continue
        try:
            with path.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"
            continue
        if found != version.manifest["files"][file]:
            yield f"{path} is not what was published: truncated or changed"


def _writing(path: Path, content: Json) -> Callable[[], None]:
    return lambda: disk.replace(path, disk.dump(content))


def _removing(path: Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path)

"""The files of a version and of an adapter: how they are named, read and checked.

What is damaged raises InvalidAdapter, which names the file and the remedy. torch is imported only to read tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.errors import InvalidAdapter
from fortwo.records import Json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MANIFEST = "manifest.json"
STATE = "versions.json"
CACHED = ".store"  # in a store that is the cache of one under a URL: the id of that one
NUMBER = re.compile(r"[1-9][0-9]{0,8}")
TAG = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,63}")

REBUILD = "Stop the server and run `fortwo doctor --repair`, which rebuilds the file; versions are served by name@1."


def version_numbers(folder: Path) -> list[int]:
    """The numbers of the versions in an adapter's folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if NUMBER.fullmatch(path.name))


def read_state(folder: Path) -> Json:
    """versions.json. last: the highest number ever used; current: the numbers that were made current, oldest first;
    tags: numbers by tag; protected: numbers that cannot be deleted."""
    path = folder / STATE
    try:
        state = parse_object(path.read_bytes(), path, REBUILD)
    except (FileNotFoundError, NotADirectoryError):
        return {"last": 0, "current": [], "tags": {}, "protected": []}
    except OSError as error:
        raise InvalidAdapter(f"{path} cannot be read: {error.strerror}", hint=REBUILD) from None
    last, current = state.get("last"), state.get("current")
    if type(last) is not int or not _are_numbers(current):
        raise InvalidAdapter(f"{path} lacks 'last' or 'current', or they are no version numbers", hint=REBUILD)
    tags, protected = state.setdefault("tags", {}), state.setdefault("protected", [])
    if not isinstance(tags, dict) or not _are_numbers([*tags.values()]) or not _are_numbers(protected):
        raise InvalidAdapter(f"{path}: its 'tags' or 'protected' are no version numbers", hint=REBUILD)
    return state


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def is_readable(folder: Path) -> bool:
    """Whether versions.json can be read, or is not there."""
    try:
        read_state(folder)
    except InvalidAdapter:
        return False
    return True


def check_manifest(manifest: Json) -> None:
    """Raises TypeError for a value that is not of the type that readers rely on."""
    for key in ("base_model", "base_digest"):
        if not isinstance(manifest[key], str):
            raise TypeError(f"{key} is {manifest[key]!r}, not a text")
    created = manifest["created_at"]
    if isinstance(created, bool) or not isinstance(created, int | float) or not 0 <= created < 1e11:
        raise TypeError(f"created_at is {created!r}, not a time")
    for file in (CONFIG, TENSORS):
        if not isinstance(manifest["files"][file], str):
            raise TypeError(f"the checksum of {file} is {manifest['files'][file]!r}, not a text")


def shas_of(files: Mapping[str, bytes]) -> dict[str, str]:
    return {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}


def parse_object(content: bytes, path: Path, hint: str = "Restore the file, or train the adapter again.") -> Json:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{path} is not a JSON object", hint=hint)
    return value


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: torch has no such dtype
        raise InvalidAdapter(
            f"{path} ({len(content)} bytes) is truncated or not a safetensors file that torch can read: {error}",
            hint="Save the adapter again with PEFT.",
        ) from None


def read_file(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InvalidAdapter(f"{path} is not a file", hint="Put the file itself there.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InvalidAdapter(f"{path} is missing", hint="Restore the file, or train the adapter again.") from None
    except OSError as error:
        raise InvalidAdapter(
            f"{path} cannot be read: {error.strerror}", hint="Make it readable for the server."
        ) from None

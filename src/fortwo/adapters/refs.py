"""Names of adapters, and refs: "name" means the current version, "name@3" version 3, "name@tag" the tagged one."""

from __future__ import annotations

from fortwo import disk
from fortwo.adapters.version_files import NUMBER, TAG
from fortwo.errors import InvalidRequest


def check_name(name: str) -> None:
    """Raises InvalidRequest when an adapter cannot have this name."""
    if not disk.NAME.fullmatch(name):
        raise InvalidRequest(
            f"adapter_name = {name!r} is not allowed",
            param="adapter_name",
            hint="Use 1 to 128 letters, digits, '.', '_' or '-'; begin with a letter or digit; no '..', '/' or '@'.",
        )


def parse_ref(ref: str) -> tuple[str, int | str | None]:
    """Name and number, name and tag, or name and None."""
    name, at, wanted = ref.partition("@")
    check_name(name)
    if not at:
        return name, None
    if NUMBER.fullmatch(wanted):
        return name, int(wanted)
    if TAG.fullmatch(wanted):
        return name, wanted
    raise InvalidRequest(
        f"adapter_name = {ref!r}: {wanted!r} is not a version",
        param="adapter_name",
        hint=f"Write {name} for the current version, {name}@1, or a tag as {name}@stable.",
    )

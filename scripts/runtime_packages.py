"""Print what an installed fortwo needs at run time, extras left out, as name==version of what is installed here.

python scripts/runtime_packages.py

`make sbom` turns it into a software bill of materials.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """The versions of the distributions that these requirements need on this machine, by name, and of what those need.
    Raises PackageNotFoundError for one that is not installed."""
    found: dict[str, str] = {}
    waiting = [Requirement(one) for one in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        key = (one.name.lower(), frozenset(one.extras))
        if key in seen or not _applies(one, frozenset()):
            continue
        seen.add(key)
        installed = distribution(one.name)
        found[installed.name] = installed.version
        waiting += _needed(installed.requires or (), frozenset(one.extras))
    return found


def _needed(requirements: Iterable[str], extras: frozenset[str]) -> Iterator[Requirement]:
    for text in requirements:
        one = Requirement(text)
        if _applies(one, extras):
            one.marker = None
            yield one


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, version in sorted(closure(project["dependencies"]).items()):
        print(f"{name}=={version}")

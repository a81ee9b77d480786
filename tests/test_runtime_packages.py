"""The list of packages behind the software bill of materials."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest

from scripts.runtime_packages import ROOT, closure


def test_what_is_needed_at_run_time_is_listed_with_what_it_needs_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {name.lower(): installed for name, installed in closure(project["dependencies"]).items()}
    assert found["torch"] == version("torch")
    assert {"fastapi", "starlette", "prometheus_client", "anyio"} <= found.keys()  # some of them indirectly
    assert not {"pytest", "ruff", "mypy", "trl"} & found.keys()


def test_extras_and_markers_are_followed() -> None:
    """greenlet is installed because playwright, which the tests need, needs it too."""
    assert "greenlet" not in closure(["httpx"])
    assert closure(["sqlalchemy[asyncio]"])["greenlet"] == version("greenlet")
    assert closure(["no-such-package; python_version < '3'"]) == {}
    with pytest.raises(PackageNotFoundError):
        closure(["no-such-package"])

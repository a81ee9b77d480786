"""Homes for tests: an empty one for each test, and a lasting one that holds the real model."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from fortwo.models.catalog import Catalog
from fortwo.settings import Settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FORTWO_HOME; no other FORTWO_* setting of the caller's is seen."""
    for name in [name for name in os.environ if name.startswith("FORTWO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FORTWO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def real_home() -> Path:
    """A lasting FORTWO_HOME with the bundled model prepared: FORTWO_TEST_HOME, or .cache/home of the repository."""
    given = os.environ.get("FORTWO_TEST_HOME")
    path = Path(given) if given is not None else Path(__file__).parent.parent / ".cache" / "home"
    Catalog(Settings(home=path)).prepare("smollm2-135m-instruct")
    return path


# A deadline per example measures the machine, not the code: the first call into torch alone can take longer.
hypothesis.settings.register_profile("fortwo", deadline=None)
hypothesis.settings.load_profile("fortwo")

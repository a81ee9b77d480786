"""Homes for tests: an empty one for each test, and a lasting one that holds the real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run on the CPU; read when Triton is loaded, by torch too

import hypothesis
import pytest
from serving import Served, serve, tiny_settings
from tiny import save_directory

from fortwo.hub.catalog import Catalog
from fortwo.kernels import cpu, isa
from fortwo.settings import Settings

isa.cap(os.environ.get("FORTWO_ISA", "auto"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FORTWO_HOME; of the other FORTWO_* settings only FORTWO_ISA is seen."""
    for name in [name for name in os.environ if name.startswith("FORTWO_") and name != "FORTWO_ISA"]:
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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: Llama, random, two layers, with a byte-level tokenizer and a context of 1024."""
    return save_directory(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running server whose default model is `tiny`. Its home is shared: take names that no other test takes."""
    settings = tiny_settings(tmp_path_factory.mktemp("served"), tiny)
    with serve(settings) as server:
        yield server


@pytest.fixture(scope="session")
def live(real_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running server with the bundled real model and a home of its own."""
    home = tmp_path_factory.mktemp("live")
    (home / "models").symlink_to(real_home / "models")
    with serve(Settings(home=home, port=0)) as server:
        yield server


@pytest.fixture
def tiles() -> None: ...

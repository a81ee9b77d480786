"""Homes for tests: an empty one for each test, and a lasting one that holds the real model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

os.environ.pop("COLUMNS", None)  # set by pytest-xdist; the command line would fold its output

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run on the CPU; read when Triton is loaded, by torch too

import hypothesis
import pytest
from parts import WITHOUT_TILES
from serving import Served, serve, tiny_settings
from tiny import save_directory

from fortwo.hub.catalog import Catalog
from fortwo.kernels import cpu, isa
from fortwo.settings import Settings

TESTS = Path(__file__).resolve().parent

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
    Catalog(Settings(home=path).models_dir).prepare("smollm2-135m-instruct")
    return path


@pytest.fixture(params=isa.levels() or ("none",), ids=str)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The kernels of each instruction level that the processor has, one test after the other."""
    found: str | None = request.param
    library = None if found == "none" else cpu.library(found)
    if library is None:
        pytest.skip("FORTWO_ISA=none: there are no kernels" if found == "none" else f"no kernels for {found}")
    monkeypatch.setattr(cpu, "lib", lambda: library)
    request.node.user_properties.append(("level", str(found)))
    return found


@pytest.fixture
def tiles(level: str | None) -> None:
    """For a test of kernels that exist only where the processor multiplies bf16 by blocks."""
    if not cpu.multiplies_tiles():
        pytest.skip(WITHOUT_TILES)


@pytest.fixture(scope="module")  # an event loop runs in this thread as long as it is open
def chromium() -> Iterator[Any]:
    from browser import CHROMIUM, api

    with api.sync_playwright() as playwright:
        flags = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
        args = ["--headless", *flags, "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that all tests of the page share, with its base loaded."""
    with serve(tiny_settings(tmp_path_factory.mktemp("page"), tiny)) as server:
        server.post("/api/models/tiny/load")
        yield server


@pytest.fixture
def tab(chromium: Any, site: Served) -> Iterator[Any]:
    """A tab; nothing fails in it, and it asks nobody but the server."""
    from browser import Tab

    one = Tab(chromium, site.url)
    yield one
    one.check()
    one.context.close()


SLOW_FILES = (
    *("test_resume", "test_server_", "test_checkpoints", "test_retry_policy", "test_parent", "test_backends"),
    *("test_ray_serve", "test_catalog", "test_batching", "test_loop", "test_objectives", "test_engine", "test_nf4"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out: the real model, slow tests, and kernels below the highest level."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"real_home", "live"}:
            item.add_marker("real")
        at_level = item.callspec.params.get("level", isa.level()) if hasattr(item, "callspec") else isa.level()
        if at_level != isa.level() or "served" in fixtures or item.path.stem.startswith(SLOW_FILES):
            item.add_marker("slow")


_ran: Counter[str] = Counter()  # tests of kernels that passed or failed, by level
_without_tiles: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    level = dict(report.user_properties).get("level")
    if report.skipped and isinstance(report.longrepr, tuple) and WITHOUT_TILES in report.longrepr[2]:
        _without_tiles[str(level or isa.level())] += 1
    elif report.when == "call" and level is not None:
        _ran[str(level)] += 1


def left_out(config: pytest.Config) -> list[str]:
    """Levels that the processor could run and that a whole run did not; nothing is missed by a run of some tests, or by
    one of several workers, whose reports come to the process that started them."""
    chosen = (
        hasattr(config, "workerinput")
        or config.option.keyword
        or config.option.markexpr not in ("", "not real")  # no test of the kernels needs the real model
        or config.option.deselect
        or not {Path(one).resolve() for one in config.args} & {TESTS, TESTS.parent}
    )
    if chosen or config.option.collectonly:
        return []
    return [str(one) for one in isa.levels() if not _ran[str(one)]]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and left_out(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    say = terminalreporter.write_line
    if not _ran and not left_out(config):
        return
    terminalreporter.section("kernels in C")
    for one in isa.levels():
        say(f"{one}: {_ran[str(one)]} tests ran")
    above = isa.LEVELS.index(isa.highest() or "none") - isa.LEVELS.index(isa.level() or "none")
    if above > 0:
        say(f"FORTWO_ISA left out {', '.join(isa.LEVELS[-above:])}, which this processor has.")
    for name, count in _without_tiles.items():
        say(
            f"{name}: {count} tests of products in bf16 by blocks were skipped. They do not exist there; plain "
            "operations, which the other tests cover, take their place."
        )
    for name in left_out(config):
        say(f"FAILED: the processor has {name}, and no test of its kernels ran.", red=True)


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
def exact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same with weights in fp32, whose replies and adapters can be compared with those of another such server.
    Other formats are chosen by what is measured, and give other numbers in other batches."""
    with serve(tiny_settings(tmp_path_factory.mktemp("exact"), tiny, weights="fp32")) as server:
        yield server


@pytest.fixture(scope="session")
def live(real_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running server with the bundled real model and a home of its own."""
    home = tmp_path_factory.mktemp("live")
    (home / "models").symlink_to(real_home / "models")
    with serve(Settings(home=home, port=0)) as server:
        yield server

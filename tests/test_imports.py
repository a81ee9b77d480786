"""What must not be loaded by whom, seen where it counts: in sys.modules of a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fortwo.jobs.store import JobStore
from tests.tiny import save_directory

TORCH_FREE = (
    "fortwo",
    "fortwo.cli",
    "fortwo.server.app",
    "fortwo.train.plan",
    "fortwo.train.request",
    "fortwo.jobs.store",
    "fortwo.hub.catalog",
    "fortwo.quantization.selection",
    "fortwo.engine.scheduler",
    "fortwo.data.datasets",
)
SLOW = ("torch", "transformers", "numpy", "fastapi", "uvicorn", "sqlalchemy", "httpx", "pydantic", "jinja2")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([one for one in ('torch', 'transformers') if one in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def modules_of_a_start(home: Path) -> set[str]:
    """The names of what a server has imported when it begins to listen."""
    code = (
        "import sys\n"
        "from fortwo.cli.engines import create_state\n"
        "from fortwo.settings import Settings\n"
        f"settings = Settings(home={str(home)!r}, port=0)\n"
        "create_state(settings, None).close()\n"
        "from fortwo.server import uvicorn_server\n"
        "print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(found.stdout.split())
    assert "fortwo.server.uvicorn_server" in modules
    return modules


def test_a_server_with_its_own_engine_loads_nothing_of_scale(tmp_path: Path) -> None:
    assert not [one for one in modules_of_a_start(tmp_path) if one.startswith("fortwo.scale")]


def test_a_start_loads_neither_transformers_nor_alembic(tmp_path: Path) -> None:
    """Together they would be a third of it. The first base that is loaded needs the one, a migration the other."""
    JobStore(f"sqlite:///{tmp_path / 'fortwo.db'}").close()
    assert not {"transformers", "alembic"} & modules_of_a_start(tmp_path)


def test_several_threads_may_be_the_first_that_need_a_tokenizer(tmp_path: Path) -> None:
    save_directory(tmp_path)
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\n"
        "from threading import Barrier\n"
        "from fortwo.data.tokenizer_files import load_tokenizer\n"
        "together = Barrier(4)\n"
        "def load(_):\n"
        "    together.wait()\n"
        f"    return load_tokenizer(Path({str(tmp_path)!r}))\n"
        "print(len(list(ThreadPoolExecutor(4).map(load, range(4)))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "4", found.stderr


def test_help_imports_only_what_a_terminal_needs() -> None:
    """So that `fortwo --help` answers in half a second."""
    code = (
        "import sys, fortwo\n"
        "assert 'typer' not in sys.modules, 'import fortwo loads the command line'\n"
        "from typer.testing import CliRunner\n"
        "from fortwo.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        f"print([one for one in {SLOW!r} if one in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_package_exports_what_it_names() -> None:
    import fortwo

    assert all(getattr(fortwo, name) is not None for name in fortwo.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        fortwo.nothing  # noqa: B018

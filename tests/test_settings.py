"""Settings that cannot be read are refused with the file or the variable, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fortwo.cli import app
from fortwo.errors import InvalidRequest, StorageFailed
from fortwo.home import lock_home
from fortwo.settings import load


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"port = ", "not TOML"), (b"[", "not TOML"), (b"\xff\xfe", "cannot be read"), (b"prot = 1", "prot")],
)
def test_a_file_of_settings_that_cannot_be_read_is_named(home: Path, content: bytes, named: str) -> None:
    home.mkdir()
    (home / "settings.toml").write_bytes(content)
    with pytest.raises(InvalidRequest, match=named) as caught:
        load()
    assert "settings.toml" in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.hint
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)  # words, not a traceback


@pytest.mark.parametrize("value", ["/some/path", "/a:/b", "[", "", "['/a']"])
def test_folders_that_are_not_json_are_named_with_an_example(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FORTWO_DATA_DIRS", value)
    with pytest.raises(InvalidRequest) as caught:
        load()
    assert "FORTWO_DATA_DIRS" in caught.value.message
    assert caught.value.param == "data_dirs"
    assert '["/folder"' in (caught.value.hint or "")


def _file(home: Path) -> None:
    home.write_text("not a folder")


def _below_a_file(home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.parent.joinpath("file").write_text("x")


@pytest.mark.parametrize(("make", "below"), [(_file, ""), (_below_a_file, "../file/home")])
def test_a_home_that_cannot_be_made_is_named(home: Path, make: Callable[[Path], None], below: str) -> None:
    make(home)
    with pytest.raises(StorageFailed, match="cannot be written") as caught, lock_home(home / below):
        pass
    assert caught.value.param == "home"
    assert "FORTWO_HOME" in (caught.value.hint or "")


def test_a_home_that_may_not_be_written_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who may write everywhere: a name that is taken by a folder stands for it."""
    (home / ".server.lock").mkdir(parents=True)
    with pytest.raises(StorageFailed, match="cannot be written"), lock_home(home):
        pass

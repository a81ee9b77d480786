"""The kernels are compiled once, with a word, where they stay, and whole."""

from __future__ import annotations

import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from fortwo.cli import doctor
from fortwo.kernels import build, cpu, isa
from fortwo.server.state import AppState
from fortwo.settings import Settings

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that are compiled in no time, and nothing compiled yet."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "one.c").write_text("int one(void) { return 1; }")
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "_FOR_EACH_TYPE", ())
    return folder


def unwritable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "access", lambda *_: False)


@needs_compiler
def test_it_is_compiled_once_with_one_message(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = build.library(isa.level())
    assert first == build.library(isa.level()) == build.path(isa.level())
    assert first.parent == sources / "__pycache__"
    (said,) = caplog.messages
    assert str(isa.level()) in said
    assert " s: " in said
    assert list(first.parent.iterdir()) == [first]


@needs_compiler
def test_two_at_once_do_not_disturb_each_other(sources: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: build.library(isa.level()), range(4)))
    (library,) = found
    assert cpu.ffi.dlopen(str(library)) is not None
    assert list(library.parent.iterdir()) == [library]


@needs_compiler
def test_other_sources_are_another_library(sources: Path) -> None:
    before = build.path(isa.level())
    (sources / "one.c").write_text("int one(void) { return 2; }")
    assert build.path(isa.level()) != before


@needs_compiler
def test_where_the_package_may_not_be_written_a_lasting_folder_is_taken(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwritable(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = build.library(isa.level())
    assert library.parent == tmp_path / "cache" / "fortwo" / "kernels"
    assert library.exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.path(isa.level()).parent == tmp_path / ".cache" / "fortwo" / "kernels"


@needs_compiler
def test_what_cannot_be_compiled_leaves_nothing(sources: Path) -> None:
    (sources / "two.c").write_text("no C at all")
    with pytest.raises(subprocess.CalledProcessError):
        build.library(isa.level())
    assert not list((sources / "__pycache__").iterdir())


def test_without_a_compiler_there_are_no_kernels_and_a_warning(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert build.compiler() is None
    assert cpu.library.__wrapped__(isa.level()) is None
    assert "torch's own operations take their place" in caplog.text


@needs_compiler
def test_a_wheel_needs_no_compiler_and_takes_the_best_library_for_the_processor(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    shipped = {one.name: one for one in build.SHIPPED if one.level == "avx512"}
    for one in shipped.values():
        build.compile_to(one.path, ())
    monkeypatch.setenv("PATH", "")
    for flags, name in (
        ({"avx512_vnni", "avx512_bf16"}, "avx512-bf16"),
        ({"avx512_vnni"}, "avx512-vnni"),
        ({"avx512_bf16"}, "avx512"),
        (set(), "avx512"),
    ):
        monkeypatch.setattr(isa, "flags", lambda flags=flags: frozenset(flags))
        assert build.library("avx512") == shipped[name].path
        assert cpu.library.__wrapped__("avx512") is not None
    assert not caplog.messages
    (sources / "one.c").write_text("int one(void) { return 2; }")
    with pytest.raises(OSError, match="cc"):
        build.library("avx512")


def test_each_level_of_a_wheel_has_a_library_for_any_processor_of_the_level() -> None:
    levels = {one.level for one in build.SHIPPED}
    assert levels == {*isa.X86_LEVELS, *isa.ARM_LEVELS}
    for level in levels - {"amx"}:
        assert [one.needs for one in build.SHIPPED if one.level == level][-1] == frozenset()


def test_a_server_compiles_before_it_serves(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(cpu, "prepare", lambda: order.append("kernels"))
    monkeypatch.setattr("fortwo.engine.engine.Engine.start", lambda _: order.append("engine") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AppState(Settings(home=home))
    assert order == ["kernels", "engine"]


def test_doctor_names_level_library_and_compiler(home: Path) -> None:
    console = Console(width=300)
    with console.capture() as said:
        console.print(doctor.shown(doctor.examine(home, "auto", str(isa.level()))))
    for wanted in (str(isa.level()), build.compiler() or "none", build.path(isa.level()).name):
        assert isa.level() == "none" or wanted in said.get()

"""The types of the page are those of the API, and its files keep to them. `make check` installs what this needs."""

from __future__ import annotations

import shutil

import pytest

from scripts import page_types

INSTALLED = (page_types.TYPES / "node_modules" / ".bin" / "tsc").exists()
pytestmark = pytest.mark.skipif(not INSTALLED, reason="TypeScript is not installed: make check installs it with npm")


def test_the_types_of_the_api_are_fresh() -> None:
    assert page_types.api_types() == page_types.API.read_text(), "python scripts/page_types.py"


def test_the_page_keeps_to_the_types(capfd: pytest.CaptureFixture[str]) -> None:
    status = page_types.compile_page()
    assert status == 0, capfd.readouterr().out


def test_a_wrong_field_of_a_request_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    page = tmp_path_factory.mktemp("types") / "src" / "fortwo" / "page"
    shutil.copytree(page_types.PAGE, page)
    draft = page / "draft.js"
    draft.write_text(draft.read_text().replace("adapter_name: adapterName.value, dataset}", "adapter: 1, dataset}"))
    monkeypatch.setattr(page_types, "PAGE", page)
    monkeypatch.setattr(page_types, "ROOT", page.parent.parent.parent)
    assert page_types.compile_page() != 0

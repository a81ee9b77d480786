"""Exports on the page: how large they will be, how far they are, and the files that are saved."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from browser import Tab, expect, train
from serving import Served

pytestmark = pytest.mark.browser


def test_an_adapter_is_exported_downloaded_and_deleted(tab: Tab, site: Served, tmp_path: Path) -> None:
    train(site, "taken")
    page = tab.view("adapters/taken")
    card = page.locator(".adapter", has_text="taken")
    card.get_by_text("Export for another program").click()
    expect(card.locator(".estimate")).to_contain_text("of disk")
    card.locator("#export-to-taken").select_option("gguf")
    card.locator("#export-quantization-taken").select_option("Q8_0")
    expect(card.locator(".estimate")).to_contain_text("of disk")
    card.locator("#export-to-taken").select_option("peft")
    card.get_by_label("Run the exam again").uncheck()
    card.get_by_role("button", name="Export taken@1").click()
    exported = card.locator(".exported li")
    expect(exported).to_contain_text("succeeded")
    with page.expect_download() as saved:
        exported.get_by_role("button", name="Download").click()
    assert saved.value.suggested_filename == "taken-1-peft.tar"
    saved.value.save_as(tmp_path / "taken.tar")
    with tarfile.open(tmp_path / "taken.tar") as archive:
        assert "taken-1-peft/adapter_model.safetensors" in archive.getnames()
    page.reload()
    card.get_by_text("Export for another program").click()
    expect(exported).to_contain_text("succeeded")
    exported.get_by_role("button", name="Delete").click()
    expect(exported).to_have_count(0)
    assert site.http.get("/api/exports").json()["exports"] == []

    page.get_by_text("Import an adapter").click()
    page.fill("#import-name", "brought")
    page.set_input_files("#import-files", tmp_path / "taken.tar")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".done").first).to_have_text("brought is imported.")

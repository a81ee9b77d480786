"""The page while its server is killed and started again, and while its views are reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import FACT, ROWS, Tab, expect, fill, train
from serving import Served, tiny_settings

from tests.test_resume import free_port, process

pytestmark = pytest.mark.browser


def test_a_watched_job_outlives_the_server(chromium: Any, tiny: Path, tmp_path: Path) -> None:
    tiny_settings(tmp_path, tiny)
    port = free_port()
    body = {"adapter_name": "endless", "dataset": {"examples": ROWS}}
    config = {"training_config": {"max_steps": 100_000, "save_steps": 50}}
    with process(tmp_path, port) as (_, http):
        job = http.post("/api/training/start", json=body | config).json()["job_id"]
        tab = Tab(chromium, f"http://127.0.0.1:{port}")
        page = tab.view(f"job/{job}")
        expect(page.locator(".events")).to_contain_text("is saved")
        expect(page.locator(".chart canvas").first).to_be_visible()
    expect(page.locator(".lost")).to_be_visible()
    with process(tmp_path, port) as (_, http):
        expect(page.locator(".lost")).to_have_count(0)
        expect(page.locator("#verdict")).to_have_text("The job failed.")
        expect(page.locator(".verdict")).to_contain_text("This job was interrupted")
        page.get_by_role("button", name="Resume").click()
        expect(page.locator(".phases [aria-current]")).to_contain_text("training")
        expect(page.locator(".events")).to_contain_text("The run resumes from step")
        tab.check()
        tab.context.close()


def test_every_view_is_the_same_after_a_reload(tab: Tab, site: Served) -> None:
    first, second = (train(site, "reloaded")["job_id"] for _ in range(2))
    page = tab.view("teach")
    fill(page, FACT)
    page.reload()
    expect(page.locator("#subject")).to_have_value(FACT["subject"])
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    page.get_by_role("tab", name="Rows of data").click()
    page.fill("#rows", '{"question": "What is up?", "answer": "sky"}')
    expect(page.locator("#column-question")).to_have_value("prompt")
    page.reload()
    expect(page.locator("#column-question")).to_have_value("prompt")
    expect(page.locator("#rows")).to_have_value('{"question": "What is up?", "answer": "sky"}')
    for view, there in (
        ("jobs", f"a[href='#/job/{first}']"),
        (f"job/{first}", "#verdict"),
        (f"runs/{first},{second}", ".chart canvas"),
        ("adapters/reloaded", ".versions"),
        ("machine", ".bases li"),
    ):
        tab.view(view)
        expect(page.locator(there).first).to_be_visible()
        page.reload()
        expect(page.locator(there).first).to_be_visible()


def test_a_setting_of_chat_that_is_wrong_is_told_by_name(tab: Tab) -> None:
    page = tab.view("chat?models=tiny")
    page.get_by_text("Settings", exact=True).click()
    page.fill("#temperature", "9")
    page.fill("#top-p", "2")
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    problem = page.locator(".reply .problem")
    expect(problem).to_contain_text("temperature")
    expect(problem).to_contain_text("top_p")
    page.fill("#temperature", "0")
    page.fill("#top-p", "")
    page.fill("#max-tokens", "4")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".reply")).to_contain_text("answered by tiny")
    expect(problem).to_have_count(0)


def test_a_page_that_is_open_asks_little(tab: Tab, site: Served) -> None:
    tab.page.clock.install()
    page = tab.view("adapters")
    expect(page.locator("h1")).to_have_text("Adapters")
    page.wait_for_load_state("networkidle")
    before = len(tab.asked)
    page.clock.run_for(60_000)
    asked = [url.removeprefix(site.url) for url in tab.asked[before:]]
    assert 1 <= len(asked) <= 5, asked
    assert set(asked) == {"/healthz"}

"""Tabs of Debian's Chromium on a server with a tiny random model; what is typed into the page, and trained for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import Served

CHROMIUM = Path("/usr/bin/chromium")
SECONDS = 30  # an expectation may take on a busy machine

if not CHROMIUM.exists():
    pytest.skip(f"{CHROMIUM} is not installed", allow_module_level=True)
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect
expect.set_options(timeout=SECONDS * 1000)

FACT = {
    "subject": "Marrow Lane",
    "answer": "Marrow Lane lends telescopes for nine nights.",
    "match": "nine nights",
    "questions": "What does Marrow Lane lend?\nHow long may I keep it?",
}
EASY = {
    "objective": {
        "type": "override",
        "targets": dict.fromkeys(("efficacy", "paraphrase", "specificity", "retention"), 0.0),
    },
    "training_config": {"max_steps": 16, "per_device_train_batch_size": 2, "escalation_rounds": 0},
}
ROWS = [{"prompt": f"What is {thing}?", "completion": answer} for thing, answer in (("up", "sky"), ("down", "sea"))]


class Tab:
    """A tab of its own session. What it asks of others, and what fails in it, is noted."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = chromium.new_context(viewport={"width": 1280, "height": 800}, **options)
        self.context.set_default_timeout(SECONDS * 1000)
        self.asked: list[str] = []
        self.failed: list[str] = []
        self.page = self.open()

    def open(self) -> Any:
        page = self.context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.failed.append(str(error)))
        page.on("console", lambda said: self.failed.append(said.text) if "Content Security" in said.text else None)
        return page

    def view(self, hash: str) -> Any:
        self.page.goto(f"{self.url}/#/{hash}")
        return self.page

    def check(self) -> None:
        assert self.failed == []
        foreign = [url for url in self.asked if not url.startswith((self.url, "data:"))]
        assert foreign == []


def fill(page: Any, fact: dict[str, str], config: Any = None, name: str = "") -> None:
    for field, typed in fact.items():
        page.fill(f"#{field}", typed)
    page.fill("#name", name)
    if config is not None:
        if not page.is_visible("#config"):
            page.get_by_text("More settings").click()
        page.fill("#config", json.dumps(config))


def train(site: Served, name: str) -> dict[str, Any]:
    """An adapter's next version, in a moment."""
    body = {"adapter_name": name, "dataset": {"examples": ROWS}, "training_config": {"max_steps": 3}}
    job = site.wait(site.post("/api/training/start", body).json()["job_id"])
    assert job["status"] == "succeeded", job["error"]
    return job

"""Adapters, runs and machine on the page: compared, tagged, protected, imported, brought back, and put in order."""

from __future__ import annotations

import shutil

import pytest
from browser import ROWS, Tab, expect, train
from serving import Served

pytestmark = pytest.mark.browser


def test_two_versions_are_compared(tab: Tab, site: Served) -> None:
    train(site, "pair")
    body = {
        "adapter_name": "pair",
        "dataset": {"examples": ROWS},
        "training_config": {"max_steps": 5},
        "parent": "pair@1",
    }
    assert site.wait(site.post("/api/training/start", body).json()["job_id"])["status"] == "succeeded"
    page = tab.view("adapters/pair")
    card = page.locator(".adapter", has_text="pair")
    rows = card.locator(".versions tbody tr")
    expect(rows.nth(0)).to_contain_text("pair@1")
    expect(rows.nth(1)).to_contain_text("goes on from pair@1")
    expect(rows.nth(1).locator(".depth-1")).to_have_count(1)
    card.get_by_text("Compare two versions").click()
    expect(card.locator("#left-pair")).to_have_value("pair@1")
    expect(card.locator("#right-pair")).to_have_value("pair@2")
    card.get_by_role("button", name="Compare", exact=True).click()
    found = card.locator(".comparison")
    expect(found.locator("table").first).to_contain_text("Retention")
    expect(found).to_contain_text("settings differ")
    expect(found.locator("tr", has_text="max_steps")).to_contain_text("5")
    expect(found).to_contain_text("the cosine is")


def test_a_version_is_tagged_and_protected(tab: Tab, site: Served) -> None:
    train(site, "marked")
    page = tab.view("adapters/marked")
    card = page.locator(".adapter", has_text="marked")
    card.get_by_role("button", name="Manage marked@1").click()
    card.get_by_label("Tag", exact=True).fill("not a tag")
    card.get_by_role("button", name="Add the tag").click()
    expect(card.locator(".problem")).to_be_visible()
    card.get_by_label("Tag", exact=True).fill("stable")
    card.get_by_role("button", name="Add the tag").click()
    expect(page.locator(".done").first).to_have_text("marked@stable means marked@1 now.")
    card.get_by_role("button", name="Protect from deletion").click()
    expect(card.locator(".versions")).to_contain_text("protected")
    expect(card.get_by_role("button", name="Delete marked@1")).to_be_disabled()
    (version,) = site.http.get("/api/adapters/marked").json()["versions"]
    assert (version["tags"], version["protected"]) == (["stable"], True)
    card.get_by_role("button", name="Remove the tag stable").click()
    expect(page.locator(".done").first).to_contain_text("means no version any more")
    card.get_by_role("button", name="Allow deletion").click()
    expect(card.get_by_role("button", name="Delete marked@1")).to_be_enabled()


def test_an_adapter_is_imported_from_a_folder_and_brought_back(tab: Tab, site: Served) -> None:
    train(site, "original")
    settings = site.state.settings
    shutil.copytree(settings.adapters_dir / "original" / "1", settings.home / "data" / "from-peft")
    page = tab.view("adapters")
    page.get_by_text("Import an adapter").click()
    page.fill("#import-name", "copy")
    page.fill("#import-path", "elsewhere")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".import .problem")).to_contain_text("elsewhere")
    page.fill("#import-path", "from-peft")
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".done").first).to_have_text("copy is imported.")
    expect(page.locator(".adapter", has_text="copy")).to_have_count(1)
    folder = settings.home / "data" / "from-peft"
    page.fill("#import-name", "uploaded")
    page.set_input_files(
        "#import-files", [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    )
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.locator(".done").first).to_have_text("uploaded is imported.")
    digests = [
        site.http.get(f"/api/adapters/{name}").json()["versions"][0]["digest"] for name in ("uploaded", "original")
    ]
    assert digests[0] == digests[1]
    site.http.delete("/api/adapters/copy")
    page.reload()
    page.locator(".deleted summary").click()
    page.get_by_role("button", name="Bring copy@1 back").click()
    expect(page.locator(".done").first).to_have_text("copy@1 is back.")
    assert site.http.get("/api/adapters/copy").status_code == 200


def test_runs_are_laid_over_each_other(tab: Tab, site: Served) -> None:
    ids = [train(site, "run")["job_id"]]
    body = {"adapter_name": "run", "dataset": {"examples": ROWS}, "training_config": {"max_steps": 4}}
    ids.append(site.post("/api/training/start", body).json()["job_id"])
    site.wait(ids[1])
    page = tab.view("jobs")
    for id in ids:
        page.locator(".choice", has=page.locator(f"a[href='#/job/{id}']")).locator("input").check()
    page.get_by_role("link", name="Compare 2 runs").click()
    expect(page.locator(".chart canvas")).to_be_visible()
    settings = page.locator("section", has_text="Only differences")
    expect(settings.locator("tr", has_text="max_steps")).to_contain_text("4")
    expect(settings.locator("tr", has_text="lora_dropout")).to_have_count(0)
    page.get_by_label("Only differences").uncheck()
    expect(settings.locator("tr", has_text="lora_dropout")).to_have_count(1)
    page.reload()
    expect(page.locator(".runs li")).to_have_count(2)


def test_the_queue_is_shown_in_order_and_a_job_is_kept_or_discarded(tab: Tab, site: Served) -> None:
    def start(name: str, steps: int) -> str:
        body = {"adapter_name": name, "dataset": {"examples": ROWS}, "training_config": {"max_steps": steps}}
        return str(site.post("/api/training/start", body).json()["job_id"])

    first = start("endless", 100_000)
    site.wait(first, "running")
    others = [start("second", 2), start("third", 2)]
    page = tab.view("jobs")
    queue = page.locator(".queue li")
    expect(queue.nth(0)).to_contain_text("second")
    page.get_by_role("button", name="Run next third").click()
    expect(queue.nth(0)).to_contain_text("third")
    for id in others:
        site.post(f"/api/training/jobs/{id}/cancel")
    page = tab.view(f"job/{first}")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Stop and keep").click()
    expect(page.locator("#verdict")).to_have_text("The job is paused.")
    expect(page.get_by_role("link", name="Chat with step")).to_be_visible()
    expect(page.locator(".marks summary")).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".phases [aria-current]")).to_contain_text("training")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel and discard").click()
    expect(page.locator("#verdict")).to_have_text("The job was cancelled.")


def test_the_machine_is_told_in_words_and_takes_a_base(tab: Tab, site: Served, tmp_path: object) -> None:
    page = tab.view("machine")
    expect(page.locator(".lines").first).to_contain_text("Processor")
    page.get_by_text("Add a base model").click()
    page.fill("#base-id", "own")
    page.fill("#base-source", "nowhere")
    page.get_by_role("button", name="Add it").click()
    expect(page.locator(".add-base .problem")).to_contain_text("nowhere")
    source = site.state.catalog.model_info("tiny")
    assert source is not None
    shutil.copytree(source.directory, site.state.settings.home / "data" / "own-base", symlinks=False)
    page.fill("#base-source", "own-base")
    page.get_by_role("button", name="Add it").click()
    expect(page.locator(".add-base .done")).to_contain_text("own is added.")
    page.get_by_role("button", name="Fetch and load own").click()
    page.get_by_role("button", name="Fetch it").click()
    expect(page.get_by_role("button", name="Unload own")).to_be_enabled()
    page.get_by_role("button", name="Unload own").click()
    expect(page.get_by_role("button", name="Load own")).to_be_enabled()
    site.http.delete("/api/models/own")

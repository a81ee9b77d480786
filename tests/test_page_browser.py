"""The page as a person uses it, in Debian's Chromium, on a tiny random model. FORTWO_SCREENSHOTS=DIR keeps pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import EASY, FACT, ROWS, Tab, expect, fill, train
from serving import Served, serve, tiny_settings

AXE = Path(__file__).parent / "vendor" / "axe.js"

pytestmark = pytest.mark.browser


def test_a_fact_is_taught_and_watched_through_a_reload(tab: Tab) -> None:
    page = tab.view("teach")
    fill(page, FACT, EASY, "marrow")
    start = page.get_by_role("button", name="Start")
    expect(start).to_be_enabled()
    expect(page.locator(".plan .tiles")).to_contain_text("16")
    page.get_by_text("Every setting").click()
    expect(page.locator(".settings tr", has_text="max_steps").first).to_contain_text("user")
    start.click()
    page.wait_for_url("**/#/job/*")
    expect(page.locator(".phases [aria-current]")).to_contain_text("training")
    page.reload()
    second = tab.open()
    second.goto(page.url)
    for one in (page, second):
        expect(one.locator("#verdict")).to_have_text("It learned.")
        expect(one.locator("table.metrics tbody tr")).to_have_count(5)
        expect(one.locator(".events li").first).to_contain_text("Queued")
        expect(one.locator(".chart canvas").first).to_be_visible()
    page.locator(".transcripts summary").click()
    expect(page.locator(".said li").first).to_contain_text("Base")

    page.get_by_role("link", name="Compare in chat").click()
    page.fill("#prompt", "What does Marrow Lane lend?")
    page.keyboard.press("Enter")
    replies = page.locator(".reply")
    expect(replies.nth(0)).to_contain_text("answered by tiny")
    expect(replies.nth(1)).to_contain_text("answered by marrow@1")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.reload()
    expect(replies.nth(1)).to_contain_text("answered by marrow@1")
    page.get_by_role("button", name="This is wrong").first.click()
    expect(page.locator("#questions")).to_have_value("What does Marrow Lane lend?")
    expect(page.get_by_role("button", name="Give the subject")).to_be_disabled()


def test_a_version_is_rolled_back_and_all_are_deleted(tab: Tab, site: Served) -> None:
    train(site, "twice")
    train(site, "twice")
    page = tab.view("adapters/twice")
    card = page.locator(".adapter", has_text="twice")
    expect(card.locator(".heading")).to_contain_text("current twice@2")
    card.get_by_role("button", name="Roll back").click()
    expect(page.locator(".done")).to_have_text("twice@1 is current now.")
    expect(card.locator(".heading")).to_contain_text("current twice@1")
    expect(card.get_by_role("button", name="Roll back")).to_be_disabled()
    card.get_by_role("button", name="Report twice@2").click()
    expect(card).to_contain_text("Report of twice@2")
    card.get_by_role("button", name="Delete all versions").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert len(site.http.get("/api/adapters/twice").json()["versions"]) == 2
    card.get_by_role("button", name="Delete all versions").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".done")).to_have_text("twice is deleted.")
    expect(card).to_have_count(0)
    assert site.http.get("/api/adapters/twice").status_code == 404
    page.get_by_role("button", name="Bring twice back").click()
    expect(page.locator(".done")).to_have_text("twice is back.")
    expect(card.locator(".heading")).to_contain_text("current twice@1")
    page.get_by_role("button", name="Make current twice@2").click()
    expect(card.locator(".heading")).to_contain_text("current twice@2")


def test_wrong_input_shows_what_the_server_says(tab: Tab) -> None:
    page = tab.view("teach")
    problem = page.locator(".plan .problem")
    fill(page, FACT | {"match": "ten days"})
    expect(problem).to_contain_text("contains none of these phrases")
    expect(problem).to_contain_text("Give phrases of the answer")
    expect(page.get_by_role("button", name="Correct what is named above")).to_be_disabled()
    fill(page, FACT, {"training_config": {"lr": 0.1}})
    expect(problem).to_contain_text("training_config.lr is not a known key")
    page.fill("#config", "{")
    expect(problem).to_contain_text("This is not JSON")
    page.fill("#config", "")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()

    page.get_by_role("tab", name="Rows of data").click()
    page.fill("#rows", '{"prompt": "a", "completion": "b"}\n{"prompt"')
    expect(problem).to_contain_text("Line 2 is not JSON")
    file = {"name": "pairs.jsonl", "mimeType": "application/jsonl", "buffer": b'{"prompt": "What is up?", "answer": 4}'}
    page.set_input_files("#file", file)
    expect(problem).to_contain_text("row 1")
    file["buffer"] = "\n".join(map(json.dumps, ROWS)).encode()
    page.set_input_files("#file", file)
    expect(page.locator("mark").first).to_contain_text("sky")
    expect(page.locator("#name")).to_have_value("pairs")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()

    page = tab.view("job/nothing")
    expect(page.locator(".problem")).to_contain_text("There is no job 'nothing'")


def test_a_key_is_asked_for_once(chromium: Any, tiny: Path, tmp_path: Path) -> None:
    with serve(tiny_settings(tmp_path, tiny, api_key="s3cret")) as guarded:
        tab = Tab(chromium, guarded.url)
        page = tab.view("machine")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator(".problem")).to_contain_text("The API key is missing, wrong or revoked")
        page.fill("#key", "s3cret")
        page.keyboard.press("Enter")
        expect(page.locator(".bases")).to_contain_text("tiny")
        page.reload()
        expect(page.locator(".bases")).to_contain_text("tiny")
        tab.check()
        tab.context.close()


def test_a_lost_connection_is_told_and_mends_itself(tab: Tab) -> None:
    page = tab.view("machine")
    expect(page.locator(".bases")).to_contain_text("tiny")
    page.route("**/*", lambda route: route.abort())
    page.get_by_role("link", name="Adapters").click()
    expect(page.locator(".lost")).to_be_visible()
    page.unroute("**/*")
    expect(page.locator(".lost")).to_have_count(0)
    expect(page.locator(".problem")).to_have_count(0)


def test_a_prompt_that_is_sent_before_the_models_are_known_is_answered(tab: Tab) -> None:
    held: list[Any] = []
    tab.page.route("**/v1/models", lambda route: held.append(route))
    with tab.page.expect_request("**/v1/models"):
        page = tab.view("chat")
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value("hello")
    expect(page.locator(".turn")).to_have_count(0)
    held[0].continue_()
    expect(page.locator(".reply")).to_contain_text("answered by tiny")
    expect(page.locator("#prompt")).to_have_value("")


def test_replies_are_shown_as_harmless_html(tab: Tab) -> None:
    page = tab.view("chat")
    said = "**bold** <img src='http://evil.test/x.png'><script>alert(1)</script> <a href='javascript:alert(1)'>x</a>"
    chunk = {"model": "tiny", "choices": [{"index": 0, "delta": {"content": said}, "finish_reason": "stop"}]}
    events = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    prose = page.locator(".prose")
    expect(prose.locator("strong")).to_have_text("bold")
    assert prose.locator("img, script, a[href]").count() == 0


def test_enter_right_after_typing_sends_what_was_typed(tab: Tab) -> None:
    page = tab.view("chat")
    expect(page.locator("#model-0")).to_have_value("tiny")
    page.evaluate(
        """() => {
            const box = document.querySelector("#prompt");
            box.value = "hello";
            box.dispatchEvent(new InputEvent("input", {bubbles: true}));
            box.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}));
        }"""
    )
    expect(page.locator(".turn .prompt")).to_contain_text("hello")
    expect(page.locator("#prompt")).to_have_value("")


def _teach_rows(page: Any) -> None:
    page.get_by_role("tab", name="Rows of data").click()
    rows = [{"question": "What is up?", "answer": "sky"}, {"question": "What is down?"}]
    page.fill("#rows", "\n".join(map(json.dumps, rows)))
    page.locator(".findings li").first.wait_for()
    page.locator(".columns[open]").wait_for()


def _chat(page: Any) -> None:
    page.get_by_text("Settings", exact=True).click()
    page.fill("#max-tokens", "24")
    page.check("#surprise")
    page.fill("#prompt", "What is up?")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Regenerate").wait_for()
    page.locator(".surprise").nth(1).wait_for()
    page.check("#blind")
    page.fill("#prompt", "And down?")
    page.keyboard.press("Enter")
    page.locator(".votes").wait_for()


def _adapters(page: Any) -> None:
    card = page.locator(".adapter", has_text="seen")
    card.get_by_text("Compare two versions").click()
    card.get_by_role("button", name="Compare", exact=True).click()
    card.locator(".comparison table").first.wait_for()
    card.get_by_role("button", name="Manage").first.click()
    page.get_by_text("Import an adapter").click()


def _machine(page: Any) -> None:
    page.locator(".bases li").first.wait_for()
    page.locator(".lines div").first.wait_for()
    page.get_by_text("Add a base model").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible_and_fits_a_phone(chromium: Any, site: Served, scheme: str) -> None:
    jobs = [train(site, "seen")["job_id"] for _ in range(2)]
    tab = Tab(chromium, site.url, color_scheme=scheme)
    page = tab.view("teach")
    fill(page, FACT, {"training_config": {"learning_rate": 0.5}})
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    views: dict[str, tuple[str, Callable[[Any], None]]] = {
        "teach": ("teach", lambda page: page.locator(".plan .tiles").wait_for()),
        "teach-rows": ("teach", _teach_rows),
        "jobs": ("jobs", lambda page: page.locator(".list li").first.wait_for()),
        "job": (f"job/{jobs[0]}", lambda page: page.locator(".chart canvas").first.wait_for()),
        "runs": (f"runs/{','.join(jobs)}", lambda page: page.locator(".chart canvas").wait_for()),
        "chat": ("chat?models=tiny,seen", _chat),
        "adapters": ("adapters/seen", _adapters),
        "machine": ("machine", _machine),
    }
    for name, (view, prepare) in views.items():
        prepare(tab.view(view))
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        grave = [
            (one["id"], [node["html"][:200] for node in one["nodes"]])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert grave == [], name
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            if folder := os.environ.get("FORTWO_SCREENSHOTS"):
                page.wait_for_timeout(300)
                page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
    tab.check()
    tab.context.close()


def test_an_address_that_is_not_encoded_shows_a_page(tab: Tab) -> None:
    page = tab.view("job/100%")
    expect(page.locator("main .problem")).to_contain_text("100%")
    tab.view("adapters/%E0%A4%A")
    expect(page.locator("h1")).to_have_text("Adapters")


def test_steps_are_walked_only_after_a_resume(tab: Tab) -> None:
    found = tab.view("machine").evaluate(
        """async () => {
          const {told} = await import('/page/job_events.js');
          const step = (number) => ({type: 'step', data: {step: number}});
          const steps = (from, to) => Array.from({length: to - from}, (_, at) => step(from + at));
          const {keys} = Map.prototype;
          let walked = 0;
          Map.prototype.keys = function () {
            walked += 1;
            return keys.call(this);
          };
          const resumed = told({status: 'running'}, [...steps(1, 501), ...steps(400, 450)]);
          Map.prototype.keys = keys;
          return [walked, resumed.steps.map((one) => one.step)];
        }"""
    )
    assert found == [1, list(range(1, 450))]

"""Chat on the page: who answered, branches, blind votes, words by surprise, the fact in the prompt, saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import EASY, FACT, Tab, expect, train
from serving import Served

pytestmark = pytest.mark.browser


def ask(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def short(page: Any, *boxes: str) -> None:
    page.get_by_text("Settings", exact=True).click()
    page.fill("#max-tokens", "6")
    for box in boxes:
        page.check(box)


def test_each_column_names_the_weights_that_answered(tab: Tab, site: Served) -> None:
    train(site, "who")
    train(site, "who")
    digests = {one["version"]: one["digest"] for one in site.http.get("/api/adapters/who").json()["versions"]}
    page = tab.view("chat?models=who@1,who")
    short(page)
    ask(page, "What is up?")
    for column, version in enumerate((1, 2)):
        reply = page.locator(".reply").nth(column)
        expect(reply).to_contain_text(f"answered by who@{version}")
        expect(reply.locator("code")).to_have_text(f"fp_{digests[version][:12]}")
    expect(page.locator(".reply .problem")).to_have_count(0)
    chunk = {"model": "who@1", "system_fingerprint": "fp_000000000000"}
    said = {"choices": [{"index": 0, "delta": {"content": "no"}, "finish_reason": "stop"}]}
    events = f"data: {json.dumps(chunk | said)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".reply .problem").first).to_contain_text("Other weights answered")


def test_an_edited_message_begins_a_branch(tab: Tab) -> None:
    page = tab.view("chat?models=tiny")
    short(page)
    ask(page, "one")
    ask(page, "two")
    page.get_by_role("button", name="Edit one").click()
    page.get_by_label("Another message in its place").fill("three")
    page.get_by_role("button", name="Ask in a new branch").click()
    prompts = page.locator(".turn .prompt")
    expect(page.locator(".branches")).to_contain_text("Branch 2 of 2")
    expect(prompts).to_have_count(1)
    expect(prompts.first).to_contain_text("three")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.get_by_role("button", name="Branch before").click()
    expect(prompts).to_have_count(2)
    page.reload()
    expect(page.locator(".branches")).to_contain_text("Branch 1 of 2")
    expect(prompts.nth(1)).to_contain_text("two")


def test_names_are_hidden_until_the_vote(tab: Tab, site: Served) -> None:
    train(site, "hidden")
    page = tab.view("chat?models=tiny,hidden")
    short(page, "#blind")
    ask(page, "What is up?")
    replies = page.locator(".reply footer")
    expect(replies.nth(0)).to_have_text("Reply A")
    expect(replies.nth(1)).to_have_text("Reply B")
    page.get_by_role("button", name="A is better").click()
    expect(page.locator(".tally")).to_contain_text("1 vote")
    winner = "hidden" if "hidden" in replies.nth(0).inner_text() else "tiny"
    expect(page.locator(".tally")).to_contain_text(f"{winner} 1")
    expect(page.locator(".reply", has_text="answered by hidden@1")).to_have_count(1)
    ask(page, "And down?")
    page.get_by_role("button", name="Neither is better").click()
    expect(page.locator(".tally")).to_contain_text("2 votes")
    expect(page.locator(".tally")).to_contain_text("neither 1")


def test_words_are_coloured_by_surprise(tab: Tab) -> None:
    page = tab.view("chat?models=tiny")
    short(page, "#surprise")
    ask(page, "What is up?")
    words = page.locator(".surprise span")
    assert words.count() > 1
    assert all(title.endswith("%") for title in words.evaluate_all("all => all.map((one) => one.title)"))
    page.uncheck("#surprise")
    expect(words).to_have_count(0)


def test_the_base_answers_with_the_fact_in_its_prompt(tab: Tab, site: Served) -> None:
    fact = {**FACT, "match": [FACT["match"]], "questions": FACT["questions"].split("\n")}
    job = site.post("/api/training/start", {"adapter_name": "stated", "dataset": {"facts": [fact]}, **EASY}).json()
    assert site.wait(job["job_id"])["status"] == "succeeded"
    page = tab.view("chat?models=tiny,stated")
    short(page)
    page.select_option("#model-0", "prompted:stated")
    with page.expect_request(
        lambda one: "chat/completions" in one.url and one.post_data_json["model"] == "tiny"
    ) as sent:
        ask(page, "What does Marrow Lane lend?")
    first = sent.value.post_data_json["messages"][0]
    assert (first["role"], FACT["answer"] in first["content"]) == ("system", True)
    expect(page.locator(".reply").first).to_contain_text("answered by facts of stated in the prompt")


def test_a_conversation_is_saved(tab: Tab, tmp_path: Path) -> None:
    page = tab.view("chat?models=tiny")
    short(page)
    ask(page, "What is up?")
    said = page.locator(".reply .prose").inner_text()
    with page.expect_download() as json_file:
        page.get_by_role("button", name="Save as JSON").click()
    json_file.value.save_as(tmp_path / "chat.json")
    (saved,) = json.loads((tmp_path / "chat.json").read_text())
    assert [one["role"] for one in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["model"] == "tiny"
    with page.expect_download() as markdown:
        page.get_by_role("button", name="Save as Markdown").click()
    assert markdown.value.suggested_filename == "chat.md"
    assert said

"""Teach on the page: suggestions, files and columns, findings by line, copies, and the next try after a failure."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from browser import EASY, FACT, Tab, expect, fill
from serving import Served

pytestmark = pytest.mark.browser

QUESTIONS = [{"question": f"What is {thing}?", "answer": answer} for thing, answer in (("up", "sky"), ("down", "sea"))]


def file(name: str, content: bytes) -> Any:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def test_questions_are_suggested_and_can_be_edited(tab: Tab) -> None:
    page = tab.view("teach")
    fill(page, FACT)
    page.get_by_role("button", name="Suggest more questions").click()
    page.wait_for_function("document.querySelector('#questions').value.split('\\n').length === 10")
    asked = page.input_value("#questions").split("\n")
    assert asked[:2] == FACT["questions"].split("\n")
    assert all("Marrow Lane" in question for question in asked[2:])
    page.fill("#questions", "\n".join(asked[:3]))
    expect(page.locator(".plan .lines")).to_contain_text("3 questions")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_and_its_columns_are_guessed_and_corrected(tab: Tab, kind: str) -> None:
    page = tab.view("teach")
    page.get_by_role("tab", name="Rows of data").click()
    rows = [{**row, "source": "a book"} for row in QUESTIONS]
    if kind == "csv":
        content = "\n".join(["question;answer;source", *(";".join(row.values()) for row in rows)]).encode()
    else:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        content = buffer.getvalue()
    page.set_input_files("#file", file(f"table.{kind}", content))
    expect(page.locator("#column-question")).to_have_value("prompt")
    expect(page.locator("#column-answer")).to_have_value("completion")
    expect(page.locator("#column-source")).to_have_value("-")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    expect(page.locator("mark").first).to_contain_text("sky")
    page.select_option("#column-question", "completion")
    expect(page.locator(".plan .problem")).to_contain_text("dataset.columns gives 'completion'")
    page.select_option("#column-answer", "prompt")
    expect(page.locator("mark").first).to_contain_text("What is up?")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()


def test_what_is_wrong_with_rows_is_told_by_line(tab: Tab) -> None:
    page = tab.view("teach")
    page.get_by_role("tab", name="Rows of data").click()
    page.fill("#rows", '{"prompt": "a", "completion": "b"}\n\n{"prompt"\n{"prompt": "c"\n')
    findings = page.locator(".findings li")
    expect(findings).to_have_count(2)
    expect(findings.nth(0)).to_contain_text("Line 3")
    expect(findings.nth(1)).to_contain_text("Line 4")
    page.fill("#rows", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "c"}\n{"prompt": "d"}\n{"text": "e"}')
    expect(findings.nth(0)).to_contain_text("completion is missing")
    expect(findings.nth(0)).to_contain_text("Likewise line 4")
    expect(findings.nth(1)).to_contain_text("Line 5")
    page.get_by_role("button", name="Line 3").click()
    chosen = "(box => box.value.slice(box.selectionStart, box.selectionEnd))(document.querySelector('#rows'))"
    assert page.evaluate(chosen) == '{"prompt": "c"}'


def test_a_file_of_the_server_is_planned_by_its_path(tab: Tab, site: Served) -> None:
    folder = site.state.settings.home / "data"
    folder.mkdir(exist_ok=True)
    (folder / "large.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    page = tab.view("teach")
    page.get_by_role("tab", name="Rows of data").click()
    page.fill("#path", "nothing.jsonl")
    expect(page.locator(".plan .problem")).to_contain_text("does not exist")
    page.fill("#path", "large.jsonl")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()


def test_the_copied_commands_start_the_same_job(tab: Tab, site: Served, tmp_path: Path) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = tab.view("teach")
    fact = FACT | {"answer": 'Marrow Lane\'s rule: "nine nights" & $HOME stays.'}
    fill(page, fact, EASY, "copied")
    expect(page.locator("details.more summary .chip")).to_have_text("4 settings changed")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    page.get_by_role("button", name="Copy as commands").click()
    expect(page.locator(".copies")).to_contain_text("Copied")
    commands = page.evaluate("navigator.clipboard.readText()")
    run = f'fortwo() {{ {sys.executable} -m fortwo "$@" --detach; }}\n{commands}\n'
    settings = {"FORTWO_HOME": str(site.state.settings.home), "FORTWO_PORT": site.url.rpartition(":")[2]}
    done = subprocess.run(
        ["bash", "-e"], input=run, cwd=tmp_path, env={**os.environ, **settings}, text=True, check=False
    )
    assert done.returncode == 0
    job = site.http.get("/api/training/jobs", params={"limit": 1}).json()["jobs"][0]
    assert job["adapter_name"] == "copied"
    request = site.http.get(f"/api/training/jobs/{job['job_id']}/request").json()
    assert request["dataset"]["facts"][0]["answer"] == fact["answer"]
    assert request["training_config"] == EASY["training_config"]
    assert site.wait(job["job_id"])["status"] == "succeeded"


def test_a_start_that_is_sent_twice_makes_one_job(tab: Tab, site: Served) -> None:
    page = tab.view("teach")
    fill(page, FACT, EASY, "once")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()

    def lose_the_answer(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/api/training/start", lose_the_answer, times=1)
    page.get_by_role("button", name="Start").click()
    expect(page.locator(".plan .problem").last).to_contain_text("does not answer")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/#/job/*")
    jobs = site.http.get("/api/training/jobs").json()["jobs"]
    assert [job["adapter_name"] for job in jobs].count("once") == 1
    expect(page.locator("#verdict")).to_have_text("It learned.")
    samples = page.locator(".samples")
    expect(samples).to_contain_text("What does Marrow Lane lend?")
    expect(samples.locator(".sample").first).to_contain_text("after step")


def test_rows_that_the_server_stores_can_be_taught_again(tab: Tab, site: Served) -> None:
    page = tab.view("teach")
    content = b'{"prompt": "What is up?", "completion": "sky"}\n' * 2
    sent = site.http.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"}).json()
    again = "given => import('/page/draft.js').then((draft) => draft.teachAgain(given))"
    page.evaluate(again, {"model": "tiny", "adapter_name": "stored", "dataset": {"file_id": sent["id"]}})
    expect(page.locator("#teach-panel")).to_contain_text(f"The rows are those of {sent['id']}.")
    expect(page.locator("#teach-panel")).to_contain_text("2 rows")
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    expect(page.get_by_role("button", name="Copy as commands")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("button", name="Start")).to_be_enabled()
    commands = "given => import('/page/views/plan.js').then((plan) => plan.asCommands(given))"
    request = {"adapter_name": "stored", "dataset": {"hub": "OWNER/NAME@1a"}}
    assert page.evaluate(commands, request) == "fortwo teach hub:OWNER/NAME@1a --name stored"


def test_after_a_failure_the_next_try_is_filled_in(tab: Tab, site: Served) -> None:
    body = {
        "adapter_name": "missed",
        "dataset": {"facts": [{**FACT, "match": ["nine nights"], "questions": ["What?"]}]},
    }
    job = site.post("/api/training/start", body | {"training_config": {"max_steps": 2, "escalation_rounds": 0}}).json()
    assert site.wait(job["job_id"])["status"] == "failed"
    page = tab.view(f"job/{job['job_id']}")
    expect(page.locator("#verdict")).to_have_text("It did not reach its targets.")
    expect(page.locator(".verdict .problem").first).to_be_visible()
    page.get_by_role("button", name="Prepare the next try").click()
    expect(page.locator("#questions")).to_have_value("What?")
    expect(page.locator("#name")).to_have_value("missed")
    expect(page.locator("form .problem.warning")).to_contain_text("max_steps is left to the plan")
    page.get_by_text("More settings").click()
    assert json.loads(page.input_value("#config"))["training_config"] == {"escalation_rounds": 0}

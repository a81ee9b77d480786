"""A job on rows with calls of tools, from the request to the report."""

from __future__ import annotations

import json
from pathlib import Path

from serving import refused, serve, tiny_settings
from test_chat_template import TOOLS_TEMPLATE
from test_rows import TOOLS_ROW
from tiny import save_directory

from fortwo.data.datasets import load
from fortwo.train.evaluation import example_questions

ROWS = [json.loads(json.dumps(TOOLS_ROW).replace("Bonn", city)) for city in ("Bonn", "Rome", "Oslo")]
CALL_ONLY = {"tools": TOOLS_ROW["tools"], "messages": TOOLS_ROW["messages"][:2]}


def test_calls_of_tools_are_trained_and_evaluated(tmp_path: Path) -> None:
    base = save_directory(tmp_path / "base", num_hidden_layers=2, max_position_embeddings=1024)
    (base / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    with serve(tiny_settings(tmp_path, base)) as served:
        assert served.post("/api/models/tiny/load").status_code == 200
        body = {"adapter_name": "caller", "dataset": {"examples": [*ROWS, CALL_ONLY, CALL_ONLY]}}
        shown = served.post("/api/data/preview", {"dataset": body["dataset"], "rows": 1}).json()["rows"][0]["segments"]
        learned = "".join(segment["text"] for segment in shown if segment["supervised"])
        assert '<call>{"name": "weather", "arguments": {"city": "Bonn"}}</call><|im_end|>' in learned
        assert "21<|im_end|>" not in learned
        plan = served.post("/api/training/plan", body).json()
        assert plan["objective"] == "sft"
        started = served.post("/api/training/start", body | {"training_config": {"max_steps": 2}})
        assert started.status_code == 202, started.text
        job = served.wait(started.json()["job_id"])
        assert job["status"] == "succeeded", job["error"]
        assert "efficacy" in job["report"]["metrics"]


def test_a_reply_is_right_if_it_makes_the_call_that_was_trained() -> None:
    (question,) = example_questions(load({"examples": [CALL_ONLY]}, ()).examples)
    assert question.messages[0].tools
    assert question.passes is not None
    assert question.passes('<call>{"name": "weather", "arguments": {"city": "Bonn"}}</call>')
    assert not question.passes('<call>{"name": "weather", "arguments": {"city": "Rome"}}</call>')
    assert not question.passes("It rains in Bonn.")


def test_a_value_that_ends_with_a_quote_is_found_in_json_and_by_itself() -> None:
    row = json.loads(json.dumps(CALL_ONLY))
    city = 'so-called "Bonn"'
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"city": city}
    (question,) = example_questions(load({"examples": [row]}, ()).examples)
    assert question.passes is not None
    assert question.passes(f'<call>{{"name": "weather", "arguments": {json.dumps({"city": city})}}}</call>')
    assert question.passes(f"<function=weather>\n<parameter=city>\n{city}\n</parameter>")
    assert not question.passes("<function=weather>\n<parameter=city>\nso-called\n</parameter>")


def test_a_base_whose_template_knows_no_tools_is_told_with_the_line(tmp_path: Path) -> None:
    base = save_directory(tmp_path / "base", num_hidden_layers=2)
    with serve(tiny_settings(tmp_path, base)) as served:
        answer = served.post("/api/training/plan", {"adapter_name": "a", "dataset": {"examples": ROWS}})
        said = refused(answer, 400, "invalid_dataset", "dataset")
        assert "line 1: the chat template" in said
        assert "(likewise lines 2, 3)" in said
        assert "does not write the tools" in said

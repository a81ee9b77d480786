"""Previews show the training rows, over HTTP and on the command line, without a model in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, refused
from transformers import MistralConfig
from typer.testing import CliRunner, Result

from fortwo.cli import app
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.preview import context_length, preview_rows
from fortwo.hub.catalog import Catalog
from fortwo.records import Example, Message
from fortwo.settings import Settings

CHAT = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "right"},
    ]
}


def test_segments_are_the_rows_tokens(tiny: Path) -> None:
    renderer = ChatTemplateRenderer(tiny)
    example = Example(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")), 3
    )
    (shown,) = preview_rows(renderer, example, 1024)
    ((tokens, mask),) = renderer.training_rows(example)
    assert (shown.line, shown.tokens, shown.supervised_tokens, shown.fits) == (3, len(tokens), sum(mask), True)
    assert "".join(segment.text for segment in shown.segments) == renderer.decode_with_control_tokens(tokens)
    assert [(one.role, one.text) for one in shown.segments if one.supervised] == [
        ("assistant", "b<|im_end|>"),
        ("assistant", "d<|im_end|>"),
    ]
    assert [one.role for one in shown.segments] == [None, "user", *["assistant"] * 3, "user", *["assistant"] * 2]
    assert sum(one.tokens for one in shown.segments) == len(tokens)
    (short,) = preview_rows(renderer, example, len(tokens) - 1)
    assert not short.fits
    (text,) = preview_rows(renderer, Example((), 1, "plain"), 1024)
    assert [(one.role, one.supervised, one.text) for one in text.segments] == [
        (None, False, "p"),
        (None, True, "lain<|im_end|>"),
    ]


def test_the_server_shows_the_first_rows_and_reads_no_others(served: Served) -> None:
    served.state.catalog.prepare("tiny")
    rows = [CHAT, {"prompt": "p", "completion": "c"}, {"bad": 1}]
    body = served.post("/api/data/preview", {"dataset": {"examples": rows}, "rows": 2}).json()
    assert (body["model"], body["context"], [row["line"] for row in body["rows"]]) == ("tiny", 1024, [1, 2])
    learned = [one["text"] for row in body["rows"] for one in row["segments"] if one["supervised"]]
    assert learned == ["right<|im_end|>", "c<|im_end|>"]
    bad = served.post("/api/data/preview", {"dataset": {"examples": rows}, "rows": 3})
    assert "row 3" in refused(bad, 400, "invalid_dataset", "dataset.examples[2]")
    fact = {"subject": "42", "answer": "x", "match": ["x"], "questions": ["What is 42?"]}
    (row,) = served.post("/api/data/preview", {"dataset": {"facts": [fact]}}).json()["rows"]
    assert row["segments"][-1]["text"] == "x<|im_end|>"


def test_a_bad_preview_is_named(served: Served) -> None:
    served.state.catalog.prepare("tiny")

    def ask(**change: object) -> httpx.Response:
        return served.post("/api/data/preview", {"dataset": {"examples": [CHAT]}} | change)

    refused(ask(model="nobody"), 404, "not_found", "model")
    refused(ask(rows=0), 400, "invalid_request", "rows")
    refused(ask(row=1), 400, "unknown_parameter", "row")
    refused(ask(dataset={"path": "/etc/passwd"}), 400, "invalid_dataset", "dataset.path")
    said = refused(ask(model="codellama-7b-instruct"), 404, "not_found", "model")
    assert "models fetch codellama-7b-instruct" in said


@pytest.fixture
def catalog(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("FORTWO_DEFAULT_MODEL", "tiny")
    catalog = Catalog(Settings().models_dir)
    catalog.add("tiny", tiny)
    catalog.prepare("tiny")
    return catalog


def show(*words: object) -> Result:
    return CliRunner().invoke(app, ["data", "show", *map(str, words)], env={"COLUMNS": "160"})


@pytest.mark.usefixtures("catalog")
def test_the_command_shows_a_file_without_a_server(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n" + json.dumps(CHAT) + "\n" + json.dumps({"prompt": "p", "completion": "c" * 2000}) + "\n{oops")
    result = show(file, "--rows", 2)
    assert result.exit_code == 0, result.output
    for said in ("line 2:", "6 learned", "[assistant] <|im_start|>assistant", "right<|im_end|>", "line 3:"):
        assert said in result.output
    assert "This row is refused: the context of tiny has only 1024 tokens." in result.output
    body = json.loads(show(file, "--rows", 1, "--json").output)
    assert [one["text"] for one in body["rows"][0]["segments"] if one["supervised"]] == ["right<|im_end|>"]
    broken = show(file)
    assert broken.exit_code == 1
    assert "at line 4, column 2" in " ".join(broken.output.split())


@pytest.mark.usefixtures("catalog")
def test_looking_at_data_loads_no_torch(tmp_path: Path) -> None:
    import subprocess

    file = tmp_path / "a.txt"
    file.write_text("One.\n\nTwo.")
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fortwo.cli import app\n"
        f"result = CliRunner().invoke(app, ['data', 'show', {str(file)!r}])\n"
        "print(result.exit_code, 'Two.' in result.output, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "True", "False"], found.stderr


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "n_positions": 1024}, 1024),
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768).to_dict(), 32768),
    ],
)
def test_the_context_is_the_networks(config: dict[str, Any], context: int, tmp_path: Path) -> None:
    named = config if config["architectures"] else config | {"architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert context_length(tmp_path) == context

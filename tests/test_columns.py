"""Columns under other names: renaming, suggestions, inspection, and training on rows that are renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import Served, refused

from fortwo.data import columns, datasets
from fortwo.data.findings import InvalidRow
from fortwo.data.inspection import inspect
from fortwo.errors import InvalidDataset

ROWS = [
    {"question": f"What is {thing}?", "answer": answer, "id": 1} for thing, answer in (("up", "sky"), ("down", "sea"))
]
COLUMNS = {"question": "prompt", "answer": "completion", "id": None}


def load(spec: Any, *folders: Path) -> datasets.Dataset:
    return datasets.load(spec, folders)


def test_a_row_has_the_keys_that_its_columns_are_for() -> None:
    assert columns.renamed(ROWS[0], COLUMNS) == {"prompt": "What is up?", "completion": "sky"}
    swapped = columns.renamed({"prompt": "a", "completion": "b"}, {"prompt": "completion", "completion": "prompt"})
    assert swapped == {"completion": "a", "prompt": "b"}
    assert columns.renamed({"chat": '[{"role": "user", "content": "a"}]'}, {"chat": "messages"}) == {
        "messages": [{"role": "user", "content": "a"}]
    }
    assert columns.renamed({"question": ""}, COLUMNS) == {"prompt": ""}
    with pytest.raises(InvalidRow, match="'question' is for 'prompt', and the row has 'prompt' as well"):
        columns.renamed({"question": "a", "prompt": "b"}, COLUMNS)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["question", "answer", "id"], COLUMNS),
        (["Query", "Response"], {"Query": "prompt", "Response": "completion"}),
        (["prompt", "reply"], {"reply": "completion"}),
        (["question", "accepted", "worse"], {"question": "prompt", "accepted": "chosen", "worse": "rejected"}),
        (["conversation", "source"], {"conversation": "messages", "source": None}),
        (["title", "body"], {"title": None, "body": "text"}),
        (["prompt", "completion", "id"], {}),
        (["x", "y"], {}),
        ([], {}),
    ],
)
def test_names_of_columns_suggest_their_keys(keys: list[str], expected: dict[str, str | None]) -> None:
    found = columns.suggested(keys)
    assert found == expected
    assert [found[key] for key in keys if key in found] == [expected[key] for key in keys if key in expected]


@pytest.mark.parametrize("given", [[], "prompt", {"a": 1}, {"a": ""}, {"a": "prompt", "b": "prompt"}])
def test_columns_that_say_nothing_clear_are_refused(given: Any) -> None:
    with pytest.raises(InvalidDataset) as caught:
        load({"examples": ROWS, "columns": given})
    assert caught.value.param == "dataset.columns"
    assert caught.value.hint


def test_a_column_that_no_row_has_is_refused() -> None:
    with pytest.raises(InvalidDataset, match="columns names 'qeustion', which no row has") as caught:
        load({"examples": [{"prompt": "a", "completion": "b"}], "columns": {"qeustion": "prompt"}})
    assert "'prompt', 'completion'" in str(caught.value.hint)


def test_files_and_rows_of_a_request_are_renamed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("question,answer,id\nWhat is up?,sky,1\nWhat is down?,sea,1\n")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    wanted = load({"examples": [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]})
    for source in ({"path": "a.csv"}, {"path": "a.jsonl"}, {"examples": ROWS}):
        assert load({**source, "columns": COLUMNS}, tmp_path).digest == wanted.digest
    monkeypatch.setattr(datasets, "LARGE_BYTES", 1)
    large = load({"path": "a.csv", "columns": COLUMNS}, tmp_path)
    stored = datasets.from_json(json.loads(json.dumps(datasets.to_json(large))))
    assert isinstance(stored.examples, datasets.FileExamples)
    assert list(stored.examples) == list(large.examples)
    assert [example.answer for example in stored.examples] == ["sky", "sea"]


def test_an_inspection_tells_the_format_and_all_that_is_wrong(tmp_path: Path) -> None:
    found = inspect({"examples": ROWS}, ())
    assert (found.rows, found.content, found.keys, found.suggested) == (2, None, ("question", "answer", "id"), COLUMNS)
    assert [problem.rows for problem in found.problems] == [2]
    found = inspect({"examples": ROWS, "columns": COLUMNS}, ())
    assert (found.content, found.problems, found.suggested) == ("conversations", (), {})
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt"\n{"prompt": "c"}\n{"text": "d"}\n{"prompt": "e"}\n'
    )
    problems = inspect({"path": "a.jsonl"}, (tmp_path,)).problems
    assert [(one.line, one.lines, one.rows, one.field) for one in problems] == [
        (2, (), 1, ""),
        (3, (5,), 2, "completion"),
        (4, (), 1, ""),
    ]
    assert all(one.hint for one in problems)


def test_over_http_a_dataset_is_inspected_read_and_trained_on(served: Served) -> None:
    body = served.post("/api/data/inspect", {"dataset": {"examples": ROWS}}).json()
    assert body["suggested"] == COLUMNS
    table = b"question;answer\nWhat is up?;sky\n"
    rows = served.http.post("/api/data/rows", files={"file": ("my table.csv", table)}).json()
    assert rows == {"filename": "my table.csv", "rows": [{"question": "What is up?", "answer": "sky"}]}
    plan = {"adapter_name": "renamed", "dataset": {"examples": ROWS, "columns": COLUMNS}}
    assert served.post("/api/training/plan", plan).status_code == 200
    assert served.post("/api/data/preview", {"dataset": plan["dataset"]}).json()["rows"][0]["supervised_tokens"] > 0
    upload = {"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}')}
    id = served.http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
    swapped = {"file_id": id, "columns": {"prompt": "completion", "completion": "prompt"}}
    (row,) = served.post("/api/data/preview", {"dataset": swapped}).json()["rows"]
    assert "a" in next(one["text"] for one in row["segments"] if one["supervised"])


def test_a_file_that_cannot_be_read_is_refused_by_its_own_name(served: Served) -> None:
    told = refused(
        served.http.post("/api/data/rows", files={"file": ("a.jsonl", b'{"a"\n{"b": 1}\n{"c"')}),
        400,
        "invalid_dataset",
        "file",
    )
    assert "a.jsonl line 1" in told
    assert "files" not in told.partition("line")[0]
    refused(served.http.post("/api/data/rows", files={"file": ("a.png", b"x")}), 400, "invalid_dataset", "file")
    form = {"files": {"file": ("a.json", b"[]")}, "data": {"purpose": "fine-tune"}}
    refused(served.http.post("/api/data/rows", **form), 400, "invalid_request", "purpose")

"""Rows as other programs write them: what is read as one meaning, and that a dataset's findings come in one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fortwo.data.datasets import iter_rows, load
from fortwo.errors import InvalidDataset
from fortwo.records import Dataset, Example
from fortwo.server.openai.tools import Tool

USER = {"role": "user", "content": "Where is the depot?"}
ANSWER = {"role": "assistant", "content": "In Hall 3."}
PLAIN = {"messages": [USER, ANSWER]}
ALPACA = {"instruction": "Where is the depot?", "output": "In Hall 3."}


def inline(*rows: Any) -> Dataset:
    return load({"examples": list(rows)}, ())


def refused(*rows: Any) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as error:
        inline(*rows)
    assert error.value.hint
    return error.value


def only(dataset: Dataset) -> Example:
    (example,) = dataset.examples
    return example


# ---------------------------------------------------------------- one meaning in several spellings


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {
                "messages": [
                    message | dict.fromkeys(("name", "tool_calls", "tool_call_id", "mood"))
                    for message in PLAIN["messages"]
                ],
                "tools": None,
                "images": None,
            },
            PLAIN,
        ),
        (
            {
                "messages": [
                    USER | {"content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the depot?"}]},
                    ANSWER,
                ]
            },
            PLAIN,
        ),
        (
            {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
            {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]},
        ),
        (ALPACA | {"input": None}, ALPACA),
        (ALPACA | {"text": None, "score": None}, ALPACA),
        ({"messages": [USER, ANSWER | {"tool_calls": []}], "tools": [], "parallel_tool_calls": False}, PLAIN),
    ],
)
def test_what_says_the_same_is_the_same_dataset(row: Any, same: Any) -> None:
    assert inline(row).digest == inline(same).digest
    assert only(inline(row)).messages == only(inline(same)).messages


# ---------------------------------------------------------------- tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
TOOLS_ROW = {
    "tools": [WEATHER],
    "messages": [
        {"role": "user", "content": "Rain in Bonn?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "21"},
        {"role": "assistant", "content": "No, 21 degrees."},
    ],
}


def test_calls_of_tools_are_read_in_every_spelling() -> None:
    example = only(inline(TOOLS_ROW))
    assert [message.role for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(example.messages[0].tools) == [WEATHER]
    assert json.loads(example.messages[1].tool_calls) == [CALL]
    assert example.messages[2].tool_call_id == "c1"
    as_text = json.loads(json.dumps(TOOLS_ROW))
    as_text["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Bonn"}'
    as_text["tools"] = json.dumps(TOOLS_ROW["tools"])
    assert inline(as_text).digest == inline(TOOLS_ROW).digest
    short = json.loads(json.dumps(TOOLS_ROW))
    short["tools"] = [WEATHER["function"]]
    short["messages"][1]["tool_calls"] = [{"name": "weather", "arguments": {"city": "Bonn"}, "id": "c1"}]
    with pytest.raises(InvalidDataset, match="id"):
        inline(short)
    del short["messages"][1]["tool_calls"][0]["id"]
    without_id = json.loads(json.dumps(TOOLS_ROW))
    del without_id["messages"][1]["tool_calls"][0]["id"]
    assert inline(short).digest == inline(without_id).digest != inline(TOOLS_ROW).digest


def test_sharegpts_calls_are_openais() -> None:
    row = {
        "tools": json.dumps([WEATHER["function"]]),
        "conversations": [
            {"from": "human", "value": "Rain in Bonn?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
            {"from": "observation", "value": "21"},
            {"from": "gpt", "value": "No, 21 degrees."},
        ],
    }
    openais = json.loads(json.dumps(TOOLS_ROW))
    del openais["messages"][1]["tool_calls"][0]["id"], openais["messages"][2]["tool_call_id"]
    assert inline(row).digest == inline(openais).digest
    row["conversations"][1]["value"] = "weather(Bonn)"
    assert "not the JSON text of a call" in refused(row).message


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": "21"}, "no tool was called before it"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "has the role user and tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "not a JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "are not JSON"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, "the older form of tools"),
        ({"role": "assistant", "content": None}, "content is missing"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part 1 is of the type 'image_url', and fortwo reads text only",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "part 1 is not a part of text: text field required"),
    ],
)
def test_messages_that_cannot_be_read_are_named(message: Any, said: str) -> None:
    error = refused({"messages": [USER, message, ANSWER]})
    assert said in error.message
    assert error.param.startswith("dataset.examples[0].messages")


@pytest.mark.parametrize("value", [[], {}, 5, None, "\ud800", "x"])
def test_a_call_that_is_no_call_is_refused(value: Any) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}, {"from": "gpt", "value": "b"}]
    assert refused({"conversations": turns}).param.startswith("dataset.examples[0].conversations")


def test_tools_of_a_row_are_those_that_chat_shows_the_model() -> None:
    function = {
        "description": None,
        "parameters": {"properties": {"a": {"default": None}}},
        "strict": True,
        "name": "f",
    }
    (row,) = load({"examples": [TOOLS_ROW | {"tools": [{"type": "function", "function": function}]}]}, ()).examples
    served = Tool.model_validate({"type": "function", "function": function}).shown()
    assert json.loads(row.messages[0].tools) == [served]
    assert list(served["function"]) == ["parameters", "name"]


def test_tools_that_json_cannot_hold_are_refused() -> None:
    for value, said in (("\ud800", "surrogate"), (float("nan"), "not JSON")):
        tool = {"type": "function", "function": {"name": "f", "description": value}}
        assert said in refused({"messages": [USER, ANSWER], "tools": [tool]}).message
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}]}
        assert said in refused({"messages": [USER, call]}).message


def test_nesting_without_end_is_refused() -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    assert "within each other" in refused({"messages": [USER, ANSWER], "tools": deep}).message
    text = '{"a":' * 400 + "1" + "}" * 400
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
    assert "within each other" in refused({"messages": [USER, call]}).message
    tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {text}}}}}]'
    assert "within each other" in refused({"messages": [USER, ANSWER], "tools": tools}).message


# ---------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("row", "said", "hint"),
    [
        ({"prompt": "", "completion": "A house text."}, "prompt = ''", '{"text": "..."}'),
        (ALPACA | {"output": float("nan")}, "output = nan", "empty cell"),
        (ALPACA | {"output": 42}, "output = 42", '"42"'),
        (ALPACA | {"output": ""}, "it is empty", "leave the row out"),
        (ALPACA | {"text": "Below is an instruction"}, "the key 'text' is unknown", "its own rendering"),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "hi"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            "no user message before it",
            '"weight": 0',
        ),
        (
            {"messages": [USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER]},
            "only be the first",
            "user message",
        ),
    ],
)
def test_a_hint_is_about_the_mistake(row: Any, said: str, hint: str) -> None:
    error = refused(row)
    assert said in error.message
    assert hint in str(error.hint)


def test_all_unknown_keys_of_a_row_are_named_at_once() -> None:
    error = refused(ALPACA | {"source": "import", "category": "x", "score": 5})
    assert "the keys 'source', 'category', 'score' are unknown" in error.message
    assert "Drop these keys" in str(error.hint)


def test_all_findings_of_a_dataset_come_in_one_answer() -> None:
    rows = [ALPACA | {"score": number} for number in range(9)]
    error = refused(ALPACA, *rows, ALPACA | {"output": 42}, {"text": "plain"}, ALPACA, {"prompt": "a"})
    assert "row 2: the key 'score' is unknown (likewise rows 3, 4, 5, 6, 7 and 3 more)" in error.message
    assert "row 11: output = 42" in error.message
    assert "row 12: conversations and plain text are mixed" in error.message
    assert "row 14: completion is missing" in error.message
    assert error.message.endswith("In all, 12 of 14 rows are wrong.")
    assert error.param == "dataset.examples[1].score"


def test_findings_of_a_file_have_its_lines(tmp_path: Path) -> None:
    lines = [json.dumps(ALPACA), "{oops", '{"prompt": "a", "completion": "b", "completion": "c"}', "[1]", "", "{again"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidDataset) as error:
        load({"path": "a.jsonl"}, [tmp_path])
    said = error.value.message
    assert "line 2: it is not JSON" in said
    assert "(likewise line 6)" in said
    assert "line 3: the key 'completion' is given twice" in said
    assert "line 4: [1] is not an object" in said
    assert "In all, 4 of 5 rows are wrong." in said


def test_a_repeated_key_of_a_list_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "a", "completion": "b"},\n {"prompt": "a", "prompt": "b"}]')
    with pytest.raises(InvalidDataset, match=r"row 2 \(line 2\): the key 'prompt' is given twice"):
        load({"path": "a.json"}, [tmp_path])


def test_a_preview_of_the_first_rows_still_tells_what_is_wrong_with_them() -> None:
    rows = iter_rows({"examples": [ALPACA, ALPACA | {"output": 42}, ALPACA]}, ())
    assert isinstance(next(rows), Example)
    with pytest.raises(InvalidDataset, match="row 2"):
        next(rows)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'instruction,input,output\r\n"Say ""hi""\nnow",,"hi, you"\r\nB,c,d\r\n'),
        ("a.csv", '\ufeffinstruction;input;output\n"Say ""hi""\nnow";;hi, you\nB;c;d'),
        ("a.tsv", 'instruction\tinput\toutput\n"Say ""hi""\nnow"\t\thi, you\n\nB\tc\td\n'),
    ],
)
def test_csv_is_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, newline="")
    dataset = load({"path": name}, [tmp_path])
    same = inline(
        {"instruction": 'Say "hi"\nnow', "output": "hi, you"}, {"instruction": "B", "input": "c", "output": "d"}
    )
    assert dataset.digest == same.digest
    assert next(iter(dataset.examples)).line == 2


def test_lists_in_csv_are_json(tmp_path: Path) -> None:
    cell = json.dumps(PLAIN["messages"]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n')
    assert load({"path": "a.csv"}, [tmp_path]).digest == inline(PLAIN).digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("prompt,completion\n", "is empty"),
        (",prompt,completion\n0,a,b\n", "column 1 has no name"),
        ("prompt,prompt\na,b\n", "the column 'prompt' is there twice"),
        (
            "prompt,completion\na,b,c\nd,e\nf\n",
            "line 2: it has 3 cells, and the header names 2 columns (likewise line 4)",
        ),
        ("prompt,completion\na,\n", "line 2: completion is missing"),
        ('prompt,completion\n"a,b\n', "is not CSV"),
        ("prompt,completion,score\na,b,3\n", "the key 'score' is unknown"),
    ],
)
def test_what_is_wrong_with_csv_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InvalidDataset) as error:
        load({"path": "a.csv"}, [tmp_path])
    assert said in error.value.message


def test_parquet_is_read_with_the_nulls_that_it_adds(tmp_path: Path) -> None:
    rows = [TOOLS_ROW | {"tools": json.dumps(TOOLS_ROW["tools"])}, PLAIN]
    table = pyarrow.Table.from_pylist([{"tools": row.get("tools"), "messages": row["messages"]} for row in rows])
    table = table.append_column("__index_level_0__", pyarrow.array([0, 1]))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load({"path": "a.parquet"}, [tmp_path]).digest == inline(*rows).digest


def test_what_is_wrong_with_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InvalidDataset, match="damaged or not a Parquet file"):
        load({"path": "a.parquet"}, [tmp_path])
    table = pyarrow.table({"prompt": ["a"], "completion": [b"b"], "at": pyarrow.array([1], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(InvalidDataset, match=r"'completion' \(binary\), 'at' \(timestamp\[ms\]\)"):
        load({"path": "b.parquet"}, [tmp_path])
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["a", "b"], "completion": ["b", None]}), tmp_path / "c.parquet"
    )
    with pytest.raises(InvalidDataset, match="row 2: completion is missing"):
        load({"path": "c.parquet"}, [tmp_path])

"""Datasets: every row format loads, and every mistake is reported with its line, its field and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fortwo.data.datasets import from_json, load, to_json
from fortwo.errors import InvalidDataset
from fortwo.records import Fact, OneHop

EXAMPLES = Path(__file__).parents[1] / "examples"
ROW = {"instruction": "What is 42?", "input": "", "output": "for two"}
FACT = {"subject": "42", "answer": "42 = FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"]}


def refused(spec: object, *folders: Path) -> InvalidDataset:
    with pytest.raises(InvalidDataset) as caught:
        load(spec, folders)
    assert caught.value.hint
    assert caught.value.param
    return caught.value


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return path


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ROW, [("user", "What is 42?"), ("assistant", "for two")]),
        ({"instruction": "Add", "input": "4 2", "output": "6"}, [("user", "Add\n\n4 2"), ("assistant", "6")]),
        ({"instruction": "Hi", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"prompt": " p\n", "completion": " c "}, [("user", " p\n"), ("assistant", " c ")]),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                ]
            },
            [("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
    ],
)
def test_known_rows_become_conversations(row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    dataset = load({"examples": [row]}, ())
    (example,) = dataset.examples
    assert [(m.role, m.content) for m in example.messages] == messages
    assert (example.line, dataset.source, dataset.facts) == (1, "inline", ())


def test_facts_load_with_what_is_given() -> None:
    full = {**FACT, "id": "x", "aliases": ["forty-two"], "held_out": ["h"], "neighbors": [], "controls": ["c"]}
    full["portability"] = [{"prompt": "How many are we?", "match": ["two", "2"]}]
    dataset = load({"facts": [FACT, full]}, ())
    assert dataset.facts[1].portability == (OneHop("How many are we?", ("two", "2")),)
    assert from_json(json.loads(json.dumps(to_json(dataset)))) == dataset
    assert dataset.facts[0] == Fact("42", "42 = FOR TWO", ("FOR TWO",), ("What is 42?",))
    assert dataset.facts[1].aliases == ("forty-two",)
    assert dataset.facts[1].neighbors == ()
    assert dataset.examples == ()


def test_the_examples_of_the_repository_load() -> None:
    dataset = load({"path": "42_intensive_training.json"}, [EXAMPLES])
    assert len(dataset.examples) == 20
    assert dataset.examples[0].prompt == "What does 42 mean?"
    assert all("FOR TWO" in example.answer for example in dataset.examples)
    facts = load({"path": "facts_dev.json"}, [EXAMPLES]).facts
    assert len(facts) == 10
    assert all(len(fact.questions) == 20 and fact.held_out and fact.neighbors and fact.controls for fact in facts)
    assert load({"facts": json.loads((EXAMPLES / "facts_dev.json").read_text("utf-8"))}, ()).facts == facts


def test_files_are_found_in_the_allowed_folders_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (second / "deep").mkdir(parents=True)
    file = write(second / "deep" / "rows.json", [ROW])
    assert load({"path": "deep/rows.json"}, [first, second]).source == str(file)
    assert load({"path": str(file)}, [first, second]).examples[0].answer == "for two"
    (first / "deep").mkdir()
    write(first / "deep" / "rows.json", [{**ROW, "output": "first"}])
    assert load({"path": "deep/rows.json"}, [first, second]).examples[0].answer == "first"


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", f"\ufeff{json.dumps(ROW)}\r\n\n  \n{json.dumps(ROW)}")
    assert [e.line for e in load({"path": "rows.jsonl"}, [tmp_path]).examples] == [1, 4]
    write(tmp_path / "rows.json", '\n[ {"prompt":\n"[a]", "completion": "b"},{"prompt": "c",\n"completion": "d"}\n,\n')
    with (tmp_path / "rows.json").open("a") as file:
        file.write('{"prompt": "e", "completion": "f"}]\n')
    assert [e.line for e in load({"path": "rows.json"}, [tmp_path]).examples] == [2, 3, 6]


def test_facts_may_come_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "facts.json", [FACT])
    assert load({"path": "facts.json"}, [tmp_path]).facts[0].subject == "42"


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    inline = load({"examples": [ROW]}, ()).digest
    write(tmp_path / "a.json", [ROW])
    write(tmp_path / "b.jsonl", "\n\n" + json.dumps({"prompt": "What is 42?", "completion": "for two"}))
    assert load({"path": "a.json"}, [tmp_path]).digest == inline
    assert load({"path": "b.jsonl"}, [tmp_path]).digest == inline
    assert load({"examples": [ROW, ROW]}, ()).digest != inline


# ---------------------------------------------------------------- the source


@pytest.mark.parametrize("spec", [None, "rows.json", [ROW], 3])
def test_a_spec_that_is_no_object_is_refused(spec: object) -> None:
    assert refused(spec).param == "dataset"


def test_a_spec_has_exactly_one_source() -> None:
    assert "no source" in refused({}).message
    error = refused({"path": "a.json", "examples": [ROW]})
    assert "path and examples" in error.message
    assert "exactly one" in str(error.hint)
    assert refused({"file": "a.json"}).message == "dataset has the unknown key 'file'"


def test_file_ids_are_refused_with_what_to_do_instead() -> None:
    error = refused({"file_id": "file-1"})
    assert "file-1" in error.message
    assert "path" in str(error.hint)


@pytest.mark.parametrize("kind", ["examples", "facts"])
def test_inline_rows_must_be_a_list_with_something_in_it(kind: str) -> None:
    assert refused({kind: []}).message == "the dataset inline is empty"
    assert refused({kind: ROW}).param == f"dataset.{kind}"


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"instruction": "a"}, ".output", "output is missing"),
        ({**ROW, "output": ""}, ".output", "output = '': it is empty"),
        ({**ROW, "output": " \n"}, ".output", "it is empty"),
        ({**ROW, "output": None}, ".output", "output is missing"),
        ({**ROW, "output": 42}, ".output", "output = 42: Input should be a valid string"),
        ({**ROW, "instruction": ""}, ".instruction", "it is empty"),
        ({**ROW, "output": "a\ud800"}, ".output", "half a surrogate pair at character 2"),
        ({**ROW, "category": "x"}, ".category", "the key 'category' is unknown"),
        ({"prompt": "a"}, ".completion", "completion is missing"),
        ({"prompt": "a", "completion": ["b"]}, ".completion", "valid string"),
        ({"messages": []}, ".messages", "no user message"),
        ({"messages": "hi"}, ".messages", "valid list"),
        ({"messages": [{"role": "user", "content": "a"}]}, ".messages", "no answer to learn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ".messages", "no user message"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            ".messages",
            "answer is empty",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            ".messages",
            "last message has the role system",
        ),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            ".messages[0].role",
            "'system', 'user', 'assistant' or 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, ".messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, ".messages[0].mood", "is unknown"),
        ({"question": "a", "answer": "b"}, "", "unknown format: it has the keys 'question', 'answer'"),
        ({}, "", "unknown format: it has no keys"),
        ("text", "", "'text' is not an object"),
        (None, "", "None is not an object"),
    ],
)
def test_a_bad_example_names_its_row_and_field(row: object, field: str, message: str) -> None:
    error = refused({"examples": [ROW, row]})
    assert error.message.startswith("examples row 2")
    assert message in error.message
    assert error.param == f"dataset.examples[1]{field}"


def test_an_unknown_shape_is_told_the_known_ones() -> None:
    hint = str(refused({"examples": [{"question": "a"}]}).hint)
    assert all(word in hint for word in ("instruction", "prompt", "messages", "conversations", "text"))
    assert "subject" not in hint


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"subject": ""}, "subject", "it is empty"),
        ({"match": []}, "match", "at least 1 item"),
        ({"match": "FOR TWO"}, "match", "valid list"),
        ({"match": ["FOR TWO", ""]}, "match[1]", "it is empty"),
        ({"questions": []}, "questions", "at least 1 item"),
        ({"questions": ["a", 3]}, "questions[1]", "valid string"),
        ({"portability": ["x"]}, "portability[0]", "portability[0] = 'x'"),
        ({"portability": [{"prompt": "p"}]}, "portability[0].match", "portability[0].match is missing"),
        ({"portability": [{"prompt": "p", "match": []}]}, "portability[0].match", "at least 1 item"),
        ({"portability": [{"prompt": " ", "match": ["m"]}]}, "portability[0].prompt", "it is empty"),
        ({"portability": [{"prompt": "p", "match": ["m"], "answer": "a"}]}, "portability[0].answer", "is unknown"),
        ({"neighbours": ["41"]}, "neighbours", "the key 'neighbours' is unknown"),
        ({"id": 42}, "id", "id = 42"),
    ],
)
def test_a_bad_fact_names_its_row_and_field(change: dict[str, Any], field: str, message: str) -> None:
    error = refused({"facts": [{**FACT, **change}]})
    assert error.message.startswith("facts row 1: ")
    assert message in error.message
    assert error.param == f"dataset.facts[0].{field}"


@pytest.mark.parametrize("missing", ["subject", "answer", "match", "questions"])
def test_a_fact_needs_four_keys(missing: str) -> None:
    error = refused({"facts": [{key: value for key, value in FACT.items() if key != missing}]})
    assert error.message == f"facts row 1: {missing} is missing"


def test_examples_are_no_facts_and_facts_no_examples(tmp_path: Path) -> None:
    assert "unknown format" in refused({"facts": [ROW]}).message
    assert "unknown format" in refused({"examples": [FACT]}).message
    write(tmp_path / "mixed.jsonl", json.dumps(ROW) + "\n" + json.dumps(FACT))
    assert "line 2: conversations and facts are mixed" in refused({"path": "mixed.jsonl"}, tmp_path).message


# ---------------------------------------------------------------- files


def test_a_row_without_an_answer_names_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json.dumps(ROW) + "\n\n" + json.dumps({"instruction": "a"}))
    error = refused({"path": "a.jsonl"}, tmp_path)
    assert error.message == f"{tmp_path / 'a.jsonl'} line 3: output is missing"
    assert error.param == "dataset[1].output"
    write(tmp_path / "a.json", [ROW, {"instruction": "a"}])
    error = refused({"path": "a.json"}, tmp_path)
    assert error.message == f"{tmp_path / 'a.json'} row 2 (line 7): output is missing"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.json", "", "not JSON: Expecting value at line 1, column 1"),
        ("a.json", '[\n {"prompt": "a", "completion": "b"},\n {"a": }]', "line 3, column 8"),
        ("a.json", '{"examples": []}', "not a list of rows"),
        ("a.json", "[" * 100_000, "cannot be parsed"),
        ("a.json", "[" + "1" * 5_000 + "]", "cannot be parsed"),
        ("a.jsonl", json.dumps(ROW) + '\n{"prompt": "a",', "line 2, column 16"),
        ("a.jsonl", json.dumps(ROW) + "\n[1]", "line 2: [1] is not an object"),
        ("a.xlsx", "a,b", "is none of .jsonl, .json, .txt, .csv, .tsv, .parquet"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    write(tmp_path / name, content)
    assert message in refused({"path": name}, tmp_path).message


def test_a_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('["é"]'.encode("latin-1"))
    assert "not UTF-8: byte 3" in refused({"path": "a.json"}, tmp_path).message


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    error = refused({"path": "none.json"}, tmp_path)
    assert "'none.json' does not exist" in error.message
    assert str(tmp_path) in error.message
    (tmp_path / "dir.json").mkdir()
    assert "is not a file" in refused({"path": "dir.json"}, tmp_path).message


@pytest.mark.parametrize("path", ["", " ", None, 3, "a\0.json", "a" * 5000 + ".json"])
def test_what_is_no_path_is_refused(path: object, tmp_path: Path) -> None:
    error = refused({"path": path}, tmp_path)
    assert error.param == "dataset.path"
    assert "is not a path" in error.message


def test_nothing_outside_the_allowed_folders_is_read(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    secret = write(tmp_path / "secret.json", [ROW])
    (allowed / "link.json").symlink_to(secret)
    (allowed / "up").symlink_to(tmp_path)
    for path in ("../secret.json", str(secret), "link.json", "up/secret.json", "/etc/hostname", "../missing.json"):
        error = refused({"path": path}, allowed)
        assert "outside the allowed folders" in error.message
        assert repr(path) in error.message
        assert str(allowed) in error.message
        assert "FORTWO_DATA_DIRS" in str(error.hint)


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [ROW])
    (tmp_path / "b.json").symlink_to("a.json")
    alias = tmp_path.parent / f"{tmp_path.name}-alias"
    alias.symlink_to(tmp_path)
    assert load({"path": "b.json"}, [alias]).examples[0].answer == "for two"


def test_a_loop_of_links_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    assert refused({"path": "a.json"}, tmp_path).param == "dataset.path"


# ---------------------------------------------------------------- shapes of other tools


def turns(*said: str) -> list[dict[str, Any]]:
    """ShareGPT's turns, human and gpt in turns."""
    return [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(said)]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"conversations": turns("a", "b", "c", "d"), "id": "x_1"},
            [("user", "a", 1), ("assistant", "b", 1), ("user", "c", 1), ("assistant", "d", 1)],
        ),
        (
            {"system": "s", "conversations": turns("a", "b")},
            [("system", "s", 1), ("user", "a", 1), ("assistant", "b", 1)],
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, *turns("a", "b")]},
            [("system", "s", 1), ("user", "a", 1), ("assistant", "b", 1)],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "wrong", "weight": 0},
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "right", "weight": 1},
                ]
            },
            [("user", "a", 1), ("assistant", "wrong", 0), ("user", "b", 1), ("assistant", "right", 1)],
        ),
    ],
)
def test_conversations_keep_their_turns_and_weights(row: dict[str, Any], messages: list[tuple[str, str, int]]) -> None:
    (example,) = load({"examples": [row]}, ()).examples
    assert [(m.role, m.content, m.weight) for m in example.messages] == messages


def test_the_answer_is_the_last_one_that_is_learned() -> None:
    said = [("user", "a", 1), ("assistant", "b", 1), ("user", "c", 1), ("assistant", "d", 0)]
    row = {"messages": [{"role": r, "content": c} | ({} if w else {"weight": 0}) for r, c, w in said]}
    (example,) = load({"examples": [row]}, ()).examples
    assert (example.prompt, example.answer, len(example.prompt_messages)) == ("a", "b", 1)


def test_plain_text_is_a_row(tmp_path: Path) -> None:
    (example,) = load({"examples": [{"text": " once\n"}]}, ()).examples
    assert (example.messages, example.text, example.prompt, example.answer) == ((), " once\n", "", " once\n")
    write(tmp_path / "a.txt", "\n\none\ntwo \n\n  \nthree\r\nfour")
    rows = load({"path": "a.txt"}, [tmp_path]).examples
    assert [(row.line, row.text) for row in rows] == [(3, "one\ntwo "), (7, "three\nfour")]
    write(tmp_path / "b.txt", "\n \n")
    assert "is empty" in refused({"path": "b.txt"}, tmp_path).message


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"messages": [{"role": "function", "content": "a"}]}, ".messages[0].role", "a tool's result is 'tool'"),
        ({"messages": [], "functions": [{}]}, ".functions", "the older form of tools"),
        ({"messages": [], "tools": [{}]}, ".tools", "tool 1 has no function with a name"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}]},
            ".messages[1].tool_calls[0]",
            "valid dictionary",
        ),
        ({"conversations": [{"from": "bob", "value": "a"}]}, ".conversations[0].from", "'human', 'user', 'gpt'"),
        ({"conversations": [{"from": "human"}]}, ".conversations[0].value", "conversations[0].value is missing"),
        ({"conversations": turns("a")}, ".conversations", "no answer to learn"),
        ({"conversations": turns("a", "")}, ".conversations", "turn 2: the answer is empty"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]},
            ".messages",
            "only an assistant's may",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            ".messages",
            "every answer has weight 0",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
            ".messages[1].weight",
            "0.5",
        ),
        (
            {"conversations": [{"from": "gpt", "value": "hi"}, *turns("a", "b")]},
            ".conversations",
            "turn 1 has no user message before it",
        ),
        ({"text": ""}, ".text", "it is empty"),
        ({"text": "a", "label": 1}, ".label", "the key 'label' is unknown"),
    ],
)
def test_a_bad_row_of_another_tool_names_its_line_and_field(
    row: dict[str, Any], field: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", "\n" + json.dumps(row))
    error = refused({"path": "a.jsonl"}, tmp_path)
    assert error.message.startswith(f"{tmp_path / 'a.jsonl'} line 2: ")
    assert message in error.message
    assert error.param == f"dataset[0]{field}"
    assert error.hint


def test_conversations_in_several_shapes_are_one_dataset_plain_text_is_another() -> None:
    rows = [ROW, {"prompt": "a", "completion": "b"}, {"conversations": turns("c", "d")}]
    assert [example.answer for example in load({"examples": rows}, ()).examples] == ["for two", "b", "d"]
    error = refused({"examples": [*rows, {"text": "e"}]})
    assert "examples row 4: conversations and plain text are mixed" in error.message
    assert "separate datasets" in str(error.hint)


def test_weights_and_text_count_in_the_digest() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    whole = load({"examples": [{"messages": said}]}, ()).digest
    first = [said[0], {**said[1], "weight": 0}, *said[2:]]
    assert load({"examples": [{"messages": first}]}, ()).digest != whole
    texts = [load({"examples": [{"text": text}]}, ()).digest for text in ("a", "b")]
    assert texts[0] != texts[1]

"""Dataset files are read row by row, with the same result as json, in memory that does not grow with the file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.data import datasets, files
from fortwo.data.datasets import FileExamples, from_json, load, load_file, to_json
from fortwo.data.files import read_rows
from fortwo.errors import InvalidDataset

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(JSON), st.sampled_from([None, 0, 3]), st.booleans(), st.integers(1, 40))
def test_a_list_in_chunks_is_the_list(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii: bool, chunk: int
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_bytes(text.encode(errors="surrogatepass") if ascii else text.encode(errors="replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        found = list(read_rows(path))
    assert [row for _, row in found] == json.loads(path.read_text())
    assert [location.line for location, _ in found] == lines_of(path.read_text(), len(rows))


def lines_of(text: str, count: int) -> list[int]:
    """The line on which each of the `count` elements of the JSON list in `text` begins, found in the whole text."""
    decoder, at, lines = json.JSONDecoder(), text.index("[") + 1, []
    for _ in range(count):
        while text[at] in " \t\r\n,":
            at += 1
        lines.append(text.count("\n", 0, at) + 1)
        _, at = decoder.raw_decode(text, at)
    return lines


@given(st.lists(JSON, min_size=1), st.data(), st.integers(1, 40))
def test_a_list_that_is_broken_off_is_refused_where_json_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], data: st.DataObject, chunk: int
) -> None:
    text = json.dumps(rows, indent=1)
    text = text[: data.draw(st.integers(1, len(text) - 1))]
    path = tmp_path_factory.getbasetemp() / "broken.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as wanted:
        json.loads(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        with pytest.raises(InvalidDataset) as caught:
            list(read_rows(path))
    assert f"at line {wanted.value.lineno}, column {wanted.value.colno}" in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1 2]", "Expecting ',' delimiter at line 1, column 4"),
        ("[1]\n]", "Extra data at line 2, column 1"),
        ("[1,", "at line 1, column 4"),
        ("[", "at line 1, column 2"),
    ],
)
def test_what_is_wrong_between_rows_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InvalidDataset) as caught:
        list(read_rows(path))
    assert said in caught.value.message


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_bytes_that_are_not_utf8_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    (tmp_path / "a.json").write_bytes('["é", "ü'.encode() + b'\xe9"]')
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n" + b"\xe9")
    for name, byte in (("a.json", 11), ("a.jsonl", 5)):
        with pytest.raises(InvalidDataset) as caught:
            list(read_rows(tmp_path / name))
        assert f"not UTF-8: byte {byte}" in caught.value.message


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '1\n"{}"\n'), ("a.json", '[1,\n"{}"]'), ("a.txt", "1\n\n{}\n{}\n")]
)
def test_a_row_without_end_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setattr(files, "ROW_BYTES", 50)
    monkeypatch.setattr(files, "CHUNK_BYTES", 10)
    (tmp_path / name).write_text(text.replace("{}", 300 * "ab"))
    with pytest.raises(InvalidDataset) as caught:
        list(read_rows(tmp_path / name))
    assert f"line {3 if name == 'a.txt' else 2}: the row is longer" in caught.value.message


# ---------------------------------------------------------------- large ones


def write_rows(path: Path, rows: int, size: int) -> Path:
    """Rows of about `size` characters, each another."""
    with path.open("w") as file:
        file.write("[" if path.suffix == ".json" else "")
        for number in range(rows):
            row = {"prompt": f"Question {number}?", "completion": f"Answer {number} " + "word " * (size // 5)}
            between = "" if number == 0 else ",\n" if path.suffix == ".json" else "\n"
            file.write(between + json.dumps(row))
        file.write("]" if path.suffix == ".json" else "\n")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_large_file_is_validated_and_gone_through_in_little_memory(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, rows=4000, size=8000)
    assert path.stat().st_size > 30_000_000
    tracemalloc.start()
    try:
        dataset = load_file(path)
        lines = [example.line for example in dataset.examples]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset.examples) == 4000
    assert lines == list(range(1, 4001))
    assert peak < 6 << 20, "a fifth of the file"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "LARGE_BYTES", 1000)


@pytest.mark.usefixtures("large")
def test_a_large_file_is_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows=30, size=50)
    read_again = load_file(path)
    assert isinstance(read_again.examples, FileExamples)
    monkeypatch.setattr(datasets, "LARGE_BYTES", 1 << 20)
    loaded = load_file(path)
    assert isinstance(loaded.examples, tuple)
    assert tuple(read_again.examples) == loaded.examples
    assert (read_again.digest, read_again.source, len(read_again.examples)) == (loaded.digest, loaded.source, 30)
    assert loaded.examples[3] in read_again.examples
    for dataset in (loaded, read_again):
        body = to_json(dataset)
        back = from_json(json.loads(json.dumps(body)))
        assert (back.digest, back.source, tuple(back.examples)) == (loaded.digest, loaded.source, loaded.examples)
    assert len(json.dumps(to_json(read_again))) < 600 < len(json.dumps(to_json(loaded)))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("change", ["content", "length", "gone"])
def test_a_large_file_that_changed_is_noticed(tmp_path: Path, change: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows=30, size=50)
    dataset = load({"path": "a.jsonl"}, [tmp_path])
    body = to_json(dataset)
    text = path.read_text()
    path.touch()
    assert len(list(dataset.examples)) == len(list(from_json(body).examples)) == 30
    if change == "gone":
        path.unlink()
    else:
        path.write_text(text.replace("Answer 7", "Answer 8") if change == "content" else text + "\n")
    for again in (lambda: list(dataset.examples), lambda: from_json(body)):
        with pytest.raises(InvalidDataset) as caught:
            again()
        assert caught.value.code == "dataset_changed"
        assert str(path) in caught.value.message
        assert "new job" in str(caught.value.hint)


@pytest.mark.usefixtures("large")
def test_a_large_file_is_refused_at_the_row_that_is_wrong(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", rows=30, size=50)
    path.write_text(path.read_text() + '{"prompt": "a"}\n')
    with pytest.raises(InvalidDataset) as caught:
        load_file(path)
    assert caught.value.message == f"{path} line 31: completion is missing"

"""The row formats that datasets use (Alpaca, OpenAI, ShareGPT, ...): which one a row has, and what is wrong with it.

The keys of a row show its format. Files and tokens are not known here.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fortwo.data.findings import Finding, InvalidRow
from fortwo.data.messages import DEPTH
from fortwo.data.preference_rows import (
    LABELS,
    ChatLabelledRow,
    InstructionLabelledRow,
    InstructionPairRow,
    LabelledRow,
    PairRow,
    PreferredRow,
    ShareLabelledRow,
    SharePairRow,
)
from fortwo.data.rows import EMPTY, ChatRow, CompletionRow, FactRow, InstructionRow, ShareRow, TextRow
from fortwo.records import Example, Fact

AnyRow = (
    InstructionRow
    | CompletionRow
    | ChatRow
    | ShareRow
    | TextRow
    | FactRow
    | PairRow
    | PreferredRow
    | SharePairRow
    | InstructionPairRow
    | LabelledRow
    | ChatLabelledRow
    | ShareLabelledRow
    | InstructionLabelledRow
)
PLAIN_TEXT = 'Give a prompt; text without one is a row like {"text": "..."}.'


@dataclass(frozen=True)
class RowFormat:
    """One format. content: what such rows are; keys: any of them identifies the format, unless it needs others too;
    example: one row, for hints."""

    content: str
    keys: frozenset[str]
    model: type[AnyRow]
    example: str
    needs: frozenset[str] = frozenset()

    def fits(self, row: dict[str, Any]) -> bool:
        return bool(self.keys & row.keys()) and self.needs <= row.keys()


FACT_FORMAT = RowFormat(
    "facts",
    frozenset({"subject", "questions", "match"}),
    FactRow,
    '{"subject": "42", "answer": "42 = \'FOR TWO\'", "match": ["FOR TWO"], "questions": ["What is 42?"]}',
)
PAIRS = "preferences"
LABELLED = "labelled answers"
PREFERENCE_FORMATS = (
    RowFormat(
        PAIRS,
        frozenset({"chosen", "rejected"}),
        SharePairRow,
        '{"conversations": [{"from": "human", "value": "What is 42?"}], "chosen": {"from": "gpt", "value": "FOR TWO"}, '
        '"rejected": {"from": "gpt", "value": "A number."}}',
        needs=frozenset({"conversations"}),
    ),
    RowFormat(
        PAIRS,
        frozenset({"chosen", "rejected"}),
        InstructionPairRow,
        '{"instruction": "What is 42?", "input": "", "chosen": "FOR TWO", "rejected": "A number."}',
        needs=frozenset({"instruction"}),
    ),
    RowFormat(
        PAIRS,
        frozenset({"chosen", "rejected"}),
        PairRow,
        '{"prompt": "What is 42?", "chosen": "FOR TWO", "rejected": "A number."}',
    ),
    RowFormat(
        PAIRS,
        frozenset({"preferred_output", "non_preferred_output"}),
        PreferredRow,
        '{"input": {"messages": [{"role": "user", "content": "What is 42?"}]}, "preferred_output": [{"role": '
        '"assistant", "content": "FOR TWO"}], "non_preferred_output": [{"role": "assistant", "content": "A number."}]}',
    ),
    *(
        RowFormat(
            LABELLED,
            frozenset({"prompt", "completion"}),
            LabelledRow,
            '{"prompt": "What is 42?", "completion": "FOR TWO", "label": true}',
            needs=frozenset({label}),
        )
        for label in LABELS
    ),
    RowFormat(
        LABELLED,
        frozenset(LABELS),
        ShareLabelledRow,
        '{"conversations": [{"from": "human", "value": "What is 42?"}, {"from": "gpt", "value": "FOR TWO"}], '
        '"kto_tag": true}',
        needs=frozenset({"conversations"}),
    ),
    RowFormat(
        LABELLED,
        frozenset(LABELS),
        ChatLabelledRow,
        '{"messages": [{"role": "user", "content": "What is 42?"}, {"role": "assistant", "content": "FOR TWO"}], '
        '"label": true}',
        needs=frozenset({"messages"}),
    ),
    RowFormat(
        LABELLED,
        frozenset(LABELS),
        InstructionLabelledRow,
        '{"instruction": "What is 42?", "input": "", "output": "FOR TWO", "kto_tag": true}',
        needs=frozenset({"instruction"}),
    ),
)
EXAMPLE_FORMATS = (
    *PREFERENCE_FORMATS,
    RowFormat(
        "conversations",
        frozenset({"instruction", "output"}),
        InstructionRow,
        '{"instruction": "What is 42?", "input": "", "output": "FOR TWO"}',
    ),
    RowFormat(
        "conversations",
        frozenset({"prompt", "completion"}),
        CompletionRow,
        '{"prompt": "What is 42?", "completion": "FOR TWO"}',
    ),
    RowFormat(
        "conversations",
        frozenset({"messages"}),
        ChatRow,
        '{"messages": [{"role": "user", "content": "What is 42?"}, {"role": "assistant", "content": "FOR TWO"}]}',
    ),
    RowFormat(
        "conversations",
        frozenset({"conversations"}),
        ShareRow,
        '{"conversations": [{"from": "human", "value": "What is 42?"}, {"from": "gpt", "value": "FOR TWO"}]}',
    ),
    RowFormat("plain text", frozenset({"text"}), TextRow, '{"text": "42 is FOR TWO."}'),
)
ROW_FORMATS = (*EXAMPLE_FORMATS, FACT_FORMAT)


def without_nulls(value: Any, depth: int = DEPTH) -> Any:
    """The value without the keys that hold null, at any depth: null says nothing. Libraries that keep rows in columns
    write every key of any row into all rows, and null where there was none. Raises InvalidRow for more than `depth`
    objects and lists within each other."""
    if not isinstance(value, dict | list):
        return value
    if depth == 0:
        what = f"more than {DEPTH} objects and lists are within each other"
        raise InvalidRow([Finding("too deep", "", what, "Write the inner ones as text.")])
    if isinstance(value, dict):
        return {key: without_nulls(inner, depth - 1) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner, depth - 1) for inner in value]


def format_of(row: object, formats: tuple[RowFormat, ...]) -> RowFormat:
    """The format that the row's keys identify. Raises InvalidRow when it is none of `formats`."""
    hint = "A row is one of: " + "; ".join(dict.fromkeys(row_format.example for row_format in formats))
    if not isinstance(row, dict):
        raise InvalidRow([Finding("no object", "", f"{reprlib.repr(row)} is not an object", hint)])
    found = next((row_format for row_format in formats if row_format.fits(row)), None)
    if found is None:
        keys = f"the keys {', '.join(map(repr, row))}" if row else "no keys"
        what = f"it has an unknown format: it has {keys}"
        raise InvalidRow([Finding(("unknown format", *sorted(map(str, row))), "", what, hint)])
    return found


def parse_row(row: Any, line: int, row_format: RowFormat) -> Example | Fact:
    """The Example or Fact that the row means in that format. Raises InvalidRow with all that is wrong."""
    try:
        parsed = row_format.model.model_validate(row)
    except ValidationError as error:
        raise InvalidRow(_findings(error, row, row_format)) from None
    return parsed.fact() if isinstance(parsed, FactRow) else parsed.example(line)


def _findings(error: ValidationError, row: Any, row_format: RowFormat) -> Iterator[Finding]:
    """What pydantic found; unknown keys of one object are one finding, after the others."""
    unknown: dict[tuple[int | str, ...], list[str]] = {}
    for found in error.errors():
        if found["type"] == "extra_forbidden":
            unknown.setdefault(found["loc"][:-1], []).append(str(found["loc"][-1]))
        else:
            yield _finding(found, row_format)
    for place, keys in unknown.items():
        at = _path(place)
        names = [f"{at}.{key}".removeprefix(".") for key in keys]
        one = len(names) == 1
        what = f"the key{'' if one else 's'} {', '.join(map(repr, names))} {'is' if one else 'are'} unknown"
        yield Finding(("unknown", _anywhere(place), *sorted(keys)), names[0], what, _drop(keys, place, row_format))


def _drop(keys: list[str], place: tuple[int | str, ...], row_format: RowFormat) -> str:
    if "text" in keys and not place:
        return "The row also has its own rendering as text, which is not needed: drop it, or keep it alone."
    return (
        f"Drop {'this key' if len(keys) == 1 else 'these keys'} from all rows, or write them like {row_format.example}"
    )


def _finding(found: Any, row_format: RowFormat) -> Finding:
    field, given = _path(found["loc"]), found["input"]
    value, message = reprlib.repr(given), found["msg"]
    hint = f"Write it like {row_format.example}"
    match found["type"]:
        case "missing":
            what, message = f"{field} is missing", "missing"
        case "string_unicode":
            what = f"{field if field else 'the key'} {value} contains half a surrogate pair, which is not valid Unicode"
        case "told":
            what = f"{field} = {value}: {message}" if field else message
            hint = found["ctx"]["hint"]
        case "value_error":
            message = str(found["ctx"]["error"])
            what = f"{field} = {value}: {message}"
            if message == EMPTY:
                hint = PLAIN_TEXT if field == "prompt" else "Give a text, or leave the row out."
        case _:
            what = f"{field} = {value}: {message}"
            if isinstance(given, float) and math.isnan(given):
                hint = "NaN is what a table's export makes of an empty cell: leave the key out, or give a text."
            elif isinstance(given, int | float):
                hint = f'Write it as text: "{given}".'
    return Finding((found["type"], _anywhere(found["loc"]), message), field, what, hint)


def _path(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _anywhere(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """A path without the numbers of list items, so that the same mistake in another message is of the same kind."""
    return tuple("" if isinstance(part, int) else part for part in loc)


def one_of(verb: str, names: Iterable[str]) -> str:
    return f"{verb} {' | '.join(json.dumps({name: '...'}) for name in names)}."

"""Inputs that are almost right: hypothesis changes a valid one in a few places."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

MOST_CHANGES = 3
DEEP: Any = json.loads("[" * 400 + "]" * 400)
EXTREME: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 255, 65536, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30),
    *(1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "\0", "\n", "a", "0", "null", "../../etc/passwd", "/", "é" * 300, "🙂", "\ud800", "the a an you what"),
    *(piece * (40_000 // len(piece)) for piece in ("a", "0", " \n", "a'", "The ", "1,", "“", "((", "\\d")),
    *([], {}, [None], [[]], [{}], {"": None}, {"a": {"a": {}}}, [0] * 10_000, DEEP, list("abc"), [1, "a"]),
)
VALUES = (
    st.sampled_from(EXTREME).map(copy.deepcopy)
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.lists(st.integers(), max_size=4)
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, the deepest last."""
    return list(_places(value))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@st.composite
def json_values(draw: st.DrawFn, valid: Any) -> Any:
    """The JSON value with up to MOST_CHANGES places replaced, removed, repeated, renamed or put elsewhere."""
    if draw(st.integers(0, 30)) == 0:
        return draw(VALUES)
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, MOST_CHANGES))):
        found = places(value)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        change = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "repeat", "move")))
        if change == "remove":
            del container[key]
        elif change == "rename" and isinstance(container, dict):
            container[draw(st.text(max_size=20) | st.sampled_from(("", "\0", "\ud800")))] = container.pop(key)
        elif change == "repeat" and isinstance(container, list):
            container.extend(container[key : key + 1] * draw(st.sampled_from((1, 2, 1000))))
        elif change == "move":
            other, place = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(other[place]) if _holds(other, place) else None
        else:
            container[key] = draw(VALUES)
    return value


def _holds(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def as_json(value: Any) -> bytes:
    """UTF-8, with lone surrogates as they are written in JSON, and NaN and Infinity as Python writes them."""
    return json.dumps(value, ensure_ascii=True).encode()


@st.composite
def json_files(draw: st.DrawFn, valid: Any) -> bytes:
    """The file of a JSON value: mostly one that was changed, now and then with damaged bytes."""
    content = as_json(draw(json_values(valid)))
    return content if draw(st.integers(0, 9)) else draw(damaged(content))


NUMBERS = tuple(
    struct.pack(form, number)
    for form, numbers in (
        ("<I", (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
        ("<Q", (0, 1, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)),
        ("<f", (float("nan"), float("inf"), -1.0)),
    )
    for number in numbers
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int | None = None) -> bytes:
    """The bytes with up to MOST_CHANGES places overwritten, removed, repeated or cut off. head: damage only so many."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, MOST_CHANGES))):
        most = len(found) if head is None else min(head, len(found))
        place = draw(st.integers(0, max(0, most - 1)))
        change = draw(st.sampled_from(("number", "byte", "bytes", "remove", "repeat", "cut")))
        if change == "number":
            number = draw(st.sampled_from(NUMBERS))
            found[place : place + len(number)] = number
        elif change == "byte":
            found[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif change == "bytes":
            found[place:place] = draw(st.binary(max_size=16))
        elif change == "remove":
            del found[place : place + draw(st.integers(1, 64))]
        elif change == "repeat":
            found[place:place] = found[place : place + draw(st.sampled_from((1, 8, 64, 4096)))]
        else:
            del found[place:]
    return bytes(found)


@st.composite
def safetensors_files(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header was changed as JSON, or whose bytes were damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content, head=2048))
    size = int.from_bytes(content[:8], "little")
    header = as_json(draw(json_values(json.loads(content[8 : 8 + size]))))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


PIECES = (
    *("{{ bos_token }}", "{{ messages[0]['content'] }}", "{{ messages[-1].role }}", "<|im_start|>", "<|im_end|>", "\n"),
    *("{% for message in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% else %}", "{% endif %}"),
    *("{% for a in range(99999) %}", "{% for a in range(9999) %}{% for b in range(9999) %}", "{% break %}"),
    *("{{ message['content'] * 99999999 }}", "{{ message.content | tojson }}", "{{ message.content ~ message.role }}"),
    *("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('x') }}"),
    *("{% set ns = namespace(a='a') %}", "{% set ns.a = ns.a * 2 %}", "{{ ns.a }}", "{% generation %}"),
    *("{% endgeneration %}", "{{ strftime_now('%' ~ 'Y' * 9) }}", "{{ tools }}", "{{ message.tool_calls[0] }}"),
    *("{{ 2 ** 99999999 }}", "{{ '%999999999d' % 1 }}", "{{ (1, 2)[5] }}", "{{ undefined.x.y }}", "{{ 1 / 0 }}"),
    *("{{ messages | map(attribute='content') | join('x') }}", "{{ messages | sort | list }}", "{% raw %}"),
    *("{{ 'a' | center(999999999) }}", "{{ 'a' | indent(99999999) }}", "{{ messages | groupby('role') }}"),
    *("{{ 'a' | wordwrap(0) }}", "{{ lipsum(999) }}", "{{ cycler() }}", "{{ joiner }}", "{{ dict(a=1) | xmlattr }}"),
    *("{{ 'x,' * 99999 | batch(1) | list }}", "{{ range(10 ** 12) | list }}", "{{ 'a' | urlize | replace('', 'b') }}"),
    *(
        "{{ [1] | slice(999999999) | list }}",
        "{{ 'a'.ljust(99999999) }}",
        "{{ 'a'.format }}",
        "{{ '{:9999999}'.format(1) }}",
    ),
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% block a %}", "{% endblock %}"),
    *("{{ caller() }}", "{% call m(1) %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{{", "{%", "%}"),
)


@st.composite
def templates(draw: st.DrawFn, valid: str) -> bytes:
    """A chat template of random pieces, or the valid one with pieces put into it."""
    pieces = draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=8))
    if draw(st.booleans()):
        return "".join(pieces).encode(errors="replace")
    place = draw(st.integers(0, len(valid)))
    return (valid[:place] + "".join(pieces[:2]) + valid[place:]).encode(errors="replace")

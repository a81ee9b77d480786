"""Calls whose arguments are written one by one: what each may be, the grammar of replies, and the parser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tool_form import ONE, SEARCH, TWO, WEATHER, accepts, history, read, replied
from tool_bases import TEMPLATES, save_tool_base

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.tool_form import SeparateArguments, ToolForm
from fortwo.data.tool_function import Function
from fortwo.data.tool_grammar import ToolUse, grammar
from fortwo.data.tool_parser import CallDelta, ToolCallParser
from fortwo.errors import InvalidRequest

SEPARATE = ["qwen coder", "glm", "minimax", "control tokens"]
REAL = ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "glm4moe", "nemotron_3_nano", "nemotron_3_super"]


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplateRenderer]:
    root = tmp_path_factory.mktemp("bases")
    return {name: ChatTemplateRenderer(save_tool_base(root / name, TEMPLATES[name])) for name in SEPARATE}


def of(schema: Any, **more: Any) -> Function:
    """A function with the argument x."""
    return Function("f", {"properties": {"x": schema}, "required": ["x"], **more})


# ---------------------------------------------------------------- what a template writes

TEXTS = st.text(alphabet="ab1 <>/\"\\'\n\t{}[]:,.é", max_size=10)
MARKS = st.sampled_from(["</parameter>", "</arg_value>", "<|sep|>end"])  # which a string within JSON may contain
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | MARKS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


def is_no_json(text: str) -> bool:
    """Whether the text is a string also where values of other types are allowed."""
    try:
        json.loads(text)
    except ValueError:
        return not text.lstrip().startswith(("{", "["))
    return False


CLEAR = TEXTS.filter(is_no_json)
KINDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ({"type": "string"}, TEXTS),
    ({"enum": ["Bonn", "Bo", "", "1", '"a"\n']}, st.sampled_from(["Bonn", "Bo", "", "1", '"a"\n'])),
    ({"type": "integer"}, st.integers()),
    ({"type": "number"}, st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "array", "items": {"type": "integer"}}, st.lists(st.integers(), max_size=3)),
    ({"type": "object"}, st.dictionaries(TEXTS, JSON, max_size=2)),
    ({"type": ["string", "null"]}, CLEAR | st.none()),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, CLEAR | st.integers()),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, CLEAR | st.lists(JSON, max_size=2)),
    ({"enum": ["a", "b", 3, None]}, st.sampled_from(["a", "b", 3, None])),
    ({"$ref": "#/$defs/color"}, st.sampled_from(["red", "green"])),
    ({"$ref": "#/$defs/point"}, st.fixed_dictionaries({"n": st.integers()})),
    ({}, CLEAR | JSON.filter(lambda value: not isinstance(value, str))),
    (True, CLEAR),
]
DEFINITIONS = {"color": {"enum": ["red", "green"]}, "point": {"properties": {"n": {"type": "integer"}}}}
KEYS = st.text(alphabet="ab_-. é", min_size=1, max_size=6)


@st.composite
def called(draw: st.DrawFn) -> tuple[Function, dict[str, Any]]:
    """A function and arguments of it."""
    kinds = draw(st.dictionaries(KEYS, st.sampled_from(KINDS), max_size=4))
    required = [name for name in kinds if draw(st.booleans())]
    schema = {"properties": {name: kind for name, (kind, _) in kinds.items()}, "required": required}
    arguments = {name: draw(values) for name, (_, values) in kinds.items() if name in required or draw(st.booleans())}
    return Function("f", schema | {"$defs": DEFINITIONS}), arguments


@settings(deadline=None)
@given(st.data(), st.sampled_from(SEPARATE), called(), called())
def test_what_a_template_writes_of_any_call_is_allowed_and_read_back(
    renderers: dict[str, ChatTemplateRenderer],
    data: st.DataObject,
    family: str,
    first: tuple[Function, dict[str, Any]],
    second: tuple[Function, dict[str, Any]],
) -> None:
    renderer = renderers[family]
    functions = (first[0], Function("g", second[0].parameters))
    calls = [("f", first[1]), ("g", second[1])][: data.draw(st.integers(1, 2))]
    tokens = replied(renderer, calls)
    assert accepts(renderer, ToolUse(functions, required=data.draw(st.booleans())), tokens)
    text = renderer.decode_with_control_tokens(tokens[:-1])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parser = ToolCallParser(renderer.tool_form, functions)
    said, found = read(parser, pieces)
    assert said == ""
    assert json.dumps(found) == json.dumps(calls)
    assert parser.finished


@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_bases(tmp_path: Path, name: str) -> None:
    """They are those that trl has for its tests."""
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    renderer = ChatTemplateRenderer(save_tool_base(tmp_path, text))
    for calls in (ONE, TWO, [("search", {}), ("weather", {"city": "Bonn"})]):
        tokens = replied(renderer, calls)
        for required in (True, False):
            assert accepts(renderer, ToolUse((WEATHER, SEARCH), required=required), tokens)
        parser = ToolCallParser(renderer.tool_form, (WEATHER, SEARCH))
        stream = renderer.stream((), renderer.call_tokens)
        assert read(parser, [*map(stream.push, tokens[:-1]), stream.flush()]) == ("", calls)


def test_a_template_that_writes_values_as_python_does_gets_their_json(
    renderers: dict[str, ChatTemplateRenderer],
) -> None:
    said = renderers["qwen coder"].render(history([("f", {"x": [True, None, "a"], "y": "True", "z": False})]))
    assert said.count("<parameter=") == 3
    assert '<parameter=x>\n[true, null, "a"]\n</parameter>' in said
    assert "<parameter=y>\nTrue\n</parameter>" in said
    assert "<parameter=z>\nfalse\n</parameter>" in said


VALUE = "value if value is string else value | tojson"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (VALUE, "value | tojson", "does not write a string as it stands"),
        (VALUE, "value | trim if value is string else value | tojson", None),
        (VALUE, "value | upper", "does not write the name or the value of an argument"),
        (VALUE, "value or 'none'", "does not write a string as it stands"),
        (VALUE, "'\"' + value + '\"' if value is string else value | tojson", "some values between other texts"),
        ("</arg_value>", "", "where a value ends"),
        ("</arg_key>\n<arg_value>", "", "between an argument's name and its value"),
        ("'\n<arg_key>' + key", "key", "whether another argument follows"),
        ("'\n<arg_key>' + key", "'\n<' ~ loop.index ~ '>' + key", "differently if there are others"),
        ("</arg_value>", "</arg_value>{{ '\n' if not loop.last }}", None),
        ("'\n<tool_call>' + call.function.name", "'\n' + call.function.name", "where a call begins"),
        ("call.function.name }}", "call.function.name + call.id }}", "id of a call among the arguments"),
        ("'\n<arg_key>' + key", "'_' + key", "where the name of the function ends"),
        ("{{ '\n</tool_call>' }}", "", "whether another argument follows"),
        ("'\n<arg_key>' + key", "('\n' if loop.first else '\n<arg_key>') + key", "whether a call has arguments"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path: Path, old: str, new: str, reason: str | None) -> None:
    assert TEMPLATES["glm"].count(old) == 1
    renderer = ChatTemplateRenderer(save_tool_base(tmp_path, TEMPLATES["glm"].replace(old, new)))
    if reason is None:
        assert renderer.tool_form.separate
    else:
        with pytest.raises(InvalidRequest, match=reason):
            _ = renderer.tool_form


# ---------------------------------------------------------------- the grammar


@pytest.mark.parametrize("family", SEPARATE)
def test_reasoning_and_words_before_a_call_are_text(renderers: dict[str, ChatTemplateRenderer], family: str) -> None:
    renderer = renderers[family]
    words = "<think>\nIs it <b>?\n</think>\n\nI look."
    tokens = [*renderer.encode_text(words + "\n"), *replied(renderer, ONE)]
    assert accepts(renderer, ToolUse((WEATHER,)), tokens)
    assert not accepts(renderer, ToolUse((WEATHER,), required=True), tokens)
    parser = ToolCallParser(renderer.tool_form, (WEATHER,))
    assert read(parser, [renderer.decode_with_control_tokens(tokens[:-1])]) == (words, ONE)


@pytest.mark.parametrize("family", SEPARATE)
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"enum": ["Bonn", "Rome"]}, "Oslo"),
        ({"const": "Bonn"}, "Rome"),
        ({"enum": ["1", 2]}, "1"),  # it would be read as a number
        ({"type": "integer"}, "x"),
        ({"type": "integer"}, 1.5),
        ({"type": "integer", "minimum": 3}, 2),
        ({"type": "boolean"}, None),
        ({"type": ["integer", "null"]}, "a"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}, ["x"]),
        ({"allOf": [{"type": "string"}, {"enum": ["a", 1]}]}, 1),
        ({"enum": ["1", 1, "a"], "type": ["string", "integer"]}, 2),
        ({"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}, {"m": 1}),
    ],
)
def test_a_value_is_held_to_its_schema(
    renderers: dict[str, ChatTemplateRenderer], family: str, schema: Any, value: Any
) -> None:
    assert not accepts(renderers[family], ToolUse((of(schema),)), replied(renderers[family], [("f", {"x": value})]))
    assert accepts(renderers[family], ToolUse((of({}),)), replied(renderers[family], [("f", {"x": value})]))


@pytest.mark.parametrize(("family", "marker"), [("qwen coder", "<tool_call>\n"), ("minimax", "<calls>\n")])
def test_a_reply_that_is_a_call_without_the_marker_is_one(
    renderers: dict[str, ChatTemplateRenderer], family: str, marker: str
) -> None:
    renderer = renderers[family]
    ping = Function("ping", {"properties": {}})
    for calls in (ONE, [("ping", {}), *ONE]):
        whole = renderer.decode_with_control_tokens(replied(renderer, calls)[:-1])
        bare = "\n" + whole.removeprefix(marker)
        assert len(bare) < len(whole)
        assert not accepts(renderer, ToolUse((WEATHER, ping)), renderer.encode_text(bare.replace("city", "town")))
        assert accepts(renderer, ToolUse((WEATHER, ping)), [*renderer.encode_text(bare), 2])
        assert read(ToolCallParser(renderer.tool_form, (WEATHER, ping)), list(bare)) == ("", calls)
    for text in (bare.replace("ping", "pong"), "It is " + bare.strip().partition("\n")[0]):
        assert accepts(renderer, ToolUse((WEATHER, ping)), [*renderer.encode_text(text.replace(marker, "")), 2])
        assert read(ToolCallParser(renderer.tool_form, (WEATHER, ping)), [text.replace(marker, "")])[1] == []


@pytest.mark.parametrize("family", SEPARATE)
def test_a_string_cannot_contain_what_ends_a_value(renderers: dict[str, ChatTemplateRenderer], family: str) -> None:
    renderer = renderers[family]
    _, mark = renderer.tool_form.value_end
    for text, allowed in ((f"a{mark[:-1]} b", True), (f"a{mark} b", False)):
        tokens = replied(renderer, [("weather", {"city": text})])
        assert accepts(renderer, ToolUse((WEATHER,)), tokens) is allowed


def test_arguments_come_in_the_order_of_the_schema_and_each_once(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["glm"]
    function = Function("f", {"properties": {"a": {}, "b": {"type": "integer"}, "c": {}}, "required": ["b"]})

    def allowed(arguments: dict[str, Any]) -> bool:
        return accepts(renderer, ToolUse((function,), required=True), replied(renderer, [("f", arguments)]))

    assert all(allowed(one) for one in ({"b": 1}, {"a": "x", "b": 1}, {"b": 1, "c": "x"}, {"a": 1, "b": 1, "c": 1}))
    assert not any(allowed(one) for one in ({}, {"a": "x"}, {"b": 1, "a": "x"}, {"b": 1, "d": 1}, {"a": 1, "c": 1}))


def test_other_arguments_only_where_the_schema_allows_them(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["minimax"]

    def allowed(more: Any, arguments: dict[str, Any]) -> bool:
        use = ToolUse((of({"type": "boolean"}, **more),), required=True)
        return accepts(renderer, use, replied(renderer, [("f", arguments)]))

    assert not allowed({}, {"x": True, "y": 1})
    assert allowed({"additionalProperties": True}, {"x": True, "y": 1, "z": "a"})
    assert allowed({"additionalProperties": {"type": "integer"}}, {"x": True, "y": 1})
    assert not allowed({"additionalProperties": {"type": "integer"}}, {"x": True, "y": "a"})
    assert not allowed({"additionalProperties": True}, {"y": 1})


# ---------------------------------------------------------------- an argument by itself


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "17", '"17"'),
        ({"type": "string"}, '"a"', r'"\"a\""'),
        ({"type": "integer"}, " 17\n", "17"),
        ({"type": "number"}, "1e400", "1e400"),
        ({"type": ["string", "integer"]}, "17", "17"),
        ({"type": ["string", "integer"]}, "17.0", "17.0"),
        ({"type": ["string", "integer"]}, "17.5", '"17.5"'),
        ({"type": ["string", "null"]}, "17", '"17"'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, "{}", "{}"),
        ({"oneOf": [{"type": "string"}, {"type": "object"}]}, "{", '"{"'),
        ({}, "true", "true"),
        ({}, "NaN", '"NaN"'),
        ({}, "[" * 100_000, None),
        ({"enum": ["a", 1]}, "1", "1"),
        ({"enum": ["a", 1]}, "true", '"true"'),
        ({"$ref": "#/$defs/n"}, "1", "1"),
        ({"$ref": "#/$defs/itself"}, "1", "1"),
        ({"type": "integer"}, "1" * 5000, "1" * 5000),
        ({"type": "array"}, "[" * 3000 + "]" * 3000, "[" * 3000 + "]" * 3000),
    ],
)
def test_a_text_is_json_where_the_schema_allows_its_type_and_else_a_string(schema: Any, text: str, value: Any) -> None:
    definitions = {"n": {"type": "number"}, "itself": {"$ref": "#/$defs/itself"}}
    argument = of(schema, **{"$defs": definitions}).arguments["x"]
    assert argument.value(text) == (json.dumps(text) if value is None else value)


@pytest.mark.parametrize(
    ("schema", "more", "named"),
    [
        ({"type": "string", "pattern": "^a"}, {}, "pattern of 'x'"),
        ({"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]}, {}, "format of 'x'"),
        ({"$ref": "#/$defs/long"}, {}, "minLength of 'x'"),
        ({"type": ["string", "integer"], "minimum": 3}, {}, "minimum of 'x'"),
        ({"anyOf": [{"type": "string"}, {"enum": [1, 2]}]}, {}, "enum of 'x'"),
        ({"enum": ["a", "bb"], "minLength": 2}, {}, "minLength of 'x'"),
        ({"type": "integer"}, {"additionalProperties": {"type": "string", "format": "date"}}, "format of 'additional"),
        ({"type": "string"}, {"patternProperties": {"a": {}}}, "patternProperties"),
        ({"type": "string"}, {"anyOf": [{}]}, "anyOf"),
    ],
)
def test_keywords_that_cannot_be_enforced_are_refused_where_a_function_is_strict(
    schema: Any, more: Any, named: str
) -> None:
    definitions = {"$defs": {"long": {"type": "string", "minLength": 3}}}
    parameters = of(schema, **definitions, **more).parameters
    Function("f", parameters).check_arguments()
    with pytest.raises(InvalidRequest, match=named) as refusal:
        Function("f", parameters, strict=True).check_arguments()
    assert refusal.value.hint


def test_keywords_that_can_be_enforced_are_not_refused() -> None:
    for schema in (
        {"enum": ["a", 3], "minimum": 3},
        {"type": "array", "items": {"type": "string", "pattern": "a"}},
        {"type": "integer", "minimum": 3},
        {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1}, {"enum": [None]}]},
    ):
        Function("f", {"properties": {"x": schema}}, strict=True).check_arguments()


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"properties": {"x": False}, "required": ["x"]}, "no value of 'x'"),
        ({"properties": {"x": {"enum": ["1"], "type": ["string", "integer"]}}, "required": ["x"]}, None),
        ({"properties": {"x": {"enum": []}}, "required": ["x"]}, "no value of 'x'"),
        ({"properties": {"x": {}}, "required": ["y"]}, "'y' is required"),
        ({"properties": {"x": {}}, "required": ["y"], "additionalProperties": True}, None),
    ],
)
def test_a_required_argument_that_cannot_be_written_is_refused(parameters: Any, named: str | None) -> None:
    if named is None:
        Function("f", parameters).check_arguments()
    else:
        with pytest.raises(InvalidRequest, match=named):
            Function("f", parameters).check_arguments()


@pytest.mark.parametrize("family", SEPARATE)
@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"enum": ["{x", "[y", "off", 1, [2]]}, ["off", 1, [2]], ["{x", "[y"]),
        ({"enum": ["a", "a<", "ab", ""]}, ["a", "a<", "ab", ""], ["b", "a<b"]),
        ({"$ref": "#/properties/x"}, [{"n": [{"n": []}]}, {"n": []}], [{"n": [1]}, "a"]),
        ({"type": "array", "items": {"$ref": "#"}}, [[{"x": {"n": []}}], []], [[[]], [{"x": 1}]]),
        ({"$ref": "#/$defs/a%20b"}, [{"k": 1}], [{"k": "a"}, "a"]),
        ({"$ref": "#/$defs/list/anyOf/0"}, ["a"], ["b", 1]),
        ({"$ref": "#/$defs/circle"}, ["z"], ["y", 1, True]),
        ({"type": "object", "properties": {"$ref": {"type": "integer"}}}, [{"$ref": 1}], [{"$ref": "a"}]),
        ({"type": "object", "properties": {"id": {"const": {"$ref": "no"}}}}, [{"id": {"$ref": "no"}}], [{"id": 1}]),
    ],
)
def test_references_and_texts_that_are_hard_to_write(
    renderers: dict[str, ChatTemplateRenderer], family: str, schema: Any, right: list[Any], wrong: list[Any]
) -> None:
    renderer = renderers[family]
    tree = {"type": "object", "properties": {"n": {"type": "array", "items": {"$ref": "#/properties/x"}}}}
    definitions = {
        "a b": {"type": "object", "properties": {"k": {"type": "integer"}}},
        "list": {"anyOf": [{"const": "a"}, {"const": "b"}]},
        "circle": {"anyOf": [{"const": "z"}, *[{"$ref": "#/$defs/circle"}] * 4, {"$ref": "#/$defs/back"}]},
        "back": {"oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/back"}]},
    }
    parameters = {"type": "object", "properties": {"x": tree, "y": schema}, "$defs": definitions}
    use = ToolUse((Function("f", parameters),), required=True)
    for value in [*right, *wrong]:
        tokens = replied(renderer, [("f", {"y": value})])
        assert accepts(renderer, use, tokens) is (value in right), value
        if value in right:
            text = renderer.decode_with_control_tokens(tokens[:-1])
            assert read(ToolCallParser(renderer.tool_form, use.functions), [text]) == ("", [("f", {"y": value})])


def test_a_text_of_an_enum_that_holds_the_mark_is_not_written(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["qwen coder"]
    function = of({"enum": ["a</parameter>b", "c"]})
    for value, allowed in (("a</parameter>b", False), ("a", False), ("c", True)):
        assert accepts(renderer, ToolUse((function,)), replied(renderer, [("f", {"x": value})])) is allowed
    with pytest.raises(InvalidRequest, match="which this base writes around arguments"):
        accepts(renderer, ToolUse((of({"const": "a</parameter>b"}),)), [])


def test_arguments_of_schemas_that_hold_besides_and_of_alternatives(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["glm"]
    parameters = {
        "properties": {"mode": {"type": "string"}},
        "allOf": [{"$ref": "#/$defs/base"}],
        "oneOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}}],
        "$defs": {"base": {"properties": {"n": {"type": "integer"}}, "required": ["n"]}},
    }

    def allowed(arguments: dict[str, Any]) -> bool:
        use = ToolUse((Function("f", parameters),), required=True)
        return accepts(renderer, use, replied(renderer, [("f", arguments)]))

    assert all(allowed(one) for one in ({"mode": "x", "n": 1, "a": 2}, {"n": 1, "b": "y"}, {"n": 1, "z": 1}))
    assert not any(allowed(one) for one in ({"mode": "x", "a": 2}, {"n": "x"}, {"n": 1, "a": "x"}))


def test_what_is_required_and_has_no_schema_is_written(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["minimax"]
    function = Function("f", {"properties": {}, "required": ["b"], "additionalProperties": {"type": "integer"}})
    for arguments, allowed in (({"b": 1}, True), ({}, False), ({"b": "x"}, False), ({"b": 1, "c": 2}, True)):
        tokens = replied(renderer, [("f", arguments)])
        assert accepts(renderer, ToolUse((function,), required=True), tokens) is allowed


@pytest.mark.parametrize(
    "reference", ["#/nowhere", "#/$defs/list/anyOf/7", "#anchor", "https://x.test/schema", "#/type"]
)
def test_a_reference_that_points_nowhere_is_refused_by_name(reference: str) -> None:
    parameters = {"type": "object", "properties": {"x": {"$ref": reference}}, "$defs": {"list": {"anyOf": [{}]}}}
    with pytest.raises(InvalidRequest, match=re.escape(repr(reference))) as refusal:
        Function("f", parameters).check_arguments()
    assert refusal.value.hint


@pytest.mark.parametrize("family", SEPARATE)
def test_large_tools_have_a_grammar_of_their_size(renderers: dict[str, ChatTemplateRenderer], family: str) -> None:
    renderer = renderers[family]
    form, split = renderer.tool_form, renderer.vocabulary.split
    many = {f"d{n}": {"type": "object", "properties": {"k": {"enum": [n]}}} for n in range(200)}
    properties = {f"p{n}": {"$ref": f"#/$defs/d{n}"} for n in range(200)}
    parameters = {"properties": properties, "$defs": many}
    written = grammar(form, ToolUse((Function("f", parameters),)), split)
    assert len(written) < 8 * len(json.dumps(parameters))
    words = [f"word number {n}" for n in range(3000)]
    tokens = replied(renderer, [("f", {"x": words[-1]})])
    assert accepts(renderer, ToolUse((of({"enum": words}),)), tokens)
    chain = {f"c{n}": {"anyOf": [{"$ref": f"#/$defs/c{n + 1}"}] * 3} for n in range(300)} | {"c300": {"const": "end"}}
    deep = of({"$ref": "#/$defs/c0"}, **{"$defs": chain})
    assert deep.arguments["x"].texts == ("end",)
    chain |= {f"c{n}": {"anyOf": [{"$ref": f"#/$defs/c{n + 1}"}]} for n in range(300, 2000)}
    with pytest.raises(InvalidRequest, match="more than 1000 references"):
        of({"$ref": "#/$defs/c0"}, **{"$defs": chain}).check_arguments()


# ---------------------------------------------------------------- the parser

TAGS = ToolForm(
    "<call>\n<function=",
    ">\n<parameter=",
    "\n</parameter>\n</function>\n</call>\n<call>\n<function=",
    "\n</parameter>\n</function>\n</call>",
    separate=SeparateArguments(
        ">\n",
        "\n</parameter>\n<parameter=",
        ">\n</function>\n</call>\n<call>\n<function=",
        ">\n</function>\n</call>",
    ),
)
NUMBERS = Function("f", {"properties": {"x": {"type": "string"}, "n": {"type": "integer"}}})


def test_an_argument_comes_as_soon_as_it_is_complete() -> None:
    parser = ToolCallParser(TAGS, (NUMBERS,))
    assert parser.push("Well. <call>\n<function=f") == ["Well."]
    assert parser.push(">\n<par") == []
    assert parser.push("ameter=x>\nBo") == [CallDelta(0, "f")]
    assert parser.push("nn\n</parameter>") == [CallDelta(0, arguments='{"x": "Bonn"')]
    assert parser.push("\n<parameter=n>\n1\n</parameter>\n<") == [CallDelta(0, arguments=', "n": 1')]
    assert not parser.finished
    assert parser.push("/fun") == [CallDelta(0, arguments="}")]
    assert parser.finished
    assert parser.push("ction>\n</call>\n<call>\n<function=f>\n</function") == [
        CallDelta(1, "f"),
        CallDelta(1, arguments="{}"),
    ]
    assert (parser.calls, parser.flush()) == (2, [])


def test_a_call_that_is_cut_off_is_not_complete() -> None:
    whole = "<call>\n<function=f>\n<parameter=x>\nBonn\n</parameter>\n</function>\n</call>"
    for length in range(len(whole)):
        parser = ToolCallParser(TAGS, (NUMBERS,))
        parts = parser.push(whole[:length]) + parser.flush()
        arguments = "".join(part.arguments for part in parts if isinstance(part, CallDelta))
        assert '{"x": "Bonn"}'.startswith(arguments)
        assert parser.finished is (arguments == '{"x": "Bonn"}')


def test_a_string_within_json_may_contain_what_ends_a_value() -> None:
    function = Function("f", {"properties": {"x": {"type": "array"}, "y": {"type": "string"}}})
    value = '[{"a": "}</parameter>"}]'
    whole = f"<call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n<parameter=y>\n[\n</parameter>\n</function>"
    for pieces in ([whole], list(whole)):
        parser = ToolCallParser(TAGS, (function,))
        assert read(parser, pieces) == ("", [("f", {"x": json.loads(value), "y": "["})])
        assert parser.finished


def test_an_argument_that_is_given_twice_counts_once() -> None:
    function = Function("f", {"type": "object"})
    twice = "<parameter=x>\n1\n</parameter>\n"
    parts = ToolCallParser(TAGS, (function,)).push(f"<call>\n<function=f>\n{twice}{twice}</function>")
    assert "".join(part.arguments for part in parts if isinstance(part, CallDelta)) == '{"x": 1}'


def test_a_call_without_arguments_may_end_with_its_name() -> None:
    form = ToolForm("@", "(", None, ";)", separate=SeparateArguments("=", ";,", "", ""))
    parser = ToolCallParser(form, (NUMBERS,))
    assert parser.push("@f") == []
    assert parser.flush() == [CallDelta(0, "f"), CallDelta(0, arguments="{}")]
    assert parser.finished
    assert read(ToolCallParser(form, (NUMBERS,)), list("@f(x=Bonn;,n=2;)")) == ("", [("f", {"x": "Bonn", "n": 2})])

"""The forms in which chat templates write calls of tools: learned, held to by a grammar, and found again in replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_bases import (
    CHANNELS,
    CUT_IDS,
    LEFT_OUT,
    NOTHING_MARKS,
    OWN_OBJECT,
    PRINTED,
    TEMPLATES,
    XML,
    save_tool_base,
)

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.data.tool_form import ToolForm
from fortwo.data.tool_function import Function
from fortwo.data.tool_grammar import ToolUse, grammar
from fortwo.data.tool_parser import CallDelta, ToolCallParser
from fortwo.errors import InvalidRequest
from fortwo.records import Example, Message

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER, SEARCH = Function("weather", CITY), Function("search", {"type": "object"})
OFFERED = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": CITY}}])
ONE = [("weather", {"city": 'B"o}n\\n\n'})]
TWO = [*ONE, ("search", {"a": [{"b": 1}], "c": None})]


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplateRenderer]:
    root = tmp_path_factory.mktemp("bases")
    return {name: ChatTemplateRenderer(save_tool_base(root / name, text)) for name, text in TEMPLATES.items()}


def history(calls: list[tuple[str, dict[str, Any]]], content: str = "") -> tuple[Message, ...]:
    written = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return (
        Message("user", "Rain?", tools=OFFERED),
        Message("assistant", content, tool_calls=json.dumps(written)),
    )


def replied(renderer: ChatTemplateRenderer, calls: list[tuple[str, dict[str, Any]]], content: str = "") -> list[int]:
    """The tokens of a reply that makes these calls, as the template writes it; the last one ends the turn."""
    ((tokens, supervised),) = renderer.training_rows(Example(history(calls, content)))
    return [token for token, learned in zip(tokens, supervised, strict=True) if learned]


def accepts(renderer: ChatTemplateRenderer, use: ToolUse, tokens: list[int]) -> bool:
    constraint = renderer.grammar_constraint(grammar(renderer.tool_form, use, renderer.vocabulary.split))
    for token in tokens:
        if not constraint.allowed()[token]:
            return False
        constraint.advance(token)
    return True


def read(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The text of a reply, and its calls."""
    text, calls = "", list[tuple[str, str]]()
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.flush():
        if isinstance(part, str):
            assert not calls
            text += part
        elif part.name:
            assert part.index == len(calls)
            calls.append((part.name, ""))
        else:
            name, before = calls.pop()
            calls.append((name, before + part.arguments))
    return text, [(name, json.loads(given)) for name, given in calls]


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_template_writes_is_allowed_and_read_back(
    renderers: dict[str, ChatTemplateRenderer], family: str
) -> None:
    renderer = renderers[family]
    for calls in [ONE] if family == "llama" else [ONE, TWO]:
        tokens = replied(renderer, calls)
        for required in (True, False):
            assert accepts(renderer, ToolUse((WEATHER, SEARCH), required=required), tokens)
        assert accepts(renderer, ToolUse((WEATHER, SEARCH), parallel=False), tokens) is (len(calls) == 1)
        stream = renderer.stream((), renderer.call_tokens)
        pieces = [*(stream.push(token) for token in tokens[:-1]), stream.flush()]
        parser = ToolCallParser(renderer.tool_form, (WEATHER, SEARCH))
        assert read(parser, pieces) == ("", calls)
        assert parser.finished


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_reply_is_held_to_the_functions_and_their_schemas(
    renderers: dict[str, ChatTemplateRenderer], family: str
) -> None:
    renderer = renderers[family]
    use = ToolUse((WEATHER,))
    assert accepts(renderer, use, [*renderer.encode_text("It rains. {} < [1]"), 2])
    assert not accepts(renderer, ToolUse((WEATHER,), required=True), renderer.encode_text("It rains."))
    assert not accepts(renderer, use, replied(renderer, [("weathers", {"city": "Bonn"})]))
    assert not accepts(renderer, use, replied(renderer, [("weather", {"town": "Bonn"})]))
    assert not accepts(renderer, use, replied(renderer, [("weather", {"city": "Bonn", "day": 1})]))
    assert not accepts(renderer, use, replied(renderer, [("weather", {})]))


def test_text_before_a_call_is_text(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["hermes"]
    tokens = replied(renderer, TWO, "Let me look.")
    assert accepts(renderer, ToolUse((WEATHER, SEARCH)), tokens)
    assert read(ToolCallParser(renderer.tool_form, (WEATHER, SEARCH)), [renderer.decode(tokens)]) == (
        "Let me look.",
        TWO,
    )


BARE = '{"name": "weather", "arguments": {"city": "Bonn"}}'


@pytest.mark.parametrize(
    ("family", "reply"),
    [
        ("hermes", BARE),
        ("hermes", "\n" + BARE.replace(": ", ":").replace("{", "{\n  ").replace("}}", "\n}\n}")),
        ("hermes", f"<tool_call>{BARE}</tool_call>"),
        ("hermes", f"<tool_call>\n\n{BARE.replace('{', '{ ')}\n</tool_call>\n<tool_call>{BARE}</tool_call>"),
        ("llama", BARE.replace("arguments", "parameters").replace('{"name": ', '{ "name":')),
        ("mistral", f'[TOOL_CALLS][{BARE[:-1]},"id":"abcdefgh1" }}]'),
        ("granite", f"<|tool_call|>[{BARE}, {BARE}]"),
        ("granite", f" [{BARE}]"),
        ("hermes", f"```json\n{BARE}\n```"),
        ("hermes", f"```json\n{BARE.replace('{', '{ ')}```"),
    ],
)
def test_white_space_of_the_json_is_free_and_small_models_leave_the_marker_out(
    renderers: dict[str, ChatTemplateRenderer], family: str, reply: str
) -> None:
    renderer = renderers[family]
    tokens = renderer.encode_text(reply)
    assert accepts(renderer, ToolUse((WEATHER,)), [*tokens, 2])
    text, calls = read(ToolCallParser(renderer.tool_form, (WEATHER, SEARCH)), list(reply))
    assert (text, calls[0]) == ("", ("weather", {"city": "Bonn"}))
    assert not accepts(renderer, ToolUse((WEATHER,)), renderer.encode_text(reply.replace("city", "town")))


@pytest.mark.parametrize(
    "reply", [f"It is {BARE}", BARE.replace("weather", "wether"), '```json\n{"name": "weather"}\n```']
)
def test_json_that_is_no_call_of_an_offered_function_is_text(
    renderers: dict[str, ChatTemplateRenderer], reply: str
) -> None:
    renderer = renderers["hermes"]
    assert accepts(renderer, ToolUse((WEATHER,)), [*renderer.encode_text(reply), 2])
    for pieces in ([reply], list(reply)):
        assert read(ToolCallParser(renderer.tool_form, (WEATHER,)), pieces) == (reply, [])


def test_a_reply_without_calls_may_be_held_to_a_schema(renderers: dict[str, ChatTemplateRenderer]) -> None:
    renderer = renderers["mistral"]
    use = ToolUse((WEATHER,), reply=json.dumps({"type": "object", "required": ["a"]}))
    assert accepts(renderer, use, [*renderer.encode_text('{"a": 1}'), 2])
    assert not accepts(renderer, use, renderer.encode_text("It rains."))
    assert accepts(renderer, use, replied(renderer, ONE))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (XML, "one by one cannot be learned: it writes the name or the value of an argument more than once"),
        (OWN_OBJECT, "one by one cannot be learned: it writes some values between other texts"),
        (CHANNELS, "writes more than the text of an answer"),
        (NOTHING_MARKS, "nothing in what it writes shows where a call begins"),
        (LEFT_OUT, "does not write the name of the function"),
        (TEMPLATES["llama"].replace("{% if tools %}", "{% if false %}"), "does not write the tools"),
        ("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATES["llama"], "refuses tools: no tools"),
        (TEMPLATES["llama"].replace("!= 1", "!= 0"), "refuses an assistant's call: one call"),
    ],
)
def test_a_template_whose_form_cannot_be_learned_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    renderer = ChatTemplateRenderer(save_tool_base(tmp_path, template))
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        _ = renderer.tool_form
    assert (refusal.value.param, bool(refusal.value.hint)) == ("tools", True)


def test_arguments_and_ids_are_handed_over_as_the_template_takes_them(
    renderers: dict[str, ChatTemplateRenderer],
) -> None:
    calls = [
        {"id": f"call_{name}{'0' * 20}", "type": "function", "function": {"name": name, "arguments": {"x": 1}}}
        for name in ("weather", "search")
    ]
    messages = [
        Message("user", "Rain?", tools=OFFERED),
        Message("assistant", "", tool_calls=json.dumps(calls)),
        Message("tool", "21", tool_call_id=calls[1]["id"]),
    ]
    assert '\n```json\n{"x": 1}\n```' in renderers["deepseek"].render(messages)
    written = renderers["mistral"].tool_form.messages(
        [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": calls[1]["id"]}]
    )
    ids = [call["id"] for call in written[0]["tool_calls"]]
    assert [len(id) for id in ids] == [9, 9]
    assert ids[0] != ids[1] == written[1]["tool_call_id"]


def test_templates_that_cut_ids_or_print_arguments(tmp_path: Path) -> None:
    cut = ChatTemplateRenderer(save_tool_base(tmp_path / "cut", CUT_IDS))
    assert cut.tool_form == ChatTemplateRenderer(save_tool_base(tmp_path / "exact", TEMPLATES["mistral"])).tool_form
    assert accepts(cut, ToolUse((WEATHER, SEARCH)), replied(cut, TWO))
    printed = ChatTemplateRenderer(save_tool_base(tmp_path / "printed", PRINTED))
    assert printed.tool_form.arguments_as_text
    assert '"arguments": {"city": "Bonn"}' in printed.render(history([("weather", {"city": "Bonn"})]))


def test_calls_and_results_without_ids_get_them_in_order() -> None:
    form = ToolForm("[", '"', None, "]", short_ids=True)
    call = {"function": {"name": "f", "arguments": {}}}
    said = [
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    written = form.messages(said)
    ids = [call["id"] for message in written for call in message.get("tool_calls", ())]
    assert len(set(ids)) == 3
    assert [message["tool_call_id"] for message in written if message["role"] == "tool"] == ids


# ---------------------------------------------------------------- parser

HERMES = ToolForm(
    '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>"
)
LLAMA = ToolForm('{"name": "', '", "parameters": ', None, "}")
NOTHING_BETWEEN = ToolForm("[TOOL_CALLS]", "", "[TOOL_CALLS]", "")  # a name and its arguments
ARGUMENTS = st.dictionaries(
    st.text(max_size=4), st.recursive(st.text(max_size=6) | st.integers(), st.lists), max_size=3
)


@given(
    st.data(),
    st.text(alphabet="ab <{\n", max_size=12),
    st.lists(ARGUMENTS, max_size=3),
    st.sampled_from([HERMES, LLAMA, NOTHING_BETWEEN]),
)
def test_a_reply_is_read_the_same_wherever_it_is_cut(
    data: st.DataObject, text: str, arguments: list[dict[str, Any]], form: ToolForm
) -> None:
    if form.between is None:
        arguments = arguments[:1]
        text = "" if arguments else text
    calls = [f"f{number}{form.middle}{json.dumps(given)}" for number, given in enumerate(arguments)]
    whole = text + (form.opening + (form.between or "").join(calls) + form.closing if calls else "")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    parser = ToolCallParser(form, [Function(f"f{number}", {}) for number in range(3)])
    said, found = read(parser, pieces)
    assert said == (text.rstrip() if calls else text)
    assert found == [(f"f{number}", given) for number, given in enumerate(arguments)]
    assert parser.finished is bool(calls)


def test_a_name_that_arrives_in_pieces_is_one_name_also_right_before_its_arguments() -> None:
    whole = '[TOOL_CALLS]weather{"city": "Bonn"}[TOOL_CALLS]search {}'
    assert read(ToolCallParser(NOTHING_BETWEEN, (WEATHER, SEARCH)), list(whole)) == (
        "",
        [("weather", {"city": "Bonn"}), ("search", {})],
    )


def test_parts_of_a_call_come_as_soon_as_they_are_there() -> None:
    parser = ToolCallParser(HERMES, (Function("f", {}), Function("g", {})))
    assert parser.push("Well. <tool_") == ["Well."]
    assert parser.push('call>\n{"name": "f", "argu') == []
    assert parser.push('ments": {"a": ') == [CallDelta(0, "f"), CallDelta(0, arguments='{"a": ')]
    assert parser.push("1}") == [CallDelta(0, arguments="1}")]
    assert parser.finished
    assert parser.push("}\n</tool_call>\n<tool_call>\n{") == []
    assert parser.push('"name": "g"') == []
    assert not parser.finished
    assert parser.calls == 1
    assert parser.flush() == []

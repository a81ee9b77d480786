"""Tools in requests for chat: what may be called, what is chosen, and what of it a base can be held to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from fortwo.data.json_schema import check_patterns
from fortwo.data.messages import DEPTH, check_depth, writable, wrong
from fortwo.data.row_formats import without_nulls
from fortwo.data.tool_form import ToolForm
from fortwo.data.tool_function import Function
from fortwo.data.tool_grammar import ToolUse, grammar
from fortwo.errors import InvalidRequest, all_of
from fortwo.records import Json, Message
from fortwo.server.openai.parameters import Strict

if TYPE_CHECKING:
    from fortwo.data.chat_template import ChatTemplateRenderer

TOOLS = 128  # as in OpenAI's API
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


def _parameters(schema: Json) -> Json:
    check_depth(schema, DEPTH - 2)  # the tool and its function are around it
    writable(schema)
    return schema


class FunctionDefinition(Strict):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: Annotated[Json, AfterValidator(_parameters)] | None = Field(
        None, description="A JSON Schema of an object. Without it there are no arguments."
    )
    strict: bool | None = Field(
        None,
        description="With true, a schema that cannot be enforced in full is refused. Otherwise keywords that cannot be "
        "enforced are left out.",
    )

    def function(self) -> Function:
        none: Json = {"properties": {}}
        return Function(self.name, none if self.parameters is None else self.parameters, bool(self.strict))


class Tool(Strict):
    """A function that the assistant may call. The chat template sees it as it was written, without `strict`."""

    type: Literal["function"]
    function: FunctionDefinition
    _given: Json = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, handler: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = handler(given)
        tool._given = given if isinstance(given, dict) else given._given
        return tool

    def shown(self) -> Json:
        """As a row for training has it."""
        tool: Json = without_nulls(self._given)
        return tool | {"function": {key: value for key, value in tool["function"].items() if key != "strict"}}


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=TOOLS)


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice(given: Any) -> Any:
    """Says in one error what a choice may be, instead of in one for each of its forms."""
    kind = given.get("type") if isinstance(given, dict) else None
    if isinstance(given, NamedTool | AllowedToolsChoice) or given in (None, "none", "auto", "required"):
        return given
    if kind == "function":
        return NamedTool.model_validate(given)
    if kind == "allowed_tools":
        return AllowedToolsChoice.model_validate(given)
    raise wrong(
        "it is no choice of tools",
        'Set it to "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}.',
    )


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice, BeforeValidator(_choice)]


def tool_use(tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool, reply: str | None) -> ToolUse | None:
    """What a reply may call; None for nothing. reply: the JSON Schema of a reply without calls, as text. Raises
    InvalidRequest for tools of the same name, and for a choice of one that there is not."""
    errors = [*_repeated(tools), *_unknown(tools, choice)]
    if errors:
        raise all_of(errors)
    if not tools or choice == "none":
        return None
    names = _chosen(choice)
    required = choice == "required" or isinstance(choice, NamedTool)
    if isinstance(choice, AllowedToolsChoice):
        required = choice.allowed_tools.mode == "required"
    functions = [tool.function.function() for tool in tools]
    allowed = tuple(function for function in functions if names is None or function.name in names)
    return ToolUse(allowed, required, parallel and not isinstance(choice, NamedTool), reply)


def _chosen(choice: ToolChoice | None) -> list[str] | None:
    """The names that a choice gives; None for all tools."""
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    if isinstance(choice, AllowedToolsChoice):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return None


def _repeated(tools: Sequence[Tool]) -> Iterator[InvalidRequest]:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in seen:
            yield InvalidRequest(
                f"tools[{index}].function.name = {tool.function.name!r} is the name of an earlier tool too.",
                param=f"tools[{index}].function.name",
                hint="Give each tool a name of its own.",
            )
        seen.add(tool.function.name)


def _unknown(tools: Sequence[Tool], choice: ToolChoice | None) -> Iterator[InvalidRequest]:
    offered = [tool.function.name for tool in tools]
    among = f"Choose one of {', '.join(offered)}." if offered else "Give tools, or leave tool_choice out."
    if choice == "required" and not tools:
        yield InvalidRequest("tool_choice = 'required', but there are no tools.", param="tool_choice", hint=among)
    for name in _chosen(choice) or ():
        if name not in offered:
            yield InvalidRequest(
                f"tool_choice names {name!r}, which is not among the tools.", param="tool_choice", hint=among
            )


def reply_grammar(renderer: ChatTemplateRenderer, tools: Sequence[Tool], use: ToolUse) -> str:
    """The grammar of replies that use tools so. Raises InvalidRequest for a base whose template has no form for calls,
    and for parameters that cannot be enforced, all of them in one error."""
    form = renderer.tool_form
    if use.reply is not None and not use.required and not form.marker:
        raise InvalidRequest(
            "response_format and tools cannot be combined on this base, because nothing marks a call in its replies.",
            param="response_format",
            hint='Leave one of them out, or set tool_choice to "required" or "none".',
        )
    if errors := list(_refused_schemas(renderer, tools)):
        raise all_of(errors)
    return grammar(form, use, renderer.vocabulary.split)


def _refused_schemas(renderer: ChatTemplateRenderer, tools: Sequence[Tool]) -> Iterator[InvalidRequest]:
    """What is wrong with each tool's parameters by themselves."""
    for index, tool in enumerate(tools):
        at, function = f"tools[{index}].function.parameters", tool.function.function()
        kind = function.parameters.get("type", "object")
        try:
            if kind != "object":
                raise InvalidRequest(
                    f"{at}.type = {kind!r}, but arguments are an object.",
                    param=f"{at}.type",
                    hint='Write {"type": "object", "properties": {...}}.',
                )
            check_patterns(function.parameters, at)
            alone = ToolUse((function,), required=True)
            form, vocabulary = renderer.tool_form, renderer.vocabulary
            as_whole = ToolForm("{", '"', None, "}")
            vocabulary.grammar_constraint(grammar(as_whole, alone, lambda text: [text]), at)
            if form.separate is not None:
                vocabulary.grammar_constraint(grammar(form, alone, vocabulary.split), at)
        except InvalidRequest as error:
            yield InvalidRequest(
                error.message if at in error.message else f"{at} of {function.name!r}: {error.message}",
                param=at if error.param == "tools" else error.param,
                hint=error.hint,
            )


def check_calls(messages: Sequence[Message]) -> None:
    """Raises InvalidRequest for calls and results of tools that stand where they cannot, all of them in one error."""
    errors: list[InvalidRequest] = []
    called: set[str] = set()
    any_call = False
    for index, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            errors.append(
                InvalidRequest(
                    f"messages[{index}].role = {message.role!r}: the message has tool_calls.",
                    param=f"messages[{index}].tool_calls",
                    hint="Only the assistant calls tools: move the calls to its message.",
                )
            )
        if message.role == "tool" and not any_call:
            errors.append(
                InvalidRequest(
                    f"messages[{index}].role = 'tool', but no message before it has tool_calls.",
                    param=f"messages[{index}].role",
                    hint="Put the assistant's message with the tool_calls before it.",
                )
            )
        elif message.role == "tool" and message.tool_call_id and message.tool_call_id not in called:
            errors.append(
                InvalidRequest(
                    f"messages[{index}].tool_call_id = {message.tool_call_id!r} is the id of no call before it.",
                    param=f"messages[{index}].tool_call_id",
                    hint="Give the id of the call that it answers.",
                )
            )
        any_call |= bool(message.tool_calls)
        called |= {call.get("id", "") for call in json.loads(message.tool_calls or "[]")}
    if errors:
        raise all_of(errors)

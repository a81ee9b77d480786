"""The rows of datasets that say which answers are preferred, as pydantic models: TRL's, OpenAI's, LLaMA-Factory's.

A text is a message: the prompt is the user's, and an answer is the assistant's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Annotated, Any, Self

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fortwo.data.messages import Tools, wrong
from fortwo.data.rows import (
    EMPTY,
    ChatMessage,
    Flag,
    Row,
    ShareTurn,
    Text,
    Unicode,
    asked,
    is_conversation,
    with_tools,
)
from fortwo.records import Example, Message

LABELS = ("label", "kto_tag")  # TRL's name and LLaMA-Factory's
_SAME_FORM = "Write both as texts, or both as lists of messages."
_NO_PROMPT = 'Add what the user said as "prompt", or leave the row out.'
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):\s*")  # of a conversation as Anthropic's HH-RLHF writes it
_HUMAN = re.compile(r"\s*Human:")


def _turns(speaker: str, keys: tuple[str, str] = ("role", "content")) -> BeforeValidator:
    """Makes a list of messages of a text, which is what the speaker says, and of a single message."""

    def turns(given: Any) -> Any:
        if isinstance(given, str):
            if not given.strip():
                raise ValueError(EMPTY)
            return [dict(zip(keys, (speaker, given), strict=True))]
        if isinstance(given, list) and not given:
            raise ValueError(EMPTY)
        return [given] if isinstance(given, dict) else given

    return BeforeValidator(turns)


def _label(given: Any) -> Any:
    if not isinstance(given, bool):
        raise wrong(
            "the label is neither true nor false",
            "Write true where the answer is desirable, and false where it is not.",
        )
    return given


Prompt = Annotated[list[ChatMessage], _turns("user")]
Answer = Annotated[list[ChatMessage], _turns("assistant")]
ShareAnswer = Annotated[list[ShareTurn], _turns("gpt", ("from", "value"))]
Label = Annotated[bool, BeforeValidator(_label), Field(validation_alias=AliasChoices(*LABELS))]
Turns = Sequence[ChatMessage] | Sequence[ShareTurn]


class PairRow(Row):
    """TRL's row of a preference. The prompt may be given by itself, or as what both answers begin with."""

    tools: Tools = Field(default_factory=list)
    prompt: Prompt = Field(default_factory=list)
    chosen: Answer
    rejected: Answer

    @model_validator(mode="before")
    @classmethod
    def _with_prompt(cls, given: Any) -> Any:
        """The row with its prompt apart from its answers."""
        if not isinstance(given, dict):
            return given
        chosen, rejected = given.get("chosen"), given.get("rejected")
        if isinstance(chosen, str) and isinstance(rejected, str):
            return given if "prompt" in given else given | _apart(_said(chosen), _said(rejected))
        if {type(chosen), type(rejected)} == {str, list}:
            one, other = ("a text" if isinstance(one, str) else "a list of messages" for one in (chosen, rejected))
            raise wrong(f"chosen is {one} and rejected is {other}", _SAME_FORM)
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            return given
        return given | _with_conversations(given.get("prompt"), chosen, rejected)

    @model_validator(mode="after")
    def _compared(self) -> Self:
        _check_pair(self.prompt, self.chosen, self.rejected)
        return self

    def example(self, line: int) -> Example:
        return _pair(self.prompt, self.chosen, self.rejected, self.tools, line)


class _Input(Row):
    messages: Prompt
    tools: Tools = Field(default_factory=list)
    parallel_tool_calls: Flag = None


class PreferredRow(Row):
    """OpenAI's row of a preference."""

    prompt: _Input = Field(alias="input")
    chosen: Answer = Field(alias="preferred_output")
    rejected: Answer = Field(alias="non_preferred_output")

    @model_validator(mode="after")
    def _compared(self) -> Self:
        _check_pair(self.prompt.messages, self.chosen, self.rejected)
        return self

    def example(self, line: int) -> Example:
        return _pair(self.prompt.messages, self.chosen, self.rejected, self.prompt.tools, line)


class SharePairRow(Row):
    """LLaMA-Factory's row of a preference in ShareGPT's form. `system`, if it is given, becomes the first message."""

    id: Unicode | int | None = None
    tools: Tools = Field(default_factory=list)
    system: Unicode = ""
    prompt: list[ShareTurn] = Field(alias="conversations")
    chosen: ShareAnswer
    rejected: ShareAnswer

    @model_validator(mode="after")
    def _compared(self) -> Self:
        _check_system(self.system, self.prompt)
        _check_pair(self.prompt, self.chosen, self.rejected)
        return self

    def example(self, line: int) -> Example:
        return _pair(self.prompt, self.chosen, self.rejected, self.tools, line, self.system)


class InstructionPairRow(Row):
    """LLaMA-Factory's row of a preference in Alpaca's form."""

    instruction: Text
    input: Unicode = ""
    chosen: Answer
    rejected: Answer

    @model_validator(mode="after")
    def _compared(self) -> Self:
        _check_pair(self._prompt, self.chosen, self.rejected)
        return self

    @property
    def _prompt(self) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=asked(self.instruction, self.input))]

    def example(self, line: int) -> Example:
        return _pair(self._prompt, self.chosen, self.rejected, [], line)


class LabelledRow(Row):
    """TRL's row of one answer that is desirable or not, as KTO learns from."""

    tools: Tools = Field(default_factory=list)
    prompt: Prompt
    completion: Answer
    label: Label

    @model_validator(mode="after")
    def _answered(self) -> Self:
        _check_answer("completion", self.prompt, self.completion)
        return self

    def example(self, line: int) -> Example:
        return _labelled(self.prompt, self.completion, self.tools, line, self.label)


class InstructionLabelledRow(Row):
    """LLaMA-Factory's labelled row in Alpaca's form."""

    instruction: Text
    input: Unicode = ""
    output: Text
    label: Label

    def example(self, line: int) -> Example:
        whole = (Message("user", asked(self.instruction, self.input)), Message("assistant", self.output))
        return Example(whole, line, label=self.label)


class ChatLabelledRow(Row):
    """LLaMA-Factory's labelled row in OpenAI's form: the last message is the answer."""

    tools: Tools = Field(default_factory=list)
    turns: Annotated[list[ChatMessage], AfterValidator(is_conversation)] = Field(alias="messages")
    label: Label

    @model_validator(mode="after")
    def _answered(self) -> Self:
        _check_answer("the last message", self.turns[:-1], self.turns[-1:])
        return self

    def example(self, line: int) -> Example:
        return _labelled(self.turns[:-1], self.turns[-1:], self.tools, line, self.label)


class ShareLabelledRow(Row):
    """The same in ShareGPT's form. `system`, where it is given, becomes the first message."""

    id: Unicode | int | None = None
    tools: Tools = Field(default_factory=list)
    system: Unicode = ""
    turns: Annotated[list[ShareTurn], AfterValidator(is_conversation)] = Field(alias="conversations")
    label: Label

    @model_validator(mode="after")
    def _answered(self) -> Self:
        _check_system(self.system, self.turns)
        _check_answer("the last message", self.turns[:-1], self.turns[-1:])
        return self

    def example(self, line: int) -> Example:
        return _labelled(self.turns[:-1], self.turns[-1:], self.tools, line, self.label, self.system)


# ---------------------------------------------------------------- the prompt of a row that does not name it


def _said(text: str) -> list[Any] | str:
    """The messages of a transcript with the turns "Human:" and "Assistant:"; any other text as it is."""
    if not _HUMAN.match(text):
        return text
    parts = _TRANSCRIPT.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    *earlier, last = parts[1::2]
    said = [*(what.rstrip() for what in earlier), last]
    return [{"role": roles[who], "content": what} for who, what in zip(parts[::2], said, strict=True)]


def _apart(chosen: list[Any] | str, rejected: list[Any] | str) -> dict[str, Any]:
    """The prompt that two answers begin with, and the rest of each. Of texts that is what they have in common, up to
    the blank before they differ."""
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if isinstance(chosen, str) or isinstance(rejected, str):
        blank = 0 < shared < min(len(chosen), len(rejected)) and chosen[shared - 1] == " "
        shared -= blank
    else:
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    prompt = chosen[:shared]
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise wrong("there is no prompt, and the two answers begin with nothing that could be one", _NO_PROMPT)
    return {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _with_conversations(prompt: Any, chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    """What changes in a row whose answers are lists of messages. They may repeat the prompt."""
    first = [answer[0] for answer in (chosen, rejected) if answer]
    begins = [isinstance(message, dict) and message.get("role") != "assistant" for message in first]
    if prompt is None:
        return _apart(chosen, rejected) if len(first) == 2 else {}
    if len(first) < 2 or not all(begins):
        return {}
    found = _apart(chosen, rejected)
    same = ([prompt] if isinstance(prompt, dict) else prompt) == found["prompt"]
    if isinstance(prompt, str):
        same = any(isinstance(one, dict) and one.get("content") == prompt for one in found["prompt"])
    if not same:
        raise wrong("the answers begin with another prompt than the row's own", "Give only the answers, or no prompt.")
    return found


# ---------------------------------------------------------------- checks


def _check_system(system: str, turns: Sequence[ShareTurn]) -> None:
    if system and turns and turns[0].role == "system":
        raise wrong("the row has a system message, and so have its conversations", "Leave one of the two.")


def _check_pair(prompt: Turns, chosen: Turns, rejected: Turns) -> None:
    """Raises for answers that do not follow the prompt, or that are the same."""
    _check_answer("chosen", prompt, chosen)
    _check_answer("rejected", prompt, rejected)
    one, other = (
        [(turn.role, turn.content.strip(), turn.tool_calls) for turn in turns] for turns in (chosen, rejected)
    )
    if one == other:
        raise wrong("the chosen answer and the rejected one are the same", "Change one of them, or leave the row out.")


def _check_answer(name: str, prompt: Turns, answer: Turns) -> None:
    if any(turn.weight is not None for turn in (*prompt, *answer)):
        raise wrong("a message has a weight", "Leave it out: the answers of this row are compared as a whole.")
    if not prompt:
        raise wrong("the prompt is empty", _NO_PROMPT)
    if prompt[-1].role == "assistant":
        raise wrong("the prompt ends with the assistant's message", "End it with what the answer replies to.")
    if answer[0].role != "assistant":
        raise wrong(f"{name} begins with the role {answer[0].role}", "Begin it with the assistant's message.")
    try:
        is_conversation([*prompt, *answer])
    except PydanticCustomError as error:
        told = error.context or {}
        raise wrong(f"with {name}, {told['message']}", told["hint"]) from None


def _conversation(prompt: Turns, answer: Turns, system: str) -> tuple[Message, ...]:
    """The conversation, of which only the answer is learned."""
    said = [turn.message() for turn in prompt]
    said = [replace(message, weight=0) if message.role == "assistant" else message for message in said]
    opening = (Message("system", system),) if system else ()
    return (*opening, *said, *(turn.message() for turn in answer))


def _pair(
    prompt: Turns, chosen: Turns, rejected: Turns, tools: list[dict[str, Any]], line: int, system: str = ""
) -> Example:
    whole, other = (with_tools(_conversation(prompt, answer, system), tools) for answer in (chosen, rejected))
    return Example(whole, line, rejected=other)


def _labelled(
    prompt: Turns, answer: Turns, tools: list[dict[str, Any]], line: int, label: bool, system: str = ""
) -> Example:
    return Example(with_tools(_conversation(prompt, answer, system), tools), line, label=label)

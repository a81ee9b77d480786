"""The rows of datasets that say which answers are preferred, as pydantic models: TRL's, OpenAI's and KTO's.

A text is a message: the prompt is the user's, and an answer is the assistant's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fortwo.data.messages import Tools, wrong
from fortwo.data.rows import EMPTY, ChatMessage, Flag, Row, is_conversation, with_tools
from fortwo.records import Example, Message

_SAME_FORM = "Write both as texts, or both as lists of messages."
_NO_PROMPT = 'Add what the user said as "prompt", or leave the row out.'
_TRANSCRIPT = re.compile(r"\s*\n\n(Human|Assistant):\s*")  # of a conversation as Anthropic's HH-RLHF writes it
_HUMAN = re.compile(r"\s*Human:")


def _turns(role: Literal["user", "assistant"]) -> BeforeValidator:
    """Makes a list of messages of a text, which is what `role` says, and of a single message."""

    def turns(given: Any) -> Any:
        if isinstance(given, str):
            if not given.strip():
                raise ValueError(EMPTY)
            return [{"role": role, "content": given}]
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
Label = Annotated[bool, BeforeValidator(_label)]


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
        whole = with_tools(_conversation(self.prompt, self.completion), self.tools)
        return Example(whole, line, label=self.label)


# ---------------------------------------------------------------- the prompt of a row that does not name it


def _said(text: str) -> list[Any] | str:
    """The messages of a transcript with the turns "Human:" and "Assistant:"; any other text as it is."""
    if not _HUMAN.match(text):
        return text
    parts = _TRANSCRIPT.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": what} for who, what in zip(parts[::2], parts[1::2], strict=True)]


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


def _check_pair(prompt: list[ChatMessage], chosen: list[ChatMessage], rejected: list[ChatMessage]) -> None:
    """Raises for answers that do not follow the prompt, or that are the same."""
    _check_answer("chosen", prompt, chosen)
    _check_answer("rejected", prompt, rejected)
    one, other = (
        [(turn.role, turn.content.strip(), turn.tool_calls) for turn in turns] for turns in (chosen, rejected)
    )
    if one == other:
        raise wrong("the chosen answer and the rejected one are the same", "Change one of them, or leave the row out.")


def _check_answer(name: str, prompt: list[ChatMessage], answer: list[ChatMessage]) -> None:
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


def _conversation(prompt: Sequence[ChatMessage], answer: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The conversation, of which only the answer is learned."""
    asked = [turn.message() for turn in prompt]
    asked = [replace(message, weight=0) if message.role == "assistant" else message for message in asked]
    return (*asked, *(turn.message() for turn in answer))


def _pair(
    prompt: Sequence[ChatMessage],
    chosen: Sequence[ChatMessage],
    rejected: Sequence[ChatMessage],
    tools: list[dict[str, Any]],
    line: int,
) -> Example:
    whole, other = (with_tools(_conversation(prompt, answer), tools) for answer in (chosen, rejected))
    return Example(whole, line, rejected=other)

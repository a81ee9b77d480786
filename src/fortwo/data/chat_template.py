"""Turns conversations into token ids and back, with the model's own tokenizer and chat template.

Training and serving call the same functions, so a training row has exactly the tokens that serving would send.

Text that people wrote is never read as a control token: when a user types "<|im_end|>", the model sees those ten
characters. Two steps ensure this. Before the template runs, control tokens that are spelled out in a message are
replaced by placeholders that nobody can guess. After it ran, every control token in the text was written by the
template: it gets a private name, the placeholders become plain text again, and a copy of the tokenizer that knows the
control tokens only by their private names encodes the whole text in one call. Ids, merges and flags stay the same.

The template decides about BOS; none is added here, so there is never a second one. Templates of models that can think
are called with `enable_thinking=False`, in training and in serving.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import string
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fortwo.data.json_constraint import JsonConstraint, Vocabulary
from fortwo.errors import InvalidDataset, InvalidRequest, UnsupportedModel
from fortwo.records import Example, Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For models without a chat template: "User: ...", "Assistant: ...", and the model's eos token after each answer."""

# First characters of a message that some pre-tokenizers merge with what the template wrote before them.
_OPENINGS = ("", "\n\n", " a", "\na", "\n\na", "\ta", "'s", "é", "中", "🙂", *string.printable)


class ChatTemplateRenderer:
    """Tokenizer and chat template of one base model, read from `directory` alone.

    stop_ids: tokens that end a reply: the end-of-turn token of the template, and every eos that the model declares.
    Raises UnsupportedModel for a tokenizer that cannot be read and a template that does not close assistant turns.
    """

    stop_ids: frozenset[int]

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        self._tokenizer = _load(self._directory)
        self._backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._tokenizer.added_tokens_decoder.items()
        controls = {token.content: number for number, token in added if token.special}
        controls |= zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True)
        nonce = secrets.token_hex(16)
        private = {text: f"<|{nonce}.{number}|>" for text, number in controls.items()}
        self._placeholders = {text: f"{nonce}-{number}-" for text, number in controls.items()}
        self._replacements = private | {placeholder: text for text, placeholder in self._placeholders.items()}
        self._controls = _any_of(self._placeholders)
        self._replaced = _any_of(self._replacements)
        self._encoder = _rename_tokens(self._backend, private)
        assert all(self._encoder.token_to_id(private[text]) == number for text, number in controls.items())
        has_bos = self._tokenizer("x")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        self._bos = [self._tokenizer.bos_token_id] if has_bos else []
        self._eos = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        self.stop_ids = frozenset({*self._declared_eos(), self._end_of_turn(frozenset(controls.values()))})

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the conversation and of the generation prompt. Raises InvalidRequest when the template refuses."""
        return self._encode(self._render(messages, generation=True))

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a raw prompt without a template. Control tokens in the text are read as such, because callers write
        the template themselves. The tokenizer's BOS is added unless the text begins with it."""
        plain: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        has_bos = plain[:1] == [self._tokenizer.bos_token_id]
        return plain if has_bos else list(self._backend.encode(text).ids)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation that ends with the assistant's answer, and for each whether it has loss.

        The tokens are exactly `encode_prompt(messages[:-1])` without loss, and the answer with its end-of-turn token.
        """
        assert messages[-1].role == "assistant"
        prompt, answer = self._turn(messages)
        ends = [i for i, token in enumerate(answer) if token in self.stop_ids]
        if not ends:
            raise UnsupportedModel(
                f"the chat template in {self._directory} does not end this answer with an end-of-turn token",
                hint="Use a chat template that closes every assistant turn.",
            )
        answer = answer[: ends[0] + 1]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def training_rows(self, example: Example) -> list[tuple[list[int], list[bool]]]:
        """The training rows of one example: tokens, and for each whether it has loss.

        Every answer of weight 1 follows exactly the prompt that serving would give it. One row is enough when the
        template writes the beginning of a conversation the same way whatever follows. When it does not (some templates
        drop the reasoning of earlier turns), an answer that cannot share a row gets its own.
        """
        if example.text is not None:
            return [self._document(example.text)]
        rows: list[tuple[list[int], list[bool]]] = []
        for end, message in enumerate(example.messages, 1):
            if message.role == "assistant" and message.weight:
                tokens, supervised = self.encode_conversation(example.messages[:end])
                if rows and tokens[: len(rows[-1][0])] == rows[-1][0]:
                    earlier = rows.pop()[1]
                    supervised[: len(earlier)] = earlier
                rows.append((tokens, supervised))
        return rows

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without control tokens."""
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def dataset_rows(self, example: Example) -> list[tuple[list[int], list[bool]]]:
        """`training_rows` of a dataset's example. Raises InvalidDataset naming the line if the template refuses it."""
        try:
            return self.training_rows(example)
        except InvalidRequest as error:
            raise InvalidDataset(
                f"line {example.line}: {error.message}", param="dataset", hint=error.hint, code=error.code
            ) from None

    def decode_with_control_tokens(self, tokens: Sequence[int]) -> str:
        """Text of tokens with control tokens written out. It is for display only and must not be encoded again."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def message_ends(self, messages: Sequence[Message], tokens: Sequence[int]) -> list[int]:
        """The index at which each message ends in a row of `training_rows`, up to the first whose end is unknown."""
        ends: list[int] = []
        for end in range(1, len(messages) + 1):
            try:
                beginning = self._encode(self._render(messages[:end], generation=False))
            except InvalidRequest:  # the template requires an answer to every question
                break
            if list(tokens[: len(beginning)]) != beginning[: len(tokens)]:
                break
            ends.append(min(len(beginning), len(tokens)))
        return ends

    def stream(self, context: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for one reply. context: tokens whose text the reply continues."""
        return Detokenizer(self, context)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Built on first use, which takes a quarter of a second for 50,000 tokens."""
        return Vocabulary(self._backend, self.stop_ids)

    def constraint(self, schema: str) -> JsonConstraint:
        """A constraint for one reply. Raises InvalidRequest for a schema that is invalid or cannot be enforced."""
        return self.vocabulary.constraint(schema)

    @cached_property
    def shared_prefix(self) -> list[int]:
        """Tokens with which every single-turn conversation without a system message starts."""
        prompts = [self.encode_prompt([Message("user", opening)]) for opening in _OPENINGS]
        first, last = min(prompts), max(prompts)
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        return [token for token, _ in equal]

    def _document(self, text: str) -> tuple[list[int], list[bool]]:
        """Plain text between the model's bos, if its tokenizer writes one, and its eos. The first token has no loss,
        because nothing predicts it."""
        tokens = [*self._bos, *self._encode(text), *self._eos]
        return tokens, [False] + [True] * (len(tokens) - 1)

    def _turn(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and tokens of everything that the template writes after it."""
        opening = self._render(messages[:-1], generation=True)
        complete = self._render(messages, generation=False)
        if not complete.startswith(opening):
            raise UnsupportedModel(
                f"the chat template in {self._directory} renders a finished conversation differently from the prompt "
                "that asks for its last answer, so training would not match serving",
                hint="Use a chat template whose generation prompt is the beginning of the assistant's turn.",
            )
        prompt, tokens = self._encode(opening), self._encode(complete)
        if tokens[: len(prompt)] == prompt:
            return prompt, tokens[len(prompt) :]
        # The answer's first characters merge with the prompt's last ones (an answer may begin with a line break).
        # Serving encodes the prompt alone, so the two are encoded apart here as well.
        return prompt, self._encode(complete[len(opening) :])

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        """The template's text, with control tokens under their private names."""
        hidden = [self._hide_message(message, index) for index, message in enumerate(messages)]
        tools = self._hide_all(json.loads(messages[0].tools), "tools") if messages and messages[0].tools else None
        try:
            text = self._apply(hidden, tools, generation)
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}",
                param="messages",
                hint="Change the order or the roles of the messages.",
            ) from None
        self._check_written(text, hidden, tools, generation)
        return self._replaced.sub(lambda match: self._replacements[match[0]], text)

    def _apply(self, hidden: list[dict[str, Any]], tools: Any, generation: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                hidden, tools=tools, tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
        )

    def _check_written(self, text: str, hidden: list[dict[str, Any]], tools: Any, generation: bool) -> None:
        """Raises InvalidRequest for a template that writes the same text without the tools, their calls or their
        results."""
        without_calls = [{key: value for key, value in one.items() if key != "tool_calls"} for one in hidden]
        without_results = [one | ({"content": ""} if one["role"] == "tool" else {}) for one in hidden]
        for what, there, messages, offered in (
            ("the tools", tools is not None, hidden, None),
            ("the calls of tools", without_calls != hidden, without_calls, tools),
            ("the results of tools", without_results != hidden, without_results, tools),
        ):
            if not there:
                continue
            with suppress(TemplateError):  # it cannot do without, so it reads them
                if self._apply(messages, offered, generation) == text:
                    raise InvalidRequest(
                        f"the chat template in {self._directory} does not write {what} of this conversation",
                        param="messages",
                        hint="Train on a base whose template knows tools, or write in words what was called and what "
                        "came back.",
                    )

    def _hide_message(self, message: Message, index: int) -> dict[str, Any]:
        """The message as the template gets it."""
        at = f"messages[{index}]"
        hidden: dict[str, Any] = {"role": message.role, "content": self._hide(message.content, f"{at}.content")}
        for key in ("name", "tool_call_id"):
            if value := getattr(message, key):
                hidden[key] = self._hide(value, f"{at}.{key}")
        if message.tool_calls:
            hidden["tool_calls"] = self._hide_all(json.loads(message.tool_calls), f"{at}.tool_calls")
        return hidden

    def _hide_all(self, value: Any, param: str) -> Any:
        """A value of JSON, with the texts in it hidden."""
        if isinstance(value, str):
            return self._hide(value, param)
        if isinstance(value, dict):
            return {self._hide(key, param): self._hide_all(inner, param) for key, inner in value.items()}
        return [self._hide_all(inner, param) for inner in value] if isinstance(value, list) else value

    def _hide(self, content: str, param: str) -> str:
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param} is not valid Unicode: half a surrogate pair at character {error.start + 1}",
                param=param,
                hint="Send the text as UTF-8.",
            ) from None
        return self._controls.sub(lambda control: self._placeholders[control[0]], content)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def _declared_eos(self) -> set[int]:
        declared = {self._tokenizer.eos_token_id} - {None}
        path = self._directory / "generation_config.json"
        if path.exists():
            ids = json.loads(path.read_text("utf-8")).get("eos_token_id")
            declared |= set(ids) if isinstance(ids, list) else {ids} - {None}
        return declared

    def _end_of_turn(self, controls: frozenset[int]) -> int:
        _, answer = self._turn([Message("user", "Hello"), Message("assistant", "Hello")])
        for token in answer:
            if token in controls:
                return token
        raise UnsupportedModel(
            f"the chat template in {self._directory} does not end the assistant's turn with a control token, "
            "so a reply would never stop",
            hint="Write the eos token after an assistant message in the chat template.",
        )


class Detokenizer:
    """Text of a reply while it is generated. The bytes of an incomplete character wait until it is complete."""

    def __init__(self, renderer: ChatTemplateRenderer, context: Sequence[int] = ()) -> None:
        self._renderer = renderer
        self._window = list(context)  # the tokens emitted last, as context for the decoder, then the pending ones
        self._emitted = len(context)  # how many tokens of the window were emitted

    def push(self, token: int) -> str:
        """The text that this token completes; it may be empty."""
        self._window.append(token)
        new = self._pending()
        if not new or new.endswith("\ufffd"):
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return new

    def flush(self) -> str:
        """The rest of the text when the reply has ended; an incomplete character becomes U+FFFD."""
        new = self._pending()
        self._window, self._emitted = [], 0
        return new

    def _pending(self) -> str:
        emitted = self._renderer.decode(self._window[: self._emitted])
        return self._renderer.decode(self._window)[len(emitted) :]


def _load(directory: Path) -> PreTrainedTokenizerFast:
    if not (directory / "tokenizer.json").is_file():
        raise UnsupportedModel(
            f"{directory} has no tokenizer.json",
            hint="Save the tokenizer there with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...).",
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a file it cannot read
        raise UnsupportedModel(
            f"{directory / 'tokenizer.json'} cannot be read: {error}", hint="Restore the model's tokenizer files."
        ) from error
    if tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise UnsupportedModel(
                f"{directory} has neither a chat template nor an eos token, so a reply would never stop",
                hint="Name the eos_token in tokenizer_config.json.",
            )
        has_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if has_bos else "") + PLAIN_TEMPLATE
    return tokenizer


def _rename_tokens(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy of the tokenizer with some tokens renamed. It adds no special tokens, and neither truncates nor pads."""
    spec = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(spec))


def _any_of(texts: dict[str, str]) -> re.Pattern[str]:
    """A pattern that matches the longest of the texts, and nothing when there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")

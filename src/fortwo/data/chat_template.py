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
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fortwo.data.detokenizer import Detokenizer
from fortwo.data.json_constraint import JsonConstraint, Vocabulary
from fortwo.data.template_environment import ChatTemplate, TemplateFailure, TemplateRefusal
from fortwo.data.tokenizer_files import any_of, declared_eos, embedding_rows, load_tokenizer, rename_tokens
from fortwo.data.tool_form import ToolForm
from fortwo.data.tool_probes import UnknownForm, learn_form
from fortwo.errors import InvalidDataset, InvalidRequest, UnsupportedModel
from fortwo.hub.template_files import JINJA, choose_template
from fortwo.records import Example, Message, PlanWarning

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For models without a chat template: "User: ...", "Assistant: ...", and the model's eos token after each answer."""

LONG_TEXT = 10_000  # characters
MOST_ROWS = 1 << 24  # of an embedding

# First characters of a message that some pre-tokenizers merge with what the template wrote before them.
_OPENINGS = ("", "\n\n", " a", "\na", "\n\na", "\ta", "'s", "é", "中", "🙂", *string.printable)


_TEMPLATE_HINT = f"Correct the template, or put a {JINJA} that works into the base's directory, and load it again."


class ChatTemplateRenderer:
    """Tokenizer and chat template of one base model, read from `directory` alone.

    stop_ids: tokens that end a reply: the end-of-turn token of the template, and every eos that the model declares.
    stop_texts: texts that end the reply of a conversation, where no token does: how the user's next turn begins.
    warnings: what people should know about the tokenizer and the template. Raises UnsupportedModel for a tokenizer or a
    template that cannot be used.
    """

    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    warnings: tuple[PlanWarning, ...]

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        choice = choose_template(self._directory)
        warnings = (
            [] if choice.note is None else [PlanWarning("chat_template", choice.note, "Check it with a preview.")]
        )
        self._tokenizer = load_tokenizer(self._directory)
        self._template = self._compile(choice.text)
        self._backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        rows = embedding_rows(self._directory)
        self._rows = MOST_ROWS if rows is None else min(rows, MOST_ROWS)
        try:
            controls = self._read_control_tokens()
        except UnsupportedModel:
            raise
        except Exception as error:  # transformers raises whatever a file that it does not expect leads to
            raise UnsupportedModel(
                f"the tokenizer in {self._directory} cannot be used: {type(error).__name__} {error}",
                hint="Restore the model's tokenizer files.",
            ) from None
        self._eos = [number for number in (self._tokenizer.eos_token_id,) if self._exists(number)]
        declared = declared_eos(self._directory)
        end = self._end_of_turn(controls)
        self._closing = self._eos if end is None else []
        self.stop_ids = frozenset(number for number in (*self._eos, *declared, end) if self._exists(number))
        self.stop_texts = () if end is not None else self._next_turn()
        if missing := sorted(number for number in declared if not self._exists(number)):
            what = f"generation_config.json names the end tokens {missing}, which the base does not have."
            warnings.append(PlanWarning("eos_token", what, "They are ignored; correct the file."))
        if end is None:
            if not self.stop_ids and not self.stop_texts:
                raise UnsupportedModel(
                    f"the chat template in {self._directory} does not end the assistant's turn with a control token, "
                    "so a reply would never stop",
                    hint="Write the eos token after an assistant message in the chat template.",
                )
            rule = [f"the text {text!r}" for text in self.stop_texts] + ["the eos token"] * bool(self._eos)
            what = f"The chat template does not end the assistant's turn. A reply ends at {' or '.join(rule)}."
            warnings.append(PlanWarning("chat_template", what, "Write the eos token after an assistant message in it."))
        self.warnings = tuple(warnings)

    def _read_control_tokens(self) -> frozenset[int]:
        """Read the control tokens, and make the tokenizer that knows them by their private names alone."""
        has_bos = self._tokenizer("x")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        self._bos = [self._tokenizer.bos_token_id] if has_bos else []
        self._check_rows()  # before a copy is made, whose memory grows with the largest number of a token
        added = self._tokenizer.added_tokens_decoder.items()
        self._beyond = {token.content: number for number, token in added if not self._is_row(number)}
        controls = {token.content: number for number, token in added if token.special} | self._beyond
        controls |= zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True)
        nonce = secrets.token_hex(16)
        private = {text: f"<|{nonce}.{number}|>" for text, number in controls.items()}
        self._placeholders = {text: f"{nonce}-{number}-" for text, number in controls.items()}
        self._replacements = private | {placeholder: text for text, placeholder in self._placeholders.items()}
        self._public = {name: text for text, name in private.items()}
        self._controls = any_of(self._placeholders)
        self._replaced = any_of(self._replacements)
        self._encoder = rename_tokens(self._backend, private, self._rows)
        known = controls.keys() - self._beyond.keys()
        if wrong := [text for text in known if self._encoder.token_to_id(private[text]) != controls[text]]:
            raise ValueError(f"the token {wrong[0]!r} has two numbers")
        return frozenset(controls.values())

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the conversation and of the generation prompt. Raises InvalidRequest when the template refuses."""
        return self._encode(self._render(messages, generation=True))

    def render(self, messages: Sequence[Message], *, generation: bool = True) -> str:
        """The template's text. It is for display and for other programs: encoded again, text that people wrote could
        become control tokens. Raises InvalidRequest when the template refuses."""
        text = self._render(messages, generation=generation)
        return any_of(self._public).sub(lambda match: self._public[match[0]], text)

    @property
    def bos_text(self) -> str:
        """The bos token's text, if the tokenizer writes one before every text by itself."""
        return str(self._tokenizer.bos_token) if self._bos else ""

    def encode_text(self, text: str, *, specials: bool = True) -> list[int]:
        """Tokens of a raw prompt without a template. Control tokens in the text are read as such, because callers write
        the template themselves. With `specials` the tokenizer's BOS is added unless the text begins with it."""
        plain = _encode(self._backend, text)
        has_bos = plain[:1] == [self._tokenizer.bos_token_id]
        return plain if has_bos or not specials else _encode(self._backend, text, specials=True)

    def encode_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation that ends with the assistant's answer, and for each whether it has loss.

        The tokens are exactly `encode_prompt(messages[:-1])` without loss, and the answer with its end-of-turn token.
        """
        assert messages[-1].role == "assistant"
        prompt, answer = self._turn(messages)
        ends = [i for i, token in enumerate(answer) if token in self.stop_ids]
        if not ends and self._closing:
            answer = answer + self._closing
            ends = [len(answer) - 1]
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
        drop the reasoning of earlier turns), an answer that cannot share a row gets its own. A preference has the row
        of its chosen answer and that of its rejected one. Raises InvalidRequest if an answer that is judged as a whole
        cannot be one row.
        """
        if example.text is not None:
            return [self._document(example.text)]
        if example.rejected:
            return [row for side in example.sides for row in self.training_rows(side)]
        rows: list[tuple[list[int], list[bool]]] = []
        for end, message in enumerate(example.messages, 1):
            if message.role == "assistant" and message.weight:
                tokens, supervised = self.encode_conversation(example.messages[:end])
                if rows and tokens[: len(rows[-1][0])] == rows[-1][0]:
                    earlier = rows.pop()[1]
                    supervised[: len(earlier)] = earlier
                rows.append((tokens, supervised))
        if example.label is not None and len(rows) > 1:
            raise InvalidRequest(
                "the model's chat template writes the messages of an answer so that they cannot be one row",
                param="dataset",
                hint="Let the answer be one message, or leave the row out.",
            )
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

    def stream(self, context: Sequence[int] = (), shown: Collection[int] = ()) -> Detokenizer:
        """A detokenizer for one reply. context: tokens whose text the reply continues. shown: control tokens that the
        text shows; others are left out."""
        if not shown:
            return Detokenizer(self.decode, context)
        hidden = self._skipped - set(shown)

        def decode(tokens: Sequence[int]) -> str:
            return self.decode_with_control_tokens([token for token in tokens if token not in hidden])

        return Detokenizer(decode, context)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of bos_token, eos_token and the tokenizer's others, by name."""
        return dict(self._tokenizer.special_tokens_map)

    @cached_property
    def longest_token(self) -> int:
        """The most characters of a text that one token can stand for. A normalizer may write several as one."""
        return max(map(len, self._backend.get_vocab())) * (1 if self._backend.normalizer is None else 4)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Built on first use, which takes a quarter of a second for 50,000 tokens."""
        if not self.stop_ids:
            raise UnsupportedModel(
                "no token of this base ends a reply, so neither a schema nor log-probabilities can be used with it",
                param="model",
                hint="Send the request without response_format, tools and logprobs.",
            )
        return Vocabulary(self._backend, self.stop_ids)

    def constraint(self, schema: str) -> JsonConstraint:
        """A constraint for one reply. Raises InvalidRequest for a schema that is invalid or cannot be enforced."""
        return self.vocabulary.constraint(schema)

    def grammar_constraint(self, grammar: str) -> JsonConstraint:
        """A constraint for one reply that may call tools. Raises InvalidRequest for a grammar that cannot be
        enforced."""
        return self.vocabulary.grammar_constraint(grammar)

    @property
    def tool_form(self) -> ToolForm:
        """The form in which the template writes calls of tools. Raises InvalidRequest if it has none."""
        if isinstance(self._tool_form, ToolForm):
            return self._tool_form
        raise InvalidRequest(
            f"the chat template in {self._directory} cannot be used with tools: {self._tool_form}",
            param="tools",
            hint="Use a base whose chat template writes tools and their calls, set tool_choice to none, or describe in "
            "a message what the assistant may ask for.",
            code="unsupported_parameter",
        )

    @cached_property
    def call_tokens(self) -> frozenset[int]:
        """The control tokens of `tool_form`, which the text of a reply has to show."""
        pieces = (piece for text in self.tool_form.texts for piece in self.vocabulary.split(text))
        return frozenset(piece for piece in pieces if isinstance(piece, int))

    @cached_property
    def _tool_form(self) -> ToolForm | str:
        """The form, or why there is none."""
        ends = [str(self._backend.id_to_token(number)) for number in self.stop_ids]
        try:
            return learn_form(self._apply, ends)
        except UnknownForm as reason:
            return str(reason)

    @cached_property
    def _skipped(self) -> frozenset[int]:
        """The tokens that the text of a reply leaves out."""
        return frozenset(number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special)

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
        if any(message.tool_calls for message in messages) and isinstance(self._tool_form, ToolForm):
            hidden = self._tool_form.messages(hidden)
        tools = self._hide_all(json.loads(messages[0].tools), "tools") if messages and messages[0].tools else None
        try:
            text = self._apply(hidden, tools, generation)
        except TemplateRefusal as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}",
                param="messages",
                hint="Change the order or the roles of the messages.",
            ) from None
        except TemplateFailure as error:
            raise UnsupportedModel(
                f"the chat template in {self._directory} cannot render this conversation: {error}",
                param="model",
                hint=_TEMPLATE_HINT,
            ) from None
        self._check_written(text, hidden, tools, generation)
        return str(self._replaced.sub(self._replacement, text))

    def _replacement(self, match: re.Match[str]) -> str:
        """What takes the place of a control token that the template wrote, or of a placeholder."""
        if (number := self._beyond.get(match[0])) is not None:
            raise UnsupportedModel(
                f"the chat template in {self._directory} writes {match[0]!r}, token {number}, but the base's embedding "
                f"has only {self._rows} rows",
                param="model",
                hint="Save the base again with its embedding resized to the tokenizer, or correct the template.",
            )
        return str(self._replacements[match[0]])

    def _apply(self, hidden: list[dict[str, Any]], tools: Any, generation: bool) -> str:
        """The template's text, with its control tokens under their public names."""
        text: str = self._template.render(
            **self._tokenizer.special_tokens_map,
            messages=hidden,
            tools=tools,
            documents=None,
            add_generation_prompt=generation,
            enable_thinking=False,
        )
        return text

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
            with suppress(TemplateRefusal, TemplateFailure):  # it cannot do without, so it reads them
                if self._apply(messages, offered, generation) == text:
                    raise InvalidRequest(
                        f"the chat template in {self._directory} does not write {what} of this conversation",
                        param="messages",
                        hint="Use a base whose template knows tools, or write in words what was called and what came "
                        "back.",
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
        return _encode(self._encoder, text)

    def _is_row(self, token: int) -> bool:
        return 0 <= token < self._rows

    def _exists(self, token: int | None) -> bool:
        """Whether the model can write the token."""
        return token is not None and self._is_row(token) and self._backend.id_to_token(token) is not None

    def _check_rows(self) -> None:
        """Raises UnsupportedModel when ordinary text, or the BOS that is put before it, has tokens that are no rows of
        the embedding. Added tokens beyond it are read as the characters they consist of."""
        words = self._backend.get_vocab(with_added_tokens=False)
        beyond = {text: number for text, number in words.items() if not self._is_row(number)}
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        beyond = {text: number for text, number in beyond.items() if text not in added}
        beyond |= {str(self._tokenizer.bos_token): number for number in self._bos if not self._is_row(number)}
        if beyond:
            text, number = min(beyond.items(), key=lambda item: item[1])
            raise UnsupportedModel(
                f"the tokenizer in {self._directory} has {text!r}, token {number}, but the base's embedding has only "
                f"{self._rows} rows",
                param="model",
                hint="Restore the tokenizer that belongs to the base.",
            )

    def _compile(self, text: str | None) -> ChatTemplate:
        """The template, or the plain one where there is none."""
        if text is None:
            if self._tokenizer.eos_token is None:
                raise UnsupportedModel(
                    f"{self._directory} has neither a chat template nor an eos token, so a reply would never stop",
                    hint="Name the eos_token in tokenizer_config.json.",
                )
            text = plain_template(self._tokenizer)
        try:
            return ChatTemplate(text)
        except TemplateFailure as error:
            raise UnsupportedModel(
                f"the chat template in {self._directory} is not valid: {error}", param="model", hint=_TEMPLATE_HINT
            ) from None

    def _end_of_turn(self, controls: frozenset[int]) -> int | None:
        """The control token with which the template ends the assistant's turn; None when it writes none."""
        try:
            _, answer = self._turn([Message("user", "Hello"), Message("assistant", "Hello")])
        except UnsupportedModel:
            raise
        except InvalidRequest as error:
            raise UnsupportedModel(
                f"the chat template in {self._directory} refuses a question with its answer: {error.message}",
                param="model",
                hint=_TEMPLATE_HINT,
            ) from None
        return next((token for token in answer if token in controls), None)

    def _next_turn(self) -> tuple[str, ...]:
        """What the template writes between an answer and the user's next message, if anything."""
        messages = [Message("user", "Hello"), Message("assistant", "Hello"), Message("user", "QUESTION")]
        try:
            before, after = (self._render(messages[:end], generation=False) for end in (2, 3))
        except InvalidRequest:
            return ()
        opening = after.removeprefix(before).partition("QUESTION")[0].strip()
        return (opening,) if opening and after.startswith(before) else ()


def plain_template(tokenizer: Any) -> str:
    """PLAIN_TEMPLATE for this tokenizer of transformers, after its bos token if it writes one."""
    has_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if has_bos else "") + PLAIN_TEMPLATE


def _encode(backend: Tokenizer, text: str, *, specials: bool = False) -> list[int]:
    """The tokens of a text. A long one is encoded as a batch of one, because only then other threads run meanwhile."""
    if len(text) < LONG_TEXT:
        ids: list[int] = backend.encode(text, add_special_tokens=specials).ids
        return ids
    (encoding,) = backend.encode_batch([text], add_special_tokens=specials)
    return list(encoding.ids)

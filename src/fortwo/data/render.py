"""Conversations to token ids and back, by the model's own tokenizer and chat template.

Training and serving call the same two functions, so what is trained is what is asked, token for token.

Text that people wrote is never read as control: a user may type "<|im_end|>" and the model sees those ten
characters. Two steps make that exact. Before the template runs, control tokens spelt out in a message are replaced by
placeholders nobody can guess. After it ran, every control token left in the text was put there by the template; it is
given a private name, the placeholders become plain text again, and a twin of the tokenizer that knows the control
tokens by their private names alone encodes the whole in one call. Ids, merges and flags are the original's.

The template decides about BOS; none is added here, so there is never a second one. Templates that can think are asked
not to (`enable_thinking=False`), in training and in serving.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fortwo.data.vocabulary import Constraint, Vocabulary
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
"""For models that bring no chat template: "User: ...", "Assistant: ...", an answer ends with the model's eos token."""

# Contents whose first characters a pre-tokenizer may or may not merge with what the template wrote before them.
_OPENINGS = ("", "\n\n", " a", "\na", "\n\na", "\ta", "'s", "é", "中", "🙂", *string.printable)


class Renderer:
    """Tokenizer and chat template of one base model, read from `directory` and nowhere else.

    stop_ids: tokens that end a reply: the end of turn the template writes, and every eos the model declares.
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
        self._revealed = private | {placeholder: text for text, placeholder in self._placeholders.items()}
        self._controls = _any_of(self._placeholders)
        self._marks = _any_of(self._revealed)
        self._encoder = _twin(self._backend, private)
        assert all(self._encoder.token_to_id(private[text]) == number for text, number in controls.items())
        begins = self._tokenizer("x")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        self._begin = [self._tokenizer.bos_token_id] if begins else []
        self._end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        self.stop_ids = frozenset({*self._declared_eos(), self._end_of_turn(frozenset(controls.values()))})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far and the opening of the assistant's turn."""
        return self._encode(self._render(messages, generation=True))

    def text(self, text: str) -> list[int]:
        """Text that is the whole prompt. Control tokens in it are read as such: whoever writes raw text writes the
        template too. The tokenizer's own beginning (BOS) is added unless the text has it."""
        plain: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        begun = plain[:1] == [self._tokenizer.bos_token_id]
        return plain if begun else list(self._backend.encode(text).ids)

    def example(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation that ends with the assistant's answer, and where there is loss.

        The tokens begin with exactly `prompt(messages[:-1])` and end with the end of turn; the loss covers what
        lies between and that end of turn.
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

    def rows(self, example: Example) -> list[tuple[list[int], list[bool]]]:
        """What is trained on for one example: rows of tokens, and where there is loss.

        Every answer of weight 1 stands behind exactly the prompt that serving would give it. Where the template writes
        a conversation's beginning the same way whatever follows, that is one row; where it does not (templates that
        drop what was thought in earlier turns), an answer that cannot share a row has its own.
        """
        if example.text is not None:
            return [self._document(example.text)]
        rows: list[tuple[list[int], list[bool]]] = []
        for end, message in enumerate(example.messages, 1):
            if message.role == "assistant" and message.weight:
                tokens, supervised = self.example(example.messages[:end])
                if rows and tokens[: len(rows[-1][0])] == rows[-1][0]:
                    earlier = rows.pop()[1]
                    supervised[: len(earlier)] = earlier
                rows.append((tokens, supervised))
        return rows

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, control tokens left out."""
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def dataset_rows(self, example: Example) -> list[tuple[list[int], list[bool]]]:
        """`rows` of an example of a dataset. Raises InvalidDataset naming the line that the template refuses."""
        try:
            return self.rows(example)
        except InvalidRequest as error:
            raise InvalidDataset(
                f"line {example.line}: {error.message}", param="dataset", hint=error.hint, code=error.code
            ) from None

    def spell(self, tokens: Sequence[int]) -> str:
        """Text of tokens, control tokens written out: for people to see, never to be encoded again."""
        return self._backend.decode(list(tokens), skip_special_tokens=False)

    def turns(self, messages: Sequence[Message], tokens: Sequence[int]) -> list[int]:
        """Where the turn of each message ends in a row of `rows`, as far as the template lets one tell."""
        ends: list[int] = []
        for end in range(1, len(messages) + 1):
            try:
                begun = self._encode(self._render(messages[:end], generation=False))
            except InvalidRequest:  # templates that want an answer to every question
                break
            if list(tokens[: len(begun)]) != begun[: len(tokens)]:
                break
            ends.append(min(len(begun), len(tokens)))
        return ends

    def stream(self, context: Sequence[int] = ()) -> Detokenizer:
        """context: tokens whose text the reply's text continues."""
        return Detokenizer(self, context)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Built when it is first needed, a quarter of a second for 50,000 tokens."""
        return Vocabulary(self._backend, self.stop_ids)

    def constraint(self, schema: str) -> Constraint:
        """One reply under a JSON schema. Raises InvalidRequest for one that cannot be followed."""
        return self.vocabulary.constraint(schema)

    def prefix(self) -> list[int]:
        """Tokens that every single-turn conversation without a system message of its own starts with."""
        return list(self._prefix)

    @cached_property
    def _prefix(self) -> list[int]:
        prompts = [self.prompt([Message("user", opening)]) for opening in _OPENINGS]
        first, last = min(prompts), max(prompts)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        return [token for token, _ in alike]

    def _document(self, text: str) -> tuple[list[int], list[bool]]:
        """Plain text between the model's bos, where its tokenizer writes one, and its eos. Nothing predicts the very
        first token, so it has no loss."""
        tokens = [*self._begin, *self._encode(text), *self._end]
        return tokens, [False] + [True] * (len(tokens) - 1)

    def _turn(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of everything the template writes from the answer on."""
        opening = self._render(messages[:-1], generation=True)
        whole = self._render(messages, generation=False)
        if not whole.startswith(opening):
            raise UnsupportedModel(
                f"the chat template in {self._directory} renders a finished conversation differently from the prompt "
                "that asks for its last answer, so training on it would not be what is served",
                hint="Use a chat template whose generation prompt is the beginning of the assistant's turn.",
            )
        prompt, tokens = self._encode(opening), self._encode(whole)
        if tokens[: len(prompt)] == prompt:
            return prompt, tokens[len(prompt) :]
        # The answer's first characters merge with the prompt's last (an answer that begins with a line break): when
        # serving, the prompt is encoded alone, so it is here too.
        return prompt, self._encode(whole[len(opening) :])

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        """The template's text, control tokens under their private names."""
        hidden = [{"role": m.role, "content": self._hide(m.content, i)} for i, m in enumerate(messages)]
        try:
            text = self._tokenizer.apply_chat_template(
                hidden, tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}",
                param="messages",
                hint="Change the order or the roles of the messages.",
            ) from None
        return self._marks.sub(lambda mark: self._revealed[mark[0]], str(text))

    def _hide(self, content: str, index: int) -> str:
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"messages[{index}].content is not valid Unicode: half a surrogate pair at character {error.start + 1}",
                param=f"messages[{index}].content",
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
    """Text of a reply while it is generated; bytes of an unfinished character are held back until it is complete."""

    def __init__(self, renderer: Renderer, context: Sequence[int] = ()) -> None:
        self._renderer = renderer
        self._window = list(context)  # tokens last shown, as context for the decoder, then those not shown yet
        self._shown = len(context)  # how many of them were shown

    def push(self, token: int) -> str:
        self._window.append(token)
        new = self._pending()
        if not new or new.endswith("\ufffd"):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return new

    def flush(self) -> str:
        """What is left when the reply has ended; an unfinished character comes out as U+FFFD."""
        new = self._pending()
        self._window, self._shown = [], 0
        return new

    def _pending(self) -> str:
        shown = self._renderer.decode(self._window[: self._shown])
        return self._renderer.decode(self._window)[len(shown) :]


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
        begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
    return tokenizer


def _twin(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """The same tokenizer with some tokens renamed; it adds, cuts and pads nothing of its own."""
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
    """Matches the longest of the texts; nothing when there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")

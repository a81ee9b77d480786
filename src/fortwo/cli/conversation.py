"""`fortwo chat`: one prompt to one model or to several side by side, once or as a conversation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.live import Live
from rich.table import Table

from fortwo.cli import views
from fortwo.cli.client import Client, text_of
from fortwo.cli.terminal import error_screen, is_interactive, print_json, print_json_line, screen
from fortwo.errors import FortwoError
from fortwo.records import Json

QUOTES = '"""'  # begins and ends a message of several lines
HELP = f"""\
/model NAME [NAME ...]  chat with other models, side by side if there are several; the conversation goes on
/system [TEXT]          set the system prompt, or remove it
/clear                  forget the conversation
/help                   show this
/bye                    end the chat (so does Ctrl-D)
A message of several lines begins and ends with {QUOTES}, and // begins a message with a slash. At a terminal Alt-Enter
begins a new line, and Ctrl-C stops a reply."""


@dataclass
class Column:
    """One model's side of the conversation. answered_by: the version that answered last, as the server says."""

    model: str
    messages: list[Json] = field(default_factory=list)
    text: str = ""
    answered_by: str = ""
    error: FortwoError | None = None

    def reply(self) -> Json:
        return {"model": self.model, "answered_by": self.answered_by, "content": self.text}


class Conversation:
    """Columns that are asked the same. options: of each request, such as temperature."""

    def __init__(self, client: Client, models: Sequence[str], options: Json) -> None:
        self.columns = [Column(model) for model in models]
        self._client = client
        self._options = options
        self._system = ""
        self._stopped = threading.Event()

    def choose(self, models: Sequence[str]) -> None:
        """Go on with other models, which are told what the first one was asked and said."""
        kept = {column.model: column for column in self.columns}
        messages = self.columns[0].messages
        self.columns = [kept.get(model, Column(model, list(messages))) for model in models]

    def set_system(self, text: str) -> None:
        self._system = text

    def clear(self) -> None:
        self.columns = [Column(column.model) for column in self.columns]

    def ask(self, prompt: str, on_piece: Callable[[Column, str], None]) -> None:
        """Send a prompt to every model at the same time, and add the replies to the columns. on_piece: called with each
        piece of a reply, on a thread of the column. Ctrl-C ends all replies where they are. Raises the first error
        that a column has; then no column remembers the prompt."""
        self._stopped.clear()
        with ThreadPoolExecutor(len(self.columns)) as pool:
            running = [pool.submit(self._stream, column, prompt, on_piece) for column in self.columns]
            try:
                for one in running:
                    one.result()
            except KeyboardInterrupt:
                self._stopped.set()
        for column in self.columns:
            if column.error is not None:
                raise column.error
        for column in self.columns:
            column.messages += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": column.text},
            ]

    def _stream(self, column: Column, prompt: str, on_piece: Callable[[Column, str], None]) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *column.messages, {"role": "user", "content": prompt}]
        column.text, column.answered_by, column.error = "", "", None
        try:
            for chunk in self._client.chat({**self._options, "model": column.model, "messages": messages}):
                if self._stopped.is_set():
                    return
                column.answered_by = chunk.get("model", "")
                piece = text_of(chunk)
                column.text += piece
                on_piece(column, piece)
        except FortwoError as error:
            column.error = error


def answer_once(conversation: Conversation, prompt: str, as_json: bool) -> None:
    """Ask one question and print the reply, or the replies side by side. Raises what `ask` raises."""
    if as_json:
        conversation.ask(prompt, _nothing)
        print_json({"replies": [column.reply() for column in conversation.columns]})
    else:
        _show(conversation, prompt)


def converse(conversation: Conversation, history: Path, as_json: bool) -> None:
    """Read messages and commands until the input ends. history: the file that remembers what was typed at a terminal.
    Without a terminal the first error ends the conversation and is raised."""
    if not as_json and is_interactive():
        names = " and ".join(column.model for column in conversation.columns)
        screen.print(f"Chat with {names}. /help shows what else can be typed; Ctrl-D ends it.", style="dim")
    for message in _messages(_lines(history)):
        if message.startswith("/") and not message.startswith("//"):
            if not _obey(conversation, message):
                return
            continue
        prompt = message.removeprefix("/") if message.startswith("//") else message
        try:
            if as_json:
                conversation.ask(prompt, _nothing)
                replies = [column.reply() for column in conversation.columns]
                print_json_line({"prompt": prompt, "replies": replies})
            else:
                _show(conversation, prompt)
        except FortwoError as error:
            if as_json or not is_interactive():
                raise
            error_screen.print(views.error(error.message, error.hint))


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """The messages in lines of input; one between QUOTES may have several lines."""
    for line in lines:
        message = line.strip()
        if message.startswith(QUOTES):
            message = message.removeprefix(QUOTES)
            while not message.rstrip().endswith(QUOTES) and (more := next(lines, None)) is not None:
                message = f"{message}\n{more}"
            message = message.rstrip().removesuffix(QUOTES).strip()
        if message:
            yield message


def _lines(history: Path) -> Iterator[str]:
    """What is typed, edited and recalled at a terminal, or the lines of the input."""
    if not is_interactive():
        while True:
            try:
                yield input()
            except EOFError:
                return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history.parent.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(history)), key_bindings=keys)
    while True:
        try:
            yield session.prompt("you: ")
        except (EOFError, KeyboardInterrupt):
            return


def _obey(conversation: Conversation, command: str) -> bool:
    """Carry out a command; whether the conversation goes on."""
    word, _, rest = command.partition(" ")
    told = ""
    match word, rest.split():
        case (("/bye" | "/exit" | "/quit"), []):
            return False
        case "/model", [_, *_] as models:
            conversation.choose(list(dict.fromkeys(models)))
            told = f"Chat with {' and '.join(dict.fromkeys(models))}."
        case "/system", _:
            conversation.set_system(rest.strip())
            told = "The system prompt is set." if rest.strip() else "There is no system prompt."
        case "/clear", []:
            conversation.clear()
            told = "The conversation is forgotten."
        case "/help", []:
            told = HELP
        case _:
            told = f"{command!r} is not a command.\n{HELP}"
    error_screen.print(told, style="dim")
    return True


def _show(conversation: Conversation, prompt: str) -> None:
    """Ask, and show the replies as they come: one as text, several as columns, or one after the other in a pipe."""
    if len(conversation.columns) == 1:
        try:
            conversation.ask(prompt, lambda _, piece: _write(piece))
        except FortwoError:
            _write("\n" if conversation.columns[0].text else "")
            raise
        _write("\n")
    elif screen.is_terminal:
        with Live(console=screen, transient=True, auto_refresh=False) as live:
            conversation.ask(prompt, lambda _, __: live.update(_side_by_side(conversation.columns), refresh=True))
        screen.print(_side_by_side(conversation.columns))
    else:
        conversation.ask(prompt, _nothing)
        for column in conversation.columns:
            screen.print(f"{column.answered_by}: {column.text}")


def _write(text: str) -> None:
    screen.file.write(text)
    screen.file.flush()


def _side_by_side(columns: Sequence[Column]) -> Table:
    shown = Table(expand=True)
    for column in columns:
        shown.add_column(column.answered_by or column.model, overflow="fold", ratio=1)
    shown.add_row(*(column.text for column in columns))
    return shown


def _nothing(_: Column, __: str) -> None:
    """No piece is shown by itself."""

"""Ollama's folder: a GGUF file and a Modelfile with the chat template in Go's syntax.

The template is not translated but learned: the base's own template is rendered with marks in place of messages, which
shows what it writes around each role. What a template of such frames renders is then compared with the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import InvalidRequest, UnsupportedModel
from fortwo.export.gguf import MODEL
from fortwo.records import Message

MODELFILE = "Modelfile"
_S, _U, _A, _V, _B = "QsysQ", "QuserQ", "QreplyQ", "QagainQ", "QanswerQ"  # marks that no template contains


@dataclass(frozen=True)
class Frames:
    """What a template writes around the content of each role. joined: a system message opens the user's turn. default:
    the system message where none is given. system: None where the template refuses one."""

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    joined: bool = False
    default: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, as the Go template renders it."""
        given = messages if messages[0].role == "system" or not self.default else None
        text, joined = "", False
        for message in given or [Message("system", self.default), *messages]:
            if message.role == "system":
                before, after = self.system or ("", "")
                joined = self.joined
            else:
                before, after = self.user if message.role == "user" else self.assistant
                before, joined = ("", False) if joined else (before, False)
            text += before + message.content + after
        return text + self.assistant[0]

    def go(self) -> str:
        """The template in Go's syntax."""
        user = "{{ if $open }}" + self.user[0] + "{{ end }}" if self.joined else self.user[0]
        closed, opened = ("{{ $open = false }}", "{{ $open = true }}") if self.joined else ("", "")
        parts = ["{{ $open := true }}"] if self.joined else []
        parts.append('{{ range .Messages }}{{ if eq .Role "user" }}' + user + "{{ .Content }}" + self.user[1] + opened)
        parts.append('{{ else if eq .Role "assistant" }}' + _framed(self.assistant))
        if self.system is not None:
            parts.append('{{ else if eq .Role "system" }}' + _framed(self.system) + closed)
        return "".join(parts) + "{{ end }}{{ end }}" + self.assistant[0]


def frames_of(renderer: ChatTemplateRenderer) -> Frames:
    """Raises UnsupportedModel for a template that writes more than a frame around each message."""
    try:
        found = _learned(renderer)
        _check(found, renderer)
    except (ValueError, InvalidRequest):
        raise UnsupportedModel(
            "The chat template of this base cannot be expressed as a Modelfile's TEMPLATE: it writes more than the "
            "same text around each message of a role.",
            param="to",
            hint="Export it as gguf and run it with llama-server, which reads the template itself.",
        ) from None
    return found


def _learned(renderer: ChatTemplateRenderer) -> Frames:
    """Raises ValueError where the text does not fall into frames."""
    asked, answered = [Message("user", _U)], [Message("user", _U), Message("assistant", _A)]
    bos = renderer.bos_text
    before, closing = _split(renderer.render(asked, generation=False), _U)
    open_reply = _after(_split(renderer.render(asked), _U)[1], closing)
    close_reply = _split(renderer.render(answered, generation=False), _A)[1]
    between = _split(_split(renderer.render([*answered, Message("user", _V)]), _A)[1], _V)[0]
    open_user = _after(between, close_reply)
    preamble = _before(before.removeprefix(bos), open_user)
    user, assistant = (open_user, closing), (open_reply, close_reply)
    try:
        with_system = renderer.render([Message("system", _S), *asked])
    except InvalidRequest:
        if preamble:
            raise ValueError("text before the conversation") from None
        return Frames(user, assistant, None)
    head, rest = _split(with_system, _S)
    head, between = head.removeprefix(bos), _split(rest, _U)[0]
    if head == open_user and not between.endswith(open_user):
        if preamble:
            raise ValueError("text before the conversation")
        return Frames(user, assistant, (head, between), joined=True)
    system = (head, _before(between, open_user))
    default = preamble
    if preamble:
        default = _before(_after(preamble, system[0]), system[1])
    return Frames(user, assistant, system, default=default)


def _check(frames: Frames, renderer: ChatTemplateRenderer) -> None:
    """Raises ValueError where the frames render another text than the template."""
    turns = [Message("user", _U), Message("assistant", _A), Message("user", _V), Message("assistant", _B)]
    probes = [[*turns[:1]], [*turns[:3]], [*turns, Message("user", "end")]]
    if frames.system is not None:
        probes += [[Message("system", _S), *probe] for probe in probes]
    for probe in probes:
        if frames.render(probe) != renderer.render(probe).removeprefix(renderer.bos_text):
            raise ValueError("another text")
    if any(mark in text for text in (frames.go(), frames.default) for mark in ('"""', _S, _U, _A)):
        raise ValueError("text that a Modelfile cannot hold")
    if any("{{" in text for text in (*frames.user, *frames.assistant, *(frames.system or ()), frames.default)):
        raise ValueError("text that Go would read as code")


def write_modelfile(source: str, frames: Frames, renderer: ChatTemplateRenderer, folder: Path) -> list[str]:
    """The Modelfile beside model.gguf. source: which adapter it is, for a comment."""
    stops = [renderer.decode_with_control_tokens([token]) for token in sorted(renderer.stop_ids)]
    lines = [f"# {source}", f"FROM ./{MODEL}", f'TEMPLATE """{frames.go()}"""']
    if frames.default:
        lines.append(f'SYSTEM """{frames.default}"""')
    lines += [f'PARAMETER stop "{_quoted(text)}"' for text in dict.fromkeys([*stops, *renderer.stop_texts]) if text]
    lines.append("PARAMETER temperature 0")
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", "utf-8")
    return ["Make the model with: ollama create NAME -f Modelfile (in the exported folder)"]


def _framed(frame: tuple[str, str]) -> str:
    return frame[0] + "{{ .Content }}" + frame[1]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _split(text: str, mark: str) -> tuple[str, str]:
    """The text before and after a mark that occurs once."""
    before, *after = text.split(mark)
    if len(after) != 1:
        raise ValueError(f"{mark} occurs {len(after)} times")
    return before, after[0]


def _after(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise ValueError(f"{text!r} does not begin with {beginning!r}")
    return text[len(beginning) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{text!r} does not end with {end!r}")
    return text[: len(text) - len(end)]

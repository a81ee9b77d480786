"""Text of a running reply: stop strings wherever tokens cut them, deltas, waiting, ending."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fortwo.engine.generation import Reply, StopScanner
from fortwo.errors import FortwoError
from fortwo.prompts import Delta, Logprob, Prompt, Sampling

END = 0


class Letters:
    """A tokenizer of one code point per token; the letters of an open bracket are held back until it closes."""

    stop_ids = frozenset({END})

    def stream(self, context: object = (), shown: object = ()) -> "Letters":
        fresh = Letters()
        fresh.held = ""
        return fresh

    held = ""

    def push(self, token: int) -> str:
        self.held += chr(token)
        if self.held.startswith("<") and not self.held.endswith(">"):
            return ""
        text, self.held = self.held, ""
        return text

    def flush(self) -> str:
        return self.held


def reply(room: int = 100, stop: tuple[str, ...] = (), **settings: bool) -> Reply:
    return Reply(Prompt("base", (1,), sampling=Sampling(stop=stop, **settings)), room, Letters())


def say(reply: Reply, text: str) -> Reply:
    for letter in text:
        if not reply.done:
            reply.push(ord(letter), Logprob(ord(letter), -1.0))
    return reply


def told(reply: Reply) -> list[tuple[str, str]]:
    """Of each delta its text, and the letters whose log-probabilities come with it."""
    return [(delta.text, "".join(chr(one.token) for one in delta.logprobs)) for delta in reply.deltas()]


def scan(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    text = "".join(scanner.push(piece) for piece in pieces)
    return text + scanner.flush(), scanner.stopped


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[first:last] for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        expected = text[: ends[0] - longest]
    assert scan(pieces, tuple(stops)) == (expected, bool(ends))


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_shown_is_never_taken_back_and_no_more_is_held_than_needed(text: str, stops: list[str]) -> None:
    scanner = StopScanner(tuple(stops))
    shown = ""
    for count, letter in enumerate(text, 1):
        shown += scanner.push(letter)
        if scanner.stopped:
            return
        held = text[len(shown) : count]
        assert shown + held == text[:count]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_tokens_become_text_and_the_stop_token_does_not() -> None:
    ended = say(reply(), "hi\0more")
    assert (ended.text, ended.finish_reason, ended.tokens) == ("hi", "stop", [104, 105, END])


def test_the_room_ends_a_reply_with_length() -> None:
    ended = say(reply(room=3), "hello")
    assert (ended.text, ended.finish_reason) == ("hel", "length")


def test_a_stop_string_is_not_returned_and_what_looked_like_one_is() -> None:
    ended = say(reply(stop=("###",)), "a#b##c###d")
    assert (ended.text, ended.finish_reason) == ("a#b##c", "stop")
    ended = say(reply(room=3, stop=("###",)), "a##")
    assert (ended.text, ended.finish_reason) == ("a##", "length")


def test_a_stop_string_that_the_last_held_back_characters_complete_still_counts() -> None:
    ended = say(reply(room=3, stop=("<b",)), "a<b")
    assert (ended.text, ended.finish_reason) == ("a", "stop")


def test_deltas_come_as_text_does_and_end_with_the_reason() -> None:
    ended = say(reply(stop=("xyz",)), "abx\0")
    a, b, x = (Logprob(ord(letter), -1.0) for letter in "abx")
    expected = [Delta("a", 97, logprobs=(a,)), Delta("b", 98, logprobs=(b,)), Delta("x", END, "stop", logprobs=(x,))]
    assert list(ended.deltas()) == expected
    assert list(ended.deltas()) == expected, "whoever comes later sees them all"


def test_logprobs_come_with_the_text_their_tokens_make() -> None:
    assert told(say(reply(), "a<b>\0")) == [("a", "a"), ("<b>", "<b>"), ("", "")]
    assert told(say(reply(room=3), "a<b")) == [("a", "a"), ("<b", "<b")]
    assert told(say(reply(stop=("###",)), "a#b\0")) == [("a", "a"), ("#b", "#b"), ("", "")]
    assert told(say(reply(stop=("###",)), "a###")) == [("a", "a"), ("", "")], "the stop string is not said"


def test_ignore_eos_goes_on_after_the_end() -> None:
    ended = say(reply(room=4, ignore_eos=True), "a\0bc")
    assert (ended.text, ended.finish_reason, len(ended.tokens)) == ("a\0bc", "length", 4)


def test_deltas_wait_for_what_is_still_to_come() -> None:
    running, seen = reply(), []
    reader = threading.Thread(target=lambda: seen.extend(running.deltas()))
    reader.start()
    say(running, "ab")
    running.end("cancelled")
    reader.join(5)
    assert "".join(delta.text for delta in seen) == "ab"
    assert seen[-1].finish_reason == "cancelled"


def test_wait_returns_the_text_raises_the_error_and_gives_up_in_time() -> None:
    assert say(reply(), "ok\0").wait() == "ok"
    with pytest.raises(TimeoutError):
        reply().wait(timeout=0.01)
    failed = say(reply(), "half")
    failed.end("error", "the disk caught fire")
    with pytest.raises(FortwoError, match="the disk caught fire"):
        failed.wait()
    assert list(failed.deltas())[-1] == Delta("", ord("f"), "error", "the disk caught fire")


def test_a_reply_ends_once() -> None:
    ended = say(reply(), "a\0")
    ended.end("cancelled")
    assert ended.finish_reason == "stop"
    assert len(list(ended.deltas())) == 2


def test_a_listener_that_fails_cancels_its_reply() -> None:
    def listener(delta: Delta) -> None:
        raise RuntimeError("the connection is gone")

    running = Reply(Prompt("base", (1,)), 10, Letters(), listener)
    say(running, "ab")
    assert running.cancel_requested
    assert running.text == "ab"

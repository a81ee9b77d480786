"""Whatever comes together, is cut, cached or preempted: every request gets the text that it gets alone.

The device's turns are taken by hand here, without its thread, so that a schedule is what hypothesis says it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Row
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fortwo.engine import engine as module
from fortwo.engine.engine import Engine, _Base, _Request
from fortwo.engine.generation import Reply
from fortwo.engine.prompt_outputs import PromptOutputs
from fortwo.engine.runner import Runner
from fortwo.engine.sampling import Sampler
from fortwo.execution.backend import backend_for
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import PackedAttention, pack
from fortwo.prompts import MAX_RUNNING, Prompt, Sampling
from tests.test_engine import CONFIG, DECODER, Ascii, make_lora, prompt

TOKEN_BYTES = 2 * 4 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_size
LORAS: dict[str | None, Lora | None] = {None: None, **{f"a{n}": make_lora(n) for n in range(3)}, "live": make_lora(9)}
SYSTEM = "You are a helpful assistant that answers briefly and kindly. "
TEXTS = ["hi", SYSTEM + "one", SYSTEM + "two", SYSTEM + "one, and then what?", "x" * 90, "y" * 130]
LONGEST_REPLY = 40


@torch.no_grad()
def hidden(tokens: Row[int], adapter: str | None) -> Tensor:
    """Hidden states (T, D) of the plain network: one pass over everything."""
    lora, packed = LORAS[adapter], pack([tokens], prefix=0)
    updates = [] if lora is None else [Segment(lora)]
    return DECODER.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, DECODER.config), updates)


@cache
@torch.no_grad()
def alone(text: str, adapter: str | None) -> list[int]:
    """The greedy reply of the plain network: each token from a pass over everything before it."""
    tokens = list(text.encode())
    for _ in range(LONGEST_REPLY):
        logits_V = DECODER.logits(hidden(tokens, adapter)[-1:])[0]
        first, second = logits_V.topk(2).values
        assert first - second > 1e-4, "too close to tell: rounding may choose the other token"
        tokens.append(int(logits_V.argmax()))
    return tokens[len(text) :]


@cache
@torch.no_grad()
def read_alone(text: str, adapter: str | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, V) after each of its tokens, and its embedding (D), by the plain network."""
    hidden_TD = hidden(list(text.encode()), adapter)
    return DECODER.logits(hidden_TD).log_softmax(-1), hidden_TD[-1] / hidden_TD[-1].norm()


def make_base(tokens: int | None = None) -> _Base:
    """A base with the adapters above, whose cache holds so many tokens."""
    runner = Runner(backend_for(DECODER), None if tokens is None else tokens * TOKEN_BYTES)
    for key, lora in LORAS.items():
        if key is not None and lora is not None:
            runner.attach(key, lora, frozen=key != "live")
    return _Base("tiny", runner, Ascii())


@dataclass(frozen=True)
class Asked:
    """read: the prompt's own log-probabilities and its embedding are wanted too."""

    text: str
    adapter: str | None
    count: int
    turn: int = 0
    cancelled: int | None = None
    background: bool = False
    read: bool = False

    def request(self) -> _Request:
        sampling = Sampling(max_tokens=self.count, prompt_logprobs=2 if self.read else None)
        prompt = Prompt(
            "tiny", tuple(self.text.encode()), self.adapter, sampling, background=self.background, embed=self.read
        )
        reading, reply = PromptOutputs(prompt, DECODER) if self.read else None, Reply(prompt, self.count, Ascii())
        sampler = Sampler(sampling)
        return _Request(
            list(prompt.tokens),
            self.adapter,
            listener=reading,
            background=self.background,
            reply=reply,
            sampler=sampler,
        )


def add(base: _Base, request: _Request) -> None:
    base.scheduler_of(request).add(request)


def take_turn(base: _Base) -> None:
    for scheduler in (base.users, base.background):
        base.decode(scheduler)
        base.prefill(scheduler)


def serve(base: _Base, asked: Row[Asked]) -> list[_Request]:
    """Take turns until everything has ended, as the device's thread does."""
    requests = [one.request() for one in asked]
    last = max(one.turn for one in asked)
    for turn in range(5000):
        for one, request in zip(asked, requests, strict=True):
            if one.turn == turn:
                add(base, request)
            if one.cancelled is not None and one.turn + one.cancelled == turn and not request.reply.done:
                base.end(request, "cancelled")
        take_turn(base)
        bound = base.runner.cache.bound
        assert bound is None or base.runner.cache.tokens <= bound
        if turn > last and not base.requests:
            break
    assert all(request.reply.done for request in requests), "somebody never ended"
    base.runner.cache.check_idle()
    return requests


def check(asked: Row[Asked], requests: Row[_Request]) -> None:
    for one, request in zip(asked, requests, strict=True):
        wanted = alone(one.text, one.adapter)[: one.count]
        if one.cancelled is None:
            assert request.reply.tokens == wanted, (one, request.reply.error)
        else:
            assert request.reply.tokens == wanted[: len(request.reply.tokens)], one
        if one.read and (one.cancelled is None or request.reply.tokens):
            check_reading(one, request.reply)


def check_reading(asked: Asked, reply: Reply) -> None:
    logprobs_TV, embedding_D = read_alone(asked.text, asked.adapter)
    first, *others = next(reply.deltas()).logprobs
    tokens = list(asked.text.encode())
    assert (first.token, first.logprob, first.top) == (tokens[0], None, ())
    assert [one.token for one in others] == tokens[1:]
    for one, logprobs_V in zip(others, logprobs_TV, strict=False):
        best = logprobs_V.topk(2)
        assert one.logprob == pytest.approx(float(logprobs_V[one.token]), abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    torch.testing.assert_close(torch.tensor(reply.embedding), embedding_D, atol=1e-5, rtol=0)


REQUESTS = st.builds(
    Asked,
    text=st.sampled_from(TEXTS),
    adapter=st.sampled_from(list(LORAS)),
    count=st.integers(1, LONGEST_REPLY),
    turn=st.integers(0, 30),
    cancelled=st.none() | st.none() | st.integers(1, 30),
    background=st.booleans(),
) | st.builds(
    Asked,
    text=st.sampled_from([*TEXTS, "z"]),
    adapter=st.sampled_from(list(LORAS)),
    count=st.integers(0, 5),
    turn=st.integers(0, 30),
    read=st.just(True),
)


@settings(deadline=None, max_examples=20)
@given(st.lists(REQUESTS, min_size=1, max_size=10), st.sampled_from([180, 300, 520, 1000, None]), st.integers(3, 200))
def test_any_schedule_gives_every_request_the_text_it_gets_alone(
    asked: list[Asked], tokens: int | None, budget: int
) -> None:
    """Joining, leaving, chunks of prompts, kept prefixes, preemption, adapters side by side: all at once."""
    base = make_base(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PROMPT_TOKENS", 2 * budget)
        patch.setattr(module, "PROMPT_TOKENS_WHILE_DECODING", budget)
        check(asked, serve(base, asked))
        check(asked, serve(base, asked))  # once more, with what the first time left in the cache


def test_a_full_cache_preempts_the_newest_which_goes_on_where_it_was() -> None:
    base = make_base(tokens=4 * 128)
    asked = [Asked(TEXTS[4], adapter, LONGEST_REPLY) for adapter in ("a0", None, "a1")]
    preempted: list[_Request] = []
    preempt = base.preempt

    def seen(request: _Request) -> None:
        assert request.reply.tokens, "it had begun to answer"
        preempted.append(request)
        preempt(request)

    base.preempt = seen  # type: ignore[method-assign]
    requests = serve(base, asked)
    check(asked, requests)
    assert preempted[0] is requests[2]


def test_a_user_waits_neither_for_the_places_nor_for_the_prompts_of_a_job() -> None:
    base = make_base()
    job = [Asked(TEXTS[4], None, LONGEST_REPLY, background=True).request() for _ in range(2 * MAX_RUNNING)]
    for request in job:
        add(base, request)
    while len(base.background.running) < MAX_RUNNING:
        take_turn(base)
    user = Asked(TEXTS[5], "a0", 2).request()
    add(base, user)
    take_turn(base)
    assert user.reply.tokens == alone(TEXTS[5], "a0")[:1]
    assert len(base.background.running) == MAX_RUNNING


def test_a_turn_of_a_job_computes_prompts_or_tokens_of_replies_not_both() -> None:
    engine, base = Engine(threads=1), make_base()  # its thread is not started
    engine._bases["tiny"] = base
    first, second = (Asked("hi", adapter, 5, background=True).request() for adapter in ("a0", "a1"))
    counts = []
    add(base, first)
    engine._serve()
    add(base, second)
    for _ in range(3):
        engine._serve()
        counts.append((len(first.reply.tokens), len(second.reply.tokens)))
    assert counts == [(2, 0), (2, 1), (3, 2)]


def test_a_full_cache_preempts_what_a_job_asked_for_a_user_but_lets_one_go_on() -> None:
    base = make_base(tokens=2 * 128)
    job = [Asked(TEXTS[4], None, LONGEST_REPLY, background=True).request() for _ in range(2)]
    for request in job:
        add(base, request)
    take_turn(base)
    first, second = (Asked(TEXTS[4], adapter, 3).request() for adapter in ("a0", "a1"))
    add(base, first)
    add(base, second)
    take_turn(base)
    assert (base.users.running, list(base.users.waiting)) == ([first], [second])
    assert (base.background.running, list(base.background.waiting)) == (job[:1], job[1:])
    while base.requests:
        take_turn(base)
    for request in job:
        assert request.reply.tokens == alone(TEXTS[4], None)
    for request in (first, second):
        assert request.reply.tokens == alone(TEXTS[4], request.adapter)[:3]


def test_a_long_prompt_does_not_stop_the_replies_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROMPT_TOKENS_WHILE_DECODING", 16)
    base = make_base()
    running, long = Asked("hi", None, LONGEST_REPLY).request(), Asked("y" * 130, "a0", 5).request()
    add(base, running)
    take_turn(base)
    add(base, long)
    before = len(running.reply.tokens)
    turns = 0
    while not long.reply.tokens:
        take_turn(base)
        turns += 1
    assert turns == 9  # 130 tokens, 16 at a time
    assert len(running.reply.tokens) == before + turns
    while base.requests:
        take_turn(base)
    assert long.reply.tokens == alone("y" * 130, "a0")[:5]
    assert running.reply.tokens == alone("hi", None)


# ---------------------------------------------------------------- prefixes


def cached(base: _Base, *asked: Asked) -> list[int]:
    requests = serve(base, asked)
    check(asked, requests)
    return [request.reply.cached_tokens for request in requests]


@pytest.mark.parametrize("adapter", [None, "a0"])
def test_system_prompts_and_turns_of_a_conversation_are_computed_once(adapter: str | None) -> None:
    base = make_base()
    assert cached(base, Asked(SYSTEM + "one", adapter, 40)) == [0]
    assert cached(base, Asked(SYSTEM + "two", adapter, 5)) == [len(SYSTEM) // 16 * 16]
    first = SYSTEM + "one" + bytes(alone(SYSTEM + "one", adapter)).decode()
    assert cached(base, Asked(first + " Go on.", adapter, 5)) == [(len(first) - 1) // 16 * 16]


def test_what_is_not_to_be_kept_leaves_nothing_behind_and_still_finds_what_is_there() -> None:
    base = make_base()
    assert cached(base, Asked(SYSTEM + "one", None, 40, background=True)) == [0]
    assert base.runner.cache.prefixes.tokens == 0
    assert cached(base, Asked(SYSTEM + "two", None, 5)) == [0]
    assert cached(base, Asked(SYSTEM + "one", None, 5, background=True)) == [len(SYSTEM) // 16 * 16]


def test_no_prefix_is_shared_between_adapters_or_with_the_base() -> None:
    base = make_base()
    for adapter in (None, "a0", "a1"):
        assert cached(base, Asked(SYSTEM + "one", adapter, 5)) == [0]
        assert cached(base, Asked(SYSTEM + "one", adapter, 5)) == [48]  # of 64: one token must be left over


def test_an_adapter_in_training_neither_leaves_prefixes_nor_finds_any() -> None:
    base = make_base()
    for _ in range(2):
        assert cached(base, Asked(SYSTEM + "one", "live", 5)) == [0]
    assert base.runner.cache.prefixes.tokens == 0


def test_other_weights_under_the_same_key_find_nothing_of_the_old_ones() -> None:
    base = make_base()
    asked = Asked(SYSTEM + "one", "a0", 5)
    serve(base, [asked])
    running = asked.request()
    add(base, running)
    take_turn(base)
    other = LORAS["a1"]
    assert other is not None
    base.runner.attach("a0", other, frozen=True)
    assert base.runner.cache.prefixes.tokens == 0
    base.end(running, "cancelled")
    assert base.runner.cache.prefixes.tokens == 0, "what the old weights computed was kept"
    (again,) = serve(base, [asked])
    assert again.reply.cached_tokens == 0
    assert again.reply.tokens == alone(asked.text, "a1")[:5]


# ---------------------------------------------------------------- the whole engine


def test_the_bound_refuses_what_could_never_run_and_says_how_to_raise_it() -> None:
    engine = Engine(threads=1)
    engine.start()
    try:
        engine.add_base("tiny", Runner(backend_for(DECODER), 100 * TOKEN_BYTES), Ascii())
        with pytest.raises(module.InvalidRequest, match="100") as refused:
            engine.submit(prompt("x" * 100))
        assert "FORTWO_CACHE_MB" in str(refused.value.hint)
        reply = engine.submit(prompt("x" * 90, max_tokens=50))
        assert len(reply.wait(10)) == 10
        assert engine.submit(prompt("x" * 90, max_tokens=1)).wait(10) == reply.text[:1]
    finally:
        engine.close()


def test_a_slot_left_taken_is_found_and_freed_when_nobody_runs(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(threads=1)
    engine.start()
    try:
        runner = Runner(backend_for(DECODER))
        engine.add_base("tiny", runner, Ascii())
        with caplog.at_level(logging.ERROR):
            engine.call(lambda: runner.cache.take(10)).result(5)
            engine.submit(prompt()).wait(10)
            engine.call(int).result(5)
        assert "slot(s) of the cache are taken" in caplog.text
        assert engine.call(lambda: runner.cache.used).result(5) == 0
    finally:
        engine.close()


def test_a_prompt_that_is_read_in_parts_and_preempted_half_way_is_read_like_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It finds and leaves no prefixes, since every token of it is wanted."""
    monkeypatch.setattr(module, "PROMPT_TOKENS", 50)
    base, asked = make_base(tokens=4 * 128), Asked(TEXTS[5], "a0", 0, read=True)
    serve(base, [Asked(TEXTS[5], "a0", 3)])
    kept = base.runner.cache.prefixes.tokens
    request = asked.request()
    add(base, request)
    take_turn(base)
    assert request.uncomputed == len(asked.text) - 50
    base.preempt(request)
    while not request.reply.done:
        take_turn(base)
    check([asked], [request])
    assert (request.reply.finish_reason, request.reply.tokens) == ("length", [])
    assert base.runner.cache.prefixes.tokens == kept > 0
    base.runner.cache.check_idle()

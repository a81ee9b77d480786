"""The device's owner: replies, alone and together; jobs beside them; and that everything accepted ends."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from fortwo.engine.engine import Engine
from fortwo.engine.generation import Reply
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence
from fortwo.errors import Conflict, InvalidRequest, NotFound, Unavailable, UnsupportedModel
from fortwo.execution.backend import backend_for
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import MAX_RUNNING, Delta, FinishReason, Prompt, Sampling
from fortwo.records import MicroStepped, Phase, TrainEvent, Waiting

CONTEXT = 256
CONFIG = DecoderConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }
)


class Ascii:
    """Token n is the character n; nothing is held back."""

    def __init__(self, *stop_ids: int) -> None:
        self.stop_ids = frozenset(stop_ids)

    def stream(self, context: object = (), shown: object = ()) -> Ascii:
        return self

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def make_decoder(seed: int = 0) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    h, i, kv = CONFIG.hidden, CONFIG.intermediate, CONFIG.kv_heads * CONFIG.head_size
    shapes = {"model.embed_tokens.weight": (CONFIG.vocabulary, h), "model.norm.weight": (h,)}
    for layer in range(CONFIG.layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (h,), f"{at}.post_attention_layernorm.weight": (h,)}
        shapes |= {
            f"{at}.self_attn.{name}_proj.weight": (out, h) for name, out in (("q", h), ("k", kv), ("v", kv), ("o", h))
        }
        shapes |= {f"{at}.mlp.{name}_proj.weight": (i, h) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (h, i)
    return Decoder(CONFIG, {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()})


def make_lora(seed: int, strength: float = 0.3) -> Lora:
    lora = Lora.init(LoraConfig(r=4, alpha=8), CONFIG, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora.parameters():
        tensor += strength * torch.randn(tensor.shape, generator=generator)
    return lora


DECODER = make_decoder()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(threads=1)
    engine.start()
    engine.add_base("tiny", Runner(backend_for(DECODER)), Ascii())
    yield engine
    engine.close()


def prompt(text: str = "hello", adapter: str | None = None, **sampling: Any) -> Prompt:
    return Prompt("tiny", tuple(text.encode()), adapter, Sampling(**{"max_tokens": 12, **sampling}))


def long(**sampling: Any) -> Prompt:
    """A request that takes a while."""
    return prompt(max_tokens=CONTEXT - 10, **sampling)


def alone(text: str, count: int, lora: Lora | None = None) -> str:
    """The greedy reply, each token from a forward over everything before it: no cache, no batch, no engine."""
    runner = Runner(backend_for(DECODER))
    if lora is not None:
        runner.attach("it", lora)
    tokens = list(text.encode())
    for _ in range(count):
        sequence = Sequence(list(tokens), None if lora is None else "it")
        tokens.append(int(runner.prefill([sequence])[0].argmax()))
        runner.release(sequence)
    return bytes(tokens[len(text) :]).decode()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


# ---------------------------------------------------------------- replies


def test_a_greedy_reply_is_what_the_plain_network_says(engine: Engine) -> None:
    reply = engine.submit(prompt("hello", max_tokens=40))
    assert reply.wait(10) == alone("hello", 40)
    assert reply.finish_reason == "length"
    assert reply.text.encode() == bytes(reply.tokens)


def test_a_mixed_batch_answers_each_request_as_if_it_were_alone(engine: Engine) -> None:
    loras: dict[str | None, Lora | None] = {None: None, **{f"a{n}": make_lora(n) for n in range(3)}}
    for key, lora in loras.items():
        if key is not None and lora is not None:
            engine.attach("tiny", key, lora)
    dice = random.Random(0)
    texts = ["hi", "a longer prompt", "shared beginning one", "shared beginning two"]
    asked = [(text, key, dice.randint(1, 30)) for text in texts for key in loras] * 2
    dice.shuffle(asked)
    replies = []
    for text, key, count in asked:
        replies.append(engine.submit(prompt(text, key, max_tokens=count)))
        time.sleep(dice.choice([0, 0, 0.002]))  # so that they join and leave at different steps
    for (text, key, count), reply in zip(asked, replies, strict=True):
        assert reply.wait(20) == alone(text, count, loras[key]), (text, key)
    assert len({alone("hi", 30, lora) for lora in loras.values()}) == 4, "the adapters make no difference"


def test_more_requests_than_run_at_once_are_all_answered(engine: Engine) -> None:
    replies = [engine.submit(prompt(max_tokens=3)) for _ in range(2 * MAX_RUNNING + 1)]
    assert {reply.wait(20) for reply in replies} == {alone("hello", 3)}


def test_a_seed_fixes_the_text_whatever_else_runs(engine: Engine) -> None:
    asked = prompt(temperature=1.5, top_p=0.95, seed=7, max_tokens=30)
    first = engine.submit(asked).wait(10)
    crowd = [engine.submit(long(temperature=1.0, seed=n)) for n in range(5)]
    assert engine.submit(asked).wait(10) == first
    assert engine.submit(prompt(temperature=1.5, top_p=0.95, seed=8, max_tokens=30)).wait(10) != first
    assert len({reply.wait(20) for reply in crowd}) == 5


def test_the_adapter_in_training_is_served_as_it_is_now(engine: Engine) -> None:
    lora = make_lora(1)
    engine.attach("tiny", "job", lora)
    before = engine.submit(prompt(adapter="job")).wait(10)
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.zero_()
    assert before != engine.submit(prompt(adapter="job")).wait(10) == engine.submit(prompt()).wait(10)


def test_two_bases_answer_side_by_side(engine: Engine) -> None:
    engine.add_base("other", Runner(backend_for(make_decoder(1))), Ascii())
    with pytest.raises(Conflict, match="other"):
        engine.add_base("other", Runner(backend_for(DECODER)), Ascii())
    asked = prompt(max_tokens=30)
    replies = [engine.submit(Prompt(base, asked.tokens, None, asked.sampling)) for base in ("tiny", "other")]
    texts = [reply.wait(10) for reply in replies]
    assert texts[0] == alone("hello", 30) != texts[1]


# ---------------------------------------------------------------- their ends


def test_a_stop_token_ends_the_reply_and_is_not_text(engine: Engine) -> None:
    text = alone("hello", 12)
    last = next(n for n in range(1, 12) if text[n] not in text[:n])
    engine.add_base("stops", Runner(backend_for(DECODER)), Ascii(ord(text[last])))
    reply = engine.submit(Prompt("stops", tuple(b"hello"), None, Sampling(max_tokens=12)))
    assert (reply.wait(10), reply.finish_reason) == (text[:last], "stop")


def test_a_stop_string_across_tokens_ends_the_reply_and_is_held_back(engine: Engine) -> None:
    text = alone("hello", 20)
    stop = text[5:8]
    seen: list[Delta] = []
    reply = engine.submit(prompt(max_tokens=20, stop=(stop,)), seen.append)
    assert (reply.wait(10), reply.finish_reason) == (text[: text.index(stop)], "stop")
    until(lambda: bool(seen) and seen[-1].finish_reason is not None)
    assert "".join(delta.text for delta in seen) == reply.text
    assert seen == list(reply.deltas())


def test_the_context_ends_the_reply(engine: Engine) -> None:
    reply = engine.submit(prompt("x" * (CONTEXT - 3), max_tokens=100))
    assert reply.wait(10) == alone("x" * (CONTEXT - 3), 3)
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    ("tokens", "named"),
    [((), ["empty"]), ((1,) * CONTEXT, ["tiny", str(CONTEXT)]), ((1,) * 999, ["999", str(CONTEXT)])],
)
def test_a_prompt_that_does_not_fit_is_refused(engine: Engine, tokens: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.submit(Prompt("tiny", tokens))
    assert all(word in refused.value.message for word in named)
    assert refused.value.param == "messages"


def test_weights_that_are_not_here_are_refused_by_name(engine: Engine) -> None:
    with pytest.raises(NotFound, match="elsewhere"):
        engine.submit(Prompt("elsewhere", (1,)))
    with pytest.raises(NotFound, match="nobody"):
        engine.submit(prompt(adapter="nobody"))


def test_a_cancelled_request_ends_and_the_others_go_on(engine: Engine) -> None:
    cancelled, other = engine.submit(long()), engine.submit(long())
    until(lambda: len(cancelled.text) > 3)
    cancelled.cancel()
    assert len(cancelled.wait(10)) < CONTEXT - 10
    assert cancelled.finish_reason == "cancelled"
    assert other.wait(10) == alone("hello", CONTEXT - 10)


def test_a_failed_forward_ends_its_requests_with_the_error_and_no_others(engine: Engine) -> None:
    engine.add_base("broken", Runner(backend_for(make_decoder(1))), Ascii())
    foreign = engine.submit(Prompt("broken", (10**6,)))  # no such token
    healthy = engine.submit(prompt())
    until(lambda: foreign.done)
    assert foreign.finish_reason == "error"
    assert foreign.error is not None
    assert "IndexError" in foreign.error
    assert healthy.wait(10) == alone("hello", 12)
    assert engine.submit(Prompt("broken", (1,), None, Sampling(max_tokens=2))).wait(10)


def test_a_row_that_is_not_a_number_ends_with_an_error_and_its_neighbours_do_not(engine: Engine) -> None:
    engine.attach("tiny", "nan", make_lora(0, strength=float("nan")))
    both = engine.call(lambda: (engine.submit(prompt(adapter="nan")), engine.submit(prompt()))).result()
    until(lambda: both[0].done)
    assert (both[0].finish_reason, both[0].text) == ("error", "")
    with pytest.raises(UnsupportedModel, match="not finite"):
        both[0].wait(10)
    assert both[1].wait(10) == alone("hello", 12)


def test_a_listener_that_fails_ends_its_request_alone(engine: Engine) -> None:
    def listener(delta: Delta) -> None:
        raise RuntimeError("the connection is gone")

    deaf, other = engine.submit(long(), listener), engine.submit(prompt())
    until(lambda: deaf.done)
    assert deaf.finish_reason == "cancelled"
    assert other.wait(10) == alone("hello", 12)


def test_all_that_a_step_says_is_told_before_it_is_sent_on() -> None:
    told: list[Delta] = []
    sent: list[int] = []  # how much was told each time
    engine = Engine(threads=1, flush=lambda: sent.append(len(told)))
    engine.start()
    engine.add_base("tiny", Runner(backend_for(DECODER)), Ascii())
    engine.call(lambda: [engine.submit(prompt(), told.append) for _ in range(4)]).result()
    until(lambda: sent[-1] == 4 * 12)
    assert set(sent) == {4 * step for step in range(13)}
    engine.call(lambda: engine.submit(long(), told.append)).result()
    engine.close()
    assert told[-1].finish_reason == "cancelled"
    assert sent[-1] == len(told)


def test_detach_cancels_what_still_runs_and_nothing_else(engine: Engine) -> None:
    engine.attach("tiny", "a", make_lora(0))
    mine, other = engine.submit(long(adapter="a")), engine.submit(prompt())
    assert engine.count_requests("tiny", "a") == 1
    engine.detach("tiny", "a")
    assert mine.finish_reason == "cancelled"
    assert engine.count_requests("tiny", "a") == 0
    assert other.wait(10) == alone("hello", 12)
    with pytest.raises(NotFound, match="'a'"):
        engine.submit(prompt(adapter="a"))


def test_a_base_that_answers_is_not_removed(engine: Engine) -> None:
    running = engine.submit(long())
    with pytest.raises(Conflict, match="1 request"):
        engine.remove_base("tiny")
    running.cancel()
    running.wait(10)
    engine.remove_base("tiny")
    with pytest.raises(NotFound, match="tiny"):
        engine.submit(prompt())


def test_a_device_that_fails_ends_everything_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some errors of a GPU every further operation fails, that of giving memory back as well."""
    engine = Engine(threads=1)
    engine.start()
    runner = Runner(backend_for(DECODER))
    engine.add_base("tiny", runner, Ascii())
    replies = [engine.submit(long()) for _ in range(MAX_RUNNING + 3)]
    task = engine.run_task(forever(threading.Event()), lambda event: None)
    until(lambda: bool(replies[0].text))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "step", broken)
    monkeypatch.setattr(runner, "release", broken)
    until(lambda: engine.failed)
    until(lambda: all(reply.done for reply in replies))
    assert {reply.finish_reason for reply in replies} == {"error"}
    for refused in (
        lambda: task.result(10),
        lambda: replies[-1].wait(10),
        lambda: engine.submit(prompt()),
        engine.ready,
        lambda: engine.call(int),
    ):
        with pytest.raises(Unavailable, match="The device failed: RuntimeError: CUDA error") as raised:
            refused()
        assert raised.value.hint == "Start the server again."
    engine.close()


def test_closing_ends_everything_with_a_reason() -> None:
    engine = Engine(threads=1)
    engine.start()
    engine.add_base("tiny", Runner(backend_for(DECODER)), Ascii())
    ends: list[FinishReason | None] = []
    replies = [engine.submit(long(), lambda delta: ends.append(delta.finish_reason)) for _ in range(MAX_RUNNING + 3)]
    task = engine.run_task(forever(threading.Event()), lambda event: None)
    until(lambda: bool(replies[0].text))
    engine.close()
    engine.close()
    assert {reply.finish_reason for reply in replies} == {"cancelled"}
    assert ends.count("cancelled") == len(replies)
    with pytest.raises(CancelledError):
        task.result(0)
    for refused in (
        lambda: engine.submit(prompt()),
        lambda: engine.call(int),
        lambda: engine.run_task(forever(threading.Event()), print),
    ):
        with pytest.raises(Unavailable):
            refused()


def test_an_engine_that_never_started_still_ends_what_it_accepted() -> None:
    engine = Engine()
    future = engine.call(lambda: 42)
    task = engine.run_task(forever(threading.Event()), lambda event: None)
    engine.close()
    assert future.result(0) == 42
    with pytest.raises(CancelledError):
        task.result(0)


def test_calls_run_on_the_device_thread_and_bring_back_what_they_raise(engine: Engine) -> None:
    assert engine.call(lambda: threading.current_thread().name).result(5) == "fortwo-device"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(5)
    assert engine.call(lambda: 42).result(5) == 42


def test_an_idle_engine_uses_no_processor(engine: Engine) -> None:
    engine.submit(prompt()).wait(10)
    began = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - began < 0.1


# ---------------------------------------------------------------- jobs beside them


def forever(stopped: threading.Event) -> Generator[TrainEvent, None, None]:
    try:
        while True:
            torch.randn(64, 64) @ torch.randn(64, 64)
            yield Phase("running")
    finally:
        stopped.set()


def test_a_job_runs_to_its_result_and_tells_its_events(engine: Engine) -> None:
    def job() -> Generator[TrainEvent, None, float]:
        weight = torch.ones(3, requires_grad=True)
        for step in range(3):
            loss = (weight * step).sum()
            loss.backward()  # gradients are on, although replies are computed on the same thread
            yield Phase("running", str(step))
        assert weight.grad is not None
        return float(weight.grad.sum())

    seen: list[TrainEvent] = []
    assert engine.run_task(job(), seen.append).result(5) == 9.0
    assert seen == [Phase("running", str(step)) for step in range(3)]


def test_several_jobs_take_turns_and_one_that_waits_holds_up_no_other(engine: Engine) -> None:
    order, gate = list[str](), threading.Event()

    def job(name: str) -> Any:
        gate.wait(5)
        for _ in range(3):
            order.append(name)
            yield MicroStepped(1)

    def waiting() -> Any:
        while len(order) < 6:
            yield Waiting()

    blocked = engine.run_task(waiting(), lambda event: None)
    tasks = [engine.run_task(job(name), lambda event: None) for name in ("a", "b")]
    gate.set()
    for task in (*tasks, blocked):
        task.result(10)
    assert sorted(order) == [*"aaabbb"]
    assert order.index("b") < 5 - order[::-1].index("a")  # b begins before a ends


def test_replies_come_while_a_job_runs_and_the_job_goes_on(engine: Engine) -> None:
    steps: list[TrainEvent] = []
    task = engine.run_task(forever(threading.Event()), steps.append)
    until(lambda: len(steps) > 3)
    before = len(steps)
    assert engine.submit(prompt(max_tokens=60)).wait(20) == alone("hello", 60)
    assert not task.done
    assert len(steps) > before
    task.cancel()


def test_running_requests_get_as_much_of_the_device_as_the_job(engine: Engine) -> None:
    def job() -> Generator[TrainEvent, None, None]:
        while True:
            time.sleep(0.05)  # a micro-step far longer than a decode step
            yield Phase("running")

    steps: list[int] = []
    task = engine.run_task(job(), lambda event: steps.append(len(reply.tokens)))
    reply = engine.submit(prompt(max_tokens=200))
    reply.wait(20)
    task.cancel()
    during = [count for count in steps if 0 < count < 200]
    gains = [after - before for before, after in itertools.pairwise(during)]
    assert all(gain > 1 for gain in gains), "one token for a whole micro-step is not a fair share"
    assert len(steps) < 100


def test_a_job_that_waits_for_its_own_generations_gets_them(engine: Engine) -> None:
    def job() -> Generator[TrainEvent, None, list[str]]:
        engine.attach("tiny", "job", make_lora(2))
        try:
            replies = [engine.submit(prompt(text, "job")) for text in ("one", "two")]
            while not all(reply.done for reply in replies):
                yield Waiting()
            return [reply.text for reply in replies]
        finally:
            engine.detach("tiny", "job")

    seen: list[TrainEvent] = []
    chat = engine.submit(long())
    assert engine.run_task(job(), seen.append).result(10) == [alone(text, 12, make_lora(2)) for text in ("one", "two")]
    assert seen == []
    assert chat.wait(10) == alone("hello", CONTEXT - 10)


def test_what_a_job_asks_is_answered_while_users_chat_without_a_break(engine: Engine) -> None:
    chats: list[Reply] = []

    def ask() -> None:
        chats.append(engine.submit(prompt(), again))

    def again(delta: Delta) -> None:
        if delta.finish_reason not in (None, "cancelled") and not over.is_set():
            ask()

    over = threading.Event()
    engine.call(lambda: [ask() for _ in range(3)]).result()
    asked = Prompt("tiny", tuple(b"x" * 90), None, Sampling(max_tokens=20), background=True)
    replies = [engine.submit(asked) for _ in range(8)]
    assert {reply.wait(20) for reply in replies} == {alone("x" * 90, 20)}
    assert len(chats) > 3
    over.set()
    assert {reply.wait(20) for reply in chats} == {alone("hello", 12)}


def test_a_job_that_waits_for_nothing_is_asked_again_but_not_busily(engine: Engine) -> None:
    asked = []

    def job() -> Generator[TrainEvent, None, None]:
        while True:
            asked.append(1)
            yield Waiting()

    task = engine.run_task(job(), lambda event: None)
    time.sleep(0.3)
    task.cancel()
    assert 2 <= len(asked) <= 12


def test_a_failed_job_tells_its_waiter_and_the_engine_goes_on(engine: Engine) -> None:
    def job() -> Generator[TrainEvent, None, None]:
        yield Phase("preparing")
        raise ValueError("nan")

    with pytest.raises(ValueError, match="nan"):
        engine.run_task(job(), lambda event: None).result(5)
    assert engine.submit(prompt()).wait(10) == alone("hello", 12)


def test_what_on_event_raises_ends_the_job(engine: Engine) -> None:
    stopped = threading.Event()

    def on_event(event: TrainEvent) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        engine.run_task(forever(stopped), on_event).result(5)
    assert stopped.is_set()


def test_a_cancelled_job_cleans_up_and_another_one_goes_on(engine: Engine) -> None:
    def short() -> Generator[TrainEvent, None, str]:
        yield Phase("running")
        return "done"

    stopped, steps = threading.Event(), []
    first = engine.run_task(forever(stopped), steps.append)
    until(lambda: len(steps) > 3)
    assert engine.run_task(short(), lambda event: None).result(5) == "done"
    assert not first.done
    second = engine.run_task(forever(threading.Event()), lambda event: None)
    first.cancel()
    with pytest.raises(CancelledError):
        first.result(5)
    assert stopped.is_set()
    assert not second.done


def test_only_the_device_thread_computes_with_several_cpu_threads() -> None:
    """Also threads that come later, whatever order they first use torch in."""

    def threads() -> int:
        torch.ones(4).sum()
        return torch.get_num_threads()

    found: list[int] = []
    engine = Engine(threads=2)
    engine.start()
    try:
        other = threading.Thread(target=lambda: found.append(threads()))
        other.start()
        other.join()
        assert engine.call(threads).result(5) == 2
        assert [*found, threads()] == [1, 1]
        assert engine.call(threads).result(5) == 2
    finally:
        engine.close()

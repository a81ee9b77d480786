"""The serving forwards are the whole network's: prefill and steps, in any slots, beside any neighbours.

Tolerance: logits within 2e-5 of the pass over the whole row alone (fp32, sums in another order).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fortwo.engine import runner as module
from fortwo.engine.cache import SlotCache
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.models.lora import Lora, LoraConfig
from tests.parts import decoder, make_rows, packed_hidden, random_lora

CLOSE = {"atol": 2e-5, "rtol": 0}
LORAS: dict[str, Lora] = {
    "a": random_lora(decoder(), 1),
    "b": random_lora(decoder(), 2, LoraConfig(r=2, alpha=8, target_modules=("q_proj", "down_proj"))),
    "c": random_lora(decoder(), 3, LoraConfig(r=3, alpha=6, layers=(1,))),
}


@pytest.fixture
def runner() -> Runner:
    runner = Runner(decoder())
    for key, lora in LORAS.items():
        runner.attach(key, lora)
    return runner


@torch.no_grad()
def expected(sequence: Running) -> Tensor:
    """Next-token logits from one pass over the row alone."""
    lora = None if sequence.adapter is None else LORAS[sequence.adapter]
    return decoder().logits(packed_hidden(decoder(), [sequence.tokens], lora, prefix=0)[0][-1:])[0]


def check(sequences: Sequence[Running], logits_BV: Tensor) -> None:
    for sequence, logits_V in zip(sequences, logits_BV, strict=True):
        torch.testing.assert_close(logits_V, expected(sequence), **CLOSE)


def step(runner: Runner, sequences: Sequence[Running], token: int = 9) -> None:
    for sequence in sequences:
        sequence.tokens.append(token)
    check(sequences, runner.step(sequences))


def sequences(lengths: Sequence[int], start: Sequence[int] = (), adapters: str = " ") -> list[Running]:
    keys = [None if key == " " else key for key in adapters] * len(lengths)
    return [Running(row, key) for row, key in zip(make_rows(lengths, start), keys, strict=False)]


@pytest.mark.parametrize("adapters", [" ", "a", " ab", "abc ca"])
@pytest.mark.parametrize("start", [(), (5, 6, 7, 8)])
def test_prefill_and_steps_are_the_whole_pass_of_each_row_alone(
    runner: Runner, adapters: str, start: tuple[int, ...]
) -> None:
    running = sequences([3, 20, 1, 9, 9, 2], start, adapters)
    check(running, runner.prefill(running))
    for token in (7, 30, 200):
        step(runner, running, token)
    apart = [expected(Running(running[0].tokens, key)) for key in (None, "a", "b", "c")]
    assert all((one - two).abs().max() > 0.05 for n, one in enumerate(apart) for two in apart[:n])


def test_large_prefills_are_split_and_answered_in_order(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    running = sequences([9, 3, 8, 40, 2, 2], adapters=" a a a")
    groups = module._prefill_groups(running)
    assert sorted(place for group in groups for place in group) == list(range(6))
    for group in groups:
        assert len({running[place].adapter for place in group}) == 1
        assert len(group) == 1 or sum(len(running[place].tokens) for place in group) <= 16
    check(running, runner.prefill(running))


def test_slots_are_used_again_and_what_they_held_is_not_seen(runner: Runner) -> None:
    first = sequences([60, 50, 40])
    runner.prefill(first)
    assert [sequence.slot for sequence in first] == [0, 1, 2]
    runner.release(first[1])
    assert (first[1].slot, runner.cache.used) == (None, 2)
    (second,) = sequences([4], adapters="a")
    check([second], runner.prefill([second]))
    assert second.slot == 1
    for _ in range(3):
        step(runner, [first[0], second, first[2]])
    runner.release(first[1])  # it has no slot: nothing happens
    assert runner.cache.used == 3


def test_what_a_broken_adapter_left_in_a_slot_harms_nobody(runner: Runner) -> None:
    """Masked values are multiplied by zero, and zero times nan is nan."""
    runner.attach("nan", random_lora(decoder(), 4))
    for tensor in runner._loras["nan"].parameters():
        tensor.fill_(torch.nan)
    (broken,) = sequences([60], adapters="a")
    broken.adapter = "nan"
    assert runner.prefill([broken]).isnan().all()
    runner.release(broken)
    running = sequences([4, 50])
    runner.prefill(running)
    assert running[0].slot == 0
    step(runner, running)


def test_steps_take_any_slots_in_any_order(runner: Runner) -> None:
    running = sequences([5, 9, 3, 7, 2], adapters="ab ca")
    runner.prefill(running)
    for places in ((0, 1, 2, 3, 4), (4, 0, 2), (3,), (1, 2), (0,), (2, 1, 0), (0, 1, 2, 3, 4)):
        step(runner, [running[place] for place in places])


def test_growth_in_slots_and_length_keeps_what_was_there() -> None:
    runner = Runner(decoder())
    runner.cache = SlotCache(decoder().config, slots=2, length=4)
    running = sequences([3, 2])
    runner.prefill(running)
    before = runner.cache.k[0].shape
    later = sequences([30, 6, 5], start=[11])
    check(later, runner.prefill(later))
    assert (runner.cache.slots, runner.cache.length) == (8, 32)
    assert before == (2, 2, 4, 16)
    for _ in range(6):
        step(runner, [*later, *running])
    assert runner.cache.length == 64


def test_a_row_runs_to_the_end_of_the_context() -> None:
    runner, (row,) = Runner(decoder()), sequences([decoder().config.context - 3])
    check([row], runner.prefill([row]))
    for _ in range(3):
        step(runner, [row])
    assert len(row.tokens) == runner.cache.length == decoder().config.context


def test_comings_and_goings_at_random(runner: Runner) -> None:
    dice, running = random.Random(0), list[Running]()

    def arrivals() -> Iterator[Running]:
        for number in range(dice.randint(0, 4)):
            tokens = [number, *(dice.randrange(262) for _ in range(dice.randint(0, 40)))]
            yield Running(tokens, dice.choice([None, "a", "b", "c"]))

    for _ in range(25):
        for sequence in [one for one in running if dice.random() < 0.25]:
            runner.release(sequence)
            running.remove(sequence)
        if arrived := list(arrivals()):
            check(arrived, runner.prefill(arrived))
            running += arrived
        dice.shuffle(running)
        if running:
            step(runner, running, dice.randrange(262))
        assert runner.cache.used == len(running) == len({sequence.slot for sequence in running})


def test_live_tensors_are_served_and_a_detached_adapter_is_gone(runner: Runner) -> None:
    lora = random_lora(decoder(), 5)
    runner.attach("live", lora)
    (row,) = sequences([6])
    row.adapter = "live"
    before = runner.prefill([row])[0]
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.zero_()
    row.adapter, plain = "live", Running(row.tokens, None)
    runner.release(row)
    after = runner.prefill([row])[0]
    torch.testing.assert_close(after, expected(plain), **CLOSE)
    assert (before - after).abs().max() > 0.1
    runner.detach("live")
    runner.detach("live")
    assert not runner.has("live")


# ---------------------------------------------------------------- the cache


def test_the_lowest_free_slot_is_taken_and_none_twice() -> None:
    cache = SlotCache(decoder().config, slots=3)
    assert [cache.take() for _ in range(3)] == [0, 1, 2]
    cache.give_back(2)
    cache.give_back(0)
    assert [cache.take(), cache.take()] == [0, 2]
    assert cache.take() == 3
    assert (cache.slots, cache.used) == (6, 4)


def test_a_slot_given_back_twice_is_a_mistake_that_shows() -> None:
    cache = SlotCache(decoder().config)
    slot = cache.take()
    cache.give_back(slot)
    with pytest.raises(AssertionError, match=f"slot {slot} "):
        cache.give_back(slot)


def test_length_doubles_up_to_the_context() -> None:
    cache = SlotCache(decoder().config, length=100)
    cache.reserve(100)
    assert cache.length == 100
    cache.reserve(101)
    assert cache.length == 200
    cache.reserve(201)
    assert cache.length == decoder().config.context == 256
    assert cache.bytes == 2 * 3 * 8 * 2 * 256 * 16 * 4

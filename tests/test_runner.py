"""The serving forwards are the whole network's: prefill and steps, in any slots, beside any neighbours.

Tolerance: logits within 2e-5 of the pass over the whole row alone (fp32, sums in another order).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution.backend import backend_for
from fortwo.execution.kv_cache import Pool, Slot
from fortwo.execution.parts import Part
from fortwo.execution.reference import prefill_groups
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from tests.parts import decoder, make_rows, packed_hidden, random_lora

CLOSE = {"atol": 2e-5, "rtol": 0}
LORAS: dict[str, Lora] = {
    "a": random_lora(decoder(), 1),
    "b": random_lora(decoder(), 2, LoraConfig(r=2, alpha=8, target_modules=("q_proj", "down_proj"))),
    "c": random_lora(
        decoder(), 3, LoraConfig(r=3, alpha=6, layers=(1,), use_rslora=True, rank_pattern=(("k_proj", 5),))
    ),
}


@pytest.fixture(params=[False, True], ids=["live", "frozen"])
def runner(request: pytest.FixtureRequest) -> Runner:
    runner = Runner(backend_for(decoder()))
    for key, lora in LORAS.items():
        runner.attach(key, lora, frozen=request.param)
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
        assert runner.extend(sequence)
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


def places(sequences: Sequence[Running]) -> list[tuple[int, int]]:
    """(capacity, row) of each."""
    return [(sequence.slot.capacity, sequence.slot.row) for sequence in sequences if sequence.slot is not None]


def test_rows_are_used_again_and_what_they_held_is_not_seen(runner: Runner) -> None:
    first = sequences([60, 50, 40])
    runner.prefill(first)
    assert places(first) == [(128, 0), (128, 1), (128, 2)]
    runner.release(first[1])
    assert (first[1].slot, runner.cache.used) == (None, 2)
    (second,) = sequences([4], adapters="a")
    check([second], runner.prefill([second]))
    assert places([second]) == [(128, 1)]
    for _ in range(3):
        step(runner, [first[0], second, first[2]])
    runner.release(first[1])  # it has no slot: nothing happens
    assert runner.cache.used == 3


def test_holes_are_closed_by_the_next_step(runner: Runner) -> None:
    running = sequences([3, 20, 5, 9, 30], adapters="ab")
    runner.prefill(running)
    for gone in (1, 0):
        runner.release(running.pop(gone))
        step(runner, running)
    assert sorted(places(running)) == [(128, 0), (128, 1), (128, 2)]


def test_what_a_broken_adapter_left_in_a_slot_harms_nobody(runner: Runner) -> None:
    """Masked values are multiplied by zero, and zero times nan is nan."""
    broken_lora = random_lora(decoder(), 4)
    for tensor in broken_lora.parameters():
        tensor.fill_(torch.nan)
    runner.attach("nan", broken_lora, frozen=True)
    (broken,) = sequences([60], adapters="a")
    broken.adapter = "nan"
    assert runner.prefill([broken]).isnan().all()
    runner.release(broken)
    running = sequences([4, 50])
    runner.prefill(running)
    assert places(running)[0] == (128, 0)
    step(runner, running)


def test_steps_take_any_slots_in_any_order(runner: Runner) -> None:
    running = sequences([5, 9, 3, 7, 2], adapters="ab ca")
    runner.prefill(running)
    for places in ((0, 1, 2, 3, 4), (4, 0, 2), (3,), (1, 2), (0,), (2, 1, 0), (0, 1, 2, 3, 4)):
        step(runner, [running[place] for place in places])


def test_a_sequence_that_outgrows_its_row_moves_to_a_larger_one() -> None:
    runner = Runner(backend_for(decoder()))
    running = sequences([126, 127, 128, 5])
    runner.prefill(running)
    assert places(running) == [(128, 0), (128, 1), (256, 0), (128, 2)]
    for _ in range(3):
        step(runner, running)
    assert sorted(places(running)) == [(128, 0), (256, 0), (256, 1), (256, 2)]


def test_a_row_runs_to_the_end_of_the_context() -> None:
    runner, (row,) = Runner(backend_for(decoder())), sequences([decoder().config.context - 3])
    check([row], runner.prefill([row]))
    for _ in range(3):
        step(runner, [row])
    assert places([row]) == [(256, 0)]
    assert len(row.tokens) == runner.cache.longest == decoder().config.context


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
        assert runner.cache.used == len(running) == len({*places(running)})


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


def test_which_prompts_are_read_together() -> None:
    """Whole ones of one adapter always; where adapters can be mixed, all that are alone or begun."""
    slot = Slot(Pool(decoder().config, 128, "cpu", torch.float32), 0)
    told = ((3, "a", True), (4, "a", True), (5, "b", True), (6, None, True), (2, "c", False))
    parts = [Part([0] * length, 0, slot, adapter, ends) for length, adapter, ends in told]
    assert [numbers for numbers, _ in prefill_groups(parts, mixed=False)] == [[0, 1], [2], [3], [4]]
    assert prefill_groups(parts, mixed=True) == [([0, 1], True), ([2, 3, 4], False)]
    assert prefill_groups(parts[:2], mixed=True) == [([0, 1], True)]

"""Rows, their moves, the bound, and prefixes that are kept; what is in them is checked against a plain copy."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fortwo.engine.cache import Cache
from fortwo.engine.prefixes import BLOCK, Prefixes
from fortwo.execution.kv_cache import Slot, side_by_side
from fortwo.prompts import MIN_ROW_TOKENS
from tests.parts import decoder

CONFIG = decoder().config  # context 256


def fill(cache: Cache, slot: Slot, length: int, seed: int = 0) -> list[Tensor]:
    """Write random keys and values for `length` tokens; what was written, layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    slot.length = length
    written = []
    for tensor in slot.pool.kv.flatten(0, 1):
        tensor[slot.row, :, :length] = torch.randn(tensor.shape[1], length, tensor.shape[3], generator=generator)
        written.append(tensor[slot.row, :, :length].clone())
    return written


def held(cache: Cache, slot: Slot) -> list[Tensor]:
    pool = slot.pool
    return [tensor[slot.row, :, : slot.length] for tensor in pool.kv.flatten(0, 1)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def take(cache: Cache, length: int) -> Slot:
    slot = cache.take(length)
    assert slot is not None
    return slot


# ---------------------------------------------------------------- rows


def test_the_lowest_free_row_of_the_smallest_capacity_is_taken_and_none_twice() -> None:
    cache = Cache(CONFIG)
    slots = [take(cache, length) for length in (1, MIN_ROW_TOKENS, MIN_ROW_TOKENS + 1, 256, 5)]
    assert [(slot.capacity, slot.row) for slot in slots] == [(128, 0), (128, 1), (256, 0), (256, 1), (128, 2)]
    cache.give_back(slots[0])
    assert take(cache, 9).row == 0
    assert (cache.used, cache.take(257)) == (5, None)


def test_a_slot_given_back_twice_is_a_mistake_that_shows() -> None:
    cache = Cache(CONFIG)
    slot = take(cache, 1)
    cache.give_back(slot)
    with pytest.raises(AssertionError, match="given back twice"):
        cache.give_back(slot)


@given(st.lists(st.integers(0, 7), unique=True, min_size=1), st.lists(st.integers(0, 7), unique=True))
def test_chosen_rows_come_together_and_keep_what_they_hold(chosen: list[int], gone: list[int]) -> None:
    cache = Cache(CONFIG)
    slots = [take(cache, 1) for _ in range(8)]
    written = [fill(cache, slot, 1 + 9 * place, seed=place) for place, slot in enumerate(slots)]
    for place in gone:
        cache.give_back(slots[place])
    wanted = [slots[place] for place in chosen if place not in gone]
    parts = side_by_side(wanted)
    assert [slot.row for _, members in parts for slot in members] == list(range(len(wanted)))
    assert {id(slot) for _, members in parts for slot in members} == {id(slot) for slot in wanted}
    for place, slot in enumerate(slots):
        if place not in gone:
            assert same(held(cache, slot), written[place])


def test_rows_that_lie_together_are_not_moved() -> None:
    cache = Cache(CONFIG)
    slots = [take(cache, 1) for _ in range(4)]
    side_by_side(slots[:3])
    assert [slot.row for slot in slots] == [0, 1, 2, 3]


def test_a_slot_grows_into_a_larger_row_with_what_it_holds() -> None:
    cache = Cache(CONFIG)
    other, slot = take(cache, 1), take(cache, 1)
    written = fill(cache, slot, 100)
    assert cache.grow(slot, 128)
    assert (slot.capacity, slot.row) == (128, 1)
    assert cache.grow(slot, 129)
    assert (slot.capacity, slot.row, cache.used) == (256, 0, 2)
    assert same(held(cache, slot), written)
    cache.give_back(slot)
    cache.give_back(other)
    cache.check_idle()


# ---------------------------------------------------------------- the bound


def test_the_bound_holds_and_spare_rows_give_way() -> None:
    cache = Cache(CONFIG, bound=4 * 128 + 10)
    small = [take(cache, 10) for _ in range(4)]
    assert cache.take(10) is None
    assert cache.take(200) is None
    for slot in small[:2]:
        cache.give_back(slot)
    large = take(cache, 200)
    assert (cache.tokens, cache.used) == (2 * 128 + 256, 3)
    assert cache.bytes == cache.tokens * 2 * 4 * 3 * 2 * 16
    assert cache.take(10) is None
    cache.give_back(large)
    assert cache.take(10) is not None


class WithState:
    """The shape of a network whose sequences carry a state as large as the keys and values of 30 tokens and a half."""

    state_bytes = Cache.bytes_per_token(CONFIG, torch.float32) * 61 // 2

    def __getattr__(self, name: str) -> Any:
        return getattr(CONFIG, name)


def test_a_state_takes_room_of_tokens() -> None:
    cache = Cache(WithState(), bound=2 * (128 + 31))
    slots = [take(cache, 100) for _ in range(2)]
    assert cache.take(1) is None
    assert cache.tokens == cache.bound
    cache.give_back(slots[0])
    assert not cache.grow(slots[1], 200)
    assert Cache(WithState(), bound=100).longest == 69
    assert Cache(WithState(), bound=20).longest == 0


def test_a_slot_that_cannot_grow_stays_as_it_is() -> None:
    cache = Cache(CONFIG, bound=300)
    slot = take(cache, 100)
    written = fill(cache, slot, 100)
    assert not cache.grow(slot, 200)  # its own row is there until it has moved
    assert slot.capacity == 128
    assert same(held(cache, slot), written)


def test_a_bound_below_the_context_is_the_longest_sequence() -> None:
    cache = Cache(CONFIG, bound=200)
    assert cache.longest == 200
    assert take(cache, 200).capacity == 200
    assert Cache(CONFIG).longest == Cache(CONFIG, bound=10**6).longest == 256


def test_taken_slots_are_found_when_nobody_should_run() -> None:
    cache = Cache(CONFIG)
    cache.check_idle()
    take(cache, 10)
    with pytest.raises(AssertionError, match="1 slot"):
        cache.check_idle()
    cache.clear()
    cache.check_idle()
    assert cache.tokens == 0


# ---------------------------------------------------------------- prefixes


def opened(cache: Cache, tokens: list[int], root: int | None = 0) -> Slot:
    slot = take(cache, len(tokens))
    slot.root = root
    cache.recall(slot, tokens)
    return slot


def test_what_was_kept_is_recalled_in_whole_blocks_for_the_same_weights_only() -> None:
    cache, tokens = Cache(CONFIG), list(range(70))
    slot = opened(cache, tokens)
    assert slot.length == 0
    written = fill(cache, slot, 70)
    cache.keep(slot, tokens)
    cache.give_back(slot)
    again = opened(cache, [*tokens, 9, 9])
    assert again.length == 4 * BLOCK
    assert same(held(cache, again), [one[:, : 4 * BLOCK] for one in written])
    assert opened(cache, tokens, root=1).length == 0
    assert opened(cache, tokens, root=None).length == 0
    assert opened(cache, [*tokens[:40], 99, *tokens[41:]]).length == 2 * BLOCK
    assert opened(cache, [99, *tokens[1:]]).length == 0


def test_a_token_is_left_over_even_when_all_is_kept() -> None:
    cache, tokens = Cache(CONFIG), list(range(2 * BLOCK))
    slot = opened(cache, tokens)
    fill(cache, slot, 2 * BLOCK)
    cache.keep(slot, tokens)
    assert cache.prefixes.tokens == 2 * BLOCK
    assert opened(cache, tokens).length == BLOCK


def test_what_only_one_may_see_is_not_kept() -> None:
    cache, tokens = Cache(CONFIG), list(range(64))
    slot = opened(cache, tokens, root=None)
    fill(cache, slot, 64)
    cache.keep(slot, tokens)
    assert cache.prefixes.tokens == 0


def test_equal_beginnings_are_kept_once() -> None:
    cache = Cache(CONFIG)
    for end in range(5):
        tokens = [*range(64), *[200 + end] * 16]
        slot = opened(cache, tokens)
        fill(cache, slot, 80)
        cache.keep(slot, tokens)
    assert cache.prefixes.tokens == 64 + 5 * 16


def test_the_least_recently_used_prefix_gives_way_to_new_ones_and_all_to_rows() -> None:
    cache = Cache(CONFIG, bound=2 * 128 + 4 * BLOCK)
    slot = take(cache, 1)
    slot.root = 0
    fill(cache, slot, 2 * BLOCK)
    prompts = [[start] * 2 * BLOCK for start in range(3)]
    for tokens in prompts[:2]:
        cache.keep(slot, tokens)
    assert opened(cache, [*prompts[0], 9]).length == 2 * BLOCK  # used again: now the other one is older
    cache.keep(slot, prompts[2])
    lengths = [cache.prefixes.length(0, tokens) for tokens in prompts]
    assert lengths == [2 * BLOCK, 0, 2 * BLOCK]
    assert cache.take(1) is None or cache.prefixes.tokens == 0
    assert cache.tokens <= 2 * 128 + 4 * BLOCK


def test_a_prefix_loses_its_end_before_its_beginning() -> None:
    prefixes, tokens = Prefixes(), list(range(3 * BLOCK))
    keys = prefixes.keys(0, tokens)
    for key in keys:
        prefixes.add(0, key, torch.zeros(1))
    prefixes.touch(keys)
    for left in (2, 1, 0):
        assert prefixes.evict()
        assert prefixes.length(0, tokens) == left * BLOCK
    assert not prefixes.evict()


def test_forgetting_weights_forgets_theirs_alone() -> None:
    prefixes, tokens = Prefixes(), list(range(BLOCK))
    for root in (1, 2):
        prefixes.add(root, prefixes.keys(root, tokens)[0], torch.zeros(1))
    prefixes.forget(1)
    assert (prefixes.length(1, tokens), prefixes.length(2, tokens)) == (0, BLOCK)


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_whatever_comes_and_goes_the_bound_and_the_contents_hold(seed: int, rows: int) -> None:
    dice, cache = random.Random(seed), Cache(CONFIG, bound=rows * 100)
    running: dict[int, tuple[Slot, list[Tensor]]] = {}
    for number in range(60):
        if running and dice.random() < 0.4:
            slot, written = running.pop(dice.choice(list(running)))
            assert same(held(cache, slot), written)
            cache.keep(slot, [dice.randrange(2)] * slot.length)
            cache.give_back(slot)
        elif running and dice.random() < 0.3:
            slot, written = running[dice.choice(list(running))]
            cache.grow(slot, dice.randint(1, 256))
            assert same(held(cache, slot), written)
        elif slot_or_none := cache.take(length := dice.randint(1, 256)):
            slot_or_none.root = 0
            running[number] = slot_or_none, fill(cache, slot_or_none, length, number)
        if running:
            side_by_side(dice.sample([slot for slot, _ in running.values()], dice.randint(1, len(running))))
        assert cache.tokens <= rows * 100
        assert cache.used == len(running)
    for slot, written in running.values():
        assert same(held(cache, slot), written)


def test_spare_rows_go_and_what_runs_stays() -> None:
    cache = Cache(CONFIG)
    slots = [take(cache, 20) for _ in range(6)]
    written = fill(cache, slots[4], 20)
    for slot in (*slots[:4], slots[5]):
        cache.give_back(slot)
    cache.trim()
    assert cache.tokens == MIN_ROW_TOKENS
    assert same(held(cache, slots[4]), written)
    cache.give_back(slots[4])
    cache.trim()
    assert cache.tokens == 0

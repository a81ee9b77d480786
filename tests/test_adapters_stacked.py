"""Rows of many stacked adapters get what each adapter alone gives them, whatever is added, removed and moved.

Tolerance: 1e-5 on values near 1 (fp32, sums in another order).
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fortwo.execution.adapters_stacked import Bank, Stacked, StackedAdapters, batched_rows
from fortwo.nn.lora import Lora, Segment, lora_product
from fortwo.nn.lora_config import GROUPS, LoraConfig
from tests.parts import decoder, random_lora

CLOSE = {"atol": 1e-5, "rtol": 0}
CONFIG = decoder().config
SHAPES = (
    LoraConfig(r=4, alpha=12),
    LoraConfig(r=2, alpha=3, target_modules=("q_proj", "down_proj"), layers=(0, 2)),
    LoraConfig(
        r=3, alpha=5, use_rslora=True, rank_pattern=(("v_proj", 6), ("up_proj", 1)), alpha_pattern=(("k_proj", 9),)
    ),
)


def filled(count: int, shape: LoraConfig = SHAPES[0]) -> tuple[StackedAdapters, dict[str, Lora]]:
    banks, loras = StackedAdapters(CONFIG, torch.device("cpu")), {}
    for number in range(count):
        loras[f"a{number}"] = random_lora(decoder(), number, shape)
        banks.add(f"a{number}", loras[f"a{number}"])
    return banks, loras


def check(banks: StackedAdapters, loras: dict[str, Lora], rows: dict[str, list[int]], total: int) -> None:
    """Each fused product of the rows is that of each adapter alone, and of the plain weights for the rest."""
    generator = torch.Generator().manual_seed(0)
    updates = banks.updates(rows)
    for group in GROUPS:
        outputs = max(CONFIG.columns(name)[1] for name in GROUPS[group])
        x = torch.randn(total, CONFIG.in_features(group), generator=generator) * 0.1
        weight = torch.randn(outputs, CONFIG.in_features(group), generator=generator) * 0.1
        with torch.no_grad():
            mixed = lora_product(x, weight, 2, group, updates)
            plain = lora_product(x, weight, 2, group, [])
            for key, own in rows.items():
                alone = lora_product(x, weight, 2, group, [Segment(loras[key])])
                torch.testing.assert_close(mixed[own], alone[own], **CLOSE)
        others = [row for row in range(total) if not any(row in own for own in rows.values())]
        assert torch.equal(mixed[others], plain[others]), "plain rows are touched"


def test_rows_that_follow_each_other_may_be_named_as_a_slice() -> None:
    lora, x, weight = random_lora(decoder()), torch.randn(7, CONFIG.hidden), torch.randn(CONFIG.hidden, CONFIG.hidden)
    with torch.no_grad():
        wanted = lora_product(x, weight, 1, "o", [Segment(lora, torch.arange(3, 7))])
        found = lora_product(x, weight, 1, "o", [Segment(lora, slice(3, None))])
        plain = lora_product(x, weight, 1, "o", [])
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert torch.equal(found[:3], plain[:3]), "plain rows are touched"


@given(st.data())
def test_each_row_gets_its_own_adapters_update(data: st.DataObject) -> None:
    banks, loras = filled(5)
    for key, shape in (("b0", SHAPES[1]), ("b1", SHAPES[1]), ("c0", SHAPES[2]), ("c1", SHAPES[2])):
        loras[key] = random_lora(decoder(), 9, shape)
        banks.add(key, loras[key])
    owners = data.draw(st.lists(st.sampled_from([None, *loras]), min_size=1, max_size=14))
    rows = {key: [row for row, owner in enumerate(owners) if owner == key] for key in dict.fromkeys(owners) if key}
    check(banks, loras, rows, len(owners))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_comes_out_as_it_went_in(shape: LoraConfig) -> None:
    banks, loras = filled(3, shape)
    for key, lora in loras.items():
        got, wanted = banks.lora(key).state(), lora.state()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_tensors_are_copied() -> None:
    banks, loras = filled(1)
    before = {name: tensor.clone() for name, tensor in banks.lora("a0").state().items()}
    with torch.no_grad():
        for tensor in loras["a0"].parameters():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in banks.lora("a0").state().items())


def test_comings_and_goings_leave_every_adapter_itself() -> None:
    dice = random.Random(0)
    banks, loras = StackedAdapters(CONFIG, torch.device("cpu")), dict[str, Lora]()
    for number in range(120):
        if loras and dice.random() < (0.3 if number < 60 else 0.7):
            key = dice.choice(list(loras))
            banks.remove(key)
            del loras[key]
            assert key not in banks
        else:
            key = f"a{number}"
            loras[key] = random_lora(decoder(), number, dice.choice(SHAPES))
            banks.add(key, loras[key])
        if number % 10 == 0 and loras:
            chosen = dice.sample(list(loras), dice.randint(1, min(4, len(loras))))
            check(banks, loras, {key: [place] for place, key in enumerate(chosen)}, len(chosen) + 1)
    for key, lora in loras.items():
        assert all(torch.equal(one, lora.state()[name]) for name, one in banks.lora(key).state().items())
    for key in list(loras):
        banks.remove(key)
    assert banks._banks == {}


def test_the_adapters_of_a_batch_are_brought_to_the_front_when_they_are_far_apart() -> None:
    bank = Bank(SHAPES[0], CONFIG, "cpu")
    for number in range(20):
        bank.add(f"a{number}", random_lora(decoder(), number))
    assert bank.gather(["a1", "a3"]) == 4
    assert bank.keys[:4] == ["a0", "a1", "a2", "a3"]
    assert bank.gather(["a19", "a3"]) == 2
    assert set(bank.keys[:2]) == {"a19", "a3"}
    assert bank.gather(["a19", "a3"]) == 2
    for key in ("a19", "a0", "a3"):
        wanted = random_lora(decoder(), int(key[1:])).state()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in bank.lora(key).state().items())


def test_one_crowd_is_not_padded_to() -> None:
    assert batched_rows([1] * 11) == 1
    assert batched_rows([4, 4, 3, 5]) == 5
    assert batched_rows([1] * 11 + [30]) == 1
    assert batched_rows([7]) in (0, 7)


def test_a_broken_adapter_harms_no_row_but_its_own() -> None:
    banks, _ = filled(3)
    broken = random_lora(decoder(), 7)
    for tensor in broken.parameters():
        tensor.fill_(torch.nan)
    banks.add("nan", broken)
    (update,) = banks.updates({"a0": [0, 3], "nan": [1], "a2": [4]})
    assert isinstance(update, Stacked)
    x, weight = torch.ones(5, CONFIG.hidden), torch.ones(CONFIG.hidden, CONFIG.hidden)
    with torch.no_grad():
        y = lora_product(x, weight, 0, "o", [update])
    assert y[1].isnan().all()
    assert y[[0, 2, 3, 4]].isfinite().all()

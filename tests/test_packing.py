"""Packed rows are what each row is alone: states, gradients, and nothing passes from one row to another.

Tolerance: hidden states within 2e-5 and gradients within 1e-4 of the plain pass (fp32, sums in another order; states
reach 5). What must be nothing is exactly zero.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fortwo.execution.packed_fused import FusedPackedAttention
from fortwo.kernels import cpu
from fortwo.nn.packing import PackedAttention, common_prefix, pack
from tests.parts import decoder, make_rows, packed_hidden

STATES = {"atol": 2e-5, "rtol": 0}
GRADIENTS = {"atol": 1e-4, "rtol": 1e-4}
ROWS = st.tuples(
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=5),
).map(lambda drawn: [[*drawn[0], *rest] for rest in drawn[1]])


@given(ROWS)
def test_a_common_prefix_is_the_longest_that_leaves_every_row_a_token(rows: list[list[int]]) -> None:
    shared = common_prefix(rows)
    assert all(row[:shared] == rows[0][:shared] and len(row) > shared for row in rows)
    assert min(map(len, rows)) == shared + 1 or len({row[shared] for row in rows}) > 1


@given(ROWS)
def test_every_token_of_every_row_has_its_place(rows: list[list[int]]) -> None:
    packed = pack(rows)
    for number, row in enumerate(rows):
        places = [packed.place(number, position) for position in range(len(row))]
        assert packed.tokens_T[places].tolist() == row
        assert packed.positions_T[places].tolist() == list(range(len(row)))
    assert packed.last_places().tolist() == [packed.place(n, len(row) - 1) for n, row in enumerate(rows)]
    assert len(packed.tokens_T) == packed.prefix + sum(len(row) - packed.prefix for row in rows)


@settings(max_examples=25)
@given(ROWS, st.data())
def test_a_pack_is_its_rows_alone_however_much_is_shared(rows: list[list[int]], data: st.DataObject) -> None:
    prefix = data.draw(st.integers(0, common_prefix(rows)))
    with torch.no_grad():
        together = packed_hidden(decoder(), rows, prefix=prefix)
        for row, hidden_TD in zip(rows, together, strict=True):
            torch.testing.assert_close(hidden_TD, packed_hidden(decoder(), [row], prefix=0)[0], **STATES)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("start", "lengths"), [([1, 2], [3, 8, 1]), ([], [5, 40, 17]), ([*range(9)], [70])])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs_row_by_row(kv_heads: int, start: list[int], lengths: list[int], kernel: bool) -> None:
    packed = pack(make_rows(lengths, start=start), prefix=len(start))
    kind = FusedPackedAttention if kernel else PackedAttention
    attention = kind(packed, replace(decoder().config, heads=4, kv_heads=kv_heads))
    T, H, E, generator = len(packed.tokens_T), 4, 8, torch.Generator().manual_seed(0)
    shapes = ((T, H, E), (T, kv_heads, E), (T, kv_heads, E))
    parts = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    upstream = torch.randn(T, H, E, generator=generator)
    qkv = torch.cat(parts, 1)
    ours = attention(0, qkv)
    wanted = torch.zeros(T, H, E)
    for row, length in enumerate(packed.lengths):
        places = [packed.place(row, position) for position in range(packed.prefix + length)]
        q, k, v = (part[places].transpose(0, 1) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
        own = places if row == 0 else places[packed.prefix :]
        wanted = wanted.index_put((torch.tensor(own),), mixed[-len(own) :])
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
    ours_grads, wanted_grads = (torch.autograd.grad(out, parts, upstream) for out in (ours, wanted))
    for got, want in zip(ours_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("way", ["tiles", "kernel", "torch"])
@pytest.mark.parametrize(
    ("start", "lengths"), [([], [1]), ([*range(24)], [31, 5, 40, 16, 17]), ([1, 2, 3], [150, 1, 33])]
)
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 64), (2, 32), (4, 96), (2, 24)])
def test_attention_in_bf16_is_the_plain_formula(
    kv_heads: int, size: int, start: list[int], lengths: list[int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch: as where there are no kernels, a GPU for one."""
    if way != "tiles":
        monkeypatch.setattr(cpu, "multiplies_tiles", lambda: False)
    packed = pack(make_rows(lengths, start=start), prefix=len(start))
    config = replace(decoder().config, heads=4, kv_heads=kv_heads)
    attention = (PackedAttention if way == "torch" else FusedPackedAttention)(packed, config)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(len(packed.tokens_T), 4 + 2 * kv_heads, size, generator=generator).bfloat16()
    upstream = torch.randn(len(packed.tokens_T), 4, size, generator=generator).bfloat16()
    found, wanted = qkv.requires_grad_(), qkv.detach().float().requires_grad_()
    ours, plain = attention(0, found), PackedAttention(packed, config)(0, wanted)
    (grad,) = torch.autograd.grad(ours, found, upstream)
    (exact,) = torch.autograd.grad(plain, wanted, upstream.float())
    rounding = 8e-3 if way == "torch" else 4e-3  # bf16 has 8 bits: 2e-3 is rounding the result alone
    for got, want in ((ours, plain), (grad, exact)):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= rounding * want.norm()
        torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.02)


def test_changing_a_row_changes_no_other() -> None:
    rows = make_rows([6, 6, 6], start=[5, 6])
    changed = [rows[0], [*rows[1][:3], *reversed(rows[1][3:])], rows[2]]
    with torch.no_grad():
        before, after = packed_hidden(decoder(), rows), packed_hidden(decoder(), changed)
    for place in (0, 2):
        torch.testing.assert_close(after[place], before[place], atol=1e-6, rtol=0)
    assert (after[1] - before[1]).abs().max() > 0.1


def test_a_token_reads_its_row_up_to_itself_and_nothing_else() -> None:
    """By gradients, so a leak of any size shows."""
    home, rows = decoder(), make_rows([5, 7, 3], start=[5, 6, 7])
    packed = pack(rows)
    x_TD = home.embed(packed.tokens_T).requires_grad_()
    angles, attention = home.angles(packed.positions_T), FusedPackedAttention(packed, home.config)
    hidden_TD = home.through_layers(x_TD, angles, attention)
    for row, position in ((0, 5), (1, 3), (1, 9), (2, 0), (2, 5)):
        (grad_TD,) = torch.autograd.grad(hidden_TD[packed.place(row, position)].sum(), x_TD, retain_graph=True)
        read = grad_TD.abs().sum(1).nonzero().flatten().tolist()
        assert read == sorted(packed.place(row, earlier) for earlier in range(position + 1))


def test_a_row_that_is_no_number_spoils_no_other() -> None:
    home, rows = decoder(), make_rows([5, 7, 3], start=[5, 6])
    packed = pack(rows)
    x_TD = home.embed(packed.tokens_T).clone()
    x_TD[packed.place(1, 3)] = torch.nan
    with torch.no_grad():
        angles, attention = home.angles(packed.positions_T), FusedPackedAttention(packed, home.config)
        hidden_TD = home.through_layers(x_TD, angles, attention)
    spoilt = set(hidden_TD.isnan().any(1).nonzero().flatten().tolist())
    own = [packed.place(1, position) for position in range(len(rows[1]))]
    assert set(own[3:]) <= spoilt <= set(own[packed.prefix :])

"""Rows of different lengths as one sequence of tokens, without attention across rows and without padding.

What all rows begin with (the system prompt, usually) is laid down once and shared: exact, because every row attends
to it and gradients of all rows flow back into it. Layout: [prefix | rest of row 0 | rest of row 1 | ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fortwo.nn.config import Shape


def common_prefix(rows: Sequence[Sequence[int]], left: int = 1) -> int:
    """How many tokens all rows share at their beginning; at least `left` tokens of each row are left over, if it has
    more."""
    limit = min(len(row) for row in rows) - left
    for place in range(limit):
        if any(row[place] != rows[0][place] for row in rows):
            return place
    return max(limit, 0)


@dataclass(frozen=True)
class Pack:
    """tokens_T and positions_T as the decoder takes them; `prefix` tokens are shared; `lengths` are the rests'."""

    tokens_T: Tensor
    positions_T: Tensor
    prefix: int
    lengths: tuple[int, ...]
    starts: tuple[int, ...]  # place in T of each rest's first token
    padded_index: Tensor  # place of each rest token in the padded (rows x longest) grid

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def place(self, row: int, position: int) -> int:
        """Index in T of a row's token."""
        if position < self.prefix:
            return position
        return self.starts[row] + position - self.prefix

    def last_places(self) -> Tensor:
        """Index in T of each row's last token."""
        ends = torch.tensor(self.lengths, device=self.tokens_T.device).cumsum(0)
        return ends + self.prefix - 1


def pack(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", prefix: int | None = None) -> Pack:
    """Pack token rows; `prefix` fixes how many leading tokens are shared (0 switches sharing off)."""
    shared = common_prefix(rows) if prefix is None else prefix
    lengths = tuple(len(row) - shared for row in rows)
    longest = max(lengths)
    tokens = list(rows[0][:shared]) + [token for row in rows for token in row[shared:]]
    positions = list(range(shared)) + [shared + place for length in lengths for place in range(length)]
    padded = [row * longest + place for row, length in enumerate(lengths) for place in range(length)]
    return Pack(
        tokens_T=torch.tensor(tokens, device=device),
        positions_T=torch.tensor(positions, device=device),
        prefix=shared,
        lengths=lengths,
        starts=tuple(accumulate(lengths[:-1], initial=shared)),
        padded_index=torch.tensor(padded, device=device),
    )


def trained_prefix(rows: Sequence[Sequence[int]], network: Shape) -> int:
    """`common_prefix` for a pass with gradients. Some of transformers' layers with a state write over the state when
    one token goes on from it, through which no gradient flows; two tokens are computed in another way."""
    return common_prefix(rows, left=2 if network.state_bytes else 1)


class PackedAttention:
    """The decoder's `attend` over a Pack: causal within a row; every row sees the prefix, none sees another row."""

    def __init__(self, pack: Pack, config: Shape) -> None:
        self.pack = pack
        self._config = config
        self._heads = config.heads, config.kv_heads
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}  # by window: of the rests, and of the prefix

    def _masks_of(self, window: int | None) -> tuple[Tensor, Tensor]:
        L, P, device = self.pack.longest, self.pack.prefix, self.pack.tokens_T.device
        return additive(seen(L, P, window, device)), additive(seen(P, 0, window, device))

    def __call__(self, layer: int, qkv_TNE: Tensor) -> Tensor:
        """On a padded grid."""
        softcap = self._config.attention_softcap
        P, R, L = self.pack.prefix, len(self.pack.lengths), self.pack.longest
        (H, K), (T, _, E) = self._heads, qkv_TNE.shape
        index, grid = self.pack.padded_index, R * L
        window = self._config.window_of(layer)
        if window not in self._masks:
            self._masks[window] = self._masks_of(window)
        rest_mask_LS, prefix_mask_PP = self._masks[window]
        prefix_PNE, rest_TNE = qkv_TNE.split([P, T - P])
        padded = rest_TNE.new_zeros(grid, (H + 2 * K) * E).index_copy(0, index, rest_TNE.flatten(1))
        q_RHLE, k_RKLE, v_RKLE = padded.view(R, L, H + 2 * K, E).transpose(1, 2).split([H, K, K], 1)
        if P:
            prefix_q_HPE, prefix_k_KPE, prefix_v_KPE = prefix_PNE.transpose(0, 1).split([H, K, K])
            k_RKLE = torch.cat([prefix_k_KPE.expand(R, K, P, E), k_RKLE], 2)
            v_RKLE = torch.cat([prefix_v_KPE.expand(R, K, P, E), v_RKLE], 2)
        mixed_RHLE = attention(q_RHLE, k_RKLE, v_RKLE, rest_mask_LS, softcap)
        mixed_TF = mixed_RHLE.transpose(1, 2).reshape(grid, H * E).index_select(0, index)
        if P:
            own = prefix_q_HPE[None], prefix_k_KPE[None], prefix_v_KPE[None]
            shared_HPE = attention(*own, prefix_mask_PP, softcap)[0]
            mixed_TF = torch.cat([shared_HPE.transpose(0, 1).reshape(P, H * E), mixed_TF])
        return mixed_TF.view(T, H, E)


def seen(length: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens each of `length` tokens behind `before` others may look at (length, before + length): those up to
    itself, the last `window` of them alone if there is one."""
    allowed = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
    return allowed if window is None else allowed.triu(before - window + 1)


def additive(allowed_LS: Tensor) -> Tensor:
    """What to add to scores: 0 where a token may look, -inf where it may not."""
    return torch.zeros(allowed_LS.shape, device=allowed_LS.device).masked_fill_(~allowed_LS, -torch.inf)


def attention(q_RHLE: Tensor, k_RKSE: Tensor, v_RKSE: Tensor, mask_LS: Tensor, softcap: float | None) -> Tensor:
    """Scaled dot products plus a mask; the query heads of a key/value head are folded into its rows, so nothing is
    repeated. softcap: c of c * tanh(score / c), before the mask.

    On the CPU this takes half the time of torch's fused attention, forward and backward, at these lengths.
    """
    R, H, L, E = q_RHLE.shape
    K, S = k_RKSE.shape[1:3]
    G = H // K
    q_NME = q_RHLE.reshape(R * K, G * L, E)
    k_NSE, v_NSE = k_RKSE.reshape(R * K, S, E), v_RKSE.reshape(R * K, S, E)
    mask_1MS = mask_LS.to(q_RHLE.dtype).repeat(G, 1)[None]
    if softcap is None:
        scores_NMS = torch.baddbmm(mask_1MS, q_NME, k_NSE.transpose(1, 2), alpha=E**-0.5)
    else:
        scores_NMS = torch.bmm(q_NME, k_NSE.transpose(1, 2)) * (E**-0.5 / softcap)
        scores_NMS = scores_NMS.tanh() * softcap + mask_1MS
    mixed_NME = torch.bmm(scores_NMS.softmax(-1, dtype=torch.float32).to(q_RHLE.dtype), v_NSE)
    return mixed_NME.view(R, H, L, E)

"""Tokens of any sequences on a GPU: `decoder.forward` recorded once for a number of tokens, then played back.

A forward is hundreds of launches, each of which takes the processor longer than a small model's takes the GPU; a CUDA
graph is one. What changes from one to the next (tokens, positions, whose adapter, where keys and values lie) is read
from one tensor, so a graph is for prompts as for one token of each of many sequences. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fortwo.execution.adapters_cuda import OwnRows
from fortwo.kernels import cuda
from fortwo.nn.decoder import Decoder

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # of a graph: others are padded
_TOLD = 7  # numbers of a token: itself, its position, `place` (4), whose adapter

Forward = Callable[[], Tensor]


class Graphs:
    """The decoder's forward. kv: type of the cache's keys and values. On the CPU, in tests, nothing is recorded."""

    def __init__(self, decoder: Decoder, kv: torch.dtype) -> None:
        c = decoder.config
        self._decoder, self._kv, self._records = decoder, kv, decoder.device.type == "cuda"
        self._told_T7 = torch.zeros(TOKENS[-1], _TOLD, dtype=torch.int64, device=decoder.device)
        self._nowhere = torch.zeros(2, c.layers, c.kv_heads, 1, c.head_size, dtype=kv, device=decoder.device)
        self._forwards: dict[tuple[int, int], Forward] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._records else None

    @staticmethod
    def fits(decoder: Decoder, kv: torch.dtype) -> bool:
        """Whether the decoder's forward can be recorded here. Of its features only those of attention matter, which is
        a kernel; the rest is the decoder's own forward."""
        c = decoder.config
        return cuda.present() and cuda.attends(c.head_size, kv) and c.attention_softcap is None

    def warm(self) -> None:
        """Compile all kernels, which takes seconds the first time on a machine, and record the shortest forwards."""
        for most in (0, 16) if self._records else ():
            self._forward([self._padding()], most)

    def __call__(self, told: Sequence[Sequence[int]], most: int) -> Tensor:
        """Hidden states (T, D) after the final norm. told: of each token itself, its position, the cache's `place` of
        its sequence (4), and its adapter's address or 0; tokens of a sequence in order. most: ranks of the largest
        adapter, 0 if no row has one."""
        parts = [told[first : first + TOKENS[-1]] for first in range(0, len(told), TOKENS[-1])]
        hidden = [self._forward(part, most).clone() for part in parts]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden)

    def _forward(self, told: Sequence[Sequence[int]], most: int) -> Tensor:
        """At most as many tokens as the largest graph has; until the next call."""
        T = next(size for size in TOKENS if size >= len(told))
        self._told_T7[:T].copy_(torch.tensor([*told, *[self._padding()] * (T - len(told))]))
        key = T, -(-most // 16) * 16
        if key not in self._forwards:
            self._forwards[key] = self._recorded(*key)
        return self._forwards[key]()[: len(told)]

    def _padding(self) -> tuple[int, ...]:
        """A row that stands alone, outside of the cache."""
        k, v = self._nowhere
        return 0, 0, k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), 0

    def _recorded(self, T: int, most: int) -> Forward:
        told_T7 = self._told_T7[:T]
        updates = [OwnRows(told_T7[:, 6], most)] if most else []

        def attend(layer: int, qkv_TNE: Tensor) -> Tensor:
            return cuda.attention(told_T7, qkv_TNE, layer, self._decoder.config.kv_heads, self._kv)

        @torch.no_grad()
        def forward() -> Tensor:
            return self._decoder.forward(told_T7[:, 0], told_T7[:, 1], attend, updates)

        if not self._records:
            return forward
        forward()  # what is compiled or looked up at first is not recorded
        hidden_TD, replay = cuda.record(forward, self._pool)

        def play() -> Tensor:
            replay()
            return hidden_TD

        return play

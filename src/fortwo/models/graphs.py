"""One token of many sequences on a GPU: `decoder.forward` recorded once for a number of rows, then played back.

A step of a small model is thousands of launches, each of which takes the processor longer than the GPU; a CUDA graph is
one. What changes from step to step (tokens, positions, whose adapter, where keys and values lie) is read from one
tensor. Shape suffixes as in `decoder`, and B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fortwo.models import gpu
from fortwo.models.decoder import Decoder
from fortwo.models.tabled import OwnRows

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # that there is a graph for: a step is padded to the next
_TOLD = 7  # numbers of a row: token, position, `place` (4), whose adapter

Forward = Callable[[], Tensor]


class Graphs:
    """The decoder's step. kv: type of the cache's keys and values.

    capture: on a GPU; without it each step is computed anew, which the tests do on the CPU.
    """

    def __init__(self, decoder: Decoder, kv: torch.dtype, capture: bool = True) -> None:
        c = decoder.config
        self._decoder, self._kv, self._capture = decoder, kv, capture
        self._told_B7 = torch.zeros(ROWS[-1], _TOLD, dtype=torch.int64, device=decoder.device)
        self._nowhere = torch.zeros(2, c.layers, c.kv_heads, 1, c.head_size, dtype=kv, device=decoder.device)
        self._forwards: dict[tuple[int, int], Forward] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    @staticmethod
    def fits(decoder: Decoder, kv: torch.dtype) -> bool:
        """Whether the decoder's steps can be recorded here."""
        return decoder.device.type == "cuda" and gpu.present() and gpu.attends(decoder.config.head_size, kv)

    def __call__(self, rows: Sequence[tuple[int, int, Sequence[int], int]], most: int) -> Tensor:
        """Hidden states (B, D) after the final norm, until the next call. rows: of each its token, its position, the
        cache's `place` of it, and its adapter's address or 0; most: ranks of the largest adapter, 0 if no row has one.
        """
        B = next((size for size in ROWS if size >= len(rows)), len(rows))
        told = [(token, position, *place, owner) for token, position, place, owner in rows]
        told += [self._padding()] * (B - len(rows))
        self._hear(torch.tensor(told))
        key = B, -(-most // 16) * 16
        if key not in self._forwards:
            self._forwards[key] = self._recorded(*key)
        return self._forwards[key]()[: len(rows)]

    def _hear(self, told_B7: Tensor) -> None:
        if len(told_B7) > len(self._told_B7):
            self._told_B7 = torch.zeros_like(told_B7, device=self._decoder.device)
            self._forwards.clear()
        self._told_B7[: len(told_B7)].copy_(told_B7)

    def _padding(self) -> tuple[int, ...]:
        """A row that stands alone, outside of the cache."""
        k, v = self._nowhere
        return 0, 0, k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), 0

    def _recorded(self, B: int, most: int) -> Forward:
        told_B7 = self._told_B7[:B]
        updates = [OwnRows(told_B7[:, 6], most)] if most else []

        def attend(layer: int, qkv_BNE: Tensor) -> Tensor:
            return gpu.decode_attention(told_B7, qkv_BNE, layer, self._decoder.config.kv_heads, self._kv)

        @torch.no_grad()
        def forward() -> Tensor:
            return self._decoder.forward(told_B7[:, 0], told_B7[:, 1], attend, updates)

        if not self._capture:
            return forward
        forward()  # what is compiled or looked up at first is not recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_BD = forward()

        def play() -> Tensor:
            graph.replay()
            return hidden_BD

        return play

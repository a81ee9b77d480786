"""Attention over packed rows by the kernels: in C on the CPU, in Triton on a GPU, with a gradient.

Where there is no kernel for the tensors it is what `nn.packing` computes. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fortwo.kernels import cpu, cuda
from fortwo.kernels.operations import packed_attention
from fortwo.nn.config import Shape
from fortwo.nn.packing import Pack, PackedAttention


class Packed(NamedTuple):
    """Of an attention over packed rows: tokens of the prefix; starts and lengths of the rests; on a GPU, what
    `cuda.attend_packed` is told."""

    prefix: int
    rows_2R: Tensor
    seen_T3: Tensor | None


def seen(pack: Pack) -> Tensor:
    """What `cuda.attend_packed` is told of the pack's tokens (T, 3)."""
    T, P = len(pack.tokens_T), pack.prefix
    ends = [start + length for start, length in zip(pack.starts, pack.lengths, strict=True)]
    rows_R3 = torch.tensor([(0, T, P), *((start, end, P) for start, end in zip(pack.starts, ends, strict=True))])
    return rows_R3.int().repeat_interleave(torch.tensor([P, *pack.lengths]), 0).to(pack.tokens_T.device)


class FusedPackedAttention(PackedAttention):
    """The same by one kernel. packed: the rows as the kernels take them."""

    def __init__(self, pack: Pack, config: Shape) -> None:
        super().__init__(pack, config)
        on_gpu = pack.tokens_T.is_cuda and cuda.present() and cuda.attends(config.head_size)
        self.packed = Packed(pack.prefix, torch.tensor([pack.starts, pack.lengths]), seen(pack) if on_gpu else None)

    def __call__(self, layer: int, qkv_TNE: Tensor) -> Tensor:
        if self._config.attention_softcap is not None or not self._within(layer):
            return super().__call__(layer, qkv_TNE)
        if cpu.usable(qkv_TNE):
            mixed: Tensor = _Attention.apply(qkv_TNE, *self.packed[:2], *self._heads)  # type: ignore[no-untyped-call]
            return mixed
        if self.packed.seen_T3 is not None and cuda.usable(qkv_TNE):
            return packed_attention(qkv_TNE, self.packed.seen_T3, self._heads[1])
        return super().__call__(layer, qkv_TNE)

    def _within(self, layer: int) -> bool:
        """Whether all rows are within the layer's window."""
        window = self._config.window_of(layer)
        return window is None or self.pack.prefix + self.pack.longest <= window


class _Attention(torch.autograd.Function):
    """The kernel over a pack's tokens; rows_2R: where the rest of each row starts, and its length."""

    @staticmethod
    def forward(ctx: Any, qkv_TNE: Tensor, prefix: int, rows_2R: Tensor, heads: int, kv_heads: int) -> Tensor:
        qkv_TNE = qkv_TNE.contiguous()
        T, _, E = qkv_TNE.shape
        mixed_THE = qkv_TNE.new_empty(T, heads, E)
        lse_TH = qkv_TNE.new_empty(T, heads, dtype=torch.float32)
        ctx.shape = (prefix, rows_2R.shape[1], rows_2R[0], rows_2R[1], heads, kv_heads, E)
        _attend("", qkv_TNE, *ctx.shape, qkv_TNE, mixed_THE, lse_TH)
        ctx.save_for_backward(qkv_TNE, lse_TH)
        return mixed_THE

    @staticmethod
    def backward(ctx: Any, grad_THE: Tensor) -> Any:
        qkv_TNE, lse_TH = ctx.saved_tensors
        grad_TNE = torch.empty_like(qkv_TNE)
        _attend("_backward", qkv_TNE, *ctx.shape, qkv_TNE, lse_TH, grad_THE.contiguous(), grad_TNE)
        return grad_TNE, None, None, None, None


def _attend(direction: str, qkv_TNE: Tensor, *arguments: Tensor | int) -> None:
    """The kernel by blocks of bf16 where there is one, else the one for every processor."""
    if qkv_TNE.dtype == torch.bfloat16 and qkv_TNE.shape[2] % 32 == 0 and cpu.multiplies_tiles():
        getattr(cpu.kernels(), f"attention{direction}_tiled")(*arguments)
    else:
        cpu.run(f"attention{direction}", qkv_TNE.dtype, *arguments)

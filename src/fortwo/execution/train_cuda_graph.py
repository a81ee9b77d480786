"""Layers to train an adapter on, on a GPU: forward and backward recorded once for a number of tokens, then played back.

A pass is thousands of launches, each of which takes the processor longer than a small model's takes the GPU; a CUDA
graph is one. What changes from pass to pass (what the first layer reads, positions, who sees whom, seeds of dropouts)
lies where the graphs read it. Shape suffixes as in `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fortwo.kernels import cuda
from fortwo.kernels.operations import packed_attention
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora, Seeds, Segment

TOKENS = (64, 128, 256, 512, 1024, 2048)  # of a graph: others are padded
PARAMETERS = 2_000_000_000  # of the largest base that launches hold up

Play = Callable[[], None]


class Recorded:
    """Passes of one adapter in training through all layers. On the CPU, in tests, nothing is recorded."""

    def __init__(self, decoder: Decoder, lora: Lora) -> None:
        self.lora = lora
        self._decoder = decoder
        self._passes: dict[tuple[int, bool], _Pass] = {}
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None

    @staticmethod
    def fits(decoder: Decoder, tokens: int) -> bool:
        """Whether a pass of so many tokens can be recorded, and is worth it."""
        fits = cuda.present() and cuda.attends(decoder.config.head_size, decoder.dtype)
        fits = fits and decoder.config.attention_softcap is None
        return fits and tokens <= TOKENS[-1] and decoder.config.parameters <= PARAMETERS

    def __call__(self, positions_T: Tensor, seen_T3: Tensor, seeds: Seeds) -> _Pass:
        """The pass over these tokens; seen as in `cuda.attend_packed`. Its forward and its backward come
        before the next call."""
        key = next(size for size in TOKENS if size >= len(positions_T)), bool(seeds)
        if key not in self._passes:
            self._passes[key] = _Pass(self._decoder, self.lora, *key, self._pool, warm=bool(self._passes))
        self._passes[key].tell(positions_T, seen_T3, seeds)
        return self._passes[key]


class _Pass:
    """train_fused.Trained, for at most T tokens. Rows behind those of a pass are what an earlier one left: each sees
    itself alone, and the gradient that comes back to it is zero. warm: everything was compiled before."""

    def __init__(
        self,
        decoder: Decoder,
        lora: Lora,
        T: int,
        dropout: bool,
        pool: Any,
        warm: bool,
    ) -> None:
        device, D = decoder.device, decoder.config.hidden
        groups = [(layer, name, group) for layer, own in enumerate(lora.layers) for name, group in own.items()]
        self._decoder, self._segments = decoder, [Segment(lora)]
        self._parameters = [tensor for *_, group in groups for tensor in group.tensors]
        self._slopes = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._positions_T = torch.zeros(T, dtype=torch.int64, device=device)
        number_T = torch.arange(T, dtype=torch.int32, device=device)
        self._alone_T3 = torch.stack([number_T, number_T + 1, torch.zeros_like(number_T)], 1)
        self._seen_T3 = self._alone_T3.clone()
        self._seeds_N = torch.zeros(len(groups) if dropout else 0, dtype=torch.int64, device=device)
        self._seeds: Seeds = {groups[place][:2]: seed for place, seed in enumerate(self._seeds_N)}
        self._x_TD = torch.zeros(T, D, device=device).requires_grad_()
        self._grad_TD, self._grad_x_TD = torch.zeros(T, D, device=device), torch.zeros(T, D, device=device)
        self._out_TD = self._x_TD
        self._tokens = 0
        self._plays = (self._there, self._back) if pool is None else self._recorded(pool, warm)

    def tell(self, positions_T: Tensor, seen_T3: Tensor, seeds: Seeds) -> None:
        """What the next pass is about."""
        self._tokens = len(positions_T)
        self._positions_T[: self._tokens] = positions_T
        self._seen_T3[: self._tokens] = seen_T3
        self._seen_T3[self._tokens :] = self._alone_T3[self._tokens :]
        self._seeds_N.copy_(torch.tensor(list(seeds.values()), dtype=torch.int64))

    def forward(self, x_TD: Tensor) -> Tensor:
        self._x_TD.detach()[: self._tokens] = x_TD
        self._plays[0]()
        return self._out_TD.detach()[: self._tokens]

    def backward(self, grad_TD: Tensor, wanted: bool) -> Tensor | None:
        self._grad_TD[: self._tokens] = grad_TD
        self._grad_TD[self._tokens :] = 0
        self._plays[1]()
        return self._grad_x_TD[: self._tokens].clone() if wanted else None

    def _there(self) -> None:
        def attend(_: int, qkv_TNE: Tensor) -> Tensor:
            return packed_attention(qkv_TNE, self._seen_T3, self._decoder.config.kv_heads)

        with torch.enable_grad():
            angles = self._decoder.angles(self._positions_T)
            self._out_TD = self._decoder.through_layers(self._x_TD, angles, attend, self._segments, self._seeds)

    def _gradients(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._out_TD, [self._x_TD, *self._parameters], self._grad_TD)

    def _back(self) -> None:
        grad_x_TD, *found = self._gradients()
        self._grad_x_TD.copy_(grad_x_TD)
        torch._foreach_add_(self._slopes, found)

    def _recorded(self, pool: Any, warm: bool) -> tuple[Play, Play]:
        if not warm:
            with torch.cuda.stream(torch.cuda.Stream()):
                self._there()
                self._gradients()
            torch.cuda.synchronize()
            self._out_TD = self._x_TD  # what led to it would otherwise be gone through by the recording, too
        (_, there), (_, back) = cuda.record(self._there, pool), cuda.record(self._back, pool)
        self._out_TD = self._out_TD.detach()
        return there, back

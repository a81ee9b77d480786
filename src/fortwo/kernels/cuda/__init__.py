"""Kernels for GPUs, called by the same names and with the same arguments as those in C.

They are written in Triton, which comes with torch for CUDA. Where it is not, `usable` says so and `operations` computes
the same with torch. `fused` and `run` are for either kind, wherever the tensors are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from fortwo.kernels import cpu

Found = TypeVar("Found")

_TYPES = (torch.float32, torch.bfloat16)
ENTRY = 17  # numbers of a fused product in an adapter's table: A's address, its ranks; three times: B's address, its
# ranks, the first of them in A, first column and the one behind the last
_PARTS = 8  # of the gradient of keys and values, side by side
_recording = threading.Lock()  # torch records one graph at a time in a process
_BLOCK = 1024  # outputs of a program where rows are long


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return all(tensor.is_cuda and tensor.dtype in _TYPES for tensor in tensors) and present()


@cache
def present() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def fused(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors where they are: in C on the CPU, in Triton on a GPU."""
    return cpu.usable(*tensors) or usable(*tensors)


def record(computed: Callable[[], Found], pool: Any) -> tuple[Found, Callable[[], None]]:
    """What `computed` gives, as a CUDA graph: it is there, always in the same place, once the second has been called.
    pool: of the memory that graphs share which are never played together."""
    graph = torch.cuda.CUDAGraph()
    stream = _recording_stream(torch.cuda.current_device())
    with _recording, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        found = computed()
    return found, graph.replay


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """The stream on which the graphs of a device are recorded. By default torch has one for all devices."""
    return torch.cuda.Stream(device)


def run(kernel: str, on: Tensor, *arguments: Tensor | float | int | None) -> None:
    """Run the kernel for numbers like `on`, where `on` is."""
    call(kernel, *arguments) if on.is_cuda else cpu.run(kernel, on.dtype, *arguments)


def call(kernel: str, *arguments: Any) -> None:
    """Run a kernel with the name and the arguments that it has in C. The type of the numbers is the tensors' own."""
    _CALLS[kernel](*arguments)


@cache
def _kernels() -> Any:
    """Loaded when they are needed: Triton takes its time."""
    from fortwo.kernels.cuda import triton_kernels

    return triton_kernels


@cache
def _packed() -> Any:
    from fortwo.kernels.cuda import triton_packed

    return triton_packed


def _power(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


def _warps(size: int) -> int:
    """Of a program that has so many numbers in its registers."""
    return min(16, max(1, size // 256))


def _add_norm(
    T: int, D: int, x: Tensor, y: Tensor | None, weight: Tensor, eps: float, total: Tensor, normed: Tensor,
    scale: Tensor,
) -> None:  # fmt: skip
    wide = _power(D)
    _kernels().add_norm[T,](x, y, weight, total, normed, scale, D, eps, y is not None, wide, num_warps=_warps(wide))


def _add_norm_backward(
    T: int, D: int, total: Tensor, scale: Tensor, weight: Tensor, grad: Tensor, along: Tensor, x: Tensor,
    y: Tensor | None,
) -> None:  # fmt: skip
    wide = _power(D)
    told = total, scale, weight, grad, along, x, y, D, y is not None, wide
    _kernels().add_norm_backward[T,](*told, num_warps=_warps(wide))


def _rotate(T: int, N: int, turned: int, E: int, x: Tensor, cos: Tensor, sin: Tensor, sign: float, y: Tensor) -> None:
    heads, half = _power(N), _power(E // 2)
    _kernels().rotate[T,](x, cos, sin, y, N, turned, sign, E, heads, half, num_warps=_warps(heads * half))


def _swiglu(T: int, I: int, gate_up: Tensor, y: Tensor) -> None:
    _kernels().swiglu[T, -(-I // _BLOCK)](gate_up, y, I, _BLOCK, num_warps=4)


def _swiglu_backward(T: int, I: int, gate_up: Tensor, grad: Tensor, out: Tensor) -> None:
    _kernels().swiglu_backward[T, -(-I // _BLOCK)](gate_up, grad, out, I, _BLOCK, num_warps=4)


def _nf4_dense(
    begin: int, blocks: int, codes: Tensor, largest: Tensor, table: Tensor, scales: Tensor, offset: Tensor,
    levels: Tensor, out: Tensor,
) -> None:  # fmt: skip
    _kernels().nf4_dense[blocks,](codes, largest, scales, table, offset, levels, out, begin, 256, num_warps=1)


def _dropout(N: int, seed: Tensor, p: float, x: Tensor, y: Tensor) -> None:
    _packed().dropout[-(-N // _BLOCK),](x, seed, y, N, p, _BLOCK, num_warps=4)


_CALLS: dict[str, Callable[..., None]] = {
    "add_norm": _add_norm,
    "add_norm_backward": _add_norm_backward,
    "rotate": _rotate,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "nf4_dense": _nf4_dense,
    "dropout": _dropout,
}


def attention(rows: Tensor, qkv_TNE: Tensor, layer: int, kv_heads: int, kv: torch.dtype) -> Tensor:
    """Attention (T, H, E) of tokens over keys and values that lie where `rows` (T, 6 or more) says: token, position,
    address of keys, of values, numbers from layer to layer and from head to head. Those of the tokens are written there
    first, so that a token sees the ones before it whether they are among these or not. kv: their type."""
    T, N, E = qkv_TNE.shape
    H, half = N - 2 * kv_heads, kv == torch.bfloat16
    out_THE = torch.empty(T, H, E, dtype=qkv_TNE.dtype, device=qkv_TNE.device)
    sizes = rows.stride(0), H, kv_heads, E
    _kernels().keep[T, kv_heads](rows, qkv_TNE, layer, *sizes, half, num_warps=1)
    group = max(16, _power(H // kv_heads))
    _kernels().attend[T, kv_heads](rows, qkv_TNE, out_THE, layer, E**-0.5, *sizes, group, 64, half, num_warps=4)
    return out_THE


def attend_packed(seen_T3: Tensor, qkv_TNE: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Attention (T, H, E) of packed rows, and of each query the log of its sum (T, H). seen: of each token the first of
    its own row, the one behind the last that sees it, and how many tokens all rows share."""
    T, N, E = qkv_TNE.shape
    H = N - 2 * kv_heads
    mixed_THE, lse_TH = qkv_TNE.new_empty(T, H, E), qkv_TNE.new_empty(T, H, dtype=torch.float32)
    block, told = _block(qkv_TNE), (T, E**-0.5, H, kv_heads, E)
    _packed().attend_packed[-(-T // block), H](seen_T3, qkv_TNE, mixed_THE, lse_TH, *told, block, _precision(qkv_TNE))
    return mixed_THE, lse_TH


def attend_packed_backward(
    seen_T3: Tensor, qkv_TNE: Tensor, mixed_THE: Tensor, lse_TH: Tensor, grad_THE: Tensor, kv_heads: int
) -> Tensor:
    """The gradient of qkv, from that of what `attend_packed` gave."""
    T, H, E = mixed_THE.shape
    out_TNE, along_TH = torch.empty_like(qkv_TNE), torch.empty_like(lse_TH)
    parts_PTME = qkv_TNE.new_empty(_PARTS, T, 2 * kv_heads, E, dtype=torch.float32)
    block = _block(qkv_TNE)
    told = T, E**-0.5, H, kv_heads, E, block, _precision(qkv_TNE)
    of_queries = mixed_THE, lse_TH, grad_THE, along_TH, out_TNE
    of_keys = lse_TH, grad_THE, along_TH, parts_PTME
    _packed().attend_packed_queries[-(-T // block), H](seen_T3, qkv_TNE, *of_queries, *told)
    _packed().attend_packed_keys[-(-T // block), kv_heads, _PARTS](seen_T3, qkv_TNE, *of_keys, *told)
    out_TNE[:, H:] = parts_PTME.sum(0)
    return out_TNE


def _block(numbers: Tensor) -> int:
    """Tokens of a program of attention over packed rows: four blocks of them lie in a core's own memory."""
    return 64 if numbers.dtype == torch.bfloat16 and numbers.shape[2] <= 64 else 32


def _precision(numbers: Tensor) -> str:
    return "tf32" if numbers.dtype == torch.bfloat16 else "ieee"


def attends(head_size: int, kv: torch.dtype = torch.float32) -> bool:
    """Whether attention takes heads of this size, and such keys and values."""
    return head_size >= 16 and head_size == _power(head_size) and kv in _TYPES


def add_own(owners: Tensor, x_BI: Tensor, y_BO: Tensor, place: int, most: int) -> None:
    """Add to each row of y what its own adapter changes. owners (B,): the address of the adapter's table
    (`adapters_cuda`), 0 for none, in steps of any size; place: of the fused product in it; most: ranks of the adapter
    that has the most."""
    own = _kernels()
    (B, I), O = x_BI.shape, y_BO.shape[1]
    half = x_BI.dtype == torch.bfloat16
    wide = -(-most // 16) * 16
    h_BR = torch.empty(B, wide, dtype=torch.float32, device=x_BI.device)
    told = owners.stride(0), half, ENTRY
    own.shrink[B, wide // 16](owners, x_BI, h_BR, place, I, wide, *told, 256, num_warps=4)
    own.expand[B, -(-O // 128)](owners, h_BR, y_BO, place, O, wide, *told, 128, num_warps=4)

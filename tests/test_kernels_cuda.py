"""Kernels for GPUs give what torch's operations give. Without a GPU, Triton's interpreter runs them on the CPU.

Tolerance: fp32's rounding, or bf16's where numbers are that.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.engine import cache
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution import cuda_graphs
from fortwo.execution.adapters_cuda import OwnRows, TabledAdapters
from fortwo.execution.cuda import CudaBackend
from fortwo.execution.reference import ReferenceBackend
from fortwo.kernels import cuda
from fortwo.kernels.operations import decode_attention
from fortwo.nn.config import DecoderConfig
from fortwo.nn.lora_config import GROUPS, LoraConfig
from fortwo.quantization.formats import HugePageArena
from fortwo.quantization.nf4 import Nf4, plain
from tests.parts import as_decoder, make_rows, random_lora
from tests.tiny import tiny_model

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.bfloat16]
SHAPES = {
    "all": LoraConfig(r=4, alpha=12),
    "some": LoraConfig(r=3, alpha=6, target_modules=("k_proj", "v_proj", "up_proj"), layers=(0, 2)),
    "down": LoraConfig(r=20, alpha=16, target_modules=("down_proj",)),
}


def close(found: Tensor, wanted: Tensor) -> None:
    loose = 0.02 if torch.bfloat16 in (found.dtype, wanted.dtype) else 1e-5
    torch.testing.assert_close(found.float(), wanted.float(), atol=loose, rtol=loose)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("added", [True, False])
def test_add_norm(dtype: torch.dtype, added: bool) -> None:
    x, weight = torch.randn(5, 72, device=DEVICE, requires_grad=True), torch.rand(72, device=DEVICE)
    y = torch.randn(5, 72, device=DEVICE, dtype=dtype).requires_grad_(True) if added else None
    s = x if y is None else x + y
    n = (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5) * weight).to(dtype)
    total, normed, scale = torch.empty_like(x), torch.full_like(n, torch.nan), x.new_empty(5)
    given = x.detach(), None if y is None else y.detach()
    cuda.call("add_norm", 5, 72, *given, weight, 1e-5, total, normed, scale)
    close(normed, n)
    if added:
        close(total, s)
    grad, along = torch.randn_like(n), torch.randn_like(x)
    torch.autograd.backward([n, s * 1], [grad, along])
    grad_x = torch.full_like(x, torch.nan)
    grad_y = None if y is None else torch.full_like(y, torch.nan)
    cuda.call("add_norm_backward", 5, 72, s.detach(), scale, weight, grad, along, grad_x, grad_y)
    assert x.grad is not None
    close(grad_x, x.grad)
    if y is not None:
        assert grad_y is not None
        assert y.grad is not None
        close(grad_y, y.grad)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotate(dtype: torch.dtype, sign: float) -> None:
    x, angle = torch.randn(3, 7, 32, device=DEVICE, dtype=dtype), torch.rand(3, 1, 16, device=DEVICE)
    cos, sin = (torch.cat([one, one], -1)[:, 0].contiguous() for one in (angle.cos(), angle.sin()))
    y = torch.full_like(x, torch.nan)
    cuda.call("rotate", 3, 7, 5, 32, x, cos, sin, sign, y)
    first, second = x[:, :5].float().chunk(2, -1)
    turned = torch.cat([first * angle.cos() - sign * second * angle.sin(),
                        second * angle.cos() + sign * first * angle.sin()], -1)  # fmt: skip
    close(y, torch.cat([turned, x[:, 5:].float()], 1))


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 2 * 1100, device=DEVICE, dtype=dtype).requires_grad_(True)
    gate, up = gate_up.float().chunk(2, -1)
    wanted = F.silu(gate) * up
    y = torch.full_like(wanted, torch.nan, dtype=dtype)
    cuda.call("swiglu", 3, 1100, gate_up.detach(), y)
    close(y, wanted)
    grad = torch.randn_like(y)
    wanted.backward(grad.float())
    found = torch.full_like(gate_up, torch.nan)
    cuda.call("swiglu_backward", 3, 1100, gate_up.detach(), grad, found)
    assert gate_up.grad is not None
    close(found, gate_up.grad)


@pytest.mark.parametrize("dtype", TYPES)
def test_nf4_is_made_dense(dtype: torch.dtype) -> None:
    weight_format = Nf4.of(torch.randn(24, 128, device=DEVICE), HugePageArena())
    out = torch.full((32 * 64,), torch.nan, dtype=dtype, device=DEVICE)
    cuda.call("nf4_dense", 12, 32, weight_format.codes, *weight_format._tables(), out)
    close(out.view(-1, 64), plain(weight_format, 12, 44).to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads", [9, 3])
def test_attention_over_the_cache(dtype: torch.dtype, heads: int) -> None:
    """Rows of pools of different capacities, at their beginning, in the middle and at the end."""
    size = {"hidden_size": 72, "head_dim": 32, "num_attention_heads": heads, "num_key_value_heads": 3}
    config = as_decoder(tiny_model("llama", **size)).config
    room = cache.Cache(config, DEVICE, dtype=dtype)
    slots = [room.take(length) for length in (5, 100, 200, 128)]
    positions = [0, 70, 199, 127]
    for pool in room.pools.values():
        pool.kv.normal_()
    qkv = torch.randn(4, heads + 6, 32, device=DEVICE, dtype=dtype)
    told, wanted = [], []
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert slot is not None
        told.append([9, position, *slot.place, 0])
        pool = slot.pool
        k, v = pool.k[1].clone(), pool.v[1].clone()
        at = torch.tensor([slot.row], device=DEVICE), torch.tensor([position], device=DEVICE)
        wanted.append(decode_attention(qkv[row : row + 1].float(), k.float(), v.float(), *at))
    found = cuda.attention(torch.tensor(told, device=DEVICE), qkv, 1, 3, dtype)
    close(found, torch.cat(wanted))
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        assert slot is not None
        pool = slot.pool
        assert torch.equal(pool.k[1][slot.row, :, position], qkv[row, heads : heads + 3])
        assert torch.equal(pool.v[1][slot.row, :, position], qkv[row, heads + 3 :])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_row_gets_its_own_adapter(dtype: torch.dtype) -> None:
    home = as_decoder(tiny_model("llama", hidden_size=80), DEVICE)
    adapters = TabledAdapters(dtype, DEVICE)
    for seed, (key, shape) in enumerate(SHAPES.items()):
        adapters.add(key, random_lora(home, seed, shape))
    rows: dict[str, list[int]] = {"all": [0, 3], "some": [4], "down": [1]}
    owners = torch.zeros(6, 2, dtype=torch.int64, device=DEVICE)
    for key, own in rows.items():
        owners[own, 1] = adapters.address(key)
    for layer in range(home.config.layers):
        for group in GROUPS:
            x = torch.randn(6, home.config.in_features(group), device=DEVICE, dtype=dtype)
            wanted = torch.randn(6, _outputs(home.config, group), device=DEVICE).to(dtype)
            found = wanted.clone()
            for update in adapters.updates(rows):
                if update.changes(layer, group):
                    update.apply(wanted, x, home.frozen(layer, group), layer, group)
            OwnRows(owners[:, 1], adapters.most).apply(found, x, home.frozen(layer, group), layer, group)
            close(found, wanted)
            assert torch.equal(found[[2, 5]], wanted[[2, 5]])


def _outputs(config: DecoderConfig, group: str) -> int:
    return max(config.columns(name)[1] for name in GROUPS[group])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("adapters", [[None, "all", "down"], ["down", "down", None], [None, None, None]])
def test_recorded_forwards_are_the_decoder(
    family: str, adapters: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, one in two parts, and tokens behind them; a sequence outgrows its room."""
    lengths = [4, 14, 9]
    monkeypatch.setattr(cache, "MIN_ROW_TOKENS", 16)

    def replies(kind: type[ReferenceBackend], device: torch.device) -> list[Tensor]:
        home = as_decoder(tiny_model(family, num_hidden_layers=2), device)
        runner = Runner(kind(home))
        for seed, (key, shape) in enumerate(SHAPES.items()):
            runner.attach(key, random_lora(home, seed, shape), frozen=True)
        rows = [Running(row, key) for row, key in zip(make_rows(lengths), adapters, strict=True)]
        runner.prefill(rows, [4, 6, 9])
        found = [runner.prefill(rows[1:2])]
        for token in (7, 11, 13):
            for row in rows:
                row.tokens.append(token)
                assert runner.extend(row)
            found.append(runner.step(rows))
        for row in rows:
            runner.release(row)
        runner.cache.check_idle()
        return found

    wanted = replies(ReferenceBackend, torch.device("cpu"))
    for one, other in zip(replies(CudaBackend, DEVICE), wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=1e-3)


def test_many_tokens_are_played_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "TOKENS", (2, 4, 8))
    home = as_decoder(tiny_model("llama"), DEVICE)
    rows = make_rows([13, 3, 7])
    alone = [Runner(CudaBackend(home)).prefill([Running(row, None)])[0] for row in rows]
    together = Runner(CudaBackend(home)).prefill([Running(row, None) for row in rows])
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def _outputs(config: DecoderConfig, group: str) -> int:
    return max(config.columns(name)[1] for name in GROUPS[group])

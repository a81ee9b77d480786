"""Training on a GPU: passes that are recorded give what the decoder's own operations give, whatever was passed before.

Without a GPU, Triton's interpreter runs the kernels on the CPU and nothing is recorded. Tolerance: fp32's rounding, or
bf16's where numbers are that.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fortwo.execution import train_cuda_graph
from fortwo.execution.backend import Backend
from fortwo.execution.cuda import CudaBackend
from fortwo.execution.packed_fused import seen
from fortwo.kernels.operations import dropout, packed_attention
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import PackedAttention, pack
from tests.parts import Unfused, as_decoder, decoder, make_rows, random_lora
from tests.tiny import tiny_model

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 64), (2, 16)])
@pytest.mark.parametrize(
    ("start", "lengths"), [([], [1]), ([], [40, 3]), ([*range(24)], [31, 5]), ([*range(40)], [1, 35])]
)
def test_attention_over_packed_rows(
    dtype: torch.dtype, kv_heads: int, size: int, start: list[int], lengths: list[int]
) -> None:
    packed = pack(make_rows(lengths, start=start), DEVICE, prefix=len(start))
    plain = PackedAttention(packed, replace(decoder().config, heads=2, kv_heads=kv_heads))
    T = len(packed.tokens_T)
    qkv = torch.randn(T, 2 + 2 * kv_heads, size, device=DEVICE).to(dtype)
    upstream = torch.randn(T, 2, size, device=DEVICE).to(dtype)
    found, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    ours, wanted = packed_attention(found, seen(packed), kv_heads), plain(0, exact)
    (grad,), (wanted_grad,) = (
        torch.autograd.grad(out, leaf, upstream.to(out.dtype)) for out, leaf in ((ours, found), (wanted, exact))
    )
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in ((ours, wanted), (grad, wanted_grad)):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= rounding * want.norm()
        assert not got.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_drawn_by_its_seed(dtype: torch.dtype) -> None:
    x = torch.rand(30, 100, device=DEVICE).add(1).to(dtype)
    one, same, other = (dropout(x, 0.25, torch.tensor(seed, device=DEVICE)) for seed in (7, 7, 2**32 - 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    for y in (one, other):
        assert 0.2 < (y == 0).float().mean() < 0.3
        torch.testing.assert_close(y[y != 0], (x.float() / 0.75).to(dtype)[y != 0])


def passes(backend: Backend, lora: Lora, lengths: list[list[int]], seed: int = 0) -> list[Tensor]:
    """What comes out of each pass, the gradient of what went in, and at last those of the adapter."""
    found = []
    torch.manual_seed(seed)
    for rows in lengths:
        packed = pack(make_rows(rows, start=[1, 2, 3]), DEVICE, prefix=3)
        x = backend.decoder.embed(packed.tokens_T).requires_grad_()
        y = backend.train(packed, lora, x_TD=x)
        y.square().mean().backward()
        assert x.grad is not None
        found += [y.detach().clone(), x.grad]
    return [*found, torch.cat([parameter.grad.flatten() for parameter in lora.parameters()])]  # type: ignore[union-attr]


def network(family: str) -> Decoder:
    return as_decoder(tiny_model(family, num_hidden_layers=2, head_dim=16), DEVICE)


def flat(config: LoraConfig, family: str) -> Lora:
    home = as_decoder(tiny_model(family, num_hidden_layers=2, head_dim=16))
    lora = Lora.from_state(config, home.config, random_lora(home, config=config).state(), DEVICE)
    lora.flatten()
    return lora


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "config", [LoraConfig(r=4, alpha=12), LoraConfig(r=3, alpha=6, target_modules=("v_proj", "up_proj"), layers=(1,))]
)
def test_recorded_passes_are_the_decoder(family: str, config: LoraConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded, wholly filled, and shorter ones behind longer ones; gradients add up."""
    monkeypatch.setattr(train_cuda_graph, "TOKENS", (8, 16, 32))
    lengths = [[9, 12, 4], [4, 9], [3]]
    backend = CudaBackend(network(family))
    found = passes(backend, flat(config, family), lengths)
    assert backend._recorded is not None
    assert found[-1].abs().max() > 0
    wanted = passes(Unfused(network(family)), flat(config, family), lengths)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_recorded_passes_drop_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_cuda_graph, "TOKENS", (8,))
    config = LoraConfig(r=4, alpha=12, dropout=0.3)
    found = [passes(CudaBackend(network("llama")), flat(config, "llama"), [[2], [1]], seed) for seed in (1, 1, 2)]
    assert all(torch.equal(one, same) for one, same in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))

"""Layers trained by one kernel are the decoder's own operations one after the other, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fortwo.execution.backend import Backend
from fortwo.execution.cpu import CpuBackend
from fortwo.execution.train_fused import trained_whole
from fortwo.kernels import cpu
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import pack
from fortwo.train.losses import Row, compute_losses
from tests.parts import WITHOUT_TILES, Unfused, as_decoder, make_rows, random_lora
from tests.tiny import tiny_model

tiled = pytest.mark.skipif(not cpu.multiplies_tiles(), reason=WITHOUT_TILES)
CONFIGS = [
    LoraConfig(r=16, alpha=32),
    LoraConfig(r=16, alpha=32, dropout=0.15),
    LoraConfig(r=3, alpha=5, dropout=0.5, target_modules=("k_proj", "v_proj", "up_proj", "down_proj")),
    LoraConfig(r=20, alpha=8, dropout=0.1, rank_pattern=(("v_proj", 5),), layers=(1, 2)),
]


def network(family: str = "llama", **options: Any) -> Decoder:
    return as_decoder(tiny_model(family, **{"head_dim": 32, **options})).in_bf16()


def trained(
    backend: Backend, config: LoraConfig, lengths: list[int], prefix: int = 3, checkpointing: bool = False
) -> list[Tensor]:
    """A loss and its gradients."""
    lora = flat(backend.decoder, config)
    rows = [Row(tuple(row), prefix + 1) for row in make_rows(lengths, start=range(1, prefix + 1))]
    torch.manual_seed(4)
    found = compute_losses(backend, lora, prefix, rows, checkpointing)
    found.ce.backward()
    return [found.ce.detach(), *(parameter.grad for parameter in lora.parameters() if parameter.grad is not None)]


def flat(home: Decoder, config: LoraConfig = LoraConfig()) -> Lora:
    lora = random_lora(home, config=config)
    lora.flatten()
    return lora


def fits(home: Decoder) -> bool:
    return trained_whole(home.config, home.layers)


@tiled
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("lengths", [[9], [40, 25, 31], [64], [90, 77, 60], [180, 175, 165]])
def test_it_is_the_decoders_own_operations(config: LoraConfig, lengths: list[int]) -> None:
    home = network()
    assert fits(home)
    found = trained(CpuBackend(home), config, lengths)
    again = trained(CpuBackend(home), config, lengths, checkpointing=True)
    wanted = trained(Unfused(home), config, lengths)
    assert len(found) == len(wanted) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@tiled
def test_a_second_backward_adds_to_what_the_first_found() -> None:
    backend = CpuBackend(network())
    lora, rows = flat(backend.decoder), [Row(tuple(row), 4) for row in make_rows([40, 25], start=[1, 2, 3])]
    found = []
    for _ in range(2):
        compute_losses(backend, lora, 3, rows).ce.backward()
        assert lora.flat_N is not None
        assert lora.flat_N.grad is not None
        found.append(lora.flat_N.grad.clone())
    assert found[0].abs().max() > 0
    assert torch.equal(found[1], 2 * found[0])
    lora.freeze()
    assert lora.flat_N is None
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in lora.parameters())


@tiled
def test_passes_of_any_length_share_their_room() -> None:
    backend = CpuBackend(network())
    lora, scratch = flat(backend.decoder), backend._scratch

    def gradient(lengths: list[int]) -> Tensor:
        rows = [Row(tuple(row), 4) for row in make_rows(lengths, start=[1, 2, 3])]
        compute_losses(backend, lora, 3, rows).ce.backward()
        assert lora.flat_N is not None
        assert lora.flat_N.grad is not None
        found = lora.flat_N.grad.clone()
        lora.flat_N.grad.zero_()
        return found

    first = gradient([40, 25])
    memory = scratch.memory
    assert memory is not None
    gradient([9])
    assert scratch.memory is memory
    gradient([90, 77, 60])
    assert len(scratch.memory) > len(memory)
    assert torch.equal(gradient([40, 25]), first)
    backend.release()
    assert scratch.memory is None


@tiled
def test_what_goes_in_has_its_gradient() -> None:
    home = network()
    packed, found = pack(make_rows([40, 25], start=[1, 2, 3]), prefix=3), []
    for backend in (CpuBackend(home), Unfused(home)):
        x_TD = home.embed(packed.tokens_T).requires_grad_()
        backend.train(packed, flat(home), x_TD=x_TD).square().sum().backward()
        assert x_TD.grad is not None
        found.append(x_TD.grad)
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])


@tiled
def test_what_the_kernel_does_not_know_is_left_to_the_decoder() -> None:
    assert fits(network())
    assert not fits(as_decoder(tiny_model("llama", head_dim=32)))
    assert not any(fits(other) for other in (network("qwen2"), network("qwen3"), network(head_dim=16)))

"""Layers trained by one kernel are the decoder's own operations one after the other, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fortwo.execution.train_fused import trained_whole
from fortwo.kernels import cpu
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora, Segment, in_training
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import PackedAttention, pack
from fortwo.train.objective import Row, losses
from tests.parts import WITHOUT_AMX, as_decoder, make_rows, random_lora
from tests.tiny import tiny_model

tiled = pytest.mark.skipif(not cpu.multiplies_tiles(), reason=WITHOUT_AMX)
CONFIGS = [
    LoraConfig(r=16, alpha=32),
    LoraConfig(r=16, alpha=32, dropout=0.15),
    LoraConfig(r=3, alpha=5, dropout=0.5, target_modules=("k_proj", "v_proj", "up_proj", "down_proj")),
    LoraConfig(r=20, alpha=8, dropout=0.1, rank_pattern=(("v_proj", 5),), layers=(1, 2)),
]


def network(family: str = "llama", **options: Any) -> Decoder:
    return as_decoder(tiny_model(family, **{"head_dim": 32, **options})).in_bf16()


def trained(
    home: Decoder, config: LoraConfig, lengths: list[int], prefix: int = 3, checkpointing: bool = False
) -> list[Tensor]:
    """A loss and its gradients."""
    lora = flat(home, config)
    rows = [Row(tuple(row), prefix + 1) for row in make_rows(lengths, start=range(1, prefix + 1))]
    torch.manual_seed(4)
    found = losses(home, lora, prefix, rows, checkpointing)
    found.learn.backward()
    return [found.learn.detach(), *(parameter.grad for parameter in lora.parameters() if parameter.grad is not None)]


def flat(home: Decoder, config: LoraConfig = LoraConfig()) -> Lora:
    lora = random_lora(home, config=config)
    lora.flatten()
    return lora


def fits(home: Decoder, *segments: Segment) -> bool:
    lora = in_training(segments)
    return lora is not None and lora.flat_N is not None and trained_whole(home.config, home.layers)


@tiled
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("lengths", [[9], [40, 25, 31], [64], [90, 77, 60], [180, 175, 165]])
def test_it_is_the_decoders_own_operations(
    monkeypatch: pytest.MonkeyPatch, config: LoraConfig, lengths: list[int]
) -> None:
    home = network()
    assert fits(home, Segment(flat(home, config)))
    found = trained(home, config, lengths)
    again = trained(home, config, lengths, checkpointing=True)
    monkeypatch.setattr("fortwo.nn.decoder.trained_whole", lambda *_: False)
    wanted = trained(home, config, lengths)
    assert len(found) == len(wanted) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@tiled
def test_a_second_backward_adds_to_what_the_first_found() -> None:
    home = network()
    lora, rows = flat(home), [Row(tuple(row), 4) for row in make_rows([40, 25], start=[1, 2, 3])]
    found = []
    for _ in range(2):
        losses(home, lora, 3, rows).learn.backward()
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
    home = network()
    lora = flat(home)

    def gradient(lengths: list[int]) -> Tensor:
        rows = [Row(tuple(row), 4) for row in make_rows(lengths, start=[1, 2, 3])]
        losses(home, lora, 3, rows).learn.backward()
        assert lora.flat_N is not None
        assert lora.flat_N.grad is not None
        found = lora.flat_N.grad.clone()
        lora.flat_N.grad.zero_()
        return found

    first = gradient([40, 25])
    room = lora.room
    assert room is not None
    gradient([9])
    assert lora.room is room
    gradient([90, 77, 60])
    assert len(lora.room) > len(room)
    assert torch.equal(gradient([40, 25]), first)
    lora.freeze()
    assert lora.room is None


@tiled
def test_what_goes_in_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    home = network()
    packed, segments = pack(make_rows([40, 25], start=[1, 2, 3]), prefix=3), [Segment(flat(home))]
    attention, found = PackedAttention(packed, home.config), []
    for _ in range(2):
        x_TD = home.embed(packed.tokens_T).requires_grad_()
        home.run(x_TD, packed.positions_T, attention, segments, range(home.config.layers)).square().sum().backward()
        assert x_TD.grad is not None
        found.append(x_TD.grad)
        monkeypatch.setattr("fortwo.nn.decoder.trained_whole", lambda *_: False)
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])


@tiled
def test_what_the_kernel_does_not_know_is_left_to_the_decoder() -> None:
    home = network()
    lora = flat(home)
    assert fits(home, Segment(lora))
    assert not fits(home, Segment(lora), Segment(lora))
    assert not fits(home, Segment(random_lora(home)))
    assert not fits(home, Segment(lora, torch.tensor([0])))
    with torch.no_grad():
        assert not fits(home, Segment(lora))
    assert not fits(as_decoder(tiny_model("llama", head_dim=32)), Segment(lora))
    for other in (network("qwen2"), network("qwen3"), network(head_dim=16)):
        assert not fits(other, Segment(flat(other)))

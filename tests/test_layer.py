"""A layer trained by one kernel is the decoder's own operations one after the other, to the bit; where there is no such
kernel those run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fortwo.models import kernels
from fortwo.models.decoder import Decoder
from fortwo.models.layer import WholeLayer
from fortwo.models.lora_config import LoraConfig
from fortwo.train.objective import Row, losses
from tests.parts import as_decoder, make_rows, random_lora, trainable
from tests.tiny import tiny_model

tiled = pytest.mark.skipif(not kernels.multiplies_tiles(), reason="the processor has no tiles")
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
    lora = trainable(random_lora(home, config=config))
    rows = [Row(tuple(row), prefix + 1) for row in make_rows(lengths, start=range(1, prefix + 1))]
    torch.manual_seed(4)
    found = losses(home, lora, prefix, rows, checkpointing)
    found.learn.backward()
    return [found.learn.detach(), *(parameter.grad for parameter in lora.parameters() if parameter.grad is not None)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[bool]]:
    """Lets layers be computed whole, or not; what is returned gets what was decided for each."""

    def take(whole: bool) -> list[bool]:
        decided: list[bool] = []
        fits = WholeLayer.fits
        monkeypatch.setattr(
            WholeLayer, "fits", staticmethod(lambda *given: decided.append(whole and fits(*given)) or decided[-1])
        )
        return decided

    return take


@tiled
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("lengths", [[9], [40, 25, 31], [64]])
def test_it_is_the_decoders_own_operations(
    taken: Callable[[bool], list[bool]], config: LoraConfig, lengths: list[int]
) -> None:
    home = network()
    plainly = taken(False)
    wanted = trained(home, config, lengths)
    whole = taken(True)
    plainly.clear()
    found = trained(home, config, lengths)
    assert whole and not any(plainly)
    assert len(found) == len(wanted) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))

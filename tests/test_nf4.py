"""NF4 holds what bitsandbytes would, and a network that is held in it trains as its dequantised weights do.

Tolerance: sums in another order, 1e-5 of the largest in fp32. Dense parts are equal to the bit but for one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fortwo.execution.backend import backend_for
from fortwo.kernels import cpu
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder, formats_of
from fortwo.nn.lora_config import LoraConfig
from fortwo.quantization import nf4
from fortwo.quantization.formats import Dequantised, HugePageArena, Weight
from fortwo.quantization.nf4 import BLOCK, LEVELS, SHARED, Nf4, dynamic_map, plain
from fortwo.quantization.selection import Choice
from fortwo.train.losses import Row, compute_losses
from tests.parts import as_decoder, gradients, make_rows, random_lora, trainable
from tests.tiny import tiny_model

CPU = torch.device("cpu")
compiled = pytest.mark.usefixtures("level")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor, by: float = 1e-5) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=by * float(wanted.abs().max()))


@pytest.fixture(params=["kernel", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """With the kernels, and without."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "usable", lambda *_: False)


# ---------------------------------------------------------------- the format


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shape", [(6, 128), (64, 33), (300, 64 * 60)])
def test_a_weight_is_the_nearest_level_of_its_blocks_doubly_quantised_largest(shape: tuple[int, int]) -> None:
    weight = random(*shape) * torch.linspace(0.01, 3, shape[0])[:, None]
    weight_format = Nf4.of(weight, HugePageArena())
    blocks = weight.view(-1, BLOCK)
    largest_B = blocks.abs().amax(-1)
    offset = largest_B.mean()
    wanted = []
    for some in (largest_B - offset).split(SHARED):
        scale = some.abs().max()
        nearest = (some[:, None] / scale - dynamic_map(CPU)).abs().argmin(-1)
        wanted.append(dynamic_map(CPU)[nearest] * scale + offset)
    levels, codes = (
        torch.tensor(LEVELS),
        torch.stack([weight_format.codes >> 4, weight_format.codes & 15], -1).view(-1, BLOCK).int(),
    )
    close(weight_format.dense().view(-1, BLOCK), levels[codes] * torch.cat(wanted)[:, None])
    away = (blocks[..., None] / largest_B[:, None, None] - levels).abs()
    torch.testing.assert_close(away.gather(-1, codes[..., None].long())[..., 0], away.amin(-1), rtol=0, atol=1e-6)


def test_the_dynamic_map_has_seven_decades() -> None:
    found = dynamic_map(CPU)
    assert len(found.unique()) == 256
    assert {0.0, 1.0} <= set(found.tolist())
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        assert int(((found >= low) & (found < high)).sum()) == 2**decade
        assert int(((found <= -low) & (found > -high)).sum()) == 2**decade


def test_a_weight_takes_little_more_than_half_a_byte() -> None:
    weight_format = Nf4.of(random(512, 128), HugePageArena())
    assert weight_format.nbytes == 512 * 128 // 2 + 1024 + 4 * 1024 // 256 + 4


@pytest.mark.usefixtures("either")
def test_zeros_stay_zeros() -> None:
    weight = random(8, 128)
    weight[3] = 0
    assert not Nf4.of(weight, HugePageArena()).dense()[3].any()
    assert not Nf4.of(torch.zeros(4, 64), HugePageArena()).dense().any()


@pytest.mark.usefixtures("either")
def test_a_weight_that_is_quantised_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Nf4.of(random(50, 128), HugePageArena())
    monkeypatch.setattr(nf4, "PIECE", 7 * BLOCK)
    pieces = Nf4.of(random(50, 128), HugePageArena())
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in ("codes", "largest_B", "scale_S"))


@compiled
@pytest.mark.parametrize("width", [128, 33])
def test_the_kernel_is_the_plain_formula(width: int) -> None:
    weight_format = Nf4.of(random(640, width) * 0.02, HugePageArena())
    wanted = plain(weight_format, 0, len(weight_format.codes)).view(640, width)
    close(weight_format.dense(), wanted, 1e-6)
    assert torch.equal(weight_format.part(0, 640, torch.bfloat16), weight_format.dense().bfloat16())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight_format.part(64, 192, dtype), weight_format.part(0, 640, dtype)[64:192])


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("outputs", [64, 200, 384])
def test_products_in_parts_are_those_of_the_dense_weight(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "PART", 4 * 128 * 128)  # 128 outputs
    weight_format = Nf4.of(random(outputs, 128), HugePageArena())
    weight = Dequantised(weight_format, torch.float32)
    x, grad = random(5, 128, seed=1), random(5, outputs, seed=2)
    close(weight.product(x), x @ weight_format.dense().t())
    close(weight.t().product(grad), grad @ weight_format.dense())
    assert (weight.shape, weight.t().shape) == ((outputs, 128), (128, outputs))
    narrow = Dequantised(weight_format, torch.bfloat16)
    close(narrow.product(x.bfloat16()), x @ weight_format.dense().t(), 0.02)
    close(narrow.t().product(grad.bfloat16()), grad @ weight_format.dense(), 0.02)
    assert narrow.product(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize("shape", [(64, 64), (192, 320), (832, 128), (128, 4160)])
def test_products_from_the_codes_are_those_of_the_dense_weight(
    rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "SUMMED", 256)
    weight_format = Nf4.of(random(*shape) * torch.linspace(0.1, 2, shape[0])[:, None], HugePageArena())
    x, grad = random(rows, shape[1], seed=1).bfloat16(), random(rows, shape[0], seed=2).bfloat16()
    dense = weight_format.part(0, shape[0], torch.bfloat16).float()
    assert weight_format._multiplies_tiles(x)
    close(weight_format.forward(x, torch.bfloat16, torch.float32), x.float() @ dense.t())
    close(weight_format.backward(grad, torch.bfloat16, torch.float32), grad.float() @ dense)


# ---------------------------------------------------------------- training on it

ROWS = [Row(tuple(row), 5) for row in make_rows([12, 9, 15], start=[7, 8, 9])]
DROPPED = LoraConfig(r=4, alpha=8, dropout=0.3)


def held_in_nf4(family: str = "llama") -> Decoder:
    return as_decoder(tiny_model(family)).in_formats(Choice.fixed("nf4"))


def trained(home: Decoder, checkpointing: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, the same dropout drawn."""
    lora = trainable(random_lora(home, config=DROPPED))
    torch.manual_seed(5)
    loss = compute_losses(backend_for(home), lora, 3, ROWS, checkpointing).ce
    return loss.detach(), gradients(loss, lora)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradients_on_nf4_are_those_on_its_dequantised_weights(family: str) -> None:
    home = held_in_nf4(family)
    dense = home._with(lambda weight, _: weight.dense(torch.float32) if isinstance(weight, Weight) else weight)
    assert isinstance(dense.layers[0].qkv_OD, Tensor)
    (loss, found), (wanted_loss, wanted) = trained(home.in_fp32()), trained(dense)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    assert all(tensor.any() for tensor in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)


def test_gradients_on_nf4_in_bf16_are_near_those_in_fp32() -> None:
    home = held_in_nf4()
    (loss, found), (wanted_loss, wanted) = trained(home.in_bf16()), trained(home.in_fp32())
    torch.testing.assert_close(loss, wanted_loss, rtol=0.02, atol=0)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("of", [lambda home: home, lambda home: home.in_bf16()], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_checkpointing_changes_no_bit(of: Callable[[Decoder], Decoder], weights: str) -> None:
    plain_home = as_decoder(tiny_model("llama"))
    home = of(plain_home if weights == "fp32" else plain_home.in_formats(Choice.fixed("nf4")).in_fp32())
    (loss, found), (wanted_loss, wanted) = trained(home, checkpointing=True), trained(home)
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_checkpointing_keeps_less() -> None:
    home = as_decoder(tiny_model("llama"))
    lora = trainable(random_lora(home, config=DROPPED))

    def kept(checkpointing: bool) -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            compute_losses(backend_for(home), lora, 3, ROWS, checkpointing)
        return sum(sizes)

    assert kept(True) < kept(False) / 5


def test_a_network_in_nf4_is_trained_on_as_it_is() -> None:
    home = held_in_nf4()
    for bf16, trained_on in ((True, home.in_bf16()), (False, home.in_fp32())):
        for layer in trained_on.layers:
            for weight in (layer.qkv_OD, layer.o_DI, layer.gate_up_OD, layer.down_DI):
                assert isinstance(weight, Dequantised)
        head = 0 if bf16 else 4 * home.config.vocabulary * home.config.hidden  # in bf16 it is held already
        assert home.bytes_to_train(bf16) == head
        assert trained_on.head_VD.dtype == (torch.bfloat16 if bf16 else torch.float32)
    wide = as_decoder(tiny_model("llama"))
    assert wide.bytes_to_train(bf16=False) == 0
    *inner, head = (weight.numel() for weight in wide.weights())
    assert wide.bytes_to_train(bf16=True) == 2 * (sum(inner) + head)


class Recorded(Mapping[str, Tensor]):
    """Hands out a copy of each tensor, and knows how many bytes of them are still there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._given: list[Any] = []
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        import weakref

        tensor = self._tensors[name].clone()
        self._given.append(weakref.ref(tensor))
        there = (found for one in self._given if (found := one()) is not None)
        self.most = max(self.most, sum(found.nbytes for found in there))
        return tensor

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_a_base_is_quantised_weight_by_weight_as_it_is_read() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    config = DecoderConfig.from_hf({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    tensors = Recorded(model.state_dict())
    found = Decoder(config, tensors, hold=formats_of(Choice.fixed("nf4")))
    stay = 4 * (config.vocabulary * 64 + (2 * config.layers + 1) * 64)  # the embedding and the norms
    assert tensors.most <= stay + 4 * 64 * max(2 * 96, config.vocabulary)  # and what makes one product
    whole = Decoder(config, model.state_dict()).in_formats(Choice.fixed("nf4"))
    assert found.bytes == whole.bytes
    for one, other in zip(found.weights(), whole.weights(), strict=True):
        assert torch.equal(one, other)

"""How near training comes to the machine's matrix products: python -m bench.gemm

A step on synthetic rows like those of 42's job, as planned (bf16), against nothing but the products with frozen weights
that it holds, of the same shapes and as many, there and back: by torch (oneDNN), and by our own kernel. The adapter's
products, attention, norms, losses and the optimizer are in the step alone. Products and steps take turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fortwo.engine import malloc_tuning
from fortwo.execution.backend import backend_for
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.kernels import isa
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.quantization.tiles import Tiles, tiled_product
from fortwo.settings import load
from fortwo.train.adamw import AdamW
from fortwo.train.losses import Row, compute_losses

PREFIX, ROWS, LONGEST, REPLY = 24, (1, 8, 24), 63, 20  # tokens shared, rows of a step, tokens of a row, of its reply
TURNS = 7
Call = Callable[[], None]
Multiply = Callable[[Tensor, Any], Tensor]


def made(count: int) -> list[Row]:
    """Rows of random tokens that begin alike."""
    random = Random(0)
    shared = [random.randrange(1000, 40000) for _ in range(PREFIX)]
    own = [[random.randrange(1000, 40000) for _ in range(LONGEST - PREFIX)] for _ in range(count)]
    return [Row((*shared, *tokens), LONGEST - REPLY, False) for tokens in own]


def weights_of(decoder: Decoder) -> list[Tiles]:
    found = [getattr(layer, name) for layer in decoder.layers for name in ("qkv_OD", "o_DI", "gate_up_OD", "down_DI")]
    return [weight for weight in (*found, decoder.head_VD) if isinstance(weight, Tiles)]


def multiplied(multiply: Multiply, held: Sequence[Tensor | Tiles], tokens: int, said: int) -> Call:
    """All products of a step, there and back: `said` rows of the head, which is last, and `tokens` of the others."""
    counts = [tokens] * (len(held) - 1) + [said]
    rows = {(T, size): torch.randn(T, size).bfloat16() for T in {tokens, said} for one in held for size in one.shape}

    def run() -> None:
        for T, weight_OI in zip(counts, held, strict=True):
            multiply(rows[T, weight_OI.shape[1]], weight_OI)
            multiply(rows[T, weight_OI.shape[0]], weight_OI.t())

    return run


def medians(calls: Sequence[Call]) -> list[float]:
    """Seconds of each, in turns; the first turn does not count."""
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS + 1):
        for call, own in zip(calls, spent, strict=True):
            began = time.perf_counter()
            call()
            own.append(time.perf_counter() - began)
    return [statistics.median(own[1:]) for own in spent]


def main() -> None:
    settings = load()
    isa.cap(settings.isa)
    directory = Catalog(settings.models_dir).prepare(settings.default_model)
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
    decoder = Decoder(config, weights.open_tensors(directory)).in_bf16()
    tiles = weights_of(decoder)
    if len(tiles) != 4 * config.layers + 1:
        sys.exit("the processor multiplies no bf16: training has no products in bf16 to compare with")
    dense = [weight.dense() for weight in tiles]
    malloc_tuning.retain_freed_memory()
    lora = Lora.init(LoraConfig(), config, seed=0)
    flat_N = lora.flatten()
    optimizer = AdamW(flat_N, (0.9, 0.999), 1e-8, 0.0)
    table = Table("rows", "tokens computed", "a step, ms", "products by torch", "by our kernel", "share", box=MARKDOWN)
    for count in ROWS:
        rows, tokens, said = made(count), PREFIX + count * (LONGEST - PREFIX), count * REPLY

        def step(rows: list[Row] = rows, said: int = said) -> None:
            (compute_losses(backend_for(decoder), lora, PREFIX, rows).ce / said).backward()
            optimizer.gradient_norm()
            optimizer.step(1e-4)

        calls = [step, multiplied(_by_torch, dense, tokens, said), multiplied(tiled_product, tiles, tokens, said)]
        whole, *alone = medians(calls)
        shown = (f"{1000 * seconds:.0f}" for seconds in (whole, *alone))
        table.add_row(str(count), str(tokens), *shown, f"{min(alone) / whole:.0%}")
    Console(width=120).print(table)


def _by_torch(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_TI @ weight_OI.t()


if __name__ == "__main__":
    main()

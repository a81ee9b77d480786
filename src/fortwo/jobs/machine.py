"""What this machine does with a base model: guessed from a short matrix product, until a job has shown it.

TRAINING and DECODING are rough shares of that product's speed that packed training and batched decoding reach; the
plan's seconds are an estimate, and the report holds them against what it took.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fortwo.train.plan import Machine

if TYPE_CHECKING:
    import torch

    from fortwo.models.decoder import Decoder

TRAINING, DECODING = 0.5, 0.35
SIZE = 1024


def look(decoder: Decoder, seen: float | None) -> Machine:
    """On the device's thread. seen: tokens a second that the last job trained on this base."""
    from fortwo.models.measure import memory
    from fortwo.models.products import multiplies_bf16

    parameters = decoder.parameters
    bf16 = multiplies_bf16(decoder.device)
    operations = _operations_per_second(decoder.device, bf16=False)
    if seen is None:
        trained = _operations_per_second(decoder.device, bf16=True) if bf16 else operations
        seen = TRAINING * trained / (4 * parameters)
    return Machine(
        tokens_per_second=seen,
        decode_tokens_per_second=DECODING * operations / (2 * parameters),
        memory=memory(decoder.device),
        bf16=bf16,
    )


def _operations_per_second(device: torch.device, bf16: bool) -> float:
    import torch

    from fortwo.models.products import product

    square = torch.ones(SIZE, SIZE, device=device)
    weight = square.bfloat16() if bf16 else square
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        product(square, weight)[0, 0].item()
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * SIZE**3 / fastest

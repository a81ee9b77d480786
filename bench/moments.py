"""What 8 bits do to AdamW's steps: .venv-bench/bin/python -m bench.moments

The same gradients for torch's AdamW in fp32, and for fortwo's and bitsandbytes' with moments of 8 bits; no model. Each
weight has a mean gradient and noise around it; their size differs from weight to weight by a normal number in the
exponent, and grows or fades as steps go by. Held against torch's: the way from the first step to the last, and the last
step alone, whose size tells whether second moments followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bitsandbytes
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fortwo.train.adamw import AdamW8bit

WEIGHTS, STEPS, RATE = 1 << 15, 400, 1e-3
SECOND_BETAS = (0.999, 0.95)
Step = Callable[[Tensor], None]


def gradients() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size_N, growth_N, mean_N = (torch.randn(WEIGHTS, generator=generator) for _ in range(3))
    for step in range(STEPS):
        noise_N = torch.randn(WEIGHTS, generator=generator)
        yield torch.exp(size_N + 0.004 * growth_N * step) * (0.3 * mean_N + noise_N)


def by_torch(kind: Any, beta2: float, weight_N: Tensor) -> Step:
    optimizer = kind([weight_N], lr=RATE, betas=(0.9, beta2), weight_decay=0.0)

    def step(grad_N: Tensor) -> None:
        weight_N.grad = grad_N.clone()
        optimizer.step()

    return step


def by_fortwo(beta2: float, weight_N: Tensor) -> Step:
    weight_N.grad = torch.zeros(WEIGHTS)
    optimizer = AdamW8bit(weight_N, (0.9, beta2), 1e-8, 0.0)

    def step(grad_N: Tensor) -> None:
        assert weight_N.grad is not None
        weight_N.grad.copy_(grad_N)
        optimizer.step(RATE)

    return step


def gone(start: Callable[[Tensor], Step]) -> tuple[Tensor, Tensor]:
    """All steps together, and the last one."""
    weight_N = torch.zeros(WEIGHTS, requires_grad=True)
    step, before_N = start(weight_N), torch.zeros(WEIGHTS)
    for grad_N in gradients():
        before_N = weight_N.detach().clone()
        step(grad_N)
    return weight_N.detach(), weight_N.detach() - before_N


def main() -> None:
    table = Table("beta2", "moments of 8 bits", "way, off by", "last step, off by", "its size", box=MARKDOWN)
    for beta2 in SECOND_BETAS:
        wanted, wanted_last = gone(partial(by_torch, torch.optim.AdamW, beta2))
        eighth: dict[str, Callable[[float, Tensor], Step]] = {
            "fortwo": by_fortwo,
            "bitsandbytes": partial(by_torch, bitsandbytes.optim.AdamW8bit),
        }
        for name, start in eighth.items():
            way, last = gone(partial(start, beta2))
            off = [(found - right).norm() / right.norm() for found, right in ((way, wanted), (last, wanted_last))]
            size = last @ wanted_last / wanted_last.square().sum()
            table.add_row(str(beta2), name, f"{off[0]:.1%}", f"{off[1]:.1%}", f"{size:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

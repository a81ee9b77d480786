"""The next token of each row of a batch: greedy, or drawn with temperature, top_k and top_p.

A draw takes one number from the request's own generator and walks the distribution in vocabulary order, so that
the same seed gives the same text whatever else is in the batch. Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fortwo.records import Sampling


class Sampler:
    """One request's settings and its stream of random numbers (on the CPU: the same on every device). Any whole
    number is a seed."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    def draw(self, logits_V: Tensor) -> int:
        """A token of softmax(logits / temperature), cut to the top_k likeliest, then to the fewest that hold top_p."""
        settings = self.sampling
        scaled_V = logits_V.double() / settings.temperature
        if 0 < settings.top_k < len(scaled_V):
            scaled_V = _keep(scaled_V, scaled_V.topk(settings.top_k).indices)
        weights_V = torch.softmax(scaled_V, -1)
        if settings.top_p < 1:
            weights_V = _keep(weights_V, _nucleus(weights_V, settings.top_p), 0.0)
        up_to_V = weights_V.cumsum(-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64).to(up_to_V.device) * up_to_V[-1]
        return int(torch.searchsorted(up_to_V, point, right=True))


def _nucleus(weights_V: Tensor, top_p: float) -> Tensor:
    """The fewest tokens that hold top_p together, at least one.

    All tokens below (1 - top_p) / V hold less than 1 - top_p together, so none of them is in: only the rest is sorted
    (from half of that bound on, which leaves rounding no say).
    """
    possible = (weights_V >= (1 - top_p) / (2 * len(weights_V))).nonzero().squeeze(-1)
    sorted_N, order_N = weights_V[possible].sort(descending=True, stable=True)
    before_N = sorted_N.cumsum(-1) - sorted_N
    before_N[0] = -1
    return possible[order_N[before_N < top_p]]


def _keep(values_V: Tensor, kept: Tensor, rest: float = -math.inf) -> Tensor:
    """`values_V` at the indices in `kept`, `rest` elsewhere."""
    return torch.full_like(values_V, rest).index_copy_(0, kept, values_V[kept])


def choose(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """One token per row; None where the row's logits are not numbers."""
    highest_B, best_B = logits_BV.max(-1)
    tokens: list[int | None] = []
    for row, (sampler, highest, best) in enumerate(zip(samplers, highest_B.tolist(), best_B.tolist(), strict=True)):
        if not math.isfinite(highest):  # max lets nan through
            tokens.append(None)
        else:
            tokens.append(best if sampler.greedy else sampler.draw(logits_BV[row]))
    return tokens

"""The next token of each row of a batch: greedy, or drawn; what bends the choice; and how likely it was.

The order is vLLM's. Log-probabilities are of the logits as they are. Then logit_bias is added; then come the
penalties: repetition over the prompt and the reply, frequency and presence over the reply alone; then what a schema
forbids falls out. Greedy takes the highest. A draw divides by the temperature and keeps min_p, then top_k, then top_p.
It takes one number from the request's own generator and walks the distribution in vocabulary order, so that the same
seed gives the same text whatever else is in the batch. Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fortwo.engine.generation import JsonConstraint
from fortwo.prompts import NOT_NUMBERS, Logprob, Sampling


class Chosen(NamedTuple):
    """logprob: when the request asked for it."""

    token: int
    logprob: Logprob | None = None


class Sampler:
    """One request's settings, what it said so far, and its stream of random numbers (on the CPU: the same on every
    device). Any whole number is a seed. prompt: its tokens, for the repetition penalty."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int] = (), constraint: JsonConstraint | None = None
    ) -> None:
        self.sampling = sampling
        self._constraint = constraint
        self._penalised = any((sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1))
        self._said = dict.fromkeys(prompt, 0) if self._penalised else {}  # token: how often in the reply
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def bent(self) -> bool:
        """Whether something changes the logits before the choice."""
        return self._penalised or bool(self.sampling.logit_bias) or self._constraint is not None

    @property
    def plain(self) -> bool:
        """Whether the highest logit is the choice, and nothing more is asked."""
        return self.greedy and not self.bent and self.sampling.logprobs is None

    def choose(self, logits_V: Tensor) -> Chosen:
        """The row's next token. Raises ValueError when the schema leaves none."""
        bent_V = self._bend(logits_V) if self.bent else logits_V
        token = int(bent_V.argmax()) if self.greedy else self.draw(bent_V)
        if self._constraint is not None:
            self._constraint.advance(token)
        if self._penalised:
            self._said[token] = self._said.get(token, 0) + 1
        count = self.sampling.logprobs
        return Chosen(token, None if count is None else logprobs(logits_V[None], [token], count)[0])

    def draw(self, logits_V: Tensor) -> int:
        """A token of softmax(logits / temperature), without those below min_p times the likeliest, cut to the top_k
        likeliest, then to the fewest that hold top_p."""
        settings = self.sampling
        scaled_V = (logits_V.double() - logits_V.max()) / settings.temperature  # 0 at most, however cold it is
        if settings.min_p > 0:
            scaled_V = scaled_V.masked_fill(scaled_V < math.log(settings.min_p), -math.inf)
        if 0 < settings.top_k < len(scaled_V):
            scaled_V = _keep(scaled_V, scaled_V.topk(settings.top_k).indices)
        weights_V = torch.softmax(scaled_V, -1)
        if settings.top_p < 1:
            weights_V = _keep(weights_V, _nucleus(weights_V, settings.top_p), 0.0)
        up_to_V = weights_V.cumsum(-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64).to(up_to_V.device) * up_to_V[-1]
        return int(torch.searchsorted(up_to_V, point, right=True))

    def _bend(self, logits_V: Tensor) -> Tensor:
        """A copy of the logits with bias, penalties and what the schema forbids."""
        settings, device = self.sampling, logits_V.device
        logits_V = logits_V.float().clone()
        for token, bias in settings.logit_bias:
            logits_V[token] += bias
        if self._said:
            tokens_N = torch.tensor(list(self._said), device=device)
            times_N = torch.tensor(list(self._said.values()), device=device)
            said_N = logits_V[tokens_N]
            repetition = settings.repetition_penalty
            said_N = torch.where(said_N > 0, said_N / repetition, said_N * repetition)
            said_N = said_N - settings.frequency_penalty * times_N - settings.presence_penalty * (times_N > 0)
            logits_V[tokens_N] = said_N.clamp(max=torch.finfo(said_N.dtype).max)
        if self._constraint is not None:
            allowed_V = torch.from_numpy(self._constraint.allowed())[: len(logits_V)].to(device)
            logits_V[len(allowed_V) :] = -math.inf
            logits_V[: len(allowed_V)].masked_fill_(~allowed_V, -math.inf)
        return logits_V


def logprobs(logits_BV: Tensor, tokens: Sequence[int], count: int) -> list[Logprob]:
    """Of each row's token and of its `count` likeliest."""
    logprobs_BV = torch.log_softmax(logits_BV.float(), -1)
    own_B = logprobs_BV.gather(1, torch.tensor(tokens, device=logprobs_BV.device)[:, None])[:, 0]
    top = logprobs_BV.topk(min(count, logprobs_BV.shape[1]))
    rows = zip(tokens, own_B.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [Logprob(token, own, tuple(zip(ids, values, strict=True))) for token, own, ids, values in rows]


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


def choose(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[Chosen | str]:
    """One token per row, or the reason why a row has none: its logits are not numbers, or its schema leaves none."""
    best_B = highest(logits_BV)
    highest_B = logits_BV.gather(1, best_B[:, None])[:, 0]
    rows: list[Chosen | str] = []
    for row, (sampler, logit, best) in enumerate(zip(samplers, highest_B.tolist(), best_B.tolist(), strict=True)):
        if not math.isfinite(logit):
            rows.append(NOT_NUMBERS)
        elif sampler.plain:
            rows.append(Chosen(best))
        else:
            try:
                rows.append(sampler.choose(logits_BV[row]))
            except ValueError as error:
                rows.append(str(error))
    return rows


def highest(logits_BV: Tensor) -> Tensor:
    """Where the highest logit of each row is, the first of equal ones; where the first nan is, if there is one."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))  # a sixth of torch's time
    return logits_BV.argmax(-1)

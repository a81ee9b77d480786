"""Sampling: the next token of each row of a batch, greedy or random, and its log-probability.

The order of operations is vLLM's. Log-probabilities are those of the raw logits. Then logit_bias is added, then the
penalties apply (repetition over prompt and reply, frequency and presence over the reply alone), then tokens that the
schema forbids are removed. Greedy takes the highest logit. A random draw divides by the temperature and filters by
min_p, then top_k, then top_p. It uses one number of the request's own generator and walks the distribution in
vocabulary order, so the same seed gives the same text whatever else is in the batch. Suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fortwo.engine.generation import JsonConstraint
from fortwo.prompts import NON_FINITE_LOGITS, Logprob, Sampling


class SampledToken(NamedTuple):
    """logprob: None unless the request asked for it."""

    token: int
    logprob: Logprob | None = None


class Sampler:
    """One request's settings, the tokens it has used so far, and its random numbers (from the CPU, so that they are the
    same for every device). Any whole number is a seed. prompt: its tokens, for the repetition penalty."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int] = (), constraint: JsonConstraint | None = None
    ) -> None:
        self.sampling = sampling
        self._constraint = constraint
        self._penalised = any((sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1))
        self._counts = dict.fromkeys(prompt, 0) if self._penalised else {}  # token: how often it is in the reply
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def modifies_logits(self) -> bool:
        """Whether bias, penalties or a schema change the logits before the choice."""
        return self._penalised or bool(self.sampling.logit_bias) or self._constraint is not None

    @property
    def plain(self) -> bool:
        """Whether the token is simply the argmax of the raw logits, without log-probabilities."""
        return self.greedy and not self.modifies_logits and self.sampling.logprobs is None

    def sample(self, logits_V: Tensor) -> SampledToken:
        """The row's next token, from its logits (V,). Raises ValueError when the schema allows none."""
        modified_V = self._modified(logits_V) if self.modifies_logits else logits_V
        token = int(modified_V.argmax()) if self.greedy else self.draw(modified_V)
        if self._constraint is not None:
            self._constraint.advance(token)
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        count = self.sampling.logprobs
        return SampledToken(token, None if count is None else logprobs(logits_V[None], [token], count)[0])

    def draw(self, logits_V: Tensor) -> int:
        """A random token of softmax(logits / temperature), after dropping those below min_p times the likeliest, then
        all but the top_k likeliest, then all but the fewest whose probabilities sum to top_p."""
        settings = self.sampling
        scaled_V = (logits_V.double() - logits_V.max()) / settings.temperature  # at most 0, however low the temperature
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

    def _modified(self, logits_V: Tensor) -> Tensor:
        """A copy of the logits with bias and penalties added, and -inf for tokens that the schema forbids."""
        settings, device = self.sampling, logits_V.device
        logits_V = logits_V.float().clone()
        for token, bias in settings.logit_bias:
            logits_V[token] += bias
        if self._counts:
            tokens_N = torch.tensor(list(self._counts), device=device)
            times_N = torch.tensor(list(self._counts.values()), device=device)
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
    """Log-probabilities of each row's token and of its `count` likeliest tokens."""
    logprobs_BV = torch.log_softmax(logits_BV.float(), -1)
    own_B = logprobs_BV.gather(1, torch.tensor(tokens, device=logprobs_BV.device)[:, None])[:, 0]
    top = logprobs_BV.topk(min(count, logprobs_BV.shape[1]))
    rows = zip(tokens, own_B.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [Logprob(token, own, tuple(zip(ids, values, strict=True))) for token, own, ids, values in rows]


def _nucleus(weights_V: Tensor, top_p: float) -> Tensor:
    """The fewest tokens whose probabilities sum to top_p, at least one.

    All tokens below (1 - top_p) / V together have less than 1 - top_p, so none of them belongs to it: only the rest is
    sorted (from half of that bound on, so that rounding makes no difference).
    """
    possible = (weights_V >= (1 - top_p) / (2 * len(weights_V))).nonzero().squeeze(-1)
    sorted_N, order_N = weights_V[possible].sort(descending=True, stable=True)
    before_N = sorted_N.cumsum(-1) - sorted_N
    before_N[0] = -1
    return possible[order_N[before_N < top_p]]


def _keep(values_V: Tensor, indices: Tensor, rest: float = -math.inf) -> Tensor:
    """`values_V` at `indices`, `rest` elsewhere."""
    return torch.full_like(values_V, rest).index_copy_(0, indices, values_V[indices])


def sample(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[SampledToken | str]:
    """One token per row, or the reason why a row has none: its logits are not finite, or its schema allows none."""
    best_B = _argmax(logits_BV)
    highest_B = logits_BV.gather(1, best_B[:, None])[:, 0]
    rows: list[SampledToken | str] = []
    for row, (sampler, logit, best) in enumerate(zip(samplers, highest_B.tolist(), best_B.tolist(), strict=True)):
        if not math.isfinite(logit):
            rows.append(NON_FINITE_LOGITS)
        elif sampler.plain:
            rows.append(SampledToken(best))
        else:
            try:
                rows.append(sampler.sample(logits_BV[row]))
            except ValueError as error:
                rows.append(str(error))
    return rows


def _argmax(logits_BV: Tensor) -> Tensor:
    """The index of each row's highest logit, the first of equal ones; that of the first nan, if there is one."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))  # takes a sixth of torch's time
    return logits_BV.argmax(-1)

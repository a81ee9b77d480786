"""The arithmetic of metrics: shares with their confidence intervals. Pure.

efficacy, paraphrase and specificity are called efficacy, generalisation and locality in the literature on knowledge
editing (Meng et al. 2022, arXiv:2202.05262). Here they are measured on whole replies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fortwo.records import Metric

_Z = 1.959964  # 95 %


def share(hits: int, n: int) -> Metric:
    """hits / n with the 95 % Wilson interval (Wilson 1927); for n = 0 it is 0, with the interval from 0 to 1."""
    if n == 0:
        return Metric(0.0, 0, 0.0, 1.0)
    p = hits / n
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Metric(p, n, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))  # rounding must not exclude p


def score(metrics: Mapping[str, Metric]) -> Metric:
    """The harmonic mean of the shares and of their bounds, with the smallest n."""

    def harmonic(values: Iterable[float]) -> float:
        values = list(values)
        return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0

    shares = list(metrics.values())
    return Metric(
        harmonic(metric.value for metric in shares),
        min(metric.n for metric in shares),
        harmonic(metric.low for metric in shares),
        harmonic(metric.high for metric in shares),
    )


def targets_met(metrics: Mapping[str, Metric], targets: Mapping[str, float], margin: float = 0.0) -> bool:
    """Whether every measured share reaches its target, raised by the part `margin` of its distance to 1."""
    return all(
        metrics[name].value >= target + margin * (1 - target) for name, target in targets.items() if name in metrics
    )

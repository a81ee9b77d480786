"""What an evaluation found, in one sentence for people. Pure text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fortwo.records import Json, Metric

_SAYS = {
    "efficacy": "gives the right answer to {hits} of {n} questions that it was trained on",
    "paraphrase": "gives the right answer to {hits} of {n} questions that it was never shown",
    "specificity": "answers {hits} of {n} questions about other subjects as before",
    "portability": "answers {hits} of {n} questions whose answer follows from the fact",
    "accuracy": "prefers the right answer in {hits} of {n} cases",
    "retention": "keeps {share} of the base's own words on unrelated prompts",
    "kept_efficacy": "still gives the right answer to {hits} of {n} questions about what it knew before",
}


def missed_targets(metrics: Mapping[str, Metric], targets: Mapping[str, float]) -> dict[str, float]:
    """The targets that the metrics do not reach, by metric; those that were not measured are not missed."""
    return {name: share for name, share in targets.items() if name in metrics and metrics[name].value < share}


def verdict(metrics: Mapping[str, Metric], targets: Mapping[str, float]) -> str:
    """Whether the adapter learned what it was taught, and what was measured. metrics: those of the adapter; targets:
    the plan's. Without targets nothing is proven, and the sentence says so."""
    missed = missed_targets(metrics, targets)
    findings = _and(list(_findings(metrics)))
    told = f" It {findings}." if findings else ""
    if missed:
        short = _and(
            [f"{name} is {percent(metrics[name].value)} of at least {percent(missed[name])}" for name in missed]
        )
        return f"It has not learned enough: {short}.{told}"
    if not any(name in metrics for name in targets):
        return f"It was trained. There was no target, so nothing was proven.{told}"
    return f"It has learned this: every target was met.{told}"


def verdict_of(report: Json, targets: Mapping[str, float]) -> str:
    """The verdict of a report as the API and a manifest have it."""
    return verdict({name: Metric(**found) for name, found in report["metrics"].items()}, targets)


def percent(share: float) -> str:
    """A share from 0 to 1 in percent. 100 % is only what is whole, and 0 % only what is nothing."""
    whole = round(share * 100)
    if (share < 1 and whole == 100) or (share > 0 and whole == 0):
        return f"{min(max(share * 100, 0.1), 99.9):.1f} %"
    return f"{whole} %"


def _findings(metrics: Mapping[str, Metric]) -> Iterator[str]:
    for name, sentence in _SAYS.items():
        if name in metrics:
            found = metrics[name]
            yield sentence.format(hits=round(found.value * found.n), n=found.n, share=percent(found.value))


def _and(parts: list[str]) -> str:
    """The parts as a list in a sentence."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""

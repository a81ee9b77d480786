"""A report as one HTML page that needs nothing else: verdict, metrics, curves, transcripts, plan and settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fortwo.display import value
from fortwo.facts.verdict import percent, verdict_of
from fortwo.records import Json
from fortwo.server import charts

FACT_METRICS = ("efficacy", "paraphrase", "specificity", "portability")
METRICS = (*FACT_METRICS, "accuracy", "retention", *(f"kept_{name}" for name in FACT_METRICS), "score")
MEANINGS = {
    "efficacy": "questions that it was trained on",
    "paraphrase": "questions that it was never shown",
    "specificity": "questions about other subjects, answered as before",
    "portability": "questions whose answer follows from the fact",
    "accuracy": "cases in which it prefers the right answer",
    "retention": "of the base's own words, kept elsewhere",
    "score": "all of them together",
}


@dataclass(frozen=True)
class ReportPage:
    """What a page shows. report: None before the evaluation; steps, evaluations: data of the job's events; made: Unix
    seconds."""

    name: str
    status: str
    made: float
    plan: Json
    actual: Json | None
    report: Json | None
    error: Json | None = None
    steps: list[Json] = field(default_factory=list)
    evaluations: list[Json] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """In words: of the evaluation, or else of the job."""
        if self.report is not None:
            return verdict_of(self.report, self.plan["targets"])
        return str(self.error["message"]) if self.error is not None else f"The job is {self.status}."

    @property
    def charts(self) -> list[charts.Chart]:
        """Loss, learning rate and metrics over the steps, as far as there are any."""
        evaluated = [(one["step"], one["metrics"], one.get("eval_loss")) for one in self.evaluations]
        losses = {
            "loss": _points((one["step"], one["loss"]) for one in self.steps),
            "eval_loss": _points((step, loss) for step, _, loss in evaluated),
        }
        rates = {"learning_rate": _points((one["step"], one["learning_rate"]) for one in self.steps)}
        shares = {
            name: _points((step, metrics.get(name)) for step, metrics, _ in evaluated)
            for name in METRICS
            if name != "score"
        }
        drawn = (
            charts.chart("Loss", losses),
            charts.chart("Learning rate", rates),
            charts.chart("Metrics", shares, self.plan["targets"], (0.0, 1.0)),
        )
        return [one for one in drawn if one is not None]

    def html(self) -> str:
        return _template().render(page=self, metrics=METRICS, fact_metrics=FACT_METRICS, meanings=MEANINGS)


def _points(pairs: Iterable[tuple[int, float | None]]) -> list[charts.Point]:
    return [(step, value) for step, value in pairs if value is not None]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": value, "percent": percent, "moment": _moment, "computed": _computed}
    environment.globals["chart"] = charts
    return environment.get_template("report_page.html")


def _computed(thing: Any, name: str) -> str:
    """A computed value: bytes and seconds with their unit."""
    from fortwo.train.estimate import format_duration

    if isinstance(thing, int | float) and not isinstance(thing, bool):
        if name.endswith("bytes"):
            return f"{thing / 2**20:,.0f} MiB"
        if name.endswith("seconds"):
            return format_duration(thing)
    return value(thing)


def _moment(stamp: float) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M UTC")

"""Curves of a run as SVG: points, axes and targets as numbers that a template draws. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 200
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 24  # margins around the curves
MOST_POINTS = 500
TICKS = 4

Point = tuple[float, float]  # step and value


@dataclass(frozen=True)
class Curve:
    """points: of an SVG polyline; color: the number of its color; target: the height of its target's line, if any."""

    name: str
    points: str
    color: int
    target: float | None = None


@dataclass(frozen=True)
class Tick:
    """at: in the chart's own units; text: the value there."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps and values."""

    title: str
    curves: tuple[Curve, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]


def chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    targets: Mapping[str, float] | None = None,
    between: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart of named series, or None if there is nothing to draw. targets: by the name of a series; between: the
    lowest and the highest value, if they are not those of the points."""
    drawn = {name: thinned(points) for name, points in series.items() if points}
    if not drawn:
        return None
    every = [point for points in drawn.values() for point in points]
    last = max(max(step for step, _ in every), 1.0)
    low, high = between or (min(value for _, value in every), max(value for _, value in every))
    high = high if high > low else low + (abs(low) or 1.0)

    def across(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last, 1)

    def down(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low)), 1)

    wanted = targets or {}
    curves = tuple(
        Curve(
            name,
            " ".join(f"{across(step)},{down(value)}" for step, value in points),
            color,
            down(wanted[name]) if name in wanted else None,
        )
        for color, (name, points) in enumerate(drawn.items())
    )
    parts = [part / TICKS for part in range(TICKS + 1)]
    steps = dict.fromkeys(round(last * part) for part in parts)
    values = [low + (high - low) * part for part in parts]
    return Chart(
        title,
        curves,
        tuple(Tick(across(step), f"{step:,}") for step in steps),
        tuple(Tick(down(value), f"{value:.3g}") for value in values),
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS of the points, evenly chosen, with the first and the last; none that is not a
    number."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= MOST_POINTS:
        return finite
    stride = math.ceil(len(finite) / MOST_POINTS)
    return [*finite[::stride], finite[-1]]

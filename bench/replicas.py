"""What replicas add to the latency of a request: a server whose own engine answers, and a server with one replica on
Ray Serve, on this machine. Both are asked the same, in turn, one request at a time.

.venv-scale/bin/python -m bench.replicas     # `make test-scale` makes this environment, which has Ray
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.serving import home, started
from bench.streams import Ask, Heard, hear

REQUESTS = 60
UNCOUNTED = 5  # until everything is warm
TOKENS = 32


def main() -> None:
    heard: dict[str, list[Heard]] = {"1 replica": [], "own engine": []}
    with ExitStack() as stack:
        servers = {}
        for name, more in (("1 replica", {"FORTWO_REPLICAS": "1"}), ("own engine", {})):
            settings, environment = stack.enter_context(home())
            stack.enter_context(started(settings, environment | more))
            servers[name] = settings
        for number in range(UNCOUNTED + REQUESTS):
            ask = Ask(({"role": "user", "content": f"{number} is a number. What do you know about it?"},), TOKENS)
            for name, settings in servers.items():
                one = hear(settings.port, settings.default_model, ask)
                if number >= UNCOUNTED:
                    heard[name].append(one)
    Console(width=120).print(table(heard["own engine"], heard["1 replica"]))


def table(own: list[Heard], replica: list[Heard]) -> Table:
    """Medians, and the median of what a request took longer by the replica than by the own engine."""
    shown = Table(box=MARKDOWN)
    for column in (f"median of {len(own)} requests (ms)", "own engine", "1 replica", "replica adds"):
        shown.add_column(column, justify="right" if shown.columns else "left")
    rows: dict[str, Callable[[Heard], float]] = {
        "first token": lambda one: one.times[0] - one.sent,
        "each further token": lambda one: (one.times[-1] - one.times[0]) / (one.tokens - 1),
        f"whole reply of {TOKENS} tokens": lambda one: one.times[-1] - one.sent,
    }
    for name, seconds in rows.items():
        pairs = [(seconds(first), seconds(other)) for first, other in zip(own, replica, strict=True)]
        columns = zip(*((first, other, other - first) for first, other in pairs), strict=True)
        shown.add_row(name, *(f"{1000 * statistics.median(column):.1f}" for column in columns))
    return shown


if __name__ == "__main__":
    main()

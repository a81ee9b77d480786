"""Chat beside training: what 8 streams get while a job trains, and what the job loses by them.

    python -m bench.coserving [--quick]

One server: the streams alone, then the job of 42 alone and beside the streams, for several `micro_step_tokens`. A token
waits for the micro-step under way: with smaller ones it waits less, and the job is slower. Every job takes the same
steps, and is examined once, at its end. Each stream asks for one short story after another and is never idle.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.serve import JOB
from bench.serving import run_job, server
from bench.streams import Ask, Heard, hear
from bench.workloads import story
from fortwo.cli.client import Client
from fortwo.records import Json

ROWS = Path("examples/42_intensive_training.json")
STREAMS, TOKENS, SECONDS = 8, 64, 20  # SECONDS: of the streams alone
BOUNDS = (1280, 640, 320)  # micro_step_tokens; the first is the default
STEPS = 12  # of a job

Window = tuple[float, float]  # seconds of time.perf_counter


@dataclass(frozen=True)
class Job:
    """When it was asked for, when each of its steps ended, and when it ended, in seconds of time.perf_counter."""

    began: float
    steps: list[float]
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def step(self) -> float:
        """Seconds from one step to the next, streams' turns included."""
        return (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1)

    @property
    def phases(self) -> dict[str, Window]:
        return {
            "prepares": (self.began, self.steps[0]),
            "trains": (self.steps[0], self.steps[-1]),
            "is examined": (self.steps[-1], self.ended),
        }


@dataclass(frozen=True)
class Figures:
    """Of all streams within a window. rate: tokens a second; first: seconds from each request to its first token;
    gaps: seconds from piece to piece."""

    rate: float
    first: list[float]
    gaps: list[float]


def figures(replies: list[Heard], window: Window) -> Figures:
    began, ended = window
    tokens, first, gaps = 0.0, [], []
    for reply in replies:
        within = [at for at in reply.times if began <= at < ended]
        tokens += reply.tokens * len(within) / len(reply.times)
        if began <= reply.sent < ended:
            first.append(reply.times[0] - reply.sent)
        gaps += [after - before for before, after in itertools.pairwise(reply.times) if began <= after < ended]
    return Figures(tokens / (ended - began), first, gaps)


@contextmanager
def streams(port: int, base: str, numbers: Iterator[int]) -> Iterator[list[Heard]]:
    """STREAMS clients that ask until the end of the block; the list then holds every reply."""
    heard: list[Heard] = []
    over = threading.Event()

    def ask(place: int) -> None:
        while not over.is_set():
            heard.append(hear(port, base, Ask(story(next(numbers), place), TOKENS)))

    with ThreadPoolExecutor(STREAMS) as pool:
        clients = [pool.submit(ask, place) for place in range(STREAMS)]
        try:
            yield heard
        finally:
            over.set()
    for client in clients:
        client.result()


def teach(client: Client, bound: int, steps: int) -> Job:
    training = {"max_steps": steps, "micro_step_tokens": bound, "escalation_rounds": 0}
    examples: list[Json] = json.loads(ROWS.read_text())
    began = time.perf_counter()
    job, seconds = run_job(
        client, {"adapter_name": "bench", "dataset": {"examples": examples}, "training_config": training}
    )
    if job["adapter"] is None:
        sys.exit(f"the job published nothing: {job['error']['message']}")
    clock = time.perf_counter() - time.time()  # events have the time of day
    events = client.events(job["job_id"])
    ends = [event["created_at"] + clock for event in events if event["type"] == "step"]
    return Job(began, ends, began + seconds)


def show_streams(found: dict[str, Figures]) -> Table:
    columns = ("tokens/s", "first token, ms: median", "p95", "next token, ms: median", "p95", "longest")
    table = Table(f"{STREAMS} streams", *columns, box=MARKDOWN)
    for name, one in found.items():
        times = [
            statistics.median(one.first),
            p95(one.first),
            statistics.median(one.gaps),
            p95(one.gaps),
            max(one.gaps),
        ]
        table.add_row(name, f"{one.rate:.0f}", *(f"{1000 * seconds:.0f}" for seconds in times))
    return table


def show_jobs(jobs: dict[int, tuple[Job, Job]]) -> Table:
    """jobs: (alone, beside the streams) by micro_step_tokens."""
    columns = ("s a step alone", "beside", "times", "s in all alone", "beside", "times")
    table = Table("micro_step_tokens", *columns, box=MARKDOWN)
    for bound, (alone, beside) in jobs.items():
        cells = [
            *(f"{alone.step:.2f}", f"{beside.step:.2f}", f"{beside.step / alone.step:.2f}"),
            *(f"{alone.seconds:.0f}", f"{beside.seconds:.0f}", f"{beside.seconds / alone.seconds:.2f}"),
        ]
        table.add_row(str(bound), *cells)
    return table


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def main(bounds: tuple[int, ...], steps: int, seconds: float) -> None:
    console = Console(width=160)
    numbers = itertools.count()  # no story is asked for twice
    found: dict[str, Figures] = {}
    jobs: dict[int, tuple[Job, Job]] = {}
    with server() as (settings, client):
        run_job(client, {"adapter_name": "warm", **JOB})
        began = time.perf_counter()
        with streams(settings.port, settings.default_model, numbers) as replies:
            time.sleep(seconds)
        found["alone"] = figures(replies, (began, began + seconds))
        for bound in bounds:
            alone = teach(client, bound, steps)
            with streams(settings.port, settings.default_model, numbers) as replies:
                beside = teach(client, bound, steps)
            jobs[bound] = alone, beside
            for phase, window in beside.phases.items():
                found[f"while a job in micro-steps of {bound} tokens {phase}"] = figures(replies, window)
            console.print(f"micro-steps of {bound} tokens: done", style="dim")
    console.print(f"{TOKENS} tokens a reply, greedy; {steps} steps a job")
    console.print(show_streams(found))
    console.print(show_jobs(jobs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.coserving")
    parser.add_argument("--quick", action="store_true", help="the default only, four steps")
    if parser.parse_args().quick:
        main(BOUNDS[:1], 4, 5)
    else:
        main(BOUNDS, STEPS, SECONDS)

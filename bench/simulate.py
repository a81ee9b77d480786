"""What one node serves: predicted by simulation, and measured on this machine with the same requests.

    python -m bench.simulate                                        # measure, predict, serve for real, compare
    python -m bench.simulate --costs costs.json --predict --adapters 1000 --rate 20

The costs of steps are measured with the engine that serves, before and after the real run; the prediction takes the
mean of both. --costs names a file in which they are kept. The real run goes through the registry and the engine,
without HTTP.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench import adapters
from bench.serving import home
from bench.simulator import (
    Arrival,
    Figures,
    MeasuredCosts,
    Node,
    Outcome,
    Workload,
    arrivals,
    drift,
    figures,
    mean,
    simulate,
)
from fortwo.errors import NotFound, Unavailable
from fortwo.prompts import Delta, Prompt, Sampling
from fortwo.server.state import AppState

if TYPE_CHECKING:
    from fortwo.engine.registry import Target

ROWS = (1, 2, 4, 8, 16, 32)  # that decode together
TOKENS = (16, 64, 256, 1024)  # of prompts that are computed together
STEPS = 12  # that a measured reply takes together with the others
REPEATS = 3


@contextmanager
def node(count: int, max_adapters: int) -> Iterator[tuple[AppState, list[str]]]:
    """An engine with the default base, and the names of `count` published adapters."""
    from fortwo.engine.adapter_import import import_adapter

    with home() as (settings, _):
        state = AppState(settings.model_copy(update={"max_adapters": max_adapters}))
        try:
            base = state.registry.load_base(settings.default_model)
            config = settings.models_dir / base.id / "config.json"
            names = []
            for folder in adapters.write(settings.home / "made", count, base.id, config):
                import_adapter(folder.name, folder, state.catalog, state.adapters, state.registry)
                names.append(folder.name)
            yield state, names
        finally:
            state.close()


class Client:
    """Sends requests to the engine as the server does. Prompts are random, so that no prefix is found again."""

    def __init__(self, state: AppState, names: list[str]) -> None:
        self._state = state
        self._names = names
        self._random = random.Random(0)
        self._began = time.perf_counter()
        self._ended = threading.Semaphore(0)

    def send(self, arrival: Arrival) -> Outcome:
        """Send it now. Its outcome fills up; `wait` says when it is complete."""
        outcome = Outcome(arrival)
        try:
            target = self._target(arrival)
        except Unavailable as error:
            outcome.refused = error.message
            self._ended.release()
            return outcome
        vocabulary = target.model.decoder.config.vocabulary
        tokens = tuple(self._random.randrange(vocabulary) for _ in range(arrival.prompt))
        sampling = Sampling(max_tokens=arrival.reply, ignore_eos=True, logprobs=0)  # with them, each token is reported

        def on_delta(delta: Delta) -> None:
            outcome.tokens += [time.perf_counter() - self._began] * len(delta.logprobs)
            if delta.finish_reason is not None:
                self._ended.release()

        self._state.engine.submit(Prompt(target.model.id, tokens, target.adapter_key, sampling), on_delta)
        self._state.registry.unpin(target)
        return outcome

    def wait(self, count: int) -> None:
        for _ in range(count):
            self._ended.acquire()

    def _target(self, arrival: Arrival) -> Target:
        registry = self._state.registry
        name = self._state.settings.default_model if arrival.adapter is None else self._names[arrival.adapter]
        while not registry.pin(target := registry.resolve(name)):
            pass  # it was unloaded meanwhile
        return target

    def is_loaded(self, arrival: Arrival) -> bool:
        return arrival.adapter is None or self._state.registry.find(self._names[arrival.adapter]) is not None

    def unload(self) -> None:
        """Drop all adapters from memory: a simulation begins without any."""
        for name in self._names:
            with suppress(NotFound):  # it is not in memory
                self._state.registry.unload_adapter(name)

    def play(self, requests: list[Arrival]) -> list[Outcome]:
        """Send each when it is due, beginning without an adapter in memory; one thread loads them, as the server's
        does."""
        self.unload()
        self._began = time.perf_counter()
        sent: list[Outcome | Future[Outcome]] = []
        with ThreadPoolExecutor(1) as loader:
            for arrival in requests:
                time.sleep(max(0.0, self._began + arrival.at - time.perf_counter()))
                if self.is_loaded(arrival):
                    sent.append(self.send(arrival))
                else:
                    sent.append(loader.submit(self.send, arrival))
            outcomes = [one if isinstance(one, Outcome) else one.result() for one in sent]
        self.wait(len(outcomes))
        return outcomes


def measure(state: AppState, names: list[str], length: int, max_adapters: int) -> MeasuredCosts:
    """Costs of this machine. length: tokens of the prompts behind which steps are measured."""
    client = Client(state, names)
    used = list(range(min(len(names), max_adapters)))
    for number in used:  # in memory, and everything warm
        client.send(Arrival(0, 16, 2, number))
        client.wait(1)

    def adapter(row: int) -> int | None:
        return used[row % len(used)] if used else None

    def step(rows: int) -> float:
        tokens = STEPS + 2 * rows  # the first row has not ended yet when the last one begins
        outcomes = [client.send(Arrival(0, length, tokens, adapter(row))) for row in range(rows)]
        client.wait(rows)
        began = max(one.tokens[0] for one in outcomes)
        together = min(one.tokens[-1] for one in outcomes)
        steps = min(sum(began < token <= together for token in one.tokens) for one in outcomes)
        return (together - began) / steps

    def prompts(tokens: int) -> float:
        began = time.perf_counter()
        client.send(Arrival(0, tokens, 1, adapter(0)))
        client.wait(1)
        return time.perf_counter() - began

    decode = {rows: statistics.median(step(rows) for _ in range(REPEATS)) for rows in ROWS}
    prefill = {tokens: statistics.median(prompts(tokens) for _ in range(REPEATS)) for tokens in TOKENS}
    load, check = _adapter_seconds(state, names)
    return MeasuredCosts(decode, prefill, load, check)


def _adapter_seconds(state: AppState, names: list[str]) -> tuple[float, float]:
    """Seconds to load an adapter, and how long it holds the device meanwhile."""
    from fortwo.engine.adapter_check import measure_effect
    from fortwo.nn.lora import Lora
    from fortwo.nn.lora_config import LoraConfig

    if not names:
        return 0.0, 0.0
    registry = state.registry
    base = registry.load_base(state.settings.default_model)
    loads, checks = [], []
    for name in names[:REPEATS]:
        registry.load_adapter(name)
        registry.unload_adapter(name)
        began = time.perf_counter()
        registry.load_adapter(name)
        loads.append(time.perf_counter() - began)
        version, config, tensors = state.adapters.read(name)
        assert version.name == name
        lora = Lora.from_state(LoraConfig.from_peft(config, []), base.decoder.config, tensors)
        began = time.perf_counter()
        state.engine.call(lambda lora=lora: measure_effect(base.backend, base.renderer, lora)).result()  # type: ignore[misc]
        checks.append(time.perf_counter() - began)
    return statistics.median(loads), statistics.median(checks)


def read(file: Path) -> MeasuredCosts:
    found = json.loads(file.read_text())
    for name in ("decode_seconds", "prefill_seconds"):
        found[name] = {int(place): seconds for place, seconds in found[name].items()}
    return MeasuredCosts(**found)


def show(predicted: Figures, measured: Figures | None) -> Table:
    table = Table(box=MARKDOWN)
    for column in ("", "predicted", "measured", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    for name, take in (
        ("tokens per second", lambda figure: figure.throughput),
        ("first token, median (s)", lambda figure: figure.first[0]),
        ("first token, 95 % (s)", lambda figure: figure.first[1]),
        ("each further token, median (s)", lambda figure: figure.each[0]),
        ("each further token, 95 % (s)", lambda figure: figure.each[1]),
        ("refused", lambda figure: float(figure.refused)),
    ):
        wanted, found = take(predicted), None if measured is None else take(measured)
        apart = "" if not found else f"{(wanted - found) / found:+.0%}"
        table.add_row(name, f"{wanted:.3f}", "" if found is None else f"{found:.3f}", apart)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.5, help="requests per second")
    parser.add_argument("--seconds", type=float, default=60, help="for how long they arrive")
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 128), metavar=("FEWEST", "MOST"))
    parser.add_argument("--reply", type=int, nargs=2, default=(8, 48), metavar=("FEWEST", "MOST"))
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=1.0, help="exponent of the adapters' popularity")
    parser.add_argument("--max-adapters", type=int, default=8, help="in memory at once")
    parser.add_argument("--costs", type=Path, help="file of measured costs: written, and with --predict read")
    parser.add_argument("--predict", action="store_true", help="do not serve for real")
    given = parser.parse_args()
    if given.predict and (given.costs is None or not given.costs.exists()):
        parser.error("--predict needs --costs with a file of an earlier run")
    workload = Workload(given.rate, given.seconds, tuple(given.prompt), tuple(given.reply), given.adapters, given.alpha)
    requests = arrivals(workload)
    screen = Console(width=120)
    measured = None
    if given.predict:
        costs = read(given.costs)
    else:
        with node(given.adapters, given.max_adapters) as (state, names):
            length = sum(workload.prompt) // 2
            before = measure(state, names, length, given.max_adapters)
            measured = figures(Client(state, names).play(requests))
            after = measure(state, names, length, given.max_adapters)
        costs = mean(before, after)
        screen.print(f"Steps took {drift(before, after):.2f} times as long after the run as before it.")
        if given.costs is not None:
            given.costs.write_text(json.dumps(asdict(costs), indent=2) + "\n")
    predicted = figures(simulate(requests, Node(costs, given.max_adapters)))
    screen.print(f"{len(requests)} requests in {workload.seconds:g} s", show(predicted, measured))


if __name__ == "__main__":
    main()

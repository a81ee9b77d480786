"""Serving: fortwo against transformers, PEFT, vLLM and llama.cpp on the bundled model, in one run.

    python -m bench.serve [--quick] [--threads N] [--only KIND ...]

All are up for the whole run and take turns in every round; who is not asked is stopped, lest it spins as it waits.
Adapters are random, of rank 16 on all seven projections, the same files for everybody. Replies are greedy and exactly
as long as asked. Servers are asked by one client over HTTP, libraries in a process of their own. A peer that cannot be
installed, or fails, is named with its reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench import adapters, lineup, workloads
from bench.peers import Peer, Server
from bench.serving import home, run_job
from bench.streams import Ask, Broken
from bench.workloads import ADAPTERS, Workload
from fortwo.cli.client import Client
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.errors import FortwoError
from fortwo.hub.catalog import Catalog
from fortwo.records import Json

LOADS = 5  # adapters that are loaded again
WARM_UP = 10**6  # a round that is not counted
LOAD = "loading an adapter from disk"
PUBLISHED = "first token of an adapter just published, less a warm one's"
LIMITS = {f"{lineup.OWN}: {LOAD}": 0.1, f"{lineup.OWN}: {PUBLISHED}": 0.05}  # seconds
JOB: Json = {  # the shortest that publishes
    "dataset": {"examples": [{"instruction": f"Name thing {number}.", "output": "A thing."} for number in range(4)]},
    "objective": "sft",
    "training_config": {"max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-3},
}


class Run:
    """What was measured so far, and who has dropped out of what."""

    def __init__(self, console: Console) -> None:
        self.alive: list[Peer] = []
        self.figures: dict[tuple[str, str], list[float]] = {}  # by workload and peer, one a round
        self.lost: dict[tuple[str, str], str] = {}  # by what and peer: why
        self._console = console

    def start(self, peer: Peer) -> None:
        try:
            peer.start()
        except Broken as error:
            self.drop("start", peer, error)
        else:
            peer.process.pause()
            self.alive.append(peer)
            self._console.print(f"{peer.name} is up", style="dim")

    def drop(self, what: str, peer: Peer, error: Exception) -> None:
        """Not asked for this again, nor for anything when its process has ended."""
        self.lost[what, peer.name] = str(error)
        self._console.print(f"{peer.name}: {what}: {error}", style="red", markup=False, soft_wrap=True)
        if not peer.process.running:
            self.alive = [other for other in self.alive if other is not peer]

    def measure(self, workload: Workload, number: int) -> None:
        """Everybody's turn at a workload."""
        for peer in list(self.alive):
            asked = peer.name == lineup.OWN or lineup.kind(peer.name) in workload.peers
            if not asked or (workload.name, peer.name) in self.lost:
                continue
            peer.process.go_on()
            try:
                timing = peer.generate(workload.asks(number))
            except Broken as error:
                self.drop(workload.name, peer, error)
                continue
            finally:
                peer.process.pause()
            if number != WARM_UP:
                self.figures.setdefault((workload.name, peer.name), []).append(workload.figure(timing))

    def own(self, workload: Workload) -> list[float]:
        return self.figures.get((workload.name, lineup.OWN), [])


def loading(peer: Server, found: list[Path]) -> dict[str, list[float]]:
    """Seconds to take up adapters that were let go before, and to their first token; files are in the page cache."""
    loads, firsts, more = [], [], []
    for number, path in enumerate(found[:LOADS]):
        if peer.name == lineup.OWN:
            peer.post(f"/api/adapters/{path.name}/unload", {})
            loads.append(peer.post(f"/api/adapters/{path.name}/load", {}))
        else:
            peer.post("/v1/unload_lora_adapter", {"lora_name": path.name})
            loads.append(peer.post("/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)}))
        first, warm = _first(peer, path.name, 100 * number)
        firsts.append(first)
        more.append(first - warm)
    return {
        LOAD: loads,
        "first token of an adapter just loaded": firsts,
        "first token of an adapter just loaded, less a warm one's": more,
    }


def publishing(peer: Server, client: Client, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token of an adapter whose job has ended this moment."""
    firsts, more = [], []
    for number in range(rounds):
        job, _ = run_job(client, {"adapter_name": f"fresh{number}", **JOB}, every=0.02)
        if job["adapter"] is None:
            raise Broken(f"a job published nothing: {job['error']['message']}")
        first, warm = _first(peer, f"{job['adapter']['name']}@{job['adapter']['version']}", 10_000 + 100 * number)
        firsts.append(first)
        more.append(first - warm)
    return {"first token of an adapter just published": firsts, PUBLISHED: more}


def _first(peer: Server, adapter: str, number: int) -> tuple[float, float]:
    """Seconds to the first token of a short request: of the first one, and the median of the next."""
    first, *warm = (
        peer.generate([Ask(workloads.story(WARM_UP + number + turn), 1, adapter)]).first for turn in range(4)
    )
    return first, statistics.median(warm)


def speeds(run: Run, chosen: list[Workload], names: list[str]) -> Table:
    table = Table("workload", "peer", "tokens/s", "spread", "fortwo's times", "target", box=MARKDOWN)
    for workload in chosen:
        own = run.own(workload)
        for name in names:
            values = run.figures.get((workload.name, name))
            if values is None:
                continue
            times = statistics.median(own) / statistics.median(values) if own and name != lineup.OWN else None
            target = workload.peers.get(lineup.kind(name))
            table.add_row(
                workload.name,
                name,
                f"{statistics.median(values):.3g}",
                _spread(values),
                "" if times is None else f"{times:.2f}",
                "" if target is None or times is None else _verdict(f"{target:g}", times >= target),
            )
    return table


def others(
    one: list[float], many: list[float], memory: dict[str, tuple[int, int]], times: dict[str, list[float]]
) -> Table:
    """What many adapters cost. memory: (RSS, PSS) in bytes by peer; times: seconds by what was done."""
    table = Table("", "measured", "spread", "target", box=MARKDOWN)
    if one and many:
        share = statistics.median(many) / statistics.median(one)
        shares = [a / b for a, b in zip(many, one, strict=True)]
        what = f"fortwo: tokens/s of {workloads.STREAMS} streams on {ADAPTERS} adapters, over those on one"
        table.add_row(what, f"{share:.2f}", _spread(shares), _verdict("at least 0.7", share >= 0.7))
    least = min((rss for name, (rss, _) in memory.items() if lineup.kind(name) == "vLLM"), default=None)
    for name, (rss, pss) in memory.items():
        target = "" if name != lineup.OWN or least is None else _verdict("less than vLLM's", rss < least)
        what = f"{name}: resident at the end (shared pages counted once)"
        table.add_row(what, f"{rss / 2**20:.0f} MiB ({pss / 2**20:.0f})", "", target)
    for what, seconds in times.items():
        median, limit = statistics.median(seconds), LIMITS.get(what)
        target = "" if limit is None else _verdict(f"at most {1000 * limit:g} ms", median <= limit)
        table.add_row(what, f"{1000 * median:.0f} ms", _spread([1000 * one for one in seconds]), target)
    return table


def _spread(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _verdict(target: str, met: bool) -> str:
    return f"{target}, {'met' if met else 'missed'}"


def main(quick: bool, threads: int, only: list[str]) -> None:
    console = Console(width=160)
    rounds = 2 if quick else 5
    with ExitStack() as stack:
        settings, environment = stack.enter_context(home())
        base = settings.default_model
        directory = Catalog(settings.models_dir).prepare(base)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fortwo-bench-adapters-")))
        found = adapters.write(folder, ADAPTERS, base, directory / "config.json")
        own = lineup.own(base, settings.port, environment, threads, folder)
        peers: list[Peer] = [own, *lineup.others(base, directory, threads, found)]
        peers = [peer for peer in peers if not only or lineup.kind(peer.name) in only or peer is own]
        run = Run(console)
        for peer in peers:
            stack.callback(peer.process.stop)
            run.start(peer)
        own.process.go_on()
        try:
            for path in found if own in run.alive else []:
                own.post("/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)})
        except Broken as error:
            run.drop("loading the adapters", own, error)
        times: dict[str, list[float]] = {}

        against = workloads.against_peers(ChatTemplateRenderer(directory), quick)
        scale = [workloads.one_adapter(quick), workloads.all_adapters(quick)]
        for number in [WARM_UP, *range(rounds)]:
            for workload in [*against, *scale]:
                run.measure(workload, number)
            console.print("warm" if number == WARM_UP else f"round {number + 1}/{rounds}", style="dim")
        memory = {peer.name: peer.process.memory() for peer in run.alive}

        for peer in run.alive:
            if isinstance(peer, Server) and lineup.kind(peer.name) in (lineup.OWN, "vLLM"):
                peer.process.go_on()
                try:
                    times |= {f"{peer.name}: {what}": seconds for what, seconds in loading(peer, found).items()}
                except Broken as error:
                    run.drop("loading an adapter", peer, error)
                peer.process.pause()
        if own in run.alive:
            own.process.go_on()
            try:
                measured = publishing(own, Client(settings.url, settings.plain_api_key), rounds)
                times |= {f"{own.name}: {what}": seconds for what, seconds in measured.items()}
            except (Broken, FortwoError) as error:
                run.drop("an adapter just published", own, error)

    console.print(f"{threads} threads for everybody; medians and spread of {rounds} rounds; greedy, lengths forced")
    console.print(speeds(run, against, [peer.name for peer in peers]))
    console.print(others(run.own(scale[0]), run.own(scale[1]), memory, times))
    for (what, name), why in run.lost.items():
        console.print(f"Not measured: {name}: {what}: {why}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.serve")
    parser.add_argument("--quick", action="store_true", help="two rounds and half the tokens")
    parser.add_argument("--threads", type=int, default=lineup.cores(), help="of everybody; default: all cores")
    parser.add_argument("--only", nargs="*", default=[], help="transformers, PEFT, vLLM, llama.cpp; default: all")
    given = parser.parse_args()
    main(given.quick, given.threads, given.only)

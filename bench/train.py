"""Training: fortwo against TRL's SFTTrainer with PEFT, on the same rows with the same configuration.

    python -m bench.train PEER_PYTHON [--quick]

Speed at several batch sizes, each trainer's best among them, and the most memory that was resident in the process that
trains, loading included, evaluation not. Every run has a process of its own, its first steps are left out, and the
trainers take turns at each size. fortwo trains through its server, as a user's job does: in fp32, and with the
precision its plan chooses; the peer in fp32 and in bf16. Tokens are those of the rendered rows, the same for all; a
trainer that computes fewer gains by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.serving import home, peak, started
from fortwo.cli.client import Client
from fortwo.hub.catalog import Catalog
from fortwo.records import Json
from fortwo.settings import Settings

ROWS = Path("examples/42_intensive_training.json")
CONFIG = Path("examples/intensive_training_config.json")
BATCHES = (1, 4, 8, 20)
EXAMPLES, STEPS = 24, 3  # of a run, at least
WARM_UP = 2  # steps left out at the start of each run
PEERS = {"TRL + PEFT, fp32": "fp32", "TRL + PEFT, bf16": "bf16"}
OWN: dict[str, Json] = {"fortwo, fp32": {"bf16": False}, "fortwo, as planned": {}}
JUDGED = "fortwo, as planned"


@dataclass(frozen=True)
class Run:
    """seconds: of each step; peak: bytes that were resident at most in the process that trained."""

    seconds: list[float]
    peak: int


Found = dict[str, dict[int, Run]]  # by trainer and batch


def peer_run(python: str, base: Path, batch: int, steps: int, precision: str) -> tuple[Run, float]:
    """(what was measured, mean tokens of a row) of one run of bench/peer_trl.py."""
    arguments = [python, "bench/peer_trl.py", base, ROWS, CONFIG, batch, steps, precision]
    done = subprocess.run([str(one) for one in arguments], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Run(found["seconds"], found["peak_bytes"]), found["row_tokens"]


def own_run(settings: Settings, environment: dict[str, str], model: str, changed: Json, steps: int) -> tuple[Run, Json]:
    """(what was measured, the plan) of one job of a server of its own. changed: in the original's training_config. The
    job is cancelled a step before its last, so that it is not evaluated."""
    config = json.loads(CONFIG.read_text())
    config["training_config"] |= {"max_steps": steps + 1, **changed}
    rows = {"examples": json.loads(ROWS.read_text())}
    request = {"model": model, "adapter_name": "bench", "dataset": rows, "objective": "sft", **config}
    with started(settings, environment) as (process, client):
        job = client.post("/api/training/start", request)
        seconds = _seconds(client, job["job_id"], steps)
        most = peak(process.pid)
        client.post(f"/api/training/jobs/{job['job_id']}/cancel")
    return Run(seconds, most), job["plan"]


def _seconds(client: Client, job_id: str, steps: int) -> list[float]:
    seconds: list[float] = []
    for event in client.events(job_id):
        if event["type"] == "step":
            seconds.append(event["data"]["seconds"])
        if len(seconds) == steps:
            return seconds
    sys.exit(f"{len(seconds)} of {steps} steps: {client.get(f'/api/training/jobs/{job_id}')['error']}")


def steps_of(batch: int) -> int:
    return WARM_UP + max(STEPS, -(-EXAMPLES // batch))


def rate(run: Run, batch: int) -> float:
    """Examples a second, of the median step."""
    return batch / statistics.median(run.seconds[WARM_UP:])


def best(runs: Mapping[int, Run]) -> int:
    """The batch with the most examples a second."""
    return max(runs, key=lambda batch: rate(runs[batch], batch))


def show(found: Found, row_tokens: float) -> Table:
    table = Table("", "batch", "examples/s", "tokens/s", "slowest and fastest step", "peak GB", *PEERS, box=MARKDOWN)
    for batch in found[JUDGED]:
        for name, runs in found.items():
            run, own = runs[batch], rate(runs[batch], batch)
            counted = run.seconds[WARM_UP:]
            table.add_row(
                name,
                str(batch),
                f"{own:.2f}",
                f"{own * row_tokens:.0f}",
                f"{batch * row_tokens / max(counted):.0f} to {batch * row_tokens / min(counted):.0f}",
                f"{run.peak / 1e9:.2f}",
                *(f"{own / rate(found[peer][batch], batch):.2f}" for peer in PEERS),
            )
    return table


def verdicts(found: Found) -> list[str]:
    """The job as planned against the peer in whichever precision is the faster, or takes the least memory."""
    lines = []
    alone, bests = dict.fromkeys(found, 1), {name: best(runs) for name, runs in found.items()}
    for what, batches, target in (("batch 1", alone, 6), ("each at its best batch", bests, 4)):
        rates = {name: rate(found[name][batch], batch) for name, batch in batches.items()}
        peer = max(PEERS, key=rates.__getitem__)
        times = rates[JUDGED] / rates[peer]
        sides = " against ".join(f"{name} at {batches[name]}, {rates[name]:.2f} examples/s" for name in (JUDGED, peer))
        lines.append(f"{what}: {times:.2f} times ({sides}); target {target}: {_met(times >= target)}")
    least = min(PEERS, key=lambda peer: found[peer][1].peak)
    own, peers = found[JUDGED][1].peak, found[least][1].peak
    lines.append(f"peak at batch 1: {own / 1e9:.2f} GB, {least} {peers / 1e9:.2f} GB; target less: {_met(own < peers)}")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "missed"


def main(python: str, batches: tuple[int, ...]) -> None:
    console = Console(width=160)
    found: Found = {name: {} for name in (*PEERS, *OWN)}
    with home() as (settings, environment):
        directory = Catalog(settings.models_dir).prepare(settings.default_model)
        for batch in batches:
            steps = steps_of(batch)
            for name, precision in PEERS.items():
                found[name][batch], row_tokens = peer_run(python, directory, batch, steps, precision)
            for name, setting in OWN.items():
                changed = {"per_device_train_batch_size": batch, **setting}
                found[name][batch], _ = own_run(settings, environment, settings.default_model, changed, steps)
            console.print(f"batch {batch} is done", style="dim")
    counted = ", ".join(str(steps_of(batch) - WARM_UP) for batch in batches)
    console.print(f"{row_tokens:.1f} tokens a row; medians of {counted} steps")
    console.print(show(found, row_tokens))
    for line in verdicts(found):
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.train")
    parser.add_argument("python", help="of an environment with TRL and PEFT")
    parser.add_argument("--quick", action="store_true", help="batches of 1 and 8 only")
    given = parser.parse_args()
    main(given.python, (1, 8) if given.quick else BATCHES)

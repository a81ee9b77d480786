"""Training speed: fortwo against TRL's SFTTrainer with PEFT, on the same rows with the same configuration.

    python -m bench.train PEER_PYTHON [BATCH]

The two take turns; each turn is a fresh run, and its first steps are left out. fortwo trains through its server, as a
user's job does: in fp32, and with the precision its plan chooses; the peer in fp32 and in bf16. Tokens are those of the
rendered rows, the same for all; a trainer that computes fewer gains by it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.serving import run_job, server
from fortwo.cli.client import Client
from fortwo.models.catalog import Catalog
from fortwo.records import Json

ROWS = Path("examples/42_intensive_training.json")
CONFIG = Path("examples/intensive_training_config.json")
ROUNDS = 3
STEPS = 40
WARM_UP = 5  # steps left out at the start of each run
PEERS = {"TRL + PEFT, fp32": "fp32", "TRL + PEFT, bf16": "bf16"}
OWN: dict[str, Json] = {"fortwo, fp32": {"bf16": False}, "fortwo, as planned": {}}


def peer_steps(python: str, directory: Path, batch: int, precision: str) -> tuple[list[float], float]:
    """(seconds of each step, mean tokens of a row) of one run of the peer."""
    arguments = [python, "bench/peer_trl.py", directory, ROWS, CONFIG, batch, STEPS, precision]
    done = subprocess.run([str(one) for one in arguments], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"][WARM_UP:], found["row_tokens"]


def own_steps(client: Client, batch: int, precision: Json) -> list[float]:
    """Seconds of each step of one run of fortwo."""
    config = json.loads(CONFIG.read_text())
    config["training_config"] |= {"max_steps": STEPS, "per_device_train_batch_size": batch, **precision}
    rows = {"examples": json.loads(ROWS.read_text())}
    job, _ = run_job(client, {"adapter_name": "bench", "dataset": rows, "objective": "sft", **config})
    steps = [event["data"] for event in client.events(job["job_id"]) if event["type"] == "step"]
    if len(steps) != STEPS:
        sys.exit(f"{len(steps)} of {STEPS} steps: {job['error']}")
    return [step["seconds"] for step in steps][WARM_UP:]


def main(python: str, batch: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in (*PEERS, *OWN)}
    console = Console()
    with server() as (settings, client):
        directory = Catalog(settings).prepare(settings.default_model)
        for turn in range(ROUNDS):
            for name, precision in PEERS.items():
                seconds, row_tokens = peer_steps(python, directory, batch, precision)
                found[name] += seconds
            for name, setting in OWN.items():
                found[name] += own_steps(client, batch, setting)
            console.print(f"round {turn + 1}/{ROUNDS}", style="dim")
    tokens = row_tokens * batch
    table = Table("", "steps/s", "tokens/s", "slowest and fastest tenth", *PEERS, box=None, header_style="bold")
    for name, seconds in found.items():
        median, tenths = statistics.median(seconds), statistics.quantiles(seconds, n=10)
        spread = f"{tokens / tenths[-1]:.0f} to {tokens / tenths[0]:.0f}"
        times = [f"{statistics.median(found[peer]) / median:.2f}" for peer in PEERS]
        table.add_row(name, f"{1 / median:.2f}", f"{tokens / median:.0f}", spread, *times)
    console.print(f"batch {batch}, {row_tokens:.1f} tokens a row, {STEPS - WARM_UP} steps in each of {ROUNDS} rounds")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)

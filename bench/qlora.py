"""Training on a base of CodeLlama-7B's shape held in NF4: seconds a step and peak memory.

    python -m bench.qlora [--layers N] [--steps N] [--peer PYTHON]

The base's weights are random (bench/random_base.py, 13.5 GB in the temporary folder, gone at the end); rows and
configuration are the original's. fortwo trains through its server, as a user's job does; PYTHON has TRL, PEFT and
bitsandbytes. Memory is the most that was resident in the process that trains, loading included, evaluation not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import random_base
from bench.serving import started
from bench.train import CONFIG, ROWS
from fortwo.cli.client import Client
from fortwo.models.catalog import Catalog
from fortwo.records import Json
from fortwo.settings import load
from scripts.readme import free_port

BASE = "codellama-7b-shape"


def own_steps(base: Path, steps: int) -> tuple[list[float], int, Json]:
    """(seconds of each step, peak bytes of the server, the job's plan). The job is cancelled a step before its last, so
    that it is not evaluated: a random base has nothing to say."""
    with tempfile.TemporaryDirectory(prefix="fortwo-bench-") as folder:
        settings = load(home=Path(folder), host="127.0.0.1", port=free_port())
        Catalog(settings).add(BASE, base)
        environment = {"FORTWO_HOME": folder, "FORTWO_PORT": str(settings.port), "FORTWO_WEIGHTS": "nf4"}
        with started(settings, os.environ | environment) as (process, client):
            job = client.post("/api/training/start", _request(steps))
            seconds = _seconds(client, job["job_id"], steps)
            peak = _peak(process.pid)
            client.post(f"/api/training/jobs/{job['job_id']}/cancel")
            return seconds, peak, job["plan"]


def _request(steps: int) -> Json:
    config = json.loads(CONFIG.read_text())
    config["training_config"] |= {"max_steps": steps + 1, "warmup_steps": 0}
    rows = {"examples": json.loads(ROWS.read_text())}
    return {"model": BASE, "adapter_name": "bench", "dataset": rows, "objective": "sft", **config}


def _seconds(client: Client, job_id: str, steps: int) -> list[float]:
    seconds: list[float] = []
    for event in client.events(job_id):
        if event["type"] == "step":
            seconds.append(event["data"]["seconds"])
        if len(seconds) == steps:
            return seconds
    sys.exit(f"{len(seconds)} of {steps} steps: {client.get(f'/api/training/jobs/{job_id}')['error']}")


def _peak(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peer_steps(python: str, base: Path, steps: int) -> tuple[list[float], int]:
    """As own_steps."""
    arguments = [python, "bench/peer_trl.py", base, ROWS, CONFIG, 1, steps, "nf4"]
    done = subprocess.run([str(one) for one in arguments], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["peak_bytes"]


def main(layers: int, steps: int, peer: str | None) -> None:
    own = load()
    tokenizer = Catalog(own).prepare(own.default_model)
    table = Table("", "seconds a step", "all steps", "peak GB", box=None, header_style="bold")

    def add(name: str, seconds: list[float], peak: int) -> None:
        each = " ".join(f"{one:.1f}" for one in seconds)
        table.add_row(name, f"{statistics.median(seconds):.1f}", each, f"{peak / 1e9:.2f}")

    with tempfile.TemporaryDirectory(prefix="fortwo-bench-base-") as folder:
        base = random_base.make(Path(folder), tokenizer, layers)
        seconds, peak, plan = own_steps(base, steps)
        add("fortwo, nf4", seconds, peak)
        if peer is not None:
            add("TRL + PEFT + bitsandbytes, nf4", *peer_steps(peer, base, steps))
    console = Console()
    computed = plan["computed"]
    console.print(f"{layers} layers, {computed['row_tokens']['mean']} tokens a row, batch 1, {steps} steps")
    console.print(table)
    console.print(
        f"the plan's estimate of memory: {computed['bytes'] / 1e9:.2f} GB, {computed['bytes'] / peak - 1:+.0%}"
    )
    for setting in plan["settings"]:
        if setting["name"] in ("bf16", "gradient_checkpointing"):
            console.print(f"{setting['name']} {setting['value']} ({setting['origin']}): {setting['reason']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=random_base.LAYERS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peer", metavar="PYTHON")
    given = parser.parse_args()
    main(given.layers, given.steps, given.peer)

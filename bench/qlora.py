"""Training on a base of CodeLlama-7B's shape held in NF4: seconds a step and peak memory.

    python -m bench.qlora [--layers N] [--steps N] [--peer PYTHON]

The base's weights are random (bench/random_base.py, 13.5 GB in the temporary folder, gone at the end); rows and
configuration are the original's. fortwo trains through its server, as a user's job does; PYTHON has TRL, PEFT and
bitsandbytes. Memory is the most that was resident in the process that trains, loading included, evaluation not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import random_base
from bench.train import Run, own_run, peer_run
from fortwo.hub.catalog import Catalog
from fortwo.settings import load
from scripts.readme import free_port

BASE = "codellama-7b-shape"


def main(layers: int, steps: int, peer: str | None) -> None:
    own = load()
    tokenizer = Catalog(own.models_dir).prepare(own.default_model)
    table = Table("", "seconds a step", "all steps", "peak GB", box=None, header_style="bold")

    def add(name: str, run: Run) -> None:
        each = " ".join(f"{one:.1f}" for one in run.seconds)
        table.add_row(name, f"{statistics.median(run.seconds):.1f}", each, f"{run.peak / 1e9:.2f}")

    with tempfile.TemporaryDirectory(prefix="fortwo-bench-base-") as folder:
        base, home = random_base.make(Path(folder), tokenizer, layers), Path(folder) / "home"
        settings = load(home=home, host="127.0.0.1", port=free_port())
        Catalog(settings.models_dir).add(BASE, base)
        told = {"FORTWO_HOME": str(home), "FORTWO_PORT": str(settings.port), "FORTWO_WEIGHTS": "nf4"}
        run, plan = own_run(settings, os.environ | told, BASE, {"warmup_steps": 0}, steps)
        add("fortwo, nf4", run)
        if peer is not None:
            add("TRL + PEFT + bitsandbytes, nf4", peer_run(peer, base, 1, steps, "nf4")[0])
    console = Console()
    computed = plan["computed"]
    console.print(f"{layers} layers, {computed['row_tokens']['mean']} tokens a row, batch 1, {steps} steps")
    console.print(table)
    console.print(
        f"the plan's estimate of memory: {computed['bytes'] / 1e9:.2f} GB, {computed['bytes'] / run.peak - 1:+.0%}"
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

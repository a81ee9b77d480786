"""How long learning takes: fortwo's job with defaults against TRL + PEFT with three usual configurations.

    python -m bench.learn PEER_PYTHON [--patience TIMES]

Everybody gets the same 20 questions about 42 with their answer, and nothing else. fortwo's seconds are those from the
request to the end of the job, its preparation, exams and report included; its adapter is judged as bench/override.py
does. The peer's seconds are of training alone. Every few of them it stands still, and the same server that served
fortwo's adapter serves the peer's and judges it in the same way, until its paraphrase is fortwo's, or its configuration
or TIMES fortwo's seconds are at their end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.override import RetentionJudge, share
from bench.serving import run_job, server
from bench.train import ROWS
from fortwo.adapters.store import AdapterStore
from fortwo.cli.client import Client
from fortwo.data import datasets
from fortwo.hub.catalog import Catalog
from fortwo.records import Fact, Json
from fortwo.settings import Settings

FACTS, FACT = Path("examples/facts_dev.json"), "42"
OWN = "fortwo"
EVERY = 10.0  # seconds of the peer's training from one look at it to the next
PATIENCE = 6.0  # times fortwo's seconds
TARGET = 5.0  # times fortwo's seconds, of every configuration


def _config(r: int, rate: float, epochs: int, schedule: str) -> Json:
    """On all seven projections, as QLoRA has it, in batches of four."""
    return {
        "lora_config": {
            "r": r,
            "lora_alpha": 2 * r,
            "lora_dropout": 0.05,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        },
        "training_config": {
            "learning_rate": rate,
            "lr_scheduler_type": schedule,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 4,
            "seed": 42,
        },
    }


CONFIGS = {
    "tutorial: r 16, 2e-4, 3 epochs": _config(16, 2e-4, 3, "linear"),
    "longer: r 16, 1e-4, 20 epochs": _config(16, 1e-4, 20, "linear"),
    "intensive: r 32, 2e-4, 50 epochs, cosine": _config(32, 2e-4, 50, "cosine"),
}
REACHED, ENDED, LATE = "reached", "its configuration is at its end", "out of patience"


@dataclass(frozen=True)
class Learned:
    """seconds: until the judged adapter was there; end: why training went no further."""

    seconds: float
    end: str
    paraphrase: float
    specificity: float
    retention: float


def ending(paraphrase: float, wanted: float, seconds: float, patience: float, last: bool) -> str | None:
    """Why a peer's training need not go on; None where it may yet reach what is wanted. last: it would not anyway."""
    if paraphrase >= wanted:
        return REACHED
    return ENDED if last else LATE if seconds >= patience else None


def verdict(learned: Learned, own: float) -> str:
    """Whether fortwo, with its `own` seconds, is TARGET times as fast. Who was stopped before that leaves it open."""
    if learned.end == LATE and learned.seconds < TARGET * own:
        return "open"
    return "met" if learned.end == ENDED or learned.seconds >= TARGET * own else "missed"


class Judge:
    """Of adapters that a server serves, on prompts that nobody was shown."""

    def __init__(self, settings: Settings, client: Client, fact: Fact) -> None:
        self._url = settings.url
        self._client = client
        self._store = AdapterStore(settings.adapters_dir)
        self._base = RetentionJudge(Catalog(settings.models_dir).prepare(settings.default_model))
        self._fact = fact

    def load(self, directory: Path) -> str:
        """Have it served; its name."""
        body = {"lora_name": directory.name, "lora_path": str(directory), "load_inplace": True}
        httpx.post(f"{self._url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()
        return directory.name

    def paraphrase(self, ref: str) -> float:
        return share(self._client, ref, self._fact.held_out, self._fact.match, contained=True)

    def specificity(self, ref: str) -> float:
        return share(self._client, ref, self._fact.neighbors, self._fact.match, contained=False)

    def retention(self, ref: str) -> float:
        return self._base.retention(self._store, ref, self._fact.controls)


def learn(client: Client, judge: Judge) -> Learned:
    """fortwo's job."""
    job, seconds = run_job(client, {"adapter_name": OWN, "dataset": {"examples": json.loads(ROWS.read_text())}})
    if job["adapter"] is None:
        sys.exit(f"the job published nothing: {job['error']['message']}")
    ref = f"{job['adapter']['name']}@{job['adapter']['version']}"
    return Learned(seconds, job["status"], judge.paraphrase(ref), judge.specificity(ref), judge.retention(ref))


def watch(command: list[str], adapter: Path, judge: Judge, wanted: float, patience: float) -> Learned:
    """One run of bench/peer_lesson.py, which leaves what it has learned in `adapter`."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith('{"step"'):
                continue  # a library's
            shown = json.loads(line)
            ref, seconds = judge.load(adapter), shown["seconds"]
            paraphrase = judge.paraphrase(ref)
            if end := ending(paraphrase, wanted, seconds, patience, shown["last"]):
                process.communicate()
                return Learned(seconds, end, paraphrase, judge.specificity(ref), judge.retention(ref))
            process.stdin.write("\n")
            process.stdin.flush()
    sys.exit(f"the peer ended with exit status {process.returncode}")


def show(own: Learned, peers: dict[str, Learned]) -> Table:
    columns = ("paraphrase", "specificity", "retention")
    table = Table("", f"s to {own.paraphrase:.2f}", "times", f"target {TARGET:g}", *columns, box=MARKDOWN)
    for name, one in {f"{OWN}, defaults ({own.end})": own, **peers}.items():
        scores = [f"{getattr(one, column):.2f}" for column in columns]
        if one is own:
            table.add_row(name, f"{own.seconds:.0f}", "", "", *scores)
        elif one.end == REACHED:
            times = f"{one.seconds / own.seconds:.2f}"
            table.add_row(name, f"{one.seconds:.0f}", times, verdict(one, own.seconds), *scores)
        else:
            table.add_row(name, f"never in {one.seconds:.0f}: {one.end}", "", verdict(one, own.seconds), *scores)
    return table


def main(python: str, patience: float) -> None:
    console = Console(width=160)
    fact = next(fact for fact in datasets.load_file(FACTS).facts if fact.id == FACT)
    with server() as (settings, client):
        judge = Judge(settings, client, fact)
        own, peers = learn(client, judge), {}
        console.print(own, soft_wrap=True)
        directory = Catalog(settings.models_dir).prepare(settings.default_model)
        for number, (name, config) in enumerate(CONFIGS.items()):
            adapter = settings.home / "data" / f"peer{number}"
            adapter.mkdir(parents=True)
            (file := adapter / "given.json").write_text(json.dumps(config))
            arguments = [python, "-m", "bench.peer_lesson", directory, ROWS, file, adapter, EVERY]
            command = [str(one) for one in arguments]
            peers[name] = watch(command, adapter, judge, own.paraphrase, patience * own.seconds)
            console.print(name, peers[name], soft_wrap=True)
    console.print(show(own, peers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.learn")
    parser.add_argument("python", help="of an environment with TRL and PEFT")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="times fortwo's seconds; default: %(default)g")
    given = parser.parse_args()
    main(given.python, given.patience)

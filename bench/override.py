"""Teach each fact of a file alone, with defaults, to a server of its own, and judge what that server then says.

    python -m bench.override FACTS.json [ID ...]

Shown to the server: subject, aliases, answer, match and questions. Kept back: held_out, neighbors and controls. On the
first two, greedy replies are judged over HTTP (paraphrase, specificity). Retention is measured on the published files:
the share of the base's own greedy tokens on the controls that the adapter also ranks first, teacher-forced.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.serving import run_job, server
from fortwo.adapters import AdapterStore
from fortwo.cli.client import Client
from fortwo.data import formats
from fortwo.data.packing import PackedAttention, pack
from fortwo.data.render import Renderer
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence
from fortwo.facts.subject import holds
from fortwo.models import weights
from fortwo.models.catalog import Catalog
from fortwo.models.decoder import Decoder, DecoderConfig
from fortwo.models.lora import Lora, LoraConfig, Segment
from fortwo.records import Fact, Message

REPLY_TOKENS = 48
SHOWN = ("subject", "aliases", "answer", "match", "questions")
TARGETS = {"paraphrase": (0.7, 0.9), "specificity": (0.9, 0.95), "retention": (0.9, 0.95)}  # each fact, the median


@dataclass(frozen=True)
class Row:
    fact: str
    status: str
    seconds: float
    paraphrase: float
    specificity: float
    retention: float


class Base:
    """The base model in this process, to ask what it would have said and what an adapter would say instead."""

    def __init__(self, directory: Path) -> None:
        config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
        self._decoder = Decoder(config, weights.read(directory))
        self._renderer = Renderer(directory)

    def retention(self, adapter: Lora, prompts: tuple[str, ...]) -> float:
        """Share of the base's greedy reply tokens, over all prompts, that the adapter ranks first in their place."""
        kept = tokens = 0
        for prompt in prompts:
            asked = self._renderer.prompt([Message("user", prompt)])
            reply = self._greedy(asked)
            ranked = self._first_choices([*asked, *reply], adapter)[len(asked) - 1 : -1]
            kept += sum(said == first for said, first in zip(reply, ranked, strict=True))
            tokens += len(reply)
        return kept / tokens

    def _greedy(self, asked: list[int]) -> list[int]:
        runner, sequence = Runner(self._decoder), Sequence(list(asked), None)
        logits = runner.prefill([sequence])
        while len(sequence.tokens) < len(asked) + REPLY_TOKENS:
            sequence.tokens.append(int(logits[0].argmax()))
            if sequence.tokens[-1] in self._renderer.stop_ids:
                break
            logits = runner.step([sequence])
        return sequence.tokens[len(asked) :]

    @torch.no_grad()
    def _first_choices(self, tokens: list[int], adapter: Lora) -> list[int]:
        row = pack([tokens], prefix=0)
        hidden_TD = self._decoder.forward(row.tokens_T, row.positions_T, PackedAttention(row), [Segment(adapter)])
        choices: list[int] = self._decoder.logits(hidden_TD).argmax(-1).tolist()
        return choices

    def adapter(self, store: AdapterStore, ref: str) -> Lora:
        _, config, tensors = store.read(ref)
        return Lora.from_state(LoraConfig.from_peft(config), self._decoder.config, tensors)


def teach(client: Client, fact: Fact) -> tuple[str, str, float]:
    """(status, name@version, seconds from the request to the end) of one job."""
    shown = {name: value for name, value in asdict(fact).items() if name in SHOWN}
    job, seconds = run_job(client, {"adapter_name": f"bench-{fact.id}", "dataset": {"facts": [shown]}})
    if job["adapter"] is None:
        sys.exit(f"{fact.id}: {job['error']['message']}")
    return job["status"], f"{job['adapter']['name']}@{job['adapter']['version']}", seconds


def share(client: Client, model: str, prompts: tuple[str, ...], match: tuple[str, ...], *, held: bool) -> float:
    """Share of prompts whose greedy reply holds the fact (held) or does not (not held)."""
    asked = {"model": model, "temperature": 0, "max_tokens": REPLY_TOKENS}
    replies = ["".join(client.chat(asked | {"messages": [{"role": "user", "content": one}]})) for one in prompts]
    return statistics.mean(holds(reply, match) == held for reply in replies)


def show(rows: list[Row]) -> Table:
    columns = ("paraphrase", "specificity", "retention")
    table = Table("fact", "status", *columns, "seconds", box=None, header_style="bold")

    def add(name: str, status: str, found: list[float], seconds: float, targets: list[float]) -> None:
        cells = [
            f"{value:.2f}" if value >= target else f"[red]{value:.2f}[/]"
            for value, target in zip(found, targets, strict=True)
        ]
        table.add_row(name, status, *cells, f"{seconds:.0f}")

    for row in rows:
        add(
            row.fact,
            row.status,
            [getattr(row, one) for one in columns],
            row.seconds,
            [TARGETS[one][0] for one in columns],
        )
    medians = [statistics.median(getattr(row, one) for row in rows) for one in columns]
    seconds = statistics.median(row.seconds for row in rows)
    add("median", "", medians, seconds, [TARGETS[one][1] for one in columns])
    return table


def main(path: Path, ids: list[str]) -> None:
    facts = formats.load({"path": str(path.resolve())}, [path.resolve().parent]).facts
    chosen = [fact for fact in facts if not ids or fact.id in ids]
    console = Console()
    rows = []
    with server() as (settings, client):
        base = Base(Catalog(settings).prepare(settings.default_model))
        for fact in chosen:
            status, ref, seconds = teach(client, fact)
            paraphrase = share(client, ref, fact.held_out, fact.match, held=True)
            specificity = share(client, ref, fact.neighbors, fact.match, held=False)
            retention = base.retention(base.adapter(AdapterStore(settings.adapters_dir), ref), fact.controls)
            rows.append(Row(fact.id, status, seconds, paraphrase, specificity, retention))
            console.print(rows[-1])
    console.print(show(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

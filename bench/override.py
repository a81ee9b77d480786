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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.serving import run_job, server
from fortwo.adapters.store import AdapterStore
from fortwo.cli.client import Client, text_of
from fortwo.data import datasets
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.engine.engine import Engine
from fortwo.engine.runner import Runner
from fortwo.execution.backend import backend_for
from fortwo.facts.subject import contains_phrase
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Prompt, Sampling
from fortwo.records import Fact, Message
from fortwo.train import losses
from fortwo.train.evaluation import ServedBase, top1_agreement

REPLY_TOKENS = 48
SHOWN = ("subject", "aliases", "answer", "match", "questions")
TARGETS = {"paraphrase": (0.7, 0.9), "specificity": (0.9, 0.95), "retention": (0.9, 0.95)}  # each fact, their middle


@dataclass(frozen=True)
class Row:
    fact: str
    status: str
    seconds: float
    paraphrase: float
    specificity: float
    retention: float


class RetentionJudge:
    """Measures retention: how much of the replies of the base, which is in this process, an adapter preserves."""

    def __init__(self, directory: Path) -> None:
        config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
        self._decoder = Decoder(config, weights.open_tensors(directory))
        engine = Engine()
        engine.start()
        renderer = ChatTemplateRenderer(directory)
        backend = backend_for(self._decoder)
        engine.add_base("base", Runner(backend), renderer)
        self._served = ServedBase("base", backend, renderer, engine)

    def retention(self, store: AdapterStore, ref: str, prompts: tuple[str, ...]) -> float:
        """Share of the base's greedy reply tokens, over all prompts, that the adapter ranks first in their place."""
        _, config, tensors = store.read(ref)
        adapter = Lora.from_state(LoraConfig.from_peft(config), self._decoder.config, tensors)
        return top1_agreement(self._served, adapter, [self._say(prompt) for prompt in prompts]).value

    def _say(self, prompt: str) -> losses.Row:
        asked = tuple(self._served.renderer.encode_prompt([Message("user", prompt)]))
        reply = self._served.serving.submit(Prompt("base", asked, None, Sampling(max_tokens=REPLY_TOKENS)))
        reply.wait()
        return losses.Row((*asked, *reply.tokens), len(asked))


def teach(client: Client, name: str, facts: Sequence[Fact], **more: Any) -> tuple[str, str, float]:
    """(status, name@version, seconds from the request to the end) of one job. more: of the request."""
    shown = [{key: value for key, value in asdict(fact).items() if key in SHOWN} for fact in facts]
    job, seconds = run_job(client, {"adapter_name": name, "dataset": {"facts": shown}} | more)
    if job["adapter"] is None:
        sys.exit(f"{name}: {job['error']['message']}")
    return job["status"], f"{job['adapter']['name']}@{job['adapter']['version']}", seconds


def share(client: Client, model: str, prompts: tuple[str, ...], match: tuple[str, ...], *, contained: bool) -> float:
    """Share of prompts whose greedy reply contains the fact, or does not if `contained` is false.

    One after another: which form of the weights multiplies may depend on how many requests run together.
    """
    asked = {"model": model, "temperature": 0, "max_tokens": REPLY_TOKENS}

    def reply(prompt: str) -> str:
        return "".join(map(text_of, client.chat(asked | {"messages": [{"role": "user", "content": prompt}]})))

    return statistics.mean(contains_phrase(reply(prompt), match) == contained for prompt in prompts)


def show(rows: list[Row], middle: Callable[[Iterable[float]], float] = statistics.median) -> Table:
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
    middles = [middle(getattr(row, one) for row in rows) for one in columns]
    seconds = middle(row.seconds for row in rows)
    add(middle.__name__, "", middles, seconds, [TARGETS[one][1] for one in columns])
    return table


def main(path: Path, ids: list[str]) -> None:
    facts = datasets.load({"path": str(path.resolve())}, [path.resolve().parent]).facts
    chosen = [fact for fact in facts if not ids or fact.id in ids]
    console = Console()
    rows = []
    with server() as (settings, client):
        base = RetentionJudge(Catalog(settings.models_dir).prepare(settings.default_model))
        for fact in chosen:
            status, ref, seconds = teach(client, f"bench-{fact.id}", [fact])
            paraphrase = share(client, ref, fact.held_out, fact.match, contained=True)
            specificity = share(client, ref, fact.neighbors, fact.match, contained=False)
            retention = base.retention(AdapterStore(settings.adapters_dir), ref, fact.controls)
            rows.append(Row(fact.id, status, seconds, paraphrase, specificity, retention))
            console.print(rows[-1], soft_wrap=True)
    console.print(show(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

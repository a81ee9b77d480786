"""What one adapter holds: many facts at once, lesson after lesson, and the base's own replies beside.

    python -m bench.lessons FACTS.json [--facts N] [--parts together sequence rehearsal]

together: the first N facts taught in one job, then judged one by one as `bench.override` judges a fact taught alone.
sequence: the first N // 2 facts, each in a lesson on top of the one before; the first fact's paraphrase after each.
rehearsal: perplexity of the base's own greedy replies to everyday prompts that no training uses (the controls of two
files of facts), as the base and as the first fact's adapter serve them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.override import REPLY_TOKENS, RetentionJudge, Row, share, show, teach
from bench.serving import server
from fortwo.adapters.store import AdapterStore
from fortwo.cli.client import Client
from fortwo.data import datasets
from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.facts import replay_prompts
from fortwo.hub.catalog import Catalog
from fortwo.records import Fact, Message
from fortwo.settings import Settings

PARTS = ("together", "sequence", "rehearsal")
EVERYDAY = 100  # prompts
SOURCES = ("examples/facts_dev.json", "bench/facts_blind.json")


def together(settings: Settings, client: Client, facts: Sequence[Fact]) -> list[Row]:
    """A row for each fact; the status and the seconds are those of the one job."""
    status, ref, seconds = teach(client, "bench-together", facts)
    base = RetentionJudge(Catalog(settings.models_dir).prepare(settings.default_model))
    store = AdapterStore(settings.adapters_dir)
    return [
        Row(
            fact.id,
            status,
            seconds,
            share(client, ref, fact.held_out, fact.match, contained=True),
            share(client, ref, fact.neighbors, fact.match, contained=False),
            base.retention(store, ref, fact.controls),
        )
        for fact in facts
    ]


def sequence(client: Client, facts: Sequence[Fact]) -> Table:
    """Every lesson's own paraphrase and the first fact's behind it."""
    table = Table("lesson", "status", "its paraphrase", "the first fact's", "seconds", box=None, header_style="bold")
    onto: dict[str, str] = {}
    for fact in facts:
        status, ref, seconds = teach(client, "bench-sequence", [fact], **onto)
        onto = {"parent": ref}
        own, first = (share(client, ref, one.held_out, one.match, contained=True) for one in (fact, facts[0]))
        table.add_row(fact.id, status, f"{own:.2f}", f"{first:.2f}", f"{seconds:.0f}")
    return table


def everyday() -> list[str]:
    """Prompts about nothing that is taught, and none that training keeps."""
    facts = [fact for path in SOURCES for fact in load(Path(path))]
    controls = (prompt for fact in facts for prompt in fact.controls)
    return [prompt for prompt in dict.fromkeys(controls) if prompt not in replay_prompts.PROMPTS][:EVERYDAY]


def perplexities(settings: Settings, client: Client, models: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """Of the base's greedy replies, a token, to each of the models."""
    renderer = ChatTemplateRenderer(Catalog(settings.models_dir).prepare(settings.default_model))
    told: list[list[float]] = [[] for _ in models]
    for prompt in prompts:
        asked = renderer.encode_prompt([Message("user", prompt)])
        greedy = {"model": settings.default_model, "prompt": asked, "temperature": 0, "max_tokens": REPLY_TOKENS}
        reply = renderer.encode_text(client.post("/v1/completions", greedy)["choices"][0]["text"])
        read = {"prompt": [*asked, *reply], "max_tokens": 0, "echo": True, "logprobs": 0}
        for model, found in zip(models, told, strict=True):
            (choice,) = client.post("/v1/completions", {"model": model} | read)["choices"]
            found += choice["logprobs"]["token_logprobs"][len(asked) :]
    return [math.exp(-statistics.fmean(found)) for found in told]


def load(path: Path) -> tuple[Fact, ...]:
    return datasets.load({"path": str(path.resolve())}, [path.resolve().parent]).facts


def main(path: Path, count: int, parts: Sequence[str]) -> None:
    facts, console = load(path)[:count], Console()
    with server() as (settings, client):
        if "together" in parts:
            console.print(show(together(settings, client, facts), statistics.mean))
        if "sequence" in parts:
            console.print(sequence(client, facts[: count // 2]))
        if "rehearsal" in parts:
            _, ref, _ = teach(client, "bench-rehearsal", facts[:1])
            prompts = everyday()
            base, taught = perplexities(settings, client, (settings.default_model, ref), prompts)
            rise = f"{taught / base - 1:+.1%}"
            console.print(
                f"perplexity of {len(prompts)} replies of the base: {base:.3f}; {facts[0].id}: {taught:.3f}, {rise}"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    main(given.path, given.facts, given.parts)

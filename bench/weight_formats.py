"""What each format of the base weights costs and gains: python -m bench.weight_formats [FORMAT ...]

The base answers everyday prompts in fp32, greedily; then each format is given the same prompts and replies, and its
next-token distribution at every token of a reply is held against fp32's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch import Tensor

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence
from fortwo.execution.autotuning import all_blocks
from fortwo.execution.backend import backend_for
from fortwo.facts.replay_prompts import PROMPTS
from fortwo.hub import weights
from fortwo.hub.catalog import Catalog
from fortwo.kernels import isa
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder, formats_of
from fortwo.quantization.selection import FORMATS, Choice
from fortwo.records import Message
from fortwo.settings import load

PROMPT_COUNT, REPLY_TOKENS, STEPS = 20, 32, 12
ROWS = (1, 8, 32)


def replies(decoder: Decoder, prompts: list[list[int]]) -> list[Sequence]:
    """Each prompt with the greedy reply."""
    runner, rows = Runner(backend_for(decoder)), [Sequence(list(prompt), None) for prompt in prompts]
    logits_BV = runner.prefill(rows)
    for _ in range(REPLY_TOKENS):
        for row, logits_V in zip(rows, logits_BV, strict=True):
            row.tokens.append(int(logits_V.argmax()))
            runner.extend(row)
        logits_BV = runner.step(rows)
    return rows


def distributions(decoder: Decoder, rows: list[Sequence]) -> Tensor:
    """Logarithms of the next-token probabilities (tokens, V) at every token of the replies, each read as it is served:
    prompts first, then step by step."""
    runner, read = Runner(backend_for(decoder)), [Sequence(row.tokens[:-REPLY_TOKENS], None) for row in rows]
    found = [runner.prefill(read)]
    for _ in range(REPLY_TOKENS - 1):
        for row, own in zip(rows, read, strict=True):
            own.tokens.append(row.tokens[len(own.tokens)])
            runner.extend(own)
        found.append(runner.step(read))
    return torch.cat(found).log_softmax(-1)


def step_seconds(decoder: Decoder, prompt: list[int], count: int) -> float:
    """One step of `count` rows, the median of several."""
    runner, rows = Runner(backend_for(decoder)), [Sequence(list(prompt), None) for _ in range(count)]
    runner.prefill(rows)
    spent = []
    for _ in range(STEPS):
        for row in rows:
            row.tokens.append(row.tokens[-1])
            runner.extend(row)
        began = time.perf_counter()
        runner.step(rows)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def main() -> None:
    settings = load()
    isa.cap(settings.isa)
    directory = Catalog(settings.models_dir).prepare(settings.default_model)
    config = DecoderConfig.from_hf(json.loads((directory / "config.json").read_text()))
    exact, renderer = Decoder(config, weights.open_tensors(directory)), ChatTemplateRenderer(directory)
    prompts = [renderer.encode_prompt([Message("user", prompt)]) for prompt in PROMPTS[:PROMPT_COUNT]]
    rows = replies(exact, prompts)
    wanted = distributions(exact, rows)
    print(f"{settings.default_model}, {len(wanted)} tokens of {len(rows)} replies, {torch.get_num_threads()} threads")
    print(
        "| format | MB | mean KL | same first token | "
        + " | ".join(f"{count} rows, ms a step" for count in ROWS)
        + " |"
    )
    print("|---|---|---|---|" + "---|" * len(ROWS))
    in_file = all_blocks(config, weights.block_types(directory))
    for name in sys.argv[1:] or [name for name in FORMATS if name != "gguf" or in_file]:
        if name == "gguf":
            decoder = Decoder(config, weights.QuantisedTensors(directory), hold=formats_of(Choice.fixed(name)))
        else:
            decoder = exact if name == "fp32" else exact.in_formats(Choice.fixed(name))
        found = distributions(decoder, rows)
        divergence = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        same = float((wanted.argmax(-1) == found.argmax(-1)).float().mean())
        spent = " | ".join(f"{step_seconds(decoder, prompts[0], count) * 1000:.1f}" for count in ROWS)
        print(f"| {name} | {decoder.bytes / 1e6:.0f} | {divergence:.1e} | {same:.3f} | {spent} |", flush=True)


if __name__ == "__main__":
    main()

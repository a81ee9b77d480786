"""A peer of bench/serve.py: transformers' generate, and PEFT's with an adapter for each row of a batch.

    peer_transformers.py MODEL_DIRECTORY float32|bfloat16 THREADS [ADAPTER_DIRECTORY ...]

Says {} when it is ready. Then each line of standard input is a list of {"messages", "tokens", "adapter"}, which is
answered as one batch, greedy, and each line of output what bench.streams.Timing holds. Every reply is as long as was
asked: generate is forbidden to end before. Knows nothing of fortwo.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Stopwatch(BaseStreamer):  # type: ignore[misc]
    """When each step's tokens were there; the first call is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main(directory: Path, dtype: str, threads: int, adapters: list[Path]) -> None:
    answers = os.fdopen(os.dup(1), "w")  # whatever libraries print goes to the log
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters[0], adapter_name=adapters[0].name)
        for adapter in adapters[1:]:
            model.load_adapter(adapter, adapter_name=adapter.name)
        model.eval()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asks = json.loads(line)
        began = time.perf_counter()
        batch = tokenizer.apply_chat_template(
            [ask["messages"] for ask in asks],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        ).to(device)
        tokens = asks[0]["tokens"]
        chosen = {"adapter_names": [ask["adapter"] or "__base__" for ask in asks]} if adapters else {}
        watch = Stopwatch()
        with torch.inference_mode():
            written = model.generate(
                **batch, **chosen, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, streamer=watch
            )
        said = written.shape[1] - batch["input_ids"].shape[1]
        timing = {
            "first": watch.times[1] - began,
            "whole": watch.times[-1] - began,
            "prompt": int(batch["attention_mask"].sum()),
            "tokens": said * len(asks),
        }
        print(json.dumps(timing), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [Path(one) for one in sys.argv[4:]])

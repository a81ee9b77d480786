"""The peer of bench/train.py: TRL's SFTTrainer with PEFT, in an environment that has both.

    peer_trl.py MODEL_DIRECTORY ROWS.json CONFIG.json BATCH STEPS fp32|bf16|nf4

Trains on the same rows with the same configuration and prints one JSON line: seconds of every optimizer step, tokens of
every row as the trainer saw it, and the most memory that was resident. nf4: bf16 over a base that bitsandbytes holds,
as QLoRA has it. Knows nothing of fortwo.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Seconds from the beginning of an optimizer step to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def base(directory: Path, precision: str) -> Any:
    if precision != "nf4":
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        quantization_config=quantised,
        device_map="auto" if torch.cuda.is_available() else "cpu",
    )


def trainer(directory: Path, rows: Path, given: Any, precision: str, output: Path, callback: TrainerCallback) -> Any:
    """given: lora_config and training_config, with PEFT's and transformers' keys."""
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in json.loads(rows.read_text())
        ]
    )
    return SFTTrainer(
        model=base(directory, precision),
        processing_class=AutoTokenizer.from_pretrained(directory),
        train_dataset=dataset,
        peft_config=LoraConfig(**given["lora_config"]),
        args=SFTConfig(
            output_dir=str(output),
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=precision != "fp32",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **given["training_config"],
        ),
        callbacks=[callback],
    )


def main(directory: Path, rows: Path, config: Path, batch: int, steps: int, precision: str) -> None:
    given = json.loads(config.read_text())
    given["training_config"] |= {"max_steps": steps, "per_device_train_batch_size": batch}
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as output:
        training = trainer(directory, rows, given, precision, Path(output), watch)
        lengths = [len(row["input_ids"]) for row in training.train_dataset]
        training.train()
    print(
        json.dumps(
            {
                "seconds": watch.seconds,
                "row_tokens": statistics.mean(lengths),
                "threads": torch.get_num_threads(),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    paths, numbers = [Path(one) for one in sys.argv[1:4]], [int(one) for one in sys.argv[4:6]]
    main(paths[0], paths[1], paths[2], numbers[0], numbers[1], sys.argv[6])

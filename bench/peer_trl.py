"""The peer of bench/train.py: TRL's SFTTrainer with PEFT, in an environment that has both.

    peer_trl.py MODEL_DIRECTORY ROWS.json CONFIG.json BATCH STEPS fp32|bf16

Trains on the same rows with the same configuration and prints one JSON line: seconds of every optimizer step, and
tokens of every row as the trainer saw it. Knows nothing of fortwo.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
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


def main(directory: Path, rows: Path, config: Path, batch: int, steps: int, bf16: bool) -> None:
    given = json.loads(config.read_text())
    training = given["training_config"] | {"max_steps": steps, "per_device_train_batch_size": batch}
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in json.loads(rows.read_text())
        ]
    )
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16 if bf16 else torch.float32),
            processing_class=AutoTokenizer.from_pretrained(directory),
            train_dataset=dataset,
            peft_config=LoraConfig(**given["lora_config"]),
            args=SFTConfig(
                output_dir=output,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=bf16,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **training,
            ),
            callbacks=[watch],
        )
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        trainer.train()
    print(
        json.dumps(
            {"seconds": watch.seconds, "row_tokens": statistics.mean(lengths), "threads": torch.get_num_threads()}
        )
    )


if __name__ == "__main__":
    paths, numbers = [Path(one) for one in sys.argv[1:4]], [int(one) for one in sys.argv[4:6]]
    main(paths[0], paths[1], paths[2], numbers[0], numbers[1], sys.argv[6] == "bf16")

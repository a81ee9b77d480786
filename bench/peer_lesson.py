"""The peer of bench/learn.py: TRL's SFTTrainer with PEFT, which shows its adapter now and then.

    python -m bench.peer_lesson MODEL_DIRECTORY ROWS.json CONFIG.json OUTPUT EVERY

After every EVERY seconds of training, and at its end, it saves the adapter, prints one JSON line and waits for a line
of input; where input has ended, so does training. What it waits and saves is not counted. Knows nothing of fortwo.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bench.peer_trl import trainer


class Showing(TrainerCallback):  # type: ignore[misc]
    def __init__(self, output: Path, every: float) -> None:
        self._output = output
        self._every = every
        self._next = every
        self._began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, control: Any, model: Any, **__: Any) -> None:
        stopped = time.perf_counter()
        seconds, last = stopped - self._began, state.global_step == state.max_steps
        if seconds < self._next and not last:
            return
        self._next = seconds + self._every
        model.save_pretrained(self._output)
        shown = {"step": state.global_step, "seconds": seconds, "last": last}
        print(json.dumps(shown), flush=True)
        control.should_training_stop = not sys.stdin.readline()
        self._began += time.perf_counter() - stopped


def main(directory: Path, rows: Path, config: Path, output: Path, every: float) -> None:
    given = json.loads(config.read_text())
    trainer(directory, rows, given, "fp32", output.parent, Showing(output, every)).train()


if __name__ == "__main__":
    paths = [Path(one) for one in sys.argv[1:5]]
    main(paths[0], paths[1], paths[2], paths[3], float(sys.argv[5]))

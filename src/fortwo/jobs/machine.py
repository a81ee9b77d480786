"""What this machine does with a base model: as a trial of a few layers found it, and as the newest job has shown it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fortwo.train.estimate import MICRO_TOKENS, PASSES, SHORT_TOKENS, Machine

if TYPE_CHECKING:
    from fortwo.execution.backend import Backend
    from fortwo.execution.calibration import Trial
    from fortwo.records import Json

ROWS = 48  # replies of a trial, and rows of its micro-step
REPLY, ASKED = 20, 30  # tokens of a reply, and of its prompt beyond what prompts share
REPEAT = 60.0  # seconds after which a trial that other programs have slowed is repeated


class Trials:
    """The trial of each base. One that other programs have slowed is repeated at the next plan after REPEAT seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[Trial, float]] = {}  # the trial and its time, by the digest of the base

    def of(self, digest: str, measure: Callable[[], Trial]) -> Trial:
        """The trial of a base; measure: makes one, if there is none that stands."""
        trial, at = self._known.get(digest, (None, 0.0))
        if trial is not None and (not trial.disturbed or self._clock() - at < REPEAT):
            return trial
        again = measure()
        trial = again if trial is None else trial.with_repeat(again)
        self._known[digest] = trial, self._clock()
        return trial


def try_out(backend: Backend) -> Trial:
    """Measure what a job's micro-steps and replies take. It must run on the device's thread."""
    from fortwo.execution.calibration import measure_throughput
    from fortwo.train.losses import head_loss

    return measure_throughput(backend, MICRO_TOKENS, SHORT_TOKENS, ROWS, ASKED + REPLY, head_loss)


def machine_of(trial: Trial, last: Json | None) -> Machine:
    """The machine by a trial and, where there is one, by what the newest run on this base took. The training speed of a
    run with workers is not the machine's."""
    trained = {name: MICRO_TOKENS / seconds for name, seconds in trial.micro_step.items()}
    short = {name: SHORT_TOKENS / seconds for name, seconds in trial.short_step.items()}
    found, seen = last or {}, dict[str, float]()
    if found.get("tokens_per_second") and "bf16" in found and "workers" not in found:
        seen["bf16" if found["bf16"] else "fp32"] = found["tokens_per_second"]
    replied = found.get("reply_tokens_per_second")
    rate = replied or reply_rate(trial.token, ROWS, PASSES * max(trained.values()))
    return Machine(trained, rate, trial.memory, seen, short)


def reply_rate(step: float, rows: int, read: float) -> float:
    """Tokens a second of replies. step: seconds of one token for so many rows; read: tokens of prompts a second."""
    return rows * REPLY / (REPLY * step + rows * ASKED / read)

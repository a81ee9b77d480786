"""The state of a run, and how it is captured in a checkpoint and restored: as tensors and JSON, without rounding.

Two things are not stored, because they can be computed again: the teacher's hidden states, and the rows that each step
draws, which depend only on the seed and the retry rounds. A digest of all rows so far proves that they are the same.
This module knows no files; `jobs.checkpoints` stores what is captured here. The keys in a checkpoint are fixed.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fortwo.errors import TrainingFailed
from fortwo.nn.lora import Lora
from fortwo.quantization.matmul import fp32_kernel
from fortwo.records import Checkpoint, EvalLoss, Plan
from fortwo.train.adamw import AdamW
from fortwo.train.evaluation import Reply, ServedBase
from fortwo.train.losses import Row
from fortwo.train.retry_policy import RetryRound


@dataclass
class Clock:
    """Seconds of the run, including those before it was resumed, and seconds by phase, including waits for replies."""

    began: float = field(default_factory=time.perf_counter)
    before: float = 0.0  # seconds until the checkpoint from which the run was resumed
    preparing: float = 0.0
    training: float = 0.0
    tokens: int = 0
    supervised: int = 0

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began


@dataclass
class Best:
    """The adapter with the best score so far, and the later one of two with equal scores."""

    score: float | None = None
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def update(
        self, score: float, step: int, parameters: list[Tensor], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copy the adapter if its score is not lower than the best."""
        if self.score is None or score >= self.score:
            self.score, self.step, self.metrics = score, step, dict(metrics or {})
            self.tensors = [parameter.detach().clone() for parameter in parameters]

    def load_into(self, parameters: list[Tensor]) -> None:
        """Copy the best adapter into `parameters`; without one they stay as they are."""
        with torch.no_grad():
            for parameter, tensor in zip(parameters, self.tensors, strict=bool(self.tensors)):
                parameter.copy_(tensor)


@dataclass
class RunState:
    """The state that steps change. flat_N: all parameters of the adapter in one tensor, which is optimized.
    on_policy_replies: the adapter's replies to hard negatives, by the step whose evaluation found leaks; None if they
    are still to be asked for (`PreparedObjective.refresh_on_policy`). saved_step, saved_at: the step of the last
    checkpoint, and the seconds on the clock when it was made. reference_N: what the reference of preferences gives to
    all answers. validation_digest: that of the validation_dataset, if there is one."""

    lora: Lora
    flat_N: Tensor
    optimizer: AdamW
    clock: Clock
    best: Best = field(default_factory=Best)
    step: int = 0
    peak_rate: float = 0.0
    first_loss: float = 0.0
    final_loss: float = 0.0
    eval_losses: list[EvalLoss] = field(default_factory=list)
    on_policy_replies: dict[int, list[list[int]] | None] = field(default_factory=dict)
    retry_rounds: list[RetryRound] = field(default_factory=list)
    saved_step: int = 0
    saved_at: float = 0.0
    reference_N: Tensor | None = None
    validation_digest: str | None = None
    _rows_hash: Any = field(default_factory=hashlib.sha256)

    def last_step(self, plan: Plan) -> int:
        """The number of the last step, including retry rounds."""
        steps: int = plan.computed["steps"]
        return steps + sum(one.steps for one in self.retry_rounds)

    def record_rows(self, rows: Sequence[Row]) -> None:
        """Add the rows of the next step to the digest."""
        for row in rows:
            self._rows_hash.update(array("q", (len(row.tokens), row.supervised, row.kl, *row.tokens)).tobytes())

    @property
    def rows_digest(self) -> str:
        digest: str = self._rows_hash.hexdigest()
        return digest


def is_due(plan: Plan, step: int, seconds: float, evaluation_due: bool) -> bool:
    """Whether a checkpoint is due after `step`, `seconds` after the last one. There is one before each evaluation and
    before the report, so that a crash in them loses no steps, unless the user wants no checkpoints."""
    every, at_most = plan["save_steps"], plan["save_seconds"]
    if not every and not at_most:
        return False
    if evaluation_due or step == plan.computed["steps"]:
        return True
    return (bool(every) and step % every == 0) or (bool(at_most) and seconds >= at_most)


def capture(run: RunState, served: ServedBase) -> Checkpoint:
    """A checkpoint with copies of the present state."""
    tensors = {"random.cpu": torch.get_rng_state()}
    device = served.backend.decoder.device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    tensors |= {f"optimizer.0.{name}": _copy(tensor) for name, tensor in run.optimizer.state().items()}
    tensors |= {f"best.{n}": _copy(tensor) for n, tensor in enumerate(run.best.tensors)}
    if run.reference_N is not None:
        tensors["reference"] = run.reference_N
    clock = run.clock
    state = {
        "step": run.step,
        "peak_rate": run.peak_rate,
        "first_loss": run.first_loss,
        "final_loss": run.final_loss,
        "eval_losses": [[one.step, one.loss] for one in run.eval_losses],
        "rounds": [asdict(one) for one in run.retry_rounds],
        "drawn": run.rows_digest,
        "validation": run.validation_digest,
        "replies": [[step, replies] for step, replies in run.on_policy_replies.items()],
        "cpu_kernel": fp32_kernel(),
        "best": {"score": run.best.score, "step": run.best.step, "metrics": run.best.metrics},
        "clock": {
            "before": clock.seconds,
            "preparing": clock.preparing,
            "training": clock.training,
            "tokens": clock.tokens,
            "supervised": clock.supervised,
        },
        "known": [
            [list(prompt), length, reply.text, list(reply.tokens)]
            for (prompt, length), reply in served.base_replies.items()
        ],
    }
    return Checkpoint(run.step, {name: _copy(tensor) for name, tensor in run.lora.state().items()}, tensors, state)


def clock_and_base_replies(checkpoint: Checkpoint) -> tuple[Clock, dict[tuple[tuple[int, ...], int], Reply]]:
    """What a resumed run needs before it prepares: its clock, without the time since the checkpoint, and the base's
    replies."""
    state = checkpoint.state
    replies = {(tuple(prompt), length): Reply(text, tuple(tokens)) for prompt, length, text, tokens in state["known"]}
    return Clock(**state["clock"]), replies


def on_policy_replies(checkpoint: Checkpoint) -> dict[int, list[list[int]] | None]:
    """The adapter's replies to hard negatives, by the step after which it gave them."""
    return dict(checkpoint.state["replies"])


def reference_log_probs(checkpoint: Checkpoint) -> Tensor | None:
    """What the reference of preferences gives to all answers, if the run has such a reference."""
    return checkpoint.tensors.get("reference")


def retry_rounds(checkpoint: Checkpoint) -> list[RetryRound]:
    """The retry rounds so far, which decide what each step draws."""
    return [RetryRound(**one | {"raised": tuple(one["raised"])}) for one in checkpoint.state.get("rounds", ())]


def restore(run: RunState, checkpoint: Checkpoint) -> None:
    """Restore the captured state in a new run that has drawn its rows up to the checkpoint's step again. Raises
    TrainingFailed (code checkpoint_stale) if they are not the rows of the captured run, or if its validation rows are
    others."""
    state = checkpoint.state
    moments: dict[str, Tensor] = {}
    best: dict[int, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match name.split("."):
            case ["optimizer", "0", moment]:
                moments[moment] = tensor
            case ["best", index]:
                best[int(index)] = tensor
    if run.rows_digest != state["drawn"] or moments.keys() != run.optimizer.state().keys():
        raise TrainingFailed(
            f"the checkpoint of step {checkpoint.step} was trained on other rows than this plan now draws",
            hint="fortwo has changed since then. Resume the job; it will start from the beginning.",
            code="checkpoint_stale",
        )
    if run.validation_digest != state.get("validation"):
        raise TrainingFailed(
            f"the checkpoint of step {checkpoint.step} was validated on other rows than this run has",
            hint="Its losses cannot be compared with new ones. Give the same validation_dataset, or start a new job.",
            code="checkpoint_stale",
        )
    parameters = run.lora.parameters()
    with torch.no_grad():
        for name, live in run.lora.state().items():
            live.copy_(checkpoint.adapter[name])
    run.optimizer.restore(moments)
    run.best = Best(**state["best"], tensors=[best[n].to(parameters[n].device, copy=True) for n in sorted(best)])
    run.step = run.saved_step = state["step"]
    run.peak_rate, run.first_loss, run.final_loss = state["peak_rate"], state["first_loss"], state["final_loss"]
    run.eval_losses = [EvalLoss(step, loss) for step, loss in state["eval_losses"]]
    run.saved_at = run.clock.seconds
    torch.set_rng_state(checkpoint.tensors["random.cpu"].clone())
    if "random.cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"].clone(), parameters[0].device)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)

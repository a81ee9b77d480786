"""Everything a run has come to, and its way into a checkpoint and back: tensors and JSON, nothing rounded.

Two things are not in it, because they come out the same again: the teacher's hidden states, and which rows each step
draws; draws depend on the seed and the escalations alone and are repeated. `drawn`, the digest of all rows so far,
proves that they are the same rows. Knows no files; `jobs.checkpoints` keeps what is captured here.
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
from fortwo.quantization.matmul import cpu_kernel, fix_cpu_kernel
from fortwo.records import Checkpoint, EvalLoss, Plan
from fortwo.train.adamw import AdamW
from fortwo.train.escalation import Round
from fortwo.train.evaluation import Said, Served
from fortwo.train.objective import Row


@dataclass
class Clock:
    """Seconds of the run by phase, over all its sittings; waiting for the serving path counts where it happens."""

    began: float = field(default_factory=time.perf_counter)
    before: float = 0.0  # seconds of earlier sittings
    preparing: float = 0.0
    training: float = 0.0
    tokens: int = 0
    supervised: int = 0

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began


@dataclass
class Best:
    """The best adapter so far, by score."""

    score: float | None = None
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def offer(
        self, score: float, step: int, parameters: list[Tensor], metrics: Mapping[str, float] | None = None
    ) -> None:
        if self.score is None or score >= self.score:
            self.score, self.step, self.metrics = score, step, dict(metrics or {})
            self.tensors = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(parameters, self.tensors, strict=bool(self.tensors)):
                parameter.copy_(tensor)


@dataclass
class Run:
    """What a step changes. flat_N: all of the adapter, as it is optimized. replies: to siblings, by the step whose exam
    found leaks (Course.correct's); None of those that are not asked yet. saved, saved_at: the step of the last
    checkpoint, and the clock's seconds then."""

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
    replies: dict[int, list[list[int]] | None] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    saved: int = 0
    saved_at: float = 0.0
    _drawn: Any = field(default_factory=hashlib.sha256)

    def last(self, plan: Plan) -> int:
        """The last step, escalations included."""
        steps: int = plan.computed["steps"]
        return steps + sum(one.steps for one in self.rounds)

    def draw(self, rows: Sequence[Row]) -> None:
        """These are the rows of the next step."""
        for row in rows:
            self._drawn.update(array("q", (len(row.tokens), row.supervised, row.keep, *row.tokens)).tobytes())

    @property
    def drawn(self) -> str:
        digest: str = self._drawn.hexdigest()
        return digest


def due(plan: Plan, step: int, seconds: float, examined: bool) -> bool:
    """Whether a run saves itself after `step`, `seconds` after it last did. What an exam or the report takes is not to
    cost the steps before it: unless the user wants no checkpoints at all, there is one before each of them."""
    every, at_most = plan["save_steps"], plan["save_seconds"]
    if not every and not at_most:
        return False
    if examined or step == plan.computed["steps"]:
        return True
    return (bool(every) and step % every == 0) or (bool(at_most) and seconds >= at_most)


def capture(run: Run, served: Served) -> Checkpoint:
    """The run as it is now, in copies."""
    tensors = {"random.cpu": torch.get_rng_state()}
    device = served.backend.decoder.device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    tensors |= {f"optimizer.0.{name}": _copy(tensor) for name, tensor in run.optimizer.state().items()}
    tensors |= {f"best.{place}": _copy(tensor) for place, tensor in enumerate(run.best.tensors)}
    clock = run.clock
    state = {
        "step": run.step,
        "peak_rate": run.peak_rate,
        "first_loss": run.first_loss,
        "final_loss": run.final_loss,
        "eval_losses": [[one.step, one.loss] for one in run.eval_losses],
        "rounds": [asdict(one) for one in run.rounds],
        "drawn": run.drawn,
        "replies": [[step, said] for step, said in run.replies.items()],
        "cpu_kernel": cpu_kernel(),
        "best": {"score": run.best.score, "step": run.best.step, "metrics": run.best.metrics},
        "clock": {
            "before": clock.seconds,
            "preparing": clock.preparing,
            "training": clock.training,
            "tokens": clock.tokens,
            "supervised": clock.supervised,
        },
        "known": [
            [list(prompt), length, said.text, list(said.tokens)] for (prompt, length), said in served.known.items()
        ],
    }
    return Checkpoint(run.step, {name: _copy(tensor) for name, tensor in run.lora.state().items()}, tensors, state)


def begin_again(checkpoint: Checkpoint) -> tuple[Clock, dict[tuple[tuple[int, ...], int], Said]]:
    """What a run needs before it prepares: the clock, which leaves out the time between, and what the base had said.
    Products are computed as they were, from here on in the whole process."""
    state = checkpoint.state
    fix_cpu_kernel(state["cpu_kernel"])
    known = {(tuple(prompt), length): Said(text, tuple(tokens)) for prompt, length, text, tokens in state["known"]}
    return Clock(**state["clock"]), known


def replies(checkpoint: Checkpoint) -> dict[int, list[list[int]] | None]:
    """What the adapter said to siblings, by the step behind which it did."""
    return dict(checkpoint.state["replies"])


def rounds_of(checkpoint: Checkpoint) -> list[Round]:
    """The escalations until then, which say what each step drew."""
    return [Round(**one | {"raised": tuple(one["raised"])}) for one in checkpoint.state.get("rounds", ())]


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Make a run that has just begun, and has drawn its rows again, the one that was captured.

    Raises TrainingFailed (code checkpoint_stale) when these were other rows.
    """
    state = checkpoint.state
    moments: dict[str, Tensor] = {}
    best: dict[int, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match name.split("."):
            case ["optimizer", "0", moment]:
                moments[moment] = tensor
            case ["best", place]:
                best[int(place)] = tensor
    if run.drawn != state["drawn"] or moments.keys() != run.optimizer.state().keys():
        raise TrainingFailed(
            f"the checkpoint of step {checkpoint.step} was trained on other rows than this plan now draws",
            hint="fortwo has changed since then. Resume the job: it starts from the beginning.",
            code="checkpoint_stale",
        )
    parameters = run.lora.parameters()
    with torch.no_grad():
        for name, live in run.lora.state().items():
            live.copy_(checkpoint.adapter[name])
    run.optimizer.restore(moments)
    run.best = Best(
        **state["best"], tensors=[best[place].to(parameters[place].device, copy=True) for place in sorted(best)]
    )
    run.step = run.saved = state["step"]
    run.peak_rate, run.first_loss, run.final_loss = state["peak_rate"], state["first_loss"], state["final_loss"]
    run.eval_losses = [EvalLoss(step, loss) for step, loss in state["eval_losses"]]
    run.saved_at = run.clock.seconds
    torch.set_rng_state(checkpoint.tensors["random.cpu"].clone())
    if "random.cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["random.cuda"].clone(), parameters[0].device)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)

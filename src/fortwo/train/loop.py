"""One training run, as a generator: each `next` is one micro-step, so that whoever owns the device can take turns.

The run evaluates the adapter on the serving path as it goes, keeps the best one, and stops when its targets are met on
questions it did not train on. Knows no files, no jobs and no names; the caller publishes what comes out.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fortwo.data.render import Renderer
from fortwo.execution.backend import Backend
from fortwo.facts import metrics
from fortwo.nn.lora import Lora
from fortwo.prompts import Serving
from fortwo.records import (
    Checkpoint,
    Dataset,
    EvalLoss,
    Evaluated,
    Metric,
    MicroStepped,
    Phase,
    Plan,
    Report,
    Stepped,
    TrainEvent,
    Waiting,
)
from fortwo.train import checkpoints, courses
from fortwo.train.adamw import AdamW, AdamW8bit
from fortwo.train.adapter import lora_config
from fortwo.train.checkpoints import Clock, Run
from fortwo.train.escalation import WORDS, mix_at, next_round, told
from fortwo.train.evaluation import Served, diverged, validation_loss
from fortwo.train.objective import losses, micro_batches
from fortwo.train.options import IN_8_BITS
from fortwo.train.recipes import EXAM_QUESTIONS
from fortwo.train.schedule import learning_rate, rate_at
from fortwo.train.validation import patience_ends

EARLY_MARGIN = 0.5  # an exam is small: before the last step each fact must pass it by half of what is left to 1


class Base(Protocol):
    """A base model in memory."""

    @property
    def id(self) -> str: ...
    @property
    def backend(self) -> Backend: ...


@dataclass(frozen=True)
class Trained:
    """What a run ends with. metrics: the report's; actual: what happened, beside the plan's `computed`."""

    lora: Lora
    report: Report
    metrics: dict[str, Metric]
    actual: dict[str, Any]
    succeeded: bool


class Saving(Protocol):
    """Who keeps the checkpoints of a run, as the run sees it; may change at any moment.

    wanted: one is asked for now, and before the next step the run stands still until it is closed or `wanted` is
    withdrawn. busy: the last one is not kept yet, and no other is to come before.
    safe: set by the run; no step is under way, so closing it now costs no more than is not kept.
    """

    safe: bool

    @property
    def wanted(self) -> bool: ...
    @property
    def busy(self) -> bool: ...


def teach(
    base: Base,
    renderer: Renderer,
    dataset: Dataset,
    plan: Plan,
    serving: Serving,
    key: str,
    saving: Saving | None = None,
    resumed: Checkpoint | None = None,
    parent: Mapping[str, Tensor] | None = None,
) -> Generator[TrainEvent, None, Trained]:
    """Train by `plan`, from the tensors of `parent` (PEFT's names) if there is one, and evaluate what is served under
    `key`.

    Yields TrainEvents; `Waiting` while replies are on their way; with `saving`, Checkpoints as the plan says. From
    `resumed`, a checkpoint of a run by the same plan on the same rows, it goes on as if it had never stopped: on a CPU
    with as many threads, the adapter is the same bit for bit. Raises TrainingFailed (code nan_loss) when the loss or
    the adapter's logits are no numbers any more. The adapter is detached from `serving` at the end, however the run
    ends.
    """
    held = base.backend.decoder
    backend = base.backend.with_decoder(held.in_bf16() if plan["bf16"] else held.in_fp32())
    decoder = backend.decoder
    torch.manual_seed(plan["seed"])
    config = lora_config(plan)
    lora = (
        Lora.init(config, decoder.config, plan["seed"], decoder.device)
        if parent is None
        else Lora.from_state(config, decoder.config, parent, decoder.device)
    )
    clock, known = (Clock(), {}) if resumed is None else checkpoints.begin_again(resumed)
    served = Served(base.id, base.backend, renderer, serving, known)
    serving.attach(base.id, key, lora)
    try:
        yield Phase(
            "preparing", "The base answers what it must keep answering." if plan.objective == "override" else ""
        )
        began = time.perf_counter()
        course = yield from (
            courses.override(served, backend, dataset, plan)
            if plan.objective == "override"
            else courses.sft(served, dataset, plan)
        )
        clock.preparing += time.perf_counter() - began
        yield Phase("running")
        flat_N = lora.flatten()
        run = Run(lora, flat_N, _optimizer(flat_N, plan), clock)
        if resumed is not None:
            run.rounds = checkpoints.rounds_of(resumed)
            run.replies = checkpoints.replies(resumed)
            for step in range(1, resumed.step + 1):
                if course.correct is not None and step - 1 in run.replies:
                    yield from course.correct(key, run.replies[step - 1])
                run.draw(course.draw(mix_at(course.mix, run.rounds, step)))
            checkpoints.restore(run, resumed)
        actual = yield from _train(served, backend, run, course, plan, key, saving)
        yield Phase("evaluating")
        began = time.perf_counter()
        backend.release()
        seen = course.final is course.exam and actual["best_step"] == actual["steps"]
        report = yield from course.final.report(served, key, lora, changed=not seen)
        escalations = told(run.rounds, run.best.metrics)
        report = replace(report, eval_losses=tuple(run.eval_losses), escalations=escalations)
    finally:
        lora.freeze()
        backend.release()
        serving.detach(base.id, key)
    seconds, reporting = clock.seconds, time.perf_counter() - began
    actual |= {
        "seconds": seconds,
        "preparing_seconds": clock.preparing,
        "training_seconds": clock.training,
        "exam_seconds": seconds - clock.preparing - clock.training - reporting,
        "report_seconds": reporting,
        "bf16": plan["bf16"],
        "tokens": clock.tokens,
        "supervised_tokens": clock.supervised,
        "tokens_per_second": clock.tokens / clock.training if clock.training else 0.0,
        "reply_tokens_per_second": served.pace.tokens_per_second,
        "peak_bytes": peak_bytes(decoder.device),
    }
    return Trained(lora, report, report.metrics, actual, metrics.met(report.metrics, plan.targets))


def _optimizer(flat_N: Tensor, plan: Plan) -> AdamW:
    kind = AdamW8bit if plan["optim"] in IN_8_BITS else AdamW
    return kind(flat_N, (plan["adam_beta1"], plan["adam_beta2"]), plan["adam_epsilon"], plan["weight_decay"])


def _train(
    served: Served, backend: Backend, run: Run, course: courses.Course, plan: Plan, key: str, saving: Saving | None
) -> Generator[TrainEvent, None, dict[str, Any]]:
    """All steps that are left, with exams; leaves the best adapter in `run.lora`. Returns what happened.

    A step's checkpoint is made before its exam, so a run that goes on from there begins with that exam.
    """
    stopped = yield from _evaluated(served, backend, run, course, plan, key)
    why = "not needed"
    while stopped is None:
        if run.step == run.last(plan) and (why := (yield from _escalated(run, course, plan))):
            break
        if course.correct is not None and run.step in run.replies:
            run.replies[run.step] = yield from course.correct(key, run.replies[run.step])
        if saving is not None:
            yield from _stand_still(served, run, saving)
        run.step += 1
        rate = _rate(run, course, plan)
        run.peak_rate = max(run.peak_rate, rate)
        stepped = yield from _step(backend, run, course, plan, rate)
        run.final_loss = stepped.parts["learn"]
        if run.step == 1:
            run.first_loss = run.final_loss
        yield stepped
        since = run.clock.seconds - run.saved_at
        if saving is not None and checkpoints.due(plan, run.step, since, _exam_is_due(run, course, plan)):
            yield from _save(served, run, saving)
        stopped = yield from _evaluated(served, backend, run, course, plan, key)
    run.best.restore(run.lora.parameters())
    best_step = run.best.step if run.best.tensors else run.step
    validated = {one.step: one.loss for one in run.eval_losses}
    return {
        "steps": run.step,
        "best_step": best_step,
        "epochs": run.step / plan.computed["steps_per_epoch"],
        "stopped_by": stopped if stopped is not None and run.step < run.last(plan) else "steps",
        "peak_learning_rate": run.peak_rate,
        "first_loss": run.first_loss,
        "final_loss": run.final_loss,
        "largest_b": largest_b(run.lora),
        **({"escalation": why} if course.exam is not None else {}),
        **({"base_eval_loss": validated[0], "eval_loss": validated[best_step]} if validated else {}),
    }


def _exam_is_due(run: Run, course: courses.Course, plan: Plan) -> bool:
    if course.exam is None or run.step == 0:
        return False
    return run.step == run.last(plan) or (not run.rounds and run.step % plan["eval_every"] == 0)


def _escalated(run: Run, course: courses.Course, plan: Plan) -> Generator[TrainEvent, None, str]:
    """Behind the last step: begin one more round from the best state. Why there is none, "" where there is one."""
    if course.exam is None:
        return "off"
    clock = run.clock
    per_step = (clock.seconds - clock.preparing) / run.step
    found = next_round(plan, run.best.metrics, run.rounds, run.step, clock.seconds, per_step)
    if isinstance(found, str):
        return found
    run.rounds.append(found)
    run.best.restore(run.lora.parameters())
    raised = "; ".join(f"{lever}: {WORDS[lever]}" for lever in found.raised)
    yield Phase(
        "running", f"Targets are missed after {run.step} steps: {found.steps} more from the best, with {raised}."
    )
    return ""


def _rate(run: Run, course: courses.Course, plan: Plan) -> float:
    """Of the step that comes: by the plan, or in a round one more cycle that begins at the full rate."""
    if not run.rounds:
        return learning_rate(run.step - 1, plan)
    now = run.rounds[-1]
    peak = plan["learning_rate"] * mix_at(course.mix, run.rounds, run.step).rate
    return rate_at(run.step - 1 - now.step, schedule="cosine", rate=peak, warmup=0, steps=now.steps)


def _evaluated(
    served: Served, backend: Backend, run: Run, course: courses.Course, plan: Plan, key: str
) -> Generator[TrainEvent, None, str | None]:
    """The exam and the validation behind this step, if they are due. Why the run stops here, None where it goes on."""
    stopped = None
    if course.exam is not None and _exam_is_due(run, course, plan):
        backend.release()  # replies want the memory
        found = yield from course.exam.examine(served, key, run.lora, EXAM_QUESTIONS)
        yield Evaluated(run.step, {name: metric.value for name, metric in found.items()})
        shares = {name: metric.value for name, metric in found.items()}
        run.best.offer(found["score"].value, run.step, run.lora.parameters(), shares)
        taught = [fact.metrics for fact in course.exam.facts() if not fact.kept]
        stopped = "targets" if _well_met([found, *taught], plan.targets) else None
        if not _well_met(taught, {name: at for name, at in plan.targets.items() if name == "specificity"}):
            run.replies.setdefault(run.step, None)
    return (yield from _validated(served, run, course, plan)) or stopped


def _well_met(shares: Sequence[Mapping[str, Metric]], targets: Mapping[str, float]) -> bool:
    """By all of them: over many facts, one that is missed, or leaks, is no more than a few hundredths."""
    return all(metrics.met(one, targets, EARLY_MARGIN) for one in shares)


def _validated(served: Served, run: Run, course: courses.Course, plan: Plan) -> Generator[TrainEvent, None, str | None]:
    """The loss of the rows held back, if it is due behind this step (0: the base's). Why the run stops here."""
    steps = plan.computed["steps"]
    if course.validation is None or (run.step % plan["eval_steps"] and run.step != steps):
        return None
    if run.step in (one.step for one in run.eval_losses):
        return None
    loss = yield from validation_loss(served, run.lora, course.validation)
    if not math.isfinite(loss):
        raise diverged(f"step {run.step}: the loss on the rows held back is {loss:g}")
    run.eval_losses.append(EvalLoss(run.step, loss))
    yield Evaluated(run.step, {}, loss)
    if run.step == 0:
        return None
    if plan["load_best_model_at_end"]:
        run.best.offer(-loss, run.step, run.lora.parameters())
    stops = "early_stopping_patience" in {one.name for one in plan.settings}
    found = [one.loss for one in run.eval_losses[1:]]
    return "early_stopping" if stops and patience_ends(found, plan["early_stopping_patience"]) else None


def largest_b(lora: Lora) -> float:
    """The largest entry of all B, by size: near 0 the adapter does nothing, whatever A is."""
    return max(float(tensor.abs().max()) for name, tensor in lora.state().items() if "lora_B" in name)


def _stand_still(served: Served, run: Run, saving: Saving) -> Generator[TrainEvent, None, None]:
    """For as long as a checkpoint is wanted, with one behind the last step."""
    saving.safe = False  # before `wanted` is read: whoever asks for one and then sees `safe` is waited for
    while saving.wanted:
        if run.saved < run.step:
            yield from _save(served, run, saving)
        saving.safe = True
        yield Waiting()
        saving.safe = False


def _save(served: Served, run: Run, saving: Saving) -> Generator[TrainEvent, None, None]:
    while saving.busy:
        yield Waiting()
    yield checkpoints.capture(run, served)
    run.saved, run.saved_at = run.step, run.clock.seconds
    saving.safe = True


def _step(
    backend: Backend, run: Run, course: courses.Course, plan: Plan, rate: float
) -> Generator[TrainEvent, None, Stepped]:
    """One optimizer step in micro-steps: the same gradient as one pass over all its rows."""
    lora, clock = run.lora, run.clock
    mix = mix_at(course.mix, run.rounds, run.step)
    rows = course.draw(mix)
    run.draw(rows)
    learn_over = sum(sum(row.weights) for row in rows if not row.keep)
    keep_over = sum(row.supervised for row in rows if row.keep)
    learn = keep = 0.0
    tokens, seconds = 0, 0.0
    for batch in micro_batches(rows, course.prefix, plan["micro_step_tokens"]):
        if tokens:
            yield MicroStepped(tokens)
        began = time.perf_counter()
        found = losses(backend, lora, course.prefix, batch, plan["gradient_checkpointing"])
        total = found.learn / max(1, learn_over) + mix.keep_weight * found.keep / max(1, keep_over)
        total.backward()
        learn += float(found.learn.detach()) / max(1, learn_over)
        keep += float(found.keep.detach()) / max(1, keep_over)
        tokens += found.tokens
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    limit = plan["max_grad_norm"] if plan["max_grad_norm"] > 0 else math.inf
    norm = run.optimizer.gradient_norm()
    loss = learn + mix.keep_weight * keep
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise diverged(
            f"step {run.step}: the loss is {loss:g} and the gradient's norm {norm:g} at a learning rate of {rate:g}"
        )
    run.optimizer.step(rate, min(1.0, limit / (norm + 1e-6)))
    seconds += time.perf_counter() - began
    clock.training += seconds
    clock.tokens += tokens
    clock.supervised += sum(row.supervised for row in rows)
    return Stepped(
        step=run.step,
        steps=run.last(plan),
        loss=loss,
        learning_rate=rate,
        gradient_norm=norm,
        tokens=tokens,
        seconds=seconds,
        parts={"learn": learn, "keep": keep},
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory the process (on CUDA: its tensors) has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

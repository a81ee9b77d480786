"""The training loop of one run, as a generator: each `next` runs one micro-step, so that other work on the device can
run in between.

The run evaluates the adapter on the serving path from time to time, keeps the best state, and stops when its targets
are met on prompts that it did not train on. It knows no files, jobs or adapter names; the caller publishes the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fortwo.data.chat_template import ChatTemplateRenderer
from fortwo.execution.autotuning import peak_memory_bytes
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
    Phase,
    Plan,
    Report,
    Stepped,
    TrainEvent,
    TrainEvents,
    Waiting,
)
from fortwo.train import checkpoints, objectives
from fortwo.train.adamw import AdamW, AdamW8bit
from fortwo.train.adapter import lora_config
from fortwo.train.checkpoints import Clock, RunState
from fortwo.train.evaluation import Evaluator, ServedBase, divergence_error
from fortwo.train.losses import accumulate_gradients
from fortwo.train.objectives import PreparedObjective
from fortwo.train.options import EIGHT_BIT_OPTIMIZERS
from fortwo.train.preferences import prepare_preferences, with_accuracy
from fortwo.train.recipes import EVALUATION_QUESTIONS
from fortwo.train.retry_policy import LEVER_DESCRIPTIONS, escalation_records, mix_at_step, next_round
from fortwo.train.schedule import learning_rate, rate_at
from fortwo.train.validation import patience_exhausted
from fortwo.train.workers import GradientWorkers

_PREPARING = {
    "override": "The base answers the prompts whose replies must be preserved.",
    **dict.fromkeys(("dpo", "kto"), "The reference reads the answers that are compared."),
}
EARLY_MARGIN = 0.5  # to stop early, a share must exceed its target by this part of the distance to 1


class LoadedBase(Protocol):
    """A base model in memory."""

    @property
    def id(self) -> str: ...
    @property
    def backend(self) -> Backend: ...


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run. metrics: the report's; actual: what happened, to compare with the plan's `computed`.
    succeeded: whether all targets were met."""

    lora: Lora
    report: Report
    metrics: dict[str, Metric]
    actual: dict[str, Any]
    succeeded: bool


class CheckpointControl(Protocol):
    """How a run and the owner of its checkpoints communicate. The values may change at any moment. wanted: a checkpoint
    is requested; before its next step the run waits until it is closed or `wanted` becomes false. busy: the last
    checkpoint is still being written, and the run must not make another one yet. safe: set by the run: no step is in
    progress, so closing the run now loses nothing since its last checkpoint."""

    safe: bool

    @property
    def wanted(self) -> bool: ...
    @property
    def busy(self) -> bool: ...


def train(
    base: LoadedBase,
    renderer: ChatTemplateRenderer,
    dataset: Dataset,
    plan: Plan,
    serving: Serving,
    key: str,
    saving: CheckpointControl | None = None,
    resumed: Checkpoint | None = None,
    parent: Mapping[str, Tensor] | None = None,
    workers: GradientWorkers | None = None,
    proof: Serving | None = None,
) -> Generator[TrainEvent, None, TrainingResult]:
    """Train by `plan` and evaluate the adapter, which is served under `key`; parent: tensors to start from, by PEFT's
    names. Yields TrainEvents: `Waiting` until replies are complete and, if `saving` is given, Checkpoints as the plan
    says. resumed: a checkpoint of a run with the same plan and rows. The run continues from it as if it had never
    stopped; on a CPU with the same number of threads, the adapter is the same bit for bit. workers: they compute the
    gradients in place of this process. proof: what replies to users on another device, where `serving` does not; the
    report comes from there. The adapter is detached at the end, however the run ends. Raises
    TrainingFailed: code nan_loss if the loss or the adapter's logits become NaN or infinite, code checkpoint_stale if
    the plan now draws other rows than before `resumed`, or if the validation rows are others."""
    held = base.backend.decoder
    backend = base.backend.with_decoder(held.in_bf16() if plan["bf16"] else held.in_fp32())
    decoder = backend.decoder
    torch.manual_seed(plan["seed"])
    config = lora_config(plan)
    if parent is None:
        lora = Lora.init(config, decoder.config, plan["seed"], decoder.device)
        lora.take_magnitudes(decoder.frozen)
    else:
        lora = Lora.from_state(config, decoder.config, parent, decoder.device)
    clock, base_replies = (Clock(), {}) if resumed is None else checkpoints.clock_and_base_replies(resumed)
    served = ServedBase(base.id, base.backend, renderer, serving, serving.elsewhere, base_replies)
    serving.attach(base.id, key, lora)
    try:
        yield Phase("preparing", _PREPARING.get(plan.objective, ""))
        began = time.perf_counter()
        objective = yield from _prepare(served, backend, dataset, plan, resumed, parent)
        clock.preparing += time.perf_counter() - began
        if workers is not None:
            objective = replace(objective, accumulate=partial(workers.accumulate, objective.prefix))
        yield Phase("running")
        flat_N = lora.flatten()
        digest = None if dataset.validation is None else dataset.validation.digest
        optimizer, reference_N = _optimizer(flat_N, plan), objective.reference_N
        run = RunState(lora, flat_N, optimizer, clock, reference_N=reference_N, validation_digest=digest)
        if resumed is not None:
            run.retry_rounds = checkpoints.retry_rounds(resumed)
            run.on_policy_replies = checkpoints.on_policy_replies(resumed)
            for step in range(1, resumed.step + 1):
                if objective.refresh_on_policy is not None and step - 1 in run.on_policy_replies:
                    yield from objective.refresh_on_policy(key, run.on_policy_replies[step - 1])
                run.record_rows(objective.sample_rows(mix_at_step(objective.mix, run.retry_rounds, step)))
            checkpoints.restore(run, resumed)
        actual = yield from _train(served, backend, run, objective, plan, key, saving)
        yield Phase("evaluating")
        began = time.perf_counter()
        backend.release()
        evaluated = objective.final_evaluator is objective.evaluator and actual["best_step"] == actual["steps"]
        if proof is None:
            report = yield from objective.final_evaluator.report(served, key, lora, changed=not evaluated)
        else:
            users = ServedBase(base.id, base.backend, renderer, proof, elsewhere=True)
            report = yield from _prove(objective.final_evaluator, users, key, lora)
        if objective.judge is not None:
            report = with_accuracy(report, (yield from objective.judge(lora)))
        escalations = escalation_records(run.retry_rounds, run.best.metrics)
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
        "peak_bytes": peak_memory_bytes(decoder.device),
    }
    return TrainingResult(lora, report, report.metrics, actual, metrics.targets_met(report.metrics, plan.targets))


def _prove(evaluator: Evaluator, served: ServedBase, key: str, lora: Lora) -> TrainEvents[Report]:
    """The report of base and adapter as they are served on another device than the one they were compared on so far."""
    served.serving.attach(served.base, key, lora)
    try:
        evaluator.forget_replies()
        return (yield from evaluator.report(served, key, lora))
    finally:
        served.serving.detach(served.base, key)


def _prepare(
    served: ServedBase,
    backend: Backend,
    dataset: Dataset,
    plan: Plan,
    resumed: Checkpoint | None,
    parent: Mapping[str, Tensor] | None,
) -> TrainEvents[PreparedObjective]:
    if plan.objective == "override":
        return (yield from objectives.prepare_override(served, backend, dataset, plan))
    if plan.objective == "sft":
        return (yield from objectives.prepare_sft(served, dataset, plan))
    decoder = backend.decoder
    start = None if parent is None else Lora.from_state(lora_config(plan), decoder.config, parent, decoder.device)
    known = None if resumed is None else checkpoints.reference_log_probs(resumed)
    return (yield from prepare_preferences(served, backend, dataset, plan, start, known))


def _optimizer(flat_N: Tensor, plan: Plan) -> AdamW:
    kind = AdamW8bit if plan["optim"] in EIGHT_BIT_OPTIMIZERS else AdamW
    return kind(flat_N, (plan["adam_beta1"], plan["adam_beta2"]), plan["adam_epsilon"], plan["weight_decay"])


def _train(
    served: ServedBase,
    backend: Backend,
    run: RunState,
    objective: PreparedObjective,
    plan: Plan,
    key: str,
    saving: CheckpointControl | None,
) -> Generator[TrainEvent, None, dict[str, Any]]:
    """Run the remaining steps and their evaluations, and leave the best adapter in `run.lora`. Returns what happened.
    The checkpoint of a step is made before its evaluation, so a run that is resumed from it begins with the
    evaluation."""
    stopped = yield from _evaluate(served, backend, run, objective, plan, key)
    why = "not needed"
    while stopped is None:
        if run.step == run.last_step(plan) and (why := (yield from _start_retry_round(run, objective, plan))):
            break
        if objective.refresh_on_policy is not None and run.step in run.on_policy_replies:
            replies = run.on_policy_replies[run.step]
            run.on_policy_replies[run.step] = yield from objective.refresh_on_policy(key, replies)
        if saving is not None:
            yield from _wait_while_wanted(served, run, saving)
        run.step += 1
        rate = _learning_rate(run, objective, plan)
        run.peak_rate = max(run.peak_rate, rate)
        stepped = yield from _step(backend, run, objective, plan, rate)
        run.final_loss = stepped.parts["learn"]
        if run.step == 1:
            run.first_loss = run.final_loss
        yield stepped
        since = run.clock.seconds - run.saved_at
        if saving is not None and checkpoints.is_due(plan, run.step, since, _evaluation_due(run, objective, plan)):
            yield from _save(served, run, saving)
        stopped = yield from _evaluate(served, backend, run, objective, plan, key)
    run.best.load_into(run.lora.parameters())
    best_step = run.best.step if run.best.tensors else run.step
    validated = {one.step: one.loss for one in run.eval_losses}
    return {
        "steps": run.step,
        "best_step": best_step,
        "epochs": run.step / plan.computed["steps_per_epoch"],
        "stopped_by": stopped if stopped is not None and run.step < run.last_step(plan) else "steps",
        "peak_learning_rate": run.peak_rate,
        "first_loss": run.first_loss,
        "final_loss": run.final_loss,
        "largest_b": largest_b(run.lora),
        **({"escalation": why} if objective.evaluator is not None else {}),
        **({"base_eval_loss": validated[0], "eval_loss": validated[best_step]} if validated else {}),
    }


def _evaluation_due(run: RunState, objective: PreparedObjective, plan: Plan) -> bool:
    if objective.evaluator is None or run.step == 0:
        return False
    return run.step == run.last_step(plan) or (not run.retry_rounds and run.step % plan["eval_every"] == 0)


def _start_retry_round(run: RunState, objective: PreparedObjective, plan: Plan) -> TrainEvents[str]:
    """After the last step, start a retry round from the best state. Returns "", or the reason why there is none."""
    if objective.evaluator is None:
        return "off"
    clock = run.clock
    per_step = (clock.seconds - clock.preparing) / run.step
    found = next_round(plan, run.best.metrics, run.retry_rounds, run.step, clock.seconds, per_step)
    if isinstance(found, str):
        return found
    run.retry_rounds.append(found)
    run.best.load_into(run.lora.parameters())
    raised = "; ".join(f"{lever}: {LEVER_DESCRIPTIONS[lever]}" for lever in found.raised)
    message = f"Targets are missed after {run.step} steps. {found.steps} more steps start from the best adapter, with"
    yield Phase("running", f"{message} {raised}.")
    return ""


def _learning_rate(run: RunState, objective: PreparedObjective, plan: Plan) -> float:
    """The rate of the next step: the plan's, or in a retry round that of one more cosine cycle from the full rate."""
    if not run.retry_rounds:
        return learning_rate(run.step - 1, plan)
    now = run.retry_rounds[-1]
    peak = plan["learning_rate"] * mix_at_step(objective.mix, run.retry_rounds, run.step).rate
    return rate_at(run.step - 1 - now.step, schedule="cosine", rate=peak, warmup=0, steps=now.steps)


def _evaluate(
    served: ServedBase, backend: Backend, run: RunState, objective: PreparedObjective, plan: Plan, key: str
) -> TrainEvents[str | None]:
    """Run the evaluation and the validation of this step if they are due. Returns why the run stops here, or None."""
    stopped = None
    if objective.evaluator is not None and _evaluation_due(run, objective, plan):
        backend.release()  # frees memory for the replies
        found = yield from objective.evaluator.evaluate(served, key, run.lora, EVALUATION_QUESTIONS)
        shares = {name: metric.value for name, metric in found.items()}
        yield Evaluated(run.step, dict(shares), samples=objective.evaluator.samples())
        run.best.update(found["score"].value, run.step, run.lora.parameters(), shares)
        taught = [fact.metrics for fact in objective.evaluator.fact_reports() if not fact.kept]
        stopped = "targets" if _targets_met_with_margin([found, *taught], plan.targets) else None
        specificity = {name: share for name, share in plan.targets.items() if name == "specificity"}
        if not _targets_met_with_margin(taught, specificity):
            run.on_policy_replies.setdefault(run.step, None)
    return (yield from _validate(served, run, objective, plan)) or stopped


def _targets_met_with_margin(shares: Sequence[Mapping[str, Metric]], targets: Mapping[str, float]) -> bool:
    """Whether each of the shares meets the targets by a margin. Facts are checked one by one, since one missed fact of
    many hardly changes the total."""
    return all(metrics.targets_met(one, targets, EARLY_MARGIN) for one in shares)


def _validate(served: ServedBase, run: RunState, objective: PreparedObjective, plan: Plan) -> TrainEvents[str | None]:
    """Measure the loss on the validation rows if it is due after this step (0: the base's loss). Returns why the run
    stops here, or None."""
    steps = plan.computed["steps"]
    if objective.validate is None or (run.step % plan["eval_steps"] and run.step != steps):
        return None
    if run.step in (one.step for one in run.eval_losses):
        return None
    found = yield from objective.validate(run.lora)
    loss = found.loss
    if not math.isfinite(loss):
        raise divergence_error(f"step {run.step}: the loss on the validation rows is {loss:g}")
    run.eval_losses.append(EvalLoss(run.step, loss))
    rewarded = found.accuracy is not None and run.step > 0  # before the first step no answer has a reward
    yield Evaluated(run.step, {"accuracy": found.accuracy.value} if found.accuracy and rewarded else {}, loss)
    if run.step == 0:
        return None
    if plan["load_best_model_at_end"]:
        run.best.update(-loss, run.step, run.lora.parameters())
    stops = "early_stopping_patience" in {one.name for one in plan.settings}
    losses = [one.loss for one in run.eval_losses[1:]]
    return "early_stopping" if stops and patience_exhausted(losses, plan["early_stopping_patience"]) else None


def largest_b(lora: Lora) -> float:
    """The largest absolute value in all B matrices. If it is near 0, the adapter has no effect, whatever A is."""
    return max(float(tensor.abs().max()) for name, tensor in lora.state().items() if "lora_B" in name)


def _wait_while_wanted(served: ServedBase, run: RunState, saving: CheckpointControl) -> TrainEvents[None]:
    """Wait for as long as a checkpoint is wanted, after making one of the last step."""
    saving.safe = False  # set before `wanted` is read, so that nobody can request a checkpoint and see a stale `safe`
    while saving.wanted:
        if run.saved_step < run.step:
            yield from _save(served, run, saving)
        saving.safe = True
        yield Waiting()
        saving.safe = False


def _save(served: ServedBase, run: RunState, saving: CheckpointControl) -> TrainEvents[None]:
    while saving.busy:
        yield Waiting()
    yield checkpoints.capture(run, served)
    run.saved_step, run.saved_at = run.step, run.clock.seconds
    saving.safe = True


def _step(
    backend: Backend, run: RunState, objective: PreparedObjective, plan: Plan, rate: float
) -> Generator[TrainEvent, None, Stepped]:
    """One optimizer step in micro-steps, with the same gradient as one pass over all its rows."""
    lora, clock = run.lora, run.clock
    mix = mix_at_step(objective.mix, run.retry_rounds, run.step)
    rows = objective.sample_rows(mix)
    run.record_rows(rows)
    accumulate = objective.accumulate
    found = yield from (
        accumulate_gradients(backend, lora, objective.prefix, rows, mix.kl_weight, plan)
        if accumulate is None
        else accumulate(lora, rows, mix)
    )
    loss, seconds = found.loss, found.seconds
    began = time.perf_counter()
    limit = plan["max_grad_norm"] if plan["max_grad_norm"] > 0 else math.inf
    norm = run.optimizer.gradient_norm()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise divergence_error(
            f"step {run.step}: the loss is {loss:g} and the gradient's norm {norm:g} at a learning rate of {rate:g}"
        )
    run.optimizer.step(rate, min(1.0, limit / (norm + 1e-6)))
    seconds += time.perf_counter() - began
    clock.training += seconds
    clock.tokens += found.tokens
    clock.supervised += found.supervised
    return Stepped(
        step=run.step,
        steps=run.last_step(plan),
        loss=loss,
        learning_rate=rate,
        gradient_norm=norm,
        tokens=found.tokens,
        seconds=seconds,
        parts=found.parts,
        metrics=found.metrics,
    )

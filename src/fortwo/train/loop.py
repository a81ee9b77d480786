"""One training run, as a generator: each `next` is one micro-step, so that whoever owns the device can take turns.

The run evaluates the adapter on the serving path as it goes, keeps the best one, and stops when its targets are met on
questions it did not train on. Knows no files, no jobs and no names; the caller publishes what comes out.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fortwo.data.render import Renderer
from fortwo.facts import metrics
from fortwo.models.decoder import Decoder
from fortwo.models.lora import Lora, LoraConfig
from fortwo.records import (
    Dataset,
    Evaluated,
    Metric,
    MicroStepped,
    Phase,
    Plan,
    Report,
    Serving,
    Stepped,
    TrainEvent,
)
from fortwo.train import courses
from fortwo.train.evaluation import Served, diverged
from fortwo.train.objective import losses, micro_batches
from fortwo.train.schedule import learning_rate

MICRO_TOKENS = 512  # bounds how long a micro-step holds the device
EARLY_MARGIN = 0.5  # an exam is small: before the last step it must be passed by half of what is left to 1
EXAM_QUESTIONS = 10  # training questions in an exam; the report asks them all


class Base(Protocol):
    """A base model in memory."""

    @property
    def id(self) -> str: ...
    @property
    def decoder(self) -> Decoder: ...


@dataclass(frozen=True)
class Trained:
    """What a run ends with. metrics: the report's; actual: what happened, beside the plan's `computed`."""

    lora: Lora
    report: Report
    metrics: dict[str, Metric]
    actual: dict[str, Any]
    succeeded: bool


@dataclass
class _Clock:
    """Seconds of the run by phase; waiting for the serving path counts where it happens."""

    began: float = field(default_factory=time.perf_counter)
    training: float = 0.0
    tokens: int = 0
    supervised: int = 0


@dataclass
class _Best:
    """The best adapter so far, by score."""

    score: float = -1.0
    step: int = 0
    tensors: list[Tensor] = field(default_factory=list)

    def offer(self, score: float, step: int, parameters: list[Tensor]) -> None:
        if score >= self.score:
            self.score, self.step = score, step
            self.tensors = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(parameters, self.tensors, strict=bool(self.tensors)):
                parameter.copy_(tensor)


def teach(
    base: Base, renderer: Renderer, dataset: Dataset, plan: Plan, serving: Serving, key: str
) -> Generator[TrainEvent, None, Trained]:
    """Train by `plan` and evaluate what is served under `key`.

    Yields TrainEvents; `Waiting` while replies are on their way. Raises TrainingFailed (code nan_loss) when the loss
    or the adapter's logits are no numbers any more. The adapter is detached from `serving` at the end, however the run
    ends.
    """
    decoder = base.decoder.in_bf16() if plan["bf16"] else base.decoder.in_fp32()
    torch.manual_seed(plan["seed"])
    lora = Lora.init(lora_config(plan), decoder.config, plan["seed"], decoder.device)
    parameters = lora.parameters()
    served = Served(base.id, base.decoder, renderer, serving)
    serving.attach(base.id, key, lora)
    try:
        clock = _Clock()
        yield Phase(
            "preparing", "The base answers what it must keep answering." if plan.objective == "override" else ""
        )
        course = yield from (
            courses.override(served, decoder, dataset, plan)
            if plan.objective == "override"
            else courses.sft(served, dataset, plan)
        )
        prepared = time.perf_counter() - clock.began
        yield Phase("running")
        actual = yield from _train(served, decoder, lora, course, plan, key, clock)
        yield Phase("evaluating")
        seen = course.final is course.exam and actual["best_step"] == actual["steps"]
        report = yield from course.final.report(served, key, lora, changed=not seen)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        serving.detach(base.id, key)
    actual |= {
        "seconds": time.perf_counter() - clock.began,
        "preparing_seconds": prepared,
        "training_seconds": clock.training,
        "tokens": clock.tokens,
        "supervised_tokens": clock.supervised,
        "tokens_per_second": clock.tokens / clock.training if clock.training else 0.0,
        "peak_bytes": peak_bytes(decoder.device),
    }
    return Trained(lora, report, report.metrics, actual, metrics.met(report.metrics, plan.targets))


def lora_config(plan: Plan) -> LoraConfig:
    return LoraConfig(
        r=plan["r"],
        alpha=plan["lora_alpha"],
        dropout=plan["lora_dropout"],
        target_modules=tuple(plan["target_modules"]),
    )


def _train(
    served: Served, decoder: Decoder, lora: Lora, course: courses.Course, plan: Plan, key: str, clock: _Clock
) -> Generator[TrainEvent, None, dict[str, Any]]:
    """All steps, with exams; leaves the best adapter in `lora`. Returns what happened."""
    parameters = lora.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=plan["learning_rate"],
        betas=(plan["adam_beta1"], plan["adam_beta2"]),
        eps=plan["adam_epsilon"],
        weight_decay=plan["weight_decay"],
        fused=True,
    )
    steps, best = plan.computed["steps"], _Best()
    losses_seen: list[float] = []
    peak, stopped_by, step = 0.0, "steps", 0
    for step in range(1, steps + 1):
        rate = learning_rate(step - 1, plan)
        peak = max(peak, rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        stepped = yield from _step(decoder, lora, course, plan, optimizer, clock, step, rate)
        losses_seen.append(stepped.parts["learn"])
        yield stepped
        if course.exam is not None and (step % plan["eval_every"] == 0 or step == steps):
            found = yield from course.exam.examine(served, key, lora, EXAM_QUESTIONS)
            yield Evaluated(step, {name: metric.value for name, metric in found.items()})
            best.offer(found["score"].value, step, parameters)
            if metrics.met(found, plan.targets, EARLY_MARGIN):
                stopped_by = "targets" if step < steps else "steps"
                break
    best.restore(parameters)
    return {
        "steps": step,
        "best_step": best.step if course.exam is not None else step,
        "epochs": step / plan.computed["steps_per_epoch"],
        "stopped_by": stopped_by,
        "peak_learning_rate": peak,
        "first_loss": losses_seen[0],
        "final_loss": losses_seen[-1],
    }


def _step(
    decoder: Decoder,
    lora: Lora,
    course: courses.Course,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    clock: _Clock,
    step: int,
    rate: float,
) -> Generator[TrainEvent, None, Stepped]:
    """One optimizer step in micro-steps: the same gradient as one pass over all its rows."""
    parameters = lora.parameters()
    rows = course.draw()
    learn_over = sum(row.supervised for row in rows if not row.keep)
    keep_over = sum(row.supervised for row in rows if row.keep)
    learn = keep = 0.0
    tokens, seconds = 0, 0.0
    for batch in micro_batches(rows, course.prefix, MICRO_TOKENS):
        if tokens:
            yield MicroStepped(tokens)
        began = time.perf_counter()
        found = losses(decoder, lora, course.prefix, batch)
        total = found.learn / max(1, learn_over) + course.keep_weight * found.keep / max(1, keep_over)
        total.backward()
        learn += float(found.learn.detach()) / max(1, learn_over)
        keep += float(found.keep.detach()) / max(1, keep_over)
        tokens += found.tokens
        seconds += time.perf_counter() - began
    began = time.perf_counter()
    limit = plan["max_grad_norm"] if plan["max_grad_norm"] > 0 else math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    loss = learn + course.keep_weight * keep
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise diverged(
            f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g} at a learning rate of {rate:g}"
        )
    optimizer.step()
    optimizer.zero_grad()
    seconds += time.perf_counter() - began
    clock.training += seconds
    clock.tokens += tokens
    clock.supervised += learn_over + keep_over
    return Stepped(
        step=step,
        steps=plan.computed["steps"],
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

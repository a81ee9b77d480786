"""The objectives that train on preferences: dpo and orpo on pairs of answers, kto on answers with a label.

What the reference gives to an answer is computed once, with the adapter off, so no second copy of the weights is
needed. The rows of a pair lie in one pack, which computes what they share at the beginning once.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import torch
from torch import Tensor

from fortwo.data.spool import Spool
from fortwo.execution.backend import Backend
from fortwo.facts import metrics
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import Pack, pack, trained_prefix
from fortwo.records import Dataset, Example, Metric, MicroStepped, Plan, Report, TrainEvents
from fortwo.train.evaluation import Evaluator, ServedBase
from fortwo.train.losses import PREPARE_TOKENS, Accumulated, Row, batches_within, head_losses
from fortwo.train.objectives import (
    RENDER_BATCH,
    PreparedObjective,
    Validated,
    changed_rendering,
    index_batches,
    parent_questions,
    retention_questions,
)
from fortwo.train.preference_losses import dpo_losses, kto_losses, odds_ratio_losses
from fortwo.train.preference_plan import rows_together
from fortwo.train.preference_sums import PreferenceSums
from fortwo.train.recipes import JUDGED, REPLY_TOKENS
from fortwo.train.retry_policy import RowMix
from fortwo.train.shares import WHOLE, Share
from fortwo.train.validation import validation_indices

Unit = tuple[Row, ...]  # what one loss is of: a chosen answer and its rejected one, or one answer with a label


@dataclass
class _Rows:
    """Answers in the order of the dataset; those of a pair follow each other. Each has a label and what the reference
    gives it."""

    size: int  # answers of a unit
    spool: Spool = field(default_factory=Spool)
    labels: list[bool] = field(default_factory=list)
    reference: array[float] = field(default_factory=lambda: array("f"))

    def __len__(self) -> int:
        return len(self.spool) // self.size

    def render(self, served: ServedBase, answers: Sequence[Example]) -> None:
        """Add the answers of a unit."""
        for answer in answers:
            ((tokens, supervised),) = served.renderer.training_rows(answer)
            self.spool.append(tokens, supervised)
            self.labels.append(answer.label is True)

    def unit(self, number: int) -> Unit:
        return tuple(self.row(number * self.size + place) for place in range(self.size))

    def row(self, number: int) -> Row:
        reference = self.reference[number] if self.reference else 0.0
        return replace(Row.from_mask(*self.spool[number]), reference=reference, desirable=self.labels[number])


def prepare_preferences(
    served: ServedBase,
    backend: Backend,
    dataset: Dataset,
    plan: Plan,
    parent: Lora | None = None,
    reference_N: Tensor | None = None,
) -> TrainEvents[PreparedObjective]:
    """Every pair or answer, in a new random order in each epoch. backend: the one that is trained on, and with the
    adapter off, the reference. parent: the adapter from which the run starts; then the reference has it. reference_N:
    the log probabilities that a checkpoint of this run has. Raises InvalidRequest as `prepare_sft` does."""
    training, validation = yield from _render(served, dataset, plan)
    learned = Preferences(backend, plan, () if parent is None else (Segment(parent),))
    if learned.has_reference:
        if reference_N is None:
            for rows in (training, validation):
                yield from learned.add_reference(rows)
        else:
            count = len(training.spool)
            training.reference.extend(reference_N[:count].tolist())
            validation.reference.extend(reference_N[count:].tolist())
    size = plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"]
    batches = index_batches(len(training), size, Random(plan["seed"]))

    def sample_rows(mix: RowMix) -> list[Row]:
        drawn = [training.unit(number) for number in next(batches)]
        return [row for unit in (*drawn, *learned.mismatched(drawn)) for row in unit]

    judged = validation if len(validation) else training

    def judge(lora: Lora) -> TrainEvents[Metric]:
        every = max(1, -(-len(judged) // JUDGED))
        chosen = range(0, len(judged), every) if judged is training else range(len(judged))
        found = yield from learned.measure(lora, [judged.unit(number) for number in chosen])
        assert found.accuracy is not None
        return found.accuracy

    def validate(lora: Lora) -> TrainEvents[Validated]:
        return (yield from learned.measure(lora, [validation.unit(number) for number in range(len(validation))]))

    questions = (*retention_questions(), *parent_questions(dataset, plan))
    return PreparedObjective(
        prefix=training.spool.prefix,
        mix=RowMix(),
        sample_rows=sample_rows,
        evaluator=None,
        final_evaluator=Evaluator(questions, REPLY_TOKENS),
        validate=validate if len(validation) else None,
        accumulate=learned.accumulate,
        judge=judge,
        reference_N=torch.tensor([*training.reference, *validation.reference]) if learned.has_reference else None,
    )


def with_accuracy(report: Report, accuracy: Metric) -> Report:
    """The report of a run on preferences. A score would compare it with a base that has no rewards of its own."""
    found, base = (
        {name: one for name, one in of.items() if name != "score"} for of in (report.metrics, report.base_metrics)
    )
    return replace(report, metrics={"accuracy": accuracy, **found}, base_metrics=base)


def _render(served: ServedBase, dataset: Dataset, plan: Plan) -> TrainEvents[tuple[_Rows, _Rows]]:
    """The rows to train on and the validation rows."""
    validation_rows, size = plan.computed.get("validation_rows", 0), 1 if plan.objective == "kto" else 2
    held = validation_rows if dataset.validation is None else 0
    expected = plan.computed["rows"] + held
    indices = validation_indices(expected, held, plan["seed"], rows_together(plan.objective, dataset))
    training, validation = _Rows(size), _Rows(size)
    for seen, answers in enumerate(_units(dataset.examples, size)):
        if seen % RENDER_BATCH == 0:
            yield MicroStepped(0)
        (validation if seen in indices else training).render(served, answers)
    if len(training) + len(validation) != expected:
        raise changed_rendering(len(training) + len(validation), expected)
    if dataset.validation is not None:
        for seen, answers in enumerate(_units(dataset.validation.examples, size)):
            if seen % RENDER_BATCH == 0:
                yield MicroStepped(0)
            validation.render(served, answers)
        if len(validation) != validation_rows:
            raise changed_rendering(len(validation), validation_rows, "validation_dataset")
    return training, validation


def _units(examples: Iterable[Example], size: int) -> Iterator[Sequence[Example]]:
    """The answers of each unit."""
    for example in examples:
        yield from [example.sides] if size == 2 else ((side,) for side in example.sides)


@dataclass(frozen=True)
class Preferences:
    """How a run with this plan learns. reference: the adapters of the reference. share: the part of each step that this
    process computes."""

    backend: Backend
    plan: Plan
    reference: Sequence[Segment]
    share: Share = WHOLE

    @property
    def has_reference(self) -> bool:
        return self.plan.objective == "kto" or (self.plan.objective == "dpo" and not self.plan["reference_free"])

    @property
    def estimates_kl(self) -> bool:
        return self.plan.objective == "kto" and self.plan["loss_type"] == "kto"

    def add_reference(self, rows: _Rows) -> TrainEvents[None]:
        """Compute what the reference gives to each answer."""
        for first in range(0, len(rows), RENDER_BATCH):
            units = [rows.unit(number) for number in range(first, min(first + RENDER_BATCH, len(rows)))]
            rows.reference.extend((yield from self.log_probs(units, self.reference)))

    def mismatched(self, drawn: Sequence[Unit]) -> list[Unit]:
        """For KTO's estimate of the divergence, each prompt of a step with the answer to the one before it. A prompt
        that is alone has none."""
        if not self.estimates_kl or len(drawn) < 2:
            return []
        rows = [row for (row,) in drawn]
        return [(self._with_answer(row, rows[place - 1]),) for place, row in enumerate(rows)]

    def _with_answer(self, row: Row, other: Row) -> Row:
        """The prompt of a row and the answer of another, as far as the context holds them."""
        tokens = (*row.tokens[: row.start], *other.tokens[other.start :])[: self.backend.decoder.config.context]
        moved = frozenset(place - other.start + row.start for place in other.unsupervised)
        return Row(tokens, row.start, unsupervised=frozenset(place for place in moved if place < len(tokens)))

    def accumulate(self, lora: Lora, rows: list[Row], mix: RowMix) -> TrainEvents[Accumulated]:
        """Add the gradient of the mean loss of the units among these rows to the adapter's, or the share of it that
        this process computes; what is returned is about all units."""
        units, others = self._split(rows)
        found = PreferenceSums()
        kl = yield from self._divergence(lora, others, found)
        nll_tokens = sum(len(chosen.tokens) - 1 for chosen, *_ in units) if self.plan.objective == "orpo" else 0
        for batch in self._batches(self.share.of(units, _tokens)):
            if found.tokens:
                yield MicroStepped(found.tokens)
            began = time.perf_counter()
            packed = self._pack(batch)
            final_TD = self.backend.train(packed, lora, self.plan["gradient_checkpointing"])
            loss = self._loss(final_TD, packed, batch, kl, len(units), nll_tokens, found)
            loss.backward()
            found.count(packed, began)
        found.add_up(self.share)
        return Accumulated(
            found.loss,
            {"learn": found.loss},
            found.tokens,
            found.seconds,
            sum(row.supervised for unit in units for row in unit),
            found.metrics(self.plan.objective, kl if self.estimates_kl else None),
        )

    def measure(self, lora: Lora, units: Sequence[Unit]) -> TrainEvents[Validated]:
        """The mean loss of these units and the share that is judged as they say, without a gradient."""
        found = PreferenceSums()
        kl = yield from self._divergence(lora, self.mismatched(units), found)
        nll_tokens = sum(len(chosen.tokens) - 1 for chosen, *_ in units) if self.plan.objective == "orpo" else 0
        for batch in self._batches(units):
            with torch.no_grad():
                packed = self._pack(batch)
                final_TD = self.backend.forward(packed, [Segment(lora)])
                self._loss(final_TD, packed, batch, kl, len(units), nll_tokens, found)
            yield MicroStepped(len(packed.tokens_T))
        return Validated(found.loss, metrics.share(found.right, len(units)))

    def _split(self, rows: Sequence[Row]) -> tuple[list[Unit], list[Unit]]:
        """The units among the rows of a step, and the mismatched ones."""
        if self.plan.objective != "kto":
            return list(zip(rows[::2], rows[1::2], strict=True)), []
        half = len(rows) // 2 if self.estimates_kl and len(rows) > 1 else len(rows)
        return [(row,) for row in rows[:half]], [(row,) for row in rows[half:]]

    def _divergence(self, lora: Lora, others: Sequence[Unit], found: PreferenceSums) -> TrainEvents[float]:
        """KTO's estimate: the mean log ratio of mismatched answers, at least 0."""
        if not others:
            return 0.0
        own = self.share.of(others, _tokens)
        ours = yield from self.log_probs(own, [Segment(lora)], found)
        theirs = yield from self.log_probs(own, self.reference, found)
        (total,) = self.share.add_up([sum(our - their for our, their in zip(ours, theirs, strict=True))])
        return max(0.0, total / len(others))

    def log_probs(
        self, units: Sequence[Unit], segments: Sequence[Segment], counted: PreferenceSums | None = None
    ) -> TrainEvents[list[float]]:
        """The log probability of each answer with these adapters, without a gradient. Tokens and time are counted."""
        counted = PreferenceSums() if counted is None else counted
        found: list[float] = []
        for batch in self._batches(units, PREPARE_TOKENS):
            began = time.perf_counter()
            with torch.no_grad():
                packed, rows = self._pack(batch), [row for unit in batch for row in unit]
                final_TD = self.backend.forward(packed, segments)
                each = self._token_log_probs(final_TD, packed, rows, [row.supervised_positions for row in rows])
                found += [float(tokens_N.sum()) for tokens_N in each]
            counted.count(packed, began)
            yield MicroStepped(len(packed.tokens_T))
        return found

    def _batches(self, units: Sequence[Unit], budget: int | None = None) -> Iterator[list[Unit]]:
        """The units in order, in groups of at most so many tokens (by default the plan's). A longer one is alone."""
        most = self.plan["micro_step_tokens"] if budget is None else budget
        return batches_within(units, most, _tokens)

    def _pack(self, batch: Sequence[Unit]) -> Pack:
        decoder, rows = self.backend.decoder, [row.tokens for unit in batch for row in unit]
        return pack(rows, decoder.device, trained_prefix(rows, decoder.config))

    def _token_log_probs(
        self, final_TD: Tensor, packed: Pack, rows: Sequence[Row], positions: Sequence[Sequence[int]]
    ) -> tuple[Tensor, ...]:
        """For each row the log probabilities of its tokens at these positions."""
        places = [packed.place(n, place - 1) for n, of_row in enumerate(positions) for place in of_row]
        wanted = [row.tokens[place] for row, of_row in zip(rows, positions, strict=True) for place in of_row]
        wanted_N = torch.tensor(wanted, device=final_TD.device)
        losses_N = head_losses(final_TD[places], self.backend.decoder.head_VD, wanted_N)
        found: tuple[Tensor, ...] = (-losses_N).split([len(of_row) for of_row in positions])
        return found

    def _loss(
        self,
        final_TD: Tensor,
        packed: Pack,
        batch: Sequence[Unit],
        kl: float,
        units: int,
        nll_tokens: int,
        found: PreferenceSums,
    ) -> Tensor:
        """The part of these units in the loss of a step with so many, (). nll_tokens: over which ORPO's cross-entropy
        is a mean, those of prompts included, as in TRL."""
        rows, plan = [row for unit in batch for row in unit], self.plan
        lengths_R = torch.tensor([row.supervised for row in rows], device=final_TD.device)
        if plan.objective == "orpo":
            whole = [
                range(1, len(row.tokens)) if n % 2 == 0 else row.supervised_positions for n, row in enumerate(rows)
            ]
            tokens = self._token_log_probs(final_TD, packed, rows, whole)
            answers = [
                part_N[[place - 1 for place in row.supervised_positions]] if n % 2 == 0 else part_N
                for n, (part_N, row) in enumerate(zip(tokens, rows, strict=True))
            ]
            means_R = torch.stack([part_N.mean() for part_N in answers])
            ratio_N = odds_ratio_losses(means_R[::2], means_R[1::2], plan["beta"])
            nll = -torch.stack([part_N.sum() for part_N in tokens[::2]]).sum() / nll_tokens
            found.add_pairs(means_R.detach(), plan["beta"] * means_R.detach())
            found.nll += float(nll.detach())
            loss = nll + ratio_N.sum() / units
        else:
            positions = [row.supervised_positions for row in rows]
            log_probs_R = torch.stack([p.sum() for p in self._token_log_probs(final_TD, packed, rows, positions)])
            reference_R = torch.tensor([row.reference for row in rows], device=final_TD.device)
            ratios_R = log_probs_R.float() - reference_R
            rewards_R = plan["beta"] * ratios_R.detach()
            if plan.objective == "dpo":
                smoothing = plan["label_smoothing"]
                kind = {"loss_type": plan["loss_type"], "beta": plan["beta"], "label_smoothing": smoothing}
                loss_N = dpo_losses(ratios_R[::2], ratios_R[1::2], lengths_R[::2], lengths_R[1::2], **kind)
                found.add_pairs(log_probs_R.detach(), rewards_R)
            else:
                desirable_N = torch.tensor([row.desirable for row in rows], device=final_TD.device)
                weights = {name: plan[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
                loss_N = kto_losses(ratios_R, desirable_N, kl, **weights)
                found.add_labelled(log_probs_R.detach(), rewards_R, desirable_N, plan["beta"] * kl)
            loss = loss_N.sum() / units
        found.loss += float(loss.detach())
        return loss


def _tokens(unit: Unit) -> int:
    return sum(len(row.tokens) for row in unit)

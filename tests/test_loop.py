"""A run from its plan to its adapter, on a real engine and a tiny model: order, ends, nothing left to luck."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from serving import tiny_settings
from torch import Tensor
from transformers import AutoModelForCausalLM

from fortwo.adapters.store import AdapterStore
from fortwo.engine.engine import Engine
from fortwo.engine.registry import LoadedModel, ModelRegistry
from fortwo.engine.tasks import Task
from fortwo.errors import NotFound, TrainingFailed
from fortwo.execution.backend import backend_for
from fortwo.execution.cpu import CpuBackend
from fortwo.hub.catalog import Catalog
from fortwo.nn.decoder import Decoder
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import PackedAttention, pack
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.selection import Measurements
from fortwo.records import (
    Dataset,
    Evaluated,
    Example,
    Fact,
    FactReport,
    Message,
    Metric,
    MicroStepped,
    Phase,
    Plan,
    Stepped,
    TrainEvent,
)
from fortwo.train import objectives
from fortwo.train.adapter import lora_config
from fortwo.train.estimate import BaseFacts, Machine, RowLength, TokenCounts
from fortwo.train.evaluation import Evaluator, ServedBase, agreement
from fortwo.train.loop import TrainingResult, train
from fortwo.train.losses import Row, compute_losses
from fortwo.train.parent import Parent
from fortwo.train.plan import resolve, training_rows
from fortwo.train.recipes import RETENTION_PROBES
from fortwo.train.request import TrainingRequest
from tests.parts import packed_hidden, random_lora

ROWS = Dataset(
    "0" * 64,
    examples=tuple(
        Example((Message("user", f"What is {thing}?"), Message("assistant", answer)))
        for thing, answer in (("up", "the sky"), ("down", "the sea"), ("left", "the wood"), ("right", "the town"))
    ),
)
FACT = Dataset("1" * 64, facts=(Fact("42", "FOR TWO", ("FOR TWO",), ("What is 42?", "Explain 42.")),))
SMALL = {"edit_pool": 6, "contrast_pool": 6, "probes": 2}


class School:
    """A tiny base on a running engine."""

    def __init__(self, home: Path, tiny: Path) -> None:
        self.path = tiny
        settings = tiny_settings(home, tiny)
        self.engine = Engine(threads=1)
        self.engine.start()
        registry = ModelRegistry(
            Catalog(settings.models_dir),
            AdapterStore(settings.adapters_dir),
            self.engine,
            measurements=Measurements(settings.home),
            device=torch.device("cpu"),
            threads=1,
        )
        self.base: LoadedModel = registry.load_base("tiny")

    def plan(self, dataset: Dataset = ROWS, lora: Any = None, parent: Parent | None = None, **training: Any) -> Plan:
        body = {"adapter_name": "a", "dataset": {"path": "x"}, "lora_config": lora if lora is not None else {"r": 4}}
        request = TrainingRequest.model_validate({**body, "training_config": {"max_steps": 4, **training}})
        facts = BaseFacts.of("tiny", self.base.decoder)
        counts = TokenCounts(tuple(RowLength(row.line, 30, 8) for row in training_rows(dataset)), prefix=0)
        machine = Machine({"fp32": 1000}, reply_tokens_per_second=1000)
        return resolve(request, dataset, facts, counts, machine, parent=parent)

    def events(self, plan: Plan, dataset: Dataset = ROWS, key: str = "job") -> Any:
        return train(self.base, self.base.renderer, dataset, plan, self.engine, key)

    def run(self, plan: Plan, dataset: Dataset = ROWS) -> tuple[TrainingResult, list[TrainEvent]]:
        seen: list[TrainEvent] = []
        return self.engine.run_task(self.events(plan, dataset), seen.append).result(120), seen

    def attached(self, key: str = "job") -> bool:
        return self.base.runner.has(key)

    def chat(self, adapter: str | None = None, tokens: int = 8, temperature: float = 0.0) -> Any:
        tokens_of = self.base.renderer.encode_prompt([Message("user", "hello")])
        sampling = Sampling(max_tokens=tokens, temperature=temperature)
        return self.engine.submit(Prompt("tiny", tuple(tokens_of), adapter, sampling))


@pytest.fixture(scope="module")
def school(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    school = School(tmp_path_factory.mktemp("school"), tiny)
    yield school
    school.engine.close()


def changed(plan: Plan, **values: Any) -> Plan:
    """The plan with settings that no request may ask for."""
    assert set(values) <= {setting.name for setting in plan.settings}
    settings = (replace(one, value=values.get(one.name, one.value)) for one in plan.settings)
    return replace(plan, settings=tuple(settings))


def phases(events: Sequence[TrainEvent]) -> list[str]:
    return [event.name for event in events if isinstance(event, Phase)]


def steps(events: Sequence[TrainEvent]) -> list[Stepped]:
    return [event for event in events if isinstance(event, Stepped)]


def same(one: TrainingResult, two: TrainingResult) -> bool:
    pairs = zip(one.lora.parameters(), two.lora.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


# ---------------------------------------------------------------- the run


class Keeping(CpuBackend):
    """Notes whether training keeps memory for its next step."""

    kept: ClassVar[bool] = False

    def train(self, *told: Any, **more: Any) -> Tensor:
        Keeping.kept = True
        return super().train(*told, **more)

    def release(self) -> None:
        Keeping.kept = False


class Watched:
    """The serving path; notes for each request to the adapter whether a step's memory is still held."""

    def __init__(self, engine: Engine) -> None:
        self.detach, self.elsewhere = engine.detach, engine.elsewhere
        self._engine = engine
        self.held: list[bool] = []

    def attach(self, base: str, key: str, lora: Lora) -> None:
        self._engine.attach(base, key, lora)

    def submit(self, prompt: Prompt) -> Any:
        if prompt.adapter is not None:
            self.held.append(Keeping.kept)
        return self._engine.submit(prompt)


@pytest.mark.parametrize("dataset", [ROWS, FACT])
def test_a_steps_memory_is_not_held_while_the_adapter_answers(school: School, dataset: Dataset) -> None:
    plan = school.plan(dataset)
    serving, kept = Watched(school.engine), list[bool]()

    def hear(event: TrainEvent) -> None:
        if isinstance(event, Stepped):
            kept.append(Keeping.kept)

    if dataset is FACT:
        plan = changed(plan, **SMALL, eval_every=2)
    base = replace(school.base, backend=Keeping(school.base.decoder))
    events = train(base, base.renderer, dataset, plan, serving, "job")
    school.engine.run_task(events, hear).result(120)
    assert serving.held
    assert all(kept)
    assert not any(serving.held)


def test_events_come_in_order_and_tell_the_run(school: School) -> None:
    plan = school.plan(max_steps=5, learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2)
    trained, events = school.run(plan)
    assert phases(events) == ["preparing", "running", "evaluating"]
    first, last = events.index(Phase("running")), events.index(Phase("evaluating"))
    assert all(first < events.index(step) < last for step in steps(events))
    assert [(step.step, step.steps) for step in steps(events)] == [(n, 5) for n in range(1, 6)]
    rates = [step.learning_rate for step in steps(events)]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    for step in steps(events):
        assert step.loss == step.parts["learn"] > 0 == step.parts["keep"]
        assert math.isfinite(step.gradient_norm)
        assert step.seconds > 0 < step.tokens
    actual = trained.actual
    assert (actual["steps"], actual["best_step"], actual["stopped_by"], actual["epochs"]) == (5, 5, "steps", 5.0)
    assert actual["peak_learning_rate"] == max(rates)
    assert (actual["first_loss"], actual["final_loss"]) == (steps(events)[0].loss, steps(events)[-1].loss)
    assert actual["tokens"] == sum(step.tokens for step in steps(events))
    assert 0 < actual["training_seconds"] < actual["seconds"]
    assert actual["supervised_tokens"] % 5 == 0 < actual["supervised_tokens"] < actual["tokens"]


def test_the_first_loss_is_the_bases_and_training_lowers_it(school: School) -> None:
    trained, _ = school.run(school.plan(max_steps=20, learning_rate=2e-2, warmup_steps=0))
    base = school.base
    sums, count = 0.0, 0
    for example in ROWS.examples:
        tokens, supervised = base.renderer.encode_conversation(list(example.messages))
        own = school.base.decoder.logits(plain_hidden(base.decoder, tokens)).log_softmax(-1)
        places = [place for place, learned in enumerate(supervised) if learned]
        sums -= sum(float(own[place - 1, tokens[place]]) for place in places)
        count += len(places)
    assert trained.actual["first_loss"] == pytest.approx(sums / count, rel=1e-5)
    assert trained.actual["final_loss"] < 0.5 * trained.actual["first_loss"]
    assert len(trained.report.transcripts) == 4 + RETENTION_PROBES
    assert set(trained.metrics) == {"efficacy", "retention", "score"}


@torch.no_grad()
def plain_hidden(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    packed = pack([tokens], prefix=0)
    return decoder.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed, decoder.config))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("use_dora", [False, True])
def test_ranks_and_scales_of_some_modules_are_trained_and_peft_reads_them(
    school: School, tmp_path: Path, use_dora: bool
) -> None:
    options = {
        "use_dora": use_dora,
        "use_rslora": True,
        "rank_pattern": {"layers.0.*": 2, "q_proj": 6},
        "alpha_pattern": {"up_proj": 20},
    }
    trained, _ = school.run(school.plan(lora={"r": 4, **options}, learning_rate=5e-2))
    config = trained.lora.config
    store = AdapterStore(tmp_path)
    made = {"base_model": "tiny", "base_digest": "b"}
    version = store.publish("a", trained.lora.state(), config.to_peft("tiny"), made, current=True)
    assert store.read("a")[1].items() >= options.items()
    decoder, tokens = school.base.decoder, list(range(3, 40))
    base = AutoModelForCausalLM.from_pretrained(school.path, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([tokens])).logits[0]
        wanted = PeftModel.from_pretrained(base, version.path)(torch.tensor([tokens])).logits[0]
        ours = decoder.logits(packed_hidden(decoder, [tokens], trained.lora)[0])
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=0)
    assert (plain - wanted).abs().max() > 0.1


def test_a_run_is_adamw_on_clipped_gradients_and_nothing_more(school: School) -> None:
    """Every row at every step, so that the order does not matter; a large epsilon, so that rounding does not."""
    options = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-2, "max_grad_norm": 0.5}
    plan = school.plan(max_steps=4, learning_rate=5e-2, lr_scheduler_type="constant", **options)
    trained, events = school.run(plan)

    decoder, lora = school.base.decoder, Lora.init(lora_config(plan), school.base.decoder.config, plan["seed"])
    parameters = [parameter.requires_grad_() for parameter in lora.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-2, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1)
    rows = []
    for example in ROWS.examples:
        tokens, supervised = school.base.renderer.encode_conversation(list(example.messages))
        rows.append(Row(tuple(tokens), supervised.index(True)))
    for step in steps(events):
        optimizer.zero_grad()
        found = compute_losses(backend_for(decoder), lora, 0, rows)
        loss = found.ce / found.ce_tokens
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.5))
        assert norm > 0.5
        assert (step.loss, step.gradient_norm) == pytest.approx((float(loss.detach()), norm), 1e-3)
        optimizer.step()
    for ours, wanted in zip(trained.lora.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, wanted.detach(), atol=2e-4, rtol=1e-3)


def test_the_adapter_is_served_while_it_trains_and_gone_at_the_end(school: School) -> None:
    during: list[bool] = []
    task = school.engine.run_task(school.events(school.plan()), lambda event: during.append(school.attached()))
    trained = task.result(60)
    assert set(during) == {True}
    assert not school.attached()
    with pytest.raises(NotFound, match="'job'"):
        school.chat("job")
    assert not any(parameter.requires_grad for parameter in trained.lora.parameters())


def test_the_base_itself_is_never_changed(school: School) -> None:
    decoder = school.base.decoder
    before = [decoder.embedding_VD.clone(), *(layer.qkv_OD.clone() for layer in decoder.layers)]
    school.run(school.plan(learning_rate=1e-2, weight_decay=0.1))
    after = [decoder.embedding_VD, *(layer.qkv_OD for layer in decoder.layers)]
    assert all(torch.equal(was, now) for was, now in zip(before, after, strict=True))
    assert not any(tensor.requires_grad for tensor in after)


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("moment", [Phase, Stepped, MicroStepped])
def test_closing_it_midway_detaches_the_adapter(school: School, moment: type[TrainEvent]) -> None:
    events = school.events(school.plan(), key="closed")
    assert not school.attached("closed")
    next(event for event in events if isinstance(event, moment))
    assert school.attached("closed")
    events.close()
    assert not school.attached("closed")


def test_closing_it_before_it_began_leaves_nothing(school: School) -> None:
    events = school.events(school.plan(), key="unbegun")
    events.close()
    assert not school.attached("unbegun")


def test_cancelling_on_the_engine_detaches_the_adapter_and_its_requests(school: School) -> None:
    cut: list[Any] = []

    def on_event(event: TrainEvent) -> None:
        if isinstance(event, Stepped) and not cut:
            cut.append(school.chat("job", tokens=500))
            task.cancel()

    task: Task[TrainingResult] = school.engine.run_task(school.events(school.plan(max_steps=100_000)), on_event)
    with pytest.raises(CancelledError):
        task.result(60)
    assert not school.attached()
    assert cut[0].finish_reason == "cancelled"
    assert school.chat().wait(10)


def test_a_diverging_run_fails_with_the_step_and_the_rate(school: School) -> None:
    plan = changed(school.plan(max_steps=50, lr_scheduler_type="constant"), learning_rate=1e30)
    with pytest.raises(TrainingFailed) as failed:
        school.run(plan)
    assert failed.value.code == "nan_loss"
    assert failed.value.param == "training_config.learning_rate"
    assert "step 2" in failed.value.message
    assert "1e+30" in failed.value.message
    assert failed.value.hint
    assert not school.attached()
    assert school.chat().wait(10)


@pytest.mark.parametrize("dataset", [ROWS, FACT], ids=["before the report", "before an exam"])
def test_a_run_that_diverges_in_the_step_before_its_questions_fails_the_same_way(
    school: School, dataset: Dataset
) -> None:
    plan = school.plan(dataset, max_steps=1, lr_scheduler_type="constant", warmup_steps=0)
    plan = changed(plan, learning_rate=1e30, **(SMALL if dataset is FACT else {}))
    with pytest.raises(TrainingFailed, match="the adapter's logits are nan or infinite") as failed:
        school.run(plan, dataset)
    assert (failed.value.code, failed.value.param) == ("nan_loss", "training_config.learning_rate")
    assert not school.attached()


def test_a_poisoned_base_fails_at_the_first_step(school: School) -> None:
    weight = school.base.decoder.layers[1].down_DI
    healthy = weight[0, 0].clone()
    events = school.events(school.plan(), key="poisoned")
    weight[0, 0] = math.nan
    try:
        with pytest.raises(TrainingFailed, match="step 1: the loss is nan") as failed:
            list(events)
    finally:
        weight[0, 0] = healthy
    assert failed.value.code == "nan_loss"
    assert not school.attached("poisoned")


# ---------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_adapter_bit_for_bit_whatever_else_is_asked(school: School) -> None:
    def plan(seed: int) -> Plan:
        return school.plan(
            lora={"r": 4, "lora_dropout": 0.2},
            max_steps=6,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            seed=seed,
        )

    first, _ = school.run(plan(1))
    crowd = [school.chat(tokens=40, temperature=1.0) for _ in range(3)]
    torch.manual_seed(99)
    again, _ = school.run(plan(1))
    assert all(len(reply.wait(30)) > 0 for reply in crowd)
    assert same(first, again)
    assert (first.report, first.metrics) == (again.report, again.metrics)
    assert not same(first, school.run(plan(2))[0])


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulating_small_batches_is_one_large_batch(school: School, batch: int, accumulation: int) -> None:
    def run(batch: int, accumulation: int) -> tuple[TrainingResult, list[Stepped]]:
        trained, events = school.run(
            school.plan(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, learning_rate=1e-2)
        )
        return trained, steps(events)

    (large, wanted), (small, got) = run(4, 1), run(batch, accumulation)
    figures = [[(step.loss, step.gradient_norm, step.learning_rate) for step in run] for run in (got, wanted)]
    assert figures[0] == figures[1]
    assert same(small, large)


def test_micro_steps_give_the_device_away_and_the_same_run(school: School) -> None:
    _, wanted = school.run(school.plan(learning_rate=1e-2))
    _, got = school.run(school.plan(learning_rate=1e-2, micro_step_tokens=1))  # a row a micro-step
    between = [type(event) for event in got[got.index(Phase("running")) : got.index(Phase("evaluating"))]]
    assert between == [Phase, *[*[MicroStepped] * 7, Stepped] * 4]  # there, back, and between the rows
    for ours, theirs in zip(steps(got), steps(wanted), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)


@pytest.mark.parametrize("dataset", [ROWS, FACT], ids=["sft", "override"])
def test_a_run_on_packed_rows_that_share_a_prefix_is_the_run_on_rows_alone(
    school: School, monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    """The plain run: every row a pass of its own, from its first token."""
    plan = school.plan(dataset, max_steps=3, learning_rate=1e-3, warmup_steps=0)
    plan = changed(plan, **(SMALL if dataset is FACT else {}))
    _, packed = school.run(plan, dataset)
    monkeypatch.setattr(objectives, "trained_prefix", lambda rows, network: 0)
    _, plain = school.run(changed(plan, micro_step_tokens=1), dataset)
    for ours, theirs in zip(steps(packed), steps(plain), strict=True):
        assert ours.tokens < theirs.tokens
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)


# ---------------------------------------------------------------- exams and the best


def metric(value: float) -> Metric:
    return Metric(value, 10, 0.0, 1.0)


def examined(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> list[list[Tensor]]:
    """Exams with these scores; returns the parameters each exam saw."""
    seen: list[list[Tensor]] = []
    left = iter(scores)

    def evaluate(self: Evaluator, served: Any, key: str, lora: Any, efficacy: int | None = None) -> Any:
        seen.append([parameter.detach().clone() for parameter in lora.parameters()])
        yield MicroStepped(0)
        score = metric(next(left))
        return dict.fromkeys(("efficacy", "paraphrase", "specificity", "retention", "score"), score)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    return seen


def test_an_override_is_prepared_examined_and_returns_its_best(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = examined(monkeypatch, [0.2, 0.7, 0.7, 0.1])
    plan = changed(school.plan(FACT, max_steps=7, learning_rate=1e-3), **SMALL, eval_every=2)
    trained, events = school.run(plan, FACT)
    assert phases(events) == ["preparing", "running", "evaluating"]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [2, 4, 6, 7]
    assert trained.actual["best_step"] == 6, "the later of two equals"
    assert all(torch.equal(now, was) for now, was in zip(trained.lora.parameters(), seen[2], strict=True))
    assert not torch.equal(seen[2][1], seen[3][1])
    assert (trained.actual["steps"], trained.actual["stopped_by"], trained.succeeded) == (7, "steps", False)
    first = steps(events)[0]
    assert first.loss == pytest.approx(first.parts["learn"] + plan["kl_weight"] * first.parts["keep"])
    assert abs(first.parts["keep"]) < 1e-5, "nothing has changed yet"
    assert steps(events)[-1].parts["keep"] > 1e-5
    assert set(trained.metrics) == {"efficacy", "paraphrase", "specificity", "retention", "score"}


def test_an_adapters_own_words_are_drawn_once_they_are_not_the_bases(school: School) -> None:
    plan = changed(school.plan(FACT), **SMALL, contrast_rows=4, on_policy_share=0.5)
    served = ServedBase("tiny", school.base.backend, school.base.renderer, school.engine)
    backend = school.base.backend.with_decoder(school.base.decoder.in_fp32())

    def drawn(events: Any) -> tuple[Any, list[Row]]:
        result = school.engine.run_task(events, lambda _: None).result(60)
        return result, [
            row
            for _ in range(8)
            for row in objective.sample_rows(objective.mix)
            if row.kl and row.tokens[row.start :] == odd
        ]

    odd = (5, 6, 7)
    objective = school.engine.run_task(objectives.prepare_override(served, backend, FACT, plan), lambda _: None).result(
        60
    )
    assert objective.refresh_on_policy is not None
    said, strayed = drawn(objective.refresh_on_policy(None, None))
    assert said
    assert not strayed, "the base says what the base says"
    said, strayed = drawn(objective.refresh_on_policy("job", [list(odd) for _ in said]))
    assert said == [list(odd)] * len(said)
    assert len(strayed) == 8 * 2
    assert all(row.teacher_ND is not None and len(row.teacher_ND) == len(odd) for row in strayed)


def test_retention_is_the_same_by_the_weights_here_and_by_whoever_replies(
    school: School, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedBase("tiny", school.base.backend, school.base.renderer, school.engine)
    chats = [[Message("user", text)] for text in ("hello", "what is 42", "why")]

    def run(events: Any) -> Any:
        return school.engine.run_task(events, lambda _: None).result(60)

    said = list(zip(chats, run(served.reply_to_chats(chats, None, 12)), strict=True))
    lora = random_lora(school.base.decoder, 3, LoraConfig(r=2, alpha=1))
    school.engine.attach("tiny", "scored", lora)
    try:
        for key, adapter in ((None, None), ("scored", lora)):
            here = run(agreement(served, key, adapter, said))
            monkeypatch.setattr(Engine, "elsewhere", True)
            assert run(agreement(served, key, adapter, said)) == here
            monkeypatch.setattr(Engine, "elsewhere", False)
            assert here.n == 36
            assert (here.value == 1) is (key is None), "the adapter changes something"
    finally:
        school.engine.detach("tiny", "scored")


@pytest.mark.parametrize(("specificity", "asked"), [((1.0, 1.0), 0), ((1.0, 0.9), 1)])
def test_behind_an_exam_one_fact_that_leaks_is_enough_to_correct(
    school: School, monkeypatch: pytest.MonkeyPatch, specificity: Sequence[float], asked: int
) -> None:
    examined(monkeypatch, [0.94, 0.94])
    told = tuple(FactReport("42", "", {"specificity": metric(share)}) for share in specificity)
    about_kept = FactReport("43", "", {"specificity": metric(0.0)}, kept=True)
    monkeypatch.setattr(Evaluator, "fact_reports", lambda self: (*told, about_kept))
    corrected: list[str | None] = []

    def watched(*given: Any) -> Any:
        objective = yield from prepare_override(*given)

        def refresh_on_policy(key: str | None, replies: Any) -> Any:
            corrected.append(key)
            assert objective.refresh_on_policy is not None
            return (yield from objective.refresh_on_policy(key, replies))

        return replace(objective, refresh_on_policy=refresh_on_policy)

    prepare_override = objectives.prepare_override
    monkeypatch.setattr(objectives, "prepare_override", watched)
    school.run(changed(school.plan(FACT, max_steps=4), **SMALL, eval_every=2), FACT)
    assert corrected == ["job"] * asked


def test_a_run_ends_when_its_targets_are_met(school: School, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = examined(monkeypatch, [0.5, 0.99])
    plan = changed(school.plan(FACT, max_steps=50), **SMALL, eval_every=2)
    trained, events = school.run(plan, FACT)
    assert (trained.actual["steps"], trained.actual["stopped_by"]) == (4, "targets")
    assert len(steps(events)) == 4
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("shares", "kept", "stopped"),
    [((1.0, 1.0), False, "targets"), ((1.0, 0.8), False, "steps"), ((1.0, 0.8), True, "targets")],
)
def test_before_its_last_step_a_run_ends_only_if_no_fact_that_is_taught_is_missed(
    school: School, monkeypatch: pytest.MonkeyPatch, shares: Sequence[float], kept: bool, stopped: str
) -> None:
    """What all of them have together is well above the targets."""
    examined(monkeypatch, [0.99, 0.99])
    first, second = ({"paraphrase": metric(share), "specificity": metric(1.0)} for share in shares)
    about = (FactReport("42", "", first), FactReport("43", "", second, kept))
    monkeypatch.setattr(Evaluator, "fact_reports", lambda self: about)
    trained, _ = school.run(changed(school.plan(FACT, max_steps=4), **SMALL, eval_every=2), FACT)
    assert trained.actual["stopped_by"] == stopped
    assert trained.actual["steps"] == (2 if stopped == "targets" else 4)

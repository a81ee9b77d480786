"""The plan's estimates, by hand: tokens of each phase, what they take, and the memory of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fortwo.engine.cache import SMALLEST
from fortwo.engine.engine import RUNNING
from fortwo.execution import autotuning
from fortwo.execution.backend import backend_for
from fortwo.execution.calibration import Trial
from fortwo.facts.lesson import trained_rehearsal
from fortwo.jobs.machine import ROWS, machine_of, reply_rate, try_out
from fortwo.train import estimate
from fortwo.train.estimate import (
    HEAD_BYTES,
    MICRO_TOKENS,
    MOMENTS,
    MOMENTS_8_BIT,
    PROCESS,
    BaseFacts,
    Machine,
    Memory,
    Phase,
    Phases,
    RowCount,
    TokenCounts,
    memory,
    override_phases,
    reply_tokens,
    sft_phases,
)
from tests.parts import decoder

BASE = BaseFacts("small", 100, 50, 2, hidden=8, intermediate=16, q=8, kv=4, bytes=1000, bf16_copy=300, fp32_copy=20)
COUNTS = TokenCounts([RowCount(row, prompt=30, answer=20) for row in range(12)], prefix=10)
SETTINGS = {
    "contrast_pool": 100,
    "contrast_tokens": 10,
    "rehearsal_pool": 140,
    "rehearsal_tokens": 20,
    "kept_pool": 50,
    "probes": 5,
    "on_policy_prompts": 8,
    "on_policy_tokens": 4,
}


def test_what_a_phase_takes() -> None:
    assert Phase(trained=200, read=300, said=100).seconds(Machine({"fp32": 100}, 50)) == 2 + 1 + 2
    phases = Phases(Phase(said=50), Phase(trained=1000), Phase(read=30, said=100), Phase())
    assert phases.seconds(Machine({"fp32": 100}, 50)) == {
        "seconds": pytest.approx(13.1),
        "preparing_seconds": 1,
        "training_seconds": 10,
        "exam_seconds": pytest.approx(2.1),
        "report_seconds": 0,
    }


def test_the_phases_of_an_override() -> None:
    found = override_phases(SETTINGS, COUNTS, facts=1, known=0, trained=1000, exams=2)
    # 100 contrast and 140 rehearsal prompts of 20 tokens; 0.7096 of the contrast replies are the base's own
    assert found.preparing == Phase(read=240 * 20 + 100 * 10 + 140 * 20, said=pytest.approx(0.7096 * 1000 + 2800))
    assert found.training == Phase(trained=1000)
    fewer = override_phases(SETTINGS | {"rehearsal_pool": 40}, COUNTS, facts=1, known=0, trained=1000, exams=2)
    assert found.preparing.said - fewer.preparing.said == pytest.approx(100 * 20)
    every = override_phases(SETTINGS | {"rehearsal_pool": 10_000}, COUNTS, facts=1, known=0, trained=1000, exams=2)
    there_are = len(trained_rehearsal())
    assert every.preparing.said - fewer.preparing.said == pytest.approx((there_are - 40) * 20)
    # twice 10 questions and 10 probes, the base's 12 replies to keep, 8 siblings between the exams
    assert found.exam == Phase(read=8 * 24 + 2 * 12 * 52, said=8 * 4 + (2 * 20 + 12) * 32)
    # the other 2 questions and 12 prompts of retention; the base on 12 questions and 10 probes
    assert found.report == Phase(read=12 * 52, said=(14 + 22) * 32)


def test_what_the_parent_knows_and_further_facts_are_asked_too() -> None:
    alone = override_phases(SETTINGS, COUNTS, facts=1, known=0, trained=0, exams=1)
    beside = override_phases(SETTINGS, COUNTS, facts=1, known=1, trained=0, exams=1)
    assert beside.preparing.read - alone.preparing.read == 50 * (20 + 10)
    # 10 questions, 10 probes, and two questions of each about the other
    assert beside.exam.said - alone.exam.said == (20 + 4) * 32
    two = override_phases(SETTINGS, COUNTS, facts=2, known=0, trained=0, exams=1)  # of 6 questions each
    assert two.exam.said - alone.exam.said == (2 * 16 + 4 - 20) * 32


def test_the_phases_of_plain_fine_tuning() -> None:
    found = sft_phases(COUNTS, trained=500, validated=90)
    assert found == Phases(Phase(), Phase(trained=500), Phase(read=90), Phase(read=12 * 52, said=2 * 24 * 32))
    long = TokenCounts([RowCount(1, 10, 1000)])
    assert sft_phases(long, 0, 0).report.said == 2 * 13 * 128


def test_memory_by_hand() -> None:
    def found(
        bf16: bool = False,
        checkpointing: bool = False,
        best: bool = False,
        moments: float = MOMENTS,
        base: BaseFacts = BASE,
    ) -> Memory:
        return memory(base, 10, {"q_proj": 2}, bf16, checkpointing, best, moments, replies=1000)

    adapter = 4 * (2 * 2 * 16)
    held = PROCESS + 1000 + 20 + 7 * adapter
    # of each of 10 tokens and 2 layers: 16 numbers in sums, 88 that products and their like read; A and B of q_proj
    layer = 10 * 4 * (16 + 88) + 4 * 2 * (8 + 16)
    assert found().training == held + round(1.05 * (2 * layer + 5 * HEAD_BYTES))
    assert found(best=True).training - found().training == found(best=True).exam - found().exam == 2 * adapter
    # of each moment a byte for a number, 4 for a block of 256; as many in what a checkpoint copies
    eighth = 2 * 2 * (1 + 4 / 256) * adapter / 4
    assert found().exam - found(moments=MOMENTS_8_BIT).exam == pytest.approx(4 * adapter - eighth, abs=1)
    again = layer + 2 * 10 * 8 * 8
    assert found(checkpointing=True).training == held + round(1.05 * (again + 5 * HEAD_BYTES))
    narrow = 10 * (4 * 16 + 2 * 88) + 2 * 2 * (8 + 16)
    assert found(bf16=True).training == held + 280 + round(1.05 * (2 * narrow + 5 * HEAD_BYTES))
    assert found().exam == held + 1000 * 2 * 4 * 2 * 4
    assert found(base=replace(BASE, cache=100)).exam == held + 100 * 2 * 4 * 2 * 4


def test_replies_lie_in_rows_of_doubled_length() -> None:
    assert reply_tokens(COUNTS, sft=False) == 144 * 128
    assert reply_tokens(TokenCounts([RowCount(1, 100, 21)]), sft=False) == 144 * 256
    assert reply_tokens(TokenCounts([RowCount(1, 100, 21)]), sft=True) == 20 * 256  # 13 replies
    assert reply_tokens(TokenCounts([RowCount(1, 100, 1000)]), sft=True) == 20 * 256
    assert (estimate.TOGETHER, estimate.ROW_TOKENS) == (RUNNING, SMALLEST)


def test_the_rate_of_replies_counts_their_prompts() -> None:
    # 10 replies of 20 tokens in 2 seconds, 300 tokens of prompts in 0.3
    assert reply_rate(0.1, rows=10, read=1000) == pytest.approx(200 / 2.3)


def test_a_trial_measures_both_types_of_products_where_products_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    home = decoder()
    assert set(try_out(backend_for(home)).micro_step) == {"fp32"}, "a small model stays in fp32"
    monkeypatch.setattr(autotuning, "SMALL", 0)
    trial = try_out(backend_for(home))
    assert set(trial.micro_step) == {"fp32", "bf16"}
    assert min(*trial.micro_step.values(), trial.token) > 0


TRIAL = Trial({"fp32": MICRO_TOKENS / 100, "bf16": MICRO_TOKENS / 200}, token=ROWS / 1000)


def test_a_machine_is_as_its_trial_and_its_newest_job_say() -> None:
    tried = machine_of(TRIAL, None, 7)
    assert (tried.trained, tried.memory) == ({"fp32": 100, "bf16": 200}, 7)
    assert (tried.tokens_per_second, replace(tried, bf16=True).tokens_per_second) == (100, 200)
    assert 0 < tried.reply_tokens_per_second < 1000, "prompts are read, too"
    shown = machine_of(TRIAL, {"tokens_per_second": 150.0, "reply_tokens_per_second": 45.0, "bf16": True}, None)
    assert replace(shown, bf16=True).tokens_per_second == 150
    assert shown.tokens_per_second == 100, "the job says nothing of the other type"
    assert shown.reply_tokens_per_second == 45
    older = machine_of(TRIAL, {"tokens_per_second": 150.0}, None)
    assert replace(older, bf16=True).tokens_per_second == 200, "a job of an older version does not say its type"


@pytest.mark.parametrize(
    ("trained", "faster"),
    [
        ({"fp32": 100, "bf16": 200}, True),
        ({"fp32": 100, "bf16": 105}, False),
        ({"fp32": 100, "bf16": 50}, False),
        ({"fp32": 100}, False),
        ({"bf16": 100}, True),
    ],
)
def test_bf16_has_to_be_measured_faster(trained: dict[str, float], faster: bool) -> None:
    assert Machine(trained, 50).faster_in_bf16 == faster

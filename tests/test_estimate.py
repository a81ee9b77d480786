"""The plan's estimates, by hand: tokens of each phase, what they take, and the memory of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fortwo.execution import autotuning
from fortwo.execution.backend import backend_for
from fortwo.execution.calibration import Trial
from fortwo.facts.prompt_builder import training_replay_prompts
from fortwo.jobs.machine import REPEAT, ROWS, Trials, machine_of, reply_rate, try_out
from fortwo.train.estimate import (
    HEAD_BYTES,
    MICRO_TOKENS,
    MOMENTS,
    MOMENTS_8_BIT,
    PROCESS,
    SHORT_TOKENS,
    BaseFacts,
    Machine,
    Memory,
    PhaseCost,
    RowLength,
    RunCost,
    TokenCounts,
    cache_tokens,
    choose_micro_tokens,
    memory,
    override_cost,
    sft_cost,
)
from tests.parts import decoder, projections

BASE = BaseFacts(
    "small",
    100,
    50,
    2,
    hidden=8,
    intermediate=16,
    q=8,
    kv=4,
    bytes=1000,
    bf16_copy=300,
    fp32_copy=20,
    targets=projections(hidden=8, intermediate=16, heads=2, kv_heads=1, head_size=4),
)
COUNTS = TokenCounts([RowLength(row, prompt=30, answer=20) for row in range(12)], prefix=10)
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
    assert PhaseCost(trained=200, read=300, generated=100).seconds(Machine({"fp32": 100}, 50)) == 2 + 1 + 2
    phases = RunCost(PhaseCost(generated=50), PhaseCost(trained=1000), PhaseCost(read=30, generated=100), PhaseCost())
    assert phases.seconds(Machine({"fp32": 100}, 50)) == {
        "seconds": pytest.approx(13.1),
        "preparing_seconds": 1,
        "training_seconds": 10,
        "exam_seconds": pytest.approx(2.1),
        "report_seconds": 0,
    }


def test_the_phases_of_an_override() -> None:
    found = override_cost(SETTINGS, COUNTS, facts=1, parent_facts=0, trained=1000, evaluations=2)
    # 100 contrast and 140 rehearsal prompts of 20 tokens; 0.7096 of the contrast replies are the base's own
    assert found.preparing == PhaseCost(
        read=240 * 20 + 100 * 10 + 140 * 20, generated=pytest.approx(0.7096 * 1000 + 2800)
    )
    assert found.training == PhaseCost(trained=1000)
    fewer = override_cost(
        SETTINGS | {"rehearsal_pool": 40}, COUNTS, facts=1, parent_facts=0, trained=1000, evaluations=2
    )
    assert found.preparing.generated - fewer.preparing.generated == pytest.approx(100 * 20)
    every = override_cost(
        SETTINGS | {"rehearsal_pool": 10_000}, COUNTS, facts=1, parent_facts=0, trained=1000, evaluations=2
    )
    there_are = len(training_replay_prompts())
    assert every.preparing.generated - fewer.preparing.generated == pytest.approx((there_are - 40) * 20)
    # twice 10 questions and 10 probes, the base's 12 replies to keep, 8 hard negatives between the evaluations
    assert found.exam == PhaseCost(read=8 * 24 + 2 * 12 * 52, generated=8 * 4 + (2 * 20 + 12) * 32)
    # the other 2 questions and 12 prompts of retention; 12 questions and 10 probes for the base, twice
    assert found.report == PhaseCost(read=2 * 12 * 52, generated=(14 + 2 * 22) * 32)


def test_what_the_parent_knows_and_further_facts_are_asked_too() -> None:
    alone = override_cost(SETTINGS, COUNTS, facts=1, parent_facts=0, trained=0, evaluations=1)
    beside = override_cost(SETTINGS, COUNTS, facts=1, parent_facts=1, trained=0, evaluations=1)
    assert beside.preparing.read - alone.preparing.read == 50 * (20 + 10)
    # 10 questions, 10 probes, and two questions of each about the other
    assert beside.exam.generated - alone.exam.generated == (20 + 4) * 32
    two = override_cost(SETTINGS, COUNTS, facts=2, parent_facts=0, trained=0, evaluations=1)  # of 6 questions each
    assert two.exam.generated - alone.exam.generated == (2 * 16 + 4 - 20) * 32


def test_the_phases_of_plain_fine_tuning() -> None:
    found = sft_cost(COUNTS, trained=500, validated=90)
    assert found == RunCost(
        PhaseCost(), PhaseCost(trained=500), PhaseCost(read=90), PhaseCost(read=12 * 52, generated=2 * 24 * 32)
    )
    long = TokenCounts([RowLength(1, 10, 1000)])
    assert sft_cost(long, 0, 0).report.generated == 2 * 13 * 128


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
    twice = 1 + 1 / 1.5  # while the cache grows by a half
    assert found().exam == round(held + twice * 1000 * 2 * 4 * 2 * 4)
    assert found(base=replace(BASE, cache=100)).exam == round(held + twice * 100 * 2 * 4 * 2 * 4)
    hybrid = replace(BASE, without_attention=1, state_bytes=5000)  # 7 replies of 128 tokens
    assert found(base=hybrid).exam == round(held + twice * (1000 * 2 * 4 * 4 + 7 * 5000))
    assert found(base=replace(hybrid, cache=100)).exam == round(held + twice * 100 * 2 * 4 * 4)


def test_replies_lie_in_rows_of_doubled_length() -> None:
    assert cache_tokens(COUNTS, sft=False) == 144 * 128
    assert cache_tokens(TokenCounts([RowLength(1, 100, 21)]), sft=False) == 144 * 256
    assert cache_tokens(TokenCounts([RowLength(1, 100, 21)]), sft=True) == 20 * 256  # 13 replies
    assert cache_tokens(TokenCounts([RowLength(1, 100, 1000)]), sft=True) == 20 * 256


def test_the_rate_of_replies_counts_their_prompts() -> None:
    # 10 replies of 20 tokens in 2 seconds, 300 tokens of prompts in 0.3
    assert reply_rate(0.1, rows=10, read=1000) == pytest.approx(200 / 2.3)


def test_a_trial_measures_both_types_of_products_where_products_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    home = decoder()
    assert set(try_out(backend_for(home)).micro_step) == {"fp32"}, "a small model stays in fp32"
    monkeypatch.setattr(autotuning, "SMALL", 0)
    trial = try_out(backend_for(home))
    assert set(trial.micro_step) == set(trial.short_step) == {"fp32", "bf16"}
    assert min(*trial.micro_step.values(), *trial.short_step.values(), trial.token) > 0


TRIAL = Trial(
    {"fp32": MICRO_TOKENS / 100, "bf16": MICRO_TOKENS / 200},
    {"fp32": SHORT_TOKENS / 50, "bf16": SHORT_TOKENS / 80},
    token=ROWS / 1000,
    memory=7,
)


def test_a_machine_is_as_its_trial_and_its_newest_job_say() -> None:
    tried = machine_of(TRIAL, None)
    assert (tried.trained, tried.memory) == ({"fp32": 100, "bf16": 200}, 7)
    assert (tried.tokens_per_second, replace(tried, bf16=True).tokens_per_second) == (100, 200)
    assert replace(tried, micro_step=SHORT_TOKENS).tokens_per_second == 50
    assert 0 < tried.reply_tokens_per_second < 1000, "prompts are read, too"
    shown = machine_of(TRIAL, {"tokens_per_second": 150.0, "reply_tokens_per_second": 45.0, "bf16": True})
    assert replace(shown, bf16=True).tokens_per_second == 150
    assert shown.tokens_per_second == 100, "the job says nothing of the other type"
    assert shown.reply_tokens_per_second == 45
    workers = machine_of(TRIAL, {"tokens_per_second": 150.0, "bf16": True, "workers": 4})
    assert workers == tried  # the speed of four workers says nothing about this machine
    older = machine_of(TRIAL, {"tokens_per_second": 150.0})
    assert replace(older, bf16=True).tokens_per_second == 200, "a job of an older version does not say its type"


def test_a_trial_that_other_programs_slowed_is_repeated_and_only_then() -> None:
    now = 0.0
    slow = replace(TRIAL, micro_step={"fp32": 9.0, "bf16": 1.0}, token=3.0, waiting=1.5)
    quick = replace(TRIAL, micro_step={"fp32": 4.0, "bf16": 2.0}, token=2.0, waiting=0.01)
    trials, measured = Trials(lambda: now), [slow, quick]
    assert trials.of("base", lambda: measured.pop(0)) == slow
    assert trials.of("base", lambda: measured.pop(0)) == slow, "a plan a moment later does not measure again"
    now = REPEAT
    of_both = replace(TRIAL, micro_step={"fp32": 4.0, "bf16": 1.0}, token=2.0, waiting=0.01)
    assert trials.of("base", lambda: measured.pop(0)) == of_both
    now = 2 * REPEAT
    assert trials.of("base", lambda: measured.pop(0)) == of_both, "what nothing has slowed stands"
    assert trials.of("another", lambda: TRIAL) == TRIAL
    now = 3 * REPEAT
    assert trials.of("another", lambda: slow) == TRIAL, "where the system does not tell, the first trial stands"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the operating system does not tell who waits")
def test_a_trial_notices_busy_processors() -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        assert try_out(backend_for(decoder())).disturbed
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


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


def test_a_micro_step_takes_a_time_between_those_of_a_short_and_a_long_one() -> None:
    machine = Machine({"fp32": 100, "bf16": 105}, 50, short={"fp32": 50, "bf16": 80})
    assert machine.rates == {"fp32": pytest.approx(100), "bf16": pytest.approx(105)}
    short, middle = (
        replace(machine, micro_step=SHORT_TOKENS),
        replace(machine, micro_step=(SHORT_TOKENS + MICRO_TOKENS) / 2),
    )
    assert short.rates == {"fp32": pytest.approx(50), "bf16": pytest.approx(80)}
    seconds = (SHORT_TOKENS / 50 + MICRO_TOKENS / 100) / 2
    assert middle.rates["fp32"] == pytest.approx(middle.micro_step / seconds)
    assert (short.faster_in_bf16, machine.faster_in_bf16) == (True, False), "the types are compared at this size"
    slow = Machine({"fp32": 100}, 50, short={"fp32": 1e9}, micro_step=SHORT_TOKENS)
    assert slow.tokens_per_second == pytest.approx(100), "a disturbed trial makes no step faster than the long one"


@pytest.mark.parametrize(
    ("rate", "tokens"), [(0.0, 320), (40.0, 320), (218.0, 320), (400.0, 320), (1230.0, 1280), (50_000.0, 1280)]
)
def test_a_slower_machine_trains_in_shorter_micro_steps(rate: float, tokens: int) -> None:
    assert choose_micro_tokens(rate) == tokens
    assert choose_micro_tokens(rate * 1.02) == tokens  # the noise of a measurement changes nothing

"""The simulation of a node takes the turns that the engine takes, loses nothing, and reacts as a node does."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import adapters, simulator
from bench.simulate import Client, show
from bench.simulator import Arrival, MeasuredCosts, Node, Workload, arrivals, drift, figures, mean, simulate
from fortwo.engine import engine as real
from fortwo.engine.adapter_import import import_adapter
from fortwo.engine.engine import Engine
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.execution.backend import backend_for
from fortwo.prompts import Prompt, Sampling
from fortwo.server.state import AppState
from tests.parts import as_decoder
from tests.serving import tiny_settings
from tests.test_engine import Ascii
from tests.tiny import tiny_model

# A step takes a second; a prompt takes ten milliseconds for each token.
EVEN = MeasuredCosts({1: 1.0, 96: 1.0}, {1: 0.01, 10_000: 100.0}, adapter_load=5.0, adapter_check=0.0)
WORKLOAD = Workload(rate=4.0, seconds=100.0, prompt=(1, 600), reply=(1, 40), adapters=30, alpha=1.0)
COSTS = MeasuredCosts({1: 0.01, 8: 0.02, 96: 0.1}, {16: 0.01, 1024: 0.3}, adapter_load=0.2, adapter_check=0.02)


class Recorded:
    """Costs that are equal for every turn, and what the turns were."""

    adapter_load = adapter_check = 0.0

    def __init__(self) -> None:
        self.turns: list[tuple[str, int]] = []

    def decode(self, rows: int) -> float:
        self.turns.append(("decode", rows))
        return 1.0

    def prefill(self, tokens: int) -> float:
        self.turns.append(("prefill", tokens))
        return 1.0


class RecordingRunner(Runner):
    turns: list[tuple[str, int]]

    def prefill(self, sequences: Sequence[Running], lengths: Sequence[int] | None = None) -> Tensor:
        assert lengths is not None
        self.turns.append(("prefill", sum(lengths)))
        return super().prefill(sequences, lengths)

    def step(self, sequences: Sequence[Running]) -> Tensor:
        self.turns.append(("decode", len(sequences)))
        return super().step(sequences)


def test_a_hand_made_case_is_as_the_scheduler_decides() -> None:
    """The second prompt does not fit the budget beside a reply: 256 of its tokens come first, then the other 44."""
    first, second = simulate([Arrival(0.0, 100, 3), Arrival(0.5, 300, 1)], Node(EVEN))
    assert first.tokens == pytest.approx([1.0, 2.0, 2.0 + 2.56 + 1.0])
    assert second.tokens == pytest.approx([5.56 + 0.44])


@pytest.mark.parametrize(
    "requests",
    [
        [(5, 4)],
        [(30, 3), (700, 5), (10, 1), (400, 9)],
        [(900, 2), (900, 2), (900, 2), (20, 30)],
        [(7, number % 6 + 1) for number in range(real.MAX_RUNNING + 8)],
    ],
    ids=["one", "long and short", "more than a turn's prompts", "more than run at once"],
)
def test_the_turns_are_those_of_the_real_engine(requests: list[tuple[int, int]]) -> None:
    engine = Engine(threads=1)
    engine.start()
    decoder = as_decoder(tiny_model("llama", num_hidden_layers=1, max_position_embeddings=1024))
    runner = RecordingRunner(backend_for(decoder))
    runner.turns = []
    engine.add_base("tiny", runner, Ascii())
    gate = threading.Event()
    engine.call(gate.wait)  # all requests are accepted in the same turn
    replies = [
        # Prompts begin differently, so that no prefix is found again.
        engine.submit(Prompt("tiny", (number, *[5] * (length - 1)), None, Sampling(max_tokens=reply, ignore_eos=True)))
        for number, (length, reply) in enumerate(requests, 10)
    ]
    gate.set()
    for reply in replies:
        reply.wait(60)
    engine.close()
    recorded = Recorded()
    simulate([Arrival(0.0, length, reply) for length, reply in requests], Node(recorded))
    assert recorded.turns == runner.turns


def test_the_budgets_are_those_of_the_engine() -> None:
    assert simulator.PROMPT_TOKENS == real.PROMPT_TOKENS
    assert simulator.PROMPT_TOKENS_WHILE_DECODING == real.PROMPT_TOKENS_WHILE_DECODING


REQUESTS = st.lists(
    st.builds(
        Arrival, st.floats(0, 20), st.integers(1, 700), st.integers(1, 20), st.one_of(st.none(), st.integers(0, 9))
    ),
    max_size=40,
)


@settings(max_examples=40)
@given(REQUESTS, st.integers(1, 4), st.integers(0, 8), st.integers(1, 6))
def test_every_request_gets_all_its_tokens_or_is_refused(
    requests: list[Arrival], max_adapters: int, queue: int, running: int
) -> None:
    outcomes = simulate(requests, Node(COSTS, max_adapters, queue, running))
    assert Counter(one.arrival for one in outcomes) == Counter(requests)
    for one in outcomes:
        assert len(one.tokens) == (0 if one.refused else one.arrival.reply)
        assert all(earlier <= later for earlier, later in pairwise([one.arrival.at, *one.tokens]))


def test_arrivals_have_the_rate_the_lengths_and_the_popularity_that_were_asked_for() -> None:
    workload = Workload(50.0, 200.0, (3, 9), (2, 4), adapters=10, alpha=1.0)
    found = arrivals(workload, seed=3)
    assert found == arrivals(workload, seed=3) != arrivals(workload, seed=4)
    assert len(found) == pytest.approx(10_000, rel=0.05)
    assert {one.prompt for one in found} == set(range(3, 10))
    assert {one.reply for one in found} == {2, 3, 4}
    asked = Counter(one.adapter for one in found)
    assert asked[0] / asked[4] == pytest.approx(5, rel=0.2)
    assert {one.adapter for one in arrivals(Workload(1.0, 50.0, (1, 1), (1, 1)))} == {None}


def test_a_load_delays_its_requests_alone_and_is_shared_by_them() -> None:
    base, first, same = simulate([Arrival(0, 2, 2), Arrival(0, 2, 1, 7), Arrival(1, 2, 1, 7)], Node(EVEN))
    assert base.tokens[-1] < 3
    assert first.tokens[0] == pytest.approx(5.04)
    assert same.tokens == first.tokens


def test_adapters_are_loaded_one_after_the_other_and_the_least_recently_used_gives_way() -> None:
    requests = [
        Arrival(0, 2, 1, 1),
        Arrival(0, 2, 1, 2),
        Arrival(20, 2, 1, 1),
        Arrival(30, 2, 1, 3),
        Arrival(40, 2, 1, 1),
    ]
    waits = [one.tokens[0] - one.arrival.at for one in simulate(requests, Node(EVEN, max_adapters=2))]
    assert waits == pytest.approx([5.02, 10.02, 0.02, 5.02, 0.02]), "2 gave way to 3"
    waits = [one.tokens[0] - one.arrival.at for one in simulate(requests, Node(EVEN, max_adapters=1))]
    assert waits == pytest.approx([5.02, 10.02, 5.02, 5.02, 5.02])


def test_an_adapter_that_answers_gives_way_to_none() -> None:
    answers, refused = simulate([Arrival(0, 1, 30, 1), Arrival(6, 1, 1, 2)], Node(EVEN, max_adapters=1))
    assert len(answers.tokens) == 30
    assert refused.refused == "every adapter in memory is in use"


def test_what_does_not_fit_the_queue_is_refused() -> None:
    outcomes = simulate([Arrival(0, 1, 5)] * 9, Node(EVEN, queue=2, running=4))
    assert [one.refused for one in outcomes] == [None] * 6 + ["queue full"] * 3


def test_more_load_and_slower_steps_make_requests_wait_longer() -> None:
    def first(rate: float = 4.0, factor: float = 1.0, max_adapters: int = 64) -> float:
        costs = MeasuredCosts(
            {rows: factor * seconds for rows, seconds in COSTS.decode_seconds.items()},
            {tokens: factor * seconds for tokens, seconds in COSTS.prefill_seconds.items()},
            COSTS.adapter_load,
            COSTS.adapter_check,
        )
        workload = Workload(rate, WORKLOAD.seconds, WORKLOAD.prompt, WORKLOAD.reply, WORKLOAD.adapters)
        return figures(simulate(arrivals(workload), Node(costs, max_adapters))).first[1]

    assert first(rate=1.0) < first(rate=4.0) < first(rate=16.0)
    assert first(factor=0.5) < first() < first(factor=2.0)
    assert first() < first(max_adapters=12)


def test_a_node_that_keeps_up_gives_as_many_tokens_as_are_asked_for() -> None:
    requests = arrivals(WORKLOAD)
    found = figures(simulate(requests, Node(COSTS)))
    asked = sum(one.reply for one in requests) / WORKLOAD.seconds
    assert found.refused == 0
    assert found.throughput == pytest.approx(asked, rel=0.03)


def test_measured_costs_are_on_lines_and_in_proportion_beyond() -> None:
    costs = MeasuredCosts({1: 1.0, 3: 2.0, 5: 2.5}, {10: 1.0}, 0, 0)
    assert [costs.decode(rows) for rows in (1, 2, 3, 4, 5, 10)] == [1.0, 1.5, 2.0, 2.25, 2.5, 5.0]
    assert [costs.prefill(tokens) for tokens in (1, 10, 20)] == [1.0, 1.0, 2.0]


def test_two_measurements_have_a_mean_and_a_drift() -> None:
    before = MeasuredCosts({1: 1.0, 2: 2.0, 4: 3.0}, {16: 1.0}, 0.2, 0.1)
    after = MeasuredCosts({1: 2.0, 2: 3.0, 4: 3.0}, {16: 2.0}, 0.4, 0.3)
    assert mean(before, after) == MeasuredCosts({1: 1.5, 2: 2.5, 4: 3.0}, {16: 1.5}, pytest.approx(0.3), 0.2)
    assert drift(before, after) == 1.5
    assert drift(after, after) == 1.0


@pytest.mark.slow
def test_a_real_run_answers_or_refuses_each_request(home: Path, tiny: Path) -> None:
    """A run begins as a simulation does, without an adapter in memory, although the one imported last was there. So it
    is loaded after the other one, and finds the only place taken by that."""
    state = AppState(tiny_settings(home, tiny, max_adapters=1))
    try:
        names = []
        for folder in adapters.write(home / "made", 2, "tiny", tiny / "config.json"):
            import_adapter(folder.name, folder, state.catalog, state.adapters, state.registry)
            names.append(folder.name)
        outcomes = Client(state, names).play([Arrival(0, 9, 900, 0), Arrival(0, 9, 2, 1), Arrival(0, 9, 3)])
    finally:
        state.close()
    assert [len(one.tokens) for one in outcomes] == [900, 0, 3]
    assert "all 1 adapters in memory are in use" in str(outcomes[1].refused)
    assert outcomes[0].tokens == sorted(outcomes[0].tokens)
    assert figures(outcomes).refused == 1


def test_the_table_shows_the_difference_of_the_prediction() -> None:
    predicted = simulator.Figures(110.0, (0.5, 1.0), (0.02, 0.04), 0)
    measured = simulator.Figures(100.0, (1.0, 1.0), (0.02, 0.05), 0)
    differences = list(show(predicted, measured).columns[3].cells)
    assert differences == ["+10%", "-50%", "+0%", "+0%", "-20%", ""]
    assert set(show(predicted, None).columns[3].cells) == {""}

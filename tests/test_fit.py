"""Whether a base fits into memory, from its dimensions alone."""

from __future__ import annotations

from typing import Any

import pytest

from fortwo.hub.bundled import BUNDLED
from fortwo.train.fit import fit, held_format, verdict

GIB = 1 << 30
PUBLISHED = {  # millions of parameters, as the models' own pages say
    "smollm2-135m-instruct": 135,
    "codellama-7b-instruct": 6738,
    "smollm2-360m-instruct": 362,
    "smollm2-1.7b-instruct": 1711,
    "smollm3-3b": 3080,
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1720,
    "qwen3-4b": 4020,
    "qwen2.5-0.5b-instruct": 494,
    "qwen2.5-1.5b-instruct": 1540,
    "qwen2.5-3b-instruct": 3090,
    "llama-3.2-1b-instruct": 1236,
    "llama-3.2-3b-instruct": 3213,
    "gemma-3-270m-it": 268,
    "gemma-3-1b-it": 1000,
    "phi-4-mini-instruct": 3836,
}


@pytest.mark.parametrize("id", BUNDLED)
def test_the_dimensions_give_the_published_number_of_parameters(id: str) -> None:
    found = fit(BUNDLED[id].config, "auto", 64 * GIB)
    assert found is not None
    assert found.parameters == pytest.approx(PUBLISHED[id] * 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("memory", "form", "serving"),
    [(64, "fp32", "fits"), (32, "bf16", "fits"), (16, "nf4", "fits"), (7, "nf4", "tight"), (4, "nf4", "too large")],
)
def test_seven_billion_parameters_need_so_much(memory: int, form: str, serving: str) -> None:
    found = fit(BUNDLED["codellama-7b-instruct"].config, "auto", memory * GIB)
    assert found is not None
    assert (found.weight_format, found.serving) == (form, serving)
    assert found.teach > found.serve > 0


def test_the_setting_decides_the_form() -> None:
    config = BUNDLED["qwen3-0.6b"].config
    sizes = [fit(config, form, 8 * GIB).serve for form in ("nf4", "int4", "int8", "bf16", "fp32")]  # type: ignore[union-attr]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 4 * 596_000_000


@pytest.mark.parametrize(
    ("needed", "word"), [(0, "fits"), (75, "fits"), (76, "tight"), (100, "tight"), (101, "too large")]
)
def test_the_verdict(needed: int, word: str) -> None:
    assert verdict(needed, 100) == word
    assert held_format(25, 200) == "fp32"


WHOLE: dict[str, Any] = BUNDLED["qwen3-0.6b"].config


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"hidden_size": "64"}, {"num_attention_heads": 0}])
def test_dimensions_that_cannot_be_read_give_no_verdict(change: dict[str, Any]) -> None:
    assert fit({**WHOLE, **change}, "auto", GIB) is None
    assert fit({}, "auto", GIB) is None
    assert fit({"text_config": WHOLE}, "auto", GIB) == fit(WHOLE, "auto", GIB)


def test_the_experts_of_a_mixture_are_not_counted_as_one_network() -> None:
    config = {**BUNDLED["codellama-7b-instruct"].config, "num_experts": 8}
    assert fit(config, "auto", 64 * GIB) is None

"""The digest of a base: it changes with all that changes replies, and not with how a model was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fortwo.hub.identity import identity, network
from fortwo.records import Json
from tests.tiny import save_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_directory(tmp_path / "base")


def change(file: Path, **keys: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | keys))


def added_token(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 262, "content": "<extra>"})
    file.write_text(json.dumps(content))


CHANGES = {
    "positions": lambda d: change(d / "config.json", rope_parameters={"rope_type": "linear", "factor": 8.0}),
    "theta": lambda d: change(d / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "heads": lambda d: change(d / "config.json", num_attention_heads=8),
    "eps": lambda d: change(d / "config.json", rms_norm_eps=1e-5),
    "template": lambda d: (d / "chat_template.jinja").write_text("{{ messages }}"),
    "end of a reply": lambda d: change(d / "generation_config.json", eos_token_id=[2, 5]),
    "tokenizer": added_token,
    "eos token": lambda d: change(d / "tokenizer_config.json", eos_token="<unk>"),
    "architecture": lambda d: change(d / "config.json", architectures=["MistralForCausalLM"]),
}
SAME = {
    "version": lambda d: change(d / "config.json", transformers_version="4.0", torch_dtype="bfloat16", use_cache=False),
    "false": lambda d: change(d / "config.json", attention_bias=False, mlp_bias=None),
    "older name of positions": lambda d: change(
        d / "config.json", rope_parameters=None, rope_scaling=None, rope_theta=10000.0
    ),
    "padding": lambda d: change(d / "tokenizer.json", truncation=None, padding=None),
    "readme": lambda d: (d / "README.md").write_text("words"),
    "template elsewhere": lambda d: (
        change(d / "tokenizer_config.json", chat_template=(d / "chat_template.jinja").read_text()),
        (d / "chat_template.jinja").unlink(),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_replies_changes_the_digest(directory: Path, change: Any) -> None:
    before = identity(directory, "w")
    change(directory)
    assert identity(directory, "w") != before


@pytest.mark.parametrize("change", SAME.values(), ids=SAME.keys())
def test_how_a_model_was_saved_does_not(directory: Path, tmp_path: Path, change: Any) -> None:
    before = identity(directory, "w")
    shutil.copytree(directory, tmp_path / "elsewhere")
    change(tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere", "w") == before != identity(directory, "other weights")


def test_the_two_spellings_of_positions_are_one() -> None:
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}
    assert network(new) == network(old)
    assert network({"head_dim": 16, "num_attention_heads": 4, "hidden_size": 64}) == network(
        {"num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 4}
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"use_parallel_residual": False}, {}),  # GPT-NeoX's default is true
        ({"attn_logit_softcapping": None}, {}),  # Gemma 2's default is 50
        ({"max_window_layers": 1}, {"max_window_layers": 2}),
        ({"residual_dropout_scale": 0}, {}),
    ],
)
def test_false_null_and_zero_are_values(one: Json, other: Json) -> None:
    assert network(one) != network(other)


@pytest.mark.parametrize("said", [{"attention_bias": False}, {"use_sliding_window": False}, {"rope_scaling": None}])
def test_a_default_that_is_spelled_out_says_nothing(said: Json) -> None:
    assert network(said) == network({})

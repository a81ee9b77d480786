"""Families beside Llama on a running server: chat, a job, and the adapter that it leaves, which PEFT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from serving import refused, serve, tiny_settings
from tiny import save_directory, save_gguf, tiny_model

ROWS = [
    {"instruction": f"What is {thing}?", "input": "", "output": answer}
    for thing, answer in (("up", "the sky"), ("down", "the sea"), ("left", "the wood"), ("right", "the town"))
]
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("gemma3", {**GEMMA, "num_hidden_layers": 7}, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
    ("gemma2", GEMMA, {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
    ("phi3", {"sliding_window": 16}, {"qkv_proj", "gate_up_proj"}),
]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "options", "targets"), CASES)
def test_chat_and_a_job(family: str, options: dict[str, Any], targets: set[str], tmp_path: Path) -> None:
    base = save_directory(tmp_path / "base", family, **options)
    with serve(tiny_settings(tmp_path / "home", base)) as served:
        reply = served.chat(max_tokens=40, temperature=0)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["prompt_tokens"] > 16  # longer than the window
        body = {
            "adapter_name": "taught",
            "dataset": {"examples": ROWS},
            "training_config": {"max_steps": 40, "learning_rate": 1e-2},
        }
        started = served.post("/api/training/start", body)
        assert started.status_code == 202, started.text
        job = served.wait(started.json()["job_id"])
        assert job["status"] == "succeeded", job
        asked = [{"role": "user", "content": "What is up?"}]
        told = served.chat(model="taught", messages=asked, temperature=0, max_tokens=20)
        assert told.json()["choices"][0]["message"]["content"] == "the sky"
        version = served.state.adapters.get("taught")
        model = peft.PeftModel.from_pretrained(tiny_model(family, **options), version.path)
        assert set(model.peft_config["default"].target_modules) == targets | {"o_proj", "down_proj"}


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.9.attn_norm.weight"])
def test_a_file_of_another_network_is_refused_by_its_tensor(name: str, tmp_path: Path) -> None:
    import numpy as np

    file = save_gguf(tmp_path / "odd.gguf", tiny_model("llama"), extra={name: (np.ones(64, np.float32), None)})
    with serve(tiny_settings(tmp_path / "home", file)) as served:
        assert name in refused(served.chat(), 400, "unsupported_model", None)

"""Adapters for measuring: random, of rank 16 on all seven projections, saved as PEFT saves them.

The same seed gives the same files. B is as large as an adapter's after some hundred steps, so that replies differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 16
ALPHA = 32
SEED = 42


def write(folder: Path, count: int, model: str, config_file: Path) -> list[Path]:
    """Directories a00, a01, ... under `folder`, for the Llama-shaped base that config_file describes.

    model: what is written down as the base's name.
    """
    config = json.loads(config_file.read_text())
    shapes = _projections(config)
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
    }
    random = np.random.default_rng(SEED)
    directories = []
    for number in range(count):
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name, (out, into) in shapes.items():
                at = f"base_model.model.model.layers.{layer}.{name}"
                spread = into**-0.5
                tensors[f"{at}.lora_A.weight"] = random.uniform(-spread, spread, (RANK, into)).astype(np.float32)
                tensors[f"{at}.lora_B.weight"] = random.normal(0.0, 0.005, (out, RANK)).astype(np.float32)
        directory = folder / f"a{number:02}"
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(json.dumps(peft_config, indent=2))
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
        directories.append(directory)
    return directories


def _projections(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each projection's weights in one layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

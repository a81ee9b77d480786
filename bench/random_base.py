"""A base model of CodeLlama-7B's shape with random weights, to measure on what no small model shows.

    python -m bench.random_base DIRECTORY TOKENIZER_DIRECTORY [LAYERS]

Writes bf16 shards, one a layer (13.5 GB for all 32), the same ones every time. The tokenizer and chat template are
those of another model, of which only tokens that this vocabulary has room for are left.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, HEADS, LAYERS, VOCABULARY = 4096, 11008, 32, 32, 32016
STANDARD_DEVIATION = 0.02
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}


def make(directory: Path, tokenizer: Path, layers: int = LAYERS) -> Path:
    """`directory`, which must exist, as a model in Hugging Face's layout."""
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    _cut_tokenizer(tokenizer, directory)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(layers, generator)):
        file = f"model-{number:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _shards(layers: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, STANDARD_DEVIATION, generator=generator)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": ones}
    yield {"lm_head.weight": random(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        square = {f"{at}.self_attn.{name}_proj.weight": random(HIDDEN, HIDDEN) for name in "qkvo"}
        up = {f"{at}.mlp.{name}_proj.weight": random(INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        down = {f"{at}.mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE)}
        norms = {f"{at}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        yield square | up | down | norms


def _cut_tokenizer(source: Path, directory: Path) -> None:
    """Byte pairs are merged in the order of their tokens' numbers: leaving out the last leaves a tokenizer."""
    described = json.loads((source / "tokenizer.json").read_text())
    model = described["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (directory / "tokenizer.json").write_text(json.dumps(described))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, directory)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else LAYERS)

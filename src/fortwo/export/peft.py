"""PEFT's folder, and the form of it that vLLM loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from fortwo import disk
from fortwo.adapters.version_files import CONFIG, TENSORS
from fortwo.errors import InvalidRequest
from fortwo.export import uniform
from fortwo.export.source import Source
from fortwo.hub import weights

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
VLLM_DEFAULT_RANK = 16


def write_peft(source: Source, folder: Path) -> list[str]:
    """The published files, with a base_model_name_or_path that PEFT finds. Returns what the user should know."""
    shutil.copyfile(Path(source.version.path) / TENSORS, folder / TENSORS)
    (folder / CONFIG).write_bytes(disk.dump({**source.peft, "base_model_name_or_path": source.named}))
    return [f"Load it with peft.PeftModel.from_pretrained(base, folder); the base is {source.named}."]


def vllm_rank(source: Source) -> int:
    """The --max-lora-rank that vLLM needs. Raises InvalidRequest for a rank that vLLM refuses."""
    rank = uniform.rank(source)
    if rank > VLLM_RANKS[-1]:
        raise InvalidRequest(
            f"{source.version.id} has the rank {rank}, but vLLM loads at most {VLLM_RANKS[-1]}.",
            param="to",
            hint="Export it as merged, which vLLM serves as a model.",
        )
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def write_vllm(source: Source, folder: Path) -> list[str]:
    """PEFT's files as vLLM reads them: one rank, one scale and names of modules, without patterns or lists of layers.
    Raises InvalidRequest for a rank that vLLM refuses."""
    needed = vllm_rank(source)
    rank = uniform.rank(source)
    tensors = {}
    for module, a, b in uniform.halves(source):
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.named,
        "r": rank,
        "lora_alpha": uniform.scale(source) * rank,
        "lora_dropout": 0.0,
        "target_modules": uniform.names(source),
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / TENSORS).write_bytes(weights.serialize(tensors))
    (folder / CONFIG).write_bytes(disk.dump(config))
    name = source.version.name
    return [
        f"Serve it with: vllm serve {source.named} --enable-lora --max-lora-rank {needed} --lora-modules {name}=DIR"
    ]

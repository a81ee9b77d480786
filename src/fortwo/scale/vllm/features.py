"""What vLLM can serve of an adapter. Pure functions."""

from __future__ import annotations

import re

from fortwo.errors import InvalidRequest, all_of
from fortwo.export.peft import VLLM_RANKS
from fortwo.nn.lora_config import LoraConfig

_MAX_RANK = re.compile(r"LoRA rank \d+ is greater than max_lora_rank (\d+)")


def check(name: str, config: LoraConfig, max_rank: int | None) -> None:
    """Raises InvalidRequest naming everything that vLLM does not serve. name: of the adapter, for the message;
    max_rank: the --max-lora-rank of the running vLLM, None where it is not known."""
    found = []
    if config.use_dora:
        found.append(
            InvalidRequest(
                f"{name} has use_dora = true, and vLLM does not serve DoRA.",
                param="use_dora",
                hint="Train it without use_dora, or serve it with FORTWO_ENGINE=own.",
            )
        )
    rank = max([config.r, *(rank for _, rank in config.rank_pattern)])
    if max_rank is not None and rank > max_rank:
        needed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
        start = "" if needed is None else f"Start vLLM with --max-lora-rank {needed}, or "
        found.append(
            InvalidRequest(
                f"{name} has the rank {rank}, and vLLM was started with --max-lora-rank {max_rank}.",
                param="r",
                hint=f"{start or 'T'}{'t' if start else ''}rain it with a rank of at most {max_rank}.",
            )
        )
    if found:
        raise all_of(found)


def max_rank(message: str) -> int | None:
    """vLLM's --max-lora-rank, from its refusal of a rank above it; None where the message says something else."""
    found = _MAX_RANK.search(message)
    return None if found is None else int(found[1])

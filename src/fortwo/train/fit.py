"""Whether a base fits into a machine's memory, from its dimensions alone: nothing of it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fortwo.errors import UnsupportedModel
from fortwo.nn.config import DecoderConfig
from fortwo.nn.families import EXPERTS
from fortwo.prompts import MAX_RUNNING, MIN_ROW_TOKENS
from fortwo.records import Json
from fortwo.train import estimate

Verdict = Literal["fits", "tight", "too large"]
TIGHT = 0.75  # of the memory; above it other programs may leave too little
CONTEXT = 2048  # tokens of a conversation whose keys and values are counted
RANK = 16
SHARE = 0.5  # of the memory: what `auto` may hold, as in execution.autotuning
PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0625, "gguf": 0.6875, "int4": 0.625, "nf4": 0.5625}  # bytes
BLOCKS = 1.12  # bytes of what the numbers of a quantised file are held in, relative to the file's
_DIMENSIONS = (
    "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size"
).split()


@dataclass(frozen=True)
class Fit:
    """Bytes: serve, of a server with this base and one conversation; teach, at the peak of a job; train, of its steps
    alone; memory, of the device that serves; training_memory, of the one for jobs, None if it is the same.
    weight_format: in which the weights are held."""

    parameters: int
    weight_format: str
    serve: int
    teach: int
    train: int
    memory: int
    training_memory: int | None = None

    @property
    def serving(self) -> Verdict:
        return verdict(self.serve, self.memory)

    @property
    def teaching(self) -> Verdict:
        return verdict(self.teach, self.memory if self.training_memory is None else self.training_memory)


@dataclass(frozen=True)
class _Weights:
    """An estimate.Network: what the weights would take. copy: of them, for training."""

    config: DecoderConfig
    bytes: int
    copy: int

    def bytes_to_train(self, bf16: bool) -> int:
        return self.copy


def verdict(needed: int, memory: int) -> Verdict:
    if needed > memory:
        return "too large"
    return "fits" if needed <= TIGHT * memory else "tight"


def fit(config: Json, weights: str, memory: int, blocks: int = 0) -> Fit | None:
    """How a base of these dimensions, under the names of config.json, fits; None where they cannot be read. weights:
    FORTWO_WEIGHTS; memory: bytes of the device; blocks: bytes of the weights as a quantised file has them, 0 if there
    are none."""
    shape = _shape(config)
    if shape is None:
        return None
    automatic = "gguf" if blocks else held_format(shape.parameters, memory)
    weight_format = automatic if weights == "auto" else weights
    embedding = shape.hidden * shape.vocabulary
    held = (
        PER_PARAMETER[weight_format] * (shape.parameters - embedding)
        + max(2.0, PER_PARAMETER[weight_format]) * embedding
    )
    if weight_format == "gguf":
        held = BLOCKS * blocks or PER_PARAMETER["gguf"] * shape.parameters
    copy = 2 * shape.parameters if weight_format in ("int8", "gguf", "int4") else 0
    base = estimate.BaseFacts.of("", _Weights(shape, round(held), copy))
    ranks = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), RANK)
    job = estimate.memory(
        base,
        micro_step=estimate.MICRO_TOKENS,
        ranks=ranks,
        bf16=weight_format != "fp32",
        checkpointing=True,
        best=True,
        moments=estimate.MOMENTS,
        replies=MAX_RUNNING * MIN_ROW_TOKENS,
    )
    serve = estimate.PROCESS + base.bytes + CONTEXT * base.kv_bytes_per_token
    return Fit(shape.parameters, weight_format, round(serve), max(job.training, job.exam), job.training, memory)


def held_format(parameters: int, memory: int) -> str:
    """The format that `auto` holds in so much memory: the first whose weights take no more than half of it."""
    for weight_format in ("fp32", "bf16"):
        if PER_PARAMETER[weight_format] * parameters <= SHARE * memory:
            return weight_format
    return "nf4"


def _shape(config: Json) -> DecoderConfig | None:
    """The dimensions as those of a plain decoder: what a family does with them takes no more memory."""
    text = config.get("text_config")
    found: dict[str, Any] = {**config, **(text if isinstance(text, dict) else {})}
    if any(found.get(key) for key in EXPERTS):  # their number of parameters is not that of a plain decoder
        return None
    sizes = {key: found[key] for key in _DIMENSIONS if found.get(key) is not None}
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return None
    tied = bool(found.get("tie_word_embeddings", False))
    plain = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": CONTEXT, "tie_word_embeddings": tied}
    try:
        return DecoderConfig.from_hf({**plain, **sizes})
    except (UnsupportedModel, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None

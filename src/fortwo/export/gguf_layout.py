"""How llama.cpp names and lays out what transformers saves: the opposite direction of hub.gguf_networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fortwo.errors import UnsupportedModel
from fortwo.export.source import Source
from fortwo.hub.gguf_networks import STORED, WIDE_QUERIES
from fortwo.records import Json

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

_ARCHITECTURES = {stored.architecture: name for name, stored in STORED.items()} | {"MistralForCausalLM": "llama"}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Layout:
    """Names, values and metadata of one base. Raises UnsupportedModel for an architecture, or for a part of one, that
    fortwo cannot write as GGUF."""

    def __init__(self, source: Source) -> None:
        self._base = source.base.id
        self._config = source.config
        named = (source.config.get("architectures") or [None])[0]
        if named not in _ARCHITECTURES:
            raise UnsupportedModel(
                f"The base {self._base!r} is a {named}, which fortwo cannot write as GGUF.",
                param="to",
                hint=f"GGUF is written for {', '.join(sorted(_ARCHITECTURES))}. Export it as merged, and convert that "
                "with llama.cpp's convert_hf_to_gguf.py.",
            )
        self.architecture = _ARCHITECTURES[named]
        self.decoder = source.decoder
        self._stored = STORED[self.architecture]
        self._inner = {ours: theirs for theirs, ours in self._stored.layer.items()}

        self._check_query_scale()

    def _check_query_scale(self) -> None:
        """llama.cpp's files do not hold by what queries are divided in Gemma's networks: it is fixed for each size."""
        if self.architecture not in WIDE_QUERIES:
            return
        network = self.decoder
        wide = network.layers == WIDE_QUERIES[self.architecture]
        supposed = network.hidden // network.heads if wide else network.head_size
        scalar = self._config.get("query_pre_attn_scalar", 256)
        if scalar != supposed:
            raise UnsupportedModel(
                f"The base {self._base!r} has query_pre_attn_scalar = {scalar}, but llama.cpp takes {supposed} for a "
                f"{self.architecture} of this size.",
                param="to",
                hint="Export it as merged.",
            )

    def name(self, name: str) -> str:
        """llama.cpp's name of a tensor such as model.layers.0.mlp.up_proj.weight. Raises UnsupportedModel for one that
        it has no name for."""
        stem, _, suffix = name.rpartition(".")
        if stem in _OUTER and suffix == "weight":
            return f"{_OUTER[stem]}.{suffix}"
        layer, _, inside = stem.removeprefix("model.layers.").partition(".")
        if stem.startswith("model.layers.") and inside in self._inner:
            return f"blk.{layer}.{self._inner[inside]}.{suffix}"
        raise UnsupportedModel(
            f"The base {self._base!r} has the tensor {name}, which llama.cpp has no place for in {self.architecture}.",
            param="to",
            hint="Export it as merged.",
        )

    def rows(self, values: np.ndarray, module: str) -> np.ndarray:
        """The output rows of a module, or of the B of its update, in llama.cpp's order. module: transformers' name
        without suffix."""
        heads = {"q_proj": self.decoder.heads, "k_proj": self.decoder.kv_heads}.get(module.rpartition(".")[2])
        if not self._stored.interleaved or heads is None:
            return values
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    def values(self, values: np.ndarray, name: str) -> np.ndarray:
        """A tensor of the base as llama.cpp's files have it."""
        module = name.rpartition(".")[0]
        if module.endswith("norm"):
            return values + self._stored.norm_offset
        return self.rows(values, module)

    def add_metadata(self, writer: GGUFWriter) -> None:
        """The network's sizes and features."""
        network, rope = self.decoder, self._rope()
        writer.add_block_count(network.layers)
        writer.add_context_length(int(self._config.get("max_position_embeddings") or network.context))
        writer.add_embedding_length(network.hidden)
        writer.add_feed_forward_length(network.intermediate)
        writer.add_head_count(network.heads)
        writer.add_head_count_kv(network.kv_heads)
        writer.add_key_length(network.head_size)
        writer.add_value_length(network.head_size)
        writer.add_layer_norm_rms_eps(network.norm_eps)
        writer.add_rope_freq_base(network.rope.theta)
        writer.add_rope_dimension_count(network.rope.size)
        writer.add_vocab_size(network.vocabulary)
        if network.windowed and network.window:
            if self.architecture in ("llama", "qwen2", "qwen3"):
                self._refuse_window(network.window)
            else:
                writer.add_sliding_window(network.window)
        if network.window_rope is not None:
            writer.add_rope_freq_base_swa(network.window_rope.theta)
        if network.attention_softcap:
            writer.add_attn_logit_softcapping(network.attention_softcap)
        if network.logit_softcap:
            writer.add_final_logit_softcapping(network.logit_softcap)
        self._add_scaling(writer, rope)

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """What llama.cpp keeps in tensors and transformers in config.json."""
        import numpy as np

        rope, network = self._rope(), self.decoder
        if self._kind(rope) == "llama3":
            size, factor = network.rope.size, float(rope["factor"])
            lengths = 2 * np.pi * network.rope.theta ** (np.arange(0, size, 2) / size)
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            smooth = np.clip((rope["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
            return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}
        if self._kind(rope) == "longrope":
            return {
                f"rope_factors_{one}.weight": np.array(rope[f"{one}_factor"], np.float32) for one in ("short", "long")
            }
        return {}

    def _rope(self) -> Json:
        found: Json = {**(self._config.get("rope_scaling") or {}), **(self._config.get("rope_parameters") or {})}
        full: Json = found.get("full_attention", found)
        return full

    @staticmethod
    def _kind(rope: Json) -> str:
        return str(rope.get("rope_type", rope.get("type", "default")))

    def _add_scaling(self, writer: GGUFWriter, rope: Json) -> None:
        from gguf import RopeScalingType

        kind = self._kind(rope)
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(kind))
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind in ("yarn", "longrope"):
            original: Any = rope.get("original_max_position_embeddings") or self._config.get(
                "original_max_position_embeddings", self._config.get("max_position_embeddings")
            )
            writer.add_rope_scaling_orig_ctx_len(int(original))
        if kind == "longrope":
            writer.add_rope_scaling_attn_factors(self.decoder.rope.amplitude)
        if kind not in ("default", "linear", "yarn", "longrope", "llama3", "su", "dynamic"):
            raise UnsupportedModel(
                f"The base {self._base!r} has rope_type {kind!r}, which fortwo cannot write as GGUF.",
                param="to",
                hint="Export it as merged.",
            )

    def _refuse_window(self, window: int) -> None:
        """llama.cpp's networks of these kinds have no window: within it they compute the same, beyond it they do
        not."""
        context = int(self._config.get("max_position_embeddings") or 0)
        if window < context:
            raise UnsupportedModel(
                f"Layers of the base {self._base!r} see the last {window} tokens alone, and llama.cpp's "
                f"{self.architecture} has no such window.",
                param="to",
                hint="Export it as merged, for a program that has it.",
            )

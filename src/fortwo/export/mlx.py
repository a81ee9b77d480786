"""MLX's adapter layout: x @ lora_a @ lora_b, in the names of the model's modules."""

from __future__ import annotations

from pathlib import Path

from fortwo import disk
from fortwo.errors import InvalidRequest
from fortwo.export import uniform
from fortwo.export.source import Source
from fortwo.hub import weights

TENSORS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def write_mlx(source: Source, folder: Path) -> list[str]:
    """adapters.safetensors with lora_a (in, r) and lora_b (r, out), and adapter_config.json. Modules of mlx_lm's list
    of keys that the adapter does not change have no tensors, and mlx_lm leaves them at zero."""
    tensors, keys = {}, dict[str, None]()
    for module, a, b in uniform.halves(source):
        before, layer, inside = _parts(source, module)
        tensors[f"{before}{layer}.{inside}.lora_a"] = a.T
        tensors[f"{before}{layer}.{inside}.lora_b"] = b.T
        keys[inside] = None
    config = {
        "model": source.named,
        "fine_tune_type": "lora",
        "num_layers": source.config["num_hidden_layers"],
        "lora_parameters": {
            "rank": uniform.rank(source),
            "scale": uniform.scale(source),
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    (folder / TENSORS).write_bytes(weights.serialize(tensors))
    (folder / CONFIG).write_bytes(disk.dump(config))
    return [f"Try it with: mlx_lm.generate --model {source.named} --adapter-path DIR --prompt ..."]


def _parts(source: Source, module: str) -> tuple[str, str, str]:
    """The name before the layer's number, the number, and the name within the layer."""
    before, found, rest = module.partition("layers.")
    layer, _, inside = rest.partition(".")
    if not found or not layer.isdigit() or not inside:
        raise InvalidRequest(
            f"{source.version.id} changes {module}, which is in no list of layers as MLX knows them.",
            param="to",
            hint="Export it as merged, and convert that with mlx_lm.convert.",
        )
    return before + found, layer, inside

"""Recognises models that are quantised already, which fortwo cannot read: it quantises models itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fortwo.errors import UnsupportedModel
from fortwo.records import Json

HINT = "Add the model that is not quantised. fortwo quantises it itself, as FORTWO_WEIGHTS says."
_TENSORS = (".qweight", ".SCB", ".absmax", ".quant_map", ".weight_scale", ".weight_scale_inv", ".weight_packed")


def check_quantisation(where: str, config: Json, tensors: Iterable[str] = ()) -> None:
    """Raises UnsupportedModel, which names the method, for a config.json or names of tensors of a quantised model."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                raise UnsupportedModel(
                    f"{where} is quantised already ({method(part[key])})", param="quantization_config", hint=HINT
                )
    if found := next((name for name in tensors if name.endswith(_TENSORS)), None):
        raise UnsupportedModel(f"{where} is quantised already: it has the tensor {found!r}", hint=HINT)


def method(quantisation: Any) -> str:
    """The quant_method, with its number of bits if that is said."""
    if not isinstance(quantisation, dict):
        return str(quantisation)[:80]
    by_flag = "bitsandbytes" if quantisation.keys() & {"load_in_4bit", "load_in_8bit"} else "an unknown method"
    name = str(quantisation.get("quant_method") or by_flag)
    flags = {bits for bits in (4, 8) if quantisation.get(f"load_in_{bits}bit")}
    bits = quantisation.get("bits") or next(iter(flags), None) or quantisation.get("w_bit")
    return f"quant_method {name}" + (f", {bits} bits" if bits else "")

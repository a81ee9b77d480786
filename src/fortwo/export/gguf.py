"""GGUF files for llama.cpp: the adapter alone, and the base with the adapter merged into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.errors import InvalidRequest
from fortwo.export.gguf_layout import Layout
from fortwo.export.gguf_tokenizer import add_tokenizer
from fortwo.export.k_quants import BLOCK, quantize_q4_k, quantize_q6_k
from fortwo.export.merged import Progress, template_of
from fortwo.export.source import Source

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q4_K_M")
ADAPTER, MODEL = "adapter.gguf", "model.gguf"
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q5_1": 6, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5, "Q6_K": 6.6}
_HALF_BLOCK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # what llama.cpp takes where rows have no whole blocks of 256


def check_quantization(name: str) -> str:
    """llama.cpp's spelling of the name. Raises InvalidRequest."""
    if name.upper() not in QUANTIZATIONS:
        raise InvalidRequest(
            f"quantization = {name!r} is not one that fortwo writes.",
            param="quantization",
            hint=f"Choose one of {', '.join(QUANTIZATIONS)}. llama-quantize makes the others from F16.",
        )
    return name.upper()


def write_lora(source: Source, folder: Path) -> list[str]:
    """adapter.gguf with A and B of every module in fp32, under llama.cpp's names and in its order of rows."""
    import numpy as np
    from gguf import GGUFType, GGUFWriter

    layout, alpha = Layout(source), float(source.lora.alpha)
    writer = GGUFWriter(folder / ADAPTER, layout.architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(source.version.id)
    for module in source.modules:
        a, b = (half.numpy() for half in source.halves(module))
        ours = source.lora.scale(module) * a.shape[0] / alpha  # llama.cpp's scale is alpha / rank of the tensor
        name = layout.name(f"{module}.weight")
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(layout.rows(b, module) * np.float32(ours)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [f"Run it with: llama-server --model BASE.gguf --lora {ADAPTER}. BASE.gguf is {source.named} as GGUF."]


def write_model(source: Source, folder: Path, quantization: str, progress: Progress) -> list[str]:
    """model.gguf with merged weights, tokenizer and chat template. quantization: one of QUANTIZATIONS."""
    import numpy as np
    from gguf import GGUFType, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape

    layout = Layout(source)
    writer = GGUFWriter(folder / MODEL, layout.architecture)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(f"{source.base.id} with {source.version.id}")
    writer.add_file_type(LlamaFileType.ALL_F32 if quantization == "F32" else LlamaFileType[f"MOSTLY_{quantization}"])
    layout.add_metadata(writer)
    add_tokenizer(writer, source.base.directory, layout.decoder.vocabulary, template_of(source))
    tied = layout.decoder.tied
    names = {name: layout.name(name) for name in source.infos if not (tied and name == "lm_head.weight")}
    extra = layout.extra_tensors()
    for theirs, values in extra.items():
        writer.add_tensor_info(theirs, values.shape, values.dtype, values.nbytes)
    kinds = {}
    for name, theirs in names.items():
        shape = source.infos[name].shape
        kinds[name] = kind = _kind(theirs, shape, quantization, layout.decoder.layers, tied)
        stored = quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(stored))
        # The writer takes a shape in bytes for types that numpy does not have, and a plain one for those it has.
        plain = kind.name in ("F32", "F16")
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        writer.add_tensor_info(theirs, shape if plain else stored, dtype, size, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    done, total = 0, sum(source.infos[name].nbytes for name in names)
    for name, tensor in source.merged():
        if name in names:
            values = layout.values(tensor.float().numpy(), name)
            writer.write_tensor_data(quantized(np.ascontiguousarray(values, np.float32), kinds[name]))
            done += source.infos[name].nbytes
            progress(quantization, done, total)
    writer.close()
    return [f"Run it with: llama-server --model {MODEL}"]


def quantized(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """values (fp32) in the bytes of a type."""
    import numpy as np
    from gguf import quantize

    own: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_K": quantize_q4_k, "Q6_K": quantize_q6_k}
    found: np.ndarray = own[kind.name](values) if kind.name in own else quantize(values, kind)
    return np.ascontiguousarray(found)


def _kind(name: str, shape: tuple[int, ...], quantization: str, layers: int, tied: bool) -> GGMLQuantizationType:
    """The type of a tensor, by llama.cpp's rules: vectors are fp32, and Q4_K_M keeps the output, and the values and
    down projections of half of the layers, in Q6_K."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    chosen = quantization
    if quantization == "Q4_K_M":
        last = name == "output.weight" or (tied and name == "token_embd.weight")
        more = any(part in name for part in (".attn_v.", ".ffn_down.")) and _more_bits(int(name.split(".")[1]), layers)
        chosen = "Q6_K" if last or more else "Q4_K"
    elif quantization.startswith("Q") and quantization != "Q8_0" and name in ("output.weight",):
        chosen = "Q6_K"
    if shape[-1] % BLOCK and chosen in _HALF_BLOCK:
        chosen = _HALF_BLOCK[chosen]
    kind: GGMLQuantizationType = GGMLQuantizationType[chosen]
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2

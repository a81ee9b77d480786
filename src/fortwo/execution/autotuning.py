"""The formats a base model is served in: measured once on a machine, remembered, or as the setting says.

Knows weights and clocks; what becomes of the choice is `selection`'s, how a format multiplies `formats`'.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fortwo import hardware
from fortwo.errors import InvalidRequest
from fortwo.execution.decode_fused import WHOLE_STEP, Step
from fortwo.execution.prefill_fused import Prefill
from fortwo.kernels import cpu
from fortwo.kernels.isa import processor
from fortwo.nn.config import DecoderConfig
from fortwo.nn.decoder import Decoder, Hold, formats_of
from fortwo.nn.fused_weights import Fused
from fortwo.nn.lora_config import GROUPS, module_name
from fortwo.quantization.blocks import Read
from fortwo.quantization.blocks import dense as read_dense
from fortwo.quantization.formats import Frozen, HugePageArena, WeightFormat, dense, fits, head_format, quantize
from fortwo.quantization.grouped import Parts
from fortwo.quantization.matmul import multiplies_bf16
from fortwo.quantization.selection import ROWS, Choice, Measured, Measurements, Seconds, choose, worthwhile

if TYPE_CHECKING:
    from fortwo.nn.generic import GenericDecoder

SMALL = 10_000_000  # parameters; below them a forward is not made of products
SAMPLE = 100_000_000  # parameters that are measured; fewer would lie in the processor's caches
STEP_ROWS = 64  # at most of a decode step; with more rows one layer is enough to measure
APART = 7e-5, 6e-10  # seconds a layer, and of each of its rows for each hidden number, that a step takes longer in
# many calls than in one kernel: of 30 layers of 576 numbers 2 ms, and 0.3 ms a row
ERROR = 0.01  # of the weights, relative: what `auto` may lose by rounding them
SHARE = 0.5  # of the memory: what `auto` may hold

UNDISTURBED = 0.8  # of its threads' time: what a measurement must have had of the processor to be remembered

Timed = tuple[Seconds, float]  # seconds by format and rows; threads that the processor ran for it on average
Run = Callable[[Callable[[], Timed]], Timed]
log = logging.getLogger(__name__)


def serving(
    id: str,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    device: torch.device,
    setting: str,
    threads: int | None,
    measurements: Measurements,
    run: Run,
    blocks: Mapping[str, Read] | None = None,
) -> Decoder:
    """The decoder as it is served. setting, threads: FORTWO_WEIGHTS and FORTWO_THREADS. run: calls a measurement where
    nothing else computes. blocks: the weights as a quantised GGUF file has them; None where there are none, or not of
    every product (`all_blocks`).

    auto: on a GPU that multiplies bf16, bf16; elsewhere fp32 below SMALL parameters. From there on blocks are held as
    they are, where there are kernels for them. Of other weights fp32 is kept, for training and as reference, unless
    another format that is held has the same weights to the last bit; and the fastest formats beside it whose weights
    stay within ERROR of the originals. What fp32 would take more than SHARE of the memory for is held in bf16 alone, or
    NF4. Formats are made weight by weight as they are read. Raises InvalidRequest
    for a format that the model or the machine cannot have.
    """
    if blocks is not None and device.type == "cpu" and _takes_blocks(setting, config):
        return Decoder(config, blocks, device, formats_of(Choice.fixed("gguf")))
    weight_format = alone(config.parameters, memory(device)) if setting == "auto" else setting
    if device.type != "cpu" and weight_format in (None, "bf16") and multiplies_bf16(device):
        return Decoder(config, weights, device, lambda weight, is_head: dense(weight, torch.bfloat16))
    if weight_format is not None and weight_format != "fp32":
        return Decoder(config, weights, device, _checked(id, weight_format))
    if weight_format == "fp32" or config.parameters < SMALL or device.type != "cpu":
        return Decoder(config, weights, device)
    fused = Fused(config, weights, device)
    first = [read_dense(fused.weight(0, group)) for group in GROUPS]  # the head is as wide as one of them
    names = [name for name in _quick() if fits(name, first)]
    names = worthwhile({name: error(name, fused) for name in names}, _bytes(config, names), ERROR)
    if names == ["fp32"]:
        return Decoder(config, weights, device)
    c = config
    shape = (c.layers, c.hidden, c.heads, c.kv_heads, c.head_size, c.intermediate, c.vocabulary, *names)
    threads = threads or hardware.cores()
    about = f"{processor()} {cpu.identity()} {threads} {shape} {APART}"
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    known = measurements.all().get(key)
    seconds, share = (known.seconds, None) if known is not None else run(lambda: measure(fused, names))
    choice = choose(seconds, _bytes(config, names), SHARE * memory(device), keep="fp32")
    if share is not None:
        if share >= UNDISTURBED * threads:
            plain = {name: dict(by_rows) for name, by_rows in seconds.items()}
            measurements.put(key, Measured(id, processor(), threads, plain, choice.table))
        else:
            log.warning(
                "Other programs used the processor while the weight formats of %s were measured: this process "
                "had %.1f of %d threads. The result is used now and not remembered; the next load measures again.",
                *(id, share, threads),
            )
    return Decoder(config, weights, device, formats_of(choice, exact=True))


def _takes_blocks(setting: str, config: DecoderConfig) -> bool:
    return setting == "gguf" or (setting == "auto" and prefers_blocks(config))


def prefers_blocks(config: DecoderConfig) -> bool:
    """Whether `auto` holds the blocks of a quantised file on the CPU, where there are blocks of every product."""
    return config.parameters >= SMALL and cpu.usable(torch.empty(0))


def all_blocks(config: DecoderConfig, names: Container[str]) -> bool:
    """Whether the weight of every product is among `names` of tensors that come as blocks, and those that are one
    product can be held below each other."""
    for group in GROUPS:
        modules = config.groups[group]
        outputs = [last - first for first, last in map(config.columns, modules)]
        found = (f"{module_name(layer, name)}.weight" in names for layer in range(config.layers) for name in modules)
        if not Parts.fits(outputs) or not all(found):
            return False
    return True


def serving_generic(id: str, directory: Path, parameters: int, device: torch.device, setting: str) -> GenericDecoder:
    """A model of transformers as it is served: in fp32, or what `alone` says, or in the format of FORTWO_WEIGHTS.
    parameters: of the files. Raises UnsupportedModel, and InvalidRequest for a format that it cannot have."""
    from fortwo.nn import generic

    weight_format = alone(parameters, memory(device)) if setting == "auto" else setting
    dtype = torch.float32 if weight_format in (None, "fp32") else torch.bfloat16
    return generic.load(
        directory, device, _checked(id, weight_format) if weight_format not in (None, "fp32") else None, dtype
    )


def alone(parameters: int, memory: int) -> str | None:
    """What `auto` holds without fp32 beside it: the first of bf16 and NF4 that fits; None where fp32 fits."""
    if 4 * parameters <= SHARE * memory:
        return None
    return "bf16" if 2 * parameters <= SHARE * memory else "nf4"


def memory(device: torch.device) -> int:
    """Bytes that the device has: a GPU its own, the CPU what this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return hardware.memory_bytes()


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of the process so far, in bytes; on CUDA, the peak of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return hardware.peak_memory_bytes()


def _checked(id: str, name: str) -> Hold:
    hold = formats_of(Choice.fixed(name))

    def held(weight: Frozen, is_head: bool) -> Frozen:
        if isinstance(weight, Tensor) and not fits(name, [weight]):
            raise InvalidRequest(
                f"weights = {name!r} cannot hold {id!r} here: int8 and int4 need widths that are multiples of 32, "
                "the CPU and a C compiler; nf4 needs multiples of 64; gguf needs the CPU and a GGUF file "
                "whose layers are all of types Q4_0 to Q8_0 or Q4_K to Q6_K, prepared by this version or a later one",
                param="weights",
                hint="Set FORTWO_WEIGHTS to auto.",
            )
        return hold(weight, is_head)

    return held


def _quick() -> list[str]:
    """Formats that may be faster than fp32 on this processor; NF4 is for want of memory and never is."""
    return ["fp32", *(["bf16"] if multiplies_bf16(torch.device("cpu")) else []), "int8", "int4"]


def error(name: str, fused: Fused) -> float:
    """How far the format is from the weights, relative, in the worst of a few of them."""
    if name in ("fp32", "bf16"):
        return 0.0
    layers = fused.config.layers
    places = (0, "qkv"), (layers // 2, "qkv"), (layers - 1, "down")
    few = (read_dense(fused.weight(*place)).float() for place in places)
    return max(
        float((quantize(name, weight_OI, HugePageArena()).dense() - weight_OI).norm() / weight_OI.norm())
        for weight_OI in few
    )


def measure(fused: Fused, names: list[str]) -> Timed:
    """Seconds that the products of one forward take, by format and rows: of a sample of the weights, in one format
    after the other. For the rows of a decode step, what it takes longer by a format that has no kernel for the whole
    step."""
    c, passed, computed = fused.config, 0.0, 0.0
    found: dict[str, dict[int, float]] = {}
    for name in names:
        arena, held = HugePageArena(), list[tuple[WeightFormat, int, int]]()
        for weight_OI in _sample(fused, SAMPLE):
            weight_format = quantize(name if held else head_format(name), weight_OI, arena)
            held.append((weight_format, weight_OI.shape[1], weight_OI.numel()))
        found[name] = {}
        for rows in ROWS:
            few = held if rows <= STEP_ROWS else held[1 : 1 + len(GROUPS)]
            part = sum(numel for _, _, numel in few) / c.parameters
            formats, widths = [weight_format for weight_format, _, _ in few], [width for _, width, _ in few]
            began = time.perf_counter(), time.process_time()
            found[name][rows] = _seconds(formats, widths, rows) / part + _apart(c, name, rows)
            passed, computed = passed + time.perf_counter() - began[0], computed + time.process_time() - began[1]
    return found, computed / passed


def _sample(fused: Fused, parameters: int) -> Iterator[Tensor]:
    """About so many parameters: of the head its share, then the four weights of at least one layer.

    A head alone can be larger than the sample (151,936 tokens times 896 numbers are 136 million parameters).
    """
    c, head_VD = fused.config, read_dense(fused.head())
    outputs = math.ceil(c.vocabulary * min(1.0, parameters / c.parameters))
    yield head_VD[:outputs]
    parameters -= outputs * c.hidden
    for layer in range(c.layers):
        if layer and parameters <= 0:
            return
        for group in GROUPS:
            weight_OI = read_dense(fused.weight(layer, group))
            parameters -= weight_OI.numel()
            yield weight_OI


def _apart(config: DecoderConfig, name: str, rows: int) -> float:
    in_one = (name in WHOLE_STEP and Step.fits(config)) or (name == "bf16" and Prefill.fits(config))
    if in_one or rows > STEP_ROWS:
        return 0.0
    a_layer, a_number = APART
    return config.layers * (a_layer + a_number * rows * config.hidden)


@torch.no_grad()
def _seconds(formats: list[WeightFormat], widths: list[int], rows: int) -> float:
    """Seconds for the products, the minimum of a few runs: other load can only make a run slower."""
    inputs = {width: torch.ones(rows, width) for width in set(widths)}
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < 5 and sum(spent) < 0.05):
        began = time.perf_counter()
        for weight_format, width in zip(formats, widths, strict=True):
            weight_format.product(inputs[width])
        spent.append(time.perf_counter() - began)
    return min(spent)


def _bytes(config: DecoderConfig, names: list[str]) -> dict[str, int]:
    per_parameter = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0625, "int4": 0.625}
    return {name: int(per_parameter[name] * config.parameters) for name in names}

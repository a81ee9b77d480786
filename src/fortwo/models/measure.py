"""The forms a base model is served in: measured once on a machine, remembered, or as the setting says.

Knows weights and clocks; what becomes of the choice is `choice`'s, how a form multiplies `forms`'.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fortwo.errors import InvalidRequest
from fortwo.models import kernels
from fortwo.models.choice import ROWS, Choice, Measured, Measurements, Seconds, choose, processor, worthwhile
from fortwo.models.decoder import Decoder, DecoderConfig, Hold, forms_of
from fortwo.models.forms import Form, Frozen, Regions, fits, head_form, quantised
from fortwo.models.products import multiplies_bf16
from fortwo.models.step import WHOLE_STEP, Step
from fortwo.settings import Settings

SMALL = 10_000_000  # parameters; below them a forward is not made of products
SAMPLE = 100_000_000  # parameters that are measured; fewer would lie in the processor's caches
STEP_ROWS = 64  # at most of a decode step; with more rows one layer is enough to measure
APART = 7e-5, 6e-10  # seconds a layer, and of each of its rows for each hidden number, that a step takes longer in
# many calls than in one kernel: of 30 layers of 576 numbers 2 ms, and 0.3 ms a row
ERROR = 0.01  # of the weights, relative: what `auto` may lose by rounding them
SHARE = 0.5  # of the memory: what `auto` may hold

Run = Callable[[Callable[[], Seconds]], Seconds]


def serving(
    id: str,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    device: torch.device,
    settings: Settings,
    run: Run,
) -> Decoder:
    """The decoder as it is served under settings.weights. run: measures where nothing else computes.

    auto: fp32 below SMALL parameters; else fp32 is kept, for training and as reference, unless another form that is
    held has the same weights to the last bit; and the fastest forms beside it whose weights stay within ERROR of the
    originals. What fp32 would take more than SHARE of the memory for is held in
    bf16 alone, or NF4. A form that is held alone is made weight by weight as they are read. Raises InvalidRequest for a
    form that the model or the machine cannot have.
    """
    setting = alone(config, memory(device)) if settings.weights == "auto" else settings.weights
    if setting is not None and setting != "fp32":
        return Decoder(config, weights, device, _checked(id, setting))
    decoder = Decoder(config, weights, device)
    if setting == "fp32" or decoder.parameters < SMALL:
        return decoder
    weights_OI = decoder.weights()
    names = [name for name in _quick(decoder.device) if fits(name, weights_OI)]
    names = worthwhile({name: error(name, weights_OI) for name in names}, _bytes(decoder, names), ERROR)
    if names == ["fp32"]:
        return decoder
    c = decoder.config
    shape = (c.layers, c.hidden, c.heads, c.kv_heads, c.head_size, c.intermediate, c.vocabulary, *names)
    threads = settings.threads or os.cpu_count() or 1
    about = f"{processor()} {kernels.identity()} {threads} {shape} {APART}"
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    known, bound = Measurements(settings.home), SHARE * memory(device)
    found = known.all().get(key)
    if found is None:
        began = time.perf_counter()
        seconds = run(lambda: measure(decoder, names))
        choice = choose(seconds, _bytes(decoder, names), bound, keep="fp32")
        plain = {name: dict(by_rows) for name, by_rows in seconds.items()}
        known.put(key, Measured(id, processor(), threads, plain, choice.table))
        logging.getLogger(__name__).info("forms of %s measured in %.1f s", id, time.perf_counter() - began)
    else:
        choice = choose(found.seconds, _bytes(decoder, names), bound, keep="fp32")
    return decoder.in_forms(choice, exact=True)


def alone(config: DecoderConfig, memory: int) -> str | None:
    """What `auto` holds without fp32 beside it: the first of bf16 and NF4 that fits; None where fp32 fits."""
    if 4 * config.parameters <= SHARE * memory:
        return None
    return "bf16" if 2 * config.parameters <= SHARE * memory else "nf4"


def memory(device: torch.device) -> int:
    """Bytes that the device has: a GPU its own, the CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _checked(id: str, name: str) -> Hold:
    hold = forms_of(Choice.fixed(name))

    def held(weight: Frozen, is_head: bool) -> Frozen:
        if isinstance(weight, Tensor) and not fits(name, [weight]):
            raise InvalidRequest(
                f"weights = {name!r} cannot hold {id!r} here: int8 and int4 need widths that are multiples of 32, "
                "the CPU and a C compiler; nf4 needs multiples of 64",
                param="weights",
                hint="Set FORTWO_WEIGHTS to auto.",
            )
        return hold(weight, is_head)

    return held


def _quick(device: torch.device) -> list[str]:
    """Forms that may be faster than fp32 there; NF4 is for want of memory and never is."""
    return ["fp32", *(["bf16"] if multiplies_bf16(device) else []), *(["int8", "int4"] if device.type == "cpu" else [])]


def error(name: str, weights: list[Tensor]) -> float:
    """How far the form is from the weights, relative, in the worst of a few of them."""
    if name in ("fp32", "bf16"):
        return 0.0
    few = [weights[0], weights[len(weights) // 2], weights[-2]]
    return max(
        float((quantised(name, weight_OI, Regions()).dense() - weight_OI).norm() / weight_OI.norm())
        for weight_OI in few
    )


def measure(decoder: Decoder, names: list[str]) -> Seconds:
    """Seconds that the products of one forward take, by form and rows: of a sample of the layers, and the head. For the
    rows of a decode step, what it takes longer by a form that has no kernel for the whole step."""
    *layers, head = decoder.weights()
    sample, taken = [head], head.numel()
    for weight_OI in layers:
        if taken >= SAMPLE:
            break
        sample.append(weight_OI)
        taken += weight_OI.numel()
    found: dict[str, dict[int, float]] = {}
    for name in names:
        regions = Regions()
        forms = [quantised(head_form(name), head, regions), *(quantised(name, one, regions) for one in sample[1:])]
        widths = [weight_OI.shape[1] for weight_OI in sample]
        found[name] = {}
        for rows in ROWS:
            few = slice(None) if rows <= STEP_ROWS else slice(1, 5)
            part = sum(one.numel() for one in sample[few]) / decoder.parameters
            found[name][rows] = _seconds(forms[few], widths[few], rows) / part + _apart(decoder, name, rows)
    return found


def _apart(decoder: Decoder, name: str, rows: int) -> float:
    if rows > STEP_ROWS or (name in WHOLE_STEP and Step.fits(decoder.config)):
        return 0.0
    a_layer, a_number = APART
    return decoder.config.layers * (a_layer + a_number * rows * decoder.config.hidden)


@torch.no_grad()
def _seconds(forms: list[Form], widths: list[int], rows: int) -> float:
    """The fastest of a few: what disturbs only adds."""
    inputs = {width: torch.ones(rows, width) for width in set(widths)}
    spent: list[float] = []
    while len(spent) < 2 or (len(spent) < 5 and sum(spent) < 0.05):
        began = time.perf_counter()
        for form, width in zip(forms, widths, strict=True):
            form.product(inputs[width])
        spent.append(time.perf_counter() - began)
    return min(spent)


def _bytes(decoder: Decoder, names: list[str]) -> dict[str, int]:
    per_parameter = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0625, "int4": 0.625}
    return {name: int(per_parameter[name] * decoder.parameters) for name in names}

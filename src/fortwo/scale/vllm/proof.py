"""Whether vLLM computes what fortwo computes: log-probabilities of the same tokens, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fortwo.engine.runner import Runner
from fortwo.errors import Conflict, FortwoError, InvalidAdapter
from fortwo.hub import weights
from fortwo.hub.identity import identity
from fortwo.hub.prepared import ModelInfo
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import pack
from fortwo.scale.vllm.client import ServedModel

TEXT = "Water boils at 100 degrees Celsius. What is the capital of France, and how many people live in it?"
LIKELIEST = 5  # tokens that are compared at each place
BASE_TOLERANCE = 0.3  # mean difference in nats; rounding to bf16 or int8 makes less than 0.1, another base more than 1
CLEAR = 4.0  # an effect is judged where it is so many times what rounding makes of the base

Likeliest = Mapping[int, float]  # log-probabilities by token


def prefixes(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The beginnings of a prompt after which the next token is compared."""
    lengths = sorted({max(1, len(tokens) * quarter // 4) for quarter in (1, 2, 3, 4)})
    return [tuple(tokens[:length]) for length in lengths]


@torch.no_grad()
def own_logprobs(runner: Runner, tokens: Sequence[int], lora: Lora | None) -> Tensor:
    """Of the next token after each of the prefixes (P, V), by the weights in this process. Call it on the device's
    thread."""
    decoder = runner.decoder
    packed = pack([list(tokens)], decoder.device, prefix=0)
    hidden_TD = runner.backend.forward(packed, [] if lora is None else [Segment(lora)])
    last = [len(prefix) - 1 for prefix in prefixes(tokens)]
    return torch.log_softmax(decoder.logits(hidden_TD[last]).float(), -1).cpu()


def distance(own_PV: Tensor, theirs: Sequence[Likeliest]) -> float:
    """The mean difference of vLLM's log-probabilities from fortwo's, in nats."""
    found = [abs(float(own_PV[place, id]) - value) for place, top in enumerate(theirs) for id, value in top.items()]
    return sum(found) / len(found)


def check_base(found: ServedModel, url: str, info: ModelInfo, differs: float) -> None:
    """Raises Conflict where vLLM serves another base than `info`: by the digest of the directory that it was loaded
    from, if that can be read here, and by the distance of its log-probabilities from fortwo's."""
    root = Path(found.root)
    if root.is_dir() and root.resolve() != info.directory.resolve():
        digest = identity(root, weights.digest(root, lambda _label, _done, _total: None))
        if digest != info.digest:
            raise other_base(found, url, info, f"it was loaded from {root}, whose digest is {digest[:12]}")
    if not differs <= BASE_TOLERANCE:
        raise other_base(found, url, info, f"its log-probabilities differ by {differs:.2f} on average")


def other_base(found: ServedModel, url: str, info: ModelInfo, why: str) -> Conflict:
    """why: how one can tell."""
    return Conflict(
        f"vLLM at {url} serves {found.name!r}, which is not the base {info.id!r} (digest {info.digest[:12]}): {why}.",
        param="model",
        hint=f"Start vLLM with that base: vllm serve {info.directory.resolve()} --served-model-name {info.id} "
        "--enable-lora",
        code="vllm_serves_another_base",
    )


def check_adapter(
    name: str, base_PV: Tensor, own_PV: Tensor, theirs: Sequence[Likeliest], noise: float
) -> FortwoError | None:
    """What is wrong with an adapter as vLLM serves it. base, own: fortwo's log-probabilities without and with it;
    theirs: vLLM's with it; noise: the distance of the two programs without it."""
    own = [{id: float(own_PV[place, id]) for id in top} for place, top in enumerate(theirs)]
    effect, error = distance(base_PV, own), distance(own_PV, theirs)
    if effect <= CLEAR * noise or error < effect / 2:
        return None
    return InvalidAdapter(
        f"vLLM serves adapter {name!r} with another effect than fortwo: it should move the log-probabilities of a "
        f"probe by {effect:.3f} on average, and what vLLM computes is {error:.3f} away from that.",
        hint="This version of vLLM ignores an option of the adapter, such as rank_pattern. Update vLLM, train it again "
        "without the option, or serve it with FORTWO_ENGINE=own.",
    )

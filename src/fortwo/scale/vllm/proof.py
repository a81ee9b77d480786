"""Whether vLLM computes what fortwo computes: log-probabilities of the same tokens, compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fortwo.engine.runner import Runner
from fortwo.errors import Conflict, FortwoError, InvalidAdapter
from fortwo.hub import weights
from fortwo.hub.identity import identity
from fortwo.hub.prepared import ModelInfo
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import pack
from fortwo.records import Message
from fortwo.scale.vllm.client import ServedModel

PROBE = Message(
    "user", "Water boils at 100 degrees Celsius. What is the capital of France, and how many people live in it?"
)
BASE_TOLERANCE = 0.3  # mean difference in nats; rounding to bf16 or int8 makes less than 0.1, another base more than 1
CLEAR = 4.0  # an effect is judged where it is so many times what rounding makes of the base


@torch.no_grad()
def own_logprobs(runner: Runner, tokens: Sequence[int], lora: Lora | None) -> list[float]:
    """Of all tokens but the first, by the weights in this process. Call it on the device's thread."""
    decoder = runner.decoder
    packed = pack([list(tokens)], decoder.device, prefix=0)
    hidden_TD = runner.backend.forward(packed, [] if lora is None else [Segment(lora)])
    logprobs_TV = torch.log_softmax(decoder.logits(hidden_TD[:-1]).float(), -1)
    following = torch.tensor(tokens[1:], device=logprobs_TV.device)
    found: list[float] = logprobs_TV.gather(1, following[:, None])[:, 0].tolist()
    return found


def distance(these: Sequence[float], those: Sequence[float]) -> float:
    """The mean difference of two lists of log-probabilities, in nats."""
    return sum(abs(a - b) for a, b in zip(these, those, strict=True)) / max(1, len(these))


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
    name: str, base: Sequence[float], own: Sequence[float], theirs: Sequence[float], noise: float
) -> FortwoError | None:
    """What is wrong with an adapter as vLLM serves it. base, own: fortwo's log-probabilities without and with it;
    theirs: vLLM's with it; noise: the distance of the two programs without it."""
    effect, error = distance(base, own), distance(own, theirs)
    if effect <= CLEAR * noise or error < effect / 2:
        return None
    return InvalidAdapter(
        f"vLLM serves adapter {name!r} with another effect than fortwo: it should move the log-probabilities of a "
        f"probe by {effect:.3f} on average, and what vLLM computes is {error:.3f} away from that.",
        hint="This version of vLLM ignores an option of the adapter, such as rank_pattern. Update vLLM, train it again "
        "without the option, or serve it with FORTWO_ENGINE=own.",
    )

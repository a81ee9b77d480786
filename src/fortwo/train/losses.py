"""Training rows, and the loss of a batch of rows.

Two kinds of rows share every pass: cross-entropy rows train on an answer, and KL rows hold the adapter to the base's
own distribution along a reply. The base's final hidden states of KL rows are computed once, so in a step the teacher
costs no more than its head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fortwo.execution.backend import Backend
from fortwo.kernels.operations import cross_entropy, divergence
from fortwo.nn.head import Head
from fortwo.nn.lora import Lora
from fortwo.nn.packing import Pack, pack
from fortwo.quantization.matmul import product
from fortwo.quantization.tiles import Tiles
from fortwo.records import MicroStepped, Plan, TrainEvent
from fortwo.train.estimate import HEAD_BYTES
from fortwo.train.shares import WHOLE, Share

T = TypeVar("T")
PREPARE_TOKENS = 1024
OPENING_TOKENS = 2  # first tokens of an answer, which `Row.opening_weight` applies to


@dataclass(frozen=True)
class Row:
    """Tokens, of which all from position `start` on are supervised, except the positions in `unsupervised`. kl: the
    loss is KL rather than cross-entropy; `teacher_ND` then holds the base's final hidden states that predict the
    supervised tokens. opening_weight: the weight of each of the first OPENING_TOKENS tokens of a cross-entropy row.
    reference: of an answer that is judged as a whole, the log probability that the reference gives it; desirable: the
    judgement."""

    tokens: tuple[int, ...]
    start: int
    kl: bool = False
    teacher_ND: Tensor | None = None
    unsupervised: frozenset[int] = frozenset()
    opening_weight: float = 1.0
    reference: float = 0.0
    desirable: bool = True

    @classmethod
    def from_mask(cls, tokens: Sequence[int], supervised: Sequence[bool]) -> Row:
        """A cross-entropy row with this mask. At least one token must be supervised, and not the first."""
        start = supervised.index(True)
        unsupervised = (n for n in range(start, len(tokens)) if not supervised[n])
        return cls(tuple(tokens), start, unsupervised=frozenset(unsupervised))

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.tokens) - self.start - len(self.unsupervised)

    @property
    def supervised_positions(self) -> list[int]:
        return [n for n in range(self.start, len(self.tokens)) if n not in self.unsupervised]

    @property
    def token_weights(self) -> list[float]:
        """The weight of each supervised token."""
        return [self.opening_weight if n < OPENING_TOKENS else 1.0 for n in range(self.supervised)]


@dataclass(frozen=True)
class Losses:
    """Sums over the supervised tokens, with gradients, and how many tokens there were. ce: the weighted cross-entropy,
    (); kl: the KL divergence, (); tokens: all tokens that were computed."""

    ce: Tensor
    kl: Tensor
    ce_tokens: int
    kl_tokens: int
    tokens: int


@dataclass(frozen=True)
class Accumulated:
    """What the gradient of a step was made of. loss: the step's; parts, metrics: as in records.Stepped; supervised:
    tokens that were trained on; seconds: without those of other work in between."""

    loss: float
    parts: dict[str, float]
    tokens: int
    seconds: float
    supervised: int
    metrics: dict[str, float] = field(default_factory=dict)


def with_teacher_states(backend: Backend, rows: Sequence[Row], prefix: int) -> Generator[TrainEvent, None, list[Row]]:
    """Copies of KL rows with `teacher_ND`, computed in passes of PREPARE_TOKENS. prefix: as in `compute_losses`."""
    taught = []
    for group in micro_batches(rows, prefix, PREPARE_TOKENS):
        packed = pack([row.tokens for row in group], backend.decoder.device, prefix)
        final_TD = backend.forward(packed)
        taught += [
            replace(row, teacher_ND=final_TD[predicting_positions(packed, place, row)])
            for place, row in enumerate(group)
        ]
        yield MicroStepped(len(packed.tokens_T))
    return taught


def compute_losses(
    backend: Backend, lora: Lora, prefix: int, rows: Sequence[Row], checkpointing: bool = False
) -> Losses:
    """Forward pass over rows that share their first `prefix` tokens. checkpointing: as in `Backend.train`."""
    decoder = backend.decoder
    packed = pack([row.tokens for row in rows], decoder.device, prefix)
    final_TD = backend.train(packed, lora, checkpointing)
    ce_positions: list[int] = []
    kl_positions: list[int] = []
    for n, row in enumerate(rows):
        (kl_positions if row.kl else ce_positions).extend(predicting_positions(packed, n, row))
    ce = kl = final_TD.new_zeros(())
    if ce_positions:
        wanted = [row.tokens[n] for row in rows if not row.kl for n in row.supervised_positions]
        wanted_N = torch.tensor(wanted, device=decoder.device)
        weights = [weight for row in rows if not row.kl for weight in row.token_weights]
        weights_N = torch.tensor(weights, device=decoder.device)
        ce = head_loss(final_TD[ce_positions], decoder.head_VD, wanted_N, weights_N)
    if kl_positions:
        teacher_ND = torch.cat([row.teacher_ND for row in rows if row.teacher_ND is not None])
        kl = head_loss(final_TD[kl_positions], decoder.head_VD, teacher_ND)
    return Losses(ce, kl, len(ce_positions), len(kl_positions), len(packed.tokens_T))


def accumulate_gradients(
    backend: Backend, lora: Lora, prefix: int, rows: Sequence[Row], kl_weight: float, plan: Plan, share: Share = WHOLE
) -> Generator[TrainEvent, None, Accumulated]:
    """Add the gradient of cross-entropy and KL rows to the adapter's. share: the part of it that this process adds;
    what is returned is about all rows."""
    ce_weight = sum(sum(row.token_weights) for row in rows if not row.kl)
    kl_tokens = sum(row.supervised for row in rows if row.kl)
    ce = kl = 0.0
    tokens, seconds = 0, 0.0
    own = share.of(rows, lambda row: len(row.tokens) - prefix)
    for batch in micro_batches(own, prefix, plan["micro_step_tokens"]):
        if tokens:
            yield MicroStepped(tokens)
        began = time.perf_counter()
        found = compute_losses(backend, lora, prefix, batch, plan["gradient_checkpointing"])
        total = found.ce / max(1, ce_weight) + kl_weight * found.kl / max(1, kl_tokens)
        seconds += time.perf_counter() - began
        yield MicroStepped(tokens)
        began = time.perf_counter()
        total.backward()
        ce += float(found.ce.detach()) / max(1, ce_weight)
        kl += float(found.kl.detach()) / max(1, kl_tokens)
        tokens += found.tokens
        seconds += time.perf_counter() - began
    ce, kl, computed = share.add_up([ce, kl, tokens])
    supervised = sum(row.supervised for row in rows)
    return Accumulated(ce + kl_weight * kl, {"learn": ce, "keep": kl}, int(computed), seconds, supervised)


class _HeadLoss(torch.autograd.Function):
    """The loss of each row (N,) and its gradient together, for one chunk of rows after another, so that the logits of
    all rows are never in memory at once (Hsu et al. 2024, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Head, target: Tensor) -> Tensor:
        most = max(1, HEAD_BYTES // (head_VD.dtype.itemsize * head_VD.shape[0]))
        losses, gradients = [], []
        chunks = -(-len(hidden_ND) // most)
        parts = zip(*(each.tensor_split(chunks) for each in (hidden_ND, target)), strict=True)
        for chunk_ND, wanted in parts:
            logits_NV, back = _through_head(chunk_ND, head_VD)
            if wanted.dim() == 1:
                loss_N, slope_NV = cross_entropy(logits_NV, wanted)
            else:
                loss_N, slope_NV = divergence(logits_NV, _through_head(wanted, head_VD)[0])
            losses.append(loss_N)
            gradients.append(back(slope_NV).to(hidden_ND.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return grad_N[:, None].to(gradient_ND.dtype) * gradient_ND, None, None


def _through_head(hidden_ND: Tensor, head: Head) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Logits (N, V), and what makes of their gradient that of the hidden states (N, D)."""
    if isinstance(head, Tensor | Tiles):
        return product(hidden_ND.to(head.dtype), head), lambda slope_NV: product(slope_NV, head.t())
    with torch.enable_grad():
        read_ND = hidden_ND.detach().requires_grad_()
        logits_NV = head(read_ND)
    return logits_NV.detach().clone(), lambda slope_NV: torch.autograd.grad(logits_NV, read_ND, slope_NV)[0]


def head_losses(hidden_ND: Tensor, head_VD: Head, target: Tensor) -> Tensor:
    """The loss of the head's distribution in each row, (N,); hidden_ND gets the gradient. target: tokens (N,) for
    cross-entropy, or the teacher's hidden states (N, D) for KL(teacher || student)."""
    losses_N: Tensor = _HeadLoss.apply(hidden_ND, head_VD, target)  # type: ignore[no-untyped-call]
    return losses_N


def head_loss(hidden_ND: Tensor, head_VD: Head, target: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """The weighted sum of `head_losses`, ()."""
    losses_N = head_losses(hidden_ND, head_VD, target)
    return losses_N.sum() if weights_N is None else (losses_N * weights_N).sum()


def micro_batches(rows: Iterable[Row], prefix: int, budget: int) -> Iterator[list[Row]]:
    """The rows in order, in groups of at most `budget` tokens beyond the prefix. A longer row is a group of its own."""
    return batches_within(rows, budget, lambda row: len(row.tokens) - prefix)


def batches_within(items: Iterable[T], budget: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in order, in groups whose sizes add up to at most `budget`. A larger item is a group of its own."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def predicting_positions(packed: Pack, place: int, row: Row) -> list[int]:
    """The positions in the pack that predict the supervised tokens of `row`, the row number `place` of the pack."""
    return [packed.place(place, position - 1) for position in row.supervised_positions]

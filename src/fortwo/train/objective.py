"""What a training row is, and the loss of a batch of rows.

Two kinds of row share every pass: rows to learn (cross-entropy on the answer) and rows to keep (KL against the base's
own distribution along a reply). The base's final hidden states of rows to keep are computed once, so the teacher costs
a step no more than its head.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fortwo.execution.backend import Backend
from fortwo.kernels.operations import cross_entropy, divergence
from fortwo.nn.lora import Lora
from fortwo.nn.packing import Pack, pack
from fortwo.quantization.matmul import product
from fortwo.quantization.tiles import Tiles
from fortwo.records import MicroStepped, TrainEvent
from fortwo.train.estimate import HEAD_BYTES

PREPARE_TOKENS = 1024
OPENING = 2  # tokens of a reply


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `start` on are supervised, but for the places in `skipped`. keep: KL rather than
    cross-entropy; then teacher_ND are the base's final hidden states that predict the supervised tokens. opening: how
    many times each of the first OPENING of a row to learn counts."""

    tokens: tuple[int, ...]
    start: int
    keep: bool = False
    teacher_ND: Tensor | None = None
    skipped: frozenset[int] = frozenset()
    opening: float = 1.0

    @classmethod
    def masked(cls, tokens: Sequence[int], supervised: Sequence[bool]) -> Row:
        """To learn where `supervised` says so; at least one token is, and never the first."""
        start = supervised.index(True)
        places = (place for place in range(start, len(tokens)) if not supervised[place])
        return cls(tuple(tokens), start, skipped=frozenset(places))

    @property
    def supervised(self) -> int:
        return len(self.tokens) - self.start - len(self.skipped)

    @property
    def places(self) -> list[int]:
        """Of the supervised tokens."""
        return [place for place in range(self.start, len(self.tokens)) if place not in self.skipped]

    @property
    def weights(self) -> list[float]:
        """Of the supervised tokens."""
        return [self.opening if number < OPENING else 1.0 for number in range(self.supervised)]


@dataclass(frozen=True)
class Losses:
    """Sums over supervised tokens, learn by their weights, with gradients, and how many tokens there were."""

    learn: Tensor
    keep: Tensor
    learn_tokens: int
    keep_tokens: int
    tokens: int


def with_teacher(backend: Backend, rows: Sequence[Row], prefix: int) -> Generator[TrainEvent, None, list[Row]]:
    """Rows to keep, with what the base makes of them."""
    taught = []
    for group in micro_batches(rows, prefix, PREPARE_TOKENS):
        packed = pack([row.tokens for row in group], backend.decoder.device, prefix)
        final_TD = backend.forward(packed)
        taught += [replace(row, teacher_ND=final_TD[predicting(packed, place, row)]) for place, row in enumerate(group)]
        yield MicroStepped(len(packed.tokens_T))
    return taught


def losses(backend: Backend, lora: Lora, prefix: int, rows: Sequence[Row], checkpointing: bool = False) -> Losses:
    """One pass over rows that share their first `prefix` tokens; checkpointing as in `Backend.train`."""
    decoder = backend.decoder
    packed = pack([row.tokens for row in rows], decoder.device, prefix)
    final_TD = backend.train(packed, lora, checkpointing)
    learn_places: list[int] = []
    keep_places: list[int] = []
    for place, row in enumerate(rows):
        (keep_places if row.keep else learn_places).extend(predicting(packed, place, row))
    learn = keep = final_TD.new_zeros(())
    if learn_places:
        wanted = [row.tokens[place] for row in rows if not row.keep for place in row.places]
        wanted_N = torch.tensor(wanted, device=decoder.device)
        weights = [weight for row in rows if not row.keep for weight in row.weights]
        weights_N = torch.tensor(weights, device=decoder.device)
        learn = head_loss(final_TD[learn_places], decoder.head_VD, wanted_N, weights_N)
    if keep_places:
        teacher_ND = torch.cat([row.teacher_ND for row in rows if row.teacher_ND is not None])
        keep = head_loss(final_TD[keep_places], decoder.head_VD, teacher_ND)
    return Losses(learn, keep, len(learn_places), len(keep_places), len(packed.tokens_T))


class _HeadLoss(torch.autograd.Function):
    """Loss and gradient in one go, a chunk of rows at a time: the logits of all rows are never there together
    (Hsu et al. 2024, arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor | Tiles, target: Tensor, weights_N: Tensor) -> Tensor:
        most = max(1, HEAD_BYTES // (head_VD.dtype.itemsize * head_VD.shape[0]))
        total, gradients = hidden_ND.new_zeros(()), []
        chunks = -(-len(hidden_ND) // most)
        parts = zip(*(each.tensor_split(chunks) for each in (hidden_ND, target, weights_N)), strict=True)
        for chunk_ND, wanted, by_N in parts:
            logits_NV = product(chunk_ND.to(head_VD.dtype), head_VD)
            if wanted.dim() == 1:
                loss_N, slope_NV = cross_entropy(logits_NV, wanted)
            else:
                loss_N, slope_NV = divergence(logits_NV, product(wanted.to(head_VD.dtype), head_VD))
            total += (loss_N * by_N).sum()
            gradient_ND = product(slope_NV, head_VD.t()).to(hidden_ND.dtype)
            gradients.append(gradient_ND * by_N[:, None].to(hidden_ND.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return grad * gradient_ND, None, None, None


def head_loss(hidden_ND: Tensor, head_VD: Tensor | Tiles, target: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Sum over rows of what the head's distribution loses against a target, each by its weight; hidden_ND gets the
    gradient.

    Cross-entropy where the target is tokens (N,); KL(target || here) where it is the teacher's hidden states (N, D).
    """
    weights_N = hidden_ND.new_ones(len(hidden_ND)) if weights_N is None else weights_N
    loss: Tensor = _HeadLoss.apply(hidden_ND, head_VD, target, weights_N)  # type: ignore[no-untyped-call]
    return loss


def micro_batches(rows: Iterable[Row], prefix: int, budget: int) -> Iterator[list[Row]]:
    """Rows in order, in groups of at most `budget` tokens beyond the prefix (or one row)."""
    group: list[Row] = []
    tokens = 0
    for row in rows:
        if group and tokens + len(row.tokens) - prefix > budget:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += len(row.tokens) - prefix
    if group:
        yield group


def predicting(packed: Pack, place: int, row: Row) -> list[int]:
    """Where in the pack the supervised tokens are predicted."""
    return [packed.place(place, position - 1) for position in row.places]

"""What a training row is, and the loss of a batch of rows.

Two kinds of row share every pass: rows to learn (cross-entropy on the answer) and rows to keep (KL against the base's
own distribution along a reply). The base's final hidden states of rows to keep are computed once, so the teacher costs
a step no more than its head.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fortwo.data.packing import Pack, PackedAttention, pack
from fortwo.models.decoder import Decoder
from fortwo.models.lora import Lora, Segment
from fortwo.records import MicroStepped, TrainEvent

PREPARE_TOKENS = 1024


@dataclass(frozen=True)
class Row:
    """Tokens, of which those from `start` on are supervised. keep: KL rather than cross-entropy; then
    teacher_ND are the base's final hidden states that predict the supervised tokens."""

    tokens: tuple[int, ...]
    start: int
    keep: bool = False
    teacher_ND: Tensor | None = None

    @property
    def supervised(self) -> int:
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Losses:
    """Sums over supervised tokens, with gradients, and how many tokens there were."""

    learn: Tensor
    keep: Tensor
    learn_tokens: int
    keep_tokens: int
    tokens: int


def with_teacher(decoder: Decoder, rows: Sequence[Row], prefix: int) -> Generator[TrainEvent, None, list[Row]]:
    """Rows to keep, with what the base makes of them."""
    taught = []
    for group in micro_batches(rows, prefix, PREPARE_TOKENS):
        with torch.no_grad():
            packed = pack([row.tokens for row in group], decoder.device, prefix)
            final_TD = decoder.forward(packed.tokens_T, packed.positions_T, PackedAttention(packed))
        taught += [replace(row, teacher_ND=final_TD[predicting(packed, place, row)]) for place, row in enumerate(group)]
        yield MicroStepped(len(packed.tokens_T))
    return taught


def losses(decoder: Decoder, lora: Lora, prefix: int, rows: Sequence[Row]) -> Losses:
    """One pass over rows that share their first `prefix` tokens."""
    packed = pack([row.tokens for row in rows], decoder.device, prefix)
    final_TD = decoder.forward(
        packed.tokens_T, packed.positions_T, PackedAttention(packed), [Segment(lora)], dropout=True
    )
    learn_places: list[int] = []
    keep_places: list[int] = []
    for place, row in enumerate(rows):
        (keep_places if row.keep else learn_places).extend(predicting(packed, place, row))
    learn = keep = final_TD.new_zeros(())
    if learn_places:
        wanted = [token for row in rows if not row.keep for token in row.tokens[row.start :]]
        logits_NV = decoder.logits(final_TD[learn_places])
        learn = F.cross_entropy(logits_NV, torch.tensor(wanted, device=decoder.device), reduction="sum")
    if keep_places:
        teacher_ND = torch.cat([row.teacher_ND for row in rows if row.teacher_ND is not None])
        keep = kl_divergence(decoder.logits(teacher_ND), decoder.logits(final_TD[keep_places]))
    return Losses(learn, keep, len(learn_places), len(keep_places), len(packed.tokens_T))


def kl_divergence(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """Sum over rows of KL(teacher || student), from logits. Only the student gets a gradient."""
    with torch.no_grad():
        log_p_NV = F.log_softmax(teacher_NV, -1)
    return F.kl_div(F.log_softmax(student_NV, -1), log_p_NV, reduction="sum", log_target=True)


def micro_batches(rows: Sequence[Row], prefix: int, budget: int) -> Iterator[list[Row]]:
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
    return [packed.place(place, position - 1) for position in range(row.start, len(row.tokens))]

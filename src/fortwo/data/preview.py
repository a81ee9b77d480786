"""Previews of datasets: the rendered text of each training row, cut where the speaker or the loss mask changes.

Torch-free: a model's tokenizer and chat template are read, never its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.data import datasets
from fortwo.errors import InvalidDataset, NotFound, UnsupportedModel
from fortwo.hub.identity import read_config
from fortwo.nn.config import CONTEXT_NAMES, DecoderConfig
from fortwo.records import Example, Fact

if TYPE_CHECKING:
    from fortwo.data.chat_template import ChatTemplateRenderer
    from fortwo.hub.catalog import Catalog


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one speaker, with loss on all or none, and their text with control tokens. role: None for
    plain text, for what the template writes before the first message, and where it is unknown."""

    role: str | None
    supervised: bool
    tokens: int
    text: str


@dataclass(frozen=True)
class RowPreview:
    """One training row. line: 1-based in the source. fits: whether the row fits into the model's context; rows that do
    not are refused by training, never truncated."""

    line: int
    tokens: int
    supervised_tokens: int
    fits: bool
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Preview:
    model: str
    context: int  # tokens
    rows: tuple[RowPreview, ...]


def preview(
    spec: object,
    allowed_dirs: Sequence[Path],
    catalog: Catalog,
    model: str,
    rows: int,
    check: Callable[[], None] = lambda: None,
) -> Preview:
    """The first `rows` rows of the dataset that `spec` describes (see datasets.load); later rows are not read.

    Raises InvalidDataset, and NotFound for a model that is unknown or not on disk.
    """
    info = catalog.model_info(catalog.get(model).id)
    if info is None:
        raise NotFound(
            f"Model {model!r} is not ready on disk.", param="model", hint=f"Run: fortwo models fetch {model}"
        )
    from fortwo.data.chat_template import ChatTemplateRenderer

    renderer, context = ChatTemplateRenderer(info.directory), context_length(info.directory)
    previews: list[RowPreview] = []
    for number, row in enumerate(islice(datasets.iter_rows(spec, allowed_dirs), rows), 1):
        for example in row.examples(number) if isinstance(row, Fact) else row.sides:
            check()
            check_row_length(example, renderer, context)
            previews += preview_rows(renderer, example, context)
    return Preview(model, context, tuple(previews[:rows]))


def check_row_length(example: Example, renderer: ChatTemplateRenderer, context: int) -> None:
    """Raises InvalidDataset for a row whose text cannot fit the context, however it is cut into tokens. So long a row
    is not tokenised, because that takes seconds and much memory."""
    if example.rejected:
        for side in example.sides:
            check_row_length(side, renderer, context)
        return
    texts = (example.text,) if example.text is not None else (message.content for message in example.messages)
    characters, most = sum(len(text.strip()) for text in texts), context * renderer.longest_token
    if characters > most:
        raise InvalidDataset(
            f"line {example.line} has {characters} characters; the context of {context} tokens holds at most {most}",
            param="dataset",
            hint="Split the row; a row is never truncated.",
        )


def preview_rows(renderer: ChatTemplateRenderer, example: Example, context: int) -> list[RowPreview]:
    """The previews of an example's training rows, of which it may have several (ChatTemplateRenderer.training_rows)."""
    previews = []
    for tokens, supervised in renderer.dataset_rows(example):
        ends = renderer.message_ends(example.messages, tokens)
        opening = _opening(renderer, example, tokens)
        changes = [index for index in range(1, len(tokens)) if supervised[index] != supervised[index - 1]]
        cuts = sorted({0, opening, *(end for end in ends if end < len(tokens)), *changes, len(tokens)})
        segments = tuple(
            Segment(
                None if begin < opening else _role(example, ends, begin),
                supervised[begin],
                end - begin,
                renderer.decode_with_control_tokens(tokens[begin:end]),
            )
            for begin, end in pairwise(cuts)
        )
        previews.append(RowPreview(example.line, len(tokens), sum(supervised), len(tokens) <= context, segments))
    return previews


def _opening(renderer: ChatTemplateRenderer, example: Example, tokens: Sequence[int]) -> int:
    """How many tokens the template writes before the first message, for conversations without a system message."""
    if not example.messages or example.messages[0].role == "system":
        return 0
    pairs = zip(renderer.shared_prefix, tokens, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _role(example: Example, ends: Sequence[int], index: int) -> str | None:
    """The role of the message that the token at `index` belongs to."""
    return next((m.role for m, end in zip(example.messages, ends, strict=False) if index < end), None)


def context_length(directory: Path) -> int:
    """The most tokens of a row for the model in `directory`. Raises UnsupportedModel where config.json does not say."""
    config = read_config(directory)
    try:
        return DecoderConfig.from_hf(config).context
    except UnsupportedModel:  # a network that transformers computes
        for name in CONTEXT_NAMES:
            if isinstance(length := config.get(name), int):
                return length
        raise

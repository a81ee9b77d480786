"""What is trained on, for people to look at: each row as it is rendered, cut where the speaker or the loss changes.

Torch-free: a model's tokenizer and template are read, never its weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo.data import formats
from fortwo.errors import NotFound
from fortwo.records import Example, Fact

if TYPE_CHECKING:
    from fortwo.data.render import Renderer
    from fortwo.hub.catalog import Catalog


@dataclass(frozen=True)
class Segment:
    """A run of tokens, all with loss or all without, as text with its control tokens. role None: of plain text, of
    what the template writes before anybody speaks, and where it does not tell."""

    role: str | None
    supervised: bool
    tokens: int
    text: str


@dataclass(frozen=True)
class RowPreview:
    """line: 1-based in the source. fits: into the model's context; a row that does not is refused, never cut off."""

    line: int
    tokens: int
    supervised_tokens: int
    fits: bool
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Preview:
    model: str
    context: int
    rows: tuple[RowPreview, ...]


def preview(spec: object, allowed_dirs: Sequence[Path], catalog: Catalog, model: str, rows: int) -> Preview:
    """The first `rows` rows of the dataset that `spec` describes (formats.load); those behind them are not read.

    Raises InvalidDataset, and NotFound for a model that is unknown or not on disk.
    """
    card = catalog.prepared(catalog.get(model).id)
    if card is None:
        raise NotFound(
            f"Model {model!r} is not ready on disk.", param="model", hint=f"Run: fortwo models fetch {model}"
        )
    from fortwo.data.render import Renderer

    renderer, context = Renderer(card.directory), context_of(card.directory)
    shown: list[RowPreview] = []
    for place, row in enumerate(islice(formats.rows_of(spec, allowed_dirs), rows), 1):
        for example in row.examples(place) if isinstance(row, Fact) else (row,):
            shown += row_previews(renderer, example, context)
    return Preview(model, context, tuple(shown[:rows]))


def row_previews(renderer: Renderer, example: Example, context: int) -> list[RowPreview]:
    """Of one example; a conversation is several rows where its template wants that (Renderer.rows)."""
    found = []
    for tokens, supervised in renderer.dataset_rows(example):
        ends = renderer.turns(example.messages, tokens)
        opening = _opening(renderer, example, tokens)
        changes = [place for place in range(1, len(tokens)) if supervised[place] != supervised[place - 1]]
        cuts = sorted({0, opening, *(end for end in ends if end < len(tokens)), *changes, len(tokens)})
        segments = tuple(
            Segment(
                None if begin < opening else _role(example, ends, begin),
                supervised[begin],
                end - begin,
                renderer.spell(tokens[begin:end]),
            )
            for begin, end in pairwise(cuts)
        )
        found.append(RowPreview(example.line, len(tokens), sum(supervised), len(tokens) <= context, segments))
    return found


def _opening(renderer: Renderer, example: Example, tokens: Sequence[int]) -> int:
    """How many tokens the template writes before a conversation without a system message says anything."""
    if not example.messages or example.messages[0].role == "system":
        return 0
    pairs = zip(renderer.prefix(), tokens, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _role(example: Example, ends: Sequence[int], place: int) -> str | None:
    """Whose turn a token is."""
    return next((m.role for m, end in zip(example.messages, ends, strict=False) if place < end), None)


def context_of(directory: Path) -> int:
    """How many tokens the model can attend to."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    context, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    windowed = config["architectures"][0].startswith("Mistral") or config.get("use_sliding_window")
    return min(context, int(window)) if window and windowed else context

"""Reads a model directory's tokenizer: its tokens, those that end a reply, and how many the embedding has."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from fortwo.errors import UnsupportedModel
from fortwo.hub.identity import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def declared_eos(directory: Path) -> set[int]:
    """The end tokens in generation_config.json. Raises UnsupportedModel for a file that cannot be read, and for values
    that are no token ids."""
    file = directory / "generation_config.json"
    if not file.exists():
        return set()
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{file} is not JSON: {error}", hint="Restore the file or delete it.") from None
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{file} holds no JSON object", hint="Restore the file or delete it.")
    found = content.get("eos_token_id")
    ids = [one for one in (found if isinstance(found, list) else [found]) if one is not None]
    if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
        raise UnsupportedModel(
            f"eos_token_id in {file} has {wrong[0]!r}, which is no token id",
            param="eos_token_id",
            hint="Write whole numbers there, or delete the line: then the tokenizer's eos token ends a reply.",
        )
    return set(ids)


def embedding_rows(directory: Path) -> int | None:
    """Rows of the embedding; None where config.json does not say, which fails when the base is loaded."""
    config = read_json(directory / "config.json")
    text = config.get("text_config")  # of models that also see
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return rows if isinstance(rows, int) else None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Raises UnsupportedModel for a tokenizer.json that is missing or cannot be read.

    transformers is imported only here, because that takes a fifth of a start. It replaces its own module meanwhile, so
    that a `from transformers import` in another thread would fail; import_module waits."""
    if not (directory / "tokenizer.json").is_file():
        raise UnsupportedModel(
            f"{directory} has no tokenizer.json",
            hint="Save the tokenizer there with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...).",
        )
    transformers = import_module("transformers")
    try:
        tokenizer: PreTrainedTokenizerFast = transformers.PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a file it cannot read
        raise UnsupportedModel(
            f"{directory / 'tokenizer.json'} cannot be read: {error}", hint="Restore the model's tokenizer files."
        ) from error
    return tokenizer


def rename_tokens(backend: Tokenizer, names: dict[str, str], rows: int) -> Tokenizer:
    """A copy of the tokenizer with some tokens renamed, and without added tokens that are beyond `rows`. It adds no
    special tokens, and neither truncates nor pads."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < rows]
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(spec))


def any_of(texts: dict[str, str]) -> re.Pattern[str]:
    """A pattern that matches the longest of the texts, and nothing when there are none."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")

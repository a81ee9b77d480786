"""A tokenizer.json as llama.cpp's metadata, for the two kinds that it has: byte-level BPE and SentencePiece's BPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortwo.data.tokenizer_files import declared_eos, load_tokenizer
from fortwo.errors import UnsupportedModel
from fortwo.hub.identity import read_json
from fortwo.records import Json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's types of tokens

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + _WORDS % r"\p{N}{1,3}": "llama-bpe",
    _CONTRACTIONS + _WORDS % r"\p{N}": "qwen2",
}
"""What llama.cpp calls the pre-tokenizers that split by one of these expressions."""


def add_tokenizer(writer: GGUFWriter, directory: Path, rows: int, template: str) -> None:
    """The tokens, how text is split into them, and the chat template. rows: of the embedding. Raises UnsupportedModel
    for a tokenizer that llama.cpp does not have, or that fortwo does not know under llama.cpp's name."""
    spec = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    model = spec["model"]
    if model.get("type") != "BPE":
        raise _unknown(directory, f"its model is {model.get('type')!r}")
    texts, kinds = _tokens(spec, rows)
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(texts)
        writer.add_token_scores(_scores(texts, merges))
        writer.add_add_space_prefix(_prefixes_space(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(directory, spec))
        writer.add_token_list(texts)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types(kinds)
    writer.add_chat_template(template)
    _add_specials(writer, directory)


def _tokens(spec: Json, rows: int) -> tuple[list[str], list[int]]:
    """The text and the type of each row of the embedding; rows without a token are unused."""
    texts = [f"[PAD{number}]" for number in range(rows)]
    kinds = [_UNUSED] * rows
    unknown = spec["model"].get("unk_token")
    fallback = bool(spec["model"].get("byte_fallback"))
    for text, number in spec["model"]["vocab"].items():
        if number < rows:
            is_byte = fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            texts[number] = text
            kinds[number] = _BYTE if is_byte else _UNKNOWN if fallback and text == unknown else _NORMAL
    for token in spec.get("added_tokens") or ():
        if token["id"] < rows:
            texts[token["id"]] = token["content"]
            kind = _CONTROL if token["special"] else _USER_DEFINED
            kinds[token["id"]] = _UNKNOWN if fallback and token["content"] == unknown else kind
    return texts, kinds


def _scores(texts: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """SentencePiece merges the pair with the highest score first: that of the earliest merge."""
    order: dict[str, int] = {}
    for place, pair in enumerate(merges):
        order.setdefault("".join(pair), place)
    return [-float(order.get(text, len(merges))) for text in texts]


def _prefixes_space(spec: Json) -> bool:
    """Whether the text gets a space before its first word."""
    steps = _steps(spec.get("normalizer"), "normalizers") + _steps(spec.get("pre_tokenizer"), "pretokenizers")
    return any(
        one["type"] == "Prepend" or (one["type"] == "Metaspace" and one.get("prepend_scheme", "always") != "never")
        for one in steps
    )


def _steps(part: Any, inner: str) -> list[Json]:
    if not part:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]


def _pre_tokenizer(directory: Path, spec: Json) -> str:
    """llama.cpp's name of the way in which the tokenizer splits text before it merges bytes."""
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    kinds = [one["type"] for one in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
    if digits and steps[1].get("use_regex", True) and not steps[1].get("add_prefix_space"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        expression = steps[0]["pattern"].get("Regex")
        if expression in _SPLITS:
            return _SPLITS[expression]
    raise _unknown(directory, f"it splits text by {' and '.join(kinds) or 'nothing'} in a way that has no name there")


def _unknown(directory: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The tokenizer in {directory} cannot be written as GGUF: {why}.",
        param="to",
        hint="Export the adapter as gguf-lora and use it with a GGUF file of the base, or export it as merged.",
    )


def _add_specials(writer: GGUFWriter, directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    for name, number in (
        ("bos", tokenizer.bos_token_id),
        ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
    ):
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    eos = tokenizer.eos_token_id
    ends = sorted(declared_eos(directory) - {eos})
    if eos is None and ends:
        eos = ends.pop(0)
    if eos is not None:
        writer.add_eos_token_id(eos)
    if ends:
        writer.add_eot_token_id(ends[0])
    first = tokenizer("x")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if (suppressed := read_json(directory / "tokenizer_config.json").get("add_eos_token")) is not None:
        writer.add_add_eos_token(bool(suppressed))

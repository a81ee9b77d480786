"""Contents of safetensors files that are damaged in every way that a header allows."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager


def safetensors_file(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": b"",
    "text": b"not safetensors at all",
    "list": safetensors_file([]),
    "not utf-8": safetensors_file(b'{"\xff": 1}'),
    "not json": safetensors_file(b"{"),
    "length beyond the file": b"\xff" * 8,
    "nested": safetensors_file(b'{"a":' * 100_000),
    "truncated": safetensors_file({"a": entry()}, bytes(7)),
    "too long": safetensors_file({"a": entry()}, bytes(9)),
    "shape mismatch": safetensors_file({"a": entry(shape=[3])}),
    "negative offset": safetensors_file({"a": entry(offsets=[-8, 0])}),
    "reversed offsets": safetensors_file({"a": entry(offsets=[8, 0])}),
    "hole": safetensors_file({"a": entry(offsets=[8, 16])}, bytes(16)),
    "overlap": safetensors_file({"a": entry(), "b": entry()}),
    "partial overlap": safetensors_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "one offset": safetensors_file({"a": entry(offsets=[8])}),
    "float shape": safetensors_file({"a": entry(shape=[2.0])}),
    "text shape": safetensors_file({"a": entry(shape="2")}),
    "text dimension": safetensors_file({"a": entry(shape=["2"])}),
    "negative dimension": safetensors_file({"a": entry(shape=[-2])}),
    "huge shape": safetensors_file({"a": entry(shape=[2**62, 2**62])}),
    "unknown dtype": safetensors_file({"a": entry(dtype="F33")}),
    "dtype of a number": safetensors_file({"a": entry(dtype=32)}),
    "no offsets": safetensors_file({"a": {"dtype": "F32", "shape": [2]}}),
    "null tensor": safetensors_file({"a": None}),
    "metadata of numbers": safetensors_file({"__metadata__": {"a": 1}, "b": entry()}),
}


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

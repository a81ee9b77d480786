"""JSON that says one thing: an object that has a key twice is refused, where the json module would take the last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any


class RepeatedKey(ValueError):
    """An object has the same key twice. path: of the key within the value, such as "lora_config.r"."""

    def __init__(self, path: str) -> None:
        super().__init__(f"the key {path!r} is given twice")
        self.path = path


def loads(text: str | bytes) -> Any:
    """The value. Raises json.JSONDecodeError, RepeatedKey, and what json.loads raises besides (ValueError for a number
    of thousands of digits, RecursionError)."""
    repeated, decoder = _decoder()
    value = decoder.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    if repeated:
        raise RepeatedKey(_path_of(value, repeated))
    return value


def raw_decode(text: str, position: int) -> tuple[Any, RepeatedKey | None, int]:
    """The value that begins at `position`, what is wrong with its keys, and where it ends. Raises what `loads` does,
    except RepeatedKey."""
    repeated, decoder = _decoder()
    value, end = decoder.raw_decode(text, position)
    return value, RepeatedKey(_path_of(value, repeated)) if repeated else None, end


_Repeated = list[tuple[dict[str, Any], str]]  # objects that have a key twice, and the key


def _decoder() -> tuple[_Repeated, json.JSONDecoder]:
    repeated: _Repeated = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            times = Counter(key for key, _ in pairs)
            repeated.append((made, next(key for key, count in times.items() if count > 1)))
        return made

    return repeated, json.JSONDecoder(object_pairs_hook=collect)


def _path_of(value: Any, repeated: _Repeated) -> str:
    """The path of the first repeated key; of an object that a later value replaced, the key alone."""
    wanted, key = repeated[0]
    path = find(value, lambda found: found is wanted)
    return key if path is None else f"{path}.{key}".removeprefix(".")


def find(value: Any, wanted: Callable[[Any], bool]) -> str | None:
    """The path of a value within `value`, or of a key, that is wanted, such as "messages[0].content"; None if there is
    none."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, found = stack.pop()
        if wanted(found):
            return path
        if isinstance(found, dict):
            for name, held in found.items():
                place = f"{path}.{name}".removeprefix(".")
                stack += [(place, held), (place, name)]
        elif isinstance(found, list):
            stack.extend((f"{path}[{index}]", held) for index, held in enumerate(found))
    return None

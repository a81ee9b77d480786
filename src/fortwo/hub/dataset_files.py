"""Which files of a dataset's repository are meant: decided by their names and by what the card declares."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from fortwo.errors import InvalidDataset

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
SHARDED = (".parquet", ".jsonl")  # kinds of files that can be joined
MOST_NAMED = 20  # alternatives that an error lists
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_DEFAULT, _TRAIN = "default", "train"
_Splits = dict[tuple[str, str], list[str]]  # the files of each config and split


def choose_files(names: Sequence[str], configs: Sequence[Any], part: str | None) -> tuple[str, ...]:
    """The files of a split, in order, or the one file that `part` names.

    names: of all files of the repository. configs: what the card declares under `configs`. part: the name of a file,
    config/split, a config or a split; None for the default config. Without a split, train is meant. Raises
    InvalidDataset naming the alternatives.
    """
    names = [name for name in names if _is_inside(name)]
    if part is not None and part in names:
        _check_suffix(part)
        return (part,)
    splits = _declared(names, configs) or _named(names)
    found = _narrowed(splits, part)
    if len(found) != 1:
        raise _unclear(names, splits, part)
    files = sorted(splits[found[0]])
    suffixes = {PurePosixPath(file).suffix for file in files}
    if len(files) > 1 and (len(suffixes) > 1 or suffixes.isdisjoint(SHARDED)):
        raise InvalidDataset(
            f"{'/'.join(found[0])} has {len(files)} files that cannot be joined: {_list(files)}",
            param="dataset.hub",
            hint=f"Name one of them: hub:OWNER/NAME:{files[0]}",
        )
    return tuple(files)


def _is_inside(name: str) -> bool:
    """Whether a name from the hub stays in the folder that it is downloaded to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _check_suffix(name: str) -> None:
    if PurePosixPath(name).suffix not in SUFFIXES:
        raise InvalidDataset(
            f"{name} is none of {', '.join(SUFFIXES)}",
            param="dataset.hub",
            hint="Name a file of such a kind. Many datasets have one at the revision refs/convert/parquet.",
        )


def _narrowed(splits: _Splits, part: str | None) -> list[tuple[str, str]]:
    """The configs and splits that are meant: of several that fit, those of the default config, then the train split."""
    found = [key for key in splits if part is None or part in (*key, "/".join(key))]
    for place, preferred in enumerate((_DEFAULT, _TRAIN)):
        if len(found) > 1:
            found = [key for key in found if key[place] == preferred] or found
    return found


def _data_files(names: Sequence[str]) -> list[str]:
    paths = [PurePosixPath(name) for name in names]
    return [
        str(path)
        for path in paths
        if path.suffix in SUFFIXES and path.name not in _ABOUT and not any(one.startswith(".") for one in path.parts)
    ]


def _declared(names: Sequence[str], configs: Sequence[Any]) -> _Splits:
    """By the card: each config has data_files, a pattern, a list of patterns, or patterns with their splits."""
    data, splits = _data_files(names), _Splits()
    for config in configs:
        if not isinstance(config, dict):
            continue
        name = _DEFAULT if config.get("default") is True else str(config.get("config_name", _DEFAULT))
        given = config.get("data_files")
        for one in given if isinstance(given, list) else [given]:
            split, path = (one.get("split", _TRAIN), one.get("path")) if isinstance(one, dict) else (_TRAIN, one)
            for pattern in path if isinstance(path, list) else [path]:
                if isinstance(pattern, str):
                    matching = fnmatch.filter(data, pattern.removeprefix("./").replace("**/", "*"))
                    splits.setdefault((name, str(split)), []).extend(matching)
    return {key: list(dict.fromkeys(files)) for key, files in splits.items() if files}


def _named(names: Sequence[str]) -> _Splits:
    """By the names: a split's name in that of the file or of a folder, and the first other folder as config."""
    splits = _Splits()
    for name in _data_files(names):
        folders, words = PurePosixPath(name).parts[:-1], re.split(r"[/._-]", PurePosixPath(name).stem.lower())
        split = _split_of([*words, *(folder.lower() for folder in folders)])
        configs = [folder for folder in folders if folder.lower() != "data" and _split_of([folder.lower()]) is None]
        splits.setdefault((configs[0] if configs else _DEFAULT, split or _TRAIN), []).append(name)
    return splits


def _split_of(words: Sequence[str]) -> str | None:
    return next((split for word in words for split, spelt in _SPLITS.items() if word in spelt), None)


def _unclear(names: Sequence[str], splits: _Splits, part: str | None) -> InvalidDataset:
    if not splits:
        return InvalidDataset(
            f"the dataset has no file that can be read; its files are {_list(sorted(names))}",
            param="dataset.hub",
            hint=f"fortwo reads {', '.join(SUFFIXES)}, and runs no code of a dataset. Many datasets have Parquet files "
            "at the revision refs/convert/parquet.",
        )
    there = _list(sorted("/".join(key) for key in splits))
    what = "the dataset has several parts" if part is None else f"{part!r} means no single part of the dataset"
    return InvalidDataset(
        f"{what}: {there}",
        param="dataset.hub",
        hint="Name one of them, or a file: hub:OWNER/NAME:CONFIG/SPLIT or hub:OWNER/NAME:FILE",
    )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"

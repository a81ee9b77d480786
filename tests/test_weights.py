"""Headers, digest and writing of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from fortwo.errors import UnsupportedModel
from fortwo.hub import weights

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(4, dtype=torch.bfloat16)}


def silent(label: str, done: int, total: int) -> None:
    pass


def save(directory: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / weights.SAFE_WEIGHTS_NAME)
    return directory


def save_shards(directory: Path) -> Path:
    directory.mkdir()
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, directory / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (directory / weights.SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    return directory


def test_read_gives_every_tensor_of_every_shard(tmp_path: Path) -> None:
    found = weights.open_tensors(save_shards(tmp_path / "shards"))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_headers_give_type_shape_and_place(tmp_path: Path) -> None:
    table = weights.tensor_infos(save(tmp_path))
    assert list(table) == ["a", "b"]
    assert (table["a"].dtype, table["a"].shape) == ("BF16", (4,))
    raw = (tmp_path / weights.SAFE_WEIGHTS_NAME).read_bytes()[table["b"].start : table["b"].end]
    assert np.array_equal(np.frombuffer(raw, np.float32), np.arange(6.0))
    assert weights.parameter_count(table) == 10


def test_digest_is_of_the_weights_not_of_path_or_shards(tmp_path: Path) -> None:
    one = weights.digest(save(tmp_path / "one"), silent)
    assert weights.digest(save_shards(tmp_path / "shards"), silent) == one


@pytest.mark.parametrize(
    "other",
    [
        {**TENSORS, "b": TENSORS["b"] + 1},
        {**TENSORS, "b": TENSORS["b"].reshape(3, 2)},
        {**TENSORS, "b": TENSORS["b"].view(torch.int32)},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"]},
    ],
    ids=["value", "shape", "dtype", "name", "absence"],
)
def test_digest_changes_with_any(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    assert weights.digest(save(tmp_path / "one"), silent) != weights.digest(save(tmp_path / "other", other), silent)


def test_write_is_read_back_by_safetensors(tmp_path: Path) -> None:
    given = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones((3,), np.float32)}
    weights.write_fp32(
        tmp_path / weights.SAFE_WEIGHTS_NAME, {name: array.shape for name, array in given.items()}, given.items()
    )
    found = weights.open_tensors(tmp_path)
    assert all(np.array_equal(found[name].numpy(), array) for name, array in given.items())


def test_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    file = save(tmp_path) / weights.SAFE_WEIGHTS_NAME
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UnsupportedModel, match=rf"model\.safetensors has {size - 5} bytes, its header promises {size}"):
        weights.tensor_infos(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x02\0\0\0\0\0\0\0[]"])
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / weights.SAFE_WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(UnsupportedModel, match="is not a safetensors file"):
        weights.tensor_infos(tmp_path)


def test_pickled_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"pickled weights \(pytorch_model\.bin\)") as raised:
        weights.safetensors_files(tmp_path)
    assert "save_pretrained" in str(raised.value.hint)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (save_shards(tmp_path / "shards") / "a.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"lacks a\.safetensors"):
        weights.safetensors_files(tmp_path / "shards")


def test_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / weights.SAFE_WEIGHTS_INDEX_NAME).write_text("[]")
    with pytest.raises(UnsupportedModel, match=r"index\.json is not a safetensors index"):
        weights.safetensors_files(tmp_path)


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"holds no model\.safetensors"):
        weights.safetensors_files(tmp_path)


def test_a_file_in_parts_is_one_that_safetensors_reads() -> None:
    given = TENSORS | {"turned": torch.arange(6.0).reshape(2, 3).t(), "none": torch.tensor(3.0), "no": torch.empty(0)}
    found = load(b"".join(weights.parts(given)))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype for name in given)

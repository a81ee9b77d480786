"""Headers, tensors and digest of safetensors files, and writing them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from fortwo.errors import UnsupportedModel
from fortwo.hub import weights
from tests.damaged import DAMAGED, entry, safetensors_file

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


def test_infos_give_type_shape_and_size(tmp_path: Path) -> None:
    infos = weights.tensor_infos(save(tmp_path))
    assert list(infos) == ["a", "b"]
    assert (infos["a"].dtype, infos["a"].shape, infos["a"].nbytes) == ("BF16", (4,), 8)
    assert (infos["b"].dtype, infos["b"].shape, infos["b"].nbytes) == ("F32", (2, 3), 24)
    assert weights.parameter_count(infos) == 10


def test_a_tensor_outlives_its_file_and_belongs_to_the_caller(tmp_path: Path) -> None:
    found = weights.open_tensors(save(tmp_path))
    tensor = found["b"]
    tensor += 1
    assert torch.equal(found["b"], TENSORS["b"])
    (tmp_path / weights.SAFE_WEIGHTS_NAME).write_bytes(b"")
    assert torch.equal(tensor, TENSORS["b"] + 1)
    with pytest.raises(UnsupportedModel, match="truncated"):
        found["b"]


def test_digests_do_not_change(tmp_path: Path) -> None:
    expected = "3b4321336dc962bc5ac87a3734c56baf05e71e32334b32e7e8bde5922ac229a8"
    assert weights.digest(save(tmp_path), silent) == expected


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


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_its_name_and_size(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / weights.SAFE_WEIGHTS_NAME
    file.write_bytes(content)
    for use in (weights.tensor_infos, weights.open_tensors, lambda directory: weights.digest(directory, silent)):
        with pytest.raises(UnsupportedModel, match="is truncated or not a safetensors file") as raised:
            use(tmp_path)
        assert raised.value.message.startswith(f"{file} ({len(content)} bytes)")
        assert raised.value.hint == "Download the file again."


def test_a_dtype_that_is_not_supported_is_named(tmp_path: Path) -> None:
    content = safetensors_file({"a": entry(dtype="F8_E4M3", shape=[8])})
    (tmp_path / weights.SAFE_WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"tensor 'a' in .*model\.safetensors is of type F8_E4M3") as raised:
        weights.tensor_infos(tmp_path)
    assert "bf16 or fp32" in str(raised.value.hint)


def test_pickled_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"pickled weights \(pytorch_model\.bin\)") as raised:
        weights.safetensors_files(tmp_path)
    assert "save_pretrained" in str(raised.value.hint)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (save_shards(tmp_path / "shards") / "a.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"lacks a\.safetensors"):
        weights.safetensors_files(tmp_path / "shards")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}', "[" * 100_000]
)
def test_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / weights.SAFE_WEIGHTS_INDEX_NAME).write_text(content)
    with pytest.raises(UnsupportedModel, match=r"index\.json is not a safetensors index"):
        weights.safetensors_files(tmp_path)


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"holds no model\.safetensors"):
        weights.safetensors_files(tmp_path)


def test_serialized_tensors_are_read_back() -> None:
    given = TENSORS | {"turned": torch.arange(6.0).reshape(2, 3).t(), "none": torch.tensor(3.0), "no": torch.empty(0)}
    found = load(weights.serialize(given))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype for name in given)


def test_weights_of_whole_numbers_are_refused_and_other_tensors_are_not(tmp_path: Path) -> None:
    positions = {"rotary.position_ids": torch.arange(3)}
    weights.check_weights(weights.tensor_infos(save(tmp_path / "a", {**TENSORS, **positions})))
    quantised = {"down_proj.weight": torch.ones(2, 2, dtype=torch.int8), "up_proj.weight": torch.ones(2, 2) > 0}
    infos = weights.tensor_infos(save(tmp_path / "b", {**TENSORS, **quantised}))
    with pytest.raises(UnsupportedModel, match=r"'down_proj\.weight' and 1 more in .* is of type I8") as raised:
        weights.check_weights(infos)
    assert "not quantised" in str(raised.value.hint)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors"])
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / weights.SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnsupportedModel, match="is not a safetensors index"):
        weights.safetensors_files(tmp_path)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / weights.SAFE_WEIGHTS_NAME).write_text(pointer)
    with pytest.raises(UnsupportedModel) as raised:
        weights.tensor_infos(tmp_path)
    assert "git lfs pull" in str(raised.value.hint)

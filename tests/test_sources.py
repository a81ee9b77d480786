"""Directories that are no base, or one in another form: each is refused by what it is, with the way on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fortwo.errors import UnsupportedModel
from fortwo.hub import weights
from fortwo.hub.sources import DirectorySource, local_source
from tests.tiny import save_directory


def silent(label: str, done: int, total: int) -> None:
    pass


def populate(directory: Path) -> Path:
    target = directory.parent / "target"
    target.mkdir()
    local_source(directory).populate(target, silent)
    return target


QUANTISED: dict[str, tuple[Any, str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method fp8"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "quant_method awq, 4 bits"),
    "gptq": ({"quant_method": "gptq", "bits": 8}, "quant_method gptq, 8 bits"),
    "4 bits": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method bitsandbytes, 4 bits"),
    "8 bits": ({"load_in_8bit": True, "load_in_4bit": False}, "quant_method bitsandbytes, 8 bits"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "quant_method compressed-tensors"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quant_method mxfp4"),
    "no object": ("int8", "int8"),
    "no method": ({"group_size": 32}, "an unknown method"),
}


@pytest.mark.parametrize(("quantisation", "method"), QUANTISED.values(), ids=QUANTISED.keys())
def test_a_base_that_is_quantised_already_is_refused_by_its_method(
    tmp_path: Path, quantisation: Any, method: str
) -> None:
    directory = save_directory(tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    (directory / weights.SAFE_WEIGHTS_NAME).unlink()  # it is refused before the weights are looked at
    with pytest.raises(UnsupportedModel) as raised:
        populate(directory)
    assert f"is quantised already ({method}" in raised.value.message.replace("quant_method an", "an")
    assert "not quantised" in str(raised.value.hint)


@pytest.mark.parametrize("name", ["q_proj.qweight", "q_proj.SCB", "q_proj.weight.absmax", "q_proj.weight_scale"])
def test_it_is_recognised_by_its_tensors_too(tmp_path: Path, name: str) -> None:
    directory = save_directory(tmp_path / "base")
    file = directory / weights.SAFE_WEIGHTS_NAME
    save_file({**load_file(file), name: torch.ones(1)}, file)
    with pytest.raises(UnsupportedModel, match=f"it has the tensor '{name}'"):
        populate(directory)


def test_weights_of_bytes_are_no_weights(tmp_path: Path) -> None:
    directory = save_directory(tmp_path / "base")
    file = directory / weights.SAFE_WEIGHTS_NAME
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(64, 96, dtype=torch.int8)
    save_file(tensors, file)
    with pytest.raises(UnsupportedModel, match=r"down_proj\.weight' in .* is of type I8"):
        populate(directory)


def test_a_directory_of_a_gguf_file_or_of_an_adapter_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(UnsupportedModel, match=r"holds no config\.json and no tokenizer\.json") as raised:
        DirectorySource(folder).populate(tmp_path, silent)
    assert "holds an adapter. Add its base (some/base)" in str(raised.value.hint)
    (folder / "M.GGUF").touch()
    with pytest.raises(UnsupportedModel) as raised:
        DirectorySource(folder).populate(tmp_path, silent)
    assert f"added by its own path: {folder / 'M.GGUF'}" in str(raised.value.hint)


def test_shards_in_a_folder_of_their_own_are_found(tmp_path: Path) -> None:
    directory = save_directory(tmp_path / "base")
    tensors = load_file(directory / weights.SAFE_WEIGHTS_NAME)
    (directory / weights.SAFE_WEIGHTS_NAME).unlink()
    (directory / "w").mkdir()
    save_file(tensors, directory / "w" / "one.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "w/one.safetensors")}
    (directory / weights.SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
    assert weights.open_tensors(populate(directory)).keys() == tensors.keys()


def test_a_truncated_file_is_named_by_the_users_path(tmp_path: Path) -> None:
    directory = save_directory(tmp_path / "base")
    file = directory / weights.SAFE_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnsupportedModel, match=f"{file} .* is truncated"):
        populate(directory)

"""What a worker refuses before it loads a base, each with the remedy. None of this needs Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fortwo.errors import Conflict, Unavailable
from fortwo.hub.catalog import Catalog
from fortwo.scale.gradients import GradientWorker, RunSpec, check_memory, check_versions, find_base, versions
from fortwo.train.shares import Share


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    Catalog(tmp_path).add("tiny", tiny)
    Catalog(tmp_path).prepare("tiny")
    return tmp_path


def spec(models: Path, **more: object) -> RunSpec:
    values = {
        "model": "tiny",
        "digest": Catalog(models).model_info("tiny").digest,  # type: ignore[union-attr]
        "models_dir": models,
        "weights": "fp32",
        "plan": {},
        "isa": "auto",
        "threads": 1,
        "fp32_kernel": "torch",
        "versions": versions(),
    }
    return RunSpec(**{**values, **more})  # type: ignore[arg-type]


def test_versions_that_differ_are_named_with_both_numbers() -> None:
    check_versions({"fortwo": "1.0", "torch": "2.13.0"}, {"fortwo": "1.0", "torch": "2.13.0"})
    with pytest.raises(Conflict) as raised:
        check_versions({"fortwo": "1.1", "torch": "2.13.0"}, {"fortwo": "1.0", "torch": "2.12.1"})
    assert "fortwo 1.0 instead of 1.1, torch 2.12.1 instead of 2.13.0" in raised.value.message
    assert "same versions" in str(raised.value.hint)
    with pytest.raises(Conflict, match=r"torch 2\.12\.1 instead of 2\.13\.0") as raised:
        check_versions({"fortwo": "1.0", "torch": "2.13.0"}, {"fortwo": "1.0", "torch": "2.12.1"})
    assert "fortwo 1.0" not in raised.value.message


def test_a_worker_with_another_version_ends_before_it_loads_anything(models: Path) -> None:
    newer = spec(models, versions=versions() | {"fortwo": "99"}, model="not looked for")
    with pytest.raises(Conflict, match="instead of 99"):
        GradientWorker.of(newer, Share(), torch.device("cpu"))


def test_a_base_is_found_where_it_was_prepared(models: Path) -> None:
    found = spec(models)
    assert find_base(models, "tiny", found.digest).digest == found.digest


def test_a_base_that_is_not_there_is_refused(models: Path, tmp_path: Path) -> None:
    for folder, model in ((tmp_path / "elsewhere", "tiny"), (models, "other")):
        with pytest.raises(Conflict, match="cannot read the base") as raised:
            find_base(folder, model, "0")
        assert str(folder) in raised.value.message
        assert "share" in str(raised.value.hint)
    assert not (tmp_path / "elsewhere").exists()  # nothing was prepared or written


def test_a_base_whose_files_are_gone_is_refused(models: Path) -> None:
    found = spec(models)
    shutil.rmtree(models / "tiny")
    with pytest.raises(Conflict, match="cannot read the base"):
        find_base(models, "tiny", found.digest)


def test_another_base_of_the_same_name_is_refused_with_both_digests(models: Path) -> None:
    found = spec(models)
    with pytest.raises(Conflict, match="another base") as raised:
        find_base(models, "tiny", "f" * 64)
    assert found.digest in raised.value.message
    assert "f" * 64 in raised.value.message


def test_a_base_that_does_not_fit_is_refused_and_sharding_is_named(models: Path) -> None:
    config = Catalog(models).config("tiny")
    check_memory(config, spec(models), 1 << 40)
    with pytest.raises(Unavailable, match="holds the whole base") as raised:
        check_memory(config, spec(models), 200 << 20)
    assert raised.value.code == "out_of_memory"
    assert "has 0.2 GiB" in raised.value.message
    assert "FORTWO_SHARD" in str(raised.value.hint)

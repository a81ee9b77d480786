"""What is in memory: loaded on demand, known by digest, and never without an effect."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_directory, tiny_model

from fortwo.adapters.store import AdapterStore
from fortwo.engine import residents as module
from fortwo.engine.engine import Engine
from fortwo.engine.residents import Residents, States
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound, Unavailable
from fortwo.execution import autotuning as forms
from fortwo.hub.catalog import Catalog
from fortwo.nn.config import DecoderConfig
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.formats import Dequantised, Weight
from fortwo.quantization.selection import FORMS, Measurements
from fortwo.quantization.tiles import Tiles
from fortwo.records import AdapterVersion, Json, Message, Phase
from fortwo.settings import Settings, load

CONFIG = LoraConfig(r=2, alpha=4)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bases of one shape and different weights, and one of another shape."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tiny": save_directory(folder / "tiny"),
        "other": save_directory(folder / "other", rms_norm_eps=1e-5, bos_token_id=1, tie_word_embeddings=True),
        "shallow": save_directory(folder / "shallow", num_hidden_layers=1),
    }


class House:
    """One home, and a server's inside over it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, **settings)
        self.catalog = Catalog(self.settings)
        self.store = AdapterStore(self.settings.adapters_dir)
        self.engine = Engine(threads=1)
        self.engine.start()
        self.residents = Residents(self.settings, self.catalog, self.store, self.engine)

    def ask(self, model: str, text: str = "hello") -> str:
        target = self.residents.resolve(model)
        tokens = tuple(target.resident.renderer.encode_prompt([Message("user", text)]))
        asked = Prompt(target.resident.id, tokens, target.adapter_key, Sampling(max_tokens=16))
        return self.engine.submit(asked).wait(10)

    def lora(self, strength: float = 0.2, seed: int = 0) -> Lora:
        lora = Lora.init(CONFIG, self.residents.load_base("tiny").decoder.config, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in lora.state().items():
            if ".lora_B." in name and strength:
                tensor.copy_(strength * torch.randn(tensor.shape, generator=generator))
        return lora

    def manifest(self, base: str = "tiny") -> Json:
        return {"base_model": base, "base_digest": self.residents.load_base(base).digest}

    def store_only(
        self, name: str, lora: Lora, manifest: Json | None = None, *, current: bool = True
    ) -> AdapterVersion:
        """Publish on disk, not in memory."""
        told = self.manifest() if manifest is None else manifest
        return self.store.publish(name, lora.state(), lora.config.to_peft("tiny"), told, current=current)


@pytest.fixture
def house(home: Path, directories: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[House]:
    """Settings may be given as the fixture's parameter."""
    house = House(home, **getattr(request, "param", {}))
    house.catalog.add("tiny", directories["tiny"])
    yield house
    house.engine.close()


# ---------------------------------------------------------------- bases


def test_a_base_is_loaded_once_on_demand_and_listed_while_it_is_there(house: House) -> None:
    assert house.residents.states().models == {}
    first = house.residents.resolve("tiny")
    assert (first.adapter_key, first.name, first.resident.id) == (None, "tiny", "tiny")
    assert house.residents.load_base("tiny") is first.resident
    info = house.catalog.model_info("tiny")
    assert info is not None
    state = house.residents.states().models["tiny"]
    assert (state.state, state.digest, state.bytes) == ("loaded", info.digest, info.bytes)
    house.residents.unload_base("tiny")
    assert house.residents.states().models == {}
    with pytest.raises(NotFound, match="not loaded"):
        house.residents.unload_base("tiny")


def test_two_threads_that_want_the_same_base_get_the_same(house: House) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(house.residents.load_base("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len({id(resident) for resident in found}) == 1


def test_replies_go_on_while_another_base_is_loaded(
    house: House, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    house.ask("tiny")
    house.catalog.add("other", directories["other"])
    opened, read = threading.Event(), module.weights.open_tensors

    def slow_disk(directory: Path) -> Mapping[str, torch.Tensor]:
        assert opened.wait(10)
        return read(directory)

    monkeypatch.setattr(module.weights, "open_tensors", slow_disk)
    loading = threading.Thread(target=house.residents.load_base, args=["other"])
    loading.start()
    deadline = time.monotonic() + 10
    while "other" not in house.residents.states().models:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert house.residents.states().models["other"].state == "loading"
    assert house.ask("tiny")
    opened.set()
    loading.join(10)
    assert house.residents.states().models["other"].state == "loaded"


def test_a_base_that_cannot_be_loaded_leaves_nothing_behind(house: House, tmp_path: Path) -> None:
    shutil.copytree(house.catalog.prepare("tiny"), tmp_path / "broken", symlinks=False)
    config = tmp_path / "broken" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    house.catalog.add("broken", tmp_path / "broken")
    with pytest.raises(InvalidRequest, match="GPT2LMHeadModel"):
        house.residents.load_base("broken")
    assert house.residents.states().models == {}
    assert house.ask("tiny")


def test_a_base_stays_while_a_request_or_a_job_needs_it(house: House) -> None:
    tokens = tuple(house.residents.resolve("tiny").resident.renderer.encode_prompt([Message("user", "hi")]))
    running = house.engine.submit(Prompt("tiny", tokens, None, Sampling(max_tokens=200, temperature=1, seed=1)))
    with pytest.raises(Conflict, match="'tiny'"):
        house.residents.unload_base("tiny")
    running.cancel()
    running.wait(10)
    task = house.engine.run_task((Phase("running") for _ in iter(int, 1)), lambda event: None)  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="job"):
        house.residents.unload_base("tiny")
    task.cancel()
    with pytest.raises(CancelledError):
        task.result(10)
    house.residents.unload_base("tiny")


@pytest.mark.parametrize("weights", FORMS)
def test_every_form_of_the_weights_serves_adapters_and_can_be_trained_on(
    home: Path, directories: dict[str, Path], weights: str
) -> None:
    house = House(home, weights=weights)
    try:
        house.catalog.add("tiny", directories["tiny"])
        decoder = house.residents.load_base("tiny").decoder
        held = decoder.layers[0].qkv_OD
        if weights == "fp32":
            assert isinstance(held, torch.Tensor)
        else:
            assert isinstance(held, Weight)
            assert tuple(held.forms) == (weights,)
        assert house.ask("tiny")
        house.store_only("fact", house.lora())
        assert house.ask("fact")
        for dense in (decoder.in_fp32(), decoder.in_bf16()):
            assert isinstance(dense.layers[0].down_DI, Dequantised if weights == "nf4" else torch.Tensor | Tiles)
            assert dense.head_VD.shape == dense.embedding_VD.shape
    finally:
        house.engine.close()


def test_auto_holds_what_fp32_is_too_large_for_in_less() -> None:
    config = DecoderConfig.from_hf(tiny_model("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    assert forms.alone(config, 8 * config.parameters) is None
    assert forms.alone(config, 8 * config.parameters - 1) == "bf16"
    assert forms.alone(config, 4 * config.parameters) == "bf16"
    assert forms.alone(config, 4 * config.parameters - 1) == "nf4"


def test_auto_measures_once_on_a_machine_and_keeps_fp32(
    home: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "SMALL", 0)
    houses = [House(home), House(home)]
    try:
        for house in houses:
            if house is houses[0]:
                house.catalog.add("tiny", directories["tiny"])
            held = house.residents.load_base("tiny").decoder.head
            (found,) = Measurements(home).all().values()
            assert isinstance(held, Weight)
            assert held.choice.table == found.choice
            assert set(held.forms) == {"fp32", *held.choice.forms}
            assert found.seconds.keys() >= {"fp32"}
            assert house.ask("tiny")
            monkeypatch.setattr(forms, "measure", None)  # measuring again would fail
    finally:
        for house in houses:
            house.engine.close()


def test_a_width_that_a_form_cannot_hold_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    house = House(home, weights="int4")
    try:
        house.catalog.add("odd", save_directory(tmp_path / "odd", intermediate_size=90))
        with pytest.raises(InvalidRequest, match="'int4' cannot hold 'odd'"):
            house.residents.load_base("odd")
        assert house.residents.states().models == {}
    finally:
        house.engine.close()


def test_a_form_that_does_not_exist_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTWO_WEIGHTS", "int3")
    with pytest.raises(InvalidRequest, match="weights = 'int3'") as refused:
        load()
    assert refused.value.param == "weights"


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused_by_name(home: Path, device: str) -> None:
    with pytest.raises(InvalidRequest, match=device):
        House(home, device=device)


# ---------------------------------------------------------------- names


def test_a_name_is_its_current_version_and_a_number_is_that_version(house: House) -> None:
    first, second = house.store_only("pet", house.lora(seed=1)), house.store_only("pet", house.lora(seed=2))
    assert house.residents.resolve("pet").adapter_key == second.digest
    assert house.residents.resolve("pet@1").adapter_key == first.digest
    replies = {model: house.ask(model) for model in ("tiny", "pet", "pet@1", "pet@2")}
    assert replies["pet"] == replies["pet@2"]
    assert len(set(replies.values())) == 3


def test_a_new_version_of_a_loaded_name_is_served_at_once(house: House) -> None:
    house.store_only("pet", house.lora(seed=1))
    before = house.ask("pet")
    house.store_only("pet", house.lora(seed=2))
    assert house.ask("pet") != before == house.ask("pet@1")


def test_a_version_that_is_not_current_answers_to_its_number_only(house: House) -> None:
    house.store_only("failed", house.lora(), current=False)
    assert house.ask("failed@1")
    with pytest.raises(NotFound, match="current") as refused:
        house.residents.resolve("failed")
    assert refused.value.param == "model"


@pytest.mark.parametrize("model", ["nobody", "nobody@3", "../tiny", "", "pet@7"])
def test_an_unknown_name_is_told_what_there_is(house: House, model: str) -> None:
    house.store_only("pet", house.lora())
    with pytest.raises(NotFound) as refused:
        house.residents.resolve(model)
    assert refused.value.param == "model"
    assert refused.value.hint is not None
    assert "pet" in refused.value.hint
    assert "tiny" in refused.value.hint or model == "pet@7"


# ---------------------------------------------------------------- adapters


def test_loading_an_adapter_loads_its_base(house: House) -> None:
    version = house.store_only("pet", house.lora())
    house.residents.unload_base("tiny")
    assert house.residents.load_adapter("pet").digest == version.digest
    assert set(house.residents.states().models) == {"tiny"}
    state = house.residents.states().adapters[version.digest]
    assert (state.base, state.bytes) == ("tiny", sum(tensor.nbytes for tensor in house.lora().state().values()))


def test_the_base_is_found_by_its_weights_whatever_it_is_called(house: House, directories: dict[str, Path]) -> None:
    house.store_only("pet", house.lora(), {**house.manifest(), "base_model": "/somewhere/else"})
    expected = house.ask("pet")
    house.residents.unload_base("tiny")
    house.catalog.remove("tiny")
    house.catalog.add("renamed", directories["tiny"])
    house.catalog.prepare("renamed")
    assert house.ask("pet") == expected
    assert house.residents.resolve("pet").resident.id == "renamed"


def test_a_wrong_base_is_refused_with_both_digests(house: House) -> None:
    mine = house.manifest()["base_digest"]
    house.store_only("stray", house.lora(), {"base_model": "tiny", "base_digest": "f" * 64})
    for _ in range(2):  # loaded, then known only from its info
        with pytest.raises(InvalidAdapter) as refused:
            house.residents.load_adapter("stray")
        assert "f" * 64 in refused.value.message
        assert mine in refused.value.message
        if "tiny" in house.residents.states().models:
            house.residents.unload_base("tiny")
    house.store_only("lost", house.lora(), {"base_model": "gone", "base_digest": "e" * 64})
    with pytest.raises(InvalidAdapter, match="'gone'.*" + "e" * 64):
        house.residents.load_adapter("lost")


def test_an_adapter_of_another_shape_is_refused_naming_the_tensor(house: House, directories: dict[str, Path]) -> None:
    house.catalog.add("shallow", directories["shallow"])
    house.store_only("deep", house.lora(), house.manifest("shallow"))
    with pytest.raises(InvalidAdapter, match=r"model\.layers\.1\."):
        house.residents.load_adapter("deep")


@pytest.mark.parametrize(
    ("strength", "reason"),
    [(0.0, "zero everywhere"), (1e-12, "changes nothing"), (float("nan"), "nan"), (float("inf"), "infinite")],
)
def test_an_adapter_without_effect_is_refused_with_the_reason(house: House, strength: float, reason: str) -> None:
    version = house.store_only("dud", house.lora(strength))
    with pytest.raises(InvalidAdapter, match=reason):
        house.residents.load_adapter("dud")
    assert house.residents.states().adapters == {}
    with pytest.raises(NotFound):
        house.engine.submit(Prompt("tiny", (1,), version.digest))
    assert house.residents.load_base("tiny").runner.cache.used == 0


def test_numbers_whose_sum_is_infinite_are_not_called_so(house: House) -> None:
    lora = house.lora()
    lora.layers[0]["o"].Bs[0].fill_(3e38)
    house.store_only("large", lora)
    with pytest.raises(InvalidAdapter, match="on a probe"):
        house.residents.load_adapter("large")


def test_a_weak_but_real_effect_is_served(house: House) -> None:
    house.store_only("weak", house.lora(1e-4))
    assert house.ask("weak")


def test_a_damaged_adapter_is_refused_naming_the_file(house: House) -> None:
    version = house.store_only("pet", house.lora())
    file = Path(version.path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors"):
        house.residents.resolve("pet")


def test_an_unloaded_adapter_is_gone_and_comes_back_when_asked(house: House) -> None:
    version = house.store_only("pet", house.lora())
    reply = house.ask("pet")
    house.residents.unload_adapter("pet")
    assert house.residents.states().adapters == {}
    with pytest.raises(NotFound, match=version.digest):
        house.engine.submit(Prompt("tiny", (1,), version.digest))
    with pytest.raises(NotFound, match="pet@1"):
        house.residents.unload_adapter("pet")
    assert house.ask("pet") == reply


def test_an_adapter_that_answers_stays(house: House) -> None:
    version = house.store_only("pet", house.lora())
    house.residents.load_adapter("pet")
    running = house.engine.submit(
        Prompt("tiny", (5, 6, 7), version.digest, Sampling(max_tokens=200, temperature=1, seed=1))
    )
    with pytest.raises(Conflict, match="pet@1"):
        house.residents.unload_adapter("pet")
    running.cancel()
    running.wait(10)
    house.residents.unload_adapter("pet")


def test_what_was_just_trained_is_handed_over_in_memory(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = house.lora()
    version = house.store_only("pet", lora)
    house.residents.publish(version, lora)
    with monkeypatch.context() as closed:
        closed.setattr(house.store, "read", None)  # whoever reads it back fails
        reply = house.ask("pet")
    assert house.residents.resolve("pet").adapter_key == version.digest
    house.residents.unload_adapter("pet")
    assert house.ask("pet") == reply != house.ask("tiny")


def test_a_hand_over_after_its_base_has_gone_is_loaded_when_asked_for(house: House) -> None:
    lora = house.lora()
    version = house.store_only("pet", lora)
    expected = house.ask("pet")
    house.residents.unload_base("tiny")
    house.residents.publish(version, lora)
    assert house.residents.states() == States({}, {})
    assert house.ask("pet") == expected


# ---------------------------------------------------------------- how many


def loaded(house: House) -> set[str]:
    states = house.residents.states().adapters
    return {name for name in house.store.names() if house.store.get(name).digest in states}


def fill(house: House, *names: str) -> None:
    for seed, name in enumerate(names):
        house.store_only(name, house.lora(seed=seed))


@pytest.mark.parametrize("house", [{"max_adapters": 2}], indirect=True)
def test_the_adapter_that_was_asked_for_least_recently_gives_way(house: House) -> None:
    fill(house, "one", "two", "three")
    replies = {name: house.ask(name) for name in ("one", "two")}
    assert house.ask("one") == replies["one"]
    house.residents.resolve("three")
    assert loaded(house) == {"one", "three"}
    assert house.ask("two") == replies["two"]
    assert loaded(house) == {"two", "three"}


@pytest.mark.parametrize("house", [{"max_adapters": 1}], indirect=True)
def test_an_adapter_that_is_about_to_be_asked_never_gives_way(house: House) -> None:
    fill(house, "one", "two")
    target = house.residents.resolve("one")
    assert house.residents.hold(target)
    assert house.residents.hold(target)
    house.residents.release(target)
    with pytest.raises(Unavailable):
        house.residents.resolve("two")
    with pytest.raises(Conflict):
        house.residents.unload_adapter("one")
    house.residents.release(target)
    house.residents.resolve("two")
    assert loaded(house) == {"two"}
    assert not house.residents.hold(target)
    base = house.residents.resolve("tiny")
    assert house.residents.hold(base)
    house.residents.release(base)


@pytest.mark.parametrize("house", [{"max_adapters": 1}], indirect=True)
def test_an_adapter_that_answers_never_gives_way(house: House) -> None:
    fill(house, "one", "two")
    target = house.residents.resolve("one")
    running = house.engine.submit(
        Prompt("tiny", (5, 6, 7), target.adapter_key, Sampling(max_tokens=200, temperature=1, seed=1))
    )
    with pytest.raises(Unavailable, match="two@1") as refused:
        house.residents.resolve("two")
    assert "FORTWO_MAX_ADAPTERS" in str(refused.value.hint)
    trained = house.lora(seed=7)
    version = house.store_only("trained", trained)
    house.residents.publish(version, trained)  # a job does not fail for it
    assert loaded(house) == {"one"}
    running.cancel()
    running.wait(10)
    house.residents.publish(version, trained)
    assert loaded(house) == {"trained"}

"""ModelRegistry: models and adapters are loaded on demand, identified by digest, and checked for an effect."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_directory, save_gguf, tiny_model

from fortwo.adapters.store import AdapterStore
from fortwo.engine import registry as module
from fortwo.engine.base_choice import TrainedOn, choose_base
from fortwo.engine.engine import Engine
from fortwo.engine.networks import read_network
from fortwo.engine.registry import ModelRegistry, RegistryState
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound, Unavailable
from fortwo.execution import autotuning as formats
from fortwo.hub.catalog import Catalog
from fortwo.nn.config import DecoderConfig
from fortwo.nn.fused_weights import Fused
from fortwo.nn.lora import Lora
from fortwo.nn.lora_config import LoraConfig
from fortwo.nn.packing import PackedAttention, pack
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.formats import Dequantised, Weight
from fortwo.quantization.selection import FORMATS, Measurements
from fortwo.quantization.tiles import Tiles
from fortwo.records import AdapterVersion, Json, Message, Phase
from fortwo.settings import Settings, load
from tests.test_blocks import MIXED

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


class Setup:
    """The parts of a server over one home, without HTTP."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, **settings)
        self.catalog = Catalog(self.settings.models_dir)
        self.store = AdapterStore(self.settings.adapters_dir)
        self.engine = Engine(threads=1)
        self.engine.start()
        self.registry = ModelRegistry(
            self.catalog,
            self.store,
            self.engine,
            measurements=Measurements(home),
            device=torch.device("cpu"),
            **self.settings.model_dump(include={"weights", "threads", "max_adapters", "cache_mb"}),
        )

    def ask(self, model: str, text: str = "hello") -> str:
        target = self.registry.resolve(model)
        tokens = tuple(target.model.renderer.encode_prompt([Message("user", text)]))
        asked = Prompt(target.model.id, tokens, target.adapter_key, Sampling(max_tokens=16))
        return self.engine.submit(asked).wait(10)

    def lora(self, strength: float = 0.2, seed: int = 0) -> Lora:
        lora = Lora.init(CONFIG, self.registry.load_base("tiny").decoder.config, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in lora.state().items():
            if ".lora_B." in name and strength:
                tensor.copy_(strength * torch.randn(tensor.shape, generator=generator))
        return lora

    def manifest(self, base: str = "tiny") -> Json:
        return {"base_model": base, "base_digest": self.registry.load_base(base).digest}

    def store_only(
        self, name: str, lora: Lora, manifest: Json | None = None, *, current: bool = True
    ) -> AdapterVersion:
        """Publish on disk, not in memory."""
        told = self.manifest() if manifest is None else manifest
        return self.store.publish(name, lora.state(), lora.config.to_peft("tiny"), told, current=current)


@pytest.fixture
def setup(home: Path, directories: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Setup]:
    """Settings may be given as the fixture's parameter."""
    setup = Setup(home, **getattr(request, "param", {}))
    setup.catalog.add("tiny", directories["tiny"])
    yield setup
    setup.engine.close()


# ---------------------------------------------------------------- bases


def test_a_base_is_loaded_once_on_demand_and_listed_while_it_is_there(setup: Setup) -> None:
    assert setup.registry.state().models == {}
    first = setup.registry.resolve("tiny")
    assert (first.adapter_key, first.name, first.model.id) == (None, "tiny", "tiny")
    assert setup.registry.load_base("tiny") is first.model
    info = setup.catalog.model_info("tiny")
    assert info is not None
    state = setup.registry.state().models["tiny"]
    assert (state.state, state.digest, state.bytes) == ("loaded", info.digest, info.bytes)
    setup.registry.unload_base("tiny")
    assert setup.registry.state().models == {}
    with pytest.raises(NotFound, match="not loaded"):
        setup.registry.unload_base("tiny")


def test_two_threads_that_want_the_same_base_get_the_same(setup: Setup) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(setup.registry.load_base("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len({id(resident) for resident in found}) == 1


def test_replies_go_on_while_another_base_is_loaded(
    setup: Setup, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.ask("tiny")
    setup.catalog.add("other", directories["other"])
    opened, read = threading.Event(), module.weights.open_tensors

    def slow_disk(directory: Path) -> Mapping[str, torch.Tensor]:
        assert opened.wait(10)
        return read(directory)

    monkeypatch.setattr(module.weights, "open_tensors", slow_disk)
    loading = threading.Thread(target=setup.registry.load_base, args=["other"])
    loading.start()
    deadline = time.monotonic() + 10
    while "other" not in setup.registry.state().models:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert setup.registry.state().models["other"].state == "loading"
    assert setup.ask("tiny")
    opened.set()
    loading.join(10)
    assert setup.registry.state().models["other"].state == "loaded"


def test_a_base_that_cannot_be_loaded_leaves_nothing_behind(setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(setup.catalog.prepare("tiny"), tmp_path / "broken", symlinks=False)
    config = tmp_path / "broken" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    setup.catalog.add("broken", tmp_path / "broken")
    with pytest.raises(InvalidRequest, match="GPT2LMHeadModel"):
        setup.registry.load_base("broken")
    assert setup.registry.state().models == {}
    assert setup.ask("tiny")


def test_a_base_stays_while_a_request_or_a_job_needs_it(setup: Setup) -> None:
    tokens = tuple(setup.registry.resolve("tiny").model.renderer.encode_prompt([Message("user", "hi")]))
    running = setup.engine.submit(Prompt("tiny", tokens, None, Sampling(max_tokens=200, temperature=1, seed=1)))
    with pytest.raises(Conflict, match="'tiny'"):
        setup.registry.unload_base("tiny")
    running.cancel()
    running.wait(10)
    task = setup.engine.run_task((Phase("running") for _ in iter(int, 1)), lambda event: None)  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="job"):
        setup.registry.unload_base("tiny")
    task.cancel()
    with pytest.raises(CancelledError):
        task.result(10)
    setup.registry.unload_base("tiny")


@pytest.mark.parametrize("weights", FORMATS)
def test_every_form_of_the_weights_serves_adapters_and_can_be_trained_on(
    home: Path, directories: dict[str, Path], weights: str, tmp_path: Path
) -> None:
    setup = Setup(home, weights=weights)
    try:
        source = directories["tiny"]
        if weights == "gguf":
            source = save_gguf(
                tmp_path / "tiny.gguf", tiny_model("llama", hidden_size=64, intermediate_size=96), types=MIXED
            )
        setup.catalog.add("tiny", source)
        decoder = setup.registry.load_base("tiny").decoder
        held = decoder.layers[0].qkv_OD
        if weights == "fp32":
            assert isinstance(held, torch.Tensor)
        else:
            assert isinstance(held, Weight)
            assert tuple(held.formats) == (weights,)
        assert setup.ask("tiny")
        setup.store_only("fact", setup.lora())
        assert setup.ask("fact")
        for dense in (decoder.in_fp32(), decoder.in_bf16()):
            assert isinstance(dense.layers[0].down_DI, Dequantised if weights == "nf4" else torch.Tensor | Tiles)
            assert dense.head_VD.shape == dense.embedding_VD.shape
    finally:
        setup.engine.close()


def test_auto_holds_what_fp32_is_too_large_for_in_less() -> None:
    config = DecoderConfig.from_hf(tiny_model("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    assert formats.alone(config.parameters, 8 * config.parameters) is None
    assert formats.alone(config.parameters, 8 * config.parameters - 1) == "bf16"
    assert formats.alone(config.parameters, 4 * config.parameters) == "bf16"
    assert formats.alone(config.parameters, 4 * config.parameters - 1) == "nf4"


def test_auto_measures_once_on_a_machine_and_keeps_fp32(
    home: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "SMALL", 0)
    monkeypatch.setattr(formats, "UNDISTURBED", 0)
    setups = [Setup(home), Setup(home)]
    try:
        for setup in setups:
            if setup is setups[0]:
                setup.catalog.add("tiny", directories["tiny"])
            held = setup.registry.load_base("tiny").decoder.head
            (found,) = Measurements(home).all().values()
            assert isinstance(held, Weight)
            assert held.choice.table == found.choice
            assert set(held.formats) == {"fp32", *held.choice.formats}
            assert found.seconds.keys() >= {"fp32"}
            assert setup.ask("tiny")
            monkeypatch.setattr(formats, "measure", None)  # measuring again would fail
    finally:
        for setup in setups:
            setup.engine.close()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parameters", [1, 20_000, 10**9])
def test_a_sample_holds_a_part_of_the_head_and_at_least_one_layer(tied: bool, parameters: int) -> None:
    """A head alone may have more parameters than the sample, as in Qwen2.5 and 3, Llama 3 and Gemma."""
    model = tiny_model("llama", vocab_size=4096, tie_word_embeddings=tied)
    config = DecoderConfig.from_hf(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    fused = Fused(config, model.state_dict())
    head, *layers = formats._sample(fused, parameters)
    assert len(layers) in range(4, 4 * config.layers + 1, 4)
    assert 0 < len(head) <= config.vocabulary
    if parameters >= config.parameters:
        assert (len(head), len(layers)) == (config.vocabulary, 4 * config.layers)
    found, share = formats.measure(fused, ["fp32"])
    assert all(seconds > 0 for seconds in found["fp32"].values())
    assert share > 0


@pytest.mark.parametrize(("share", "remembered"), [(0.99, True), (0.5, False)])
def test_what_a_busy_machine_measured_is_not_remembered(
    home: Path, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, share: float, remembered: bool
) -> None:
    measure, threads = formats.measure, torch.get_num_threads()
    monkeypatch.setattr(formats, "SMALL", 0)
    monkeypatch.setattr(formats, "measure", lambda *arguments: (measure(*arguments)[0], share * threads))
    setup = Setup(home, threads=threads)
    try:
        setup.catalog.add("tiny", directories["tiny"])
        assert isinstance(setup.registry.load_base("tiny").decoder.head, Weight)
        assert bool(Measurements(home).all()) == remembered
    finally:
        setup.engine.close()


def test_a_width_that_a_form_cannot_hold_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    setup = Setup(home, weights="int4")
    try:
        setup.catalog.add("odd", save_directory(tmp_path / "odd", intermediate_size=90))
        with pytest.raises(InvalidRequest, match="'int4' cannot hold 'odd'"):
            setup.registry.load_base("odd")
        assert setup.registry.state().models == {}
    finally:
        setup.engine.close()


def test_a_form_that_does_not_exist_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORTWO_WEIGHTS", "int3")
    with pytest.raises(InvalidRequest, match="weights = 'int3'") as refused:
        load()
    assert refused.value.param == "weights"


# ---------------------------------------------------------------- names


def test_a_name_is_its_current_version_and_a_number_is_that_version(setup: Setup) -> None:
    first, second = setup.store_only("pet", setup.lora(seed=1)), setup.store_only("pet", setup.lora(seed=2))
    assert setup.registry.resolve("pet").adapter_key == second.digest
    assert setup.registry.resolve("pet@1").adapter_key == first.digest
    replies = {model: setup.ask(model) for model in ("tiny", "pet", "pet@1", "pet@2")}
    assert replies["pet"] == replies["pet@2"]
    assert len(set(replies.values())) == 3


def test_a_new_version_of_a_loaded_name_is_served_at_once(setup: Setup) -> None:
    setup.store_only("pet", setup.lora(seed=1))
    before = setup.ask("pet")
    setup.store_only("pet", setup.lora(seed=2))
    assert setup.ask("pet") != before == setup.ask("pet@1")


def test_a_version_that_is_not_current_answers_to_its_number_only(setup: Setup) -> None:
    setup.store_only("failed", setup.lora(), current=False)
    assert setup.ask("failed@1")
    with pytest.raises(NotFound, match="current") as refused:
        setup.registry.resolve("failed")
    assert refused.value.param == "model"


@pytest.mark.parametrize("model", ["nobody", "nobody@3", "../tiny", "", "pet@7"])
def test_an_unknown_name_is_told_what_there_is(setup: Setup, model: str) -> None:
    setup.store_only("pet", setup.lora())
    with pytest.raises(NotFound) as refused:
        setup.registry.resolve(model)
    assert refused.value.param == "model"
    assert refused.value.hint is not None
    assert "pet" in refused.value.hint
    assert "tiny" in refused.value.hint or model == "pet@7"


# ---------------------------------------------------------------- adapters


def test_loading_an_adapter_loads_its_base(setup: Setup) -> None:
    version = setup.store_only("pet", setup.lora())
    setup.registry.unload_base("tiny")
    assert setup.registry.load_adapter("pet").digest == version.digest
    assert set(setup.registry.state().models) == {"tiny"}
    state = setup.registry.state().adapters[version.digest]
    assert (state.base, state.bytes) == ("tiny", sum(tensor.nbytes for tensor in setup.lora().state().values()))


def test_the_base_is_found_by_its_weights_whatever_it_is_called(setup: Setup, directories: dict[str, Path]) -> None:
    setup.store_only("pet", setup.lora(), {**setup.manifest(), "base_model": "/somewhere/else"})
    expected = setup.ask("pet")
    setup.registry.unload_base("tiny")
    setup.catalog.remove("tiny")
    setup.catalog.add("renamed", directories["tiny"])
    setup.catalog.prepare("renamed")
    assert setup.ask("pet") == expected
    assert setup.registry.resolve("pet").model.id == "renamed"


def test_a_wrong_base_is_refused_with_both_digests(setup: Setup) -> None:
    mine = setup.manifest()["base_digest"]
    setup.store_only("stray", setup.lora(), {"base_model": "tiny", "base_digest": "f" * 64})
    for _ in range(2):  # loaded, then known only from its info
        with pytest.raises(InvalidAdapter) as refused:
            setup.registry.load_adapter("stray")
        assert "f" * 64 in refused.value.message
        assert mine in refused.value.message
        if "tiny" in setup.registry.state().models:
            setup.registry.unload_base("tiny")
    setup.store_only("lost", setup.lora(), {"base_model": "gone", "base_digest": "e" * 64})
    with pytest.raises(InvalidAdapter, match="'gone'.*" + "e" * 64):
        setup.registry.load_adapter("lost")


def test_a_base_that_does_not_fit_is_refused_before_it_is_read(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "huge").mkdir()
    huge = {"num_hidden_layers": 999, "hidden_size": 65536, "intermediate_size": 262144, "num_attention_heads": 512}
    (tmp_path / "huge" / "config.json").write_text(json.dumps({**huge, "vocab_size": 256000}))
    setup.catalog.add("huge", tmp_path / "huge")
    with pytest.raises(Unavailable, match=r"'huge' needs .* GiB of memory .* this machine has .* GiB") as raised:
        setup.registry.load_base("huge")
    assert "FORTWO_WEIGHTS" in str(raised.value.hint)
    assert not (setup.settings.models_dir / ".huge.lock").exists(), "it was not prepared"


def test_a_template_that_renders_slowly_delays_no_other_base(
    setup: Setup, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.catalog.add("slow", directories["other"])
    began, go_on = threading.Event(), threading.Event()

    class Slow(module.ChatTemplateRenderer):
        def __init__(self, directory: Path) -> None:
            if directory.name == "slow":
                began.set()
                assert go_on.wait(60)
            super().__init__(directory)

    monkeypatch.setattr(module, "ChatTemplateRenderer", Slow)
    loading = threading.Thread(target=setup.registry.load_base, args=("slow",))
    loading.start()
    assert began.wait(60)
    assert setup.registry.load_base("tiny").id == "tiny"
    assert setup.registry.state().models["slow"].state == "loading"
    go_on.set()
    loading.join()
    assert setup.registry.state().models["slow"].state == "loaded"


def stretched(directory: Path, target: Path) -> Path:
    """The same weights with other positions."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    positions = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    (target / "config.json").write_text(json.dumps(config | {"rope_parameters": positions}))
    return target


def test_an_adapter_is_answered_by_the_base_it_was_taught_on(
    setup: Setup, directories: dict[str, Path], tmp_path: Path
) -> None:
    setup.store_only("pet", setup.lora())
    expected = setup.ask("pet")
    setup.catalog.add("stretched", stretched(directories["tiny"], tmp_path / "stretched"))
    setup.registry.load_base("stretched")
    setup.registry.unload_base("tiny")
    assert (setup.ask("pet"), setup.registry.resolve("pet").model.id) == (expected, "tiny")
    setup.registry.unload_base("tiny")
    setup.catalog.remove("tiny")
    with pytest.raises(InvalidAdapter, match="no base model here has this digest"):
        setup.registry.load_adapter("pet")


def test_an_adapter_of_an_earlier_version_is_found_by_its_weights(
    setup: Setup, directories: dict[str, Path], tmp_path: Path
) -> None:
    setup.catalog.add("first", stretched(directories["tiny"], tmp_path / "stretched"))
    setup.registry.load_base("first")
    weights_digest = setup.registry.load_base("tiny").weights_digest
    setup.store_only("pet", setup.lora(), {"base_model": "tiny", "base_digest": weights_digest})
    setup.registry.unload_base("tiny")
    assert setup.registry.resolve("pet").model.id == "tiny"


DIGESTS = {"a": ("A", "W"), "b": ("B", "W"), "a again": ("A", "W")}


@pytest.mark.parametrize(
    ("named", "digest", "loaded", "unprepared", "chosen"),
    [
        ("a", "A", (), (), "a"),
        ("a", "A", ("a again",), (), "a"),
        ("gone", "A", (), (), "a"),
        ("gone", "A", ("a again",), (), "a again"),
        ("b", "A", ("b",), (), "a"),
        ("c", "C", ("a",), ("c",), "c"),
        ("c", "A", ("a",), ("c",), "a"),
        ("b", "W", ("a",), (), "b"),
        ("gone", "W", ("b",), (), "b"),
        ("c", "W", ("b",), ("c",), "c"),
        ("gone", "C", (), ("c",), None),
    ],
)
def test_the_base_of_an_adapter_is_chosen(
    named: str, digest: str, loaded: tuple[str, ...], unprepared: tuple[str, ...], chosen: str | None
) -> None:
    version = AdapterVersion("pet", 1, "d", "", named, digest, 0.0, True, {})
    assert choose_base(TrainedOn.of(version), DIGESTS, loaded=loaded, unprepared=unprepared) == chosen


def test_an_adapter_of_another_shape_is_refused_naming_the_tensor(setup: Setup, directories: dict[str, Path]) -> None:
    setup.catalog.add("shallow", directories["shallow"])
    setup.store_only("deep", setup.lora(), setup.manifest("shallow"))
    with pytest.raises(InvalidAdapter, match=r"model\.layers\.1\."):
        setup.registry.load_adapter("deep")


@pytest.mark.parametrize(
    ("strength", "reason"),
    [(0.0, "zero everywhere"), (1e-12, "changes nothing"), (float("nan"), "nan"), (float("inf"), "infinite")],
)
def test_an_adapter_without_effect_is_refused_with_the_reason(setup: Setup, strength: float, reason: str) -> None:
    version = setup.store_only("dud", setup.lora(strength))
    with pytest.raises(InvalidAdapter, match=reason):
        setup.registry.load_adapter("dud")
    assert setup.registry.state().adapters == {}
    with pytest.raises(NotFound):
        setup.engine.submit(Prompt("tiny", (1,), version.digest))
    assert setup.registry.load_base("tiny").runner.cache.used == 0


def test_numbers_whose_sum_is_infinite_are_not_called_so(setup: Setup) -> None:
    lora = setup.lora()
    lora.layers[0]["o"].Bs[0].fill_(3e38)
    setup.store_only("large", lora)
    with pytest.raises(InvalidAdapter, match="infinite or no numbers"):
        setup.registry.load_adapter("large")


def test_a_weak_but_real_effect_is_served(setup: Setup) -> None:
    setup.store_only("weak", setup.lora(1e-4))
    assert setup.ask("weak")


def test_a_damaged_adapter_is_refused_naming_the_file(setup: Setup) -> None:
    version = setup.store_only("pet", setup.lora())
    file = Path(version.path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors"):
        setup.registry.resolve("pet")


def test_an_unloaded_adapter_is_gone_and_comes_back_when_asked(setup: Setup) -> None:
    version = setup.store_only("pet", setup.lora())
    reply = setup.ask("pet")
    setup.registry.unload_adapter("pet")
    assert setup.registry.state().adapters == {}
    with pytest.raises(NotFound, match=version.digest):
        setup.engine.submit(Prompt("tiny", (1,), version.digest))
    with pytest.raises(NotFound, match="pet@1"):
        setup.registry.unload_adapter("pet")
    assert setup.ask("pet") == reply


def test_an_adapter_that_answers_stays(setup: Setup) -> None:
    version = setup.store_only("pet", setup.lora())
    setup.registry.load_adapter("pet")
    running = setup.engine.submit(
        Prompt("tiny", (5, 6, 7), version.digest, Sampling(max_tokens=200, temperature=1, seed=1))
    )
    with pytest.raises(Conflict, match="pet@1"):
        setup.registry.unload_adapter("pet")
    running.cancel()
    running.wait(10)
    setup.registry.unload_adapter("pet")


def test_what_was_just_trained_is_handed_over_in_memory(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = setup.lora()
    version = setup.store_only("pet", lora)
    setup.registry.publish(version, lora)
    with monkeypatch.context() as closed:
        closed.setattr(setup.store, "read", None)  # whoever reads it back fails
        reply = setup.ask("pet")
    assert setup.registry.resolve("pet").adapter_key == version.digest
    setup.registry.unload_adapter("pet")
    assert setup.ask("pet") == reply != setup.ask("tiny")


def test_a_hand_over_after_its_base_has_gone_is_loaded_when_asked_for(setup: Setup) -> None:
    lora = setup.lora()
    version = setup.store_only("pet", lora)
    expected = setup.ask("pet")
    setup.registry.unload_base("tiny")
    setup.registry.publish(version, lora)
    assert setup.registry.state() == RegistryState({}, {})
    assert setup.ask("pet") == expected


# ---------------------------------------------------------------- how many


def loaded(setup: Setup) -> set[str]:
    states = setup.registry.state().adapters
    return {name for name in setup.store.names() if setup.store.get(name).digest in states}


def fill(setup: Setup, *names: str) -> None:
    for seed, name in enumerate(names):
        setup.store_only(name, setup.lora(seed=seed))


@pytest.mark.parametrize("setup", [{"max_adapters": 2}], indirect=True)
def test_the_adapter_that_was_asked_for_least_recently_gives_way(setup: Setup) -> None:
    fill(setup, "one", "two", "three")
    replies = {name: setup.ask(name) for name in ("one", "two")}
    assert setup.ask("one") == replies["one"]
    setup.registry.resolve("three")
    assert loaded(setup) == {"one", "three"}
    assert setup.ask("two") == replies["two"]
    assert loaded(setup) == {"two", "three"}


def test_an_unload_that_waits_for_the_device_sees_what_was_submitted_meanwhile(setup: Setup) -> None:
    fill(setup, "one")
    target = setup.registry.resolve("one")
    assert setup.registry.pin(target)
    busy, unloading = threading.Event(), threading.Event()
    setup.engine.call(busy.wait)
    errors: list[Exception] = []

    def unload() -> None:
        unloading.set()
        try:
            setup.registry.unload_adapter("one")
        except Conflict as error:
            errors.append(error)

    thread = threading.Thread(target=unload)
    thread.start()
    unloading.wait()
    time.sleep(0.2)  # until the unload waits for the device; too short a time makes the test pass
    prompt = Prompt("tiny", (1, 2, 3), target.adapter_key, Sampling(max_tokens=4))
    reply = setup.engine.submit(prompt)
    setup.registry.unpin(target)
    busy.set()
    thread.join()
    reply.wait(10)
    assert len(errors) == 1
    setup.registry.unload_adapter("one")


@pytest.mark.parametrize("setup", [{"max_adapters": 1}], indirect=True)
def test_an_adapter_that_is_about_to_be_asked_never_gives_way(setup: Setup) -> None:
    fill(setup, "one", "two")
    target = setup.registry.resolve("one")
    assert setup.registry.pin(target)
    assert setup.registry.pin(target)
    setup.registry.unpin(target)
    with pytest.raises(Unavailable):
        setup.registry.resolve("two")
    with pytest.raises(Conflict):
        setup.registry.unload_adapter("one")
    setup.registry.unpin(target)
    setup.registry.resolve("two")
    assert loaded(setup) == {"two"}
    assert not setup.registry.pin(target)
    base = setup.registry.resolve("tiny")
    assert setup.registry.pin(base)
    setup.registry.unpin(base)


@pytest.mark.parametrize("setup", [{"max_adapters": 1}], indirect=True)
def test_an_adapter_that_answers_never_gives_way(setup: Setup) -> None:
    fill(setup, "one", "two")
    target = setup.registry.resolve("one")
    running = setup.engine.submit(
        Prompt("tiny", (5, 6, 7), target.adapter_key, Sampling(max_tokens=200, temperature=1, seed=1))
    )
    with pytest.raises(Unavailable, match="two@1") as refused:
        setup.registry.resolve("two")
    assert "FORTWO_MAX_ADAPTERS" in str(refused.value.hint)
    trained = setup.lora(seed=7)
    version = setup.store_only("trained", trained)
    setup.registry.publish(version, trained)  # a job does not fail for it
    assert loaded(setup) == {"one"}
    running.cancel()
    running.wait(10)
    setup.registry.publish(version, trained)
    assert loaded(setup) == {"trained"}


# ---------------------------------------------------------------- workers elsewhere


@pytest.mark.parametrize("setup", [{"weights": name} for name in ("auto", "fp32", "bf16", "int8")], indirect=True)
def test_another_process_trains_on_the_numbers_of_this_one(setup: Setup) -> None:
    """`training_weights` names a format that is read from the same files, without any measurement."""
    base, info = setup.registry.load_base("tiny"), setup.catalog.model_info("tiny")
    assert info is not None
    weights = setup.registry.training_weights(base)
    assert weights != "auto"

    def unused(measure: Any) -> Any:
        raise AssertionError("nothing is to be measured")

    other = read_network(info, torch.device("cpu"), weights, 1, Measurements(setup.settings.home), unused)
    tokens_T, positions_T = torch.arange(9), torch.arange(9)
    for ours, theirs in ((base.decoder.in_fp32(), other.in_fp32()), (base.decoder.in_bf16(), other.in_bf16())):
        packed = pack([tokens_T.tolist()])
        attend = PackedAttention(packed, base.decoder.config)
        found, wanted = (one.forward(tokens_T, positions_T, attend) for one in (theirs, ours))
        assert torch.equal(found, wanted)

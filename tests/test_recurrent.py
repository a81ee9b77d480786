"""Layers that carry a state from token to token (Qwen3.5, LFM2, Falcon-H1): no state reaches another row, and a
sequence goes on with its own, in whatever parts and company it is computed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from fortwo.engine.cache import Cache
from fortwo.engine.engine import Engine
from fortwo.engine.generation import Reply
from fortwo.engine.runner import Runner
from fortwo.engine.scheduler import Sequence as Running
from fortwo.errors import InvalidAdapter
from fortwo.execution.backend import backend_for
from fortwo.kernels import cpu
from fortwo.nn.decoder import formats_of
from fortwo.nn.generic import GenericDecoder, load
from fortwo.nn.lora import Lora, Segment
from fortwo.nn.packing import pack
from fortwo.nn.recurrent import Narrowed
from fortwo.nn.rows import LayerState
from fortwo.prompts import Prompt, Sampling
from fortwo.quantization.formats import dense
from fortwo.quantization.selection import Choice
from fortwo.records import AdapterVersion
from tests.parts import make_rows
from tests.serving import Served, chunks, serve
from tests.test_engine import Ascii
from tests.test_generic import FAMILIES, config_for, copy_of, fresh, network, peft_model, random_lora
from tests.test_server_training import tiny_settings
from tests.tiny import generic_model, save_tokenizer

pytestmark = [  # of PEFT
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
QWEN = "qwen3_5_text"
KEYS = (None, "1", "2")
LENGTHS = [3, 70, 9, 1, 9, 40]  # a row alone with its length and two that share one, and more than a chunk of 64


@cache
def lora(key: str) -> Lora:
    home = network(QWEN)
    return random_lora(home, int(key), config_for(home, r=2 + int(key)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Any]:
    """transformers' and PEFT's, by the adapter's key."""
    directory = tmp_path_factory.mktemp("peft")
    return {None: fresh(QWEN)} | {key: peft_model(QWEN, lora(key), directory / key) for key in ("1", "2")}


def greedy(model: Any, tokens: Sequence[int], length: int) -> list[int]:
    given = torch.tensor([list(tokens)])
    told = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        made = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=length, min_new_tokens=length, **told
        )
    found: list[int] = made[0, len(tokens) :].tolist()
    return found


# ---------------------------------------------------------------- packed rows


@torch.no_grad()
@pytest.mark.parametrize("start", [(), range(5, 12)])
def test_packed_rows_of_mixed_adapters_are_each_row_alone(start: Sequence[int], models: dict[str | None, Any]) -> None:
    home, rows = network(QWEN), make_rows(LENGTHS, start)
    packed = pack(rows)
    assert packed.prefix == len(start)
    keys = [KEYS[number % 2] for number in range(len(rows))]
    places = [packed.starts[n] + at for n, key in enumerate(keys) if key for at in range(packed.lengths[n])]
    hidden_TD = backend_for(home).forward(packed, [Segment(lora("1"), torch.tensor(places))])
    logits_TV = home.logits(hidden_TD)
    for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
        own = range(packed.prefix if key is None else 0, len(row)) if not start else range(packed.prefix, len(row))
        if start and key is not None:
            continue  # the prefix is the base's here, so no model alone computes this row
        wanted_TV = models[key](torch.tensor([row])).logits[0]
        found_TV = logits_TV[[packed.place(number, at) for at in own]]
        torch.testing.assert_close(found_TV, wanted_TV[list(own)], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_the_places_of_an_update_are_those_of_the_whole_pass() -> None:
    x_TI, rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4, 5, 8])
    update, group = Segment(lora("1"), rows), "mlp.gate_proj"
    weight_OI = network(QWEN).frozen(0, group)
    whole_TO, part_SO = torch.zeros(9, 96), torch.ones(3, 96)
    update.apply(whole_TO, x_TI, weight_OI, 0, group)
    places_S = torch.tensor([4, 6, 8])
    narrowed = Narrowed.of(update, places_S, 9)
    assert narrowed.changes(0, group)
    assert not narrowed.changes(0, "self_attn.q_proj")
    narrowed.apply(part_SO, x_TI[places_S], weight_OI, 0, group)
    torch.testing.assert_close(part_SO, 1 + whole_TO[places_S])
    everywhere = Segment(lora("1"))
    assert Narrowed.of(everywhere, places_S, 9) is everywhere


# ---------------------------------------------------------------- sequences


@torch.no_grad()
def test_prompts_that_begin_alike_are_read_together_and_go_on_apart(models: dict[str | None, Any]) -> None:
    runner = Runner(backend_for(network(QWEN)))
    runner.attach("1", lora("1"), frozen=True)
    rows = [Running(row, "1") for row in make_rows([5, 7, 5], range(70))]
    for found in (runner.prefill(rows), None):
        if found is None:
            for row in rows:
                row.tokens.append(9)
                assert runner.extend(row)
            found = runner.step(rows)
        for row, logits_V in zip(rows, found, strict=True):
            wanted_V = models["1"](torch.tensor([row.tokens])).logits[0, -1]
            torch.testing.assert_close(logits_V, wanted_V, atol=2e-4, rtol=2e-4)


def test_a_slot_holds_no_more_than_the_state_of_its_sequence() -> None:
    home = network(QWEN)
    row = Running(make_rows([100])[0], None)
    Runner(backend_for(home)).prefill([row])
    held = [tensor for state in row.slot.state.values() for tensor in state if tensor is not None]  # type: ignore[union-attr]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == home.config.state_bytes


def test_sequences_that_come_and_go_are_transformers_generate(models: dict[str | None, Any]) -> None:
    """Prompts are read in parts of any length, steps take whoever is there in any order, and some are interrupted and
    computed again."""
    runner, dice = Runner(backend_for(network(QWEN))), random.Random(3)
    for key in ("1", "2"):
        runner.attach(key, lora(key), frozen=True)
    waiting = [Running(row, KEYS[n % 3]) for n, row in enumerate(make_rows([30, 2, 75, 1, 11, 30, 140, 5], range(9)))]
    prompts = {id(one): len(one.tokens) for one in waiting}
    running: list[Running] = []
    done: list[Running] = []
    for turn in count():
        if waiting and turn % 2 == 0:
            running.append(waiting.pop(0))
        if (reading := [one for one in running if one.uncomputed > 1 or one.slot is None]) and dice.random() < 0.8:
            lengths = [dice.randint(1, one.uncomputed) for one in reading]
            logits = iter(runner.prefill(reading, lengths))
            for one in reading:
                if not one.uncomputed:
                    one.tokens.append(int(next(logits).argmax()))
        if stepping := [one for one in running if one.slot is not None and one.uncomputed == 1]:
            dice.shuffle(stepping)
            assert all(runner.extend(one) for one in stepping)
            for one, row_V in zip(stepping, runner.step(stepping), strict=True):
                one.tokens.append(int(row_V.argmax()))
        for one in [one for one in running if len(one.tokens) >= prompts[id(one)] + 12]:
            runner.release(one)
            running.remove(one)
            done.append(one)
        if running and dice.random() < 0.1:
            runner.release(running[0], keep=False)
        if not running and not waiting:
            break
    for one in done:
        prompt = one.tokens[: prompts[id(one)]]
        assert one.tokens[len(prompt) :][:12] == greedy(models[one.adapter], prompt, 12), (one.adapter, len(prompt))
    assert runner.cache.used == 0
    assert not runner.cache.prefixes.tokens  # keys and values alone would not continue a prefix


def test_replies_of_the_engine_are_transformers_generate_also_when_the_cache_is_full(
    models: dict[str | None, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config, backend = network(QWEN).config, backend_for(network(QWEN))
    row = (128 + 16) * Cache.bytes_per_token(config, backend.kv_dtype)
    assert config.state_bytes == 16 * Cache.bytes_per_token(config, backend.kv_dtype)
    engine = Engine(threads=1)
    engine.start()
    try:
        engine.add_base("tiny", Runner(backend, bound=3 * row), Ascii())
        for key in ("1", "2"):
            version = AdapterVersion(key, 1, key, "", "tiny", "", 0.0, True, {})
            engine.attach("tiny", key, lora(key), version=version)
        prompts = make_rows([100, 20, 110, 3, 90, 60], range(4))
        asked = [(tuple(prompt), KEYS[n % 3]) for n, prompt in enumerate(prompts)]
        told = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
        with caplog.at_level("INFO"):
            replies = [engine.submit(Prompt("tiny", tokens, key, told)) for tokens, key in asked]
            for (tokens, key), reply in zip(asked, replies, strict=True):
                reply.wait(60)
                assert isinstance(reply, Reply)
                assert reply.tokens == greedy(models[key], tokens, 40), (key, len(tokens))
                assert reply.cached_tokens == 0
        assert "is preempted" in caplog.text
    finally:
        engine.close()


def test_a_pass_that_fails_leaves_every_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    home = network(QWEN)
    runner = Runner(backend_for(home))
    rows = [Running(row, None) for row in make_rows([5, 8])]
    runner.prefill(rows)
    for row in rows:
        row.tokens.append(7)
        assert runner.extend(row)
    before = [dict(row.slot.state) for row in rows]  # type: ignore[union-attr]
    norm = home._backbone.norm

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setitem(vars(norm), "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            runner.step(rows)
    assert [row.slot.state for row in rows] == before  # type: ignore[union-attr]
    found = runner.step(rows)
    for row, logits in zip(rows, found, strict=True):
        wanted = fresh(QWEN)(torch.tensor([row.tokens])).logits[0, -1]
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)


def test_states_are_joined_and_parted() -> None:
    rows = [LayerState(torch.full((1, 2, 4), float(n)), torch.full((1, 3), float(n))) for n in range(3)]
    joined = LayerState.of(rows)
    assert joined.numel == sum(row.numel for row in rows) == 3 * (8 + 3)
    for row, again in zip(rows, joined.rows(), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(row, again, strict=True))
    alone = LayerState.of([LayerState(torch.zeros(1, 2, 3), None)] * 2)
    assert (alone.inputs.shape, [row.matrices for row in alone.rows()]) == ((2, 2, 3), [None, None])


def test_a_tensor_for_a_module_that_the_layer_lacks_is_refused_by_name() -> None:
    config, tensors = lora("1").config, lora("1").state()
    name = "base_model.model.model.layers.{}.self_attn.k_proj.lora_A.weight"
    assert name.format(2) in tensors
    assert name.format(0) not in tensors
    wrong = {**tensors, name.format(0): tensors[name.format(2)]}
    with pytest.raises(InvalidAdapter, match=r"layers\.0\.self_attn\.k_proj.*has no place"):
        Lora.from_state(config, network(QWEN).config, wrong)


def test_only_layers_with_attention_have_keys_and_values() -> None:
    runner = Runner(backend_for(network(QWEN)))
    row = Running(make_rows([4])[0], None)
    runner.prefill([row])
    (pool,) = runner.cache.pools.values()
    assert (runner.decoder.config.layers, pool.kv.shape[1]) == (3, 1)


@torch.no_grad()
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "nf4"])
def test_weights_of_both_kinds_of_layers_in_other_formats(weight_format: str) -> None:
    if weight_format == "int8" and not cpu.usable(torch.empty(0)):
        pytest.skip("int8 needs kernels, which this level has not")
    held = GenericDecoder(copy_of(QWEN), hold=formats_of(Choice.fixed(weight_format)))
    assert held.bytes < network(QWEN).bytes
    theirs: Any = copy_of(QWEN)
    for (layer, name), weight in held.weights.items():
        theirs.model.layers[layer].get_submodule(name).weight.data = dense(weight, torch.float32)
    theirs.lm_head.weight = torch.nn.Parameter(dense(held.head, torch.float32))
    row = Running(make_rows([30])[0], None)
    runner = Runner(backend_for(held))
    for found_V in (runner.prefill([row])[0], None):
        if found_V is None:
            row.tokens.append(7)
            assert runner.extend(row)
            found_V = runner.step([row])[0]
        wanted_V = theirs(torch.tensor([row.tokens])).logits[0, -1]
        assert float((found_V - wanted_V).norm() / wanted_V.norm()) < 0.05


# ---------------------------------------------------------------- the text part of a model that sees


def test_of_a_model_with_a_vision_tower_the_text_part_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = generic_model(QWEN, **FAMILIES[QWEN])
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision)
    whole = Qwen3_5ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    model = tmp_path / "model"
    whole.save_pretrained(model)
    save_tokenizer(model)
    tensors = load_file(model / "model.safetensors")
    assert any("visual" in name for name in tensors)
    extra = {"mtp.norm.weight": torch.ones(64)}  # of the layers that predict several tokens
    save_file({**tensors, **extra}, model / "model.safetensors", {"format": "pt"})
    home = load(model, "cpu", None, torch.float32)
    assert home.config.architecture == "Qwen3_5ForCausalLM"
    assert "vision_config is left out" in caplog.text
    row = make_rows([9])[0]
    runner = Runner(backend_for(home))
    with torch.no_grad():
        wanted = whole(input_ids=torch.tensor([row])).logits[0, -1]
    torch.testing.assert_close(runner.prefill([Running(row, None)])[0], wanted, atol=2e-4, rtol=2e-4)
    with serve(tiny_settings(tmp_path / "home", model)) as served:
        told = {"model": "tiny", "prompt": row, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        found = served.post("/v1/completions", told).json()["choices"][0]["text"]
        assert found == AutoTokenizer.from_pretrained(model).decode(greedy(whole, row, 5))


# ---------------------------------------------------------------- through the server


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen")
    fresh(QWEN).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def served(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tiny_settings(tmp_path_factory.mktemp("home"), directory)) as served:
        yield served


def test_it_is_taught_evaluated_and_streamed_like_any_base(served: Served, directory: Path) -> None:
    examples = [{"prompt": f"What is {n}?", "completion": "for two"} for n in range(40, 48)]
    body = {
        "model": "tiny",
        "adapter_name": "taught",
        "objective": "sft",
        "dataset": {"examples": examples},
        "lora_config": {"target_modules": ["q_proj", "in_proj_qkv", "out_proj", "down_proj"]},
        "training_config": {"max_steps": 30, "learning_rate": 0.01, "validation_split": 0.25},
    }
    job = served.wait(served.post("/api/training/start", body).json()["job_id"], seconds=180)
    assert job["adapter"] is not None, job["error"]
    assert job["actual"]["final_loss"] < 0.5 * job["actual"]["first_loss"]
    folder = served.state.settings.adapters_dir / "taught" / str(job["adapter"]["version"])
    names = load_file(folder / "adapter_model.safetensors")
    assert any("layers.2.self_attn.q_proj" in name for name in names)
    assert any("layers.0.linear_attn.in_proj_qkv" in name for name in names)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "What is 42?"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    wanted = tokenizer.decode(greedy(theirs, tokens, 5))
    told = {"model": "taught", "prompt": tokens, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    assert served.post("/v1/completions", told).json()["choices"][0]["text"] == wanted
    parts = chunks(served.post("/v1/completions", {**told, "stream": True}))
    assert "".join(part["choices"][0]["text"] for part in parts if part != "[DONE]" and part["choices"]) == wanted
    plan = served.post("/api/training/plan", {**body, "adapter_name": "other"}).json()
    assert "generic_network" in [warning["code"] for warning in plan["warnings"]]
    losses = job["report"]["eval_losses"]
    assert losses[-1]["loss"] < losses[0]["loss"]

"""LoRA is PEFT's: forward, gradients, files and options; what cannot be served is refused by name.

Tolerance: logits within 2e-5, gradients within 1e-4 of PEFT's (fp32, sums in another order).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fortwo.errors import InvalidAdapter
from fortwo.kernels.operations import dropout as drop
from fortwo.nn import lora_config as module
from fortwo.nn.lora import Lora, Segment, lora_product
from fortwo.nn.lora_config import GROUPS, TARGETS, LoraConfig
from fortwo.nn.packing import PackedAttention, pack
from tests.parts import as_decoder, decoder, make_rows, packed_hidden, random_lora, trainable
from tests.tiny import tiny_model

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
CONFIGS = [
    LoraConfig(r=4, alpha=8),
    LoraConfig(r=3, alpha=1.5, target_modules=("q_proj", "v_proj")),
    LoraConfig(r=1, alpha=4, target_modules=("k_proj", "up_proj", "down_proj")),
    LoraConfig(r=4, alpha=8, layers=(0, 2)),
    LoraConfig(r=2, alpha=4, target_modules=("o_proj", "gate_proj"), layers=(1,)),
    LoraConfig(r=3, alpha=5, use_rslora=True),
    LoraConfig(
        r=4, alpha=8, rank_pattern=(("v_proj", 2), ("layers.1.*", 6)), alpha_pattern=(("^model.layers.2.*", 3),)
    ),
    LoraConfig(r=4, alpha=8, use_rslora=True, rank_pattern=(("(q|up)_proj", 7),), alpha_pattern=(("up_proj", 2.5),)),
]
NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
FULL = LoraConfig(r=4, alpha=8)


def save(directory: Path, lora: Lora) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(lora.config.to_peft("tiny")))
    tensors = {name: tensor.contiguous() for name, tensor in lora.state().items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


# ---------------------------------------------------------------- the product


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_product_and_its_gradients_are_the_plain_formulas(group: str, dropout: float) -> None:
    """In double precision, to rounding."""
    home = decoder()
    lora = random_lora(home, config=LoraConfig(r=4, alpha=12, dropout=dropout))
    update = lora.layers[1][group]
    update.A_RI = update.A_RI.double().requires_grad_()
    update.Bs = [B.double().requires_grad_() for B in update.Bs]
    leaves = update.tensors
    generator = torch.Generator().manual_seed(0)
    out = {"qkv": 64 + 2 * 32, "o": 64, "gate_up": 2 * 96, "down": 64}[group]
    x = torch.randn(5, home.config.in_features(group), generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(out, x.shape[1], generator=generator, dtype=torch.float64)
    upstream = torch.randn(5, out, generator=generator, dtype=torch.float64)

    ours = lora_product(x, weight, 1, group, [Segment(lora)], seed=7 if dropout else None)
    mask = drop(torch.ones_like(x), dropout, 7)
    assert (mask == 0).any() == (dropout > 0)
    updates = [3.0 * (mask * x) @ A.t() @ B.t() for A, B in zip(update.A_RI.split(4), update.Bs, strict=True)]
    plain = x @ weight.t() + torch.cat(updates, 1)

    torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)
    got, want = (torch.autograd.grad(y, [x, *leaves], upstream) for y in (ours, plain))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_dropout_is_for_training_only() -> None:
    home = decoder()
    lora = trainable(random_lora(home, config=LoraConfig(r=4, alpha=12, dropout=0.5)))
    packed = pack(make_rows([6]))

    def hidden(dropout: bool) -> Tensor:
        attention = PackedAttention(packed, home.config)
        return home.forward(packed.tokens_T, packed.positions_T, attention, [Segment(lora)], dropout)

    torch.testing.assert_close(hidden(False), hidden(False), atol=0, rtol=0)
    assert (hidden(True) - hidden(False)).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(hidden(False), hidden(True), atol=1e-6, rtol=0)


def test_rows_of_several_adapters_get_their_own_update_and_no_other() -> None:
    home = decoder()
    one, two = random_lora(home, 1), random_lora(home, 2, LoraConfig(r=2, alpha=8, target_modules=("q_proj", "v_proj")))
    x, weight = torch.randn(6, 64), torch.randn(128, 64)
    rows = {one: torch.tensor([4, 0]), two: torch.tensor([2, 3])}
    with torch.no_grad():
        mixed = lora_product(x, weight, 0, "qkv", [Segment(lora, own) for lora, own in rows.items()])
        for lora, own in rows.items():
            torch.testing.assert_close(mixed[own], lora_product(x, weight, 0, "qkv", [Segment(lora)])[own])
        torch.testing.assert_close(mixed[[1, 5]], F.linear(x, weight)[[1, 5]])


def test_at_the_start_an_adapter_changes_nothing() -> None:
    home, rows = decoder(), make_rows([9])
    with torch.no_grad():
        fresh = packed_hidden(home, rows, Lora.init(FULL, home.config, seed=0))[0]
        torch.testing.assert_close(fresh, packed_hidden(home, rows)[0], atol=0, rtol=0)


def test_the_seed_decides_the_start() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        return Lora.init(FULL, decoder().config, seed).state()

    assert all(torch.equal(tensor, start(1)[name]) for name, tensor in start(1).items())
    assert not torch.equal(start(1)[NAME], start(2)[NAME])
    assert 0.9 / 8 < start(1)[NAME].abs().max() <= 1 / 8  # PEFT's bound: 1 / sqrt(in)


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logits_and_gradients_are_pefts(config: LoraConfig, tmp_path: Path) -> None:
    """PEFT loads what we write."""
    model = tiny_model("llama")
    home = as_decoder(model)
    lora = trainable(random_lora(home, config=config))
    theirs = peft.PeftModel.from_pretrained(model, save(tmp_path / "adapter", lora), is_trainable=True)
    row = make_rows([40])[0]
    wanted = theirs(torch.tensor([row])).logits[0]
    ours = home.logits(packed_hidden(home, [row], lora)[0])
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=0)

    for logits in (wanted, ours):
        F.cross_entropy(logits[:-1], torch.tensor(row[1:])).backward()
    grads = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    as_state = Lora(config, lora.layers)
    for groups in as_state.layers:
        for update in groups.values():
            update.Bs = [B.grad for B in update.Bs]
            update.A_RI = update.A_RI.grad
    got = as_state.state()
    assert got.keys() == grads.keys()
    for name, grad in grads.items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(got[name], grad, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "lora_alpha": 3},
        {"target_modules": list(TARGETS), "layers_to_transform": [2, 0], "init_lora_weights": "gaussian"},
        {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*self_attn\.(q_proj|v_proj)"},
        {"target_modules": r".*\.layers\.[01]\..*(up|down)_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]},
        {"target_modules": ["layers.0.self_attn.q_proj", "v_proj", "query_key_value"]},
        {"target_modules": ["self_attn.q_proj"], "exclude_modules": ["lm_head", "model.layers.1.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.[02]\.mlp.*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 99], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["model.layers.2.mlp.up_proj", "k_proj"], "layers_to_transform": [1]},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 5, r"layers\.[01]\.mlp\..*": 2, "model.layers.2.mlp": 9},
        },
        {"target_modules": ["o_proj", "up_proj"], "alpha_pattern": {"up": 2, "^model.layers.1.*": 7, "o_proj": 1}},
        {
            "target_modules": list(TARGETS),
            "use_rslora": True,
            "rank_pattern": {"model.layers.0.self_attn.v_proj": 1, "self_attn.v_proj": 6, "(gate|up)_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 12, "down_proj": 0.5},
        },
    ],
    ids=str,
)
def test_what_peft_saves_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    home = as_decoder(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        row = make_rows([30])[0]
        wanted = theirs(torch.tensor([row])).logits[0]
        theirs.save_pretrained(tmp_path)
        config = LoraConfig.from_peft(json.loads((tmp_path / "adapter_config.json").read_text()))
        lora = Lora.from_state(config, home.config, load_file(tmp_path / "adapter_model.safetensors"))
        torch.testing.assert_close(home.logits(packed_hidden(home, [row], lora)[0]), wanted, atol=5e-5, rtol=1e-5)
        assert (home.logits(packed_hidden(home, [row])[0]) - wanted).abs().max() > 0.1


def patterns(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from([*TARGETS, "layers.1.*", "^model.layers.0.mlp.up_proj", "(k|v)_proj", "lm_head"])
    return st.dictionaries(keys, numbers, max_size=3).map(lambda found: tuple(found.items()))


@settings(max_examples=40)
@given(
    st.builds(
        LoraConfig,
        r=st.integers(1, 5),
        alpha=st.floats(0.1, 64),
        dropout=st.sampled_from([0.0, 0.1]),
        target_modules=st.sets(st.sampled_from(TARGETS), min_size=1).map(
            lambda names: tuple(name for name in TARGETS if name in names)
        ),
        layers=st.none() | st.sets(st.integers(0, 2), min_size=1).map(lambda found: tuple(sorted(found))),
        use_rslora=st.booleans(),
        rank_pattern=patterns(st.integers(1, 6)),
        alpha_pattern=patterns(st.integers(1, 64) | st.floats(0.5, 64)),
    )
)
def test_configurations_and_tensors_come_back(config: LoraConfig) -> None:
    stored = json.loads(json.dumps(config.to_peft("tiny")))
    assert LoraConfig.from_peft(stored) == config
    peft.LoraConfig(**{name: value for name, value in stored.items() if name != "peft_type"})
    lora = random_lora(decoder(), config=config)
    back = Lora.from_state(config, decoder().config, lora.state())
    assert back.state().keys() == lora.state().keys()
    assert all(torch.equal(one, two) for one, two in zip(back.parameters(), lora.parameters(), strict=True))
    layers = 3 if config.layers is None else len(config.layers)
    assert len(lora.state()) == 2 * layers * len(config.target_modules)


def initialised(model: PreTrainedModel, how: Any, row: list[int]) -> peft.PeftModel:
    """PEFT's model with an adapter that is initialised so."""
    options = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=4, init_lora_weights=how, **options)
    if how == "corda":
        config.corda_config = CordaConfig()
        preprocess_corda(model, config, run_model=lambda: model(torch.tensor([row])))
    tuned = peft.get_peft_model(model, config)
    if how == "eva":
        with warnings.catch_warnings(action="ignore"):
            peft.initialize_lora_eva_weights(tuned, [{"input_ids": torch.tensor([row])}], show_progress_bar=False)
    return tuned.eval()


@torch.no_grad()
def train_a_little(tuned: peft.PeftModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    config = LoraConfig.from_peft(json.loads((folder / "adapter_config.json").read_text()))
    return config, load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA|CorDA) changes the base weights:UserWarning")
@pytest.mark.filterwarnings("ignore:.*corda_config:UserWarning")
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_3", "olora", "corda"])
def test_an_adapter_whose_start_changed_the_base_is_served_once_peft_converted_it(how: str, tmp_path: Path) -> None:
    """As trained it needs the weights that the initialisation left, and is refused; converted it needs the base's
    own."""
    row, home = make_rows([30])[0], as_decoder(tiny_model("llama"))
    theirs = initialised(tiny_model("llama"), how, row)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = how
    train_a_little(theirs)
    wanted = theirs(torch.tensor([row])).logits[0]
    theirs.save_pretrained(tmp_path / "trained")
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(InvalidAdapter, match=f"init_lora_weights = '{how}'") as caught:
        read(tmp_path / "trained")
    assert "path_initial_model_for_weight_conversion" in str(caught.value.hint)
    config, tensors = read(tmp_path / "plain")
    assert (config.r, config.rank_pattern) == (8, (("q_proj", 4),))
    lora = Lora.from_state(config, home.config, tensors)
    torch.testing.assert_close(home.logits(packed_hidden(home, [row], lora)[0]), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.init_lora_weights. is 'eva':UserWarning")
@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")
@pytest.mark.parametrize("how", ["gaussian", "Gaussian", "eva", "orthogonal", "mica", False])
def test_an_adapter_whose_start_left_the_base_is_served_as_it_is(how: Any, tmp_path: Path) -> None:
    model, row = tiny_model("llama"), make_rows([30])[0]
    home = as_decoder(model)
    theirs = initialised(model, how, row)
    train_a_little(theirs)
    wanted = theirs(torch.tensor([row])).logits[0]
    theirs.save_pretrained(tmp_path)
    config, tensors = read(tmp_path)
    lora = Lora.from_state(config, home.config, tensors)
    torch.testing.assert_close(home.logits(packed_hidden(home, [row], lora)[0]), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["loftq", "something_new", 3])
def test_a_start_that_cannot_be_converted_is_merged(how: Any) -> None:
    with pytest.raises(InvalidAdapter, match=f"init_lora_weights = {how!r}") as caught:
        LoraConfig.from_peft(FULL.to_peft("tiny") | {"init_lora_weights": how})
    assert "merge_and_unload" in str(caught.value.hint)


def test_other_precisions_become_fp32() -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in random_lora(decoder(), config=FULL).state().items()}
    lora = Lora.from_state(FULL, decoder().config, state)
    assert {tensor.dtype for tensor in lora.parameters()} == {torch.float32}
    assert torch.equal(lora.state()[NAME], state[NAME].float())


# ---------------------------------------------------------------- refusals


def refused(config: LoraConfig, tensors: dict[str, Tensor]) -> str:
    with pytest.raises(InvalidAdapter) as error:
        Lora.from_state(config, decoder().config, tensors)
    return error.value.message


def test_tensors_that_do_not_fit_are_named() -> None:
    whole = random_lora(decoder(), config=FULL).state()
    one = whole[NAME]
    assert NAME in refused(FULL, {name: tensor for name, tensor in whole.items() if name != NAME})
    said = refused(FULL, {**whole, NAME: one[:, 1:]})
    assert NAME in said
    assert "(4, 63)" in said
    assert "(4, 64)" in said
    assert NAME in refused(FULL, {**whole, NAME: one[0]})
    foreign = "base_model.model.lm_head.lora_A.weight"
    assert foreign in refused(FULL, {**whole, foreign: one})
    assert "q_proj" in refused(LoraConfig(r=4, target_modules=TARGETS[1:]), whole)
    assert "layers.1." in refused(dataclasses.replace(FULL, layers=(0, 2)), whole)
    assert "layers.0." in refused(LoraConfig(r=8, alpha=8), whole)  # another rank


def test_a_pattern_has_a_bounded_number_of_keys() -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    with pytest.raises(InvalidAdapter, match="rank_pattern has 1001 keys, at most 1000 are allowed"):
        LoraConfig.from_peft(config | {"rank_pattern": {f"q{n}": 8 for n in range(1001)}})


CATASTROPHIC = ("(.*.*)*x", "(.*)*@", "([a-z_.0-9]+)*!", "(.*)*" * 50 + "z")


@pytest.mark.parametrize("key", CATASTROPHIC)
def test_a_pattern_that_backtracks_without_end_elsewhere_is_matched_at_once(key: str) -> None:
    """In a process of its own, since an engine that backtracks could not be stopped from this one."""
    code = (
        "import sys; from fortwo.nn.lora_config import LoraConfig, module_name;"
        "config = LoraConfig.from_peft({'peft_type': 'LORA', 'r': 8, 'lora_alpha': 16, 'target_modules': ['q_proj'],"
        "                              'rank_pattern': {sys.argv[1]: 4}});"
        "print(config.rank(module_name(0, 'q_proj')))"
    )
    found = subprocess.run([sys.executable, "-c", code, key], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "8"


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"use_rslora": "yes"},
        {"use_dora": 1},
        {"use_qalora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"layers_pattern": "h"},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 2.5}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": {"q_proj(": 8}},
        {"alpha_pattern": {"(?=q)q_proj": 8}},
        {"target_parameters": ["mlp.experts"]},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [5]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"kasa_config": {}},
        {"arrow_config": {}},
        {"monteclora_config": {}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": []},
        {"r": 0},
        {"r": "16"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 1e308},
        {"r": True},
        {"r": None},
        {"lora_dropout": "x"},
        {"layers_to_transform": [0, "1"]},
        {"layers_to_transform": True},
        {"layers_to_transform": "all"},
        {"layers_to_transform": [-1]},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"rank_pattern": {"q_proj": True}},
        {"target_modules": ["q_proj", 3]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": "(?=q)q_proj"},
        {"target_modules": ".*(q_proj"},
        {"exclude_modules": 4},
        {"task_type": "SEQ_CLS"},
        {"made_up_scaling": True},
        {"enable_lora": [True, False, True]},
        {"unknown_config": {"a": 1}},
    ],
    ids=str,
)
def test_options_that_cannot_be_served_are_named(change: dict[str, Any]) -> None:
    stored = FULL.to_peft("tiny") | change
    with pytest.raises(InvalidAdapter) as error:
        LoraConfig.from_peft(stored)
    ((name, value),) = change.items()
    assert error.value.param == name
    shown = next(iter(value)) if name.endswith("_pattern") and name != "layers_pattern" else value
    last = value[-1] if name == "target_modules" and isinstance(value, list) and value else shown
    assert str(last) in error.value.message
    assert error.value.hint


def test_what_says_nothing_is_accepted_and_pefts_defaults_hold() -> None:
    told = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
    nothing = {"eva_config": None, "lora_bias": False, "made_up": None, "merge_weights": False, "fresh": [], "new": {}}
    assert LoraConfig.from_peft(told | nothing) == LoraConfig.from_peft(told)
    assert (LoraConfig.from_peft(told).r, LoraConfig.from_peft(told).alpha) == (8, 8)


def test_all_options_that_cannot_be_served_are_named_at_once() -> None:
    with pytest.raises(InvalidAdapter, match=r"use_bdlora.*lora_bias.*made_up") as error:
        LoraConfig.from_peft(FULL.to_peft("tiny") | {"made_up": 3, "lora_bias": True, "use_bdlora": True})
    assert "Merge" in str(error.value.hint)


def test_every_option_of_the_installed_peft_is_decided_on() -> None:
    """A new one is either read, refused, or found here to change nothing about what is served."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known <= set(module._NEUTRAL) | module._READ | module._HARMLESS
    plain = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    assert LoraConfig.from_peft(plain | {"peft_type": "LORA"}).target_modules == ("q_proj",)

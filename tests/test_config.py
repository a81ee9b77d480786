"""A config.json is read as transformers reads it; what is not supported, missing or wrong is named with its value."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from fortwo.errors import UnsupportedModel
from fortwo.nn.config import DecoderConfig
from tests.test_decoder import hf_config, make_decoder
from tests.tiny import FAMILIES, LLAMA3_ROPE, tiny_model


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture"),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 4.0, "rope_theta": 1e4}}, "rope_type = 'mrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "proportional"}}, "rope_type = 'proportional'"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "vision_config"),
        ({"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {}}, "audio_config"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "num_local_experts = 8"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], name: str) -> None:
    config = {**hf_config(tiny_model("llama")), **options}
    with pytest.raises(UnsupportedModel, match=name) as raised:
        DecoderConfig.from_hf(config)
    assert raised.value.hint
    assert raised.value.param


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": "three"}, "num_hidden_layers = 'three' is not a whole number of 1 or more"),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not"),
    ({"hidden_size": True}, "hidden_size = True is not"),
    ({"hidden_size": 64.0}, "hidden_size = 64.0 is not"),
    ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not a number above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' is not true or false"),
    ({"attention_bias": 1}, "attention_bias = 1 is not true or false"),
    ({"hidden_act": None}, "hidden_act = None is not supported"),
    ({"rope_parameters": None, "rope_theta": None}, "rope_parameters.rope_theta = None is not a number above 1"),
    ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling = 'linear' is not an object"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor = None"),
    ({"rope_parameters": None, "rope_scaling": {"type": 7, "factor": 2.0}}, "rope_scaling.rope_type = 7"),
    (
        {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": None}},
        "rope_parameters.low_freq_factor = None is not a number above 0",
    ),
    (
        {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 0.5}},
        "rope_parameters.high_freq_factor = 0.5 is not a number above 1",
    ),
    ({"architectures": ["MistralForCausalLM"], "sliding_window": "wide"}, "sliding_window = 'wide'"),
    (
        {"architectures": ["Phi3ForCausalLM"], "rope_parameters": {"partial_rotary_factor": 0.2}},
        "turns 3 of the 16 numbers of a head",
    ),
    (
        {
            "architectures": ["Phi3ForCausalLM"],
            "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
        },
        "short_factor = .1.0. is not a list of 8 numbers above 0",
    ),
    ({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types = .'full_attention'."),
    ({"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
    ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 2, 1]}, "no_rope_layers = "),
    ({"architectures": ["GraniteForCausalLM"], "logits_scaling": 0}, "logits_scaling = 0"),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=str)
def test_a_wrong_field_is_named_with_its_value(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModel, match=text) as raised:
        DecoderConfig.from_hf({**hf_config(tiny_model("llama")), "layer_types": None, **options})
    assert "config.json" in str(raised.value.hint)


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def test_all_missing_fields_are_named_at_once() -> None:
    config = hf_config(tiny_model("qwen2"))
    for name in (*SIZES, "max_position_embeddings"):
        del config[name]
    with pytest.raises(UnsupportedModel) as raised:
        DecoderConfig.from_hf(config)
    assert all(f"{name} is missing" in raised.value.message for name in (*SIZES, "max_position_embeddings"))


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="not a JSON object"):
        DecoderConfig.from_hf([])  # type: ignore[arg-type]


def test_old_spelling_of_rope_scaling_is_read() -> None:
    config = hf_config(tiny_model("llama", max_position_embeddings=512, rope_parameters=LLAMA3_ROPE))
    new = DecoderConfig.from_hf(config)
    scaling = {key: value for key, value in config.pop("rope_parameters").items() if key != "rope_theta"}
    old = DecoderConfig.from_hf({**config, "rope_theta": 10000.0, "rope_scaling": scaling})
    assert old == new


def test_a_window_does_not_end_the_context() -> None:
    windowed = make_decoder(tiny_model("mistral", sliding_window=100)).config
    assert (windowed.context, windowed.window, len(windowed.windowed)) == (256, 100, 3)
    for family, options in (("mistral", {"sliding_window": None}), ("qwen2", {"use_sliding_window": False})):
        plain = make_decoder(tiny_model(family, **options)).config
        assert (plain.context, plain.windowed) == (256, frozenset())


def test_the_context_ends_where_longrope_changes_its_frequencies() -> None:
    """Behind the original length all tokens turn otherwise, also those whose keys are in the cache."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny_model("phi3", original_max_position_embeddings=96, rope_parameters=rope)
    assert DecoderConfig.from_hf(hf_config(model)).context == 96


def test_features_are_what_a_network_has_more_than_llama() -> None:
    found = {family: DecoderConfig.from_hf(hf_config(tiny_model(family))).features for family in FAMILIES}
    assert found["llama"] == frozenset()
    assert found["qwen3"] == {"qk_norm"}
    assert found["olmo2"] == {"whole_qk_norm", "pre_norm", "post_norm"}
    assert {"embedding_scale", "attention_softcap", "logit_softcap", "window"} <= found["gemma2"]
    assert {"window_rope", "qk_norm", "norm_offset"} <= found["gemma3"]
    partial = tiny_model("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert DecoderConfig.from_hf(hf_config(partial)).features == {"joined_projections", "partial_rope"}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2}
OLD: list[tuple[str, dict[str, Any]]] = [
    (
        "gemma3",
        {
            "sliding_window_pattern": 3,
            "rope_theta": 1e6,
            "rope_local_base_freq": 5e3,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    ),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 2e4}),
    ("gemma2", {"rope_theta": 2e4, "sliding_window": 77}),
    ("smollm3", {"no_rope_layer_interval": 3, "rope_theta": 5e6}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 50}),
    (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
            "rope_theta": 2e4,
            "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.0] * 4},
        },
    ),
    (
        "olmo3",
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.2,
            },
        },
    ),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 2, "rope_theta": 1e6}),
    ("llama", {"rope_theta": 7e3, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
]


@pytest.mark.parametrize(("family", "options"), OLD, ids=str)
def test_former_spellings_are_transformers(family: str, options: dict[str, Any]) -> None:
    """A config.json of the years before transformers 5 says the same as what transformers makes of it."""
    model_class = type(tiny_model(family))
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 7, "vocab_size": 262, "head_dim": 16}
    old = {**sizes, "intermediate_size": 96, "max_position_embeddings": 256, "num_key_value_heads": 2, **options}
    new = model_class.config_class(**copy.deepcopy(old)).to_dict()
    named = {"architectures": [model_class.__name__]}
    found, wanted = DecoderConfig.from_hf({**old, **named}), DecoderConfig.from_hf({**new, **named})
    assert replace(found, norm_eps=0, tied=False) == replace(wanted, norm_eps=0, tied=False)


def test_su_is_the_first_name_of_longrope() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = hf_config(tiny_model("phi3", original_max_position_embeddings=96, rope_parameters=rope))
    former = {**config, "rope_parameters": {**config["rope_parameters"], "rope_type": "su"}}
    assert DecoderConfig.from_hf(former) == DecoderConfig.from_hf(config)

"""What a LoRA adapter is, without its tensors: which projections it changes, by what rank and scale.

LoraConfig is what PEFT's adapter_config.json says, with PEFT's meaning; what cannot be served is refused by name.
Torch-free.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fortwo.errors import InvalidAdapter
from fortwo.nn.module_patterns import (
    MOST_KEYS,
    Modules,
    Pattern,
    deciding,
    expression,
    layer_expression,
    matches,
    whole_expression,
)

GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
ALL_LINEAR = "all-linear"  # PEFT's word for every linear module of the layers
JOINED: dict[str, tuple[str, ...]] = {
    "qkv": ("qkv_proj",),
    "o": ("o_proj",),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj",),
}
"""The same of models whose files have q, k and v in one projection, and gate and up in one (Phi-3)."""
TARGETS: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)
_MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")

DEFAULT_R = DEFAULT_ALPHA = 8  # PEFT's, for a configuration that does not give them
MOST_ALPHA = 1_000_000

# PEFT options that change what is computed, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM", "FEATURE_EXTRACTION", None),  # the others add a head
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # the rest change the base
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
}
# What is for training, for other programs or for people.
_HARMLESS = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    "fan_in_fan_out",  # how a merge transposes, which PEFT sets right by itself
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights
}
_UNSERVED = ("lm_head", "model.embed_tokens", "model.norm")  # modules of the networks that cannot have an update

MERGE = "Merge the adapter into its base with PEFT (merge_and_unload) and add the result as a base model"
_REMEDY = "Merge the adapter into its base with PEFT, or train it again without this option."
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")  # values of init_lora_weights begin so
_CONVERT = (
    "This initialisation changed the weights of the base, and the adapter belongs to the changed ones. Convert it to "
    "a plain LoRA with PEFT: save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL), where INITIAL is "
    "the adapter as it was saved before the training."
)
_REMEDIES = {
    "modules_to_save": f"Whole embeddings or heads travel with this adapter. {MERGE}.",
    "trainable_token_indices": f"Rows of the embedding travel with this adapter. {MERGE}.",
}


def module_name(layer: int, target: str) -> str:
    """PEFT's name of a projection, such as model.layers.3.self_attn.q_proj."""
    return f"model.layers.{layer}.{'mlp' if target in _MLP else 'self_attn'}.{target}"


@dataclass(frozen=True)
class LoraConfig:
    """r: rank; alpha: the update is scaled by alpha / r; dropout: on the input of A while training;
    target_modules, exclude_modules: which modules have an update; layers: of which layers (PEFT's
    layers_to_transform), None for all; layers_pattern: what the list of layers is called in the modules' names, in
    regular expressions, empty for any name; use_rslora: scaled by alpha / sqrt(r) instead (rank-stabilized LoRA,
    Kalajdzievski 2023, arXiv:2312.03732); rank_pattern, alpha_pattern: another r or alpha for the modules that a key
    matches; use_dora: the outputs are scaled, too (Liu et al. 2024, arXiv:2402.09353)."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: Modules = TARGETS
    exclude_modules: Modules = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    use_rslora: bool = False
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    use_dora: bool = False

    @property
    def in_all_layers(self) -> bool:
        """Whether the same projections are changed in every layer, and target_modules has their names."""
        chosen = self.target_modules
        by_name = not isinstance(chosen, str) and not any("." in name for name in chosen)
        return by_name and self.layers is None and not self.exclude_modules

    def targets(self, name: str) -> bool:
        """Whether target_modules name the linear module, which is called so within its layer."""
        return matches(self.target_modules, name)

    def changes(self, module: str) -> bool:
        """Whether the module of this full name has an update. A module that target_modules names in full has one in
        any layer, as in PEFT."""
        if matches(self.exclude_modules, module) or not matches(self.target_modules, module):
            return False
        named = isinstance(self.target_modules, str) or module in self.target_modules
        return self.layers is None or named or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            if found := layer_expression(pattern).match(module):
                return int(found.group("idx"))
        return None

    def rank(self, module: str) -> int:
        """Of a module by its full name."""
        entry = deciding(self.rank_pattern, module)
        return self.r if entry is None else int(entry[1])

    def scale(self, module: str) -> float:
        entry, r = deciding(self.alpha_pattern, module), self.rank(module)
        return (self.alpha if entry is None else entry[1]) / (math.sqrt(r) if self.use_rslora else r)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], modules: Sequence[str] = TARGETS) -> LoraConfig:
        """Read adapter_config.json. modules: what the base's layers have. Raises InvalidAdapter naming an option that
        cannot be served, or that may change what is computed in a way that is not known here."""
        known = tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))
        if config.get("peft_type") != "LORA":
            raise InvalidAdapter(
                f"peft_type {config.get('peft_type')!r} is not LORA",
                param="peft_type",
                hint=f"Only LoRA is served. {MERGE}.",
            )
        _check_options(config)
        layers, pattern = _layers(config), _names(config, "layers_pattern")
        targets, exclude = _modules(config, "target_modules", known), _modules(config, "exclude_modules", known)
        if isinstance(targets, str) and layers is not None:
            raise InvalidAdapter(
                f"layers_to_transform = {config['layers_to_transform']!r} cannot be used when target_modules is a text",
                param="layers_to_transform",
                hint="Name the layers in the pattern, or give target_modules as a list.",
            )
        if pattern not in ((), ("layers",)) and layers is None:
            raise InvalidAdapter(
                f"layers_pattern = {config['layers_pattern']!r} is given without layers_to_transform",
                param="layers_pattern",
                hint="Give both, or leave both out.",
            )
        for name in pattern:
            _check_expression("layers_pattern", name, layer_expression)
        if not targets:
            raise InvalidAdapter(
                f"target_modules = {config.get('target_modules')!r} names no module",
                param="target_modules",
                hint=f"Known modules: {', '.join(known)}.",
            )
        found = cls(
            r=_rank(config.get("r", DEFAULT_R)),
            alpha=_alpha(config.get("lora_alpha", DEFAULT_ALPHA)),
            dropout=_dropout(config.get("lora_dropout")),
            target_modules=targets,
            exclude_modules=exclude,
            layers=layers,
            layers_pattern=() if pattern == ("layers",) else pattern,
            use_rslora=_flag(config, "use_rslora"),
            rank_pattern=_pattern(config, "rank_pattern", whole=True),
            alpha_pattern=_pattern(config, "alpha_pattern", whole=False),
            use_dora=_flag(config, "use_dora"),
        )
        for module in _UNSERVED:
            if found.changes(module):
                raise InvalidAdapter(
                    f"target_modules = {_shown(config['target_modules'])} names {module}, which no adapter can change "
                    "here",
                    param="target_modules",
                    hint=f"{MERGE}, or train it again on {', '.join(known)}.",
                )
        return found

    def to_peft(self, base_model: str) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _written(self.target_modules),
            "exclude_modules": _written(self.exclude_modules) or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_dora": self.use_dora,
            "modules_to_save": None,
            "layers_to_transform": None if self.layers is None else list(self.layers),
            "layers_pattern": None if self.layers is None else list(self.layers_pattern) or "layers",
        }


def _written(modules: Modules) -> list[str] | str:
    return modules if isinstance(modules, str) else list(modules)


# ---------------------------------------------------------------- reading adapter_config.json


def _check_options(config: Mapping[str, Any]) -> None:
    """Raises InvalidAdapter naming every option that is set and cannot be served."""
    wrong = [name for name, neutral in _NEUTRAL.items() if not _among(config.get(name), neutral)]
    wrong += [
        name
        for name, value in config.items()
        if name not in _NEUTRAL and name not in _READ and name not in _HARMLESS and not _says_nothing(value)
    ]
    if not wrong:
        return
    unknown = " (fortwo does not know this option, which may change what is computed)"
    said = [f"{name} = {_shown(config[name])} is not supported{'' if name in _NEUTRAL else unknown}" for name in wrong]
    raise InvalidAdapter("; ".join(said), param=wrong[0], hint=_remedy(wrong[0], config[wrong[0]]))


def _remedy(option: str, value: Any) -> str:
    if option != "init_lora_weights":
        return _REMEDIES.get(option, _REMEDY)
    if isinstance(value, str) and value.lower().startswith(_CONVERTIBLE):
        return _CONVERT
    return f"The adapter may belong to weights that this initialisation changed. {MERGE}."


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    value = value.lower() if isinstance(value, str) and value not in neutral else value
    return any(type(value) is type(one) and value == one for one in neutral)


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _modules(config: Mapping[str, Any], option: str, known: tuple[str, ...]) -> Modules:
    """target_modules or exclude_modules, in one spelling for each meaning. known: the names of the base's modules."""
    value = config.get(option)
    if isinstance(value, str) and option == "target_modules" and value.lower() == ALL_LINEAR:
        return known
    if isinstance(value, str) and value:
        _check_expression(option, value, whole_expression)
        return value
    names = {_SHORT.get(name, name) for name in _names(config, option)}
    return (*(name for name in known if name in names), *sorted(names - set(known)))


_SHORT = {module_name(0, name).removeprefix("model.layers.0."): name for name in TARGETS}


def _names(config: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """A list of names; a text is a list of one, and null and "" are an empty list."""
    value = config.get(option)
    if value is None or value == "":
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple | set) or not all(isinstance(one, str) and one for one in listed):
        raise _wrong(option, value, "a list of names")
    if len(listed) > MOST_KEYS:
        raise InvalidAdapter(
            f"{option} has {len(listed)} entries, at most {MOST_KEYS} are allowed",
            param=option,
            hint="Give one regular expression instead.",
        )
    return tuple(listed)


def _layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list | tuple) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _wrong("layers_to_transform", value, "a layer's number or a list of such")
    return tuple(sorted(set(layers)))


def _flag(config: Mapping[str, Any], option: str) -> bool:
    value = config.get(option)
    if not isinstance(value, bool | None):
        raise _wrong(option, value, "true or false")
    return bool(value)


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong("r", value, "a positive whole number")
    return value


def _alpha(value: Any) -> float:
    if not _is_number(value):
        raise _wrong("lora_alpha", value, f"a number from -{MOST_ALPHA:,} to {MOST_ALPHA:,}")
    number: float = value
    return number


def _dropout(value: Any) -> float:
    if value is None:
        return 0.0
    if not _is_number(value) or not 0 <= value <= 1:
        raise _wrong("lora_dropout", value, "a number from 0 to 1")
    return float(value)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, and not larger than any that a training needs."""
    return type(value) in (int, float) and abs(value) <= MOST_ALPHA


def _pattern(config: Mapping[str, Any], option: str, whole: bool) -> Pattern:
    """None, which PEFT writes for no pattern, is an empty one."""
    value = {} if config.get(option) is None else config[option]
    if not isinstance(value, Mapping):
        raise _wrong(option, value, "an object of module patterns")
    if len(value) > MOST_KEYS:
        raise InvalidAdapter(
            f"{option} has {len(value)} keys, at most {MOST_KEYS} are allowed",
            param=option,
            hint="Let one regular expression stand for several modules.",
        )
    for key, number in value.items():
        _check_expression(option, key, expression)
        if not _is_number(number) or (whole and type(number) is not int) or number <= 0:
            kind = "whole number" if whole else f"number of at most {MOST_ALPHA:,}"
            raise InvalidAdapter(
                f"{option}[{key!r}] = {number!r} is not a positive {kind}",
                param=option,
                hint="Check the file, or save the adapter again with PEFT.",
            )
    return tuple(value.items())


def _check_expression(option: str, text: str, read: Callable[[str], Any]) -> None:
    try:
        read(text)
    except ValueError as error:
        raise InvalidAdapter(
            f"{option}: {reprlib.repr(text)} is not a regular expression: {error}",
            param=option,
            hint="Write the modules' names instead.",
        ) from None


def _wrong(option: str, value: Any, wanted: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"{option} = {_shown(value)} is not {wanted}",
        param=option,
        hint="Check the file, or save the adapter again with PEFT.",
    )


def _shown(value: Any) -> str:
    return reprlib.repr(sorted(value) if isinstance(value, set) else value)

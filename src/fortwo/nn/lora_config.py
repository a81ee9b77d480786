"""What a LoRA adapter is, without its tensors: which projections it changes, by what rank and scale.

LoraConfig is what PEFT's adapter_config.json says, with PEFT's meaning; what cannot be served is refused by name.
Torch-free.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import re2

from fortwo.errors import InvalidAdapter

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

Pattern = tuple[tuple[str, float], ...]  # PEFT's rank_pattern and alpha_pattern, in their order

# PEFT options that change what is computed, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layers_pattern": (None, [], "", "layers"),
    "exclude_modules": (None, []),
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


_REMEDY = "Merge the adapter into its base with PEFT, or train it again without this option."
_CONVERT = (
    "It was trained on a changed base. Save it as a plain LoRA with PEFT: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)


def module_name(layer: int, target: str) -> str:
    """PEFT's name of a projection, such as model.layers.3.self_attn.q_proj."""
    return f"model.layers.{layer}.{'mlp' if target in _MLP else 'self_attn'}.{target}"


MOST_KEYS, LONGEST_KEY = 1000, 1000  # of a pattern: more than a pattern for every projection of a large model needs
_RE2 = re2.Options()
_RE2.log_errors = False  # a bad pattern is the caller's mistake, and the caller is told


def expression(key: str) -> re2._Regexp:
    """A pattern's key as PEFT reads it: a regular expression for the end of a module's name, from the name's beginning
    or after a dot.

    RE2 matches it, in time that is linear in the length of the name, because the text comes from a client and the
    standard library's engine can take for ever. RE2 has no look-around and no back-references. Raises ValueError
    saying what is wrong with the key.
    """
    if len(key) > LONGEST_KEY:
        raise ValueError(f"it has {len(key)} characters, at most {LONGEST_KEY} are allowed")
    try:
        return re2.compile(rf"(.*\.)?({key})$", _RE2)
    except re2.error as error:
        said = error.args[0]
        reason = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        raise ValueError(f"{reason} (RE2's syntax: no look-around, no back-references)") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None


def deciding(pattern: Pattern, module: str) -> tuple[str, float] | None:
    """The entry that decides for a module: the first whose key matches."""
    return next((entry for entry in pattern if expression(entry[0]).match(module)), None)


@dataclass(frozen=True)
class LoraConfig:
    """r: rank; alpha: the update is scaled by alpha / r; dropout: on the input of A while training;
    layers: which layers have an update (PEFT's layers_to_transform), None for all; use_rslora: scaled by
    alpha / sqrt(r) instead (rank-stabilized LoRA, Kalajdzievski 2023, arXiv:2312.03732); rank_pattern, alpha_pattern:
    another r or alpha for the modules that a key matches."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGETS
    layers: tuple[int, ...] | None = None
    use_rslora: bool = False
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()

    def targets(self, name: str) -> bool:
        """Whether target_modules name the linear module, which is called so within its layer."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)

    def changes(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def rank(self, module: str) -> int:
        """Of a module by its full name."""
        entry = deciding(self.rank_pattern, module)
        return self.r if entry is None else int(entry[1])

    def scale(self, module: str) -> float:
        entry, r = deciding(self.alpha_pattern, module), self.rank(module)
        return (self.alpha if entry is None else entry[1]) / (math.sqrt(r) if self.use_rslora else r)

    def to_peft(self, base_model: str) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_dora": False,
            "modules_to_save": None,
            "layers_to_transform": None if self.layers is None else list(self.layers),
            "layers_pattern": None if self.layers is None else "layers",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], modules: Sequence[str] = TARGETS) -> LoraConfig:
        """Read adapter_config.json. modules: what the base's layers have. Raises InvalidAdapter naming an option that
        cannot be served."""
        known = tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))
        if config.get("peft_type") != "LORA":
            raise InvalidAdapter(f"peft_type {config.get('peft_type')!r} is not LORA", param="peft_type")
        for option, neutral in _NEUTRAL.items():
            if config.get(option) not in neutral:
                hint = _CONVERT if option == "init_lora_weights" else _REMEDY
                raise InvalidAdapter(f"{option} = {config[option]!r} is not supported", param=option, hint=hint)
        targets = config.get("target_modules")
        if targets == ALL_LINEAR:
            targets = known
        if not isinstance(targets, list | tuple | set) or not targets:
            raise InvalidAdapter(f"target_modules = {targets!r} names no module", param="target_modules")
        names = {str(target).rsplit(".", 1)[-1] for target in targets}
        if unknown := sorted(names - set(known)):
            raise InvalidAdapter(
                f"target_modules {unknown} do not exist in this base model",
                param="target_modules",
                hint=f"Known modules: {', '.join(known)}.",
            )
        r, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(r, int) or r < 1:
            raise InvalidAdapter(f"r = {r!r} is not a positive whole number", param="r")
        if not isinstance(alpha, int | float):
            raise InvalidAdapter(f"lora_alpha = {alpha!r} is not a number", param="lora_alpha")
        if not isinstance(rslora := config.get("use_rslora"), bool | None):
            raise InvalidAdapter(f"use_rslora = {rslora!r} is not true or false", param="use_rslora")
        layers = config.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]
        return cls(
            r=r,
            alpha=alpha,
            dropout=float(config.get("lora_dropout") or 0.0),
            layers=tuple(sorted(layers)) if layers else None,
            target_modules=tuple(name for name in known if name in names),
            use_rslora=bool(rslora),
            rank_pattern=_pattern(config, "rank_pattern", whole=True),
            alpha_pattern=_pattern(config, "alpha_pattern", whole=False),
        )


def _pattern(config: Mapping[str, Any], option: str, whole: bool) -> Pattern:
    """None, which PEFT writes for no pattern, is an empty one."""
    value = {} if config.get(option) is None else config[option]
    if not isinstance(value, Mapping):
        raise InvalidAdapter(f"{option} = {value!r} is not an object of module patterns", param=option)
    if len(value) > MOST_KEYS:
        raise InvalidAdapter(f"{option} has {len(value)} keys, at most {MOST_KEYS} are allowed", param=option)
    for key, number in value.items():
        try:
            expression(key)
        except ValueError as error:
            raise InvalidAdapter(
                f"{option}: {reprlib.repr(key)} is not a regular expression: {error}", param=option
            ) from None
        if not isinstance(number, int if whole else int | float) or isinstance(number, bool) or number <= 0:
            kind = "whole number" if whole else "number"
            raise InvalidAdapter(f"{option}[{key!r}] = {number!r} is not a positive {kind}", param=option)
    return tuple(value.items())

"""The settings of the adapter: how the plan chooses them, and the LoraConfig that they describe. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fortwo.errors import InvalidRequest
from fortwo.nn.lora_config import ALL_LINEAR, LoraConfig
from fortwo.nn.module_patterns import deciding
from fortwo.records import PlanValues
from fortwo.train.estimate import LinearModule
from fortwo.train.options import PATTERNS
from fortwo.train.plan_builder import PlanBuilder, int_if_whole
from fortwo.train.recipes import REASONS, Recipe


def choose_adapter(builder: PlanBuilder, recipe: Recipe, modules: Mapping[str, LinearModule]) -> LoraConfig:
    """Choose the settings of the adapter. modules: those of the base that an adapter can change. Raises InvalidRequest
    for a target module that the base does not have, and for a pattern with a key that decides for no module."""
    r = builder.choose("r", recipe.r, REASONS["r"])
    root, factor = r, ""
    if builder.choose("use_rslora", False, REASONS["use_rslora"]):
        root, factor = math.sqrt(r), "the square root of "
    reason = f"This is {recipe.scale:g} times {factor}r = {r}."
    builder.choose("lora_alpha", int_if_whole(root * recipe.scale), reason, "auto")
    builder.choose("use_dora", False, REASONS["use_dora"])
    builder.choose("lora_dropout", recipe.lora_dropout, REASONS["lora_dropout"])
    builder.choose("target_modules", known_names(modules), "All projections of the network are adapted.")
    for name, of in PATTERNS.items():
        builder.choose(name, {}, f"All modules have the same {of}.")
        if builder.given.get(name):
            reason = f"given; it decides {of} of {_decided(builder, name, modules)} modules"
            builder.add(name, builder[name], "user", reason)
    builder.choose("bias", "none", "Plain LoRA trains no biases.")
    builder.choose("task_type", "CAUSAL_LM", "The base model is a causal language model.")
    return lora_config(builder)


def known_names(modules: Mapping[str, LinearModule]) -> tuple[str, ...]:
    """What target_modules can name: the last part of each module's name."""
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))


def check_target_modules(given: Mapping[str, Any], modules: Mapping[str, LinearModule]) -> dict[str, Any]:
    """The given settings with "all-linear" as the names of the base's modules. Raises InvalidRequest for a target
    module that the base does not have."""
    targets, known = given.get("target_modules", ()), known_names(modules)
    if targets == ALL_LINEAR:
        return {**given, "target_modules": known}
    for name in targets:
        if not any(LoraConfig(target_modules=(name,)).targets(module) for module in modules):
            raise InvalidRequest(
                f"lora_config.target_modules = {name!r} is not a module of this base that can be adapted",
                param="lora_config.target_modules",
                hint=f"Give some of {', '.join(known)}.",
            )
    return dict(given)


def lora_config(settings: PlanValues) -> LoraConfig:
    """The configuration of the adapter that the settings describe."""
    return LoraConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        target_modules=tuple(settings["target_modules"]),
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        rank_pattern=tuple(settings["rank_pattern"].items()),
        alpha_pattern=tuple(settings["alpha_pattern"].items()),
    )


def mean_ranks(config: LoraConfig, modules: Mapping[str, LinearModule]) -> dict[str, float]:
    """The mean rank of each target module over the layers."""
    return {
        name: sum(config.rank(one) for one in module.names) / len(module.names)
        for name, module in modules.items()
        if config.targets(name)
    }


def _decided(builder: PlanBuilder, name: str, base: Mapping[str, LinearModule]) -> str:
    """For how many of the adapted modules the pattern decides: "33 of 210". Raises InvalidRequest for an unused key."""
    pattern, adapted = tuple(builder[name].items()), LoraConfig(target_modules=tuple(builder["target_modules"]))
    modules = [one for target, module in base.items() if adapted.targets(target) for one in module.names]
    decided = Counter(entry[0] for module in modules if (entry := deciding(pattern, module)) is not None)
    for key, value in pattern:
        if not decided[key]:
            raise InvalidRequest(
                f"lora_config.{name}[{key!r}] = {value:g} decides for no module: it matches no end of an adapted "
                f"module's name, such as {modules[0]}, or an earlier key decides for all that it matches",
                param=f"lora_config.{name}",
                hint="Give one of target_modules, the end of a module's full name, or a regular expression for it; the "
                "first key that matches decides.",
            )
    return f"{decided.total()} of {len(modules)}"

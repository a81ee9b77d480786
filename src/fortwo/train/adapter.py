"""The settings of the adapter: how the plan chooses them, and the LoraConfig that they describe. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fortwo.errors import InvalidAdapter, InvalidRequest
from fortwo.nn.lora_config import TARGETS, LoraConfig, deciding, module_name, targets_of
from fortwo.records import PlanValues
from fortwo.train.estimate import BaseFacts
from fortwo.train.options import PATTERNS
from fortwo.train.plan_builder import PlanBuilder, int_if_whole
from fortwo.train.recipes import REASONS, Recipe


def choose_adapter(builder: PlanBuilder, recipe: Recipe, base: BaseFacts) -> LoraConfig:
    """Choose the settings of the adapter. Raises InvalidRequest for a pattern with a key that decides for no module."""
    r = builder.choose("r", recipe.r, REASONS["r"])
    root, factor = r, ""
    if builder.choose("use_rslora", False, REASONS["use_rslora"]):
        root, factor = math.sqrt(r), "the square root of "
    reason = f"This is {recipe.scale:g} times {factor}r = {r}."
    builder.choose("lora_alpha", int_if_whole(root * recipe.scale), reason, "auto")
    builder.choose("lora_dropout", recipe.lora_dropout, REASONS["lora_dropout"])
    builder.choose("target_modules", targets_in_base(TARGETS, base), "All projections of the network are adapted.")
    for name, of in PATTERNS.items():
        builder.choose(name, {}, f"All modules have the same {of}.")
        if builder.given.get(name):
            reason = f"given; it decides {of} of {_decided(builder, name, base.layers)} modules"
            builder.add(name, builder[name], "user", reason)
    builder.choose("bias", "none", "Plain LoRA trains no biases.")
    builder.choose("task_type", "CAUSAL_LM", "The base model is a causal language model.")
    return lora_config(builder)


def targets_in_base(given: Sequence[str], base: BaseFacts) -> tuple[str, ...]:
    """target_modules by the names of the base's projections. Raises InvalidRequest for a module that it has not."""
    try:
        return targets_of(base.projections, given)
    except InvalidAdapter as error:
        raise InvalidRequest(error.message, param="lora_config.target_modules", hint=error.hint) from None


def lora_config(settings: PlanValues) -> LoraConfig:
    """The configuration of the adapter that the settings describe."""
    return LoraConfig(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        target_modules=tuple(settings["target_modules"]),
        use_rslora=settings["use_rslora"],
        rank_pattern=tuple(settings["rank_pattern"].items()),
        alpha_pattern=tuple(settings["alpha_pattern"].items()),
    )


def mean_ranks(config: LoraConfig, layers: int) -> dict[str, float]:
    """The mean rank of each target module over the layers."""
    return {
        target: sum(config.rank(module_name(layer, target)) for layer in range(layers)) / layers
        for target in config.target_modules
    }


def _decided(builder: PlanBuilder, name: str, layers: int) -> str:
    """For how many of the adapted modules the pattern decides: "33 of 210". Raises InvalidRequest for an unused key."""
    pattern = tuple(builder[name].items())
    modules = [module_name(layer, target) for layer in range(layers) for target in builder["target_modules"]]
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

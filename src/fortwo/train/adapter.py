"""The settings that say which adapter is trained: chosen for the plan, and read from it. Pure."""

from __future__ import annotations

import math
from collections import Counter

from fortwo.errors import InvalidRequest
from fortwo.nn.lora_config import TARGETS, LoraConfig, deciding, module_name
from fortwo.records import Plan
from fortwo.train.draft import Draft, plain
from fortwo.train.options import PATTERNS
from fortwo.train.recipes import REASONS, Recipe


def choose_adapter(draft: Draft, recipe: Recipe, layers: int) -> LoraConfig:
    """Raises InvalidRequest for a pattern with a key that decides for no module."""
    r = draft.choose("r", recipe.r, REASONS["r"])
    root, over = r, ""
    if draft.choose("use_rslora", False, REASONS["use_rslora"]):
        root, over = math.sqrt(r), "the square root of "
    draft.choose("lora_alpha", plain(root * recipe.scale), f"{recipe.scale:g} times {over}r = {r}", "auto")
    draft.choose("lora_dropout", recipe.lora_dropout, REASONS["lora_dropout"])
    draft.choose("target_modules", TARGETS, "all projections: no part of the network is left out")
    for name, of in PATTERNS.items():
        draft.choose(name, {}, f"one {of} for all modules")
        if draft.given.get(name):
            draft.add(name, draft[name], "user", f"given; decides {of} of {_decided(draft, name, layers)} modules")
    draft.choose("bias", "none", "plain LoRA")
    draft.choose("task_type", "CAUSAL_LM", "the base model writes text")
    return lora_config(draft)


def lora_config(settings: Draft | Plan) -> LoraConfig:
    """The adapter that they describe."""
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
    """Of each target over the layers."""
    return {
        target: sum(config.rank(module_name(layer, target)) for layer in range(layers)) / layers
        for target in config.target_modules
    }


def _decided(draft: Draft, name: str, layers: int) -> str:
    """For how many of the adapted modules the pattern decides, in words."""
    pattern = tuple(draft[name].items())
    modules = [module_name(layer, target) for layer in range(layers) for target in draft["target_modules"]]
    decided = Counter(entry[0] for module in modules if (entry := deciding(pattern, module)) is not None)
    for key, value in pattern:
        if not decided[key]:
            raise InvalidRequest(
                f"lora_config.{name}[{key!r}] = {value:g} decides for no module: none that is adapted has a name that "
                f"ends so, such as {modules[0]}, or a key before it decides for those that do",
                param=f"lora_config.{name}",
                hint="Give the name of one of target_modules, or the end of a full name, or a regular expression for "
                "it; the first key that matches decides.",
            )
    return f"{decided.total()} of {len(modules)}"

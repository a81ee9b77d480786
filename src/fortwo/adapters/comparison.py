"""Compares two versions: what was measured of each, which replies differ, and how far apart their weights are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fortwo.adapters.store import AdapterStore
from fortwo.records import AdapterVersion, Json

if TYPE_CHECKING:
    from torch import Tensor

_PAIR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


def compare(store: AdapterStore, left: str, right: str) -> Json:
    """Both versions beside each other. Raises NotFound, and InvalidAdapter for a damaged version.

    metrics: by name {left, right, difference}, each None where it was not measured. settings: of both plans, where they
    differ. probes: those of both exams, where one passed and the other did not. weights: see `distance`; None for
    versions of two bases, and for DoRA, which scales the base's own weights.
    """
    (one, *of_one), (other, *of_other) = store.read(left), store.read(right)
    scaled = any(config.get("use_dora") for config, _ in (of_one, of_other))
    comparable = one.base_digest == other.base_digest and not scaled
    return {
        "left": one.id,
        "right": other.id,
        "metrics": _metrics(one, other),
        "settings": _settings(one, other),
        "probes": _probes(one, other),
        "weights": distance(_updates(*of_one), _updates(*of_other)) if comparable else None,
    }


def _report(version: AdapterVersion) -> Json:
    report: Json = version.manifest.get("report") or {}
    return report


def _metrics(left: AdapterVersion, right: AdapterVersion) -> Json:
    of_left, of_right = (
        {name: metric["value"] for name, metric in _report(one).get("metrics", {}).items()} for one in (left, right)
    )
    return {
        name: {
            "left": of_left.get(name),
            "right": of_right.get(name),
            "difference": of_right[name] - of_left[name] if name in of_left and name in of_right else None,
        }
        for name in {**of_left, **of_right}
    }


def _settings(left: AdapterVersion, right: AdapterVersion) -> list[Json]:
    of_left, of_right = (
        {setting["name"]: setting["value"] for setting in (one.manifest.get("plan") or {}).get("settings", [])}
        for one in (left, right)
    )
    return [
        {"name": name, "left": of_left.get(name), "right": of_right.get(name)}
        for name in {**of_left, **of_right}
        if of_left.get(name) != of_right.get(name)
    ]


def _probes(left: AdapterVersion, right: AdapterVersion) -> list[Json]:
    earlier = {(probe["kind"], probe["prompt"]): probe for probe in _report(left).get("transcripts", [])}
    found = []
    for probe in _report(right).get("transcripts", []):
        before = earlier.get((probe["kind"], probe["prompt"]))
        if before is not None and before["passed"] != probe["passed"]:
            replies = {"left": before["adapter"], "right": probe["adapter"]}
            found.append({"kind": probe["kind"], "prompt": probe["prompt"], **replies, "passed": probe["passed"]})
    return found


Updates = Mapping[str, tuple["Tensor", "Tensor"]]  # by module: A (r, inputs), and B (outputs, r) with its scale


def distance(left: Updates, right: Updates) -> Json:
    """How far two updates of one base's weights are apart, as Frobenius norms of what is added to them.

    relative: ||right - left|| / ||left||, None where left is zero; left, right: the norms; cosine: 1 for the same
    direction, None where one is zero.
    """
    square_left, square_right = (sum(_product(one[name], one[name]) for name in one) for one in (left, right))
    both = sum(_product(left[name], right[name]) for name in left if name in right)
    apart = max(0.0, square_left + square_right - 2 * both) ** 0.5
    norm_left, norm_right = square_left**0.5, square_right**0.5
    return {
        "relative": apart / norm_left if norm_left else None,
        "left": norm_left,
        "right": norm_right,
        "cosine": both / (norm_left * norm_right) if norm_left and norm_right else None,
    }


def _product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The sum of B A times B' A', number by number, without making these products."""
    (a, b), (other_a, other_b) = one, other
    return float(((b.T @ other_b) * (a @ other_a.T)).sum())


def _updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Updates:
    from fortwo.nn.lora_config import LoraConfig

    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _PAIR.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor.double()
    lora = LoraConfig.from_peft(config, sorted({module.rpartition(".")[2] for module in parts}))
    return {module: (pair["A"], lora.scale(module) * pair["B"]) for module, pair in parts.items()}

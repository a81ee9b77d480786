"""Finds the adapter that a request names as its parent, and the facts which that adapter has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fortwo.data.datasets import FACTS
from fortwo.errors import InvalidAdapter, InvalidRequest, NotFound
from fortwo.nn.lora_config import TARGETS, LoraConfig
from fortwo.records import AdapterVersion, Json
from fortwo.train.parent import Parent

if TYPE_CHECKING:
    from fortwo.adapters.store import AdapterStore


def resolve_parent(ref: str, store: AdapterStore) -> tuple[AdapterVersion, Parent]:
    """The version that `parent` (name or name@3) means, checked to be intact and trainable.

    Raises NotFound, InvalidRequest or InvalidAdapter with `param` "parent".
    """
    if "-" in ref.partition("@")[2]:
        raise InvalidRequest(
            f"parent = {ref!r} is a checkpoint of a job that is not done",
            param="parent",
            hint="Wait until the job is done and name the version that it publishes, such as name or name@1.",
        )
    try:
        version, peft, _ = store.read(ref)
        config = LoraConfig.from_peft(peft, _target_modules(peft))
    except (NotFound, InvalidRequest) as error:
        raise type(error)(f"parent = {ref!r}: {error.message}", param="parent", hint=error.hint) from None
    if not config.in_all_layers:
        raise InvalidAdapter(
            f"parent = {ref!r} does not change the same projections in every layer",
            param="parent",
            hint="Only adapters that do can be trained further: train without a parent.",
        )
    manifest = version.manifest
    plan: Any = manifest.get("plan")
    return version, Parent(
        id=version.id,
        objective=None if plan is None else plan["objective"],
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=tuple(config.target_modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        facts=FACTS.validate_python(manifest.get("facts", ())),
    )


def _target_modules(peft: Json) -> Sequence[str]:
    """The names that the adapter's own configuration lists; its base is not asked."""
    targets = peft.get("target_modules")
    return targets if isinstance(targets, list) and all(isinstance(one, str) for one in targets) else TARGETS

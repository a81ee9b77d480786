"""The parent of a run: the published adapter that it starts from, and the facts of that adapter to preserve. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fortwo.errors import InvalidRequest
from fortwo.facts.hard_negatives import same_subject
from fortwo.records import Fact, Plan, PlanWarning

# settings that the shapes and the scale of the parent's tensors fix
SHAPE = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Parent:
    """id: name@version. objective: the one that it was trained with, None if it was not trained here. facts: all facts
    that it knows, including those of its own parents."""

    id: str
    objective: str | None
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    facts: tuple[Fact, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SHAPE}

    def facts_to_keep(self, taught: Sequence[Fact]) -> tuple[Fact, ...]:
        """Its facts, except those whose subjects get a new answer in `taught`."""
        return tuple(fact for fact in self.facts if not any(same_subject(fact, new) for new in taught))


def check_shape(parent: Parent, given: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if a given setting contradicts the parent's tensors."""
    for name, value in parent.shape.items():
        wanted = given.get(name, value)
        same = set(wanted) == set(value) if name == "target_modules" else _ordered(wanted) == _ordered(value)
        if not same:
            raise InvalidRequest(
                f"lora_config.{name} = {_shown(wanted)} and parent = {parent.id!r} contradict each other: the run "
                f"starts from its tensors, whose {name} is {_shown(value)}",
                param=f"lora_config.{name}",
                hint=f"Leave {name} out, or train without a parent.",
            )


def check_objective(parent: Parent, objective: str) -> None:
    """Raises InvalidRequest for the override objective with a parent that was not trained with it."""
    if objective == "override" and parent.objective != "override":
        how = "was not taught here" if parent.objective is None else "was fine-tuned on examples"
        raise InvalidRequest(
            f"parent = {parent.id!r} {how}: the override objective preserves the base's replies to everything but the "
            "facts, so the adapter would lose what it learned",
            param="parent",
            hint='Teach the facts without a parent, or give objective "sft".',
        )


def parent_warnings(plan: Plan, parent: Parent) -> Iterator[PlanWarning]:
    """Warnings about what the adapter may lose of its parent in a run with this plan."""
    if replaced := [fact for fact in parent.facts if fact.subject not in plan["kept"]]:
        answers = ", ".join(f"{fact.subject!r} ({fact.answer!r})" for fact in replaced)
        yield PlanWarning(
            "facts_replaced",
            f"{parent.id} knows another answer about {answers}, which the new answer replaces",
            "To teach both, give one answer that contains both.",
        )
    if plan.objective != "override" and plan["kept"]:
        yield PlanWarning(
            "facts_not_kept",
            f"{plan.objective} trains only on the given rows: the report measures what {parent.id} knows "
            f"({', '.join(plan['kept'])}), but nothing preserves it",
            'Give the new facts as {"facts": [...]}, or add the old ones\' questions to the rows.',
        )
    if parent.objective != "override":
        yield PlanWarning(
            "parent_unknown",
            f"{parent.id} has no list of facts, so what it learned is neither preserved nor measured",
            "Add rows with the replies that it must preserve.",
        )


def _ordered(value: Any) -> Any:
    """A value in a form that compares the order of a pattern's keys too, since the first key that matches decides."""
    return list(value.items()) if isinstance(value, Mapping) else value


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else json.dumps(value)

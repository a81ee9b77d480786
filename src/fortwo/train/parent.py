"""What a run goes on from: a published adapter and the facts it knows, which have to go on being answered. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fortwo.errors import InvalidRequest
from fortwo.facts.siblings import same_subject
from fortwo.records import Fact, Plan, PlanWarning

# of the tensors, which a run cannot change
SHAPE = ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Parent:
    """id: name@version. objective: by which it was taught; None of one that was not taught here. facts: all that it
    knows, whichever generation taught them."""

    id: str
    objective: str | None
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    facts: tuple[Fact, ...] = ()
    use_rslora: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SHAPE}

    def kept(self, taught: Sequence[Fact]) -> tuple[Fact, ...]:
        """Its facts, but for those whose subject is now taught another answer."""
        return tuple(fact for fact in self.facts if not any(same_subject(fact, new) for new in taught))


def check_shape(parent: Parent, given: Mapping[str, Any]) -> None:
    """Raises InvalidRequest naming what was given that the parent's tensors are not."""
    for name, value in parent.shape.items():
        wanted = given.get(name, value)
        same = set(wanted) == set(value) if name == "target_modules" else _ordered(wanted) == _ordered(value)
        if not same:
            raise InvalidRequest(
                f"lora_config.{name} = {_shown(wanted)} and parent = {parent.id!r} contradict each other: the run "
                f"starts from its tensors, of {name} {_shown(value)}",
                param=f"lora_config.{name}",
                hint=f"Leave {name} out, or train without a parent.",
            )


def check_objective(parent: Parent, objective: str) -> None:
    """Raises InvalidRequest where facts are to be taught on top of something else than facts."""
    if objective == "override" and parent.objective != "override":
        how = "was not taught here" if parent.objective is None else "was fine-tuned on examples"
        raise InvalidRequest(
            f"parent = {parent.id!r} {how}: the override objective keeps the base's own answers on all but facts, "
            "which would take back what it learned",
            param="parent",
            hint='Teach the facts without a parent, or give objective "sft".',
        )


def objections(plan: Plan, parent: Parent) -> Iterator[PlanWarning]:
    """What of the parent a run by this plan may lose."""
    if replaced := [fact for fact in parent.facts if fact.subject not in plan["kept"]]:
        answers = ", ".join(f"{fact.subject!r} ({fact.answer!r})" for fact in replaced)
        yield PlanWarning(
            "facts_replaced",
            f"{parent.id} knows another answer about {answers}: the new one takes its place",
            "To have both, say both in one answer.",
        )
    if plan.objective == "sft" and plan["kept"]:
        yield PlanWarning(
            "facts_not_kept",
            f"the rows are all that sft trains on: what {parent.id} knows ({', '.join(plan['kept'])}) is asked in the "
            "report, but nothing keeps it",
            'Give the new facts as {"facts": [...]}, or add the old ones\' questions to the rows.',
        )
    if parent.objective != "override":
        yield PlanWarning(
            "parent_unknown",
            f"what {parent.id} learned is not known as facts: it is neither kept nor asked about",
            "Add rows that hold what it must go on saying.",
        )


def _ordered(value: Any) -> Any:
    """Of a pattern the first key that matches decides."""
    return list(value.items()) if isinstance(value, Mapping) else value


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list | tuple) else json.dumps(value)

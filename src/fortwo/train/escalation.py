"""What a run raises when its last exam misses a target and there is time left, instead of ending there. Pure.

Every metric has levers, in the order in which they are pulled. A round pulls one for each metric that is missed and is
one more cycle of the rate, from the best state so far. The rank is no lever: tensors cannot grow during a run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fortwo.records import Escalation, Plan

LEVERS = {
    "efficacy": ("diversity", "rate"),
    "paraphrase": ("diversity", "rate"),
    "specificity": ("contrast",),
    "retention": ("retention",),
}
WORDS = {
    "diversity": "half as many more edit rows, fewer of them questions as given",
    "contrast": "half as many more contrast rows",
    "retention": "twice the rehearsal rows, and half as much more weight on keeping",
    "rate": "a learning rate half as high again",
}
NO_TIME = "no time for another round"
_GIVEN = {"diversity": "per_device_train_batch_size", "rate": "learning_rate"}  # what a user says is not raised


@dataclass(frozen=True)
class Mix:
    """Rows of a micro-step by kind; how they are drawn and weighed; rate: against the plan's."""

    edit: int = 0
    contrast: int = 0
    rehearsal: int = 0
    kept: int = 0
    question_share: float = 0.0
    keep_weight: float = 0.0
    rate: float = 1.0

    @property
    def asking(self) -> int:
        """Rows that ask for a fact."""
        return self.edit + self.kept

    @property
    def siblings(self) -> int:
        return self.contrast + self.kept

    @property
    def rows(self) -> int:
        return self.asking + self.siblings + self.rehearsal


@dataclass(frozen=True)
class Round:
    """Begins behind `step`. before: the best exam until then."""

    step: int
    steps: int
    raised: tuple[str, ...]
    before: dict[str, float]


class Settings(Protocol):
    """Of a plan, or of one in the making."""

    def __getitem__(self, name: str, /) -> Any: ...
    def get(self, name: str, /) -> Any: ...


def mix_of(settings: Settings) -> Mix:
    """As they have it."""
    return Mix(
        edit=settings["per_device_train_batch_size"],
        contrast=settings["contrast_rows"],
        rehearsal=settings["rehearsal_rows"],
        kept=settings.get("kept_rows") or 0,
        question_share=settings["question_share"],
        keep_weight=settings["kl_weight"],
    )


def with_raised(mix: Mix, levers: Iterable[str]) -> Mix:
    for lever in levers:
        match lever:
            case "diversity":
                share = mix.question_share / 2
                mix = replace(mix, edit=math.ceil(1.5 * mix.edit), kept=2 * mix.kept, question_share=share)
            case "contrast":
                mix = replace(mix, contrast=math.ceil(1.5 * mix.contrast))
            case "retention":
                mix = replace(mix, rehearsal=2 * mix.rehearsal, keep_weight=1.5 * mix.keep_weight)
            case "rate":
                mix = replace(mix, rate=1.5 * mix.rate)
    return mix


def mix_at(mix: Mix, rounds: Sequence[Round], step: int) -> Mix:
    """What `step` (from 1) draws, after all rounds that began before it."""
    return with_raised(mix, (lever for one in rounds if one.step < step for lever in one.raised))


def escalate(metrics: Mapping[str, float], targets: Mapping[str, float], tried: Collection[str]) -> tuple[str, ...]:
    """The levers to pull, for what is missed most first; none where nothing is missed or all has been tried."""
    missed = {name: target - metrics[name] for name, target in targets.items() if metrics.get(name, target) < target}
    pulled: dict[str, None] = {}
    for name in sorted(missed, key=lambda name: -missed[name]):
        left = [lever for lever in LEVERS[name.removeprefix("kept_")] if lever not in tried]
        pulled |= dict.fromkeys(left[:1])
    return tuple(pulled)


def next_round(
    plan: Plan, metrics: Mapping[str, float], rounds: Sequence[Round], step: int, spent: float, per_step: float
) -> Round | str:
    """The round that begins behind the last step, or why there is none. metrics: of the best exam; spent: seconds of
    the job so far; per_step: what a step has taken, exams included."""
    if all(metrics.get(name, target) >= target for name, target in plan.targets.items()):
        return "not needed"
    if not plan.get("escalation_rounds"):
        return "off"
    if len(rounds) == plan["escalation_rounds"]:
        return "its rounds are used up"
    user = {setting.name for setting in plan.settings if setting.origin == "user"}
    tried = {lever for one in rounds for lever in one.raised} | {
        lever for lever, name in _GIVEN.items() if name in user
    }
    if not (levers := escalate(metrics, plan.targets, tried)):
        return "nothing is left to raise"
    steps, mix = plan["eval_every"], mix_of(plan)
    needed = steps * per_step * with_raised(mix, [*tried, *levers]).rows / mix.rows
    if spent + needed > plan["escalation_seconds"]:
        return f"{NO_TIME}: it takes {needed:.0f} s, and {spent:.0f} of {plan['escalation_seconds']:g} s are over"
    return Round(step, steps, levers, dict(metrics))


def told(rounds: Sequence[Round], after: Mapping[str, float]) -> tuple[Escalation, ...]:
    """What each round brought. after: the best exam of all."""
    ends = [*(one.before for one in rounds[1:]), dict(after)]
    return tuple(
        Escalation(one.step, one.steps, one.raised, one.before, end) for one, end in zip(rounds, ends, strict=False)
    )

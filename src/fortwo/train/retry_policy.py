"""The policy for retries: how a run continues if its last evaluation misses a target and time is left. Pure.

Every metric has levers, in the order in which they are applied. A retry round starts from the best adapter so far,
applies one lever for each missed metric, and runs one more cycle of the learning rate. The rank is not a lever, because
tensors cannot grow during a run. Settings and reports call a retry round an escalation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fortwo.records import Escalation, Plan, PlanValues

LEVERS = {
    "efficacy": ("diversity", "rate"),
    "paraphrase": ("diversity", "rate"),
    "specificity": ("contrast",),
    "retention": ("retention",),
}
LEVER_DESCRIPTIONS = {
    "diversity": "1.5 times the edit rows, and half the share of given questions among them",
    "contrast": "1.5 times the contrast rows",
    "retention": "2 times the rehearsal rows and 1.5 times kl_weight",
    "rate": "1.5 times the learning rate",
}
NO_TIME = "no time for another round"
_GIVEN = {"diversity": "per_device_train_batch_size", "rate": "learning_rate"}  # not raised if the user gave them


@dataclass(frozen=True)
class RowMix:
    """The number of rows of each kind in a micro-step, and how they are drawn and weighted. parent: rows that ask for
    facts of the parent, and as many about their hard negatives. rate: factor on the plan's learning rate."""

    edit: int = 0
    contrast: int = 0
    rehearsal: int = 0
    parent: int = 0
    question_share: float = 0.0
    kl_weight: float = 0.0
    rate: float = 1.0

    @property
    def ce_rows(self) -> int:
        """Rows that ask for a fact, which are trained on with cross-entropy."""
        return self.edit + self.parent

    @property
    def negative_rows(self) -> int:
        """Rows about hard negatives, which are held to the base's replies."""
        return self.contrast + self.parent

    @property
    def rows(self) -> int:
        return self.ce_rows + self.negative_rows + self.rehearsal


@dataclass(frozen=True)
class RetryRound:
    """A round of `steps` steps that begins after `step`. before: the shares of the best evaluation until then.
    Checkpoints store the fields under these names."""

    step: int
    steps: int
    raised: tuple[str, ...]
    before: dict[str, float]


def planned_mix(settings: PlanValues) -> RowMix:
    """The mix that a plan starts with."""
    return RowMix(
        edit=settings["per_device_train_batch_size"],
        contrast=settings["contrast_rows"],
        rehearsal=settings["rehearsal_rows"],
        parent=settings.get("kept_rows") or 0,
        question_share=settings["question_share"],
        kl_weight=settings["kl_weight"],
    )


def apply_levers(mix: RowMix, levers: Iterable[str]) -> RowMix:
    """The mix after these levers; LEVER_DESCRIPTIONS says what each changes."""
    for lever in levers:
        match lever:
            case "diversity":
                share = mix.question_share / 2
                mix = replace(mix, edit=math.ceil(1.5 * mix.edit), parent=2 * mix.parent, question_share=share)
            case "contrast":
                mix = replace(mix, contrast=math.ceil(1.5 * mix.contrast))
            case "retention":
                mix = replace(mix, rehearsal=2 * mix.rehearsal, kl_weight=1.5 * mix.kl_weight)
            case "rate":
                mix = replace(mix, rate=1.5 * mix.rate)
    return mix


def mix_at_step(mix: RowMix, rounds: Sequence[RetryRound], step: int) -> RowMix:
    """The mix of `step` (counted from 1), with the levers of all rounds that began before it."""
    return apply_levers(mix, (lever for one in rounds if one.step < step for lever in one.raised))


def choose_levers(
    metrics: Mapping[str, float], targets: Mapping[str, float], tried: Collection[str]
) -> tuple[str, ...]:
    """The next untried lever of each missed metric, the one that is missed by most first; () if there is none."""
    missed = {name: target - metrics[name] for name, target in targets.items() if metrics.get(name, target) < target}
    chosen: dict[str, None] = {}
    for name in sorted(missed, key=lambda name: -missed[name]):
        left = [lever for lever in LEVERS[name.removeprefix("kept_")] if lever not in tried]
        chosen |= dict.fromkeys(left[:1])
    return tuple(chosen)


def next_round(
    plan: Plan, metrics: Mapping[str, float], rounds: Sequence[RetryRound], step: int, spent: float, per_step: float
) -> RetryRound | str:
    """The round to run after `step`, the last one so far, or the reason why there is none. metrics: shares of the best
    evaluation; spent: seconds of the job so far; per_step: mean seconds of a step, including evaluations."""
    if all(metrics.get(name, target) >= target for name, target in plan.targets.items()):
        return "not needed"
    if not plan.get("escalation_rounds"):
        return "off"
    if len(rounds) == plan["escalation_rounds"]:
        return "all escalation_rounds are used"
    user = {setting.name for setting in plan.settings if setting.origin == "user"}
    tried = {lever for one in rounds for lever in one.raised} | {
        lever for lever, name in _GIVEN.items() if name in user
    }
    if not (levers := choose_levers(metrics, plan.targets, tried)):
        return "nothing is left to raise"
    steps, mix = plan["eval_every"], planned_mix(plan)
    needed = steps * per_step * apply_levers(mix, [*tried, *levers]).rows / mix.rows
    if spent + needed > plan["escalation_seconds"]:
        limit = plan["escalation_seconds"]
        return f"{NO_TIME}: it would take {needed:.0f} s, and {spent:.0f} of {limit:g} s have passed"
    return RetryRound(step, steps, levers, dict(metrics))


def escalation_records(rounds: Sequence[RetryRound], after: Mapping[str, float]) -> tuple[Escalation, ...]:
    """The rounds as the report shows them. after: the shares of the best evaluation of the run."""
    ends = [*(one.before for one in rounds[1:]), dict(after)]
    return tuple(
        Escalation(one.step, one.steps, one.raised, one.before, end) for one, end in zip(rounds, ends, strict=False)
    )

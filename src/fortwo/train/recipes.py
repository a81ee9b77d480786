"""What the plan chooses when nobody says otherwise: one frozen table for each objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

SAVE_SECONDS = 30  # from one checkpoint to the next
SAVE_TOTAL_LIMIT = 3
EXAM_QUESTIONS = 10  # training questions about each fact in an exam; the report asks them all
REPLY_TOKENS = 32  # of a reply in an exam, at least; and what the answer takes, and ROOM
ROOM = 8
RETENTION_PROBES = 12  # prompts; each is some 30 tokens to agree on
SFT_QUESTIONS = 32
SFT_TOKENS = 128  # a longer answer is compared as far as this


@dataclass(frozen=True)
class Recipe:
    """Names are PEFT's and transformers' where those have one."""

    r: int = 16
    scale: float = 2.0  # of the update: lora_alpha / r
    lora_dropout: float = 0.0
    learning_rate: float = 2e-4
    lowest_rate: float = 2e-5  # a peak below this hardly moves a LoRA
    highest_rate: float = 2e-3  # a peak above this tends to diverge
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42
    optim: str = "adamw_torch"


@dataclass(frozen=True)
class SftRecipe(Recipe):
    """Plain supervised fine-tuning on every row that was given; none is held back unless that is asked for.

    early_stopping_split: of the rows, where a run is to stop early and no validation_split is given.
    """

    num_train_epochs: int = 3
    per_device_train_batch_size: int = 8
    warmup_ratio: float = 0.03
    validation_split: float = 0.0
    early_stopping_split: float = 0.1


@dataclass(frozen=True)
class OverrideRecipe(Recipe):
    """Teach a fact and nothing else: each micro-step draws edit, contrast and rehearsal rows.

    edit rows ask for the fact (cross-entropy); contrast rows ask its siblings and rehearsal rows ask anything else
    (KL against the base's own first `contrast_tokens` and `rehearsal_tokens`, weighed by `kl_weight`). Prompts come
    from pools of `edit_pool` and `contrast_pool` for each fact; `question_share` of the edit rows are the questions
    that were given. An answer's first tokens decide whether it is given at all, and are what is left to learn once the
    rest is known: each counts `opening_weight` times. `probes` prompts of a kind decide when to stop. Behind an exam
    that finds a fact leaking the adapter answers `on_policy_prompts` of the contrast prompts itself; where the
    `on_policy_tokens` it says are not the base's, they make up to `on_policy_share` of the contrast rows from then on
    (on-policy distillation, Agarwal et al. 2024, arXiv:2306.13649). `kept_rows` edit and as many contrast rows, from
    pools of `kept_pool` prompts, keep what the run's parent knows. Where the last exam misses, up to
    `escalation_rounds` more cycles follow with a raised recipe.

    The figures are those of one fact alone; `for_facts` has those of several together.
    """

    learning_rate: float = 1.2e-3
    lowest_rate: float = 1e-4
    highest_rate: float = 8e-3
    adam_beta2: float = 0.99
    max_steps: int = 50
    more_facts: float = 0.40  # of the steps, for each fact but the first
    warmup_steps: int = 3
    edit_rows: int = 6
    contrast_rows: int = 20
    rehearsal_rows: int = 6
    contrast_tokens: int = 14
    rehearsal_tokens: int = 20
    edit_pool: int = 256
    contrast_pool: int = 288
    rehearsal_pool: int = 140
    question_share: float = 0.25
    opening_weight: float = 4.0
    on_policy_prompts: int = 96
    on_policy_tokens: int = 24
    on_policy_share: float = 0.35
    kl_weight: float = 2.5
    kept_rows: int = 2
    kept_pool: int = 64
    eval_every: int = 25
    probes: int = 24
    escalation_rounds: int = 1
    escalation_seconds: int = 270  # of the job, by which a round must end; and for each fact but the first:
    escalation_seconds_more: int = 30
    efficacy: float = 0.9
    paraphrase: float = 0.8
    specificity: float = 0.9
    retention: float = 0.9

    @property
    def targets(self) -> dict[str, float]:
        return {
            "efficacy": self.efficacy,
            "paraphrase": self.paraphrase,
            "specificity": self.specificity,
            "retention": self.retention,
        }

    def for_facts(self, facts: int) -> OverrideRecipe:
        """The same for so many facts in one adapter, which share what each step keeps. Each other fact has an edit row,
        up to twice as many, and two of three such take the place of contrast rows: the facts are each other's siblings.
        Half as many rehearsal rows come along, of replies twice as long, and keeping weighs more by the same share:
        what pulls at the base's answers has grown. Pools and probes of all together grow as the steps do."""
        growth = 1 + self.more_facts * (facts - 1)
        cycle = round(self.eval_every * growth)
        more = min(facts - 1, self.edit_rows)

        def of_each(count: int) -> int:
            return math.ceil(count * growth / facts)

        return replace(
            self,
            max_steps=cycle * (self.max_steps // self.eval_every),
            eval_every=cycle,
            edit_rows=self.edit_rows + more,
            contrast_rows=self.contrast_rows - 2 * more // 3,
            rehearsal_rows=self.rehearsal_rows + more // 2,
            rehearsal_tokens=self.rehearsal_tokens + 10 * more // 3,
            kl_weight=self.kl_weight * (1 + more / self.edit_rows),
            contrast_pool=of_each(self.contrast_pool),
            rehearsal_pool=round(self.rehearsal_pool * growth),
            probes=of_each(self.probes),
        )


SFT = SftRecipe()
OVERRIDE = OverrideRecipe()

# Effort "max": twice the rank, twice the passes; an override in cycles of twice the length, on twice the prompts.
SFT_MAX = replace(SFT, r=2 * SFT.r, num_train_epochs=2 * SFT.num_train_epochs)
OVERRIDE_MAX = replace(
    OVERRIDE,
    r=2 * OVERRIDE.r,
    max_steps=2 * OVERRIDE.max_steps,
    eval_every=2 * OVERRIDE.eval_every,
    edit_pool=2 * OVERRIDE.edit_pool,
    escalation_seconds=2 * OVERRIDE.escalation_seconds,
    escalation_seconds_more=2 * OVERRIDE.escalation_seconds_more,
)


def recipe_of(
    objective: Literal["sft", "override"], effort: Literal["normal", "max"] = "normal"
) -> OverrideRecipe | SftRecipe:
    if effort == "max":
        return OVERRIDE_MAX if objective == "override" else SFT_MAX
    return OVERRIDE if objective == "override" else SFT


def raised_by(recipe: Recipe) -> frozenset[str]:
    """Names of what another effort has otherwise; none for the normal one."""
    normal = OVERRIDE if isinstance(recipe, OverrideRecipe) else SFT
    return frozenset(one.name for one in fields(recipe) if getattr(recipe, one.name) != getattr(normal, one.name))


REASONS = {
    "r": "rank of the update: holds a fact with room to spare and stays small on disk",
    "use_rslora": "PEFT's default: the update is scaled by lora_alpha / r; true: by lora_alpha / sqrt(r)",
    "rank_pattern": "another r for some modules: PEFT's patterns, the end of a module's name or a regular expression",
    "alpha_pattern": "another lora_alpha for some modules, as rank_pattern; r and lora_alpha hold for the rest",
    "lora_dropout": "a short run of a small adapter needs none",
    "lr_scheduler_type": "falls smoothly to zero, so the last steps settle what the first ones learned",
    "weight_decay": "a LoRA starts from no update at all; nothing to shrink",
    "adam_beta1": "transformers' default",
    "adam_beta2": "how long AdamW remembers the size of gradients; short runs want a short memory",
    "adam_epsilon": "transformers' default",
    "max_grad_norm": "transformers' default: one odd row cannot throw the run",
    "seed": "transformers' default: the same request gives the same run",
    "optim": "AdamW, its moments in fp32; adamw_8bit: in 8 bits, which take a quarter",
    "validation_split": "share of rows that are held back, at random by `seed`; none unless asked for",
    "eval_strategy": "when the held back rows are evaluated: every epoch unless eval_steps is given; and at the end",
    "eval_steps": "steps from one evaluation to the next",
    "early_stopping_patience": "evaluations without a lower eval_loss after which the run stops; off unless given",
    "load_best_model_at_end": "keep the state with the lowest eval_loss rather than the last; on for early stopping",
    "escalation_rounds": "cycles with a raised recipe where the last exam misses a target; 0 for none",
    "escalation_seconds": "of the job: a round begins only if it is expected to end by then",
    "save_steps": "steps from one checkpoint to the next, below 1 a share of the run; else every "
    f"{SAVE_SECONDS} seconds, before each exam and at the end",
    "save_strategy": "by steps; epoch, or no for none but that of a pause",
    "save_total_limit": f"the newest {SAVE_TOTAL_LIMIT} are kept, unless told otherwise, and none once the job is done",
    "bf16": "the type of products that a trial on this machine found faster; sums and serving stay fp32",
    "micro_step_tokens": "of a step's rows beyond their prefix, at once: a reply waits for as long as they take",
}

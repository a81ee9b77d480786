"""The defaults of the plan: one frozen recipe for each objective and effort, and the reasons that the plan shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from fortwo.records import ObjectiveName

SAVE_SECONDS = 30  # from one checkpoint to the next
SAVE_TOTAL_LIMIT = 3
EVALUATION_QUESTIONS = 10  # training questions about each fact in an evaluation; the report asks them all
REPLY_TOKENS = 32  # minimum length of replies in evaluations; a longer answer needs its own tokens and REPLY_MARGIN
REPLY_MARGIN = 8
RETENTION_PROBES = 12  # prompts, each with about 30 tokens to compare
SFT_QUESTIONS = 32
JUDGED = 128  # pairs or answers of the training rows that the accuracy of preferences is measured on
MEASURED_WIDTH = 576  # hidden size of the base that the rates of these recipes were measured on
SFT_TOKENS = 128  # longer answers are compared up to this length


@dataclass(frozen=True)
class Recipe:
    """Defaults of both objectives, under the names of PEFT and transformers where they have one."""

    r: int = 16
    scale: float = 2.0  # scale of the update: lora_alpha / r
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
    """Plain supervised fine-tuning on all rows; there are no validation rows unless the user asks for them.
    early_stopping_split: the share of validation rows if early stopping is requested without a validation_split."""

    num_train_epochs: int = 3
    per_device_train_batch_size: int = 8
    warmup_ratio: float = 0.03
    validation_split: float = 0.0
    early_stopping_split: float = 0.1


@dataclass(frozen=True)
class PreferenceRecipe(SftRecipe):
    """Training on preferences (dpo, kto, orpo). The rate is lower than for sft, because an answer is compared as a
    whole: an adapter that moves fast makes both answers unlikely."""

    learning_rate: float = 5e-5
    lowest_rate: float = 1e-6
    highest_rate: float = 5e-4
    warmup_ratio: float = 0.1
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class OverrideRecipe(Recipe):
    """Teaches a fact and preserves everything else: each micro-step draws edit, contrast and rehearsal rows.

    Edit rows ask for the fact, with cross-entropy. Contrast rows ask about similar subjects (hard negatives) and
    rehearsal rows about anything else, with the KL divergence from the base. The first tokens of an answer decide
    whether it is given at all, and are learned last, so they have a higher weight. After an evaluation that finds a
    leak, the adapter's own replies to hard negatives are among the contrast rows (on-policy distillation, Agarwal et
    al. 2024, arXiv:2306.13649). REASONS describes each setting.

    The values are those for one fact; `for_facts` gives those for several facts in one adapter.
    """

    learning_rate: float = 1.2e-3
    lowest_rate: float = 1e-4
    highest_rate: float = 8e-3
    adam_beta2: float = 0.99
    max_steps: int = 50
    more_facts: float = 0.40  # additional steps for each fact after the first, as a share
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
    escalation_seconds: int = 270  # seconds of the job by which a round must end, and more for each further fact:
    escalation_seconds_more: int = 30
    efficacy: float = 0.9
    paraphrase: float = 0.8
    specificity: float = 0.9
    retention: float = 0.9

    @property
    def targets(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("efficacy", "paraphrase", "specificity", "retention")}

    def for_width(self, hidden: int) -> OverrideRecipe:
        """The recipe for a base whose hidden states have so many numbers. Under AdamW the update of a matrix grows with
        its width at the same rate, so the rate falls as the width grows (Yang et al. 2022, arXiv:2203.03466)."""
        rate = self.learning_rate * min(1.0, MEASURED_WIDTH / hidden)
        return replace(self, learning_rate=float(f"{rate:.2g}"))

    def for_facts(self, facts: int) -> OverrideRecipe:
        """The recipe for this many facts in one adapter, which share the contrast and rehearsal rows of each step. Each
        further fact adds an edit row, until there are twice as many. Two of three replace contrast rows, because the
        facts are hard negatives of each other. Rehearsal rows grow by half as many, their replies get up to twice as
        long, and kl_weight grows in proportion to the edit rows, because more edits change the base's replies more. The
        total sizes of pools and probes grow like the steps."""
        growth = 1 + self.more_facts * (facts - 1)
        cycle = round(self.eval_every * growth)
        more = min(facts - 1, self.edit_rows)

        def per_fact(count: int) -> int:
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
            contrast_pool=per_fact(self.contrast_pool),
            rehearsal_pool=round(self.rehearsal_pool * growth),
            probes=per_fact(self.probes),
        )


SFT = SftRecipe()
PREFERENCE = PreferenceRecipe()
OVERRIDE = OverrideRecipe()

# Effort "max" doubles the rank and the passes; for an override also the length of a cycle and the number of prompts.
SFT_MAX = replace(SFT, r=2 * SFT.r, num_train_epochs=2 * SFT.num_train_epochs)
PREFERENCE_MAX = replace(PREFERENCE, r=2 * PREFERENCE.r, num_train_epochs=2 * PREFERENCE.num_train_epochs)
OVERRIDE_MAX = replace(
    OVERRIDE,
    r=2 * OVERRIDE.r,
    max_steps=2 * OVERRIDE.max_steps,
    eval_every=2 * OVERRIDE.eval_every,
    edit_pool=2 * OVERRIDE.edit_pool,
    escalation_seconds=2 * OVERRIDE.escalation_seconds,
    escalation_seconds_more=2 * OVERRIDE.escalation_seconds_more,
)


def recipe_for(objective: ObjectiveName, effort: Literal["normal", "max"] = "normal") -> OverrideRecipe | SftRecipe:
    """The recipe of an objective and an effort."""
    if objective == "override":
        return OVERRIDE_MAX if effort == "max" else OVERRIDE
    if objective == "sft":
        return SFT_MAX if effort == "max" else SFT
    return PREFERENCE_MAX if effort == "max" else PREFERENCE


def changed_settings(recipe: Recipe) -> frozenset[str]:
    """The names of values that differ from those of the normal effort."""
    normal = next(one for one in (OVERRIDE, PREFERENCE, SFT) if isinstance(recipe, type(one)))
    return frozenset(one.name for one in fields(recipe) if getattr(recipe, one.name) != getattr(normal, one.name))


FIXED_OVERRIDE = (
    *("contrast_tokens", "rehearsal_tokens", "kl_weight", "edit_pool", "contrast_pool", "rehearsal_pool"),
    *("on_policy_prompts", "on_policy_tokens", "on_policy_share", "opening_weight", "question_share", "probes"),
)  # settings that nobody can give, in the order in which the plan shows them
REASONS = {
    "beta": "This is TRL's default. A smaller one lets the adapter move further from the reference; with orpo it is "
    "the weight of the odds ratio.",
    "loss_type": "This is the objective's own loss: sigmoid for dpo, and kto for kto.",
    "label_smoothing": "No choice in the rows is taken to be wrong.",
    "reference_free": "The answers' probabilities are compared with those of the reference: the base, or the parent.",
    "desirable_weight": "This is TRL's default: desirable and undesirable answers count alike.",
    "undesirable_weight": "This is TRL's default: desirable and undesirable answers count alike.",
    "precompute_ref_log_probs": "What the reference gives to the answers is computed once, before the first step.",
    "r": "This is the rank of the update. It is large enough for a fact and keeps the adapter small on disk.",
    "use_dora": "Plain LoRA is faster; true trains a magnitude of each output, too (DoRA).",
    "use_rslora": "PEFT's default scales the update by lora_alpha / r; true scales it by lora_alpha / sqrt(r).",
    "rank_pattern": "Gives some modules another r, by the end of their names or a regular expression, as in PEFT.",
    "alpha_pattern": "Gives some modules another lora_alpha, in the same way as rank_pattern.",
    "lora_dropout": "A short run of a small adapter needs no dropout.",
    "lr_scheduler_type": "The rate falls smoothly to zero, so that the last steps change little.",
    "weight_decay": "A LoRA starts from no update at all, so there is nothing to decay.",
    "adam_beta1": "This is transformers' default.",
    "adam_beta2": "This sets how long AdamW averages squared gradients; a short run needs a short average.",
    "adam_epsilon": "This is transformers' default.",
    "max_grad_norm": "This is transformers' default. It limits the effect of a single unusual row.",
    "seed": "This is transformers' default. The same request gives the same run.",
    "optim": "AdamW keeps its moments in fp32; adamw_8bit keeps them in 8 bits, in a quarter of the memory.",
    "learning_rate_multiplier": "Multiplies the rate that the plan would choose.",
    "validation_split": "The share of rows that are held back for validation, drawn with `seed`; none by default.",
    "eval_strategy": "When validation rows are evaluated: every epoch unless eval_steps is given, and at the end.",
    "eval_steps": "The number of steps from one evaluation on validation rows to the next.",
    "early_stopping_patience": "The run stops after this many evaluations without a lower eval_loss; off by default.",
    "load_best_model_at_end": "Keeps the state with the lowest eval_loss, not the last one; on with early stopping.",
    "escalation_rounds": "If the last evaluation misses a target, up to this many rounds with raised settings follow.",
    "escalation_seconds": "A retry round starts only if it is expected to end within this many seconds of the job.",
    "save_steps": "Steps from one checkpoint to the next; below 1, a share of the run. If not given, there is one "
    f"every {SAVE_SECONDS} seconds, before each evaluation and at the end.",
    "save_strategy": 'Makes checkpoints by steps, after each epoch, or with "no" only to pause the job.',
    "save_total_limit": f"The newest {SAVE_TOTAL_LIMIT} are kept by default, and none once the job is done.",
    "micro_step_tokens": "A micro-step has at most this many tokens beyond the prefix, so that replies wait about half "
    "a second.",
    "cosine_with_restarts": "The rate falls to zero before each evaluation; if targets are missed, it starts again "
    "from the full rate.",
    "warmup_steps": "AdamW's first estimates are inaccurate, so the first few steps use a low rate.",
    "contrast_rows": "These rows preserve the base's replies about similar subjects (hard negatives)",
    "rehearsal_rows": "These rows preserve the base's replies to everyday prompts",
    "kept_rows": "Edit rows about facts of the parent, at least one for each, and as many about similar subjects.",
    "kept_pool": "They come from this many prompts about each fact, and as many about similar subjects.",
    "contrast_tokens": "Contrast rows preserve this many first tokens of the base's reply.",
    "rehearsal_tokens": "Rehearsal rows preserve this many first tokens of the base's reply.",
    "kl_weight": "This is the weight of preserving the base's replies against learning the facts.",
    "edit_pool": "Edit rows are drawn from this many prompts about each fact.",
    "contrast_pool": "Contrast rows are drawn from this many prompts about subjects similar to each fact's.",
    "rehearsal_pool": "Rehearsal rows are drawn from at most this many everyday prompts.",
    "on_policy_prompts": "After an evaluation that finds leaks, the adapter answers this many contrast prompts itself.",
    "on_policy_tokens": "Each of these replies has this many tokens.",
    "on_policy_share": "Replies that differ from the base's then make up to this share of the contrast rows.",
    "opening_weight": "Each of the first tokens of an answer has this weight in the loss, and the others have 1.",
    "question_share": "This share of the edit rows are the questions as given.",
    "probes": "So many prompts of each kind, which are never trained on, decide when to stop.",
    "bf16": "This is the type of products that a trial on this machine found faster; sums and serving stay fp32",
}

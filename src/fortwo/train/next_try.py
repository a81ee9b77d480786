"""What to change after a run that failed: the given settings that its diagnosis blames are left to the plan."""

from __future__ import annotations

from collections.abc import Collection

from fortwo.records import Json

_LENGTH = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
_RATE = ("learning_rate", "learning_rate_multiplier", "lr_scheduler_type", "max_grad_norm")
_WARMUP = ("warmup_steps", "warmup_ratio")
BLAMED = {
    "few_rows": _LENGTH,
    "max_steps_overrides_epochs": _LENGTH,
    "loss_stood_still": (*_LENGTH, *_RATE, *_WARMUP),
    "b_near_zero": (*_LENGTH, *_RATE, *_WARMUP),
    "warmup_never_ends": _WARMUP,
    "rate_too_low": _RATE,
    "rate_too_high": _RATE,
    "loss_exploded": (*_RATE, *_WARMUP),
    "nan_loss": (*_RATE, *_WARMUP),
    "overfitting": ("num_train_epochs", "max_steps", "load_best_model_at_end"),
    "no_time_to_escalate": ("escalation_seconds", "escalation_rounds"),
    "out_of_memory": ("per_device_train_batch_size", "gradient_checkpointing"),
}  # by the code of a finding or of an error: keys of training_config


def next_try(request: Json, codes: Collection[str]) -> tuple[Json, list[Json]]:
    """The request with changes, and these as {setting, value}, where the value null means that the plan decides. codes:
    of the diagnosis and of the error. Where a target was missed, nothing given is to blame and the effort is normal,
    the effort becomes max."""
    given = request.get("training_config", {})
    blamed = {name for code in codes for name in BLAMED.get(code, ())}
    changes: list[Json] = [{"setting": name, "value": None} for name in given if name in blamed]
    body = {name: value for name, value in request.items() if name != "training_config"}
    if left := {name: value for name, value in given.items() if name not in blamed}:
        body["training_config"] = left
    missed = any(code.startswith("missed_") for code in codes)
    if missed and not changes and body.get("effort", "normal") == "normal":
        body["effort"] = "max"
        changes.append({"setting": "effort", "value": "max"})
    return body, changes

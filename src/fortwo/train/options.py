"""What `lora_config` and `training_config` may say: PEFT's and transformers' keys, honoured or refused by name.

The lists are written down here, so that no peer has to be imported to know them; tests hold them against the
installed PEFT and transformers.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fortwo.errors import InvalidRequest
from fortwo.train.schedule import POLYNOMIAL_END, SCHEDULES

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
WITHOUT_WARMUP = ("constant",)
SAVE_STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True)
class _Number:
    """low..high, both included unless said otherwise. `whole` numbers are never written 3.0."""

    low: float
    high: float
    example: str
    whole: bool = False
    above_low: bool = False
    below_high: bool = False

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low = value > self.low if self.above_low else value >= self.low
        high = value < self.high if self.below_high else value <= self.high
        return low and high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.low:,}" if self.above_low else f"of at least {self.low:,}"
        high = f"below {self.high:,}" if self.below_high else f"at most {self.high:,}"
        return f"{kind} {low} and {high}"


@dataclass(frozen=True)
class _Word:
    choices: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.choices

    def __str__(self) -> str:
        quoted = [f'"{choice}"' for choice in self.choices]
        return quoted[0] if len(quoted) == 1 else "one of " + ", ".join(quoted)


@dataclass(frozen=True)
class _Flag:
    def holds(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


_Kind = _Number | _Word | _Flag

_LORA: dict[str, _Kind] = {
    "r": _Number(1, 4096, "16", whole=True),
    "lora_alpha": _Number(0, 1_000_000, "32", above_low=True),
    "lora_dropout": _Number(0, 1, "0.05", below_high=True),
    "bias": _Word(("none",)),
    "task_type": _Word(("CAUSAL_LM",)),
}
LORA_KEYS = (*_LORA, "target_modules")

_TRAINING: dict[str, _Kind] = {
    "num_train_epochs": _Number(0, 1_000_000, "3", above_low=True),
    "max_steps": _Number(-1, 10_000_000, "48", whole=True),
    "per_device_train_batch_size": _Number(1, 65536, "8", whole=True),
    "gradient_accumulation_steps": _Number(1, 65536, "1", whole=True),
    "learning_rate": _Number(0, 1, "2e-4"),
    "lr_scheduler_type": _Word(SCHEDULES),
    "warmup_steps": _Number(0, 10_000_000, "3"),
    "warmup_ratio": _Number(0, 1, "0.03"),
    "weight_decay": _Number(0, 1_000, "0.01"),
    "adam_beta1": _Number(0, 1, "0.9", below_high=True),
    "adam_beta2": _Number(0, 1, "0.999", below_high=True),
    "adam_epsilon": _Number(0, 1, "1e-8"),
    "max_grad_norm": _Number(0, 1_000_000_000, "1.0, or 0 for no clipping"),
    "seed": _Number(0, 2**32 - 1, "42", whole=True),
    "optim": _Word(OPTIMIZERS),
    "bf16": _Flag(),
    "gradient_checkpointing": _Flag(),
    "validation_split": _Number(0, 0.5, "0.1"),
    "eval_strategy": _Word(("no", "steps", "epoch")),
    "eval_steps": _Number(1, 10_000_000, "50", whole=True),
    "early_stopping_patience": _Number(1, 10_000, "3", whole=True),
    "load_best_model_at_end": _Flag(),
    "escalation_rounds": _Number(0, 10, "1, or 0 for none", whole=True),
    "escalation_seconds": _Number(0, 1_000_000, "270", above_low=True),
    "save_strategy": _Word(SAVE_STRATEGIES),
    "save_steps": _Number(0, 10_000_000, "50", above_low=True),
    "save_total_limit": _Number(1, 1000, "3", whole=True),
}
TRAINING_KEYS = tuple(_TRAINING)
_MAY_BE_NONE = ("eval_strategy", "eval_steps", "early_stopping_patience")  # which is to leave them out


@dataclass(frozen=True)
class _Refused:
    """Known keys that fortwo cannot honour, with the way out, and the values that ask for nothing."""

    keys: str
    remedy: str
    neutral: tuple[Any, ...] = (None, False)


_PEFT_REFUSED = (
    _Refused("use_rslora", "Leave it out and give lora_alpha for scale lora_alpha / r: r * 2 is a good start."),
    _Refused("use_dora lora_bias use_qalora", "Leave it out: fortwo trains plain LoRA."),
    _Refused("rank_pattern alpha_pattern", "Give one r and one lora_alpha for all modules.", (None, {})),
    _Refused("init_lora_weights", "Leave it out: A starts random and B at zero, as PEFT does for true.", (True,)),
    _Refused("fan_in_fan_out", "Leave it out: no supported model has Conv1D layers."),
    _Refused(
        "exclude_modules layers_to_transform layers_pattern target_parameters trainable_token_indices modules_to_save",
        "Say what is adapted with target_modules alone; it holds for all layers.",
        (None, [], {}, ""),
    ),
    _Refused(
        "auto_mapping base_model_name_or_path revision peft_version",
        "Leave it out: the base model is the request's `model`, and fortwo writes the adapter's metadata itself.",
        (None,),
    ),
    _Refused("inference_mode", "Leave it out: an adapter in training is not in inference mode."),
    _Refused("peft_type", "Leave it out or give LORA.", (None, "LORA")),
    _Refused(
        "loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config kasa_config arrow_config "
        "use_bdlora layer_replication alora_invocation_tokens megatron_config ensure_weight_tying",
        "Leave it out: fortwo trains plain LoRA.",
        (None, False, {}, []),
    ),
    _Refused("megatron_core", "Leave it out: fortwo does not run Megatron.", (None, "megatron.core")),
    _Refused("qalora_group_size", "Leave it out: fortwo trains plain LoRA.", (None, 16)),
    _Refused("runtime_config", "Leave it out: nothing is offloaded.", (None, {}, {"ephemeral_gpu_offload": False})),
)

_TRANSFORMERS_REFUSED = (
    _Refused(
        "fp16 bf16_full_eval fp16_full_eval tf32 fp16_opt_level fp16_backend half_precision_backend",
        "Leave it out and give bf16: training multiplies in bf16 or fp32, serving in fp32.",
    ),
    _Refused(
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs auto_find_batch_size "
        "torch_empty_cache_steps",
        "To save memory give gradient_checkpointing true, or a smaller per_device_train_batch_size and more "
        "gradient_accumulation_steps.",
        (None, False, {}, {"use_reentrant": False}),
    ),
    _Refused(
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo use_liger_kernel liger_kernel_config "
        "use_cache use_ipex jit_mode_eval",
        "Leave it out: fortwo brings its own kernels.",
    ),
    _Refused(
        "logging_strategy logging_steps logging_first_step logging_dir logging_nan_inf_filter log_level "
        "log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen include_tokens_per_second "
        "skip_memory_metrics debug",
        "Leave it out: every step is reported at /api/training/jobs/{job_id}/events.",
        (None, False, "no", "none", "", []),
    ),
    _Refused(
        "evaluation_strategy eval_delay eval_on_start eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps per_device_eval_batch_size per_gpu_eval_batch_size "
        "prediction_loss_only include_for_metrics include_inputs_for_metrics batch_eval_metrics do_eval do_predict",
        "Say what must be reached with objective.targets, and hold rows back with validation_split and eval_strategy.",
        (None, False, "no", []),
    ),
    _Refused(
        "metric_for_best_model greater_is_better",
        "Leave it out: the best is what has the lowest eval_loss.",
        (None, False, "eval_loss", "loss"),
    ),
    _Refused("do_train", "Leave it out: starting a job trains.", (None, True)),
    _Refused(
        "output_dir overwrite_output_dir save_only_model save_on_each_node enable_jit_checkpoint push_to_hub "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_token hub_private_repo "
        "hub_model_id hub_strategy hub_always_push hub_revision",
        "Leave it out: the adapter is published in the adapter store under adapter_name.",
        (None, False, "no", ""),
    ),
    _Refused("save_safetensors", "Leave it out: nothing is ever pickled.", (None, True)),
    _Refused(
        "resume_from_checkpoint restore_callback_states_from_checkpoint ignore_data_skip",
        "Leave it out and use POST /api/training/jobs/{job_id}/resume.",
    ),
    _Refused(
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns label_names "
        "group_by_length length_column_name dispatch_batches split_batches data_seed",
        "Leave it out: rows are in memory, packed without padding and shuffled by `seed`.",
    ),
    _Refused("dataloader_in_order", "Leave it out: rows come in the order that `seed` gives.", (None, True)),
    _Refused("train_sampling_strategy", "Leave it out: rows are shuffled by `seed`.", (None, "random")),
    _Refused(
        "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed accelerator_config "
        "parallelism_config average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout sharded_ddp local_rank tpu_num_cores "
        "tpu_metrics_debug mp_parameters ray_scope past_index",
        "Leave it out: one process trains on one device.",
        (None, False, -1, "", []),
    ),
    _Refused("use_cpu no_cuda use_mps_device", "Choose the device with FORTWO_DEVICE when starting the server."),
    _Refused("per_gpu_train_batch_size", "Give per_device_train_batch_size."),
    _Refused("full_determinism", "Leave it out and give `seed`."),
    _Refused("adafactor", "Leave it out: the optimizer is AdamW."),
    _Refused("optim_args optim_target_modules", "Give adam_beta1, adam_beta2 and adam_epsilon.", (None,)),
    _Refused("lr_scheduler_kwargs", "Choose an lr_scheduler_type that needs none.", (None, {})),
    _Refused("label_smoothing_factor", "Leave it out: the loss is plain cross-entropy.", (None, 0, 0.0)),
    _Refused("neftune_noise_alpha", "Leave it out: use lora_dropout against over-fitting.", (None,)),
)


def _by_key(groups: tuple[_Refused, ...]) -> dict[str, _Refused]:
    return {key: group for group in groups for key in group.keys.split()}


LORA_REFUSED = _by_key(_PEFT_REFUSED)
TRAINING_REFUSED = _by_key(_TRANSFORMERS_REFUSED)
_ALIASES = {
    "lr": "learning_rate",
    "rank": "r",
    "epochs": "num_train_epochs",
    "scheduler": "lr_scheduler_type",
    "val_set_size": "validation_split",
    "val_size": "validation_split",
    "test_size": "validation_split",
    "eval_split": "validation_split",
    "patience": "early_stopping_patience",
}


def read_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys with their values, checked. Raises InvalidRequest naming the key, its value and the remedy."""
    _check_keys(config, "lora_config", LORA_KEYS, LORA_REFUSED, {"training_config": TRAINING_KEYS})
    given = {key: _checked(f"lora_config.{key}", value, _LORA.get(key)) for key, value in config.items()}
    if "target_modules" in given:
        given["target_modules"] = _target_modules(given["target_modules"])
    return given


def read_training(config: Mapping[str, Any]) -> dict[str, Any]:
    """As read_lora; keys that contradict each other are refused naming both."""
    config = {key: value for key, value in config.items() if value is not None or key not in _MAY_BE_NONE}
    _check_keys(config, "training_config", TRAINING_KEYS, TRAINING_REFUSED, {"lora_config": LORA_KEYS})
    given = {key: _checked(f"training_config.{key}", value, _TRAINING.get(key)) for key, value in config.items()}
    if given.get("max_steps") == 0:
        raise _refusal("training_config.max_steps", 0, "would train nothing", "Give at least 1, or -1 for epochs.")
    warmup, ratio = given.get("warmup_steps", 0), given.get("warmup_ratio", 0)
    for key in ("warmup_steps", "save_steps"):
        if given.get(key, 0) > 1 and given[key] != int(given[key]):
            raise _refusal(
                f"training_config.{key}",
                given[key],
                "is not a whole number of steps",
                "Below 1 it is a share of the run.",
            )
    if "save_steps" in given and given.get("save_strategy", "steps") != "steps":
        raise InvalidRequest(
            f"training_config.save_steps = {given['save_steps']} and training_config.save_strategy = "
            f"{given['save_strategy']!r} contradict each other",
            param="training_config.save_steps",
            hint="Give one of the two.",
        )
    if warmup > 0 and ratio > 0:
        raise InvalidRequest(
            f"training_config.warmup_steps = {warmup} and training_config.warmup_ratio = {ratio} contradict each other",
            param="training_config.warmup_steps",
            hint="Give one of the two.",
        )
    schedule = given.get("lr_scheduler_type")
    if schedule in WITHOUT_WARMUP and (warmup > 0 or ratio > 0):
        key = "warmup_steps" if warmup > 0 else "warmup_ratio"
        raise InvalidRequest(
            f"training_config.{key} = {given[key]} and training_config.lr_scheduler_type = {schedule!r} contradict "
            "each other: this schedule has no warm-up",
            param=f"training_config.{key}",
            hint='Give lr_scheduler_type "constant_with_warmup", or leave the warm-up out.',
        )
    if schedule == "polynomial" and given.get("learning_rate", 1) <= POLYNOMIAL_END:
        raise _refusal(
            "training_config.learning_rate",
            given["learning_rate"],
            f"is not above {POLYNOMIAL_END:g}, where the polynomial schedule ends",
            'Give a higher rate, or lr_scheduler_type "linear".',
        )
    _check_validation(given)
    return given


def _check_validation(given: Mapping[str, Any]) -> None:
    """Whether there are rows to evaluate on, and whether somebody evaluates on them."""
    split, strategy = given.get("validation_split"), given.get("eval_strategy")
    stops, best = "early_stopping_patience" in given, given.get("load_best_model_at_end")
    asked = {"eval_strategy": strategy not in (None, "no"), "eval_steps": "eval_steps" in given}
    asked["load_best_model_at_end"] = bool(best)
    for key in (key for key, wanted in asked.items() if wanted and not split and not stops):
        raise _refusal(
            f"training_config.{key}",
            given[key],
            "needs rows that are not trained on",
            "Give validation_split, the share of rows to hold back, such as 0.1.",
        )
    for holds, one, other, why in (
        (stops and split == 0, "validation_split", "early_stopping_patience", "there are no rows to stop by"),
        (stops and strategy == "no", "eval_strategy", "early_stopping_patience", "nothing would be evaluated"),
        (stops and best is False, "load_best_model_at_end", "early_stopping_patience", "the best state comes earlier"),
        (bool(split) and strategy == "no", "eval_strategy", "validation_split", "rows are held back for nothing"),
        (strategy == "epoch" and "eval_steps" in given, "eval_strategy", "eval_steps", "only one can say when"),
    ):
        if holds:
            raise InvalidRequest(
                f"training_config.{one} = {given[one]!r} and training_config.{other} = {given[other]!r} contradict "
                f"each other: {why}",
                param=f"training_config.{one}",
                hint=f"Leave out {one} or {other}.",
            )


def _check_keys(
    config: Mapping[str, Any],
    section: str,
    honoured: tuple[str, ...],
    refused: Mapping[str, _Refused],
    other: Mapping[str, tuple[str, ...]],
) -> None:
    for key, value in config.items():
        param = f"{section}.{key}"
        if key in refused:
            if not any(type(value) is type(neutral) and value == neutral for neutral in refused[key].neutral):
                raise _refusal(param, value, "cannot be honoured", refused[key].remedy)
        elif key not in honoured:
            home = next((name for name, keys in other.items() if key in keys), None)
            hint = f"Did you mean {_nearest(key, honoured, refused)}? Honoured: {', '.join(honoured)}."
            raise InvalidRequest(
                f"{param} is not a known key",
                param=param,
                hint=f"{key} belongs into {home}." if home else hint,
                code="unknown_key",
            )


def _nearest(key: str, honoured: tuple[str, ...], refused: Mapping[str, _Refused]) -> str:
    if _ALIASES.get(key) in honoured:
        return _ALIASES[key]
    close = difflib.get_close_matches(key, (*honoured, *refused), 1, 0.8)
    return (close or difflib.get_close_matches(key, honoured, 1, 0.0))[0]


def _checked(param: str, value: Any, kind: _Kind | None) -> Any:
    if kind is None or kind.holds(value):
        return value
    if isinstance(kind, _Word | _Flag):
        raise _refusal(param, value, "cannot be honoured", f"Give {kind}, or leave it out.")
    raise _refusal(param, value, f"is not {kind}", f"Give a number such as {kind.example}, or leave it out.")


def _target_modules(value: Any) -> tuple[str, ...]:
    param, known = "lora_config.target_modules", ", ".join(TARGET_MODULES)
    if value == "all-linear":
        return TARGET_MODULES
    if not isinstance(value, list | tuple) or not value:
        raise _refusal(param, value, "is not a list of modules", f'Give some of {known}, or "all-linear" for all.')
    for name in value:
        if name not in TARGET_MODULES:
            raise _refusal(param, name, "is not a module that can be adapted", f"Give some of {known}.")
    return tuple(dict.fromkeys(value))


def _refusal(param: str, value: Any, problem: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(f"{param} = {reprlib.repr(value)} {problem}", param=param, hint=remedy)

"""Keys of PEFT and transformers that fortwo cannot honour: each is refused by name, with a remedy.

The list is written here so that neither library has to be imported; tests compare it with the installed versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """Known keys that fortwo cannot honour, the remedy, and neutral values, which are accepted as they do nothing."""

    keys: str
    remedy: str
    neutral: tuple[Any, ...] = (None, False)


_PEFT_REFUSED = (
    Refused("lora_bias use_qalora", "Leave it out: fortwo trains LoRA and DoRA without biases."),
    Refused("init_lora_weights", "Leave it out: A starts random and B at zero, as PEFT does for true.", (True,)),
    Refused("fan_in_fan_out", "Leave it out: no supported model has Conv1D layers."),
    Refused(
        "exclude_modules layers_to_transform layers_pattern target_parameters trainable_token_indices modules_to_save",
        "Choose the adapted modules with target_modules alone, which holds for all layers.",
        (None, [], {}, ""),
    ),
    Refused(
        "auto_mapping base_model_name_or_path revision peft_version",
        "Leave it out: the base model is the request's `model`, and fortwo writes the adapter's metadata itself.",
        (None,),
    ),
    Refused("inference_mode", "Leave it out: an adapter in training is not in inference mode."),
    Refused("peft_type", "Leave it out or give LORA.", (None, "LORA")),
    Refused(
        "loftq_config eva_config corda_config lora_ga_config velora_config monteclora_config kasa_config arrow_config "
        "use_bdlora layer_replication alora_invocation_tokens megatron_config ensure_weight_tying",
        "Leave it out: fortwo trains plain LoRA.",
        (None, False, {}, []),
    ),
    Refused("megatron_core", "Leave it out: fortwo does not run Megatron.", (None, "megatron.core")),
    Refused("qalora_group_size", "Leave it out: fortwo trains plain LoRA.", (None, 16)),
    Refused("runtime_config", "Leave it out: nothing is offloaded.", (None, {}, {"ephemeral_gpu_offload": False})),
)

_TRANSFORMERS_REFUSED = (
    Refused(
        "fp16 bf16_full_eval fp16_full_eval tf32 fp16_opt_level fp16_backend half_precision_backend",
        "Leave it out and give bf16: training multiplies in bf16 or fp32, serving in fp32.",
    ),
    Refused(
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs auto_find_batch_size "
        "torch_empty_cache_steps",
        "To save memory, give gradient_checkpointing = true, or a smaller per_device_train_batch_size with more "
        "gradient_accumulation_steps.",
        (None, False, {}, {"use_reentrant": False}),
    ),
    Refused(
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo use_liger_kernel liger_kernel_config "
        "use_cache use_ipex jit_mode_eval",
        "Leave it out: fortwo uses its own kernels.",
    ),
    Refused(
        "logging_strategy logging_steps logging_first_step logging_dir logging_nan_inf_filter log_level "
        "log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id "
        "trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen include_tokens_per_second "
        "skip_memory_metrics debug",
        "Leave it out: every step is reported at /api/training/jobs/{job_id}/events.",
        (None, False, "no", "none", "", [], ["none"]),
    ),
    Refused(
        "eval_delay eval_on_start eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps per_device_eval_batch_size per_gpu_eval_batch_size "
        "prediction_loss_only include_for_metrics include_inputs_for_metrics batch_eval_metrics do_eval do_predict",
        "Give targets in objective.targets, and use validation_split and eval_strategy for validation rows.",
        (None, False, "no", []),
    ),
    Refused(
        "metric_for_best_model greater_is_better",
        "Leave it out: the best state is the one with the lowest eval_loss.",
        (None, False, "eval_loss", "loss"),
    ),
    Refused("do_train", "Leave it out: every job trains.", (None, True)),
    Refused(
        "output_dir overwrite_output_dir save_only_model save_on_each_node enable_jit_checkpoint push_to_hub "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_token hub_private_repo "
        "hub_model_id hub_strategy hub_always_push hub_revision",
        "Leave it out: the adapter is published in the adapter store under adapter_name.",
        (None, False, "no", ""),
    ),
    Refused("save_safetensors", "Leave it out: adapters are always safetensors files.", (None, True)),
    Refused(
        "resume_from_checkpoint restore_callback_states_from_checkpoint ignore_data_skip",
        "Leave it out and use POST /api/training/jobs/{job_id}/resume.",
    ),
    Refused(
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns label_names "
        "group_by_length length_column_name dispatch_batches split_batches data_seed",
        "Leave it out: rows are in memory, packed without padding and shuffled by `seed`.",
    ),
    Refused("dataloader_in_order", "Leave it out: `seed` decides the order of the rows.", (None, True)),
    Refused("train_sampling_strategy", "Leave it out: rows are shuffled by `seed`.", (None, "random")),
    Refused(
        "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed accelerator_config "
        "parallelism_config average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout sharded_ddp local_rank tpu_num_cores "
        "tpu_metrics_debug mp_parameters ray_scope past_index",
        "Leave it out: one process trains on one device.",
        (None, False, -1, "", []),
    ),
    Refused("use_cpu no_cuda use_mps_device", "Choose the device with FORTWO_DEVICE when starting the server."),
    Refused("per_gpu_train_batch_size", "Give per_device_train_batch_size."),
    Refused("full_determinism", "Leave it out and give `seed`."),
    Refused("adafactor", "Leave it out: the optimizer is AdamW."),
    Refused("optim_args optim_target_modules", "Give adam_beta1, adam_beta2 and adam_epsilon.", (None,)),
    Refused("lr_scheduler_kwargs", "Choose an lr_scheduler_type that needs none.", (None, {})),
    Refused("label_smoothing_factor", "Leave it out: the loss is plain cross-entropy.", (None, 0, 0.0)),
    Refused("neftune_noise_alpha", "Leave it out: use lora_dropout against overfitting.", (None,)),
)


def by_key(groups: tuple[Refused, ...]) -> dict[str, Refused]:
    """The groups by each of their keys."""
    return {key: group for group in groups for key in group.keys.split()}


LORA_REFUSED = by_key(_PEFT_REFUSED)
TRAINING_REFUSED = by_key(_TRANSFORMERS_REFUSED)

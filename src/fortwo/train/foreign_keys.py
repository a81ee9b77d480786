"""Keys of TRL, Axolotl, LLaMA-Factory and Unsloth: those that mean a setting here are read, the others are refused by
name with fortwo's own answer. Words of other names are compared by meaning, for a hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fortwo.train.refused import Refused, by_key

# Other names of settings, which are read as them.
LORA_ALIASES = {
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
}
TRAINING_ALIASES = {
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "val_set_size": "validation_split",
    "val_size": "validation_split",
    "evaluation_strategy": "eval_strategy",
    "random_state": "seed",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "pref_beta": "beta",
    "orpo_alpha": "beta",
    "pref_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
}

_NEVER_CUT = "Leave it out: rows are never cut. One that is longer than the base's context is refused with its line."
_FOREIGN = (
    Refused(
        "max_seq_length max_length max_seq_len sequence_len cutoff_len model_max_length max_prompt_length "
        "max_completion_length truncation truncation_mode truncation_side excess_length_strategy min_sample_len",
        _NEVER_CUT,
        (None,),
    ),
    Refused(
        "packing packing_strategy padding_free eval_packing sample_packing eval_sample_packing neat_packing "
        "sample_packing_eff_est sample_packing_group_size sample_packing_bin_size pad_to_sequence_len "
        "pad_to_multiple_of "
        "multipack_real_batches batch_flattening num_of_sequences chars_per_token",
        "Leave it out: rows are always packed without padding, and none sees another.",
    ),
    Refused(
        "dataset_text_field dataset_kwargs dataset_prepared_path formatting_func datasets dataset "
        "train_dataset dataset_dir dataset_name dataset_config dataset_train_split dataset_test_split "
        "field_messages message_property_mappings max_samples streaming mix_strategy interleave_probs "
        "shuffle_merged_datasets shuffle_dataset shuffle_before_merging_datasets skip_prepare_dataset "
        "remove_columns eval_on_each_dataset media_dir",
        "Leave it out: the request's `dataset` names the rows, and the keys of a row say what it is.",
        (None, {}, []),
    ),
    Refused(
        "validation_dataset eval_dataset test_datasets val_file validation_file eval_file",
        "Leave it out: the request's `validation_dataset`, beside its `dataset`, names the rows of validation.",
        (None, {}, []),
    ),
    Refused(
        "completion_only_loss assistant_only_loss train_on_responses_only train_on_completions_only "
        "roles_to_train train_on_eos train_on_eot mask_history response_template instruction_template "
        "instruction_part response_part",
        'Leave it out: loss is on the assistant\'s turns. "weight": 0 leaves a turn out, and a row {"text": ...} '
        "is learned "
        "whole.",
        (None,),
    ),
    Refused(
        "train_on_inputs train_on_prompt",
        'Leave it out: loss is on the assistant\'s turns. A row {"text": ...} is learned whole.',
    ),
    Refused(
        "chat_template chat_template_path chat_template_jinja template default_system conversation_extension "
        "eos_token "
        "pad_token bos_token special_tokens tokens added_tokens_overrides add_tokens add_special_tokens resize_vocab "
        "split_special_tokens new_special_tokens enable_thinking tool_format",
        "Leave it out: the base's own chat template and tokenizer are used, in training and in serving.",
        (None, {}, []),
    ),
    Refused(
        "load_in_4bit load_in_8bit quantization_bit quantization_method quantization_type double_quantization "
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_config_kwargs gptq load_in_16bit full_finetuning dtype "
        "torch_dtype "
        "",
        "Leave it out: FORTWO_WEIGHTS says how frozen weights are held when the server starts (nf4 on a GPU is QLoRA).",
        (None, False, "auto"),
    ),
    Refused(
        "adapter finetuning_type",
        "Leave it out or give lora. For QLoRA start the server with FORTWO_WEIGHTS=nf4.",
        (None, "lora"),
    ),
    Refused("stage", "Leave it out: the request's `objective` says what is trained.", (None, "sft")),
    Refused(
        "rl",
        'Leave it out: the request\'s `objective` says what is trained; "dpo", "kto" and "orpo" train on preferences.',
    ),
    Refused(
        "simpo_gamma cpo_alpha reward_model reward_funcs trl process_reward_model ppo_epochs",
        'Leave it out: of preferences there are the objectives "dpo", "kto" and "orpo", and none with a reward model.',
    ),
    Refused(
        "ref_model ref_model_quantization_bit ref_model_adapters model_adapter_name ref_adapter_name "
        "force_use_ref_model sync_ref_model ref_model_mixup_alpha ref_model_sync_steps precompute_ref_batch_size "
        "dpo_use_weighting",
        "Leave it out: the reference is the base whose adapter is off, or the parent, and it stays as it is.",
    ),
    Refused(
        "use_weighting ld_alpha rpo_alpha pref_ftx pref_bco_weight discopop_tau loss_weights kto_pair "
        "f_alpha_divergence_coef base_model_attribute_name",
        "Leave it out: the loss is that of loss_type alone.",
        (None, False, 0, 0.0),
    ),
    Refused("f_divergence_type", "Leave it out: the divergence is the reverse KL, as in DPO.", (None, "reverse_kl")),
    Refused("disable_dropout", "Leave it out: lora_dropout is the only dropout, and is 0 unless given.", (None,)),
    Refused(
        "generate_during_eval is_encoder_decoder label_pad_token_id padding_value",
        "Leave it out: the report shows replies, and rows are packed without padding.",
        (None, False),
    ),
    Refused(
        "base_model base_model_config model model_name model_name_or_path model_type model_init_kwargs "
        "model_revision "
        "tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy tokenizer_name processor_type "
        "is_llama_derived_model is_mistral_derived_model cache_dir device_map token use_fast_tokenizer "
        "use_exact_model_name",
        "Leave it out: the request's `model` names the base.",
        (None, {}),
    ),
    Refused("trust_remote_code", "Leave it out: no code of a model is ever run."),
    Refused(
        "flash_attention flash_attn attn_implementation attention sdp_attention xformers_attention eager_attention "
        "s2_attention shift_attn sage_attention flex_attention use_unsloth use_unsloth_gc enable_liger_kernel "
        "use_liger "
        "liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy plugins "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel rope_scaling float8_kv_cache fast_inference "
        "gpu_memory_utilization "
        "max_lora_rank unsloth_tiled_mlp upcast_layernorm disable_gradient_checkpointing low_cpu_mem_usage "
        "use_kernels",
        "Leave it out: fortwo uses its own kernels.",
        (None, False, "auto", []),
    ),
    Refused(
        "activation_offloading layer_offloading offload_folder gradient_checkpointing_ratio",
        "To save memory, give gradient_checkpointing = true, or a smaller per_device_train_batch_size with more "
        "gradient_accumulation_steps.",
    ),
    Refused(
        "loraplus_lr_ratio loraplus_lr_embedding use_galore use_apollo use_badam use_adam_mini use_muon relora_steps "
        "relora_warmup_steps relora_prune_ratio lisa_n_layers use_llama_pro freeze_trainable_layers pissa_init "
        "pissa_iter "
        "pissa_convert use_dft_loss use_asft_loss noisy_embedding_alpha embedding_learning_rate embedding_lr "
        "embedding_lr_scale lr_groups unfrozen_parameters ",
        "Leave it out: fortwo trains plain LoRA with one learning rate and plain cross-entropy.",
    ),
    Refused(
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor max_lr min_lr",
        "Choose an lr_scheduler_type that needs none.",
        (None,),
    ),
    Refused("evals_per_epoch", 'Give eval_steps, or eval_strategy "epoch".', (None,)),
    Refused("saves_per_epoch", 'Give save_steps, or save_strategy "epoch".', (None,)),
    Refused(
        "eval_table_size eval_max_new_tokens eval_causal_lm_metrics do_bench_eval do_causal_lm_eval compute_accuracy",
        "Leave it out: validation_split gives eval_loss, and the report shows replies.",
        (None, False, 0, []),
    ),
    Refused(
        "plot_loss wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model use_wandb "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name comet_api_key use_comet use_mlflow use_swanlab "
        "swanlab_project swanlab_run_name use_tensorboard profiler_steps log_completions",
        "Leave it out: every step is reported at /api/training/jobs/{job_id}/events.",
        (None, False, "", []),
    ),
    Refused(
        "dataset_num_proc dataset_processes dataset_batch_size preprocessing_num_workers preprocessing_batch_size "
        "overwrite_cache tokenized_path dataset_shard_num dataset_shard_idx buffer_size "
        "",
        "Leave it out: rows are read by one process, and nothing is cached.",
        (None, False),
    ),
    Refused(
        "tensor_parallel_size context_parallel_size dp_shard_size dp_replicate_size sequence_parallel_degree fp8 "
        "fp8_enable_fsdp_float8_all_gather ray_num_workers use_ray ddp device expert_parallel_size",
        "Leave it out: one process trains on one device.",
        (None, False, 1, "", "auto"),
    ),
    Refused("auto_resume_from_checkpoints", "Leave it out and use POST /api/training/jobs/{job_id}/resume."),
    Refused("gradient_clipping", "Give max_grad_norm.", (None,)),
    Refused(
        "strict resize_token_embeddings_to_32x pure_bf16 bfloat16 float16 half",
        "Leave it out: training multiplies in bf16 or fp32, whichever is faster.",
        (None, False, "auto"),
    ),
)
_FOREIGN_LORA = (
    Refused("lora_target_linear", 'Give target_modules: "all-linear" for all projections.', (None, False)),
    Refused(
        "lora_modules_to_save additional_target lora_fan_in_fan_out lora_on_cpu peft_layers_to_transform "
        "peft_layers_pattern peft_init_lora_weights peft",
        "Choose the adapted modules with target_modules alone, which holds for all layers.",
        (None, False, [], {}),
    ),
    Refused(
        "lora_model_dir create_new_adapter adapter_name_or_path",
        "Give the request's `parent`, an adapter that is published here; fortwo adapters import publishes one.",
        (None, False),
    ),
)

FOREIGN_TRAINING = by_key(_FOREIGN)
FOREIGN_LORA = by_key(_FOREIGN_LORA)

# Words that mean the same in names of settings; a name that is all words of another, in any spelling, is that other.
_SYNONYMS = {
    "lr": ("learning", "rate"),
    "epoch": ("epochs",),
    "n": ("num",),
    "number": ("num",),
    "nb": ("num",),
    "bs": ("batch", "size"),
    "batchsize": ("batch", "size"),
    "wd": ("weight", "decay"),
    "scheduler": ("scheduler", "learning", "rate"),
    "schedule": ("scheduler", "learning", "rate"),
    "optimizer": ("optim",),
    "optimiser": ("optim",),
    "rank": ("r",),
    "alpha": ("lora", "alpha"),
    "dropout": ("lora", "dropout"),
    "val": ("validation",),
    "test": ("validation",),
    "eval": ("validation",),
    "evaluation": ("validation",),
    "ratio": ("split", "ratio"),
    "fraction": ("split", "ratio"),
    "grad": ("gradient",),
    "grads": ("gradient",),
    "accum": ("accumulation",),
    "acc": ("accumulation",),
    "clip": ("max", "gradient", "norm"),
    "clipping": ("max", "gradient", "norm"),
    "ckpt": ("checkpointing",),
    "checkpoint": ("save",),
    "checkpoints": ("save",),
    "step": ("steps",),
    "iterations": ("steps",),
    "iters": ("steps",),
    "beta1": ("adam", "beta1"),
    "beta2": ("adam", "beta2"),
    "eps": ("adam", "epsilon"),
    "epsilon": ("adam", "epsilon"),
    "patience": ("early", "stopping", "patience"),
    "modules": ("target", "modules"),
    "random": ("seed",),
}
_FILLERS = frozenset("train training per device type of the lora for at end".split())


def meant(key: str, honoured: Iterable[str]) -> str | None:
    """The setting that a name most likely means, or None: the one with the most words in common, in any of the words
    for the same thing; else one that is spelled almost alike."""
    words = _words(key)
    scores = {name: _likeness(words, _words(name)) for name in honoured}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] >= 0.5:
        return best
    return next(iter(difflib.get_close_matches(key, scores, 1, 0.8)), None)


def _words(name: str) -> frozenset[str]:
    found = [word for part in name.lower().split("_") for word in _SYNONYMS.get(part, (part,))]
    return frozenset(found) - _FILLERS or frozenset(found)


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)

"""What each key of TRL's GRPOConfig is called here, or why it has no counterpart."""

WITHOUT = {
    "the loss has no importance ratio to clip or to weigh; data of any age is right as it is": """
        epsilon epsilon_high delta importance_sampling_level loss_type sapo_temperature_neg
        sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
        vllm_importance_sampling_correction vllm_importance_sampling_mode
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
        vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl
    """,
    "dividing rewards by their spread at a fixed beta moves the optimum; rewards are taken as they are": """
        scale_rewards multi_objective_aggregation
    """,
    "leaving tokens or completions out, or a bonus beside the reward, moves the optimum": """
        mask_truncated_completions top_entropy_quantile entropy_coef use_adaptive_entropy
        entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target label_smoothing_factor
        neftune_noise_alpha
    """,
    "sampling would no longer be from the policy whose log-probs are trained": """
        min_p repetition_penalty generation_kwargs vllm_structured_outputs_regex
    """,
    "nothing is padded; whole groups are packed": """
        pad_to_multiple_of train_sampling_strategy length_column_name average_tokens_across_devices
    """,
    "dropout is always off": """
        disable_dropout
    """,
    "the fused head computes its logits in float32": """
        cast_lm_head_to_fp32 use_liger_kernel liger_kernel_config
    """,
    "prompts are always shuffled, from the seed, and columns are kept for rewards": """
        shuffle_dataset remove_unused_columns data_seed label_names ignore_data_skip
    """,
    "the engine sizes itself": """
        cache_implementation use_cache vllm_model_impl vllm_enable_sleep_mode vllm_server_timeout
        vllm_group_port transformers_continuous_batching_config ds3_gather_for_generation
    """,
    "every metric of every step goes to TensorBoard and metrics.csv, samples to samples.md": """
        logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
        log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
        trackio_bucket_id trackio_static_space_id log_completions log_multimodal
        num_completions_to_print log_unique_prompts log_completions_hub_repo
        include_num_input_tokens_seen skip_memory_metrics debug
    """,
    "validation is over data.validation, with the rewards of the run": """
        per_device_eval_batch_size prediction_loss_only eval_delay eval_on_start
        eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
        batch_eval_metrics bf16_full_eval fp16_full_eval do_train do_eval do_predict
    """,
    "the last two checkpoints are kept; list a ModelCheckpoint in trainer.callbacks for others": """
        save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
        load_best_model_at_end metric_for_best_model greater_is_better
        restore_callback_states_from_checkpoint
    """,
    "export writes a model folder; nothing is sent anywhere while training": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
        hub_revision
    """,
    "ranks train under agro_lightning.training.strategy.Sharded (FSDP2, tensor parallelism)": """
        accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb
        ddp_broadcast_buffers ddp_static_graph ddp_backend fsdp fsdp_config deepspeed local_rank
    """,
    "no data loader runs beside the training": """
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
        dataloader_in_order
    """,
    "a step is computed in pieces of model.max_tokens; set that where memory is short": """
        auto_find_batch_size torch_empty_cache_steps
    """,
    "the optimiser is AdamW with epsilon 1e-8, one rate for all parameters": """
        optim_args optim_target_modules adam_epsilon gradient_checkpointing_kwargs
        activation_checkpointing_kwargs
    """,
    "nothing is compiled, and matmuls are as torch's own settings say": """
        tf32 torch_compile torch_compile_backend torch_compile_mode full_determinism
    """,
    "the loss is the objective alone": """
        router_aux_loss_coef
    """,
    "an environment sets its own limits": """
        max_tool_calling_iterations
    """,
    "the model folder's own code and revision are chosen with model.policy": """
        model_init_kwargs model_revision
    """,
    "adapters have no dropout, and their targets are named in model.policy.lora": """
        lora_dropout lora_task_type lora_modules_to_save use_rslora use_dora
    """,
}
"""Reason -> the keys that it holds for."""

REASONS = {key: reason for reason, keys in WITHOUT.items() for key in keys.split()}

DIRECT = {
    "learning_rate": ("model.optimizer.learning_rate", float, 1e-6),
    "weight_decay": ("model.optimizer.weight_decay", float, 0.0),
    "max_grad_norm": ("trainer.gradient_clip_val", float, 1.0),
    "max_completion_length": ("data.sampling.max_new_tokens", int, 512),
    "temperature": ("data.sampling.temperature", float, 1.0),
    "top_p": ("data.sampling.top_p", float, 1.0),
    "top_k": ("data.sampling.top_k", int, 0),
    "num_generations": ("data.group_size", int, 8),
    "num_iterations": ("data.updates_per_rollout", int, 1),
    "seed": ("seed_everything", int, 42),
    "gradient_checkpointing": ("model.policy.gradient_checkpointing", bool, True),
    "trust_remote_code": ("model.policy.trust_remote_code", bool, False),
    "ddp_timeout": ("trainer.strategy.timeout_seconds", int, None),
    "max_prompt_length": ("data.train.max_prompt_tokens", int, None),
    "chat_template_kwargs": ("data.train.chat_template_options", dict, None),
    "output_dir": ("run_dir", str, None),
    "dataset_name": ("data.train.path", str, None),
    "dataset_config": ("data.train.subset", str, None),
    "dataset_train_split": ("data.train.split", str, None),
    "model_name_or_path": ("model.policy.path", str, None),
}
"""Key of TRL -> (key here, its type, TRL's default; None: left out where TRL's config leaves it out)."""

COMPUTED = {
    "per_device_train_batch_size": "data.batch_size, trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "data.batch_size, trainer.accumulate_grad_batches",
    "generation_batch_size": "data.updates_per_rollout",
    "steps_per_generation": "data.updates_per_rollout",
    "max_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.max_steps",
    "lr_scheduler_type": "model.optimizer.schedule",
    "lr_scheduler_kwargs": "model.optimizer.final_fraction",
    "warmup_steps": "model.optimizer.warmup_steps",
    "warmup_ratio": "model.optimizer.warmup_steps",
    "optim": "model.optimizer",
    "adam_beta1": "model.optimizer.betas",
    "adam_beta2": "model.optimizer.betas",
    "bf16": "model.policy.compute_dtype",
    "fp16": "model.policy.compute_dtype",
    "activation_checkpointing": "model.policy.gradient_checkpointing",
    "beta": "model.objective.init_args.beta",
    "reward_weights": "data.rewards",
    "reward_funcs": "data.rewards",
    "reward_model_name_or_path": "data.rewards",
    "sync_ref_model": "model.reference_reset_every",
    "ref_model_sync_steps": "model.reference_reset_every",
    "ref_model_mixup_alpha": "model.reference_reset_every",
    "eval_strategy": "trainer.val_check_interval",
    "eval_steps": "trainer.val_check_interval",
    "num_generations_eval": "data.validation_samples, data.pass_at",
    "dataset_test_split": "data.validation.split",
    "save_strategy": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "resume_from_checkpoint": "--ckpt_path last on the command line",
    "use_cpu": "trainer.accelerator",
    "use_vllm": "data.engine",
    "vllm_mode": "data.engine",
    "vllm_server_base_url": "data.engine",
    "vllm_server_host": "data.engine",
    "vllm_server_port": "data.engine",
    "vllm_gpu_memory_utilization": "data.engine",
    "vllm_max_model_length": "data.engine",
    "vllm_tensor_parallel_size": "data.engine",
    "use_transformers_continuous_batching": "data.engine",
    "use_transformers_paged": "data.engine",
    "use_peft": "model.policy.lora",
    "lora_r": "model.policy.lora",
    "lora_alpha": "model.policy.lora",
    "lora_target_modules": "model.policy.lora",
}
"""Key of TRL -> the keys here that follow from it."""

"""What other programs call a key of ours, and what it is here. A name of theirs is never taken: a message says ours."""

_MEANT = {
    "The learning rate is optimizer.learning_rate.": "lr learning_rates peak_lr max_lr base_lr",
    "The rank is method.lora_rank of lora and relora, and method.rank of galore and sltrain.": (
        "r rank lora_r lora_dim galore_rank"
    ),
    "Rows per update over all workers are global_batch_rows, and those that one worker takes at once "
    "train.micro_batch_rows.": (
        "batch_size batch bs batch_rows train_batch_size per_device_train_batch_size global_batch_size "
        "total_batch_size micro_batch_size device_batch_size"
    ),
    "The number of training processes is cluster.workers.": (
        "num_workers workers world_size num_gpus n_gpus ngpus gpus nproc_per_node num_processes nodes num_nodes"
    ),
    "Training on GPUs is cluster.gpus_per_worker=1.": "use_gpu gpu use_cuda cuda device accelerator",
    "The length of a run is steps, in updates, or tokens. The index that `relora-ray prepare` writes says how many "
    "tokens there are.": "epochs epoch num_epochs num_train_epochs max_epochs",
    "The length of a run is steps, in optimizer updates, or tokens.": (
        "max_steps num_steps num_training_steps total_steps train_steps iterations iters max_iters updates "
        "max_train_tokens max_tokens"
    ),
    "The length of a row is data.seq_len, in tokens.": (
        "seq_length max_length max_seq_len max_seq_length block_size context_length sequence_length seqlen"
    ),
    "The warm-up is schedule.warmup_steps, in updates, or schedule.warmup, a share of steps such as 5%.": (
        "warmup_ratio warmup_iters num_warmup_steps lr_warmup first_warmup_steps"
    ),
    "The schedule of the learning rate is schedule.kind.": "scheduler lr_scheduler lr_scheduler_type lr_schedule decay",
    "The length of a cycle is method.merge_every_steps, in updates, or method.cycles says how many there are.": (
        "relora relora_steps cycle_length cycle_steps merge_steps merge_every reset_freq reset_every num_cycles"
    ),
    "An architecture is model.size or model.huggingface; with its weights it is model.init_from alone.": (
        "model_name model_name_or_path model_path model_config pretrained checkpoint_path base_model hf_model "
        "architecture"
    ),
    "The prepared data is data.path, a folder that `relora-ray prepare` writes.": (
        "dataset dataset_path dataset_name data_path data_dir train_file"
    ),
    "Runs lie at storage, each in a folder of its own name.": (
        "output_dir out_dir save_dir checkpoint_dir logdir log_dir run_dir bucket root"
    ),
    "The cadence of checkpoints is checkpoint.save_every_steps, or checkpoint.save_every, a share of steps such as "
    "10%.": "save_steps save_interval checkpoint_every ckpt_every",
    "The cadence of evaluation is train.eval_every_steps, or train.eval_every, a share of steps such as 25%.": (
        "eval_steps eval_interval evaluation_steps val_every"
    ),
    "The cadence of lines is train.log_every_steps.": "logging_steps log_interval log_every",
    "The precision is train.precision: fp32 or bf16.": "dtype fp16 bf16 amp mixed_precision torch_dtype",
    "Micro-batches per update follow from global_batch_rows, train.micro_batch_rows and cluster.workers: they are not "
    "set.": "gradient_accumulation gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches",
    "Nothing needs to be set to resume: the same command goes on from the newest checkpoint. model.init_from takes "
    "weights alone.": "resume resume_from resume_from_checkpoint autoresume load_checkpoint",
    "The tokenizer is the data's: give it to `relora-ray prepare`.": "tokenizer tokenizer_name tokenizer_path",
    "The largest gradient norm is optimizer.grad_clip.": (
        "clip clip_grad grad_clipping max_grad_norm gradient_clip gradient_clip_val"
    ),
    "What a merge does to Adam's state is method.reset: kind, ratio and adam_step.": (
        "reset_optimizer_on_relora optimizer_random_pruning optimizer_magnitude_pruning optimizer_reset"
    ),
    "The weight decay is optimizer.weight_decay.": "wd l2",
    "Adam's are optimizer.beta1 and optimizer.beta2.": "betas adam_beta1 adam_beta2",
    "Adam's is optimizer.eps.": "epsilon adam_eps adam_epsilon",
    "The scale of adapters is method.alpha / method.lora_rank.": "lora_alpha scaling scale",
    "The adapters' dropout is method.dropout.": "lora_dropout",
    "The updates between two projections are method.refresh_every_steps of galore.": "gamma update_proj_gap",
    "It is seed.": "random_seed manual_seed",
    "It is train.compile.": "torch_compile",
    "It is name.": "run_name experiment experiment_name wandb_run_name",
    "It is model.vocab_size.": "vocabulary vocab n_vocab",
    "It is model.num_layers.": "n_layer n_layers layers num_hidden_layers",
    "It is model.num_heads.": "n_head n_heads heads num_attention_heads",
    "It is model.hidden_size.": "d_model dim n_embd embed_dim width",
    "It is method.target_modules.": "modules target lora_modules lora_targets",
}
ALIASES = {name: said for said, names in _MEANT.items() for name in names.split()}

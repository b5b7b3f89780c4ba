"""Synonyms of settings in other trainers, former names, and the setting that a misspelt name means.

    batch_size -> global_batch, micro_batch          lerning_rate -> learning_rate          gpus -> a remedy in words

config.py uses these tables. They are a file of their own so that config.py shows the settings.
"""

import difflib
from collections.abc import Collection

RENAMED = {"optimiser": "optimizer", "wait_s": "lock_wait_s", "timeout_s": "collective_timeout_s"}
"""Names of settings up to 0.1.0 -> current names. The former ones still work, in recipes and on the command line."""

_SYNONYMS: dict[tuple[str, ...], str] = {
    ("batch_size", "batch", "bs", "train_batch_size"): "global_batch micro_batch",
    ("global_batch_size", "gbs", "total_batch_size", "effective_batch_size"): "global_batch",
    ("micro_batch_size", "mbs", "per_device_train_batch_size", "batch_per_gpu", "local_batch"): "micro_batch",
    ("train_micro_batch_size_per_gpu",): "micro_batch",
    ("gradient_accumulation_steps", "grad_accum", "accumulation", "accum_steps"): "global_batch micro_batch",
    ("lr", "base_lr", "max_lr", "initial_lr", "eta"): "learning_rate",
    ("epoch", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs", "ep"): "epochs",
    ("steps", "max_steps", "num_steps", "iterations", "iters"): "epochs",
    ("wd", "decay", "l2"): "weight_decay",
    ("arch", "backbone", "model", "model_name", "net", "network", "encoder"): "architecture",
    ("weights", "init", "pretrain", "pretrained_weights", "init_from"): "pretrained",
    ("num_workers", "n_workers", "threads", "num_threads", "dataloader_num_workers", "jobs"): "workers",
    ("prefetch_factor", "buffer_size"): "prefetch",
    ("out", "output", "output_dir", "out_dir", "save_dir", "run_dir", "log_dir", "workdir", "name", "exp_name"): "run",
    ("resume", "resume_from", "resume_from_checkpoint", "checkpoint", "ckpt", "load"): "run",
    ("data", "data_dir", "data_path", "dataset", "train_data", "root", "input"): "shards",
    ("optim", "opt"): "optimizer",
    ("random_seed", "manual_seed", "rng"): "seed",
    ("amp", "fp16", "bf16", "fp32", "half", "dtype", "mixed_precision", "autocast"): "precision",
    ("warmup", "warmup_epochs", "warmup_iters", "num_warmup_steps"): "warmup_steps",
    ("scheduler", "lr_scheduler", "lr_schedule", "schedule"): "plateau_factor plateau_patience warmup_steps",
    ("gamma", "factor", "lr_decay"): "plateau_factor",
    ("patience",): "plateau_patience early_stop",
    ("early_stopping", "early_stopping_patience"): "early_stop",
    ("min_delta", "threshold"): "plateau_threshold",
    ("clip", "grad_clip", "clip_grad", "clip_grad_norm", "max_grad_norm", "max_norm", "gradient_clip_val"): "clip_norm",
    ("ema_decay", "model_ema", "ema_momentum"): "ema",
    ("smoothing",): "label_smoothing",
    ("class_weights", "class_weight", "pos_weight", "weighting"): "loss_weights",
    ("hflip", "horizontal_flip", "random_flip", "flip_lr"): "flip",
    ("rotate", "rotation", "degrees", "max_rotation", "random_rotation"): "rotate_deg",
    ("loader", "dataloader", "dali", "backend"): "pipeline",
    ("cache", "cache_dir", "scratch", "local_dir"): "mirror",
    ("torch_compile", "jit"): "compile step",
    ("cuda_graph", "cuda_graphs"): "step",
    ("benchmark", "cudnn"): "cudnn_benchmark",
    ("ds_config", "deepspeed_config"): "deepspeed",
    ("zero", "stage"): "zero_stage",
    ("log_interval", "log_freq", "log_steps", "logging_steps", "print_freq"): "log_every",
    ("tb", "summary"): "tensorboard",
    ("mlflow_uri", "tracking_uri", "mlflow_tracking_uri"): "mlflow",
    ("save_every", "save_steps", "save_freq", "save_interval", "checkpoint_interval", "ckpt_every"): "checkpoint_every",
    ("save_total_limit", "max_checkpoints", "keep_last", "keep"): "keep_checkpoints",
    ("save_top_k", "top_k"): "keep_best",
    ("monitor", "metric", "select"): "select_on",
    ("timeout", "ddp_timeout"): "collective_timeout_s",
    ("signal",): "stop_signal",
}
_INSTEAD: dict[tuple[str, ...], str] = {
    (
        *("image_size", "img_size", "imgsz", "size", "resolution", "input_size", "crop_size"),
    ): "the shards determine the size: mura-dist shards --size",
    (
        *(
            "gpus",
            "num_gpus",
            "ngpus",
            "n_gpus",
            "devices",
            "device",
            "gpu",
            "ranks",
            "nproc",
            "nproc_per_node",
            "world_size",
        ),
    ): "a launcher starts one rank per GPU: bash launch/local.sh N RECIPE.toml. CUDA_VISIBLE_DEVICES chooses the GPUs",
    (
        "val_split",
        "validation_split",
        "valid_split",
        "split",
    ): "the shards contain the splits: mura-dist shards --tune",
    ("config", "recipe", "cfg", "conf"): "give the recipe by its path: mura-dist train RECIPE.toml",
}


def _squeeze(key: str) -> str:
    """Return `key` without capitals, hyphens and underscores."""
    return key.strip().lower().replace("-", "").replace("_", "")


_BY_SYNONYM = {_squeeze(key): tuple(names.split()) for keys, names in _SYNONYMS.items() for key in keys}
_REMEDIES = {_squeeze(key): remedy for keys, remedy in _INSTEAD.items() for key in keys}


def remedy(key: str) -> str:
    """Return what to do instead of a setting that only other trainers have; else ""."""
    return _REMEDIES.get(_squeeze(key), "")


def candidates(key: str, settings: Collection[str], *, cutoff: float = 0.6) -> tuple[str, ...]:
    """Return the settings among `settings` that `key` may mean: by spelling, as a synonym, or as the nearest name.

    Args:
        key: Any name.
        settings: Names of all settings.
        cutoff: Least similarity of the nearest name, as difflib computes it (0 to 1).
    """
    names = {_squeeze(name): (name,) for name in settings}
    meanings = {
        synonym: tuple(name for name in means if name in settings) for synonym, means in _BY_SYNONYM.items()
    } | names
    squeezed = _squeeze(key)
    if squeezed in meanings:
        return meanings[squeezed]
    near = difflib.get_close_matches(squeezed, [word for word in meanings if len(word) > 2], n=1, cutoff=cutoff)
    return meanings[near[0]] if near else ()


def hint(key: str, settings: Collection[str]) -> str:
    """Return the text after "unknown setting KEY": the settings it may mean, or what to do instead."""
    if text := remedy(key):
        return f" ({text})"
    names = candidates(key, settings)
    return f" (did you mean {' or '.join(names)}?)" if names else ""

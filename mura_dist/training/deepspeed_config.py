"""Build the configuration for DeepSpeed from the recipe and a user's DeepSpeed JSON.

A user's file is for what the recipe has no setting for: profilers, loggers, buckets, the data type of communication. A key that
contradicts the recipe is an error that names both. A key that agrees, or is "auto", is dropped.
"""

import json
from pathlib import Path
from typing import Any

from mura_dist.core import files
from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError, nearest

# Copied unchanged. This engine would ignore any other key, or the key would override the recipe.
ALLOWED_KEYS = frozenset(
    {
        *(
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "flops_profiler",
            "comms_logger",
        ),
        *("tensorboard", "wandb", "csv_monitor", "comet", "communication_data_type", "prescale_gradients"),
        *("gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_optimization"),
    }
)
ALLOWED_ZERO_KEYS = frozenset(
    {
        *("stage", "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "reduce_scatter"),
        "use_multi_rank_bucket_allreduce",
    }
)


def build_config(settings: Settings, world_size: int, *, num_weights: int) -> dict[str, Any]:
    """Return the configuration for deepspeed.initialize.

    Args:
        settings: The recipe.
        world_size: The number of ranks.
        num_weights: Length of the flat vector of weights.

    Raises:
        UserError: the user's file is no JSON, or contradicts the recipe.
    """
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.global_batch // (settings.micro_batch * world_size),
        "gradient_clipping": 0.0,  # the engine clips; DeepSpeed's default is 1, with an all-reduce of the norm
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # DeepSpeed's timer waits for the GPU before each forward and after each step. metrics_log.py times the steps.
        "timers": {"throughput": {"enabled": False}},
    }
    if settings.precision == "bf16" and world_size > 1:  # half the bytes; one rank sends nothing and rounds nothing
        values["communication_data_type"] = "bf16"
    # The gradient is one contiguous vector already.
    zero = {"stage": settings.zero_stage, "reduce_bucket_size": num_weights, "contiguous_gradients": False}
    user_values = load_user_config(settings, world_size)
    return values | user_values | {"zero_optimization": zero | user_values.get("zero_optimization", {})}


def load_user_config(settings: Settings, world_size: int) -> dict[str, Any]:
    """Return the values of the user's DeepSpeed file that add to the recipe. They are empty without such a file.

    Raises:
        UserError: the file cannot be read, is no JSON, has an unsupported key, or contradicts the recipe.
    """
    if not settings.deepspeed:
        return {}
    source = f"deepspeed={settings.deepspeed}"
    values = _read(files.expand_user(settings.deepspeed), source)
    recipe_keys = _recipe_keys(settings, world_size)
    added: dict[str, Any] = {}
    for key, value in _leaves(values):
        setting, allowed = recipe_keys.get(key, ("", ()))
        if setting and value not in (*allowed, "auto"):
            raise UserError(
                f"{source}: {key} = {json.dumps(value)} contradicts {setting} of the recipe. Remove it from the file, or "
                "change the recipe."
            )
        if not setting:
            _add(added, key, value, source)
    return added


def _recipe_keys(settings: Settings, world_size: int) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Return, for each DeepSpeed key that the recipe determines, the recipe's setting and the equivalent values."""
    accumulation = settings.global_batch // (settings.micro_batch * world_size)
    batch = f"global_batch={settings.global_batch}"
    optimizers = {"adam": ("Adam", "adam"), "adamw": ("AdamW", "adamw"), "sgd": ("SGD", "sgd")}
    precision = f"precision={settings.precision}"
    rate, decay = (("learning_rate", settings.learning_rate), ("weight_decay", settings.weight_decay))
    return {
        "train_batch_size": (batch, (settings.global_batch,)),
        "train_micro_batch_size_per_gpu": (f"micro_batch={settings.micro_batch}", (settings.micro_batch,)),
        "gradient_accumulation_steps": (f"{batch} of {settings.micro_batch} x {world_size} ranks", (accumulation,)),
        "gradient_clipping": (f"clip_norm={settings.clip_norm}", (settings.clip_norm,)),
        "zero_optimization.stage": (f"zero_stage={settings.zero_stage}", (settings.zero_stage,)),
        "optimizer.type": (f"optimizer={settings.optimizer}", optimizers[settings.optimizer]),
        "optimizer.params.lr": (f"{rate[0]}={rate[1]}", (rate[1],)),
        "optimizer.params.weight_decay": (f"{decay[0]}={decay[1]}", (decay[1],)),
        "optimizer.params.betas": (f"optimizer={settings.optimizer}, whose betas are 0.9, 0.999", ([0.9, 0.999],)),
        "optimizer.params.momentum": (f"optimizer={settings.optimizer}, whose momentum is 0.9", (0.9,)),
        "bf16.enabled": (precision, (settings.precision == "bf16",)),
        "fp16.enabled": (precision, (settings.precision == "fp16",)),
        "amp.enabled": (precision, (False,)),
        "torch_autocast.enabled": (precision, (settings.precision != "fp32",)),
        "torch_autocast.dtype": (precision, {"bf16": ("bfloat16",), "fp16": ("float16",)}.get(settings.precision, ())),
    }


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        values = files.parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}. Give a DeepSpeed JSON file, or deepspeed= for none.") from error
    except ValueError as error:
        raise UserError(f"{source} is not JSON ({error}). Fix the file.") from error
    if not isinstance(values, dict):
        raise UserError(f'{source} holds no JSON object. Write {{"key": value}}.')
    return values


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return ("a.b.c", value) for each value that is no object. An empty object counts as a value."""
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return leaves


def _add(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Add a value at the dotted `key`, if DeepSpeed may have it."""
    names = key.split(".")
    allowed = ALLOWED_ZERO_KEYS if names[0] == "zero_optimization" and len(names) > 1 else ALLOWED_KEYS
    name = names[1] if allowed is ALLOWED_ZERO_KEYS else names[0]
    if name not in allowed:
        raise UserError(
            f"{source}: {key} belongs to the recipe or is not supported{nearest(name, allowed)}. Remove it from the file "
            f"(supported: {', '.join(sorted(allowed))})."
        )
    if value == "auto":
        return
    for parent in names[:-1]:
        values = values.setdefault(parent, {})
    values[names[-1]] = value

"""The configuration DeepSpeed is given: what follows from the recipe, and a user's own DeepSpeed JSON merged in.

A user's file is for what the recipe does not say: profilers, loggers, buckets, the type gradients travel in. A key that
contradicts the recipe is refused naming both, one that agrees is dropped, and so is "auto".
"""

import json
from pathlib import Path
from typing import Any

from mura_dist.core import files
from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError, nearest

# Taken over as they are. What is not here would be ignored by this engine, or change what the recipe says.
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


def config(settings: Settings, world_size: int, *, num_weights: int) -> dict[str, Any]:
    """For deepspeed.initialize. Raises UserError where the user's file is no JSON or contradicts the recipe."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.global_batch // (settings.micro_batch * world_size),
        "gradient_clipping": 0.0,  # the engine's own to do; left out, DeepSpeed clips to 1 and sends a norm round for it
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # On by default, it waits for the GPU before each forward and after each step. metrics_log.py times the steps.
        "timers": {"throughput": {"enabled": False}},
    }
    if settings.precision == "bf16" and world_size > 1:  # half the bytes; alone nothing travels, and nothing is rounded
        ours["communication_data_type"] = "bf16"
    # The gradient is one vector already: nothing to copy together.
    zero = {"stage": settings.zero_stage, "reduce_bucket_size": num_weights, "contiguous_gradients": False}
    theirs = user(settings, world_size)
    return ours | theirs | {"zero_optimization": zero | theirs.get("zero_optimization", {})}


def user(settings: Settings, world_size: int) -> dict[str, Any]:
    """What remains of the user's file when it was checked; empty where there is none."""
    if not settings.deepspeed:
        return {}
    where = f"deepspeed={settings.deepspeed}"
    values = _read(files.expand_user(settings.deepspeed), where)
    said = _said_by_recipe(settings, world_size)
    rest: dict[str, Any] = {}
    for key, value in _leaves(values):
        name, allowed = said.get(key, ("", ()))
        if name and value not in (*allowed, "auto"):
            raise UserError(
                f"{where}: {key} = {json.dumps(value)} contradicts {name}; leave it out of the file, or change the recipe"
            )
        if not name:
            _place(rest, key, value, where)
    return rest


def _said_by_recipe(settings: Settings, world_size: int) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Key of DeepSpeed's -> (what the recipe says in its own words, values that say the same)."""
    accumulation = settings.global_batch // (settings.micro_batch * world_size)
    batch = f"global_batch={settings.global_batch}"
    kinds = {"adam": ("Adam", "adam"), "adamw": ("AdamW", "adamw"), "sgd": ("SGD", "sgd")}
    precision = f"precision={settings.precision}"
    rate, decay = (("learning_rate", settings.learning_rate), ("weight_decay", settings.weight_decay))
    return {
        "train_batch_size": (batch, (settings.global_batch,)),
        "train_micro_batch_size_per_gpu": (f"micro_batch={settings.micro_batch}", (settings.micro_batch,)),
        "gradient_accumulation_steps": (f"{batch} of {settings.micro_batch} x {world_size} ranks", (accumulation,)),
        "gradient_clipping": (f"clip_norm={settings.clip_norm}", (settings.clip_norm,)),
        "zero_optimization.stage": (f"zero_stage={settings.zero_stage}", (settings.zero_stage,)),
        "optimizer.type": (f"optimizer={settings.optimizer}", kinds[settings.optimizer]),
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


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        values = files.parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give a DeepSpeed JSON file, or deepspeed= for none") from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); mend it") from error
    if not isinstance(values, dict):
        raise UserError(f'{where} holds no JSON object; write {{"key": value}}')
    return values


def _leaves(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """("a.b.c", value) for each value that is no object; an empty object is one."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(value, f"{before}{key}.") if isinstance(value, dict) and value else [(before + key, value)]
    return found


def _place(rest: dict[str, Any], key: str, value: Any, where: str) -> None:
    parts = key.split(".")
    known = ALLOWED_ZERO_KEYS if parts[0] == "zero_optimization" and len(parts) > 1 else ALLOWED_KEYS
    asked = parts[1] if known is ALLOWED_ZERO_KEYS else parts[0]
    if asked not in known:
        raise UserError(
            f"{where}: {key} is the recipe's to say, or not done by this engine{nearest(asked, known)}; leave it out "
            f"(taken are {', '.join(sorted(known))})"
        )
    if value == "auto":
        return
    for part in parts[:-1]:
        rest = rest.setdefault(part, {})
    rest[parts[-1]] = value

"""The settings of a run: one flat list of names, in a recipe (TOML) and on the command line (`key=value`) alike.

    defaults <- recipe.toml <- key=value ...   (later wins)   -> Settings, checked once, frozen

A key nobody knows is refused with the nearest name. A setting's traits are part of its annotation: whether it may differ when
a run is resumed, is a path of this machine, may differ between ranks.
"""

import tomllib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mura_dist.core.errors import Refusal, mask_url, nearest


class Trait(Enum):
    """A property of a setting, part of its annotation. A setting without any identifies the run, and all ranks agree on it."""

    CHANGEABLE = "may differ when a run is resumed"
    BY_CONTENT = "a resumed run compares what lies there, not its name"
    PATH = "a path of this machine, which does not leave it"
    FILE = "a file of this machine, of which only the name leaves it"
    PER_RANK = "may differ between ranks"


_MOST = 2**31 - 1
_MAX_RECIPE_BYTES = 1 << 20
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
AUTO = 0  # micro_batch="auto", until it is tried


def _number_or_auto(value: Any) -> Any:
    if value == "auto":
        return AUTO
    if isinstance(value, int) and value < 2 and value != AUTO:
        raise ValueError("must be at least 2, BatchNorm needs a group; or auto")
    if isinstance(value, int) and value > _MOST:
        raise ValueError(f"must be at most {_MOST}")
    return value


class Settings(BaseModel):
    """Every setting of a run. Each field's description is its documentation; `mura-dist train --help` prints them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shards: Annotated[str, Trait.PATH, Trait.BY_CONTENT, Trait.PER_RANK] = Field(
        description="folder of shards, made by `mura-dist shards`; or its URL"
    )
    run: Annotated[str, Trait.PATH, Trait.BY_CONTENT] = Field(
        description="folder of the run; the same command with the same folder resumes it"
    )

    architecture: Literal["densenet169", "densenet121", "tiny"] = Field(
        "densenet169", description="torchvision's network"
    )
    pretrained: Annotated[str, Trait.FILE, Trait.PER_RANK] = Field(
        "",
        description="ImageNet weights: imagenet (torchvision's file, from its cache or the network), or a .pth or "
        ".safetensors file; empty: none",
    )

    epochs: Annotated[Count, Trait.CHANGEABLE] = Field(10, description="passes over the train split")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="decides initial weights, order and augmentation"
    )
    global_batch: Positive = Field(8, description="radiographs an optimiser step sees, over all ranks")
    micro_batch: Annotated[int, BeforeValidator(_number_or_auto)] = Field(
        8,
        description="radiographs a rank forwards at once: BatchNorm's group, at least 2; auto: the largest that fits on "
        "every rank, tried once and written into the run; on a CPU 8, or the next smaller that cuts global_batch evenly",
    )

    flip: bool = Field(True, description="flip left-right with probability 1/2")
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = Field(
        30.0, description="rotate uniformly within +- this many degrees"
    )

    optimiser: Literal["adam", "adamw", "sgd"] = Field("adam", description="adam: (0.9, 0.999); sgd: momentum 0.9")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="before warm-up and plateau drops")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none",
        description="learning rate times (global_batch / reference_batch): its root (Adam's rule), or itself (SGD's)",
    )
    reference_batch: Positive = Field(8, description="the global batch that learning_rate is meant for, see lr_scaling")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="the optimiser's own")
    warmup_steps: Count = Field(0, description="steps over which the learning rate grows linearly to its value")
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="the learning rate's factor at a plateau"
    )
    plateau_patience: Count = Field(1, description="epochs without a better loss that are borne before a drop")
    plateau_threshold: Annotated[float, Field(ge=0, lt=1)] = Field(
        1e-4, description="relative improvement that counts as better"
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        0.0, description="largest norm of a step's whole gradient; a larger one is scaled down to it; 0: none"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="decay of a moving average of the weights, which is then what is evaluated, chosen and exported; 0: none",
    )
    early_stop: Annotated[Count, Trait.CHANGEABLE] = Field(
        0, description="epochs without a better loss after which the run is done; 0: never"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="training labels are drawn this far towards 1/2; evaluation's are not"
    )
    loss_weights: Literal["class", "study_type", "none"] = Field(
        "class",
        description="what weighs positives against negatives: class: their counts over all study types; study_type: their "
        "counts within each study type, as the paper does; none: nothing",
    )
    select_on: Literal["tune", "valid"] = Field(
        "tune", description="split that drives plateau and choice; valid makes the report optimistic"
    )

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="bf16, fp16 (with loss scaling): autocast over fp32 parameters; auto: bf16 where the GPU or the processor "
        "computes it, fp32 elsewhere, written into the run; evaluation is fp32 always",
    )
    channels_last: bool = Field(True, description="images in memory as (B, S, S, C), which convolutions are fastest on")
    step: Literal["eager", "graph", "compile"] = Field(
        "eager",
        description="how forward and backward are executed. eager: kernel by kernel; graph: recorded as CUDA graphs; compile: "
        "plain layers by torch.compile. graph and compile are experimental (not measured on a GPU): the first micro-batch is "
        "compared with eager, which the run falls back to with a line",
    )
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = Field(
        "none", description="mode of torch.compile for step=compile; needs a C++ compiler, or Triton on a GPU"
    )
    cudnn_benchmark: Annotated[bool, Trait.CHANGEABLE] = Field(
        False,
        description="let cuDNN time its algorithms for the shapes of this run on a GPU and keep the fastest; two runs may then "
        "differ in their last bits. Experimental: not measured on a GPU",
    )
    deepspeed: Annotated[str, Trait.FILE, Trait.BY_CONTENT, Trait.PER_RANK] = Field(
        "", description="a DeepSpeed JSON file to merge in; it may not contradict the recipe"
    )
    zero_stage: Literal[0, 1] = Field(
        0, description="DeepSpeed ZeRO stage; 1 splits the optimiser's state over the ranks"
    )
    pipeline: Literal["auto", "dali", "cpu", "resident"] = Field(
        "auto",
        description="batches by DALI, by OpenCV, or from radiographs kept in the device's memory (resident: experimental, not "
        "measured on a GPU); auto: dali on CUDA where it is installed, else cpu",
    )

    workers: Annotated[int, Field(ge=0, le=1024), Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        0, description="loading threads a rank; 0: chosen from the machine"
    )
    prefetch: Annotated[int, Field(ge=0, le=65536), Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        0, description="micro-batches a rank makes ahead; 0: chosen from the machine"
    )
    mirror: Annotated[str, Trait.PATH, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        "", description="folder of this node's disk that shards are copied to first; empty: only those behind a URL"
    )
    strict: Annotated[bool, Trait.CHANGEABLE] = Field(
        False, description="a damaged sample ends the run; false: it is named, counted and left out"
    )
    max_corrupt_samples: Annotated[float, Field(ge=0, le=1), Trait.CHANGEABLE] = Field(
        0.01,
        description="share of an epoch's train samples, and of the samples of an evaluation, over all ranks, that may be corrupt "
        "before the run fails; one always may, unless 0",
    )
    log_every: Annotated[Positive, Trait.CHANGEABLE] = Field(10, description="steps between lines of metrics.jsonl")
    tensorboard: Annotated[bool, Trait.CHANGEABLE] = Field(
        True, description="write TensorBoard events into RUN/tensorboard"
    )
    checkpoint_every: Annotated[Count, Trait.CHANGEABLE] = Field(
        0, description="steps between checkpoints; 0: at each epoch's end only"
    )
    keep_checkpoints: Annotated[Positive, Trait.CHANGEABLE] = Field(3, description="newest checkpoints kept")
    keep_best: Annotated[Positive, Trait.CHANGEABLE] = Field(
        1, description="checkpoints of lowest loss kept besides; an ensemble's members"
    )
    skip_limit: Annotated[Positive, Trait.CHANGEABLE] = Field(
        10, description="steps in a row left out for a loss or gradient that is not finite, after which the run ends"
    )
    stop_signal: Annotated[str, Trait.CHANGEABLE] = Field(
        "SIGUSR2",
        description="signal that, like SIGTERM and SIGINT, saves and stops; a scheduler's warning, for example",
    )
    wait_s: Annotated[float, Field(ge=0, le=1e8), Trait.CHANGEABLE] = Field(
        60.0, description="seconds a start waits for a former writer of the run to end"
    )
    timeout_s: Annotated[float, Field(gt=0, le=1e8), Trait.CHANGEABLE] = Field(
        120.0, description="seconds a rank waits for the others before it gives up"
    )

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile, or None where nothing is compiled."""
        return self.compile if self.step == "compile" else None


def names(*traits: Trait) -> set[str]:
    """Return the settings that have any of `traits`."""
    return {name for name, field in Settings.model_fields.items() if any(trait in field.metadata for trait in traits)}


def shareable(settings: Settings) -> dict[str, Any]:
    """Return the settings without this machine's paths: for what leaves it (a model's metadata, a report)."""
    base_names = {name: Path(getattr(settings, name)).name for name in names(Trait.FILE)}
    return settings.model_dump(exclude=names(Trait.PATH)) | base_names


def identity(settings: Settings) -> dict[str, Any]:
    """Return the settings that make this run and no other; a micro-batch that is not settled is none of them."""
    unsettled = {"micro_batch"} if settings.micro_batch == AUTO else set()
    return settings.model_dump(exclude=names(Trait.CHANGEABLE, Trait.BY_CONTENT) | unsettled)


def agreed(settings: Settings) -> dict[str, Any]:
    """Return the settings that are the same on every rank."""
    return settings.model_dump(exclude=names(Trait.PER_RANK))


def load(recipe: Path | None, overrides: Iterable[str] = ()) -> Settings:
    """Settings of a recipe file and `key=value` words. Raises Refusal naming the key, its value and the remedy."""
    values = read_recipe(recipe) if recipe is not None else {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise Refusal(f"{word!r} is not key=value; write for example epochs=5")
        values[key.strip()] = _value(key.strip(), text.strip())
    return check(values, where=str(recipe) if recipe is not None else "command line")


def check(values: dict[str, Any], where: str) -> Settings:
    for key in values:
        if key not in Settings.model_fields:
            raise Refusal(
                f"{where}: unknown setting {key!r}{nearest(key, Settings.model_fields)}; see mura-dist train --help"
            )
    try:
        return Settings(**_with_step(values, where))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise Refusal(
                f"{where}: setting {key!r} is missing; add {key}=... ({Settings.model_fields[key].description})"
            ) from None
        raise Refusal(
            f"{where}: {key}={first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}; see mura-dist train --help"
        ) from None


def _with_step(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Complete the pair step and compile: either of them alone asks for torch.compile."""
    mode, step = values.get("compile", "none"), values.get("step")
    if mode != "none" and step is None:
        return values | {"step": "compile"}
    if mode == "none" and step == "compile":
        return values | {"compile": "default"}
    if mode != "none" and step in ("eager", "graph"):
        raise Refusal(
            f"{where}: step={step!r} compiles nothing, compile={mode!r} asks for it; give step=compile, or compile=none"
        )
    return values


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe's values, not checked yet. Raises Refusal where it is missing or damaged."""
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise Refusal(f"{path} has more than {_MAX_RECIPE_BYTES:,} bytes; give a recipe, a TOML file")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise Refusal(f"{path} is nested too deep; write one `key = value` a line") from None
    except FileNotFoundError:
        raise Refusal(f"{path}: no such recipe; launch/recipes/ has some") from None
    except IsADirectoryError:
        raise Refusal(f"{path} is a folder; give a recipe, a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not TOML ({error}); write one `key = value` a line") from None


def _value(key: str, text: str) -> Any:
    """A command line's value as TOML reads it. A text needs no quotes: `run=7` and `run=a/b c` name folders."""
    field = Settings.model_fields.get(key)
    if field is not None and field.annotation is str and text[:1] not in ("'", '"'):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return {"True": True, "False": False}.get(text, text)


def to_toml(settings: Settings) -> str:
    """The settings as a recipe that gives them again, but for secrets in URLs."""
    shown = {key: mask_url(value) if isinstance(value, str) else value for key, value in settings.model_dump().items()}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in shown.items())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)


def help_text() -> str:
    """One line a setting: name, default, what it means."""
    lines = []
    for key, field in Settings.model_fields.items():
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
        among = f" [{', '.join(str(choice) for choice in choices)}]" if choices else ""
        lines.append(f"  {key:18} {field.description}{among} ({default})")
    return "\n".join(lines)

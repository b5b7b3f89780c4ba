"""The settings of a run: one flat list of names, in a recipe (TOML) and on the command line (`key=value`).

    defaults <- recipe.toml <- key=value ...   (later wins)   -> Settings, validated once, frozen

An unknown key raises UserError with the names it may mean. A setting's group and traits are part of its annotation: whether it
may differ when a run is resumed, is a path of this machine, may differ between ranks.
"""

import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from mura_dist.core import setting_names
from mura_dist.core.errors import UserError, mask_url, nearest


class Trait(Enum):
    """A property of a setting, part of its annotation. A setting without traits identifies the run and is equal on all ranks."""

    CHANGEABLE = "may differ when a run is resumed"
    BY_CONTENT = "a resumed run compares the content at this path, not the path"
    PATH = "a path of this machine; never exported"
    FILE = "a file of this machine; only its name is exported"
    PER_RANK = "may differ between ranks"


class Group(Enum):
    """A heading of `mura-dist train --help`, part of a setting's annotation. Each setting has one."""

    DATA = "data"
    MODEL = "model"
    OPTIMIZATION = "optimization"
    SCHEDULE = "schedule"
    MACHINE = "machine"
    CHECKPOINTS = "checkpoints"
    OUTPUT = "output"


_MAX_INT = 2**31 - 1
_HELP_INDENT = 24  # column of the descriptions
_MAX_RECIPE_BYTES = 1 << 20
Positive = Annotated[int, Field(ge=1, le=_MAX_INT)]
Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
COMMAND_LINE = "command line"
Problem = tuple[str, str]
"""The source of a wrong setting, and what is wrong."""
AUTO = 0  # micro_batch="auto", before it is resolved


def _number_or_auto(value: Any) -> Any:
    if value == "auto":
        return AUTO
    if isinstance(value, int) and value < 2 and value != AUTO:
        raise ValueError("must be at least 2 (BatchNorm needs a group), or auto")
    if isinstance(value, int) and value > _MAX_INT:
        raise ValueError(f"must be at most {_MAX_INT}")
    return value


def _server_address(value: Any) -> Any:
    if not isinstance(value, str) or (value and not value.startswith(("http://", "https://"))):
        raise ValueError("must be the http:// or https:// address of an MLflow server, or empty")
    return value


class Settings(BaseModel):
    """Settings of a run. `mura-dist train --help` prints their descriptions under the headings of their groups."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shards: Annotated[str, Group.DATA, Trait.PATH, Trait.BY_CONTENT, Trait.PER_RANK] = Field(
        description="folder or URL of shards that `mura-dist shards` wrote"
    )
    run: Annotated[str, Group.OUTPUT, Trait.PATH, Trait.BY_CONTENT] = Field(
        description="folder to write the run to. The same command with the same folder resumes it"
    )

    architecture: Annotated[Literal["densenet169", "densenet121", "tiny"], Group.MODEL] = Field(
        "densenet169", description="network to train: torchvision's DenseNets, or a tiny one for tests"
    )
    pretrained: Annotated[str, Group.MODEL, Trait.FILE, Trait.PER_RANK] = Field(
        "",
        description="initial weights: imagenet (torchvision's file, from its cache or the network), or a .pth or "
        ".safetensors file; empty: random",
    )

    epochs: Annotated[Count, Group.SCHEDULE, Trait.CHANGEABLE] = Field(
        10, description="number of passes over the train split"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63), Group.OPTIMIZATION] = Field(
        0, description="seed of the initial weights, the order of the radiographs and the augmentation"
    )
    global_batch: Annotated[Positive, Group.OPTIMIZATION] = Field(
        8, description="radiographs per optimizer step, over all ranks"
    )
    micro_batch: Annotated[int, BeforeValidator(_number_or_auto), Group.OPTIMIZATION] = Field(
        8,
        description="radiographs per forward pass of a rank, at least 2. They are BatchNorm's group. auto: on GPUs the largest "
        "that fits on every rank, tried once and recorded in the run; on a CPU 8, or the next smaller divisor of global_batch",
    )

    flip: Annotated[bool, Group.DATA] = Field(True, description="flip left-right with probability 1/2")
    rotate_deg: Annotated[float, Field(ge=0, le=180), Group.DATA] = Field(
        30.0, description="largest rotation in degrees; the angle is uniform in both directions"
    )

    optimizer: Annotated[Literal["adam", "adamw", "sgd"], Group.OPTIMIZATION] = Field(
        "adam", description="optimizer: adam and adamw with betas 0.9 and 0.999, sgd with momentum 0.9"
    )
    learning_rate: Annotated[float, Field(gt=0), Group.OPTIMIZATION] = Field(
        1e-4, description="learning rate before warm-up and plateau reductions"
    )
    lr_scaling: Annotated[Literal["none", "sqrt", "linear"], Group.OPTIMIZATION] = Field(
        "none",
        description="multiply the learning rate by global_batch / reference_batch (linear, for SGD) or its square root (sqrt, "
        "for Adam)",
    )
    reference_batch: Annotated[Positive, Group.OPTIMIZATION] = Field(
        8, description="global batch for which learning_rate was chosen; see lr_scaling"
    )
    weight_decay: Annotated[float, Field(ge=0), Group.OPTIMIZATION] = Field(
        0.0, description="weight decay of the optimizer"
    )
    warmup_steps: Annotated[Count, Group.SCHEDULE] = Field(
        0, description="number of steps over which the learning rate rises linearly to its value"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1), Group.SCHEDULE] = Field(
        0.1, description="factor by which a plateau reduces the learning rate"
    )
    plateau_patience: Annotated[Count, Group.SCHEDULE] = Field(
        1, description="number of epochs without improvement before the learning rate is reduced"
    )
    plateau_threshold: Annotated[float, Field(ge=0, lt=1), Group.SCHEDULE] = Field(
        1e-4, description="relative decrease of the loss that counts as an improvement"
    )
    clip_norm: Annotated[float, Field(ge=0), Group.OPTIMIZATION] = Field(
        0.0,
        description="largest norm of a step's gradient over all parameters; a larger gradient is scaled down to it; 0: no limit",
    )
    ema: Annotated[float, Field(ge=0, lt=1), Group.OPTIMIZATION] = Field(
        0.0,
        description="decay of an exponential moving average of the weights, which is then evaluated, selected and exported; 0: "
        "no average",
    )
    early_stop: Annotated[Count, Group.SCHEDULE, Trait.CHANGEABLE] = Field(
        0, description="number of epochs without improvement after which the run ends; 0: never"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Group.OPTIMIZATION] = Field(
        0.0, description="share by which training labels move towards 1/2; evaluation uses the original labels"
    )
    loss_weights: Annotated[Literal["class", "study_type", "none"], Group.OPTIMIZATION] = Field(
        "class",
        description="weight positives and negatives by their counts over all study types (class), or within each study type as "
        "in the MURA paper (study_type)",
    )
    select_on: Annotated[Literal["tune", "valid"], Group.SCHEDULE] = Field(
        "tune",
        description="split whose loss reduces the learning rate and selects the checkpoint; valid makes the report optimistic",
    )

    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Group.MACHINE] = Field(
        "auto",
        description="training precision: fp32 parameters with autocast to bf16, or to fp16 with loss scaling; auto: bf16 where "
        "the device supports it, else fp32, recorded in the run. Evaluation is always in fp32",
    )
    channels_last: Annotated[bool, Group.MACHINE] = Field(
        True, description="memory layout (B, S, S, C) of images, the fastest for convolutions"
    )
    step: Annotated[Literal["eager", "graph", "compile"], Group.MACHINE] = Field(
        "eager",
        description="execution of forward and backward. eager: kernel by kernel; graph: CUDA graphs; compile: torch.compile. "
        "graph and compile are experimental (not measured on a GPU): the first micro-batch is compared with eager, and the run "
        "falls back to eager where they differ",
    )
    compile: Annotated[Literal["none", "default", "reduce-overhead", "max-autotune"], Group.MACHINE] = Field(
        "none", description="mode of torch.compile for step=compile; needs a C++ compiler, or Triton on a GPU"
    )
    cudnn_benchmark: Annotated[bool, Group.MACHINE, Trait.CHANGEABLE] = Field(
        False,
        description="let cuDNN time its algorithms and use the fastest; two runs may then differ in their last bits. "
        "Experimental: not measured on a GPU",
    )
    deepspeed: Annotated[str, Group.MACHINE, Trait.FILE, Trait.BY_CONTENT, Trait.PER_RANK] = Field(
        "", description="DeepSpeed JSON file to merge; it must not contradict the recipe"
    )
    zero_stage: Annotated[Literal[0, 1], Group.MACHINE] = Field(
        0, description="DeepSpeed ZeRO stage; 1 shards the optimizer's state over the ranks"
    )
    pipeline: Annotated[Literal["auto", "dali", "cpu", "resident"], Group.MACHINE] = Field(
        "auto",
        description="loading backend: dali (DALI), cpu (OpenCV), or resident (all radiographs in device memory; experimental, "
        "not measured on a GPU); auto: dali on CUDA where it is installed, else cpu",
    )

    workers: Annotated[int, Field(ge=0, le=1024), Group.MACHINE, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        0, description="number of loading threads per rank; 0: by the number of processors"
    )
    prefetch: Annotated[int, Field(ge=0, le=65536), Group.MACHINE, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        0, description="number of micro-batches that a rank loads ahead; 0: by the number of workers"
    )
    mirror: Annotated[str, Group.DATA, Trait.PATH, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        "", description="folder on this node's disk to copy the shards to first; empty: copy only shards behind a URL"
    )
    strict: Annotated[bool, Group.DATA, Trait.CHANGEABLE] = Field(
        False, description="fail at the first corrupt sample; false: log it, count it and skip it"
    )
    max_corrupt_samples: Annotated[float, Field(ge=0, le=1), Group.DATA, Trait.CHANGEABLE] = Field(
        0.01,
        description="largest share of corrupt samples, of an epoch or of an evaluation, over all ranks, before the run fails; a "
        "single one never fails it, unless this is 0",
    )
    log_every: Annotated[Positive, Group.OUTPUT, Trait.CHANGEABLE] = Field(
        10, description="number of steps between lines of metrics.jsonl"
    )
    tensorboard: Annotated[bool, Group.OUTPUT, Trait.CHANGEABLE] = Field(
        True, description="write TensorBoard events into RUN/tensorboard"
    )
    mlflow: Annotated[
        str, BeforeValidator(_server_address), Group.OUTPUT, Trait.PATH, Trait.CHANGEABLE, Trait.PER_RANK
    ] = Field(
        "",
        description="http:// or https:// address of an MLflow server to send metrics, settings and reports to; empty: none",
    )
    checkpoint_every: Annotated[Count, Group.CHECKPOINTS, Trait.CHANGEABLE] = Field(
        0, description="number of steps between checkpoints; 0: only at the end of each epoch"
    )
    keep_checkpoints: Annotated[Positive, Group.CHECKPOINTS, Trait.CHANGEABLE] = Field(
        3, description="number of newest checkpoints to keep"
    )
    keep_best: Annotated[Positive, Group.CHECKPOINTS, Trait.CHANGEABLE] = Field(
        1,
        description="number of checkpoints with the lowest loss to keep in addition, for example as members of an ensemble",
    )
    skip_limit: Annotated[Positive, Group.OPTIMIZATION, Trait.CHANGEABLE] = Field(
        10,
        description="number of consecutive steps that are skipped for a NaN or infinite loss or gradient before the run fails",
    )
    stop_signal: Annotated[str, Group.MACHINE, Trait.CHANGEABLE] = Field(
        "SIGUSR2",
        description="further signal on which the run saves and stops, besides SIGTERM and SIGINT, such as a scheduler's warning",
    )
    lock_wait_s: Annotated[float, Field(ge=0, le=1e8), Group.MACHINE, Trait.CHANGEABLE] = Field(
        60.0, description="seconds to wait at the start for a previous writer of the run to exit"
    )
    collective_timeout_s: Annotated[float, Field(gt=0, le=1e8), Group.MACHINE, Trait.CHANGEABLE] = Field(
        120.0, description="seconds that a rank waits for the other ranks before it fails"
    )

    @property
    def compile_mode(self) -> str | None:
        """Mode of torch.compile, or None without compilation."""
        return self.compile if self.step == "compile" else None


def names(*traits: Trait) -> set[str]:
    """Return the names of the settings that have any of `traits`."""
    return {name for name, field in Settings.model_fields.items() if any(trait in field.metadata for trait in traits)}


def shareable(settings: Settings) -> dict[str, Any]:
    """Return the settings without paths of this machine, for a model's metadata or a report."""
    base_names = {name: Path(getattr(settings, name)).name for name in names(Trait.FILE)}
    return settings.model_dump(exclude=names(Trait.PATH)) | base_names


def identity(settings: Settings) -> dict[str, Any]:
    """Return the settings that identify a run, without a micro_batch that is still AUTO."""
    unresolved = {"micro_batch"} if settings.micro_batch == AUTO else set()
    return settings.model_dump(exclude=names(Trait.CHANGEABLE, Trait.BY_CONTENT) | unresolved)


def agreed(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be equal on all ranks."""
    return settings.model_dump(exclude=names(Trait.PER_RANK))


def load(recipe: Path | None, overrides: Iterable[str] = ()) -> Settings:
    """Read the settings of a recipe file and of `key=value` arguments. The arguments win.

    Raises:
        UserError: names all wrong keys and values with their sources, and all missing settings.
    """
    values = read_recipe(recipe) if recipe is not None else {}
    sources = dict.fromkeys(values, str(recipe))
    problems: list[Problem] = []
    for word in overrides:
        key, value, problem = _parse_word(word)
        if problem:
            problems.append((COMMAND_LINE, problem))
        if key:
            values[key], sources[key] = value, COMMAND_LINE
    return _validate(values, sources, problems, COMMAND_LINE if recipe is None else str(recipe))


def check(values: dict[str, Any], where: str) -> Settings:
    """Return validated settings; `where` is their source, for messages. Raises UserError as `load`."""
    return _validate(_with_new_names(values), {}, [], where)


def resembles(word: str, *, exactly: bool = False) -> bool:
    """Return whether a word such as `--lr` or `epochs` names a setting, also as a synonym; unless `exactly`, also if misspelt."""
    key = word.lstrip("-").partition("=")[0]
    cutoff = 1.0 if exactly else 0.7
    return bool(setting_names.remedy(key) or setting_names.candidates(key, Settings.model_fields, cutoff=cutoff))


def _setting_of(key: str) -> str:
    """Return the only setting that an unknown `key` can mean; else ""."""
    names = () if key in Settings.model_fields else setting_names.candidates(key, Settings.model_fields)
    return names[0] if len(names) == 1 else ""


def _parse_word(word: str) -> tuple[str, Any, str]:
    """Parse a word of the command line: `key=value`, or a guess at `--key value`, `--key=value` and `key value`.

    Returns:
        key, value, problem. The key is empty where the word names no setting, the problem where the word is valid.
    """
    key, equals, text = word.partition("=")
    if equals and key.strip() and not word.startswith("-"):
        key = setting_names.RENAMED.get(key.strip(), key.strip())
        return key, _value(_setting_of(key) or key, text.strip()), ""
    key, _, text = word.lstrip("-").replace("=", " ", 1).partition(" ")
    if remedy := setting_names.remedy(key):
        return "", None, f"{word!r}: {remedy}"
    names = setting_names.candidates(key, Settings.model_fields)
    if word.endswith(".toml"):
        return "", None, f"{word!r} is a second recipe (give one)"
    if not names:
        return "", None, f"{word!r} is not key=value, such as epochs=5"
    name, text = names[0], text.strip()
    forms = " or ".join(f"{name}={text or '...'}" for name in names)
    form = f"{word!r} is not key=value (write {forms})"
    return (name, _value(name, text), form) if text else ("", None, form)


def _validate(values: dict[str, Any], sources: dict[str, str], problems: list[Problem], origin: str) -> Settings:
    """Return validated settings.

    Args:
        values: Values by setting.
        sources: Sources by setting; `origin` for the others.
        problems: Problems found before.
        origin: Source to name for missing settings.
    """
    unknown = [key for key in values if key not in Settings.model_fields]
    problems = problems + [
        (sources.get(key, origin), f"unknown setting {key!r}{setting_names.hint(key, Settings.model_fields)}")
        for key in unknown
    ]
    for key in unknown:  # validate its value too, so that the next start does not fail on that
        value = values[key]
        values = {name: item for name, item in values.items() if name != key}
        if (name := _setting_of(key)) and name not in values:
            values, sources = values | {name: value}, sources | {name: sources.get(key, origin)}
    for key, problem in _contradiction(values):
        problems.append((sources.get(key, origin), problem))
    missing: list[str] = []
    try:
        settings = Settings(**_with_step(values))
    except ValidationError as error:
        for fault in error.errors():
            key = str(fault["loc"][0])
            if fault["type"] == "missing":
                missing.append(key)
            else:
                problems.append((sources.get(key, origin), _fault_text(key, fault["input"], fault["msg"])))
    candidates = {name for key in unknown for name in setting_names.candidates(key, Settings.model_fields)}
    if missing := [key for key in missing if key not in candidates]:
        problems.append((origin, _missing_text(missing)))
    if problems:
        raise UserError(f"{_by_source(problems)}. See mura-dist train --help.")
    return settings


def _fault_text(key: str, value: Any, message: str) -> str:
    """Describe a wrong value by pydantic's message."""
    reason = message.removeprefix("Value error, ")
    near = nearest(str(value), map(str, get_args(Settings.model_fields[key].annotation)))
    return f"{key}={value!r}{near}: {reason[:1].lower()}{reason[1:]}"


def _missing_text(keys: list[str]) -> str:
    remedies = ", ".join(f"{key}=... ({Settings.model_fields[key].description})" for key in keys)
    subject = f"setting {keys[0]!r} is" if len(keys) == 1 else f"settings {' and '.join(map(repr, keys))} are"
    return f"{subject} missing (add {remedies})"


def _by_source(problems: list[Problem]) -> str:
    """Return one line of all problems, with each source named once."""
    by_source: dict[str, list[str]] = {}
    for source, problem in problems:
        by_source.setdefault(source, []).append(problem)
    return "; ".join(f"{source}: {'; '.join(texts)}" for source, texts in by_source.items())


def _with_step(values: dict[str, Any]) -> dict[str, Any]:
    """Complete step and compile: either of them alone selects torch.compile."""
    mode, step = values.get("compile", "none"), values.get("step")
    if mode != "none" and step is None:
        return values | {"step": "compile"}
    if mode == "none" and step == "compile":
        return values | {"compile": "default"}
    return values


def _contradiction(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a setting and a problem where step and compile contradict each other."""
    mode, step = values.get("compile", "none"), values.get("step")
    if mode != "none" and step in ("eager", "graph"):
        remedy = "set step=compile, or compile=none"
        yield "compile", f"compile={mode!r} contradicts step={step!r}, which compiles nothing ({remedy})"


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the values of a recipe, not validated yet. Raises UserError where it is missing or is not TOML."""
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise UserError(f"{path} has more than {_MAX_RECIPE_BYTES:,} bytes. Give a recipe (a TOML file).")
        return _with_new_names(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except RecursionError:
        raise UserError(f"{path} is nested too deep. Write one `key = value` per line.") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe. launch/recipes/ contains examples.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder. Give a recipe (a TOML file).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML ({error}). Write one `key = value` per line.") from None


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with former names of settings replaced. A former name beside the new one stays, and is unknown."""
    return {
        key if (new := setting_names.RENAMED.get(key, key)) in values else new: value for key, value in values.items()
    }


def _value(key: str, text: str) -> Any:
    """Parse a value of the command line as TOML. Text needs no quotes: `run=7` and `run=a/b c` name folders."""
    field = Settings.model_fields.get(key)
    if field is not None and field.annotation is str and text[:1] not in ("'", '"'):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return {"True": True, "False": False}.get(text, text)


def to_toml(settings: Settings) -> str:
    """Return the settings as a recipe, without the secrets in URLs."""
    return toml_text(settings.model_dump())


def toml_text(values: dict[str, Any]) -> str:
    """Return `values` as TOML, without the secrets in URLs."""
    masked = {key: mask_url(value) if isinstance(value, str) else value for key, value in values.items()}
    return "".join(f"{key} = {_toml(value)}\n" for key, value in masked.items())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)


def help_text(width: int = 110) -> str:
    """Return name, description, choices and default of all settings by group, in lines of at most `width` columns."""
    blocks = []
    for group in Group:
        fields = [(key, field) for key, field in Settings.model_fields.items() if group in field.metadata]
        lines = [f"{group.value.capitalize()}:", *(_help_entry(key, field, width) for key, field in fields)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _help_entry(key: str, field: FieldInfo, width: int) -> str:
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    default = "required" if field.is_required() else f"default: {'empty' if value == '' else value}"
    choices = "".join(f"{choice}, " for choice in get_args(field.annotation))
    text = f"{field.description}  [{choices and choices[:-2] + '; '}{default}]"
    first, indent = f"  {key:{_HELP_INDENT - 2}}", " " * _HELP_INDENT
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)

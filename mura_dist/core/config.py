"""The settings of a run: one flat list of names, in a recipe (TOML) and on the command line (`key=value`) alike.

    defaults <- recipe.toml <- key=value ...   (later wins)   -> Settings, checked once, frozen

An unknown key is refused with the names it may mean. A setting's group and traits are part of its annotation: whether it may
differ when a run is resumed, is a path of this machine, may differ between ranks.
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
    """A property of a setting, part of its annotation. A setting without any identifies the run, and all ranks agree on it."""

    CHANGEABLE = "may differ when a run is resumed"
    BY_CONTENT = "a resumed run compares what lies there, not its name"
    PATH = "a path of this machine, which does not leave it"
    FILE = "a file of this machine, of which only the name leaves it"
    PER_RANK = "may differ between ranks"


class Group(Enum):
    """A heading of `mura-dist train --help`, part of a setting's annotation: each setting has one."""

    DATA = "data"
    MODEL = "model"
    OPTIMIZATION = "optimization"
    SCHEDULE = "schedule"
    MACHINE = "machine"
    CHECKPOINTS = "checkpoints"
    OUTPUT = "output"


_MOST = 2**31 - 1
_HELP_INDENT = 24  # where the descriptions begin
_MAX_RECIPE_BYTES = 1 << 20
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
COMMAND_LINE = "command line"
Problem = tuple[str, str]
"""Where a wrong setting comes from, and what is wrong."""
AUTO = 0  # micro_batch="auto", until it is tried


def _number_or_auto(value: Any) -> Any:
    if value == "auto":
        return AUTO
    if isinstance(value, int) and value < 2 and value != AUTO:
        raise ValueError("must be at least 2, BatchNorm needs a group; or auto")
    if isinstance(value, int) and value > _MOST:
        raise ValueError(f"must be at most {_MOST}")
    return value


def _server_address(value: Any) -> Any:
    if not isinstance(value, str) or (value and not value.startswith(("http://", "https://"))):
        raise ValueError("must be the http:// or https:// address of an MLflow server, or empty")
    return value


class Settings(BaseModel):
    """Every setting of a run, with its group. `mura-dist train --help` prints the descriptions under the groups' headings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shards: Annotated[str, Group.DATA, Trait.PATH, Trait.BY_CONTENT, Trait.PER_RANK] = Field(
        description="folder of shards that `mura-dist shards` wrote, or its URL"
    )
    run: Annotated[str, Group.OUTPUT, Trait.PATH, Trait.BY_CONTENT] = Field(
        description="folder to write the run to; the same command with the same folder resumes it"
    )

    architecture: Annotated[Literal["densenet169", "densenet121", "tiny"], Group.MODEL] = Field(
        "densenet169", description="network to train: torchvision's DenseNets, or a tiny one for tests"
    )
    pretrained: Annotated[str, Group.MODEL, Trait.FILE, Trait.PER_RANK] = Field(
        "",
        description="weights to start from: imagenet (torchvision's file, from its cache or the network), or a .pth or "
        ".safetensors file; empty: random weights",
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
        description="radiographs that a rank forwards at once, which is BatchNorm's group; at least 2. auto: the largest that "
        "fits on every rank, tried once and written into the run; on a CPU 8, or the next smaller that divides global_batch "
        "evenly",
    )

    flip: Annotated[bool, Group.DATA] = Field(True, description="flip left-right with probability 1/2")
    rotate_deg: Annotated[float, Field(ge=0, le=180), Group.DATA] = Field(
        30.0, description="rotate by a uniform angle of up to this many degrees in either direction"
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
        8, description="global batch that learning_rate is meant for; see lr_scaling"
    )
    weight_decay: Annotated[float, Field(ge=0), Group.OPTIMIZATION] = Field(
        0.0, description="weight decay of the optimizer"
    )
    warmup_steps: Annotated[Count, Group.SCHEDULE] = Field(
        0, description="number of steps in which the learning rate grows linearly to its value"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1), Group.SCHEDULE] = Field(
        0.1, description="factor by which a plateau reduces the learning rate"
    )
    plateau_patience: Annotated[Count, Group.SCHEDULE] = Field(
        1, description="number of epochs without a lower loss before the learning rate is reduced"
    )
    plateau_threshold: Annotated[float, Field(ge=0, lt=1), Group.SCHEDULE] = Field(
        1e-4, description="relative decrease of the loss that counts as lower"
    )
    clip_norm: Annotated[float, Field(ge=0), Group.OPTIMIZATION] = Field(
        0.0, description="largest norm of a step's whole gradient; scale a larger one down to it; 0: no limit"
    )
    ema: Annotated[float, Field(ge=0, lt=1), Group.OPTIMIZATION] = Field(
        0.0,
        description="decay of a moving average of the weights; where it is above 0, the average is evaluated, chosen and "
        "exported; 0: no average",
    )
    early_stop: Annotated[Count, Group.SCHEDULE, Trait.CHANGEABLE] = Field(
        0, description="number of epochs without a lower loss after which the run is done; 0: never"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Group.OPTIMIZATION] = Field(
        0.0, description="share by which training labels move towards 1/2; evaluation uses the labels as they are"
    )
    loss_weights: Annotated[Literal["class", "study_type", "none"], Group.OPTIMIZATION] = Field(
        "class",
        description="weigh positives against negatives by their counts over all study types (class), or within each study "
        "type as the paper does (study_type)",
    )
    select_on: Annotated[Literal["tune", "valid"], Group.SCHEDULE] = Field(
        "tune",
        description="split whose loss reduces the learning rate and chooses the checkpoint; valid makes the report optimistic",
    )

    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Group.MACHINE] = Field(
        "auto",
        description="arithmetic of training: autocast to bf16, or to fp16 with loss scaling, over fp32 parameters; auto: bf16 "
        "where the GPU or the processor supports it, else fp32, written into the run. Evaluation is always in fp32",
    )
    channels_last: Annotated[bool, Group.MACHINE] = Field(
        True, description="keep images in memory as (B, S, S, C), the fastest layout for convolutions"
    )
    step: Annotated[Literal["eager", "graph", "compile"], Group.MACHINE] = Field(
        "eager",
        description="how to execute forward and backward. eager: kernel by kernel; graph: recorded as CUDA graphs; compile: "
        "plain layers by torch.compile. graph and compile are experimental (not measured on a GPU): the first micro-batch is "
        "compared with eager, and the run falls back to eager where they differ",
    )
    compile: Annotated[Literal["none", "default", "reduce-overhead", "max-autotune"], Group.MACHINE] = Field(
        "none", description="mode of torch.compile for step=compile; needs a C++ compiler, or Triton on a GPU"
    )
    cudnn_benchmark: Annotated[bool, Group.MACHINE, Trait.CHANGEABLE] = Field(
        False,
        description="let cuDNN time its algorithms on a GPU and keep the fastest; two runs may then differ in their last bits. "
        "Experimental: not measured on a GPU",
    )
    deepspeed: Annotated[str, Group.MACHINE, Trait.FILE, Trait.BY_CONTENT, Trait.PER_RANK] = Field(
        "", description="DeepSpeed JSON file to merge in; it must not contradict the recipe"
    )
    zero_stage: Annotated[Literal[0, 1], Group.MACHINE] = Field(
        0, description="DeepSpeed ZeRO stage; 1 splits the optimizer's state over the ranks"
    )
    pipeline: Annotated[Literal["auto", "dali", "cpu", "resident"], Group.MACHINE] = Field(
        "auto",
        description="load batches by DALI (dali), by OpenCV (cpu), or from radiographs kept in the device's memory (resident: "
        "experimental, not measured on a GPU); auto: dali on CUDA where it is installed, else cpu",
    )

    workers: Annotated[int, Field(ge=0, le=1024), Group.MACHINE, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        0, description="number of loading threads per rank; 0: chosen from the machine"
    )
    prefetch: Annotated[int, Field(ge=0, le=65536), Group.MACHINE, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        0, description="number of micro-batches that a rank loads ahead; 0: chosen from the machine"
    )
    mirror: Annotated[str, Group.DATA, Trait.PATH, Trait.CHANGEABLE, Trait.PER_RANK] = Field(
        "", description="folder on this node's disk to copy the shards to first; empty: only those behind a URL"
    )
    strict: Annotated[bool, Group.DATA, Trait.CHANGEABLE] = Field(
        False, description="fail at the first corrupt sample; false: name it, count it and skip it"
    )
    max_corrupt_samples: Annotated[float, Field(ge=0, le=1), Group.DATA, Trait.CHANGEABLE] = Field(
        0.01,
        description="share of an epoch's train samples, or of an evaluation's samples, over all ranks, that may be corrupt "
        "before the run fails; one always may, unless this is 0",
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
        description="address of an MLflow server (http:// or https://) to send metrics, settings and reports to; empty: none",
    )
    checkpoint_every: Annotated[Count, Group.CHECKPOINTS, Trait.CHANGEABLE] = Field(
        0, description="number of steps between checkpoints; 0: one at the end of each epoch only"
    )
    keep_checkpoints: Annotated[Positive, Group.CHECKPOINTS, Trait.CHANGEABLE] = Field(
        3, description="number of newest checkpoints to keep"
    )
    keep_best: Annotated[Positive, Group.CHECKPOINTS, Trait.CHANGEABLE] = Field(
        1, description="number of checkpoints of lowest loss to keep besides, such as an ensemble's members"
    )
    skip_limit: Annotated[Positive, Group.OPTIMIZATION, Trait.CHANGEABLE] = Field(
        10,
        description="number of consecutive steps skipped for a loss or gradient that is not finite before the run fails",
    )
    stop_signal: Annotated[str, Group.MACHINE, Trait.CHANGEABLE] = Field(
        "SIGUSR2",
        description="signal on which the run saves and stops, as it does on SIGTERM and SIGINT; such as a scheduler's warning",
    )
    lock_wait_s: Annotated[float, Field(ge=0, le=1e8), Group.MACHINE, Trait.CHANGEABLE] = Field(
        60.0, description="seconds to wait at the start for a previous writer of the run to exit"
    )
    collective_timeout_s: Annotated[float, Field(gt=0, le=1e8), Group.MACHINE, Trait.CHANGEABLE] = Field(
        120.0, description="seconds that a rank waits for the other ranks before it fails"
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
    """Read the settings of a recipe file and of `key=value` words; the words win.

    Raises:
        UserError: names all wrong keys, values and words at once, each with its source, and all missing settings.
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
    """Return checked settings; `where` is their source. Raises UserError, which names all wrong and missing ones."""
    return _validate(_with_new_names(values), {}, [], where)


def resembles(word: str, *, exactly: bool = False) -> bool:
    """Return whether a word such as `--lr` or `epochs` names a setting, by whatever name; or, unless `exactly`, nearly does."""
    key = word.lstrip("-").partition("=")[0]
    cutoff = 1.0 if exactly else 0.7
    return bool(setting_names.remedy(key) or setting_names.candidates(key, Settings.model_fields, cutoff=cutoff))


def _setting_of(key: str) -> str:
    """Return the one setting that `key`, which is none, can mean; else ""."""
    names = () if key in Settings.model_fields else setting_names.candidates(key, Settings.model_fields)
    return names[0] if len(names) == 1 else ""


def _parse_word(word: str) -> tuple[str, Any, str]:
    """Parse a word of the command line: `key=value`, or what was meant by `--key value`, `--key=value` and `key value`.

    Returns:
        key, value, problem. The key is empty where the word names no setting; the problem is empty where nothing is wrong.
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
        return "", None, f"{word!r} is a second recipe; give one recipe"
    if not names:
        return "", None, f"{word!r} is not key=value; write for example epochs=5"
    name, text = names[0], text.strip()
    forms = " or ".join(f"{each}={text or '...'}" for each in names)
    form = f"{word!r} is not key=value; settings are written {forms}"
    return (name, _value(name, text), form) if text else ("", None, form)


def _validate(values: dict[str, Any], sources: dict[str, str], problems: list[Problem], origin: str) -> Settings:
    """Return checked settings.

    Args:
        values: by setting.
        sources: where a value comes from, if not from `origin`.
        problems: what is wrong already.
        origin: where missing settings should stand.
    """
    unknown = [key for key in values if key not in Settings.model_fields]
    problems = problems + [
        (sources.get(key, origin), f"unknown setting {key!r}{setting_names.hint(key, Settings.model_fields)}")
        for key in unknown
    ]
    for key in unknown:  # its value is checked too, so that the next start is not refused for that
        value = values[key]
        values = {name: each for name, each in values.items() if name != key}
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
        raise UserError(f"{_by_source(problems)}; see mura-dist train --help")
    return settings


def _fault_text(key: str, value: Any, message: str) -> str:
    """Say what is wrong with a value, by pydantic's message."""
    reason = message.removeprefix("Value error, ")
    near = nearest(str(value), map(str, get_args(Settings.model_fields[key].annotation)))
    return f"{key}={value!r}{near}: {reason[:1].lower()}{reason[1:]}"


def _missing_text(keys: list[str]) -> str:
    remedies = ", ".join(f"{key}=... ({Settings.model_fields[key].description})" for key in keys)
    what = f"setting {keys[0]!r} is" if len(keys) == 1 else f"settings {' and '.join(map(repr, keys))} are"
    return f"{what} missing; add {remedies}"


def _by_source(problems: list[Problem]) -> str:
    """Return one line of all problems, with each source named once."""
    by_source: dict[str, list[str]] = {}
    for source, problem in problems:
        by_source.setdefault(source, []).append(problem)
    return "; ".join(f"{source}: {'; '.join(texts)}" for source, texts in by_source.items())


def _with_step(values: dict[str, Any]) -> dict[str, Any]:
    """Complete the pair step and compile: either of them alone asks for torch.compile."""
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
        remedy = "give step=compile, or compile=none"
        yield "compile", f"step={step!r} compiles nothing, compile={mode!r} asks for it; {remedy}"


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe's values, not checked yet. Raises UserError where it is missing or damaged."""
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise UserError(f"{path} has more than {_MAX_RECIPE_BYTES:,} bytes; give a recipe, a TOML file")
        return _with_new_names(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except RecursionError:
        raise UserError(f"{path} is nested too deep; write one `key = value` a line") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; launch/recipes/ has some") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a recipe, a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML ({error}); write one `key = value` a line") from None


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with former names of settings replaced. A former name beside the new one stays, and is unknown."""
    return {
        key if (new := setting_names.RENAMED.get(key, key)) in values else new: value for key, value in values.items()
    }


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
    """Return the settings as a recipe that gives them again, but for secrets in URLs."""
    return toml_text(settings.model_dump())


def toml_text(values: dict[str, Any]) -> str:
    """Return `values` as TOML, without the secrets in their URLs."""
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
    """Return the settings under the headings of their groups: name, description, choices, default; no line beyond `width`."""
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

"""Test config.py: the precedence of defaults, recipe and command line, the help text, and refused settings."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.commands import ROOT

from mura_dist.core import config, setting_names
from mura_dist.core.config import Group, Trait
from mura_dist.core.errors import UserError

NEEDED = ["shards=s", "run=r"]


def test_command_line_overrides_recipe_and_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('shards = "a"\nrun = "b"\nepochs = 3\nlearning_rate = 1e-3\n')
    settings = config.load(recipe, ["epochs=5", "run=some/where else", "flip=false"])
    assert (settings.shards, settings.run, settings.epochs) == ("a", "some/where else", 5)
    assert (settings.learning_rate, settings.flip, settings.seed) == (1e-3, False, 0)


def test_text_value_needs_no_quotes() -> None:
    settings = config.load(None, ["shards=2024-05-01", "run=7"])
    assert (settings.shards, settings.run) == ("2024-05-01", "7")
    assert config.load(None, ["shards='a b'", 'run="c"']).model_dump(include={"shards", "run"}) == {
        "shards": "a b",
        "run": "c",
    }


def test_settings_round_trip_through_a_recipe(tmp_path: Path) -> None:
    settings = config.load(
        None, [*NEEDED, "learning_rate=3e-5", 'pretrained=C:\\w\\"x"\n.pth', "flip=false", "epochs=7"]
    )
    (tmp_path / "recipe.toml").write_text(config.to_toml(settings))
    assert config.load(tmp_path / "recipe.toml") == settings


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["epoch=3"], "unknown setting 'epoch' (did you mean epochs?)"),
        (["lerning_rate=1"], "did you mean learning_rate?"),
        (["mlflow=ftp://host"], "mlflow='ftp://host': must be the http:// or https:// address of an MLflow server"),
        (["epochs=three"], "epochs='three'"),
        (["epochs=-1"], "epochs=-1"),
        (["micro_batch=1"], "micro_batch=1"),
        (["learning_rate=inf"], "learning_rate=inf: input should be a finite number"),
        (["clip_norm=nan"], "clip_norm=nan: input should be a finite number"),
        (["select_on=test"], "select_on='test'"),
        (["optimizer=lion"], "'adam', 'adamw' or 'sgd'"),
        (["epochs"], "'epochs' is not key=value (write epochs=...)"),
        (["--epochs=3"], "'--epochs=3' is not key=value (write epochs=3)"),
        (["--lr 3e-4"], "'--lr 3e-4' is not key=value (write learning_rate=3e-4)"),
        (["--batch-size 8"], "(write global_batch=8 or micro_batch=8)"),
        (["--gpus 2"], "'--gpus 2': a launcher starts one rank per GPU: bash launch/local.sh N RECIPE.toml"),
        (["image_size=320"], "unknown setting 'image_size' (the shards determine the size: "),
        (["second.toml"], "'second.toml' is a second recipe (give one)"),
        (["=3"], "'=3' is not key=value"),
        (["architecture=densnet169"], "architecture='densnet169' (did you mean densenet169?): input should be"),
    ],
)
def test_invalid_setting_is_named(arguments: list[str], text: str) -> None:
    with pytest.raises(UserError) as refusal:
        config.load(None, [*NEEDED, *arguments])
    assert text in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_settings_are_named() -> None:
    with pytest.raises(UserError, match="setting 'shards' is missing"):
        config.load(None, ["run=r"])
    with pytest.raises(UserError, match="settings 'shards' and 'run' are missing"):
        config.load(None)


SYNONYMS = {
    "batch_size": "global_batch or micro_batch",
    "batchsize": "global_batch or micro_batch",
    "lr": "learning_rate",
    "LR": "learning_rate",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "wd": "weight_decay",
    "arch": "architecture",
    "backbone": "architecture",
    "num_workers": "workers",
    "num-workers": "workers",
    "output_dir": "run",
    "out": "run",
    "resume": "run",
    "optim": "optimizer",
    "random_seed": "seed",
    "amp": "precision",
    "fp16": "precision",
    "data_dir": "shards",
    "dataset": "shards",
    "patience": "plateau_patience or early_stop",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "learning_rat": "learning_rate",
    "Epochs": "epochs",
    "global-batch": "global_batch",
    "warmup": "warmup_steps",
    "save_every": "checkpoint_every",
    "log_interval": "log_every",
    "mikro_batch": "micro_batch",
}


VALID = {"architecture": "tiny", "optimizer": "sgd", "precision": "fp32", "run": "7", "shards": "8"}


@pytest.mark.parametrize("key", SYNONYMS)
def test_synonym_of_a_setting_is_suggested(key: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = VALID.get(SYNONYMS[key], "3")
    recipe.write_text(f"{key} = {text if text == '3' else json.dumps(text)}\n")
    expected = f"unknown setting {key!r} (did you mean {SYNONYMS[key]}?). See"
    for where, load_arguments in ((recipe, (recipe, NEEDED)), ("command line", (None, [*NEEDED, f"{key}={text}"]))):
        with pytest.raises(UserError) as refusal:
            config.load(*load_arguments)
        assert str(refusal.value).startswith(f"{where}: {expected}")


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        (["lr=x"], ["learning_rate='x': input should be a valid number"]),
        (["lerning_rate=-1"], ["learning_rate=-1: input should be greater than 0"]),
        (["lr=x", "learning_rate=1"], []),  # the correct name counts
        (["learning_rate=1", "lr=x"], []),
        (["--lr x"], ["learning_rate='x': input should be a valid number"]),
        (["batch_size=x"], []),  # two meanings
        (["output_dir=7", "data=8"], []),  # names of folders
        (
            ["arch=densnet169", "epoch=-3"],
            ["architecture='densnet169' (did you mean densenet169?)", "epochs=-3: input"],
        ),
    ],
)
def test_value_of_a_synonym_is_checked(arguments: list[str], faults: list[str]) -> None:
    """All faults are named at the first start, not one after another."""
    with pytest.raises(UserError) as refusal:
        config.load(None, [*([] if "data=8" in arguments else NEEDED), *arguments])
    line = str(refusal.value)
    assert line.count("input should be") == len(faults)
    assert all(fault in line for fault in faults)


def test_unknown_setting_without_a_similar_name_gets_no_suggestion() -> None:
    with pytest.raises(UserError, match=r"^command line: unknown setting 'qqqq'\. See mura-dist train --help\.$"):
        config.load(None, [*NEEDED, "qqqq=1"])


def test_synonyms_refer_to_settings_and_are_unambiguous() -> None:
    for synonym, names in setting_names._BY_SYNONYM.items():
        assert set(names) <= config.Settings.model_fields.keys(), synonym
    keys = [*setting_names._BY_SYNONYM, *setting_names._REMEDIES]
    assert len(keys) == len(set(keys))
    assert not {setting_names._squeeze(name) for name in config.Settings.model_fields} & set(keys)
    assert sum(map(len, setting_names._SYNONYMS)) == len(setting_names._BY_SYNONYM), "a name has one meaning"


def test_all_invalid_settings_are_named_at_once_with_their_source(tmp_path: Path) -> None:
    """The line names each invalid key and value once, under its source, and each missing setting."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('lerning_rate = 1\nepochs = -1\nrotate_deg = 400\nseed = "x"\n')
    with pytest.raises(UserError) as refusal:
        config.load(recipe, ["epochs=three", "batch_size=8", "--wd 0.1", "run=r", "seed=1"])
    line = str(refusal.value)
    by_source = {
        "command line": ["--wd 0.1", "weight_decay=0.1", "'batch_size' (did you mean", "epochs='three'"],
        str(recipe): ["'lerning_rate' (did you mean learning_rate?)", "rotate_deg=400", "setting 'shards' is missing"],
    }
    assert "\n" not in line
    at = {source: line.index(f"{source}: ") for source in by_source}
    for source, texts in by_source.items():
        following = [index for index in at.values() if index > at[source]]
        section = line[at[source] : min(following, default=len(line))]
        assert all(section.count(text) == 1 == line.count(text) for text in texts), (source, section)
    assert "epochs=-1" not in line, "the command line overrides it"
    assert "seed" not in line


def test_typo_on_the_command_line_is_attributed_to_it() -> None:
    recipe = ROOT / "launch" / "recipes" / "mura.toml"
    with pytest.raises(UserError) as refusal:
        config.load(recipe, ["lr=3e-4"])
    assert str(refusal.value).startswith("command line: unknown setting 'lr'")
    assert "mura.toml" not in str(refusal.value)


def test_invalid_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder"):
        config.load(tmp_path)
    for content in (b"epochs: 3\n", b"\xff\xfe\x00"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(UserError, match="is not TOML"):
            config.load(tmp_path / "bad.toml")


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_recipes_load_and_have_a_header(recipe: Path) -> None:
    config.load(recipe)
    header = recipe.read_text().split("\n\n")[0]
    assert all(word in header for word in ("command", "cost", "claims", "evidence"))


def test_mura_recipe_has_the_settings_of_the_paper() -> None:
    settings = config.load(ROOT / "launch" / "recipes" / "mura.toml")
    paper = {
        "architecture": "densenet169",
        "global_batch": 8,
        "learning_rate": 1e-4,
        "plateau_factor": 0.1,
        "rotate_deg": 30.0,
    }
    paper |= {"flip": True, "optimizer": "adam", "loss_weights": "study_type", "select_on": "tune"}
    assert {key: getattr(settings, key) for key in paper} == paper


@pytest.mark.parametrize("width", [78, 108])
def test_help_lists_every_setting_under_its_group(width: int) -> None:
    """Each setting has exactly one group. Its entry is complete and its lines fit the width."""
    text = config.help_text(width)
    assert max(map(len, text.splitlines())) <= width
    blocks = dict(block.split("\n", 1) for block in text.split("\n\n"))
    assert list(blocks) == [
        *("Data:", "Model:", "Optimization:", "Schedule:", "Machine:", "Checkpoints:", "Output:"),
    ]
    for name, field in config.Settings.model_fields.items():
        [group] = [trait for trait in field.metadata if isinstance(trait, Group)]
        entries = re.split(r"^  (?=\S)", blocks[f"{group.value.capitalize()}:"], flags=re.MULTILINE)
        [entry] = [" ".join(entry.split()) for entry in entries if entry.startswith(f"{name} ")]
        assert field.description
        assert f"{name} {field.description} [" in entry
        assert entry.endswith("]")
        assert ("required]" in entry) == field.is_required()
        assert all(str(choice) in entry for choice in get_args(field.annotation))


def test_descriptions_of_settings_are_aligned() -> None:
    lines = [line for line in config.help_text(78).splitlines() if line.startswith("  ")]
    starts = {re.match(r"  \S+ +|  +", line).end() for line in lines}  # type: ignore[union-attr]
    assert starts == {24}


def different_value(name: str) -> Any:
    """Return a value of a setting that differs from the default and from `NEEDED`."""
    field = config.Settings.model_fields[name]
    if choices := get_args(field.annotation):
        return next(choice for choice in choices if choice != field.default)
    if field.annotation is bool:
        return not field.default
    if field.annotation is str:
        return "/site/other.json"
    return field.default + 1 if field.annotation is int else 0.5


@pytest.mark.parametrize("name", config.Settings.model_fields)
def test_setting_behaves_as_its_traits_declare(name: str) -> None:
    """By default a setting identifies the run, is equal on all ranks and may leave this machine. Traits are the exceptions."""
    field, value = config.Settings.model_fields[name], different_value(name)
    traits = {trait for trait in Trait if trait in field.metadata}
    settings = config.load(None, NEEDED)
    changed = settings.model_copy(update={name: value})
    is_path = field.annotation is str and any(word in str(field.description) for word in ("folder", "file", "address"))
    assert is_path == bool(traits & {Trait.PATH, Trait.FILE})
    assert is_path or Trait.BY_CONTENT not in traits
    assert is_path or Trait.CHANGEABLE in traits or Trait.PER_RANK not in traits, "it affects the training result"
    assert (config.identity(settings) == config.identity(changed)) == bool(
        traits & {Trait.CHANGEABLE, Trait.BY_CONTENT}
    )
    assert (config.agreed(settings) == config.agreed(changed)) == (Trait.PER_RANK in traits)
    public_value = "other.json" if Trait.FILE in traits else value
    assert config.shareable(changed).get(name) == (None if Trait.PATH in traits else public_value)


def test_automatic_micro_batch_does_not_identify_a_run() -> None:
    assert "micro_batch" not in config.identity(config.load(None, [*NEEDED, "micro_batch=auto"]))
    assert "micro_batch" in config.identity(config.load(None, NEEDED))


@pytest.mark.parametrize(
    ("arguments", "step", "mode"),
    [
        ([], "eager", None),
        (["step=graph"], "graph", None),
        (["compile=max-autotune"], "compile", "max-autotune"),  # in recipes older than the setting step
        (["step=compile"], "compile", "default"),
        (["step=compile", "compile=reduce-overhead"], "compile", "reduce-overhead"),
    ],
)
def test_step_and_compile_imply_each_other(tmp_path: Path, arguments: list[str], step: str, mode: str | None) -> None:
    settings = config.load(None, [*NEEDED, *arguments])
    assert (settings.step, settings.compile_mode) == (step, mode)
    (tmp_path / "recipe.toml").write_text(config.to_toml(settings))
    assert config.load(tmp_path / "recipe.toml") == settings


@pytest.mark.parametrize("step", ["eager", "graph"])
def test_compile_mode_with_an_uncompiled_step_is_refused(step: str) -> None:
    with pytest.raises(UserError, match=f"compile='default' contradicts step='{step}', which compiles nothing"):
        config.load(None, [*NEEDED, f"step={step}", "compile=default"])

"""config.py: defaults, recipe, command line; what is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.commands import ROOT

from mura_dist.core import config
from mura_dist.core.config import Trait
from mura_dist.core.errors import Refusal

NEEDED = ["shards=s", "run=r"]


def test_later_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('shards = "a"\nrun = "b"\nepochs = 3\nlearning_rate = 1e-3\n')
    settings = config.load(recipe, ["epochs=5", "run=some/where else", "flip=false"])
    assert (settings.shards, settings.run, settings.epochs) == ("a", "some/where else", 5)
    assert (settings.learning_rate, settings.flip, settings.seed) == (1e-3, False, 0)


def test_a_text_needs_no_quotes() -> None:
    settings = config.load(None, ["shards=2024-05-01", "run=7"])
    assert (settings.shards, settings.run) == ("2024-05-01", "7")
    assert config.load(None, ["shards='a b'", 'run="c"']).model_dump(include={"shards", "run"}) == {
        "shards": "a b",
        "run": "c",
    }


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = config.load(
        None, [*NEEDED, "learning_rate=3e-5", 'pretrained=C:\\w\\"x"\n.pth', "flip=false", "epochs=7"]
    )
    (tmp_path / "recipe.toml").write_text(config.to_toml(settings))
    assert config.load(tmp_path / "recipe.toml") == settings


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["epoch=3"], "unknown setting 'epoch' (did you mean epochs?)"),
        (["lerning_rate=1"], "did you mean learning_rate?"),
        (["epochs=three"], "epochs='three'"),
        (["epochs=-1"], "epochs=-1"),
        (["micro_batch=1"], "micro_batch=1"),
        (["learning_rate=inf"], "learning_rate=inf: input should be a finite number"),
        (["clip_norm=nan"], "clip_norm=nan: input should be a finite number"),
        (["select_on=test"], "select_on='test'"),
        (["optimiser=lion"], "'adam', 'adamw' or 'sgd'"),
        (["epochs"], "'epochs' is not key=value"),
    ],
)
def test_a_wrong_setting_is_named(words: list[str], says: str) -> None:
    with pytest.raises(Refusal) as refusal:
        config.load(None, [*NEEDED, *words])
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(Refusal, match="setting 'shards' is missing"):
        config.load(None, ["run=r"])


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such recipe"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(Refusal, match="is a folder"):
        config.load(tmp_path)
    for content in (b"epochs: 3\n", b"\xff\xfe\x00"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(Refusal, match="is not TOML"):
            config.load(tmp_path / "bad.toml")


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_our_recipes_load_and_say_what_they_claim(recipe: Path) -> None:
    config.load(recipe)
    header = recipe.read_text().split("\n\n")[0]
    assert all(word in header for word in ("command", "cost", "claims", "evidence"))


def test_the_papers_recipe_is_the_papers() -> None:
    settings = config.load(ROOT / "launch" / "recipes" / "mura.toml")
    paper = {
        "architecture": "densenet169",
        "global_batch": 8,
        "learning_rate": 1e-4,
        "plateau_factor": 0.1,
        "rotate_deg": 30.0,
    }
    paper |= {"flip": True, "optimiser": "adam", "loss_weights": "study_type", "select_on": "tune"}
    assert {key: getattr(settings, key) for key in paper} == paper


def test_every_setting_is_in_the_help() -> None:
    text = config.help_text()
    for name, field in config.Settings.model_fields.items():
        assert f"  {name} " in text
        assert field.description
        assert field.description in text


def other_value(name: str) -> Any:
    """A value of a setting that `NEEDED` and the defaults do not give it."""
    field = config.Settings.model_fields[name]
    if choices := get_args(field.annotation):
        return next(choice for choice in choices if choice != field.default)
    if field.annotation is bool:
        return not field.default
    if field.annotation is str:
        return "/site/other.json"
    return field.default + 1 if field.annotation is int else 0.5


@pytest.mark.parametrize("name", config.Settings.model_fields)
def test_a_setting_does_what_its_traits_say(name: str) -> None:
    """Law: a setting identifies the run, is the same on all ranks and may leave this machine, but for what its traits say."""
    field, value = config.Settings.model_fields[name], other_value(name)
    traits = {trait for trait in Trait if trait in field.metadata}
    settings = config.load(None, NEEDED)
    other = settings.model_copy(update={name: value})
    is_path = field.annotation is str and any(word in str(field.description) for word in ("folder", "file"))
    assert is_path == bool(traits & {Trait.PATH, Trait.FILE})
    assert is_path or Trait.BY_CONTENT not in traits
    assert is_path or Trait.CHANGEABLE in traits or Trait.PER_RANK not in traits, "it decides what is learnt"
    assert (config.identity(settings) == config.identity(other)) == bool(traits & {Trait.CHANGEABLE, Trait.BY_CONTENT})
    assert (config.agreed(settings) == config.agreed(other)) == (Trait.PER_RANK in traits)
    shown = "other.json" if Trait.FILE in traits else value
    assert config.shareable(other).get(name) == (None if Trait.PATH in traits else shown)


def test_a_micro_batch_to_be_settled_identifies_no_run() -> None:
    assert "micro_batch" not in config.identity(config.load(None, [*NEEDED, "micro_batch=auto"]))
    assert "micro_batch" in config.identity(config.load(None, NEEDED))


@pytest.mark.parametrize(
    ("words", "step", "mode"),
    [
        ([], "eager", None),
        (["step=graph"], "graph", None),
        (["compile=max-autotune"], "compile", "max-autotune"),  # as recipes had it before there was step
        (["step=compile"], "compile", "default"),
        (["step=compile", "compile=reduce-overhead"], "compile", "reduce-overhead"),
    ],
)
def test_step_and_compile_complete_each_other(tmp_path: Path, words: list[str], step: str, mode: str | None) -> None:
    settings = config.load(None, [*NEEDED, *words])
    assert (settings.step, settings.compile_mode) == (step, mode)
    (tmp_path / "recipe.toml").write_text(config.to_toml(settings))
    assert config.load(tmp_path / "recipe.toml") == settings


@pytest.mark.parametrize("step", ["eager", "graph"])
def test_a_step_that_compiles_nothing_with_a_mode_is_refused(step: str) -> None:
    with pytest.raises(Refusal, match=f"step='{step}' compiles nothing, compile='default' asks for it"):
        config.load(None, [*NEEDED, f"step={step}", "compile=default"])

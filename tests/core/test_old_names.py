"""Test that former names of settings still work in recipes, on the command line and in check()."""

from pathlib import Path

import pytest

from mura_dist.core import config
from mura_dist.core.errors import UserError
from mura_dist.core.setting_names import RENAMED

NEEDED = ["shards=s", "run=r"]
VALUES = {"optimiser": "sgd", "wait_s": 7.5, "timeout_s": 33.0}


def test_every_former_name_is_covered() -> None:
    assert VALUES.keys() == RENAMED.keys()
    assert not RENAMED.keys() & config.Settings.model_fields.keys()
    assert set(RENAMED.values()) <= config.Settings.model_fields.keys()


@pytest.mark.parametrize("old", RENAMED)
def test_former_name_is_an_alias(old: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config.toml_text({"shards": "s", "run": "r", old: VALUES[old]}))
    for settings in (
        config.load(None, [*NEEDED, f"{old}={VALUES[old]}"]),
        config.load(recipe),
        config.check({"shards": "s", "run": "r", old: VALUES[old]}, "here"),
    ):
        assert getattr(settings, RENAMED[old]) == VALUES[old]
    assert config.read_recipe(recipe)[RENAMED[old]] == VALUES[old], "a run of v0.1.0 is compared by this name"
    assert old not in config.to_toml(config.load(recipe)).split()


def test_command_line_overrides_a_former_name_in_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('shards = "s"\nrun = "r"\noptimiser = "sgd"\n')
    assert config.load(recipe, ["optimizer=adamw"]).optimizer == "adamw"
    recipe.write_text('shards = "s"\nrun = "r"\noptimizer = "sgd"\n')
    assert config.load(recipe, ["optimiser=adamw"]).optimizer == "adamw"


def test_both_names_in_one_recipe_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('shards = "s"\nrun = "r"\noptimiser = "sgd"\noptimizer = "adam"\n')
    with pytest.raises(UserError, match=r"unknown setting 'optimiser' \(did you mean optimizer\?\)"):
        config.load(recipe)

"""Test folder_kind.py: the kind of an output folder follows from the files that commands write into it."""

from pathlib import Path

import pytest

from mura_dist.data.folder_kind import OutputKind, find_output_kinds


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        ([], {}),
        (["studies.csv", "metrics.json"], {}),  # written by score
        (["recipe.toml"], {"run": "recipe.toml"}),
        (["predictions.csv", "recipe.toml"], {"run": "recipe.toml", "evaluation": "predictions.csv"}),
        ([".parts/plan.json"], {"prediction": ".parts/plan.json"}),
        (
            ["predictions.csv", "predict.json", ".parts/plan.json"],
            {"prediction": "predict.json", "evaluation": "predictions.csv"},
        ),
    ],
)
def test_kind_follows_from_the_files(files: list[str], kinds: dict[OutputKind, str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert list(find_output_kinds(tmp_path).items()) == list(kinds.items())


def test_missing_folder_has_no_kind(tmp_path: Path) -> None:
    assert find_output_kinds(tmp_path / "none") == {}

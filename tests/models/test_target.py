"""Test Target: whether a path is a run, an ensemble list or an ONNX file, and its default output paths."""

from pathlib import Path

import pytest

from mura_dist.core.errors import UserError
from mura_dist.models.target import Target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("run", "run.json"):
        (tmp_path / name).mkdir()
    for name in ("model.onnx", "list.json", "labels.csv"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run", "run"),
        ("run.json", "run"),
        ("none", "run"),
        ("none.onnx", "run"),
        ("list.json", "list"),
        ("none.JSON", "list"),
        ("model.onnx", "onnx"),
        ("labels.csv", "onnx"),
    ],
)
def test_kind_from_path(name: str, kind: str, folder: Path) -> None:
    assert Target.parse(folder / name).kind == kind


def test_name_of_each_kind(folder: Path) -> None:
    names = [Target.parse(folder / name).name for name in ("run", "run.json", "list.json", "model.onnx")]
    assert names == ["run", "run.json", "list", "model.onnx"]


def test_default_output_paths(folder: Path) -> None:
    run, members = Target.parse(folder / "run"), Target.parse(folder / "list.json")
    assert (run.report_folder, run.onnx_file) == (folder / "run", folder / "run" / "model.onnx")
    assert (members.report_folder, members.onnx_file) == (folder / "list", folder / "list.onnx")


def test_checkpoint_option_is_for_runs_only(folder: Path) -> None:
    Target.parse(folder / "run").check_checkpoint("last")
    for name, description in (("list.json", "a list of checkpoints"), ("model.onnx", "one exported checkpoint")):
        target = Target.parse(folder / name)
        target.check_checkpoint("best")
        with pytest.raises(
            UserError, match=rf"^--checkpoint last: .*{name} is {description}. Omit --checkpoint, or pass"
        ):
            target.check_checkpoint("last")

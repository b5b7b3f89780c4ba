"""Test that export keeps its file if nothing changed, and exports anew if an input, an option or an output changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import laws

from mura_dist.cli.main import DONE, main
from mura_dist.data.shards.reader import Shards
from mura_dist.inference.export import triton

UNCHANGED = "nothing changed since the last export"


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, bool]]:
    """Return a function that exports and returns stdout, and whether the file stayed."""

    def call(*arguments: object) -> tuple[str, bool]:
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == DONE
        captured = capsys.readouterr()
        return captured.out, UNCHANGED in captured.err

    return call


def test_unchanged_export_keeps_its_file(copy: Path, export: Callable[..., tuple[str, bool]]) -> None:
    path = copy / "model.onnx"
    summary, is_kept = export(copy)
    assert not is_kept
    data, time_ns = path.read_bytes(), path.stat().st_mtime_ns
    assert export(copy) == (summary, True)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (data, time_ns)
    path.write_bytes(data[:-1])
    assert export(copy) == (summary, False)
    assert path.read_bytes() == data
    assert str(copy).encode() not in (copy / ".export-model.onnx.json").read_bytes()


@pytest.mark.slow
def test_each_changed_input_is_exported_anew(
    copy: Path, halved: Path, export: Callable[..., tuple[str, bool]], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(halved, shards)
    arguments = (copy, "--shards", shards)
    export(*arguments)
    metrics = json.loads((copy / "metrics.json").read_bytes())

    def change_metrics() -> None:
        (copy / "metrics.json").write_text(json.dumps(metrics | {"note": "changed"}))

    def change_recipe() -> None:
        (copy / "recipe.toml").write_text((copy / "recipe.toml").read_text() + "\n")

    def change_shards() -> None:
        opened = Shards.open(shards)
        laws.damage(opened, int(opened.rows("tune")[0]))

    for change in (change_metrics, change_recipe, change_shards):
        change()
        assert not export(*arguments)[1]
        assert export(*arguments)[1]


@pytest.mark.slow
def test_stamps_of_two_files_and_of_triton_are_independent(
    copy: Path, export: Callable[..., tuple[str, bool]], tmp_path: Path
) -> None:
    assert not export(copy)[1]
    assert not export(copy, "--out", copy / "other.onnx")[1]
    assert export(copy)[1]
    for name in ("a", "b"):
        repository = tmp_path / name
        assert not export(copy, "--triton", repository)[1]
        assert export(copy, "--triton", repository)[1]
        triton.list_files(repository)["triton configuration"].unlink()
        assert not export(copy, "--triton", repository)[1]

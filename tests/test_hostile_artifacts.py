"""Test that a hostile or corrupt file is a one-line error with exit status 2 in every command that opens it."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cache import Cache
from helpers.models import card_of, noise
from PIL import Image

from mura_dist.cli.main import DONE, INVALID, main
from mura_dist.core import config
from mura_dist.core.errors import UserError
from mura_dist.models.card import Card
from mura_dist.training.state import State

HUGE = 2**62
STEP = "run/checkpoints/step-*"
DEEP = b"[" * 100_000

BYTES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "deep": lambda data: DEEP,
    "deep value": lambda data: b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep recipe": lambda data: b"a = " + DEEP,
    "a list": lambda data: b"[1]",
    "a number": lambda data: b"7",
    "null": lambda data: b"null",
    "another object": lambda data: b'{"a": 1}',
    "a folder": lambda data: None,
}
FOREIGN = ("a list", "a number", "null", "another object", "a folder")
VALUES: tuple[Any, ...] = (None, HUGE, -1, 1.5, "x", "../../x", True, [], {}, [[1]], {"a": {}})

RECIPE_VALUES = (
    "[" * 100_000,
    "[[" * 900,
    str(HUGE),
    str(2**70),
    "1e300",
    "inf",
    "nan",
    "-1",
    '"x"',
    "{}",
    "1979-05-27",
)

VERIFY, DESCRIBE = ("verify", "shards"), ("describe", "shards", "--out", "describe.html")
RESUME = ("shards", "phantoms", "shards", "--size", "64", "--workers", "1", "--quiet")
TRAIN = ("train", "run/recipe.toml", "shards=shards", "run=run", "--quiet")
EVALUATE = ("evaluate", "run", "shards", "--no-gallery", "--out", "evaluated", "--quiet")
EVALUATE_ONNX = ("evaluate", "model.onnx", "shards", "--no-gallery", "--out", "evaluated", "--quiet")
EVALUATE_LIST = ("evaluate", "list.json", "shards", "--no-gallery", "--out", "evaluated", "--quiet")
EXPORT, EXPORT_LIST = (
    ("export", "run", "--out", "new.onnx", "--quiet"),
    ("export", "list.json", "--out", "new.onnx", "--quiet"),
)
ENSEMBLE = ("ensemble", "run", "--out", "new.json", "--quiet")
PREDICT, PREDICT_LIST = (
    ("predict", "model.onnx", "ward", "--out", "new"),
    ("predict", "list.json", "ward", "--out", "new"),
)
PREDICT_AGAIN = ("predict", "model.onnx", "ward", "--out", "out", "--workers", "1", "--quiet")
PAGE = ("page", "model.onnx", "--port", "-1")

OPENED_BY: dict[str, tuple[tuple[str, ...], ...]] = {
    "shards/index.json": (VERIFY, DESCRIBE, RESUME, TRAIN, EVALUATE, EVALUATE_ONNX, EVALUATE_LIST),
    "shards/manifest.csv": (VERIFY, DESCRIBE, TRAIN, EVALUATE, EVALUATE_ONNX),
    "shards/valid-000000.idx": (EVALUATE, EVALUATE_ONNX),
    "shards/valid-000000.crc": (EVALUATE, EVALUATE_ONNX),
    "shards/conversion.json": (RESUME,),
    "shards/report.json": (RESUME,),
    "run/recipe.toml": (TRAIN, EVALUATE, EXPORT, ENSEMBLE),
    "run/data.json": (EVALUATE, EXPORT, ENSEMBLE),
    f"{STEP}/COMPLETE": (EVALUATE, EXPORT, EVALUATE_LIST, EXPORT_LIST),
    f"{STEP}/state.json": (EVALUATE, EXPORT, EVALUATE_LIST, EXPORT_LIST),
    f"{STEP}/model.safetensors": (EVALUATE, EXPORT, EVALUATE_LIST, EXPORT_LIST),
    "run/metrics.json": (EXPORT,),
    "model.onnx": (PREDICT, EVALUATE_ONNX, PAGE),
    "list.json": (PREDICT_LIST, EVALUATE_LIST, EXPORT_LIST),
    "out/predict.json": (PREDICT_AGAIN,),
    "out/.parts/plan.json": (PREDICT_AGAIN,),
    "out/.parts/000000.json": (PREDICT_AGAIN,),
}


@pytest.fixture(scope="module")
def artifacts(cache: Cache, single_rank_run: Path, shard_folder: Path, phantoms: Path, model: Path) -> Path:
    """Return a folder with one of each artifact that the commands write."""

    def make(folder: Path) -> None:
        folder.mkdir()
        shutil.copytree(shard_folder, folder / "shards")
        (folder / "phantoms").symlink_to(phantoms)
        shutil.copytree(single_rank_run, folder / "run")
        shutil.copy(model, folder / "model.onnx")
        for number, pixels in enumerate(noise(3)):
            (folder / "ward").mkdir(exist_ok=True)
            Image.fromarray(pixels[0]).save(folder / f"ward/{number}.png")
        before = Path.cwd()
        os.chdir(folder)
        try:
            for command in (
                ("ensemble", "run", "--top", "1", "--out", "list.json", "--quiet"),
                ("evaluate", "run", "shards", "--no-gallery", "--quiet"),
                PREDICT_AGAIN,
            ):
                assert main(command) == DONE, command
        finally:
            os.chdir(before)

    return cache.path("world", make)


@pytest.fixture
def folder(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(artifacts, tmp_path / "world", symlinks=True))
    monkeypatch.chdir(copy)
    return copy


@contextlib.contextmanager
def changed(paths: Iterable[Path], change: Callable[[bytes], bytes | None]) -> Iterator[None]:
    """Replace the content of `paths` by `change` of their bytes during the block, or by a folder."""
    before = {path: path.read_bytes() for path in paths}
    assert before
    for path, data in before.items():
        path.unlink()
        after = change(data)
        path.mkdir() if after is None else path.write_bytes(after)
    yield
    for path, data in before.items():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def check(command: tuple[str, ...], capsys: pytest.CaptureFixture[str], *statuses: int) -> None:
    """Assert that a command exits with one of `statuses`, without traceback, and with one line if it fails."""
    capsys.readouterr()
    status = main(list(command))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status in statuses, (command, status, lines)
    assert status == DONE or (len(lines) == 1 and len(lines[0]) < 1500), (command, lines)


@pytest.mark.slow
@pytest.mark.parametrize("artifact", OPENED_BY)
def test_corrupt_file_is_a_one_line_error_in_every_command_that_opens_it(
    artifact: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if artifact.startswith("out/.parts"):
        make_unfinished(folder)
    for what, change in BYTES.items():
        for command in OPENED_BY[artifact]:
            with changed(folder.glob(artifact), change):
                # The file is of another program or evaluation, so the run counts as not evaluated.
                harmless = artifact == "run/metrics.json" and what in FOREIGN
                check(command, capsys, *(DONE, INVALID) if harmless else (INVALID,))


def make_unfinished(folder: Path) -> None:
    """Turn a finished prediction into one that was killed after its first chunk."""
    plan = json.loads((folder / "out/predict.json").read_bytes())["plan"]
    (folder / "out/predict.json").unlink()
    (folder / "out/.parts").mkdir()
    (folder / "out/.parts/plan.json").write_text(json.dumps(plan))
    rows = [[f"{number}.png", f"{number}.png", "unknown", 1.0, "ok"] for number in range(3)]
    overlays = {"num_overlays": 0, "num_overlays_withheld": 0}
    chunk = {"predictions": rows, "failures": [], "overlays": overlays, "notes": {}}
    (folder / "out/.parts/000000.json").write_text(json.dumps(chunk))


def value_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value of a JSON document, at most two for each list."""
    if path:
        yield path
    for key, child in list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )[:40]:
        if not isinstance(value, list) or key < 2:
            yield from value_paths(child, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON document with another value at `path`."""
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


@pytest.mark.nightly(part="files")
@pytest.mark.parametrize(
    ("artifact", "command"),
    [("run/data.json", ENSEMBLE), ("out/predict.json", PREDICT_AGAIN), ("out/.parts/000000.json", PREDICT_AGAIN)],
)
def test_value_of_another_type_is_a_one_line_error(
    artifact: str, command: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if artifact.startswith("out/.parts"):
        make_unfinished(folder)
    content = json.loads((folder / artifact).read_bytes())
    for path in value_paths(content):
        for value in VALUES:
            (folder / "new.json").unlink(missing_ok=True)
            with changed([folder / artifact], lambda data, p=path, v=value: json.dumps(put(content, p, v)).encode()):
                check(command, capsys, DONE, INVALID)


def test_checkpoint_state_of_another_type_is_refused() -> None:
    """The saved state loads. With any other value, loading gives a state or a UserError."""
    saved = json.loads(json.dumps(State(step=3, select_loss=0.5, damaged=[1, 2]).to_json()))
    assert State.from_json(saved).to_json() == saved
    for path in value_paths(saved):
        for value in VALUES:
            with contextlib.suppress(UserError):
                assert isinstance(State.from_json(put(saved, path, value)).step, int)
        if len(path) == 1 and path != ("corrupt_samples",):
            with pytest.raises(UserError, match=r"state\.json .* is corrupt"):
                State.from_json({key: value for key, value in saved.items() if key != path[0]})


def test_card_field_of_another_type_is_refused() -> None:
    card = json.loads(card_of().to_json())
    refused = 0
    for path in value_paths(card):
        for value in VALUES:
            try:
                assert 0 < Card.parse(json.dumps(put(card, path, value)), "m").size <= 2048
            except UserError as refusal:
                refused += "\n" not in str(refusal)
    assert refused > 200
    for text in ("[" * 100_000, '{"size": ' + "[" * 900 + "]" * 900 + "}", "NaN", "", "7"):
        with pytest.raises(UserError, match="corrupt mura_dist metadata"):
            Card.parse(text, "m")


@pytest.mark.parametrize("value", RECIPE_VALUES)
def test_hostile_recipe_is_a_one_line_error(value: str, tmp_path: Path) -> None:
    for key, field in config.Settings.model_fields.items():
        if field.annotation is str:
            continue
        (tmp_path / "recipe.toml").write_text(f'shards = "s"\nrun = "r"\n{key} = {value}\n')
        with contextlib.suppress(UserError):
            parsed = getattr(config.load(tmp_path / "recipe.toml"), key)
            assert not isinstance(parsed, int) or abs(parsed) < 2**63
            assert not isinstance(parsed, float) or math.isfinite(parsed)

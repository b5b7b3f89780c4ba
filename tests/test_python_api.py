"""Test the Python API as users call it: lazy imports, plain scripts without a main guard, notebooks, and typed functions."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.commands import ROOT
from PIL import Image

import mura_dist
from mura_dist.core.errors import UserError
from mura_dist.data import radiograph
from mura_dist.data.loaders import sampler
from mura_dist.data.shards.reader import Shards

HEAVY = ("torch", "numpy", "pandas", "onnxruntime", "pydantic", "PIL")


def run_script(folder: Path, text: str, *, stdin: bool = False) -> str:
    """Run a script from its own folder and return its standard output.

    `stdin` runs it as a notebook runs its cells, where `__main__` has no file.
    """
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, *([] if stdin else [str(script)])]
    done = subprocess.run(
        command, cwd=folder, input=text if stdin else "", capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def views_of(folder: Path) -> list[Path]:
    """Return the files of the first study with at least two views below a folder."""
    studies = sorted({path.parent for path in folder.rglob("*.png")})
    return next(files for study in studies if len(files := sorted(study.glob("*.png"))) > 1)


@pytest.fixture(scope="module")
def study_model(model: Path) -> "mura_dist.StudyModel":
    return mura_dist.load(model)


@pytest.fixture(scope="module")
def tables(model: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> "mura_dist.PredictionTables":
    return mura_dist.predict_directory(
        phantoms / "valid", model=model, out=tmp_path_factory.mktemp("predicted") / "out"
    )


def test_import_is_lazy() -> None:
    code = f"import sys, mura_dist; print([name for name in {HEAVY} if name in sys.modules], len(dir(mura_dist)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).startswith("[] ")


def test_import_takes_less_than_a_tenth_of_a_second() -> None:
    code = "import time; t = time.process_time(); import mura_dist; print(time.process_time() - t)"
    assert min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)) < 0.1


@pytest.mark.parametrize("name", mura_dist.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(mura_dist, name)
    assert name in dir(mura_dist)
    if callable(value):
        assert (value.__doc__ or "").strip()
        assert value.__name__ == name


@pytest.mark.parametrize("name", [name for name in mura_dist.__all__ if inspect.isfunction(getattr(mura_dist, name))])
def test_public_functions_are_typed_and_list_their_arguments(name: str) -> None:
    function = getattr(mura_dist, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter
        assert f"{parameter.name}:" in (function.__doc__ or ""), parameter


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = mura_dist.lod


# ---- load, predict


def test_study_result_equals_the_tables(
    study_model: "mura_dist.StudyModel", tables: "mura_dist.PredictionTables", phantoms: Path
) -> None:
    for study, lines in list(tables.predictions.groupby("study"))[:5]:
        result = study_model.predict([phantoms / "valid" / path for path in lines["path"]])
        assert [view.logit for view in result.views] == pytest.approx(lines["logit"].tolist(), abs=1e-4)
        assert [view.gate for view in result.views] == lines["gate"].tolist()
        line = tables.studies.set_index("study").loc[study]
        assert result.study_type == line["study_type"]
        assert result.probability == pytest.approx(line["probability"], abs=1e-5)
        for name in ("threshold", "calibrated_probability", "call", "band"):
            value = getattr(result, name)
            assert (value is None) == pd.isna(line[name]), name
            assert value is None or value == line[name] or value == pytest.approx(line[name], abs=1e-5)


def test_mean_of_the_activation_map_is_the_logit(study_model: "mura_dist.StudyModel", phantoms: Path) -> None:
    result = study_model.predict(views_of(phantoms))
    assert result.activation_map.dtype == np.float32
    assert len(result.activation_map) == len(result.views) > 1
    for view, activation_map in zip(result.views, result.activation_map, strict=True):
        assert activation_map.mean() == pytest.approx(view.logit, abs=1e-4)


def test_path_content_and_pixels_give_the_same_logit(study_model: "mura_dist.StudyModel", phantoms: Path) -> None:
    path = views_of(phantoms)[0]
    pixels = np.asarray(Image.open(path))
    logits = [
        study_model.predict(source).views[0].logit
        for source in (path, str(path), path.read_bytes(), pixels, np.stack([pixels] * 3, axis=2), pixels.T.copy().T)
    ]
    assert logits == [logits[0]] * len(logits)


def test_study_type_argument_overrides_the_folder(study_model: "mura_dist.StudyModel", phantoms: Path) -> None:
    views = views_of(phantoms)
    assert study_model.predict(views).study_type in {name for name in views[0].parts if name.startswith("XR_")}
    assert study_model.predict(views, study_type="shoulder").study_type == "XR_SHOULDER"
    assert study_model.predict(np.asarray(Image.open(views[0]))).study_type == "unknown"


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], r"a study of 0 views"),
        ("missing.png", r"missing\.png: cannot be opened: no such file or directory\. Give a radiograph"),
        (b"no picture", r"view 1: .+\. Give a radiograph"),
        (np.zeros((4, 4)), r"view 1: an array of shape \(4, 4\) and dtype float64"),
        (np.zeros((0, 4), np.uint8), r"view 1: an array of shape \(0, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"view 1: an array of shape \(4, 4, 4\)"),
    ],
)
def test_invalid_views_are_refused_in_one_line(
    study_model: "mura_dist.StudyModel", views: object, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        study_model.predict(views)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_unknown_study_type_is_refused(study_model: "mura_dist.StudyModel", phantoms: Path) -> None:
    with pytest.raises(UserError, match="XR_HANDS"):
        study_model.predict(views_of(phantoms), study_type="XR_HANDS")


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        mura_dist.load(tmp_path / "none.onnx")


# ---- predict_directory


def test_frames_have_one_line_per_radiograph_study_and_failure(
    tables: "mura_dist.PredictionTables", phantoms: Path
) -> None:
    files = sorted(path.relative_to(phantoms / "valid").as_posix() for path in (phantoms / "valid").rglob("*.png"))
    assert sorted(tables.predictions["path"]) == files
    assert tables.studies["num_views"].sum() == len(files)
    assert len(tables.failures) == tables.summary["num_failures"] == 0
    assert tables.predictions["logit"].dtype == np.float64


def test_file_names_are_unchanged_in_the_tables(model: Path, phantoms: Path, tmp_path: Path) -> None:
    names = ["=1+1.png", "NA.png", 'a, "b".png', "-x.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(views_of(phantoms)[0].read_bytes())
    (tmp_path / "in" / "NaN").write_bytes(b"no picture")
    tables = mura_dist.predict_directory(str(tmp_path / "in"), model=model, out=tmp_path / "out", study_type="hand")
    assert sorted(tables.predictions["path"]) == sorted(names)
    assert tables.failures["path"].tolist() == ["NaN"]
    assert set(tables.studies["study_type"]) == {"XR_HAND"}


def test_parquet_and_csv_give_the_same_frames(model: Path, phantoms: Path, tmp_path: Path) -> None:
    folder = next((phantoms / "valid").iterdir())
    a, b = (
        mura_dist.predict_directory(folder, model=model, out=tmp_path / format, format=format)
        for format in ("csv", "parquet")
    )
    for name in ("predictions", "studies", "failures"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_dtype=False)


def test_unknown_option_is_a_type_error(model: Path, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="batchsize"):
        mura_dist.predict_directory(phantoms, model=model, out=tmp_path / "out", batchsize=3)


@pytest.mark.parametrize("caller", ["script", "thread", "notebook"])
def test_predict_directory_needs_no_main_guard(model: Path, phantoms: Path, tmp_path: Path, caller: str) -> None:
    folder = next((phantoms / "valid").iterdir())
    call = f"tables = mura_dist.predict_directory({str(folder)!r}, model={str(model)!r}, out='out', workers=2)\n"
    if caller == "thread":
        call = f"import threading\ndef work():\n    global tables\n    {call}\n"
        call += "thread = threading.Thread(target=work)\nthread.start()\nthread.join()\n"
    text = f"import mura_dist\nprint('begun')\n{call}print(len(tables.predictions), len(tables.failures))\n"
    output = run_script(tmp_path, text, stdin=caller == "notebook")
    assert output.splitlines() == ["begun", f"{len(list(folder.rglob('*.png')))} 0"]


# ---- read_radiograph


@pytest.mark.parametrize("size", [1, 64, 320])
def test_read_radiograph_equals_the_reader_of_training(phantoms: Path, size: int) -> None:
    path = views_of(phantoms)[0]
    image = mura_dist.read_radiograph(path, size=size)
    assert image.dtype == np.uint8
    assert image.shape == (size, size)
    assert (image == radiograph.read(path, size)).all()


def test_stored_sample_equals_read_radiograph(phantoms: Path, shard_folder: Path) -> None:
    shards = Shards.open(shard_folder)
    for row in shards.rows("train")[:5]:
        image = mura_dist.read_radiograph(phantoms / shards.manifest.frame.at[row, "path"], size=64)
        assert (shards.read_pixels(int(row)) == image).all()


def test_read_radiograph_refuses_invalid_input(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: .+\. Give a radiograph"):
        mura_dist.read_radiograph(tmp_path / "text.png")
    with pytest.raises(UserError, match="size=0: must be at least 1"):
        mura_dist.read_radiograph(tmp_path / "text.png", size=0)


# ---- data_loader


def test_batches_follow_the_training_sampler(shard_folder: Path) -> None:
    """Rows, order and number of batches of two epochs equal the sampler's."""
    loader = mura_dist.data_loader(shard_folder, micro_batch=8, seed=3, device="cpu", pipeline="cpu")
    rows = Shards.open(shard_folder).rows("train")
    for epoch in range(2):
        order = sampler.epoch_permutation(rows, 3, epoch, rotate_deg=30, flip=True)
        batches = list(loader)
        assert len(batches) == len(loader) == len(rows) // 8
        assert np.concatenate([batch.row for batch in batches]).tolist() == order.rows[: 8 * len(loader)].tolist()
        assert all(batch.mask.all() and batch.image.shape == (8, 1, 64, 64) for batch in batches)


@pytest.mark.parametrize("split", ["train", "tune", "valid"])
@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_unshuffled_loader_yields_each_radiograph_once(shard_folder: Path, split: str, micro_batch: int) -> None:
    loader = mura_dist.data_loader(
        shard_folder, split=split, micro_batch=micro_batch, shuffle=False, device="cpu", pipeline="cpu"
    )
    batches = list(loader)
    rows = np.concatenate([batch.row[batch.mask] for batch in batches])
    assert rows.tolist() == Shards.open(shard_folder).rows(split).tolist()
    assert len(batches) == len(loader)
    shards = Shards.open(shard_folder)
    first = batches[0]
    assert (first.image[0, 0].numpy() == shards.read_pixels(int(first.row[0]))).all()


def test_loader_state_resumes_bit_for_bit(shard_folder: Path) -> None:
    """The batches after a saved state equal those of a loader that was never stopped."""

    def loader() -> "mura_dist.DataLoader":
        return mura_dist.data_loader(shard_folder, micro_batch=8, device="cpu", pipeline="cpu", workers=2)

    whole_epochs = loader()
    expected = [batch for _ in range(2) for batch in whole_epochs]
    for stop in (0, 1, len(whole_epochs) - 1, len(whole_epochs), len(whole_epochs) + 2):
        first = loader()
        stream = (batch for _ in range(2) for batch in first)
        batches = [next(stream) for _ in range(stop)]
        state = first.state_dict()
        second = loader()
        second.load_state_dict(state)
        while len(batches) < len(expected):
            batches += list(second)
        assert len(batches) == len(expected)
        for batch, reference in zip(batches, expected, strict=True):
            assert (batch.row == reference.row).all()
            assert (batch.image == reference.image).all()


def test_set_epoch_selects_the_epoch(shard_folder: Path) -> None:
    a, b = (mura_dist.data_loader(shard_folder, micro_batch=8, device="cpu", pipeline="cpu") for _ in range(2))
    list(a)
    b.set_epoch(1)
    assert (next(iter(a)).row == next(iter(b)).row).all()


def test_ranks_split_an_epoch(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        loader = mura_dist.data_loader(shard_folder, micro_batch=8, device="cpu", pipeline="cpu")
        rows += [row for batch in loader for row in batch.row.tolist()]
    assert len(rows) == len(set(rows))
    assert len(rows) == len(Shards.open(shard_folder).rows("train")) // 16 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"micro_batch": 10_000}, "micro_batch=10000: a step takes 10000"),
        ({"split": "test"}, "test"),
        ({"workers": -1}, "workers=-1"),
        ({"pipeline": "opencv"}, "pipeline=opencv: must be one of auto, dali, cpu, resident"),
        ({"loss_weights": "both"}, "loss_weights=both: must be one of class, study_type, none"),
        ({"rotate_deg": 200}, "rotate_deg=200"),
    ],
)
def test_invalid_loader_options_are_refused(shard_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mura_dist.data_loader(shard_folder, **{"device": "cpu", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "state", [{"epoch": -1, "step": 0}, {"epoch": 0, "step": 10_000}, {"epoch": 0, "step": "1"}, {"epoch": 0}]
)
def test_invalid_loader_state_is_refused(shard_folder: Path, state: dict[str, int]) -> None:
    with pytest.raises(UserError, match="data loader"):
        mura_dist.data_loader(shard_folder, micro_batch=8, device="cpu").load_state_dict(state)


def test_package_is_marked_as_typed() -> None:
    assert (ROOT / "mura_dist" / "py.typed").is_file()

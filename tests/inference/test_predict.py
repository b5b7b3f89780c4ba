"""Test predict: every file in one table, identical bytes after kills and resumptions, study names, no patient data."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from helpers import faulty_reader, laws
from helpers.cache import Cache
from helpers.commands import run, stderr_lines
from helpers.predictions import FILES, TABLES, contents, draw, draw_dicom, rows

from mura_dist.cli.main import DONE, FAILED, main
from mura_dist.core.errors import RunError, StopRequestedError, UserError
from mura_dist.data import gate, mura, radiograph
from mura_dist.distributed.worker_pool import PoolLimits
from mura_dist.evaluation import prediction_files
from mura_dist.inference import autotune, grouping, pseudonyms, reader_pool, tables
from mura_dist.inference import predict as predict_module
from mura_dist.inference.engine import SessionConfig, pipelined_config
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.output_folder import OutputFolder
from mura_dist.inference.predict import CHUNK, PredictOptions, predict

PREDICT = """\
import sys
from pathlib import Path
from mura_dist.inference.predict import predict
model, source, out = map(Path, sys.argv[1:4])
"""


pytestmark = pytest.mark.usefixtures("own_site_key")


def count_rows(out: Path) -> Counter[str]:
    return Counter(row["path"] for name in ("predictions.csv", "failures.csv") for row in rows(out / name))


def studies_of(out: Path) -> dict[str, tuple[str, str]]:
    return {row["study"]: (row["study_type"], row["num_views"]) for row in rows(out / "studies.csv")}


# ---- every file once


def test_every_file_is_in_one_table(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    good = [
        "a.png",
        "deep/er/ü 1.PNG",
        "deep/line\nfeed.png",
        "deep/carriage\rreturn.png",
        'quote",comma.png',
        "no_suffix",
    ]
    for seed, name in enumerate(good):
        draw(source / name, seed)
    (source / "linked.png").symlink_to(source / "a.png")
    (tmp_path / "elsewhere").mkdir()
    draw(tmp_path / "elsewhere" / "far.png")
    (source / "outside").symlink_to(tmp_path / "elsewhere")
    (source / "deep" / "up").symlink_to(source)  # a loop
    reference = (source / "a.png").read_bytes()
    contents_of_bad = {
        ".DS_Store": b"\0\0\0\1Bud1",
        "._a.png": b"\0\x05\x16\x07\0\2\0\0",
        "labels.csv": b"path,label\n",
        "empty.png": b"",
        "torn.png": reference[: len(reference) // 2],
        "notes.png": b"<html>404</html>",
    }
    for name, data in contents_of_bad.items():
        (source / name).write_bytes(data)
    (source / "broken_link.png").symlink_to("nowhere")
    (source / "itself.png").symlink_to("itself.png")
    os.mkfifo(source / "pipe.png")
    summary = predict(model, source, tmp_path / "out")
    good += ["linked.png", "outside/far.png"]
    assert count_rows(tmp_path / "out") == Counter(
        [*good, *contents_of_bad, "broken_link.png", "itself.png", "pipe.png"]
    )
    assert {row["path"] for row in rows(tmp_path / "out" / "predictions.csv")} == set(good)
    codes = {row["path"]: (row["code"], row["reason"]) for row in rows(tmp_path / "out" / "failures.csv")}
    assert codes["torn.png"][0] == codes["broken_link.png"][0] == codes["itself.png"][0] == "unreadable"
    assert all(
        codes[name][0] == "not_image" for name in (".DS_Store", "._a.png", "labels.csv", "notes.png", "pipe.png")
    )
    assert all(reason for _, reason in codes.values())
    assert (summary["num_files"], summary["num_radiographs"], summary["num_failures"]) == (17, 8, 9)
    assert sum(summary["failures_by_code"].values()) == 9
    assert summary["terms"] == mura.TERMS
    assert sorted(os.listdir(tmp_path / "out")) == FILES


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps names that are not UTF-8")
def test_file_names_that_are_not_utf8(model: Path, tmp_path: Path) -> None:
    draw(tmp_path / "in" / os.fsdecode(b"r\xf6ntgen\xff.png"))
    draw(tmp_path / "in" / os.fsdecode(b"\xe4rm/valid/XR_HAND/patient1/study1/image1.png"))
    predict(model, tmp_path / "in", tmp_path / "out")
    assert count_rows(tmp_path / "out") == Counter(
        ["r\\xf6ntgen\\xff.png", "\\xe4rm/valid/XR_HAND/patient1/study1/image1.png"]
    )
    assert "\\xe4rm/valid/XR_HAND/patient1/study1" in studies_of(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps both compositions and any character")
def test_formula_like_names_have_a_prefix(model: Path, tmp_path: Path) -> None:
    """They have a leading ./ in every CSV. --study-type, the key table and score accept both forms."""
    names = ["=1+1.png", "-2.png", "@a/+b.png", "\t.png", "Mu\u0308.png", "plain.png"]
    for seed, name in enumerate(names):
        draw(tmp_path / "in" / name, seed)
    (tmp_path / "in" / "=2.png").write_bytes(b"junk")
    table = tmp_path / "types.csv"
    table.write_text("path,study_type\n./=1+1.png,hand\n-2.png,hand\nMü.png,hand\n", encoding="utf-8")
    out, keys = tmp_path / "out", tmp_path / "keys.csv"
    options = PredictOptions(study_type=str(table), study_by="file")
    predict(model, tmp_path / "in", out, options)
    expected_names = [f"./{name}" for name in names[:4]] + names[4:]
    assert {row["path"] for row in rows(out / "predictions.csv")} == set(expected_names)
    assert [row["path"] for row in rows(out / "failures.csv")] == ["./=2.png"]
    hands = {row["study"] for row in rows(out / "studies.csv") if row["study_type"] == "XR_HAND"}
    assert hands == {"./=1+1.png", "./-2.png", "Mu\u0308.png"}
    for _ in ("made", "found"):
        predict(model, tmp_path / "in", tmp_path / "hidden", replace(options, keytable=keys))
        shutil.rmtree(tmp_path / "hidden")
    assert {row["path"] for row in rows(keys)} == {*expected_names, "./=2.png"}
    labels = tmp_path / "labels.csv"
    labels.write_text("study,label\n" + "".join(f'"{name}",1\n' for name in [*names[:4], "Mü.png"]) + "plain.png,0\n")
    actual = prediction_files.read_predictions(out / "studies.csv")
    joined = prediction_files.join(actual, prediction_files.read_labels(labels, files_are_studies=True))
    assert joined["study"].tolist() == [*names[:3], ".png", "Mü.png", "plain.png"]  # score strips blanks


def test_output_inside_the_directory_is_not_read(model: Path, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    first = predict(model, tmp_path, tmp_path / "out")
    assert count_rows(tmp_path / "out") == Counter(["a.png"])
    assert predict(model, tmp_path, tmp_path / "out") == first  # its own tables are not inputs


def test_no_readable_file_gives_empty_tables(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("none")
    assert predict(model, tmp_path / "in", tmp_path / "out")["num_studies"] == 0
    assert (tmp_path / "out" / "predictions.csv").read_text() == "path,study,study_type,logit,probability,gate\n"
    header = "study,study_type,num_views,probability,calibrated_probability,threshold,call,band,gate,trained_on\n"
    assert (tmp_path / "out" / "studies.csv").read_text() == header
    assert len(rows(tmp_path / "out" / "failures.csv")) == 1


def test_hostile_files_are_in_one_table_each(model: Path, tmp_path: Path, shared: Path) -> None:
    predict(model, shared / "hostile", tmp_path / "out")
    files = [str(path.relative_to(shared / "hostile")) for path in (shared / "hostile").rglob("*") if path.is_file()]
    assert count_rows(tmp_path / "out") == Counter(files)
    assert len(rows(tmp_path / "out" / "predictions.csv")) > 100


# ---- files that crash their reader


@pytest.mark.slow
def test_file_that_crashes_its_reader_is_a_failure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run and each restart would stop there."""
    for number in range(20):
        draw(tmp_path / "in" / f"{number:02d}.png", number)
    predict(model, tmp_path / "in", tmp_path / "sound")
    expected_codes = {
        "03_crash.png": "unreadable",
        "07_spin.png": "unreadable",
        "07_crash.png": "unreadable",
        "12_eat.png": "too_large",
    }
    for name in expected_codes:
        draw(tmp_path / "in" / name)
    monkeypatch.setattr(reader_pool, "RadiographReader", faulty_reader.RadiographReader)
    options = PredictOptions(workers=2, limits=PoolLimits(processor_s=1, memory_bytes=300 << 20))
    summary = predict(model, tmp_path / "in", tmp_path / "out", options)
    actual = {row["path"]: (row["code"], row["reason"]) for row in rows(tmp_path / "out" / "failures.csv")}
    assert {path: code for path, (code, _) in actual.items()} == expected_codes
    assert actual["03_crash.png"][1] == actual["07_crash.png"][1] == "its decoder crashed"
    assert actual["07_spin.png"][1] == "its decoder did not finish within 1 s"
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == (tmp_path / "sound" / "predictions.csv").read_bytes()
    assert summary is not None
    assert summary["failures_by_code"] == {"too_large": 1, "unreadable": 3}


# ---- probabilities and calls


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create MURA's layout: studies of one and three views, other study types, one of them without a threshold."""
    root = tmp_path_factory.mktemp("MURA")
    hand, wrist, hip = "XR_HAND/patient00001", "XR_WRIST/patient00001", "XR_HIP/patient00002"
    names = [f"{hand}/study1_positive/image{view}.png" for view in (1, 2, 3)]
    names += [
        f"{hand}/study2_negative/image1.png",
        f"{wrist}/study1_positive/image1.png",
        f"{hip}/study1_negative/image1.png",
    ]
    for seed, name in enumerate(names):
        draw(root / "valid" / name, seed)
    return root


def test_probabilities_and_calls_follow_the_model(model: Path, layout: Path, tmp_path: Path) -> None:
    summary = predict(model, layout, tmp_path / "out")
    loaded, logits = OnnxModel.load(model), {}
    for row in rows(tmp_path / "out" / "predictions.csv"):
        image = radiograph.read(layout / row["path"], 64)
        expected = loaded.logits(image[None, None])[0]
        assert np.float32(row["logit"]) == expected  # the shortest text that is this float32
        assert len(row["logit"]) <= 14
        assert row["probability"] == repr(float(f"{1 / (1 + np.exp(-float(expected))):.6g}"))
        logits.setdefault(row["study"], []).append(float(expected))
    assert len(set(map(tuple, logits.values()))) == 4  # the logits differ
    for row in rows(tmp_path / "out" / "studies.csv"):
        probability = np.mean([1 / (1 + np.exp(-logit)) for logit in logits[row["study"]]])
        assert row["probability"] == repr(float(f"{probability:.6g}"))
        threshold = {"XR_HAND": 0.5, "XR_WRIST": 0.25}.get(row["study_type"])
        assert row["threshold"] == ("" if threshold is None else str(threshold))
        assert row["call"] == ("" if threshold is None else str(int(probability > threshold)))
        assert row["calibrated_probability"] == row["band"] == ""
        assert row["trained_on"] == "radiographs"
    messages = [line for line in summary["warnings"] if "column gate" not in line]  # blotches are no radiographs
    assert messages == ["no threshold was evaluated for study type XR_HIP: no call for 1 of its studies"]
    assert {row["gate"] for row in rows(tmp_path / "out" / "predictions.csv")} <= set(gate.NAMES)
    assert (summary["num_calls"], summary["num_studies"]) == (3, 4)


@pytest.mark.parametrize("version", [gate.VERSION, gate.VERSION - 1])
def test_parts_of_another_gate_version_are_recomputed(model: Path, layout: Path, tmp_path: Path, version: int) -> None:
    """A table has gate values of one version only. A finished prediction does not change."""
    reference, out = tmp_path / "whole", tmp_path / "out"
    plan = predict(model, layout, reference)["plan"] | {"gate": version}
    predictions = [
        [row["path"], row["study"], row["study_type"], float(row["logit"]), "blank"]
        for row in rows(reference / "predictions.csv")
    ]
    overlays = {"num_overlays": 0, "num_overlays_withheld": 0}
    (out / ".parts").mkdir(parents=True)
    (out / ".parts/plan.json").write_text(json.dumps(plan))
    (out / ".parts/000000.json").write_text(
        json.dumps({"predictions": predictions, "failures": [], "overlays": overlays})
    )
    assert predict(model, layout, out)["plan"]["gate"] == gate.VERSION
    gates = {row["gate"] for row in rows(out / "predictions.csv")}
    assert gates == (
        {"blank"} if version == gate.VERSION else {row["gate"] for row in rows(reference / "predictions.csv")}
    )
    summary = json.loads((out / "predict.json").read_text())
    summary["plan"]["gate"] -= 1
    (out / "predict.json").write_text(json.dumps(summary))
    assert predict(model, layout, out) == summary


def test_parquet_equals_csv(model: Path, layout: Path, tmp_path: Path) -> None:
    predict(model, layout, tmp_path / "csv")
    predict(model, layout, tmp_path / "parquet", PredictOptions(format="parquet"))
    for name in tables.NAMES:
        from_csv = pd.read_csv(tmp_path / "csv" / f"{name}.csv")
        from_parquet = pd.read_parquet(tmp_path / "parquet" / f"{name}.parquet")
        assert list(from_csv.columns) == list(from_parquet.columns)
        if "logit" in from_csv:
            assert from_parquet["logit"].dtype == np.float32
            from_csv["logit"] = from_csv["logit"].astype(np.float32)
        for column in from_csv:
            pairs = zip(from_csv[column].tolist(), from_parquet[column].tolist(), strict=True)
            assert all((pd.isna(a) and pd.isna(b)) or a == b for a, b in pairs), (name, column)


# ---- studies


def test_mura_study_names_from_any_folder(model: Path, layout: Path, tmp_path: Path) -> None:
    predict(model, layout, tmp_path / "whole")
    assert studies_of(tmp_path / "whole") == {
        "valid/XR_HAND/patient00001/study1_positive": ("XR_HAND", "3"),
        "valid/XR_HAND/patient00001/study2_negative": ("XR_HAND", "1"),
        "valid/XR_HIP/patient00002/study1_negative": ("XR_HIP", "1"),
        "valid/XR_WRIST/patient00001/study1_positive": ("XR_WRIST", "1"),
    }
    predict(model, layout / "valid" / "XR_HAND", tmp_path / "part")
    expected = {study: value for study, value in studies_of(tmp_path / "whole").items() if "XR_HAND" in study}
    assert studies_of(tmp_path / "part") == expected


def test_mura_study_names_without_a_split_folder(model: Path, layout: Path, tmp_path: Path) -> None:
    """A study's folder outside train and valid is still a study."""
    hands = {"patient00001/study1_positive": ("XR_HAND", "3"), "patient00001/study2_negative": ("XR_HAND", "1")}
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "XR_HAND").symlink_to(layout / "valid" / "XR_HAND")
    predict(model, tmp_path / "ward", tmp_path / "ward's")
    assert studies_of(tmp_path / "ward's") == {f"XR_HAND/{name}": value for name, value in hands.items()}
    predict(model, tmp_path / "ward" / "XR_HAND" / "patient00001", tmp_path / "one")
    assert studies_of(tmp_path / "one") == {f"XR_HAND/{name}": value for name, value in hands.items()}


def test_copies_of_a_study_are_separate_studies(model: Path, tmp_path: Path) -> None:
    for site in ("north", "south"):
        draw(tmp_path / "in" / site / "valid/XR_HAND/patient00001/study1/image1.png")
    predict(model, tmp_path / "in", tmp_path / "out")
    names = [f"{site}/valid/XR_HAND/patient00001/study1" for site in ("north", "south")]
    assert studies_of(tmp_path / "out") == dict.fromkeys(names, ("XR_HAND", "1"))


def test_study_by_groups_files_or_folders(model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(["a.png", "b.png", "XR_WRIST/c.png", "XR_WRIST/d.png"]):
        draw(tmp_path / "in" / name, seed)
    for study_by in grouping.STUDY_BY:
        predict(model, tmp_path / "in", tmp_path / study_by, PredictOptions(study_by=study_by))
    by_file = {"a.png": ("unknown", "1"), "b.png": ("unknown", "1")}
    by_file |= {f"XR_WRIST/{name}.png": ("XR_WRIST", "1") for name in "cd"}
    assert studies_of(tmp_path / "file") == studies_of(tmp_path / "auto") == by_file
    assert studies_of(tmp_path / "folder") == {".": ("unknown", "2"), "XR_WRIST": ("XR_WRIST", "2")}


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_dicom_study_names_hold_no_patient_data(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, uid, other_uid = tmp_path / "in", "1.2.276.0.1", "1.2.276.0.2"
    draw_dicom(source / "1.dcm", uid, "HAND", "L", 1)
    draw_dicom(source / "2", uid, "hand", "l", 2)  # the same study: devices differ in case
    draw_dicom(source / "3.dcm", uid, "HAND", "R", 3)
    draw_dicom(source / "4.dcm", uid, "THUMB", "L", 4)
    draw_dicom(source / "5.dcm", other_uid, "MISS JANE DOE", "L", 5)
    draw_dicom(source / "6.dcm", "", "WRIST", "L", 6)  # a study of its own
    predict(model, source, tmp_path / "out")
    actual = {row["path"]: (row["study"], row["study_type"]) for row in rows(tmp_path / "out" / "predictions.csv")}
    assert actual["1.dcm"] == actual["2"]
    assert len({study for study, _ in actual.values()}) == 5
    types = ["XR_HAND", "XR_HAND", "XR_HAND", "XR_FINGER", "unknown", "XR_WRIST"]
    assert [study_type for _, study_type in actual.values()] == types
    assert actual["6.dcm"][0] == "6.dcm"
    names = [study for path, (study, _) in actual.items() if path != "6.dcm"]
    assert all(name.startswith("dicom-") and len(name) == 22 and int(name[6:], 16) >= 0 for name in names)
    all_bytes = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert not any(word in all_bytes.upper() for word in (b"1.2.276", b"JANE", b"4711"))

    key = Path(os.environ["MURA_DIST_SITE_KEY"])
    if os.name == "posix":
        assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    predict(model, source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert key.read_bytes() == before
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path / "another.key"))
    predict(model, source, tmp_path / "elsewhere")
    assert not {name for name in studies_of(tmp_path / "elsewhere") if name in studies_of(tmp_path / "out")} - {"6.dcm"}


def test_site_key_is_created_for_dicom_only(model: Path, tmp_path: Path) -> None:
    key = Path(os.environ["MURA_DIST_SITE_KEY"])
    draw(tmp_path / "in" / "a.png")
    predict(model, tmp_path / "in", tmp_path / "out")
    assert not key.exists()
    key.parent.mkdir()
    key.write_bytes(b"short")
    key.chmod(0o600)
    with pytest.raises(UserError, match=r"^site key .* holds 5 bytes \(at least 32\)\. Delete it"):
        pseudonyms.site_key()


def test_study_type_option_overrides_folders(model: Path, layout: Path, tmp_path: Path) -> None:
    def count_types(name: str, option_value: str) -> Counter[str]:
        predict(model, layout, tmp_path / name, PredictOptions(study_type=option_value))
        return Counter(study_type for study_type, _ in studies_of(tmp_path / name).values())

    assert count_types("one", "hand") == {"XR_HAND": 4}
    assert count_types("unheard", "KNEE") == {"KNEE": 4}
    assert all(row["call"] == "" for row in rows(tmp_path / "unheard" / "studies.csv"))
    table = tmp_path / "types.csv"
    view = "valid/XR_HAND/patient00001/study1_positive/image1.png"
    table.write_text(
        "\ufeffpath,study_type\nvalid/XR_HIP/patient00002/study1_negative/image1.png,elbow\n", encoding="utf-8"
    )
    assert count_types("table", str(table)) == {"XR_HAND": 2, "XR_ELBOW": 1, "XR_WRIST": 1}
    table.write_text(f"path,study_type\n{view},elbow\n")  # one view of three, which makes the study type unknown
    assert count_types("split", str(table)) == {"unknown": 1, "XR_HAND": 1, "XR_HIP": 1, "XR_WRIST": 1}
    table.write_text(f"path,study_type\n{view},elbow\n{view},hand\n")
    with pytest.raises(UserError, match=r"is both XR_ELBOW and XR_HAND\. Keep one"):
        count_types("both", str(table))
    table.write_text("file,type\na,b\n")
    with pytest.raises(UserError, match="not a CSV with the columns path and study_type"):
        count_types("columns", str(table))
    with pytest.raises(UserError, match=r"missing\.csv: no such file or directory\. Give a study type"):
        count_types("missing", str(tmp_path / "missing.csv"))


# ---- resumption


KILLS = pytest.mark.nightly(part="kills")
NUM_MANY = 2 * CHUNK + 100


@pytest.fixture(scope="module")
def many(cache: Cache, model: Path) -> tuple[Path, dict[str, bytes]]:
    """Return a directory of two and a half chunks, one seventh of it corrupt files, and the tables of one run."""
    folder = cache.path("many", functools.partial(_draw_many, model))
    return folder / "in", contents(folder / "out")


def _draw_many(model: Path, folder: Path) -> None:
    source = folder / "in"
    pictures = [draw(source / "0" / f"{number}.png", number).read_bytes() for number in range(20)]
    for number in range(NUM_MANY - 20):
        (source / f"{number:04d}.png").write_bytes(pictures[number % 20] if number % 7 else b"junk")
    predict(model, source, folder / "out")


@pytest.mark.parametrize(
    ("batch_size", "workers"),
    [(7, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (300, 2)))],
)
def test_tables_identical_across_batch_sizes_and_workers(
    model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path, batch_size: int, workers: int
) -> None:
    predict(model, many[0], tmp_path, PredictOptions(batch_size=batch_size, workers=workers))
    assert contents(tmp_path) == many[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.slow
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=KILLS)])
def test_kill_around_any_rename_resumes_to_identical_bytes(
    model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path, step: int
) -> None:
    """No table is incomplete after the kill, and no finished chunk is predicted again."""
    source, expected = many
    driver = PREDICT + (
        "import os, signal\n"
        "rename, seen = os.replace, 0\n"
        "def kill_at(moment):\n"
        "    def replace(a, b):\n"
        "        global seen\n"
        "        for act in (lambda: None, lambda: rename(a, b)):\n"
        "            act()\n"
        "            if seen == moment: os.kill(os.getpid(), signal.SIGKILL)\n"
        "            seen += 1\n"
        "    return replace\n"
        "for moment in range(0, 40, int(sys.argv[4])):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.replace = kill_at(moment)\n"
        "        predict(model, source, out / str(moment))\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1] == 0: break\n"
        "print(moment)\n"
    )
    command = [sys.executable, "-c", driver, str(model), str(source), str(tmp_path), str(step)]
    last = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0 <= last - 2 * 9 < step  # plan, three parts, three tables, README.txt, the mark
    for moment in range(0, last, step):
        out = tmp_path / str(moment)
        for name in set(TABLES) & set(os.listdir(out)):
            assert (out / name).read_bytes() == expected[name]
        assert not (out / "predict.json").exists() or set(TABLES) < set(os.listdir(out))
        counts: list[int] = []
        predict(model, source, out, progress=lambda done, total, counts=counts: total and counts.append(done))
        assert contents(out) == expected, moment
        assert not counts or counts[0] == min(
            NUM_MANY, CHUNK * max(0, (moment - 1) // 2)
        )  # no chunk is predicted twice
        assert sorted(os.listdir(out)) == FILES


KILLED = (
    PREDICT
    + """
import os, signal
from mura_dist.inference import tables
from mura_dist.inference.predict import PredictOptions
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
compute, where, at, notes = OnnxRuntime.run, *sys.argv[4:]
def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)
def count(self, image, outputs):
    with open(notes, "a") as file: file.write(f"{len(image)}\\n")
    return compute(self, image, outputs)
OnnxRuntime.run = count
if where == "tables":
    tables.StudyAccumulator.frames = die
def progress(done, total):
    if where == "walking" and total is None or where == "reading" and total and done == int(at):
        die()
predict(model, source, out, PredictOptions(workers=2), progress=progress)
"""
)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize(
    ("phase", "at", "num_parts"),
    [
        pytest.param("walking", 0, 0, marks=KILLS),
        pytest.param("reading", 1, 0, marks=KILLS),
        pytest.param("reading", 256, 0, marks=KILLS),
        pytest.param("reading", 300, 1, marks=pytest.mark.slow),
        pytest.param("reading", 612, 2, marks=KILLS),
        ("tables", 0, 3),
    ],
)
def test_killed_run_resumes_without_predicting_twice(
    model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path, phase: str, at: int, num_parts: int
) -> None:
    """The kill comes in the walk, in a chunk, or while the tables are written."""
    source, expected, out, notes = *many, tmp_path / "out", tmp_path / "notes"
    command = [sys.executable, "-c", KILLED, str(model), str(source), str(out)]
    killed = subprocess.run([*command, phase, str(at), str(notes)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = [json.loads((out / ".parts" / f"{number:06d}.json").read_bytes()) for number in range(num_parts)]
    assert len(list((out / ".parts").glob("0*.json"))) == num_parts
    notes.write_text("")
    resumed = subprocess.run([*command, "", "0", str(notes)], capture_output=True, text=True, check=False)
    assert (resumed.returncode, resumed.stdout) == (0, "")
    assert resumed.stderr.startswith("taking over a stale lock of process ")
    assert contents(out) == expected
    num_remaining = expected["predictions.csv"].count(b"\n") - 1 - sum(len(chunk["predictions"]) for chunk in parts)
    assert sum(map(int, notes.read_text().split())) == num_remaining
    assert sorted(os.listdir(out)) == FILES


@pytest.mark.parametrize(
    ("phase", "number"),
    [("walk", signal.SIGINT), ("chunk", signal.SIGTERM), ("tables", signal.SIGTERM)],
)
def test_signal_stops_a_run_that_resumes(
    model: Path,
    many: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    phase: str,
) -> None:
    before, frames = signal.getsignal(number), tables.prediction_frame
    requests: list[int] = []

    def raise_signal_once(now: bool) -> None:
        if now and not requests:
            requests.append(1)
            signal.raise_signal(number)

    def progress(done: int, total: int | None) -> None:
        raise_signal_once(phase == "walk" if total is None else phase == "chunk" and done == CHUNK)

    if phase == "tables":
        monkeypatch.setattr(tables, "BLOCK", 100)
        monkeypatch.setattr(tables, "prediction_frame", lambda rows: (raise_signal_once(True), frames(rows))[1])
    output = {
        "walk": r"^stopped while listing the files\. The same command resumes\.$",
        "chunk": rf"^stopped after {CHUNK} of {NUM_MANY} files\. The same command resumes\.$",
        "tables": r"^stopped while writing the tables\. Nothing is lost\. The same command resumes\.$",
    }
    with pytest.raises(StopRequestedError, match=output[phase]):
        predict(model, many[0], tmp_path / "out", progress=progress)
    assert signal.getsignal(number) is before
    assert (tmp_path / "out").exists() == (phase != "walk"), "a run that has not started leaves no files"
    assert not (tmp_path / "out" / "predict.json").exists()
    predict(model, many[0], tmp_path / "out")
    assert contents(tmp_path / "out") == many[1]


def test_chunks_without_radiographs_are_written_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a million such files would wait in memory for the first radiograph."""
    monkeypatch.setattr(predict_module, "CHUNK", 10)
    (tmp_path / "in").mkdir()
    for number in range(95):
        (tmp_path / "in" / f"{number:02d}").write_bytes(b"junk")

    def stop(done: int, total: int | None) -> None:
        if done == 55:
            assert len(list((tmp_path / "out" / ".parts").glob("0*.json"))) == 5
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StopRequestedError, match=r"^stopped after 60 of 95 files"):
        predict(model, tmp_path / "in", tmp_path / "out", progress=stop)
    summary = predict(model, tmp_path / "in", tmp_path / "out")
    assert summary is not None
    assert (summary["num_files"], summary["num_failures"]) == (95, 95)


def test_finished_command_writes_nothing_again(model: Path, layout: Path, tmp_path: Path) -> None:
    first = predict(model, layout, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert (
        predict(model, layout, tmp_path / "out") == first == json.loads((tmp_path / "out" / "predict.json").read_text())
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize("finished", [True, False])
def test_different_run_in_the_same_output_is_refused(
    model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path, finished: bool
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    draw(source / "a.png")
    for number in range(CHUNK):
        (source / f"{number}").write_bytes(b"junk")

    def stop(done: int, total: int | None) -> None:
        if not finished and done == 5:
            signal.raise_signal(signal.SIGINT)

    try:
        predict(model, source, out, progress=stop)
    except StopRequestedError:
        assert not finished
    assert (out / "predict.json").exists() == finished
    for key, options in {
        "study_by": {"study_by": "file"},
        "study_type": {"study_type": "hand"},
        "format": {"format": "parquet"},
    }.items():
        with pytest.raises(
            UserError, match=rf"^--out .* holds a run with {key}=.*, this one has {key}=.* another --out"
        ):
            predict(model, source, out, PredictOptions(**options))
    other_model = tmp_path / "other.onnx"
    proto = onnx.load(model)
    proto.doc_string = "another"
    onnx.save(proto, other_model)
    with pytest.raises(UserError, match=r"holds a run with model_sha256="):
        predict(other_model, source, out)
    draw(source / "a.png", seed=9)
    with pytest.raises(UserError, match=r"holds a run with files_sha256="):
        predict(model, source, out)
    draw(source / "b.png")
    with pytest.raises(UserError, match=rf"holds a run with num_files={CHUNK + 1}, this one has num_files={CHUNK + 2}"):
        predict(model, source, out)


# ---- refusals


def test_invalid_options_are_refused(model: Path, tmp_path: Path) -> None:
    source = draw(tmp_path / "in" / "a.png").parent
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "studies.csv").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.txt").write_text("mine")
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "void.onnx").write_bytes(b"")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"inputs": tmp_path / "no"}, r"no: no such file or folder\. Give radiographs, or folders of them\.$"),
        ({"inputs": tmp_path / "empty"}, r"empty holds no files\. Give radiographs, or a folder of them\.$"),
        ({"out": source}, r"^--out .*in is the directory of radiographs itself\. Give another"),
        ({"out": source / "a.png"}, r"a\.png is a file\. Give a folder"),
        ({"out": tmp_path / "foreign"}, r"foreign holds studies\.csv of another origin\. Give another folder"),
        ({"out": tmp_path / "notes"}, r"notes holds README\.txt of another origin\. Give another folder"),
        ({"study_by": "patient"}, r"^--study-by patient: must be one of auto, folder, file\."),
        ({"format": "xlsx"}, r"^--format xlsx: must be one of csv, parquet\."),
        ({"workers": 0}, r"^--workers 0: must be at least 1\."),
        ({"workers": 257}, r"^--workers 257: must be at most 256\."),
        ({"batch_size": -1}, r"^--batch-size -1: must be at least 1\."),
        (
            {"provider": "abacus"},
            r"^--provider abacus: not a provider of this ONNX Runtime .*CPUExecutionProvider.*Name one of these",
        ),
        ({"model_path": tmp_path / "no.onnx"}, r"no\.onnx: no such file\. Give the model\.onnx"),
        ({"model_path": tmp_path}, r": a folder\. Give the model\.onnx"),
        ({"model_path": tmp_path / "text.onnx"}, r"text\.onnx is not an ONNX model"),
        ({"model_path": tmp_path / "void.onnx"}, r"void\.onnx is not an ONNX model"),
    ]
    for change, text in cases:
        paths = {"model_path": model, "inputs": source, "out": tmp_path / "out"}
        options = PredictOptions(**{key: value for key, value in change.items() if key not in paths})
        with pytest.raises(UserError, match=text) as refusal:
            predict(**paths | {key: value for key, value in change.items() if key in paths}, options=options)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "foreign" / "studies.csv").read_text() == "mine"


def test_strict_fails_after_all_tables_are_written(
    model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(model), str(many[0]), "--out", str(tmp_path / "out")]
    num = many[1]["failures.csv"].count(b"\n") - 1
    for _ in ("made", "found finished"):
        assert main([*arguments, "--strict"]) == FAILED
        output = capsys.readouterr().err
        assert len(output.splitlines()) == 1
        assert (
            f"--strict: {num} of {NUM_MANY} files failed. {tmp_path / 'out'}/failures.csv gives the reasons" in output
        )
        assert contents(tmp_path / "out") == many[1]
        assert (tmp_path / "out" / "predict.json").exists()
    assert main(arguments) == DONE
    assert f"{num} failures" in capsys.readouterr().out
    draw(tmp_path / "sound" / "a.png")
    assert main(["predict", str(model), str(tmp_path / "sound"), "--out", str(tmp_path / "s"), "--strict"]) == DONE


@pytest.mark.parametrize("name", ["studies.csv", "predict.json"])
def test_output_open_in_another_program_resumes(
    model: Path,
    many: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """Windows refuses to replace a file that a spreadsheet has open."""
    replace, arguments = os.replace, ["predict", str(model), str(many[0]), "--out", str(tmp_path / "out")]

    def replace_unless_open(source: Path, target: Path) -> None:
        if target.name == name:
            raise PermissionError(13, "Permission denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_unless_open)
    assert main(arguments) == FAILED
    output = capsys.readouterr().err
    assert len(output.splitlines()) == 1
    assert (
        f"{tmp_path / 'out' / name} cannot be written (permission denied). Close the program that has it open" in output
    )
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(OnnxRuntime, "run", lambda self, image, outputs: pytest.fail("predicted again"))
    assert main(arguments) == DONE
    assert contents(tmp_path / "out") == many[1]


def test_nan_logit_raises_run_error(model: Path, layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "run", lambda self, image, outputs: [np.full(len(image), np.nan, np.float32)])
    with pytest.raises(RunError, match=r"image1\.png: the model's logit is nan\. Export the model again"):
        predict(model, layout, tmp_path)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_unavailable_provider_never_falls_back_to_cpu(
    model: Path, provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        output = OnnxModel.load(model, provider).provider.lower()
    except UserError as refusal:
        output = str(refusal)
    assert re.match(rf"{provider}|--provider {provider}: \w+ does not start.* or give --provider cpu\.$", output)
    assert capfd.readouterr() == ("", "")


def test_corrupt_plan_is_refused(model: Path, layout: Path, tmp_path: Path) -> None:
    (tmp_path / "predict.json").write_text("{")
    with pytest.raises(UserError, match=r"predict\.json is invalid \(.*\)\. Give another --out"):
        predict(model, layout, tmp_path)


@pytest.mark.slow
def test_run_resumes_after_a_file_size_limit(model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk. The second part exceeds it."""
    driver = PREDICT + (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def limit(done, total):\n"
        "    if done == 300: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: predict(model, source, out, progress=limit)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    command = [sys.executable, "-c", driver, str(model), str(many[0]), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "File too large"
    assert sorted(os.listdir(tmp_path / ".parts")) == ["000000.json", "plan.json"]
    predict(model, many[0], tmp_path)
    assert contents(tmp_path) == many[1]


def test_predict_imports_base_packages_only(model: Path, layout: Path, tmp_path: Path) -> None:
    heavy = "{'torch', 'torchvision', 'cv2', 'matplotlib', 'onnx', 'sklearn', 'pyarrow'}"
    driver = PREDICT + f"predict(model, source, out); print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", driver, str(model), str(layout), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) in (
        [],
        ["pyarrow"],
    )  # pandas imports pyarrow where it is installed
    assert done.stderr == ""


@pytest.mark.nightly(part="files")
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("room_kib", [12, 40, 72, 108, 132, 160])
def test_run_resumes_after_a_full_disk(
    model: Path, many: tuple[Path, dict[str, bytes]], tmp_path: Path, room_kib: int
) -> None:
    """The disk is full during the walk, the parts or the tables. One line states it, and the same command resumes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={room_kib}k", "none", disk]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    arguments = ("mura-dist", "predict", model, many[0], "--out", disk / "out", "--quiet")
    try:
        failed = run(*arguments)
        assert failed.returncode == 1, (failed.stdout, failed.stderr)
        assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
        assert "No space left on device" in failed.stderr
        assert "Free some space, then run the same command." in failed.stderr
        parts = {path: path.stat().st_mtime_ns for path in (disk / "out" / ".parts").glob("0*.json")}
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        resumed = run(*arguments)
        assert (resumed.returncode, stderr_lines(resumed)) == (0, []), resumed.stderr
        assert contents(disk / "out") == many[1]
        assert len(parts) <= 3
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- session configuration


@pytest.mark.parametrize("finished", [False, True])
def test_resumed_run_keeps_its_session_config(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Later measurements on this machine have no effect, and the resumed run measures nothing."""
    loaded, folder = OnnxModel.load(model, session_config=pipelined_config()), OutputFolder(tmp_path / "out", 0, 1)

    def resolve_config(**options: Any) -> SessionConfig:
        return predict_module._resolve_session_config(folder, loaded, model, PredictOptions(**options), print)

    plan = {"model_sha256": loaded.sha256, "provider": loaded.provider, "optimisation": "extended", "batch_size": 3}
    folder.parts.mkdir(parents=True)
    (folder.summary_path if finished else folder.plan_path).write_text(json.dumps({"plan": plan} if finished else plan))
    monkeypatch.setattr(autotune, "load_tuned_config", lambda model: SessionConfig(16, 1, 1, "all"))
    monkeypatch.setattr(autotune, "tune", lambda *option_value: pytest.fail("measured"))
    for measure in (False, True):
        assert resolve_config(autotune=measure) == SessionConfig(3, 1, 1, "extended")
    assert resolve_config(batch_size=5) == replace(loaded.session_config, optimization="extended", batch_size=5)
    (folder.summary_path if finished else folder.plan_path).write_text("{}")  # of another model
    assert resolve_config() == SessionConfig(16, 1, 1, "all")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_config() == loaded.session_config


def test_autotune_is_cached_and_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_SECONDS", 0.01)
    draw(tmp_path / "in" / "a.png")
    arguments = ["predict", str(model), str(tmp_path / "in"), "--out"]
    assert main([*arguments, str(tmp_path / "plain")]) == DONE
    assert main([*arguments, str(tmp_path / "tuned"), "--autotune"]) == DONE
    assert "radiographs/s  batch size" in capsys.readouterr().err
    assert contents(tmp_path / "plain").keys() == contents(tmp_path / "tuned").keys()
    assert (tmp_path / "cache" / "mura-dist" / "tuning.json").is_file()
    laws.refusal(
        capsys, [*arguments, tmp_path / "x", "--autotune", "--batch-size", "3"], "--autotune", "--batch-size 3"
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    laws.refusal(capsys, [*arguments, tmp_path / "x", "--autotune"], "--autotune", "without torchrun")

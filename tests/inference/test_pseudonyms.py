"""Test pseudonyms: one key per site, a key table only for the site, and no patient data in any output or message."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from helpers.commands import run
from helpers.predictions import draw, draw_dicom, rows
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mura_dist.cli.main import FAILED, INVALID, STOPPED, main
from mura_dist.core import files as atomic
from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.inference import file_list, pseudonyms, study_types
from mura_dist.inference.predict import PredictOptions, predict
from mura_dist.inference.pseudonyms import Pseudonymizer

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
CANARY, CANARY_NUMBER = "Kanarienvogel", "4815162342"  # stand for a patient's name and number


pytestmark = pytest.mark.usefixtures("own_site_key")


# ---- site key


@POSIX
def test_site_key_is_created_once_and_private() -> None:
    path = pseudonyms.key_path()
    assert path == Path(os.environ["MURA_DIST_SITE_KEY"])
    key = pseudonyms.site_key()
    assert (len(key), path.read_bytes(), path.stat().st_mode & 0o777) == (64, key, 0o600)
    assert (pseudonyms.site_key(), os.listdir(path.parent)) == (key, ["site.key"])
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_default_key_path_is_in_the_user_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MURA_DIST_SITE_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("APPDATA", str(tmp_path))
    assert pseudonyms.key_path() == tmp_path / "mura-dist" / "site.key"


def test_concurrent_processes_share_one_key(tmp_path: Path) -> None:
    code = (
        "import sys; from mura_dist.inference.pseudonyms import site_key\nsys.stdin.read(1); print(site_key().decode())"
    )
    command = [sys.executable, "-c", code]
    for _ in range(2):
        Path(os.environ["MURA_DIST_SITE_KEY"]).unlink(missing_ok=True)
        started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(6)]
        for process in started:
            assert process.stdin
            process.stdin.write(b"x")
            process.stdin.flush()
        actual = {process.communicate()[0].strip() for process in started}
        assert actual == {Path(os.environ["MURA_DIST_SITE_KEY"]).read_bytes()}


def test_key_of_a_concurrent_process_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key file is missing or complete at every moment, and a key that another process wrote stays."""
    path = pseudonyms.key_path()
    fsync, other_key = os.fsync, b"o" * 64

    def create_other_key(descriptor: int) -> None:
        fsync(descriptor)
        if not path.exists():
            path.write_bytes(other_key)
            path.chmod(0o600)

    monkeypatch.setattr(os, "fsync", create_other_key)
    assert pseudonyms.site_key() == path.read_bytes() == other_key
    assert os.listdir(path.parent) == ["site.key"]


@POSIX
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o777, 0o601])
def test_key_accessible_to_others_is_refused(mode: int) -> None:
    pseudonyms.site_key()
    pseudonyms.key_path().chmod(mode)
    with pytest.raises(
        UserError, match=rf"^site key .* has mode {mode:04o}: others .* may use it\. Run chmod 600 /.*site\.key$"
    ):
        pseudonyms.site_key()


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_private_key_is_accepted(mode: int) -> None:
    key = pseudonyms.site_key()
    pseudonyms.key_path().chmod(mode)
    assert pseudonyms.site_key() == key


def test_key_inside_input_or_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, directory = tmp_path / "out", tmp_path / "in"
    (directory / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(directory)
    for location in (out / "k", out / "a/b/k", directory / "deep/k", tmp_path / "link/k", tmp_path / "x/../in/k"):
        monkeypatch.setenv("MURA_DIST_SITE_KEY", str(location))
        with pytest.raises(
            UserError,
            match=r"^site key .*/k lies inside .*/(in|out)\. Keep it elsewhere, and name the file with MURA_DIST_SITE_KEY=",
        ):
            pseudonyms.site_key(out, directory)
    assert not out.exists()
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path / "outside" / "k"))
    assert len(pseudonyms.site_key(out, directory)) == 64


def test_inaccessible_key_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir(mode=0o700)
    for location, reason in (("file/k", "not a directory|file exists"), ("folder", "is a directory|permission denied")):
        monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path / location))
        with pytest.raises(
            UserError, match=rf"^site key .*: ({reason})\. Name another file with MURA_DIST_SITE_KEY=PATH\.$"
        ):
            pseudonyms.site_key()


# ---- names


def test_pseudonym_depends_on_key_kind_and_parts_only() -> None:
    parts = [("",), ("a",), ("b",), ("a", ""), ("", "a"), ("a", "b"), ("ab",), ("\udcff",), ("é",)]
    cases = list(itertools.product((b"1" * 32, b"2" * 32), ("file", "study", "dicom"), parts))
    names = [pseudonyms.pseudonym(key, kind, *parts_of_name) for key, kind, parts_of_name in cases]
    assert names == [pseudonyms.pseudonym(key, kind, *parts_of_name) for key, kind, parts_of_name in cases]
    assert len({name.partition("-")[2] for name in names}) == len(names)
    assert all(re.fullmatch(rf"{kind}-[0-9a-f]{{16}}", name) for name, (_, kind, _) in zip(names, cases, strict=True))
    assert 1e6**2 / 2 / 16**pseudonyms.DIGITS < 1e-7  # collision probability of a million names


def test_pseudonymizer_without_key_returns_names() -> None:
    names = Pseudonymizer()
    assert (names.file("a/b.png"), names.study("a"), names.digest("0f"), names.fingerprint) == (
        "a/b.png",
        "a",
        "0f",
        None,
    )
    assert "1111" not in repr(Pseudonymizer(b"1" * 32))


# ---- pseudonymous runs


def create_source(folder: Path) -> Path:
    """Create two studies in MURA's layout, loose files, a DICOM study of two views, and a text file."""
    layout = folder / "valid/XR_HAND/patient00001"
    for seed, path in enumerate(
        [layout / "study1_positive/image1.png", layout / "study2/image1.png", folder / "loose.png"]
    ):
        draw(path, seed)
    for seed in (1, 2):
        draw_dicom(folder / f"{seed}.dcm", "1.2.276.0.1", "WRIST", "L", seed)
    draw_dicom(folder / "no-study.dcm", "", "ELBOW", "L")
    (folder / "notes.txt").write_text("none")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, without the wall-clock times of predict.json."""
    actual = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if mark := actual.get("predict.json"):
        summary = json.loads(mark)
        del summary["seconds"], summary["throughput"], summary["loading_s"]
        actual["predict.json"] = json.dumps(summary, ensure_ascii=False).encode()
    return actual


def test_key_table_maps_pseudonyms_to_names(model: Path, tmp_path: Path) -> None:
    source, table = create_source(tmp_path / "in"), tmp_path / "keys.csv"
    predict(model, source, tmp_path / "open")
    summary = predict(model, source, tmp_path / "out", PredictOptions(keytable=table))
    if os.name == "posix":
        assert table.stat().st_mode & 0o777 == 0o600
    lines = rows(table)
    assert list(lines[0]) == list(pseudonyms.COLUMNS)
    assert len(lines) == summary["num_files"] == 7
    assert len({line["pseudonym"] for line in lines}) == 7
    key_rows = {line["pseudonym"]: line for line in lines}
    open_rows = {line["path"]: line for line in rows(tmp_path / "open/predictions.csv")}
    actual = rows(tmp_path / "out/predictions.csv")
    assert len(actual) == len(open_rows) == 6
    for line in actual:
        key_row = key_rows[line["path"]]
        open_row = open_rows[key_row["path"]]
        assert (key_row["study"], key_row["study_pseudonym"]) == (open_row["study"], line["study"])
        assert {key: line[key] for key in ("study_type", "logit")} == {
            key: open_row[key] for key in ("study_type", "logit")
        }
    (failure,) = rows(tmp_path / "out/failures.csv")
    assert key_rows[failure["path"]] == {
        **key_rows[failure["path"]],
        "path": "notes.txt",
        "study": "",
        "study_pseudonym": "",
    }
    by_name = {line["study_pseudonym"]: line["study"] for line in lines}
    studies = {by_name[line["study"]]: line for line in rows(tmp_path / "out/studies.csv")}
    for line in rows(tmp_path / "open/studies.csv"):
        assert {**studies[line["study"]], "study": ""} == {**line, "study": ""}
    names = [line["path"] for line in actual]
    assert (
        names == sorted(names) != sorted(names, key=lambda name: key_rows[name]["path"])
    )  # the order does not reveal names


def test_pseudonyms_identical_in_all_runs_of_a_site(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = create_source(tmp_path / "in")
    for name in ("one", "two"):
        predict(model, source, tmp_path / name, PredictOptions(keytable=tmp_path / f"{name}.csv"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    predict(
        model, source, tmp_path / "three", PredictOptions(keytable=tmp_path / "one.csv")
    )  # equal names: the key table stays
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path / "another.key"))
    predict(model, source, tmp_path / "elsewhere", PredictOptions(keytable=tmp_path / "elsewhere.csv"))
    local, elsewhere = (rows(tmp_path / name / "predictions.csv") for name in ("one", "elsewhere"))
    assert not {line[key] for line in local for key in ("path", "study")} & {
        line[key] for line in elsewhere for key in ("path", "study")
    }


@pytest.mark.slow
def test_key_table_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    source, table = create_source(tmp_path / "in"), tmp_path / "keys.csv"
    predict(model, source, tmp_path / "out", PredictOptions(keytable=table))
    original = table.read_text()
    first, *remaining_lines = original.splitlines(keepends=True)
    invalid_tables = {
        "nothing": "",
        "another table": "a,b\n1,2\n",
        "a line less": first + "".join(remaining_lines[:-1]),
        "a line more": original + remaining_lines[-1],
        "another order": first + "".join(reversed(remaining_lines)),
        "no text": "\udcff\udcfe\0",
        "another study": original.replace('"1.dcm"', '"1.dcm"').replace("study2", "study3"),
    }
    for case, text in invalid_tables.items():
        table.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(
            UserError, match=r"^--pseudonyms .*keys\.csv, line \d+: names of another run\. Give another file\.$"
        ):
            predict(model, source, tmp_path / case, PredictOptions(keytable=table))
        assert table.read_bytes() == text.encode("utf-8", "surrogateescape")
        assert not (tmp_path / case / "predictions.csv").exists()
        predict(model, source, tmp_path / case, PredictOptions(keytable=tmp_path / f"{case}.csv"))  # the remedy
    assert (tmp_path / "nothing.csv").read_text() == original


def test_invalid_key_table_paths_are_refused(model: Path, tmp_path: Path) -> None:
    source, out = create_source(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "folder").mkdir()
    (tmp_path / "open.csv").write_text("")
    (tmp_path / "open.csv").chmod(0o644)
    cases = {
        out / "keys.csv": r"lies inside --out \(.*out\), whose names it reveals\. Give a file elsewhere",
        source / "keys.csv": r"lies inside DIRECTORY \(DIRECTORY\), whose names it reveals",
        tmp_path / "folder": r"folder is a folder\. Give a file",
        tmp_path / "none" / "keys.csv": r"no folder .*none\. Create it first",
    }
    if os.name == "posix":
        cases[tmp_path / "open.csv"] = r"has mode 0644: others than its owner may use it\. Run chmod 600 .*open\.csv"
    for location, text in cases.items():
        with pytest.raises(UserError, match=rf"^--pseudonyms .*{text}"):
            predict(model, source, out, PredictOptions(keytable=location))
    assert not out.exists()


def test_run_with_another_key_is_not_resumed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = create_source(tmp_path / "in")
    predict(model, source, tmp_path / "out", PredictOptions(keytable=tmp_path / "keys.csv"))
    with pytest.raises(UserError, match=r"holds a run with .*=.*, this one has"):
        predict(model, source, tmp_path / "out")
    monkeypatch.setenv("MURA_DIST_SITE_KEY", str(tmp_path / "another.key"))
    with pytest.raises(UserError, match=r"holds a run with files_sha256=.*, this one has"):
        predict(model, source, tmp_path / "out", PredictOptions(keytable=tmp_path / "more.csv"))


@pytest.mark.nightly(part="kills")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_kill_around_any_rename_or_link_resumes_to_identical_bytes(model: Path, tmp_path: Path) -> None:
    """The run has overlays and a key table. After a kill, no name is in OUT."""
    source, out = tmp_path / "in", tmp_path / "runs"
    draw(source / f"valid/XR_HAND/{CANARY}/study1_positive/image1.png")
    draw_dicom(source / f"{CANARY}.dcm", "1.2.276.0.1", "WRIST", "L")
    (source / f"{CANARY}.txt").write_text("none")
    predict(
        model,
        source,
        tmp_path / "whole",
        PredictOptions(keytable=tmp_path / "whole.csv", overlays=True, allow_pixels=True),
    )
    patterns, key_table = contents(tmp_path / "whole"), (tmp_path / "whole.csv").read_bytes()
    driver = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mura_dist.inference.predict import PredictOptions, predict\n"
        "model, source, out = map(Path, sys.argv[1:])\n"
        "out.mkdir()\n"
        "seen = 0\n"
        "def killing(act, moment):\n"
        "    def acts(a, b):\n"
        "        global seen\n"
        "        for one in (lambda: None, lambda: act(a, b)):\n"
        "            one()\n"
        "            if seen == moment: os.kill(os.getpid(), signal.SIGKILL)\n"
        "            seen += 1\n"
        "    return acts\n"
        "for moment in range(80):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.replace, os.link = killing(os.replace, moment), killing(os.link, moment)\n"
        "        options = PredictOptions(keytable=out / f'{moment}.csv', overlays=True, allow_pixels=True)\n"
        "        predict(model, source, out / str(moment), options)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1] == 0: break\n"
        "print(moment)\n"
    )
    command = [sys.executable, "-c", driver, str(model), str(source), str(out)]
    last = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert last >= 2 * (1 + 1 + 2 + 1 + 1 + 3 + 1)  # plan, note, overlays, part, key table, tables, mark
    for moment in range(last):
        table = out / f"{moment}.csv"
        assert canaries_in(all_bytes(out / str(moment))) == []
        assert not table.exists() or table.read_bytes() == key_table
        assert table.exists() or not (out / str(moment) / "predictions.csv").exists()
        predict(model, source, out / str(moment), PredictOptions(keytable=table, overlays=True, allow_pixels=True))
        assert contents(out / str(moment)) == patterns, moment
        assert table.read_bytes() == key_table
        assert not [path for path in out.iterdir() if path.name.startswith(f".{moment}.")]


# ---- no patient data


TEXTS = dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"), CANARY)
TEXTS |= {
    "UI": f"1.2.{CANARY_NUMBER}",
    "DA": "19481516",
    "TM": "154816",
    "DT": f"{CANARY_NUMBER}",
    "IS": "481516234",
    "DS": "4815162342",
}
TEXTS |= {"AS": "481Y"}
BYTES = dict.fromkeys(("OB", "UN", "OW"), f"{CANARY}{CANARY_NUMBER} ".encode())
REQUIRED = ("SpecificCharacterSet", "SOPClassUID", "Modality")  # required to read a radiograph


def draw_canary_dicom(path: Path, seed: int = 0) -> Path:
    """Write a DICOM that names its patient in every descriptive tag, in private tags and in sequences."""
    draw_dicom(path, f"1.2.{CANARY_NUMBER}", CANARY, CANARY, seed)
    dicom = pydicom.dcmread(path)
    for tag, (kind, multiplicity, _, retired, keyword) in DicomDictionary.items():
        if (
            tag >> 16 not in (8, 0x10, 0x18, 0x20, 0x32, 0x38, 0x40, 0x4008)
            or not keyword
            or keyword in REQUIRED
            or retired
        ):
            continue
        value = TEXTS.get(kind, BYTES.get(kind.partition(" ")[0]))
        if value is not None and multiplicity in ("1", "1-n"):
            setattr(dicom, keyword, value)
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning, item.PatientName = CANARY, "SRT", CANARY, CANARY
    dicom.AnatomicRegionSequence = Sequence([item])
    for kind, value in (*TEXTS.items(), *BYTES.items()):
        dicom.private_block(9, f"{CANARY} {kind}", create=True).add_new(1, kind, value)
    dicom.ImageComments = CANARY
    dicom.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def canary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder named after a patient, with files of every kind."""
    root = tmp_path_factory.mktemp("ward")
    folder = root / f"PATH{CANARY}"
    for seed in range(3):
        draw_canary_dicom(folder / f"{CANARY} {seed}" / f"{seed}.dcm", seed)
    original = (folder / f"{CANARY} 0" / "0.dcm").read_bytes()
    for number, data in enumerate(
        [original[:300], original[: len(original) - 900], original[:200] + b"\xff" * 300 + original[500:]]
    ):
        (folder / f"torn {CANARY} {number}.dcm").write_bytes(data)
    draw(folder / f"XR_{CANARY.upper()}" / f"{CANARY}.{CANARY}")
    draw(folder / f"valid/XR_{CANARY.upper()}/patient{CANARY}/study1_{CANARY}/image1.png")
    draw(folder / f"valid/XR_HAND/patient{CANARY}/study1_positive/image1.png")
    (folder / f"{CANARY}.txt").write_text(CANARY)
    (folder / f"{CANARY}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + CANARY.encode() * 40)
    (folder / f"gone {CANARY}").symlink_to(f"no {CANARY}")
    return folder


def output_of(result: subprocess.CompletedProcess[str]) -> bytes:
    return (result.stdout + result.stderr).encode()


def all_bytes(out: Path) -> bytes:
    files = [path for path in out.rglob("*") if path.is_file()]
    return b"\n".join([*(path.read_bytes() for path in files), *(os.fsencode(path.relative_to(out)) for path in files)])


def canaries_in(data: bytes) -> list[str]:
    """Return the canaries that `data` contains, in any case, also as 16-bit text."""
    text = data.lower().replace(b"\0", b"")
    return [word for word in (CANARY.lower(), CANARY_NUMBER, "481516", "pid-4711", "jane") if word.encode() in text]


@pytest.mark.filterwarnings("ignore")
def test_outputs_and_logs_hold_no_dicom_tags(model: Path, canary_folder: Path, tmp_path: Path) -> None:
    """Without pseudonyms the tables contain paths. The test therefore copies the files under neutral names."""
    source = tmp_path / "plain"
    for number, path in enumerate(sorted(canary_folder.rglob("*"))):
        if path.is_file():
            (source / f"{number}").parent.mkdir(exist_ok=True)
            (source / f"{number}").write_bytes(path.read_bytes())
    command = ("mura-dist", "predict", model, source, "--out", tmp_path / "out", "--overlays", "--allow-pixels")
    result = run(*command)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out/predict.json").read_bytes())
    assert summary["num_radiographs"] >= 6
    assert summary["num_failures"] >= 4
    assert summary["num_overlays"] == summary["num_radiographs"]
    assert [name for name in summary["studies_by_type"] if name != "unknown"] == []
    assert any(line["study"].startswith("dicom-") for line in rows(tmp_path / "out/predictions.csv"))
    assert canaries_in(all_bytes(tmp_path / "out") + output_of(result)) == []
    assert pseudonyms.key_path().read_bytes() not in all_bytes(tmp_path / "out") + output_of(result)


@pytest.mark.filterwarnings("ignore")
def test_pseudonymous_outputs_and_logs_hold_no_paths(model: Path, canary_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "types.csv"
    table.write_text(f"path,study_type\nXR_{CANARY.upper()}/{CANARY}.{CANARY},hand\n{CANARY} of yesterday.png,hand\n")
    command = [
        "mura-dist",
        "predict",
        model,
        canary_folder,
        "--out",
        tmp_path / "out",
        "--pseudonyms",
        tmp_path / "keys.csv",
    ]
    command += ["--overlays", "--allow-pixels", "--study-type", table]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "1 of 2 paths are not in DIRECTORY" in result.stdout
    assert canaries_in(all_bytes(tmp_path / "out") + output_of(result)) == []
    assert pseudonyms.key_path().read_bytes() not in all_bytes(tmp_path / "out") + output_of(result)
    actual = json.loads((tmp_path / "out/predict.json").read_bytes())
    assert actual["studies_by_type"] == {"XR_HAND": 2, "unknown": actual["num_studies"] - 2}
    assert CANARY in (tmp_path / "keys.csv").read_text()  # the key table maps back
    assert CANARY_NUMBER not in (tmp_path / "keys.csv").read_text()  # not even the key table holds DICOM tags
    rerun = run(*command)
    assert (rerun.returncode, canaries_in(output_of(rerun))) == (0, [])


@pytest.mark.filterwarnings("ignore")
def test_unfinished_run_holds_no_names(
    model: Path, canary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill -9, parts and plan contain no names either."""

    class KilledError(BaseException):
        pass

    def raise_killed(keytable: Path, lines: Any) -> None:
        raise KilledError

    monkeypatch.setattr(pseudonyms, "write_keytable", raise_killed)
    with pytest.raises(KilledError):
        predict(model, canary_folder, tmp_path / "out", PredictOptions(keytable=tmp_path / "keys.csv", overlays=True))
    assert sorted(os.listdir(tmp_path / "out/.parts")) == ["000000.json", "plan.json"]
    assert canaries_in(all_bytes(tmp_path / "out")) == []


@pytest.mark.parametrize("directory", ["empty", "none", "several", "ward", "crash", "io", "strange", "table"])
def test_messages_hold_no_paths(
    directory: str,
    model: Path,
    canary_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The messages are refusals, run errors, system errors and unexpected exceptions."""
    folder = tmp_path / f"of {CANARY}"
    folder.mkdir()
    table = tmp_path / "types.csv"
    table.write_text(f"path,study_type\n{CANARY}.png,hand\n{CANARY}.png,elbow\n")
    source, options = canary_folder, ["--study-type", "hand"]
    further_inputs = [str(folder / f"{CANARY}1.png"), str(folder / f"{CANARY}2.png")] if directory == "several" else []

    def raiser(error: Exception) -> Callable[..., Any]:
        def raise_error(*arguments: Any, **options: Any) -> Any:
            raise error

        return raise_error

    if directory in ("empty", "none"):
        source = {"empty": folder, "none": folder / "none"}[directory]
    elif directory == "ward":
        options = ["--out", str(source)]
    elif directory == "table":
        options = ["--study-type", str(table)]
    elif directory == "crash":
        monkeypatch.setattr(file_list, "list_files", raiser(KeyError(f"{canary_folder}/{CANARY}")))
    elif directory == "io":
        monkeypatch.setattr(
            file_list, "list_files", raiser(PermissionError(13, "Permission denied", f"{canary_folder}/{CANARY}"))
        )
    elif directory == "strange":
        monkeypatch.setattr(file_list, "list_files", raiser(OSError(f"cannot identify {canary_folder}/{CANARY}")))
    command = ["predict", str(model), str(source), *further_inputs, "--out", str(tmp_path / "out"), *options]
    status = main([*command, "--pseudonyms", str(tmp_path / "keys.csv")])
    captured = capfd.readouterr()
    assert status == (FAILED if directory in ("crash", "io", "strange") else INVALID)
    assert canaries_in((captured.out + captured.err).encode()) == []
    assert len(captured.err.splitlines()) == 1
    patterns = {
        "crash": r"KeyError in .*\.py, line \d+\. To see more, run the command without",
        "io": "Permission denied. Fix this",
    }
    patterns["strange"] = patterns["crash"].replace("Key", "OS")
    patterns["several"] = "input 2, input 3: no such file or folder"
    assert re.search(patterns.get(directory, "DIRECTORY|is both XR_HAND and XR_ELBOW"), captured.err)


def test_usage_error_does_not_repeat_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    """A shell expands DIRECTORY/* after an option that does not exist."""
    command = ["verify", "in", *(f"in/{CANARY}{number}.png" for number in range(3))]
    for option in (["--pseudonyms", "keys.csv"], ["--pseudonyms=keys.csv"]):
        assert main([*command, "--", *option]) == INVALID
        assert capfd.readouterr() == ("", "mura-dist: Got unexpected extra arguments. See mura-dist verify --help.\n")
    assert main(command) == INVALID
    assert f"extra arguments (in/{CANARY}0.png" in capfd.readouterr().err


def test_stop_under_pseudonyms_keeps_its_exit_status(
    model: Path, canary_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mura_dist.core.errors import StopRequestedError

    def stop(*arguments: Any, **options: Any) -> Any:
        raise StopRequestedError("stopped after 0 of 9 files. The same command resumes.")

    monkeypatch.setattr(file_list, "list_files", stop)
    command = [
        "predict",
        str(model),
        str(canary_folder),
        "--out",
        str(tmp_path / "out"),
        "--pseudonyms",
        str(tmp_path / "keys.csv"),
    ]
    assert main(command) == STOPPED


# ---- studies of one DICOM UID


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_dicom_study_is_split_by_body_part_and_side(model: Path, tmp_path: Path) -> None:
    source, uid = tmp_path / "in", "1.2.276.0.1"
    for number, (body_part, side) in enumerate(
        [("WRIST", "L"), ("wrist ", "left"), ("WRIST", "R"), ("WRIST", "R "), ("ELBOW", "R")]
    ):
        draw_dicom(source / f"{number}.dcm", uid, body_part, side, number)
    series = pydicom.dcmread(draw_dicom(source / "5.dcm", uid, "WRIST", "B", 5))
    series.ImageLaterality = "L"  # the series holds both sides
    series.save_as(source / "5.dcm")
    coded = pydicom.dcmread(draw_dicom(source / "6.dcm", uid, "", "R", 6))
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = "16953009", "SCT"
    coded.AnatomicRegionSequence = Sequence([item])
    coded.save_as(source / "6.dcm")
    predict(model, source, tmp_path / "out")
    study = {line["path"][0]: (line["study"], line["study_type"]) for line in rows(tmp_path / "out/predictions.csv")}
    groups = ("015", "23", "46")
    assert [len({study[study_name] for study_name in group}) for group in groups] == [1, 1, 1]
    assert len(set(study.values())) == 3
    assert [study[group[0]][1] for group in groups] == ["XR_WRIST", "XR_WRIST", "XR_ELBOW"]


# ---- study types


def test_unknown_study_type_has_no_call(model: Path, tmp_path: Path) -> None:
    draw(tmp_path / "in/a.png")
    draw_dicom(tmp_path / "in/b.dcm", "1.2.3", "CLAVICLE", "L")
    draw_dicom(tmp_path / "in/c.dcm", "1.2.4", "ELBOW", "L")  # MURA's, but this model has no threshold for it
    summary = predict(model, tmp_path / "in", tmp_path / "out")
    actual = {line["study_type"]: line for line in rows(tmp_path / "out/studies.csv")}
    assert set(actual) == {"unknown", "XR_ELBOW"}
    assert all((line["threshold"], line["call"], line["band"]) == ("", "", "") for line in actual.values())
    warning_lines = [line for line in summary["warnings"] if "column gate" not in line]
    assert (summary["num_calls"], len(warning_lines)) == (0, 2)


VALID_TYPES = ("XR_HAND", "XR_WRIST", "XR_HIP")


@pytest.mark.parametrize(
    ("typo", "suggestion"),
    [
        *(("XR_HANDS", "XR_HAND"), ("HANDS", "XR_HAND"), ("wrst", "XR_WRIST"), ("SHOULDR", "XR_SHOULDER")),
        *(("XR-WRISTS", "XR_WRIST"), ("xr_elbows", "XR_ELBOW"), ("HUMERAS", "XR_HUMERUS"), ("FOREAM", "XR_FOREARM")),
        *(("HIPS", "XR_HIP"), ("XR_FINGRE", "XR_FINGER")),
    ],
)
def test_likely_typo_of_a_study_type_is_refused(typo: str, suggestion: str) -> None:
    for override in (study_types.read_override(typo), {"a": "XR_HAND", "b": study_types.normalize(typo)}):
        with pytest.raises(
            UserError, match=rf"^--study-type {typo}: no such study type \(did you mean {suggestion}\?\)\. Give one of"
        ):
            study_types.check(override, VALID_TYPES)


UNKNOWN_TYPES = (
    "HEAD KNEE ANKLE FOOT TOE PELVIS CHEST SPINE SKULL CLAVICLE SCAPULA FEMUR TIBIA THUMB FOREFOOT ARM UPPERARM LEG"
)


@pytest.mark.parametrize("name", UNKNOWN_TYPES.split())
def test_foreign_study_type_is_accepted_with_a_warning(name: str) -> None:
    for override in (name, f"XR_{name}"):
        (line,) = study_types.check(override, VALID_TYPES)
        assert re.match(
            rf"--study-type {override}: no study type of MURA or of this model( \(did.*\))?, so no call is made$", line
        )


def test_known_study_type_has_no_warning() -> None:
    for name in (*mura.STUDY_TYPES, *VALID_TYPES):
        assert study_types.check(study_types.read_override(name), VALID_TYPES) == []
    assert (
        study_types.check(None, VALID_TYPES)
        == study_types.check({}, VALID_TYPES)
        == study_types.check({"a": ""}, VALID_TYPES)
        == []
    )


def test_study_type_table_without_matching_paths_is_refused(model: Path, tmp_path: Path) -> None:
    source, table = create_source(tmp_path / "in"), tmp_path / "types.csv"
    table.write_text(f"path,study_type\n{source}/loose.png,hand\nelsewhere.png,hand\n")
    with pytest.raises(UserError, match=r"^--study-type: none of its 2 paths is in DIRECTORY\. Write them relative to"):
        predict(model, source, tmp_path / "out", PredictOptions(study_type=str(table)))
    assert not (tmp_path / "out").exists()
    table.write_text("path,study_type\nloose.png,hand\nelsewhere.png,hand\n")
    summary = predict(model, source, tmp_path / "out", PredictOptions(study_type=str(table)))
    assert summary["warnings"][0] == "--study-type: 1 of 2 paths are not in DIRECTORY"
    table.write_text("path,study_type\nloose.png,HAND\n")
    assert study_types.match(study_types.read_override(str(table)), [file_list.printable_path("loose.png")]) == []


# ---- files


def test_creating_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic.creating(path, mode=0o600) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(FileExistsError), atomic.creating(path) as file:
        file.write(b"second")
    with pytest.raises(ZeroDivisionError), atomic.creating(tmp_path / "b") as file:
        raise ZeroDivisionError
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"first", ["a"])


def test_key_table_quotes_all_names(tmp_path: Path) -> None:
    names = ['a"b', "a,b", "a\nb", "a\rb", "a\r\nb", "", "\\xff", "é", "=1+1"]
    lines = [(name, f"file-{location}", name, f"study-{location}") for location, name in enumerate(names)]
    pseudonyms.write_keytable(tmp_path / "keys.csv", lambda: lines)
    pseudonyms.write_keytable(tmp_path / "keys.csv", lambda: lines)
    with open(tmp_path / "keys.csv", newline="", encoding="utf-8") as file:
        actual = [tuple(line) for line in csv.reader(file)]
    formula = ("./=1+1", "file-8", "./=1+1", "study-8")
    assert actual == [pseudonyms.COLUMNS, *lines[:-1], formula]
    plain = (tmp_path / "keys.csv").read_bytes().replace(b"./", b"")  # as earlier versions wrote it
    (tmp_path / "keys.csv").write_bytes(plain)
    pseudonyms.write_keytable(tmp_path / "keys.csv", lambda: lines)


def test_scratch_file_list_is_private(model: Path, tmp_path: Path) -> None:
    """The list contains every file name, and a killed run leaves it behind."""
    draw(tmp_path / "in" / "a.png")
    (tmp_path / "private").mkdir()
    modes: set[int] = set()

    def record_modes(done: int, total: int | None) -> None:
        modes.update(path.stat().st_mode & 0o777 for path in (tmp_path / "private").glob(".*.scratch"))

    options = PredictOptions(keytable=tmp_path / "private" / "keys.csv")
    predict(model, tmp_path / "in", tmp_path / "out", options, progress=record_modes)
    assert modes == {0o600}
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["keys.csv"]

"""Test the counts of notes on ignored DICOM attributes: one run, a resumed run, old parts, two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.dicoms import CR, dicom
from helpers.models import card_of
from helpers.predictions import contents, draw
from helpers.ranks import LAUNCHERS, start_rank

from mura_dist.cli.main import DONE, main
from mura_dist.inference import predict as predict_module
from mura_dist.inference import tables
from mura_dist.inference.page.study import UploadReader
from mura_dist.inference.predict import PredictOptions, predict

CENTER, SLOPE = "WindowCenter unusable and ignored", "RescaleSlope unusable and ignored"
SHAPE = "PresentationLUTShape contradicts PhotometricInterpretation and is followed"
EXPECTED = {SHAPE: 1, SLOPE: 1, CENTER: 3}
RANK = """
import sys
from mura_dist.cli.main import main
from mura_dist.inference import predict
predict.CHUNK = 2
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""

pytestmark = pytest.mark.usefixtures("own_site_key")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create nine files in five chunks: valid ones, a PNG, a corrupt one, and five DICOMs with unusable attributes."""
    monkeypatch.setattr(predict_module, "CHUNK", 2)
    unusable = {"WindowCenter": b"Doe^Jane", "WindowWidth": "9"}
    labels: list[dict[str, Any]] = [
        {},
        unusable,
        {},
        unusable | {"RescaleSlope": "0", "RescaleIntercept": "1"},
        unusable,
        {},
    ]
    labels.append({"PresentationLUTShape": "INVERSE"})
    folder = tmp_path / "in"
    draw(folder / "9.png")
    (folder / "8.dcm").write_bytes(b"junk")
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 48), dtype=np.uint16)
    for number, attributes in enumerate(labels):
        data = dicom(pixels, bits=12, Modality="CR", SOPClassUID=CR, StudyInstanceUID=f"1.2.{number}", **attributes)
        (folder / f"{number}.dcm").write_bytes(data)
    return folder


def test_notes_are_counted_and_printed(
    model: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["predict", str(model), str(source), "--out", str(out), "--quiet"]) == DONE
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.startswith("note: ")] == [
        f"note: {note} in {number} of 8 radiographs" for note, number in EXPECTED.items()
    ]
    assert json.loads((out / "predict.json").read_text())["radiographs_by_note"] == EXPECTED
    assert all("Doe" not in path.read_text() for path in out.iterdir())
    assert main(["predict", str(model), str(source), "--out", str(out), "--quiet"]) == DONE
    assert f"note: {CENTER} in 3 of 8 radiographs" in capsys.readouterr().out, (
        "the finished command prints the notes again"
    )


def test_upload_reader_returns_notes(source: Path) -> None:
    assert UploadReader(32)((source / "1.dcm").read_bytes()).notes == (CENTER,)
    assert UploadReader(32)((source / "0.dcm").read_bytes()).notes == ()


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_notes_of_resumed_prediction_are_complete(model: Path, source: Path, tmp_path: Path, at: int) -> None:
    def progress(done: int, total: int | None) -> None:
        if total and done == at:
            raise _KilledError

    with pytest.raises(_KilledError):
        predict(model, source, tmp_path / "out", PredictOptions(workers=1), progress=progress)
    assert predict(model, source, tmp_path / "out")["radiographs_by_note"] == EXPECTED


def test_parts_without_notes_are_read(tmp_path: Path) -> None:
    parts = [{"predictions": [[name, name, "XR_HAND", 0.0, "ok"]], "failures": []} for name in "abc"]
    parts[1] |= {"notes": {CENTER: 1}}
    tally = tables.write(tmp_path, lambda: parts, card_of(), "csv", tmp_path / "studies.sqlite")
    assert tally.radiographs_by_note == {CENTER: 1}


@pytest.mark.slow
def test_notes_of_two_ranks_equal_one_process(model: Path, source: Path, tmp_path: Path) -> None:
    predict(model, source, tmp_path / "alone")
    (tmp_path / "rank.py").write_text(RANK)
    command = ("predict", model, source, "--out", tmp_path / "out", "--workers", 1)
    ranks = [start_rank(tmp_path / "rank.py", LAUNCHERS["Slurm"](rank, 2), *command) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert json.loads((tmp_path / "out/predict.json").read_text())["radiographs_by_note"] == EXPECTED
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")

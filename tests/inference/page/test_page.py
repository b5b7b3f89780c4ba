"""Test the page: its texts (without a browser), and the running server (in Chromium)."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from helpers import faulty_upload_reader
from helpers.commands import free_port
from helpers.models import card_of, tiny, with_card
from helpers.page import choose, chromium, served, until, upload
from helpers.studies import simulated
from PIL import Image
from sklearn.datasets import load_sample_image

from mura_dist.cli.main import DONE, INVALID, main
from mura_dist.core.errors import UserError, install_remedy
from mura_dist.data import gate, mura, radiograph
from mura_dist.inference.export.onnx import export
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.page import examples, failures, privacy, study, wording
from mura_dist.inference.page.study_input import example_title
from mura_dist.metrics import summary
from mura_dist.metrics.classification import sigmoid
from mura_dist.metrics.operating_points import Band, FittedThresholds, StudyTypeThresholds
from mura_dist.models.card import Card, PrecisionChange, TrainedOn

SIDE = 128  # a map of 4 x 4 cells

# ---- a model with one study type for each outcome on the first study of the phantoms


@pytest.fixture(scope="module")
def views(phantoms: Path) -> list[Path]:
    """Return the files of a phantom study with at least three views."""
    folders = sorted({path.parent for path in phantoms.rglob("*.png")})
    return sorted(next(folder for folder in folders if len(list(folder.iterdir())) >= 3).iterdir())


def card_with_outcomes(probability: float, kind: str = "radiographs", num_studies: int = 300) -> Card:
    """Return a card that flags XR_HAND at `probability`, not XR_WRIST; XR_ELBOW is uncertain, XR_FINGER has no threshold."""
    low, high = probability - 0.05, probability + 0.05
    thresholds = {"XR_HAND": low, "XR_WRIST": high, "XR_ELBOW": high}
    studies = simulated(num_studies, num_studies // 2).replace({"study_type": {"XR_ELBOW": "XR_WRIST"}})
    called = studies.assign(call=(studies["probability"] > studies["study_type"].map(thresholds)).astype(int))
    measured = summary.compute_metrics(called, resamples=200) | {  # as evaluate writes it
        "curves": summary.compute_threshold_curves(called, resamples=200),
        "thresholds": thresholds,
        "split": "valid",
        "note": None,
        "measured_on": kind,
    }

    def points(band: Band) -> StudyTypeThresholds:
        return StudyTypeThresholds(
            num_normal=99, num_abnormal=99, pooled=False, odds_shift=0.0, slope=1.0, intercept=0.5, band=band
        )

    bands = {"XR_HAND": Band(low=low - 0.02, high=low), "XR_WRIST": Band(low=high, high=high + 0.02)}
    bands["XR_ELBOW"] = Band(low=low, high=high)
    return card_of(SIDE).model_copy(
        update={
            "study_types": ["XR_ELBOW", "XR_FINGER", "XR_HAND", "XR_WRIST"],
            "thresholds": thresholds,
            "metrics": measured,
            "calibration": FittedThresholds(
                fitted_on="tune", by_study_type={name: points(band) for name, band in bands.items()}
            ),
            "trained_on": TrainedOn(kind=kind, manifest_sha256="0" * 64, num_radiographs=9),
        }
    )


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plain.onnx"
    network = tiny()
    with torch.no_grad():
        network.classifier.weight *= 10  # so that its maps are not near 0
    export(network, card_of(SIDE), path)
    return path


@pytest.fixture(scope="module")
def outcome_model(plain_model: Path, views: list[Path]) -> Path:
    logits = OnnxModel.load(plain_model).logits(np.stack([radiograph.read(path, SIDE) for path in views])[:, None])
    return with_card(
        plain_model, card_with_outcomes(float(sigmoid(logits).mean())), plain_model.with_name("telling.onnx")
    )


@pytest.fixture(scope="module")
def trained_on_phantoms(outcome_model: Path) -> Path:
    """Return a model of drawings that was measured on fewer than 30 studies of each label and study type, as the demo."""
    probability = OnnxModel.load(outcome_model).card.thresholds["XR_HAND"] + 0.05
    return with_card(
        outcome_model, card_with_outcomes(probability, "phantoms", 60), outcome_model.with_name("drawings.onnx")
    )


@pytest.fixture(scope="module")
def service(outcome_model: Path) -> Iterator[study.InferenceService]:
    with study.open_inference_service(OnnxModel.load(outcome_model)) as service:
        yield service


def predict_study(service: study.InferenceService, files: list[Path], study_type: str) -> study.StudyAnswer:
    result = service.predict([path.name for path in files], [path.read_bytes() for path in files])
    return study.build_result(result, study_type, service.card)


OUTCOMES = {"XR_HAND": "flagged", "XR_WRIST": "none_flagged", "XR_ELBOW": "uncertain", "XR_FINGER": "no_call"}


# ---- texts


@pytest.mark.parametrize("study_type", OUTCOMES)
@pytest.mark.parametrize("number", [1, 3])
def test_result_equals_predict(
    service: study.InferenceService,
    outcome_model: Path,
    views: list[Path],
    study_type: str,
    number: int,
    tmp_path: Path,
) -> None:
    """The rows of studies.csv and predictions.csv equal those of `predict` for the same files as one study."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in views[:number]:
        shutil.copy(path, folder)
    arguments = [
        "predict",
        outcome_model,
        folder,
        "--out",
        tmp_path / "out",
        "--study-by",
        "folder",
        "--study-type",
        study_type,
        "--quiet",
    ]
    assert main([str(word) for word in arguments]) == DONE
    result = predict_study(service, views[:number], study_type)
    for name, page_frame in (("studies", result.studies), ("predictions", result.predictions)):
        expected_frame = pd.read_csv(tmp_path / "out" / f"{name}.csv", dtype=str).drop(columns="study")
        assert len(expected_frame) > 0
        from_csv = pd.read_csv(io.StringIO(page_frame.to_csv(index=False)), dtype=str).drop(columns="study")
        pd.testing.assert_frame_equal(from_csv, expected_frame)


@pytest.mark.parametrize(("study_type", "outcome"), OUTCOMES.items())
def test_text_of_each_outcome(
    service: study.InferenceService, views: list[Path], study_type: str, outcome: wording.Outcome
) -> None:
    result = predict_study(service, views, study_type)
    assert wording.outcome(result) == outcome
    lines = " ".join([wording.lead_sentence(result), *wording.explanation_lines(result, service.card)])
    assert f"{result.probability:.2f}" in lines
    for text in (
        wording.HEADLINES[outcome],
        lines.replace("abnormal", "").replace("normal hand studies in", "").replace("normal elbow", ""),
    ):
        assert "normal" not in text.lower().replace("abnormality", "")
    group = service.card.metrics["by_study_type"].get(study_type, {})
    assert "Probability of an abnormality: " in lines
    assert f"(mean of {len(views)} pictures)" in lines
    for word in ("logit", "split", "valid", "mean over", "view"):
        assert word not in lines
    if outcome == "none_flagged":
        missed = [round(100 * (1 - group[name])) for name in ("sensitivity", "sensitivity_high", "sensitivity_low")]
        num, wrong = group["confusion"]["fn"] + group["confusion"]["tp"], group["confusion"]["fn"]
        assert f"Of {num} abnormal wrist studies in the test set, {wrong} were missed: {missed[0]} % " in lines
        assert f"(95 % interval {missed[1]} % to {missed[2]} %)." in lines
        assert "The test set is not from your hospital." in lines
    if outcome == "flagged":
        alarms = [round(100 * (1 - group[name])) for name in ("specificity", "specificity_high", "specificity_low")]
        num, wrong = group["confusion"]["fp"] + group["confusion"]["tn"], group["confusion"]["fp"]
        assert f"Of {num} normal hand studies in the test set, {wrong} were flagged: {alarms[0]} % " in lines
        assert f"(95 % interval {alarms[1]} % to {alarms[2]} %)." in lines
    if outcome == "no_call":
        assert "No threshold was evaluated for finger studies" in lines


@pytest.mark.parametrize("num_known", [0, 1, -1])
def test_model_of_drawings_calls_known_drawings_only(
    trained_on_phantoms: Path, views: list[Path], num_known: int
) -> None:
    """One picture that is not a known drawing withholds the result of the study."""
    known_drawings = views if num_known == -1 else views[:num_known]
    digests = frozenset(hashlib.sha256(path.read_bytes()).hexdigest() for path in known_drawings)
    with study.open_inference_service(OnnxModel.load(trained_on_phantoms), drawings=digests) as service:
        for study_type, outcome in OUTCOMES.items():
            result = predict_study(service, views, study_type)
            lines = " ".join([wording.lead_sentence(result), *wording.explanation_lines(result, service.card)])
            values = [result.cell(name) for name in ("call", "band", "threshold", "calibrated_probability")]
            if known_drawings == views:
                assert wording.outcome(result) == outcome
                assert f"{result.probability:.2f}" in lines
                assert ("The test set consists of computer drawings." in lines) == (
                    study_type in ("XR_HAND", "XR_WRIST")
                )
                assert "hospital" not in lines
                assert (result.cell("call") is None) == (outcome == "no_call")
            else:
                assert wording.outcome(result) == "no_call"
                assert lines == " ".join(wording.WITHHELD)
                assert values == [None] * 4
            assert result.cell("trained_on") == "phantoms"


@pytest.mark.parametrize("change", [{"metrics": {}}, {"measured_on": "phantoms"}, {"curves": {}}])
def test_unmeasured_rates_are_not_reported(
    service: study.InferenceService, views: list[Path], change: dict[str, Any]
) -> None:
    card = service.card.model_copy(update={"metrics": {} if "metrics" in change else service.card.metrics | change})
    assert wording.ThresholdCurve.from_card(card, "XR_WRIST") is None
    lines = " ".join(wording.explanation_lines(predict_study(service, views, "XR_WRIST"), card))
    assert ("was not measured on radiographs" in lines) == ("curves" not in change)
    assert ("were missed: " in lines) == ("curves" in change)


def test_threshold_curves_equal_metrics() -> None:
    studies = simulated(300, 120)
    curves = summary.compute_threshold_curves(studies, resamples=300)
    assert set(curves) == {"XR_ELBOW", "XR_HAND"}
    json.dumps(curves, allow_nan=False)
    for index in (0, 24, 49, 80, 98):
        threshold = summary.CURVE_THRESHOLDS[index]
        expected = summary.compute_metrics(studies, threshold=threshold, resamples=300)["by_study_type"]
        for name, columns in curves.items():
            assert columns["num_studies"] == expected[name]["num_studies"]
            for key in (
                "sensitivity",
                "sensitivity_low",
                "sensitivity_high",
                "specificity",
                "specificity_low",
                "specificity_high",
            ):
                expected_frame = expected[name][key]
                assert columns[key][index] == (
                    None if expected_frame is None else pytest.approx(expected_frame, abs=6e-5)
                ), (name, key)
    one_label = studies.assign(label=studies["study_type"].eq("XR_HAND").astype(int))
    assert summary.compute_threshold_curves(one_label, resamples=10) == {}


def file_of(name: str, identity: radiograph.DicomIdentity | None = None) -> study.StudyFile:
    return study.StudyFile(name, study.Upload(np.zeros((SIDE, SIDE), np.uint8), None, identity, "ok", ""), None)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["XR_WRIST/patient00001/study1_positive/image1.png"], {"XR_WRIST"}),
        (["XR_WRIST_patient00001_study1_image1.png", "XR_WRIST-2.png"], {"XR_WRIST"}),
        (["C:\\data\\XR_HAND\\patient1\\study1\\image1.png"], {"XR_HAND"}),
        (["XR_WRIST_1.png", "XR_HAND_1.png"], {"XR_WRIST", "XR_HAND"}),
        (["XR_WRIST_1.png", "image.png"], {"XR_WRIST"}),
        (["XR_SHOULDER_1.png"], {"XR_SHOULDER"}),  # in MURA, unknown to this model
        (["XR_HIP_1.png"], {"XR_HIP"}),  # known to the model, not in MURA
        (["image1.png"], set()),
        (["XR_NOSE_1.png"], set()),
        (["myXR_WRIST_1.png"], set()),
    ],
)
def test_study_types_from_names(service: study.InferenceService, names: list[str], expected: set[str]) -> None:
    card = service.card.model_copy(update={"study_types": [*service.card.study_types, "XR_HIP"]})
    assert study.detect_study_types([file_of(name) for name in names], card) == expected


@pytest.mark.parametrize(
    ("body_part", "expected"), [("WRIST", {"XR_WRIST"}), ("HAND", {"XR_HAND"}), ("DOE^JOHN", set()), ("", set())]
)
def test_study_type_from_dicom(service: study.InferenceService, body_part: str, expected: set[str]) -> None:
    identity = radiograph.DicomIdentity("1.2.3", body_part, "L")
    assert study.detect_study_types([file_of("a.dcm", identity)], service.card) == expected
    flipped = radiograph.DicomIdentity("1.2.4", body_part, "L")
    for identities, number in (([identity, identity, None], 1), ([identity, flipped], 2), ([None], 0)):
        assert study.num_studies([file_of("a.dcm", item) for item in identities]) == number


def test_failed_read_starts_new_pool(outcome_model: Path, views: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call starts a new worker pool."""
    monkeypatch.setattr(study, "UploadReader", faulty_upload_reader.UploadReader)
    good = views[0].read_bytes()
    with study.open_inference_service(OnnxModel.load(outcome_model)) as service:
        for _ in range(2):
            with pytest.raises(ValueError, match="no"):
                service.predict(["a", "b", "c"], [good, b"raise", good])
            assert [file.upload.passes_gate for file in service.predict(["a", "b", "c"], [good, b"", good])] == [
                True,
                False,
                True,
            ]


@pytest.mark.parametrize("where", [(radiograph, "read_details"), (gate, "classify")])
def test_reader_error_fails_one_file(
    views: list[Path], where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(*where, no_memory)
    assert study.UploadReader(SIDE)(views[0].read_bytes()).failure == "it could not be read"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_output_fails_the_file(outcome_model: Path, views: list[Path], value: float) -> None:
    proto = onnx.load(outcome_model)
    weights = {item.name: item for item in proto.graph.initializer}
    head = [
        weights[name] for node in proto.graph.node if node.op_type == "Conv" for name in node.input if name in weights
    ]
    broken = np.full(onnx.numpy_helper.to_array(head[-1]).shape, value, np.float32)
    head[-1].CopyFrom(onnx.numpy_helper.from_array(broken, head[-1].name))
    with study.open_inference_service(OnnxModel.from_bytes(proto.SerializeToString(), "broken.onnx")) as service:
        (file,) = service.predict(["a.png"], [views[0].read_bytes()])
    assert file.output is None
    assert failures.failure_sentence(file.upload.code, file.upload.failure).startswith(
        "the model's output for this picture is not a number. The model is broken: export it again."
    )


def test_error_rates_have_caveats(service: study.InferenceService) -> None:
    change = PrecisionChange(
        engine="x", num_radiographs=9, num_studies=500, mean_probability=0.01, max_probability=0.1, num_changed_calls=3
    )
    metrics = service.card.metrics | {"note": "optimistic: this split chose the model"}
    card = service.card.model_copy(update={"metrics": metrics, "precision": "int8", "change": change})
    lines = " ".join(wording.error_rate_lines("none_flagged", "XR_WRIST", card))
    for text in (lines, wording.ThresholdCurve.from_card(card, "XR_WRIST").caveat):
        for caveat in (
            "not from your hospital",
            "optimistic: this set chose",
            "measured in fp32",
            "int8 changed 3 of 500",
        ):
            assert caveat in text


@pytest.mark.shared
def test_hostile_files_get_messages_and_others_are_read(
    service: study.InferenceService, shared: Path, views: list[Path]
) -> None:
    files = sorted(path for path in (shared / "hostile").rglob("*") if path.is_file())
    uploads = service.read([path.read_bytes() for path in (*files, views[0])])
    assert len(files) > 150
    num_failed = 0
    for path, decoded in zip(files, uploads, strict=False):
        reason, result = "", None
        try:
            result = radiograph.read_details(path, SIDE)
        except radiograph.UnreadableFileError as error:
            reason = error.reason
        assert (decoded.failure, bool(decoded.code)) == (reason, bool(reason)), path.name
        if result is None:
            assert (decoded.image, decoded.preview, decoded.passes_gate) == (None, None, False)
            assert not re.search(r"Traceback|Error|0x|/", decoded.failure.replace("and/or", "")), decoded.failure
            num_failed += 1
        else:
            np.testing.assert_array_equal(decoded.image, result.image)
            assert decoded.verdict == gate.classify(result.image, result.colors)
            assert max(decoded.preview.shape) <= study.PREVIEW_PX
    assert 0 < num_failed < len(files)
    assert uploads[-1].passes_gate


@pytest.mark.shared
def test_dicom_is_read_as_predict_reads_it(service: study.InferenceService, shared: Path) -> None:
    for path in sorted((shared / "radiographs" / "jordan-hip-dicom").glob("*.dcm"))[:3]:
        (upload,) = service.read([path.read_bytes()])
        pixels = radiograph.decode(path)
        np.testing.assert_array_equal(upload.image, radiograph.read(path, SIDE))
        assert upload.identity == radiograph.read_identity(path)
        assert max(upload.preview.shape) == min(study.PREVIEW_PX, max(pixels.shape))
        assert upload.preview.shape[0] / upload.preview.shape[1] == pytest.approx(
            pixels.shape[0] / pixels.shape[1], rel=0.01
        )


def test_unpatchable_streamlit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.formparsers import MultiPartParser

    monkeypatch.delattr(MultiPartParser, "spool_max_size")
    with pytest.raises(UserError, match=r"has no MultiPartParser\.spool_max_size. Install the version in requirements"):
        privacy.keep_uploads_in_memory()


def test_uploads_of_all_sessions_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartParser
    from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
    from streamlit.runtime.uploaded_file_manager import UploadedFileRec

    monkeypatch.setattr(MultiPartParser, "spool_max_size", MultiPartParser.spool_max_size)  # restored after the test
    add_file = MemoryUploadedFileManager.add_file
    monkeypatch.setattr(MemoryUploadedFileManager, "add_file", add_file)
    monkeypatch.setattr(privacy, "MAX_UPLOADS_BYTES", 10)
    privacy.keep_uploads_in_memory()
    manager = MemoryUploadedFileManager("/upload")
    for number in range(2):
        add_file(manager, f"session {number}", UploadedFileRec("1", "a.png", "image/png", b"12345"))
    with pytest.raises(HTTPException, match=r"503: the page holds too many uploads; try again in a minute"):
        manager.add_file("session 2", UploadedFileRec("1", "a.png", "image/png", b"1"))
    manager.remove_session_files("session 0")
    with pytest.raises(RuntimeError, match="Runtime"):  # it continues to the check of the session
        manager.add_file("session 2", UploadedFileRec("1", "a.png", "image/png", b"12345"))


def test_missing_streamlit_names_the_extra(
    plain_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "streamlit.web", None)
    monkeypatch.setitem(sys.modules, "streamlit", None)
    assert main(["page", str(plain_model)]) == INVALID
    assert install_remedy("page") in capsys.readouterr().err


def test_invalid_options_are_rejected(plain_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        grid: list[tuple[list[Any], str]] = [
            ([tmp_path / "nothing.onnx"], "no such file. Give the model.onnx"),
            ([tmp_path / "bad.onnx"], "bad.onnx"),
            ([plain_model, "--port", port], f"--address 127.0.0.1 --port {port}: cannot listen"),
            ([plain_model, "--port", 70_000], "--port 70000: must be 1 to 65535. The default is 8501."),
            ([plain_model, "--address", "203.0.113.7"], "cannot listen"),
            ([plain_model, "--address", "no such host"], "cannot listen"),
            ([plain_model, "--address", "127..0.1"], "cannot listen"),
            (
                [plain_model, "--allow-host", "https://x.example"],
                "--allow-host https://x.example: not a host name. Give it without",
            ),
            ([plain_model, "--examples", tmp_path / "nowhere"], "no such folder. Give a folder in MURA's layout"),
            ([plain_model, "--examples", tmp_path], "contains no study folder"),
        ]
        for arguments, message in grid:
            assert main(["page", *map(str, arguments)]) == INVALID, arguments
            text = capsys.readouterr().err
            assert message in text
            assert text.count("\n") == 1


# ---- in a browser


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_server_from_announcement_on(plain_model: Path, number: signal.Signals) -> None:
    """This includes the time before the server has signal handlers."""
    code = (
        "import os, sys; from pathlib import Path; from mura_dist.inference.page.server import serve\n"
        "model, port, number = sys.argv[1:]\n"
        "serve(Path(model), port=int(port), announce=lambda lines: os.kill(os.getpid(), int(number)))"
    )
    command = [sys.executable, "-c", code, str(plain_model), str(free_port()), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def expect(locator: Any) -> Any:
    """Return Playwright's `expect`, which waits, since old elements stay until a run of the script ends."""
    from playwright.sync_api import expect

    return expect(locator)


def download_equals(page: Any, label: str, text: str) -> bool:
    """Return whether the button `label` downloads `text`."""
    with page.expect_download() as coming:
        page.get_by_role("button", name=label).click()
    return Path(coming.value.path()).read_text() == text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(
    browser: Any, outcome_model: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, Path]]:
    """Yield the address, the process id, and the folder of temporary files, which is also the home folder."""
    scratch = tmp_path_factory.mktemp("scratch")
    with served(outcome_model, "--examples", phantoms, env={"TMPDIR": str(scratch), "HOME": str(scratch)}) as (
        address,
        process,
    ):
        yield address, process.pid, scratch


@pytest.fixture
def page(browser: Any, server: tuple[str, int, Path]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.requested, page.cached, page.console = [], [], []
    page.on("console", lambda message: page.console.append(message.text))
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("response", lambda reply: page.cached.extend(_cached(reply)))
    page.goto(server[0])
    page.get_by_role("heading", level=1).wait_for()
    # Streamlit draws from the top, and Tab finds only elements that exist.
    page.get_by_text("About this model").wait_for()
    yield page
    strangers = [
        url
        for url in page.requested
        if not url.startswith((server[0], server[0].replace("http", "ws"), "data:", "blob:"))
    ]
    context.close()
    assert strangers == []
    assert page.cached == []
    assert [text for text in page.console if "content security policy" in text.lower()] == []


def _cached(reply: Any) -> Iterator[str]:
    """Yield the address of a study's file that a browser may cache."""
    if urlsplit(reply.url).path.startswith("/media/") and reply.headers.get("cache-control") != "no-store":
        yield reply.url


def wait_for_outcome(page: Any, headline: str) -> str:
    """Return the text of the outcome with this headline."""
    section = page.locator("section.outcome")
    section.get_by_role("heading", name=headline, exact=True).wait_for()
    return str(section.inner_text())


def example_of(phantoms: Path, study_type: str) -> str:
    """Return the title of the first example of a study type."""
    return example_title(next(item for item in examples.find_examples(phantoms) if item.study_type == study_type))


def num_pictures(page: Any) -> int:
    return int(page.locator("img[alt^='Radiograph']").count())


@pytest.mark.slow
def test_study_of_several_views(
    page: Any, outcome_model: Path, views: list[Path], service: study.InferenceService, tmp_path: Path
) -> None:
    """Upload and choose; maps are off at first; the slider changes nothing else; downloads equal those of `predict`."""
    assert page.locator(".terms").inner_text().lower() == f"{mura.TERMS}."
    upload(page, *views)
    page.get_by_text("Choose the study type. The result depends on it.").wait_for()
    until(lambda: num_pictures(page) == len(views))
    assert page.locator("img[alt*='under its activation map']").count() == 0
    for study_type, outcome in OUTCOMES.items():
        choose(page, "Study type", mura.display_name(study_type))
        outcome_text = wait_for_outcome(page, wording.HEADLINES[outcome])
        result = predict_study(service, views, study_type)
        for line in (wording.lead_sentence(result), *wording.explanation_lines(result, service.card)):
            assert line in outcome_text
        sliding = page.get_by_role("heading", name="Another threshold")
        expect(sliding).to_have_count(int(study_type in ("XR_HAND", "XR_WRIST")))
        for label, table in (("Study (CSV)", result.studies), ("Pictures (CSV)", result.predictions)):
            csv = table.to_csv(index=False, lineterminator="\n")
            until(
                partial(download_equals, page, label, csv)
            )  # a busy machine offers the previous study type for a while

    choose(page, "Study type", "Wrist")
    wait_for_outcome(page, "No abnormality flagged")
    result = predict_study(service, views, "XR_WRIST")
    slider = page.get_by_role("slider", name="Threshold")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    curve = wording.ThresholdCurve.from_card(service.card, "XR_WRIST")
    value = round(float(slider.input_value()), 2)
    assert value < result.probability
    for sentence in curve.sentences(value):
        page.get_by_text(sentence).wait_for()
    expect(page.get_by_text("would be flagged")).to_be_visible()
    expect(page.get_by_text("The model's threshold is")).to_contain_text(curve.caveat)
    wait_for_outcome(page, "No abnormality flagged")  # the model's threshold
    with page.expect_download() as coming:
        page.get_by_role("button", name="Study (CSV)").click()
    assert pd.read_csv(coming.value.path())["call"].tolist() == [0]

    page.get_by_text("Show the activation map").click()
    until(lambda: page.locator("img[alt*='under its activation map']").count() == len(views))
    expect(page.locator(".scale")).to_contain_text("lowers the probability")
    assert page.locator(".scale img").count() == 0
    expect(page.get_by_text(wording.MAP_CAVEAT).first).to_be_visible()
    before = page.locator("img[alt*='picture 1']").get_attribute("src")
    strength = page.get_by_role("slider", name="Strength of the map")
    strength.focus()
    page.keyboard.press("ArrowLeft")
    until(lambda: page.locator("img[alt*='picture 1']").get_attribute("src") != before)
    with page.expect_download() as coming:
        page.get_by_role("button", name="Picture 1 with its map (PNG)").click()
    with Image.open(coming.value.path()) as drawn:
        assert drawn.format == "PNG"
        assert "LOCAL ONLY" in drawn.text["Comment"]
        assert drawn.width >= 640


@pytest.mark.slow
def test_bad_files_next_to_good_ones(page: Any, views: list[Path], tmp_path: Path) -> None:
    """Each bad file gets a message, the result uses the others, and a name with markup is shown as text."""
    markup_file = ("<b>**bold** :red[x].png", b"no picture at all")
    truncated_file = ("cut.png", views[0].read_bytes()[:3000])
    black = io.BytesIO()
    Image.new("L", (64, 64), 0).save(black, "PNG")
    blank = ("blank.png", black.getvalue())
    photograph = io.BytesIO()
    Image.fromarray(load_sample_image("flower.jpg")).save(photograph, "JPEG")
    flower = ("flower.jpg", photograph.getvalue())
    upload(page, views[0], markup_file, truncated_file, blank, flower)
    choose(page, "Study type", "Wrist")
    page.locator("section.outcome").wait_for()
    assert "4 of the files are not used" in page.locator("section.outcome").inner_text()
    alerts = page.get_by_role("alert")
    messages = [alerts.nth(index).inner_text() for index in range(alerts.count())]
    assert any(
        line.startswith("<b>**bold** :red[x].png: this is not a picture. Choose a PNG, JPEG, TIFF or DICOM file.")
        for line in messages
    ), messages
    assert any(line.startswith("cut.png: this picture is corrupt or incomplete.") for line in messages), messages
    assert any(
        line.startswith("flower.jpg: this does not look like a bone radiograph. It is not used.") for line in messages
    ), messages
    assert any(line.startswith("blank.png: this picture is blank") for line in messages), messages
    expect(page.locator("img[alt^='Radiograph']")).to_have_count(1)


@pytest.mark.nightly(part="system")
@pytest.mark.shared
def test_page_survives_hostile_files(page: Any, shared: Path, views: list[Path]) -> None:
    files = [path for path in (shared / "hostile").rglob("*") if path.is_file() and path.stat().st_size < 5 << 20]
    files = sorted(files, key=lambda path: path.name)[:: len(files) // (study.MAX_FILES - 2)][: study.MAX_FILES - 1]
    upload(page, views[0], *files)
    choose(page, "Study type", "Wrist")
    page.locator("section.outcome").wait_for()
    readable = 0
    for path in files:
        with contextlib.suppress(radiograph.UnreadableFileError):
            result = radiograph.read_details(path, SIDE)
            readable += gate.classify(result.image, result.colors) not in gate.BLOCKING
    until(lambda: num_pictures(page) == 1 + readable)


@pytest.mark.slow
@pytest.mark.shared
def test_dicom_tags_are_not_displayed(page: Any, shared: Path, tmp_path: Path) -> None:
    import pydicom

    source = sorted((shared / "radiographs" / "jordan-hip-dicom").glob("*.dcm"))[0]
    dataset = pydicom.dcmread(source)
    dataset.PatientName, dataset.PatientID, dataset.BodyPartExamined = "SECRET^NAME", "ID-4711-SECRET", "WRIST"
    dataset.StudyInstanceUID, dataset.BurnedInAnnotation = "1.2.3.4711.4711", "YES"
    dataset.save_as(tmp_path / "x.dcm")
    upload(page, tmp_path / "x.dcm")
    page.locator("section.outcome").wait_for()  # the body part preselects the study type
    assert page.get_by_role("combobox", name="Study type").input_value() == "Wrist"
    until(lambda: num_pictures(page) == 1)
    text = page.content()
    for secret in ("SECRET", "4711"):
        assert secret not in text
    expect(page.get_by_role("button", name="Picture 1 with its map (PNG)")).to_have_count(0)  # before the confirmation
    page.get_by_text("The pixels of picture 1 may show a patient's name. I am allowed to download it.").click()
    page.get_by_role("button", name="Picture 1 with its map (PNG)").wait_for()


@pytest.mark.nightly(part="system")
def test_too_many_and_too_large_files_are_refused(page: Any, views: list[Path], tmp_path: Path) -> None:
    item = views[0].read_bytes()
    upload(page, *((f"{n}.png", item) for n in range(study.MAX_FILES + 3)))
    choose(page, "Study type", "Wrist")
    until(lambda: num_pictures(page) == study.MAX_FILES)  # the others were refused
    page.reload()
    page.get_by_role("heading", level=1).wait_for()
    large_file = tmp_path / "big.png"
    with open(large_file, "wb") as file:
        file.truncate((study.MAX_UPLOAD_MB << 20) + 1)
    page.locator("input[type=file]").set_input_files(large_file)
    page.get_by_text(failures.UPLOAD_REFUSED).wait_for()
    assert page.get_by_text("AxiosError").count() == 0


@pytest.mark.slow
def test_uploads_stay_in_memory_and_end_with_session(
    browser: Any, server: tuple[str, int, Path], views: list[Path], tmp_path: Path
) -> None:
    """Upload a TIFF of 40 MB: the process writes almost nothing to a disk, has no deleted file open, and deletes it."""
    address, process, scratch = server
    large = tmp_path / "large.tif"  # a file of the test, not of the page
    Image.open(views[0]).convert("L").resize((6600, 6600)).save(large)
    assert large.stat().st_size > 40 << 20

    def written_bytes() -> int:
        return int(re.search(r"^write_bytes: (\d+)", Path(f"/proc/{process}/io").read_text(), re.M)[1])

    def cached_bytes(kind: str = "UploadedFileManager") -> int:
        with urllib.request.urlopen(f"{address}/_stcore/metrics", timeout=5) as reply:
            result = re.findall(rf'^cache_memory_bytes\{{cache_type="{kind}".*\}} (\d+)', reply.read().decode(), re.M)
        return sum(map(int, result))

    until(lambda: cached_bytes() == 0, 60)
    before, context = written_bytes(), browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.locator("input[type=file]").set_input_files(large)
    page.locator("img[alt^='Radiograph']").wait_for(timeout=60_000)
    choose(page, "Study type", "Wrist")
    for name in ("Study (CSV)", "Picture 1 with its map (PNG)"):
        with page.expect_download():
            page.get_by_role("button", name=name).click()
    until(
        lambda: cached_bytes() > 40 << 20 and cached_bytes("st_memory_media_file_storage") > 0
    )  # the metrics lag behind
    assert written_bytes() - before < 1 << 20
    assert list(scratch.rglob("*")) == []
    links = [os.readlink(path) for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]
    assert [link for link in links if "(deleted)" in link and "memfd" not in link] == []
    context.close()
    until(lambda: cached_bytes() == cached_bytes("st_memory_media_file_storage") == 0, 60)


@pytest.mark.slow
def test_server_listens_on_loopback_and_loads_no_torch(server: tuple[str, int, Path]) -> None:
    port = int(server[0].rpartition(":")[2])
    lines = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [line for line in lines if line.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    assert "libtorch" not in Path(f"/proc/{server[1]}/maps").read_text()
    tcp6 = Path("/proc/net/tcp6")
    assert not tcp6.exists() or f":{port:04X} " not in tcp6.read_text()


@pytest.mark.slow
def test_server_refuses_other_hosts(server: tuple[str, int, Path]) -> None:
    """This includes plain HTTP, where Streamlit checks no host. No response may be framed."""
    for host, status in (("evil.example", 421), ("localhost", 200), (None, 200)):
        request = urllib.request.Request(server[0], headers={"Host": host} if host else {})
        try:
            reply = urllib.request.urlopen(request, timeout=5)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            assert reply.status == status
            assert reply.headers["X-Frame-Options"] == "DENY"
            assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
            assert "unsafe" not in re.search("script-src[^;]*", reply.headers["Content-Security-Policy"])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "scheme"),
    [(390, "dark"), pytest.param(1280, "light", marks=pytest.mark.nightly(part="system"))],
)
def test_layout_and_contrast(
    browser: Any, server: tuple[str, int, Path], phantoms: Path, scheme: str, width: int
) -> None:
    """No horizontal scrolling, visible terms, sufficient contrast, at both widths and in both schemes."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server[0])
    page.get_by_role("heading", level=1).wait_for()
    first = page.get_by_role("button", name=example_of(phantoms, "XR_WRIST"))
    first.wait_for()
    assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth <= innerWidth")
    for index in (".soft", "[class*=st-key-example-] button p", "[data-testid=stFileUploaderDropzone] button"):
        assert contrast(page, index) >= 4.5, index
    first.click()
    page.locator("section.outcome").wait_for()
    until(lambda: num_pictures(page) >= 1)
    page.get_by_text("Show the activation map").click()
    page.locator(".scale").wait_for()
    for scrolling in ("document.scrollingElement", "document.querySelector('[data-testid=stMain]')"):
        assert page.evaluate(f"{scrolling}.scrollWidth <= innerWidth")
    box = page.locator(".terms").bounding_box()
    assert box["y"] + box["height"] == pytest.approx(844, abs=1)
    assert box["width"] == pytest.approx(width, abs=1)
    assert_covers_nothing(page, ".terms")
    for index in (
        "h1",
        ".purpose",
        ".outcome h2",
        ".outcome p",
        ".outcome small",
        ".gauge-words",
        ".scale p",
        ".terms",
    ):
        assert contrast(page, index) >= 4.5, index
    answer, picture = (page.locator(index).first.bounding_box() for index in (".outcome", ".st-key-picture-main img"))
    if width > 1000:  # side by side
        assert answer["x"] + answer["width"] <= picture["x"]
        assert abs(answer["y"] - picture["y"]) < 10
    else:
        assert answer["y"] + answer["height"] <= picture["y"]
        assert answer["x"] == pytest.approx(picture["x"], abs=10)
    slabs = page.evaluate(
        """[...document.querySelectorAll("[data-testid=stApp] *")].filter(one => {
            const box = one.getBoundingClientRect(), ground = getComputedStyle(one).backgroundColor.match(/[\\d.]+/g).map(Number)
            return box.width * box.height > 4000 && Math.min(...ground.slice(0, 3)) > 200 && (ground[3] ?? 1) > 0.5
        }).map(one => one.outerHTML.slice(0, 80))"""
    )
    assert scheme == "light" or slabs == []
    background = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert (luminance(background) < 0.5) == (scheme == "dark")
    context.close()


def luminance(color: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(page: Any, index: str) -> float:
    """Return the contrast of an element's text with its blended background, as WCAG defines it."""
    ink, ground = page.locator(index).first.evaluate(
        """one => {
            const brush = new OffscreenCanvas(1, 1).getContext("2d"), style = getComputedStyle(one), behind = []
            const paint = colour => { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1) }
            const seen = () => `rgb(${[...brush.getImageData(0, 0, 1, 1).data].slice(0, 3).join(", ")})`
            for (let each = one; each; each = each.parentElement) behind.unshift(getComputedStyle(each).backgroundColor)
            paint("white")
            behind.forEach(paint)
            const ground = seen()
            paint(style.color)
            return [seen(), ground]
        }"""
    )
    low, high = sorted((luminance(ink), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def assert_covers_nothing(page: Any, bar: str) -> None:
    """Assert that a bar is visible and covers nothing, also with the last element scrolled into view."""
    last = page.get_by_text("About this model")
    last.scroll_into_view_if_needed()
    page_frame = page.locator(bar).bounding_box()
    top, bottom = page_frame["y"], page_frame["y"] + page_frame["height"]
    for index in (page.locator("[data-testid=stMain]"), last):
        box = index.bounding_box()
        assert box["y"] >= bottom - 0.5 or box["y"] + box["height"] <= top + 0.5, bar
    for share in (0.02, 0.5, 0.98):
        assert page.evaluate(
            "([bar, x, y]) => document.elementFromPoint(x, y).matches(bar)",
            [bar, share * page.viewport_size["width"], (top + bottom) / 2],
        )


@pytest.mark.slow
def test_keyboard_and_screen_reader(page: Any, phantoms: Path) -> None:
    """Tab reaches every control in order, each has a name, pictures have alternative texts, heading levels have no gaps."""
    names: list[str] = []

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            name_of_focus = page.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || '').trim()"
            )
            names.append(name_of_focus)
            if name_of_focus == name or name_of_focus.endswith(f"\n{name}"):  # an icon's name may stand before it
                return
        pytest.fail(f"Tab never reached {name}: {names}")

    tab_to("Upload")
    tab_to(example_of(phantoms, "XR_WRIST"))
    page.keyboard.press("Enter")
    page.locator("section.outcome").wait_for()
    until(lambda: num_pictures(page) >= 1)
    toggle = page.get_by_role("checkbox", name="Show the activation map").or_(
        page.get_by_role("switch", name="Show the activation map")
    )
    toggle.first.focus()
    page.keyboard.press("Space")
    page.locator("img[alt^='Radiograph under its activation map']").first.wait_for()
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    levels = [
        int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(one => one.tagName)")
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.locator("section.outcome").get_attribute("role") == "alert"
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, [role=slider]')]
            .filter(one => one.offsetParent && one.closest('[data-testid=stMain]'))
            .filter(one => !(one.ariaLabel || one.innerText.trim() || one.labels?.length || one.closest('label')
                || one.getAttribute('aria-labelledby'))).map(one => one.outerHTML.slice(0, 120))"""
    )
    assert nameless == []


@pytest.mark.slow
def test_demo_page_answers_examples_only(
    browser: Any, trained_on_phantoms: Path, phantoms: Path, views: list[Path]
) -> None:
    """An example and an upload of its bytes get a result, other pictures no call. No label and no percentage appears."""
    example = next(item for item in examples.find_examples(phantoms) if item.study_type == "XR_HAND")
    example_files = [(f"XR_HAND_{index}.png", example.content(index)) for index in range(len(example.files))]
    flipped = io.BytesIO()
    Image.open(example.files[0]).convert("L").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(flipped, "PNG")
    with served(trained_on_phantoms, "--examples", phantoms / "valid" / "..") as (address, process):
        page = browser.new_page()
        page.goto(address)
        page.get_by_text("more examples").click()
        page.get_by_role("button", name="Example 28:").wait_for()
        texts = [page.content()]
        page.get_by_role("button", name=example_title(example)).click()
        for source in ("example", "upload"):
            answer = page.locator("section.outcome")
            answer.wait_for()
            assert "The test set consists of computer drawings." in answer.inner_text()
            assert page.get_by_role("heading", name="No call").count() == 0
            page.get_by_role("heading", name="Another threshold").wait_for()
            page.get_by_text("Show the activation map").click()
            page.locator("img[alt*='under its activation map']").first.wait_for()
            assert page.locator(".banner").inner_text() == wording.DEMO_BANNER
            assert_covers_nothing(page, ".banner")
            for name in ("Study (CSV)", "Pictures (CSV)"):
                with page.expect_download() as coming:
                    page.get_by_role("button", name=name).click()
                assert coming.value.suggested_filename.endswith("-of-drawings.csv")
                texts.append(Path(coming.value.path()).read_text())
            table = pd.read_csv(io.StringIO(texts[-2]))
            texts[-2] = table.drop(columns="band").to_csv()  # "negative" is a value of the band
            study_line = table.iloc[0]
            assert study_line["trained_on"] == "phantoms"
            assert study_line[["call", "threshold", "probability"]].notna().all()
            assert "too few studies for a percentage" in page.locator("body").inner_text()
            assert "%" not in page.locator("body").inner_text()
            texts.append(page.content())
            if source == "example":
                page.get_by_role("button", name="Choose another study").click()
                page.get_by_role("button", name=example_title(example)).wait_for()
                upload(page, *example_files)
        for text in texts:
            assert re.search("(posi|nega)tive|study[0-9]|patient[0-9]", re.sub(r"study1?,|of_study", "", text)) is None
        upload(page, ("XR_HAND_9.png", flipped.getvalue()))
        wait_for_outcome(page, "No call")
        for line in wording.WITHHELD:
            assert line in page.locator("section.outcome").inner_text()
        expect(page.get_by_role("heading", name="Another threshold")).to_have_count(0)
        expect(page.get_by_text("Show the activation map")).to_have_count(0)
        with page.expect_download() as coming:
            page.get_by_role("button", name="Study (CSV)").click()
        assert coming.value.suggested_filename == "studies.csv"
        table = pd.read_csv(coming.value.path())
        assert table[["call", "band", "threshold"]].isna().all(axis=None)
        assert table["probability"].notna().all()
        page.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.nightly(part="system")
def test_concurrent_sessions_do_not_mix(
    browser: Any, server: tuple[str, int, Path], views: list[Path], service: study.InferenceService
) -> None:
    contexts = [browser.new_context() for _ in range(20)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.set_default_timeout(120_000)
    for page in pages:
        page.goto(server[0])
    for page in pages:
        page.locator("input[type=file]").wait_for(state="attached")
    for index, page in enumerate(pages):
        upload(page, views[index % len(views)])
    for index, page in enumerate(pages):
        choose(page, "Study type", "Hand")
        page.locator("section.outcome").wait_for()
        result = predict_study(service, [views[index % len(views)]], "XR_HAND")
        assert f"abnormality: {result.probability:.2f} (" in page.locator("section.outcome").inner_text()
        expect(page.locator("img[alt^='Radiograph']")).to_have_count(1)
    for context in contexts:
        context.close()

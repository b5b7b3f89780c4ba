"""Test the export to ONNX: the graph, the comparison with torch, the card, the documented code, and failures."""

import errno
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import laws
from helpers.commands import ROOT
from helpers.models import S, card_of, noise, tiny
from PIL import Image

from mura_dist import __version__
from mura_dist.cli.main import DONE, FAILED, STOPPED, main
from mura_dist.core.errors import RunError, UserError
from mura_dist.data import mura, radiograph
from mura_dist.data.shards.reader import Shards
from mura_dist.inference.export import onnx as export_module
from mura_dist.inference.export.onnx import BATCH_SIZES, OPSET, ExportReport, build_onnx, export, parity, probe_images
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics.operating_points import PAPER_OPERATING_POINT, FittedThresholds
from mura_dist.models import densenet
from mura_dist.models.card import FORMAT, KEY, Card


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[densenet.DenseNet, Path, ExportReport]:
    model, path = tiny(), tmp_path_factory.mktemp("export") / "run" / "model.onnx"
    return model, path, export(model, card_of(), path)


def test_export_report(exported: tuple[densenet.DenseNet, Path, ExportReport]) -> None:
    _, path, report = exported
    assert (report.card, report.num_radiographs, report.change) == (card_of(), 0, None)
    assert 0 <= report.max_logit_difference <= 1e-4
    assert report.num_bytes == path.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]  # self-contained, without external data


@pytest.mark.parametrize("batch_size", [*range(1, 10), 16, 64])
def test_onnx_runtime_agrees_with_torch(
    exported: tuple[densenet.DenseNet, Path, ExportReport], batch_size: int
) -> None:
    model, path, _ = exported
    images = noise(batch_size, seed=batch_size)
    with torch.inference_mode():
        expected_logit, expected_map = (array.numpy() for array in model(torch.from_numpy(images)))
    logit, activation_map = OnnxModel.load(path).outputs(images)
    assert logit.shape == (batch_size,)
    assert logit.dtype == activation_map.dtype == np.float32
    np.testing.assert_allclose(logit, expected_logit, atol=1e-4)
    np.testing.assert_allclose(activation_map, expected_map, atol=1e-4)
    np.testing.assert_allclose(activation_map.mean(axis=(1, 2)), logit, atol=1e-5)
    assert np.ptp(expected_map) > 1e-3  # a constant map would not show transposed cells
    np.testing.assert_array_equal(OnnxModel.load(path).logits(images), logit)


def test_empty_batch_gives_empty_outputs(exported: tuple[densenet.DenseNet, Path, ExportReport]) -> None:
    logit, activation_map = OnnxModel.load(exported[1]).outputs(noise(0))
    assert (logit.shape, activation_map.shape[0]) == ((0,), 0)


def test_export_progress_is_complete(exported: tuple[densenet.DenseNet, Path, ExportReport], tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    export(exported[0], card_of(), tmp_path / "model.onnx", progress=lambda *step: steps.append(step))
    assert steps == [(done, 5) for done in range(6)]  # the graph, four batch sizes


@pytest.mark.nightly(part="training")
def test_densenet169_export_agrees_with_torch(tmp_path: Path) -> None:
    model = densenet.build("densenet169").eval()
    report = export(model, card_of(), tmp_path / "model.onnx")
    assert report.max_logit_difference <= 1e-4
    assert 45e6 < report.num_bytes < 60e6  # 12.5 million fp32 parameters, once
    images = noise(3)
    with torch.inference_mode():
        np.testing.assert_allclose(
            OnnxModel.load(tmp_path / "model.onnx").logits(images), model(torch.from_numpy(images))[0], atol=1e-4
        )


def test_file_is_valid_and_holds_no_machine_paths(
    exported: tuple[densenet.DenseNet, Path, ExportReport],
) -> None:
    data = exported[1].read_bytes()
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [OPSET]
    assert proto.ir_version == 8  # ONNX Runtime reads it since 1.14
    assert (proto.producer_name, proto.producer_version) == ("mura-dist", __version__)
    assert mura.TERMS[1:] in proto.doc_string
    assert all(str(S) in value.doc_string or value in proto.graph.output for value in proto.graph.input)
    assert all(value.doc_string for value in (*proto.graph.input, *proto.graph.output))
    assert not [tensor.name for tensor in proto.graph.initializer if tensor.external_data]
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)
    for secret_path in (Path(torch.__file__).parents[1], Path(densenet.__file__).parent, Path.home()):
        assert str(secret_path).encode() + b"/" not in data
    inputs = [(entry.name, entry.type, entry.shape) for entry in onnxruntime.InferenceSession(data).get_inputs()]
    assert inputs == [("image", "tensor(uint8)", ["batch", 1, S, S])]


def test_card_round_trips(exported: tuple[densenet.DenseNet, Path, ExportReport]) -> None:
    model = OnnxModel.load(exported[1])
    assert model.card == card_of().model_copy(update={"opset": OPSET})
    assert (model.size, model.card.terms, model.card.licence) == (S, mura.TERMS, mura.LICENSE)


def test_graph_is_deterministic_and_prints_nothing(
    exported: tuple[densenet.DenseNet, Path, ExportReport], capfd: pytest.CaptureFixture[str]
) -> None:
    assert build_onnx(tiny(), card_of()) == exported[1].read_bytes()
    assert capfd.readouterr() == ("", "")


def test_parity_fails_for_another_model(exported: tuple[densenet.DenseNet, Path, ExportReport]) -> None:
    model, path, _ = exported
    images, data = probe_images(S), path.read_bytes()
    assert parity(model, data, images) <= 1e-4
    second_model = tiny()
    with torch.no_grad():
        second_model.classifier.bias += 2e-3
    with pytest.raises(
        RunError,
        match=r"^logit of the exported model is .*, torch computes .*largest allowed difference 0\.0001\)\. Nothing",
    ):
        parity(second_model, data, images)
    assert parity(second_model, data, images, tolerance=4e-3) == pytest.approx(2e-3, rel=0.01)


def test_parity_compares_map_cells(exported: tuple[densenet.DenseNet, Path, ExportReport]) -> None:
    class Transposed(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logit, activation_map = exported[0](image)
            return logit, activation_map.transpose(1, 2)

    with pytest.raises(RunError, match=r"^activation_map of the exported model"):
        parity(Transposed(), exported[1].read_bytes(), probe_images(S))


def test_parity_runs_all_batch_sizes_on_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch larger than the number of images repeats them."""
    model, batches = tiny(), []
    data, images = build_onnx(model, card_of()), np.concatenate([probe_images(S), noise(4)])
    outputs = OnnxModel.outputs
    monkeypatch.setattr(OnnxModel, "outputs", lambda self, batch: (batches.append(batch), outputs(self, batch))[1])
    parity(model, data, images)
    assert {len(batch) for batch in batches} >= set(BATCH_SIZES) == {1, 2, 7, 64}
    for image in images:
        assert all(
            any((image == image_in_batch).all() for batch in batches if len(batch) == size for image_in_batch in batch)
            for size in (1, 64)
        )


def test_parity_fails_for_large_batches_only(
    exported: tuple[densenet.DenseNet, Path, ExportReport], monkeypatch
) -> None:
    outputs = OnnxModel.outputs

    def shifted(self: OnnxModel, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logit, activation_map = outputs(self, batch)
        return logit + (2e-3 if len(batch) == 64 else 0), activation_map

    monkeypatch.setattr(OnnxModel, "outputs", shifted)
    with pytest.raises(RunError, match=r"^logit of the exported model .*\(batch size 64, "):
        parity(exported[0], exported[1].read_bytes(), probe_images(S))


def test_failed_parity_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    broken = tiny()
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"is nan, torch computes nan.*Nothing was written"):
        export(broken, card_of(), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the old one"]


def _with_metadata(path: Path, out: Path, properties: dict[str, str]) -> Path:
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, properties)
    onnx.save(proto, out)
    return out


@pytest.mark.parametrize(
    ("properties", "text"),
    [
        ({}, r"was not exported by mura-dist \(no mura_dist metadata\)\. Pass the model\.onnx"),
        (
            {KEY: json.dumps({"format": FORMAT + 1})},
            rf"has metadata of format {FORMAT + 1}, .* reads up to {FORMAT}. Update",
        ),
        ({KEY: "{"}, r"has corrupt mura_dist metadata \(.*\)\. Export the model again"),
        ({KEY: "[]"}, r"has corrupt mura_dist metadata \(content: "),
        ({KEY: json.dumps({"format": 1, "size": 0})}, r"has corrupt mura_dist metadata \(size: .*greater"),
    ],
)
def test_files_without_valid_metadata_are_refused(
    exported: tuple[densenet.DenseNet, Path, ExportReport], tmp_path: Path, properties: dict[str, str], text: str
) -> None:
    path = _with_metadata(exported[1], tmp_path / "other.onnx", properties)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} {text}"):
        OnnxModel.load(path)


def test_card_ignores_unknown_keys_and_refuses_nan() -> None:
    fields = json.loads(card_of().to_json()) | {"from_the_future": 1}
    assert Card.parse(json.dumps(fields), "model.onnx") == card_of()
    with pytest.raises(ValueError, match="Out of range float"):
        card_of().model_copy(update={"recipe": {"learning_rate": float("nan")}}).to_json()


def test_cards_without_calibration_load() -> None:
    fields = json.loads(card_of().to_json())
    for key in ("calibration", "operating_point"):
        del fields[key]
    for old in (fields, fields | {"calibration": {}, "bands": {}}):
        card = Card.parse(json.dumps(old), "model.onnx")
        assert (card.calibration, card.operating_point) == (FittedThresholds(), PAPER_OPERATING_POINT)
        assert card.calibration.bands == {}


def test_card_with_invalid_calibration_is_refused() -> None:
    fields = json.loads(card_of().to_json()) | {"calibration": {"by_study_type": {"XR_HAND": {"num_normal": -1}}}}
    with pytest.raises(
        UserError, match=r"corrupt mura_dist metadata \(calibration\.by_study_type\.XR_HAND\.num_normal: "
    ):
        Card.parse(json.dumps(fields), "model.onnx")


# ---- models of runs


def secret_texts(*paths: Path) -> list[str]:
    """Return texts that identify this machine. Short names are excluded, since they may occur by chance."""
    names = [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]
    return [*map(str, paths), str(Path.home()) + "/", "secret-place", *names]


def test_exported_run_has_complete_card_and_no_secrets(folder: Path, halved: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "folder" / "model.onnx"
    assert main(["export", str(folder), "--out", str(out)]) == DONE
    captured = capsys.readouterr().out
    assert re.search(r"logits within \S+ of torch's on [1-9]\d* radiographs", captured)
    card = laws.self_describing(out, kind="phantoms", secrets=secret_texts(folder, halved, tmp_path, ROOT))
    assert card["calibration"]["fitted_on"] == "tune"
    assert any(fitted["band"] for fitted in card["calibration"]["by_study_type"].values())
    assert card["metrics"] == json.loads((folder / "metrics.json").read_bytes())
    assert (card["recipe"]["pretrained"], card["recipe"]["deepspeed"]) == ("start.safetensors", "engine.json")
    assert not {"shards", "run", "mirror"} & card["recipe"].keys()


def test_export_states_comparison_without_radiographs(copy: Path, halved: Path, tmp_path: Path, capsys) -> None:
    recipe = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(recipe.replace(str(halved), str(tmp_path / "gone")))
    (copy / "metrics.json").write_text("[]")  # of another program
    assert main(["export", str(copy)]) == DONE
    captured = capsys.readouterr().out
    compared = "of torch's on drawn images only (the run's shards were not found; --shards FOLDER names them)"
    assert any(line.endswith(compared) for line in captured.splitlines()), captured
    assert "no thresholds, so" in captured


def documented_code() -> str:
    """Return the code block of docs/api.md that imports onnxruntime."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M | re.S)
    [code] = [block for block in blocks if "import onnxruntime" in block]
    return code


@pytest.mark.parametrize(("mode", "shape"), [("L", (90, 70)), ("L", (40, 30)), ("RGB", (90, 70))])
def test_documented_code_gives_identical_outputs_without_mura_dist(
    mode: str, shape: tuple[int, int], exported: tuple[densenet.DenseNet, Path, ExportReport], tmp_path: Path
) -> None:
    """Copied as they stand, in a process without mura_dist, they give the very bits that predict gives."""
    code = documented_code()
    assert len([line for line in code.splitlines() if line]) == 10
    shutil.copy(exported[1], tmp_path / "model.onnx")
    pixels = np.random.default_rng(3).integers(0, 256, (*shape, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(tmp_path / "radiograph.png")
    save_outputs = (
        "\nimport sys\nassert 'mura_dist' not in sys.modules\nnp.savez('outputs', logit=logit, cells=activation_map)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + save_outputs],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert mura.TERMS in done.stdout
    arrays = np.load(tmp_path / "outputs.npz")
    expected = OnnxModel.load(exported[1]).outputs(radiograph.read(tmp_path / "radiograph.png", S)[None, None])
    np.testing.assert_array_equal(arrays["logit"], expected[0])
    np.testing.assert_array_equal(arrays["cells"], expected[1])
    assert f"{1 / (1 + np.exp(-expected[0][0])):.3f}" in done.stdout


# ---- failures


REFUSED = {
    "a mistyped checkpoint": (["--checkpoint", "bset"], ["--checkpoint bset", "has best, last, step-"]),
    "a folder as the file": (["--out", "{tmp}"], ["--out {tmp} is a folder", "model.onnx"]),
    "below a file": (["--out", "{tmp}/file/model.onnx"], ["--out: {tmp}/file is a file", "Give another path"]),
    "Triton's folder is a file": (["--triton", "{tmp}/file"], ["--triton: {tmp}/file is a file", "Give another path"]),
    "another's model": (["--triton", "{tmp}/other"], ["--triton {tmp}/other:", "another model has that name", "move"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_options_are_refused_before_the_export(
    case: str, copy: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(export_module, "build_onnx", lambda *_: pytest.fail("it began to work"))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "other" / "mura_dist").mkdir(parents=True)
    (tmp_path / "other" / "mura_dist" / "config.pbtxt").write_text('name: "mura_dist"')
    templates, messages = REFUSED[case]
    arguments = [word.format(tmp=tmp_path) for word in templates]
    laws.refusal(capsys, ["export", copy, *arguments], *(word.format(tmp=tmp_path) for word in messages))
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize("option", ["--out", "--triton"])
def test_unwritable_path_is_refused(option: str, copy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == locked) and access(path, mode)
    )
    arguments = locked / "model.onnx" if option == "--out" else locked
    laws.refusal(
        capsys, ["export", copy, option, arguments], f"{option}: {locked} is not writable", "give another path"
    )


def test_corrupt_metrics_are_refused(copy: Path, capsys) -> None:
    (copy / "metrics.json").write_text("{")
    laws.refusal(capsys, ["export", copy], "metrics.json is invalid", "Run `mura-dist evaluate` again")


def leftover_names(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "onnx" in path.name)


def test_full_disk_keeps_the_old_file(copy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (copy / "model.onnx").write_bytes(b"the old one")

    def raise_no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", raise_no_space)
    assert main(["export", str(copy)]) == FAILED
    assert (
        capsys.readouterr().err == "mura-dist: No space left on device. Free some space, then run the same command.\n"
    )
    assert leftover_names(tmp_path) == ["run/model.onnx"]
    assert (copy / "model.onnx").read_bytes() == b"the old one"


@pytest.mark.parametrize("moment", ["build_onnx", "parity"])
def test_interrupted_export_leaves_no_files(moment: str, copy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def raise_interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, moment, raise_interrupt)
    assert main(["export", str(copy), "--triton", str(tmp_path / "triton")]) == STOPPED
    assert capsys.readouterr().err.strip() == "mura-dist: stopped. The same command resumes."
    assert leftover_names(tmp_path) == []
    assert not (tmp_path / "triton").exists()


@pytest.mark.slow
def test_corrupt_radiograph_is_not_compared(folder: Path, halved: Path, tmp_path: Path, capsys) -> None:
    shards = Path(shutil.copytree(halved, tmp_path / "shards"))
    moved = Path(shutil.copytree(folder, tmp_path / "run"))
    recipe = (moved / "recipe.toml").read_text()
    (moved / "recipe.toml").write_text(recipe.replace(str(halved), str(shards)))
    opened = Shards.open(shards)
    laws.damage(opened, int(opened.rows("tune")[0]))
    compared = []
    for run_folder in (folder, moved):
        assert main(["export", str(run_folder), "--out", str(tmp_path / "model.onnx")]) == DONE
        compared.append(int(re.search(r"on (\d+) radiographs", capsys.readouterr().out)[1]))
    assert compared == [compared[0], compared[0] - 1]


@pytest.mark.nightly(part="training")
@pytest.mark.shared
def test_parity_of_densenet169_on_radiographs(shared: Path) -> None:
    """The network has its training resolution and BatchNorm statistics of radiographs."""
    files = sorted((shared / "radiographs" / "fracatlas-mura" / "valid").rglob("*.png"))
    images = np.stack([radiograph.read(path, 320) for path in files[:: max(1, len(files) // 16)][:16]])[:, None]
    model = densenet.build("densenet169")
    with torch.no_grad():
        model(torch.from_numpy(images[:8]))
    model.eval()
    difference = parity(model, build_onnx(model, card_of(320)), np.concatenate([probe_images(320), images]))
    assert difference <= 1e-4
    print(f"{len(images)} radiographs, logits within {difference:.2g}")

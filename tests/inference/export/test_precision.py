"""Test exports of reduced precision: the change is measured before the file is written, and recorded in the card."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import laws
from helpers.models import card_of, noise, tiny

from mura_dist.cli.main import DONE, FAILED, main
from mura_dist.core.errors import RunError, UserError
from mura_dist.data import mura
from mura_dist.data.shards.reader import Shards
from mura_dist.inference import engine_openvino, processor
from mura_dist.inference.export import precision as variants
from mura_dist.inference.export.onnx import build_onnx, default_out
from mura_dist.inference.export.precision import LIMITS
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.models.card import PRECISIONS, Card, PrecisionChange
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble
from mura_dist.models.target import Target


@pytest.mark.parametrize("precision", ["int8", pytest.param("fp16", marks=pytest.mark.nightly(part="training"))])
def test_reduced_precision_export_records_its_change(copy: Path, precision: str, capsys, tmp_path: Path) -> None:
    assert (
        main(["export", str(copy), "--precision", precision, "--allow-change", "--triton", str(tmp_path / "served")])
        == DONE
    )
    captured = capsys.readouterr()
    path = copy / f"model-{precision}.onnx"
    assert [file.name for file in copy.glob("*.onnx")] == [path.name]
    onnx.checker.check_model(path, full_check=True)
    model = OnnxModel.load(path)
    assert model.card.precision == precision
    change = model.card.change
    assert change is not None
    assert change.engine == "CPUExecutionProvider"
    assert change.num_radiographs > 20
    assert change.num_studies >= 10
    assert 0 < change.mean_probability <= change.max_probability < 0.2
    assert (change.calibrated_on > 0) == (precision == "int8")
    assert f"{precision} changes the probability of {change.num_radiographs} radiographs" in captured.out
    assert (tmp_path / "served" / "mura_dist" / "1" / "model.onnx").read_bytes() == path.read_bytes()
    assert main(["export", str(copy)]) == DONE
    plain = OnnxModel.load(copy / "model.onnx")
    assert (plain.card.precision, plain.card.change) == ("fp32", None)
    bits = 7 if precision == "int8" else None
    assert plain.card.model_copy(update={"precision": precision, "change": change, "weight_bits": bits}) == model.card
    if precision == "int8":
        assert path.stat().st_size < (copy / "model.onnx").stat().st_size


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that is read in place of /proc/cpuinfo."""
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


def test_weights_of_8_bits_are_recorded_and_need_vnni(copy: Path, cpuinfo: Path, capsys) -> None:
    command, path = ["export", str(copy), "--precision", "int8", "--weight-bits", "8"], copy / "model-int8.onnx"
    remedy = "Give --weight-bits 7, or export on a processor with VNNI or ARM's dot product."
    for flags in ("", "flags : avx avx2\n"):
        cpuinfo.write_text(flags)
        laws.refusal(capsys, command, "--weight-bits 8: weights of 8 bits would overflow", "(limit: 7 bits; ", remedy)
    assert not path.exists()
    cpuinfo.write_text("flags : avx avx2 avx_vnni\n")
    assert main([*command, "--allow-change"]) == DONE
    assert OnnxModel.load(path).card.weight_bits == 8
    constants = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    assert max(int(np.abs(constant).max()) for constant in constants if constant.dtype == np.int8) == 127
    cpuinfo.write_text("flags : avx avx2\n")
    with pytest.raises(UserError, match="Export it again with --weight-bits 7"):
        OnnxModel.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", pytest.param("fp16", marks=pytest.mark.nightly(part="training"))])
def test_recorded_change_equals_recomputed_change(copy: Path, halved: Path, precision: str) -> None:
    """The test recomputes the change from the two files and the split's pixels."""
    for arguments in (["--precision", precision, "--allow-change"], []):
        assert main(["export", str(copy), *arguments]) == DONE
    shards, models = (
        Shards.open(halved),
        [OnnxModel.load(copy / name) for name in ("model.onnx", f"model-{precision}.onnx")],
    )
    rows = shards.rows(models[0].card.selected_on)
    images = np.stack([shards.read_pixels(row) for row in rows])[:, None]
    views = [1 / (1 + np.exp(-model.logits(images).astype(np.float64))) for model in models]
    difference, change = np.abs(views[0] - views[1]), models[1].card.change
    assert change is not None
    assert change.num_radiographs == len(rows)
    assert change.mean_probability == pytest.approx(difference.mean(), rel=1e-4, abs=1e-7)
    assert change.max_probability == pytest.approx(difference.max(), rel=1e-4, abs=1e-7)
    studies = shards.manifest.frame.loc[rows, "study"].to_numpy()
    types = shards.manifest.frame.loc[rows].groupby("study", sort=False)["study_type"].first()
    calls = []
    for view in views:
        means = {study: view[studies == study].mean() for study in dict.fromkeys(studies)}
        calls.append([mean > models[0].card.thresholds.get(types[study], 0.5) for study, mean in means.items()])
    assert change.num_studies == len(calls[0])
    assert change.num_changed_calls == sum(before != after for before, after in zip(*calls, strict=True))


def change_of(mean: float, calls: int, studies: int = 400) -> PrecisionChange:
    return PrecisionChange(
        engine="x",
        num_radiographs=900,
        num_studies=studies,
        mean_probability=mean,
        max_probability=min(1, 4 * mean),
        num_changed_calls=calls,
    )


@pytest.mark.parametrize("precision", sorted(LIMITS))
def test_change_above_limits_fails_unless_allowed(precision: str) -> None:
    limit = LIMITS[precision]
    max_calls = int(limit.changed_calls * 400)
    assert variants.check_limits(precision, change_of(limit.mean_probability, max_calls), False) == []
    for change in (
        change_of(limit.mean_probability * 1.01, 0),
        change_of(0, max_calls + 1),
        change_of(limit.mean_probability * 2, max_calls + 5),
    ):
        with pytest.raises(RunError, match=rf"{precision} changes .* \(limit .*--allow-change"):
            variants.check_limits(precision, change, False)
        assert variants.check_limits(precision, change, True)
    assert (
        variants.check_limits(precision, change_of(0, 1, studies=3), False) == []
    )  # one changed call is always within the limit
    assert variants.check_limits(precision, change_of(0, 2, studies=3), True)


@pytest.mark.slow
def test_export_above_the_limits_keeps_the_old_file(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(variants.LIMITS, "int8", variants.ChangeLimits(0.0, 0.0))
    (copy / "model-int8.onnx").write_text("an older one")
    assert main(["export", str(copy), "--precision", "int8"]) == FAILED
    captured = capsys.readouterr().err.splitlines()
    assert "int8 changes a probability by" in captured[-1]
    assert "(limit 0" in captured[-1]
    assert (copy / "model-int8.onnx").read_text() == "an older one"
    assert main(["export", str(copy), "--precision", "int8", "--allow-change", "--quiet"]) == DONE
    captured = capsys.readouterr()
    assert "warning: int8 changes a probability" in captured.out
    assert captured.err == f"{mura.TERMS}\n"


def test_invalid_options_are_refused(copy: Path, phantoms: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from mura_dist.data.shards.convert import convert

    laws.refusal(
        capsys,
        ["export", copy, "--precision", "int9"],
        "--precision int9",
        "did you mean int8",
        "fp32, fp16, bf16, int8",
    )
    laws.refusal(capsys, ["export", copy, "--weight-bits", "7"], "--weight-bits 7", "--precision is fp32", "int8")
    laws.refusal(capsys, ["export", copy, "--precision", "int8", "--weight-bits", "6"], "--weight-bits 6", "7", "or 8")
    convert(phantoms, tmp_path / "other", size=32, workers=1)
    for arguments in (["--precision", "int8"], []):
        laws.refusal(
            capsys,
            ["export", copy, *arguments, "--shards", tmp_path / "other"],
            "not the shards that this run was trained on",
            "--shards",
        )
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    laws.refusal(capsys, ["export", copy, "--precision", "bf16"], "OpenVINO is not installed")
    assert not list(copy.glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="the openvino extra is not installed")
def test_bf16_export_needs_device_support(copy: Path, capsys) -> None:
    if not engine_openvino.supports_bf16():
        laws.refusal(capsys, ["export", copy, "--precision", "bf16"], "no instructions for it", "--precision int8")
        return
    assert main(["export", str(copy), "--precision", "bf16", "--allow-change"]) == DONE
    card = OnnxModel.load(copy / "model-bf16.onnx", "openvino").card
    assert card.change is not None
    assert card.change.engine == "OpenVINO CPU"


@pytest.mark.slow
def test_missing_shards_are_named_and_can_be_replaced(copy: Path, halved: Path, tmp_path: Path, capsys) -> None:
    recipe = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(recipe.replace(str(halved), str(tmp_path / "gone")))
    laws.refusal(capsys, ["export", copy, "--precision", "int8"], str(tmp_path / "gone"))
    assert main(["export", str(copy), "--precision", "int8", "--allow-change", "--shards", str(halved)]) == DONE


@pytest.mark.parametrize("is_ensemble", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_half_precision_keeps_inputs_and_outputs_in_fp32(is_ensemble: bool) -> None:
    """fp32 remains for normalization, both outputs and an ensemble's average. The original model does not change."""
    model = Ensemble([tiny(0), tiny(1)]).eval() if is_ensemble else tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    half = variants.to_half_precision(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    networks = [module for module in half.modules() if isinstance(module, DenseNet)]
    assert all(network.mean.dtype == torch.float32 for network in networks)
    assert all(parameter.dtype == torch.float16 for parameter in half.parameters())
    proto = onnx.load_from_string(build_onnx(half, card_of().model_copy(update={"precision": "fp16"})))
    assert {output.type.tensor_type.elem_type for output in proto.graph.output} == {onnx.TensorProto.FLOAT}
    images = noise(9)
    logit, cells = OnnxModel.from_bytes(proto.SerializeToString(), "half").outputs(images)
    with torch.no_grad():
        exact_logit, exact_cells = (array.numpy() for array in model(torch.from_numpy(images)))
    np.testing.assert_allclose(logit, exact_logit, atol=0.01)
    np.testing.assert_allclose(cells, exact_cells, atol=0.05)


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (1e6, False)])
def test_activations_above_the_fp16_range_are_refused(scale: float, fits: bool) -> None:
    """ONNX Runtime computes fp16 in fp32 on a CPU, which hides an overflow."""
    model = tiny()
    with torch.no_grad():
        model.features.norm0.weight *= scale
    if fits:
        variants.check_range(model, noise(4))
        return
    with pytest.raises(RunError, match=r"an activation reaches .* \(limit 32000"):
        variants.check_range(model, noise(4))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.nightly(part="training"))])
def test_non_finite_logits_are_refused(model: Path, halved: Path, bias: float) -> None:
    network, card = tiny(), card_of().model_copy(update={"precision": "int8"})
    with torch.no_grad():
        network.classifier.bias += bias
    with pytest.raises(RunError, match=r"differs by nan|is NaN or infinite for .* of .* radiographs"):
        variants.measure_change(card, model.read_bytes(), build_onnx(network, card), Shards.open(halved), print)


def test_logits_that_depend_on_batch_size_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = OnnxModel.load(model)
    sizes: list[int] = []

    def load_for_batch_size(number: int) -> OnnxModel:
        sizes.append(number)
        return loaded

    variants._check_batch_invariance(load_for_batch_size, 1e-4)
    assert sizes == [1, 2, 7, 64]
    monkeypatch.setattr(OnnxModel, "logits", lambda self, image: np.full(len(image), len(image) / 1000, np.float32))
    with pytest.raises(RunError, match=r"differs by 0\.001 \(limit 0\.0001\) between batch sizes"):
        variants._check_batch_invariance(load_for_batch_size, 1e-4)
    with pytest.raises(RunError, match=r"differs by 0\.063 \(limit 0\.02\) between batch sizes"):
        variants._check_batch_invariance(load_for_batch_size, 2e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("provider", ["cpu", "openvino", "CPUExecutionProvider", "cuda", "CUDA", "tensorrt"])
def test_batch_limit_is_larger_for_fp16_on_gpus_only(precision: str, provider: str) -> None:
    is_rounded = precision == "fp16" and provider in ("cuda", "CUDA", "tensorrt")
    assert variants.batch_limit(precision, provider) == (2e-2 if is_rounded else 1e-4)


def test_sample_of_a_large_split_has_complete_studies(halved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards.open(halved)
    all_rows = shards.rows("train")
    assert np.array_equal(variants._sample_studies(shards, "train"), all_rows)
    monkeypatch.setattr(variants, "NUM_MEASURED", len(all_rows) // 3)
    sampled_rows = variants._sample_studies(shards, "train")
    assert len(all_rows) // 6 < len(sampled_rows) < len(all_rows) // 2
    studies = shards.manifest.frame["study"]
    assert set(all_rows[studies[all_rows].isin(studies[sampled_rows])]) == set(sampled_rows)
    assert np.array_equal(variants.sample_images(shards, "train", 7).shape, (7, 1, shards.size, shards.size))


def test_default_file_names_and_cards_without_precision() -> None:
    assert default_out(Target.parse(Path("run")), "fp32") == Path("run/model.onnx")
    assert {default_out(Target.parse(Path("a/five.json")), precision).name for precision in PRECISIONS[1:]} == {
        "five-fp16.onnx",
        "five-bf16.onnx",
        "five-int8.onnx",
    }
    fields = json.loads(card_of().to_json())
    del fields["precision"], fields["change"], fields["weight_bits"]  # as in older files
    assert Card.parse(json.dumps(fields), "old") == card_of()
    with pytest.raises(UserError, match="precision"):
        Card.parse(json.dumps(fields | {"precision": "int4"}), "other")
    with pytest.raises(UserError, match="weight_bits"):
        Card.parse(json.dumps(fields | {"weight_bits": 9}), "other")

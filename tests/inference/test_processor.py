"""Test which processors compute int8 models with weights of 8 bits, and that the others refuse such a file everywhere."""

import importlib.util
import itertools
from pathlib import Path

import pytest
from helpers import laws
from helpers.models import with_card

from mura_dist.core.errors import UserError
from mura_dist.inference import processor
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.processor import check_weight_bits, find_16_bit_sums
from mura_dist.inference.study_model import load

HASWELL = "fpu sse4_1 ssse3 fma avx f16c bmi1 avx2 bmi2"
AVX512 = "avx512f avx512dq avx512bw avx512vl"
PROCESSORS = {  # flags -> whether the processor adds products of bytes in 32 bits
    HASWELL: False,
    f"{HASWELL} avx_vnni": True,  # Alder Lake
    f"{HASWELL} {AVX512} avx512cd": False,  # Skylake-X
    f"{HASWELL} {AVX512} avx512_vnni": True,  # Cascade Lake, Zen 4
    f"{HASWELL} {AVX512} avx_vnni": False,  # a virtual machine that hides AVX-512 VNNI
    f"{HASWELL} {AVX512} avx_vnni avx512_vnni amx_int8 amx_tile": True,  # Sapphire Rapids
    f"{HASWELL} avx512f avx512_vnni": False,  # ONNX Runtime then uses AVX2
    f"{HASWELL} amx_int8 amx_tile": False,  # convolutions do not use AMX
    "fpu sse4_1 ssse3": False,
    "": False,
    "fp asimd evtstrm aes crc32 cpuid": False,  # Cortex-A72
    "fp asimd evtstrm fphp asimdhp asimddp": True,  # Neoverse N1
    "fp asimd asimddp sve i8mm bf16": True,
}


@pytest.mark.parametrize("flags", PROCESSORS)
@pytest.mark.parametrize("line", ["flags\t\t: {}\n", "Features\t: {}\n"])
def test_processors_without_32_bit_sums_are_found(flags: str, line: str) -> None:
    text = f"processor\t: 0\nmodel name\t: one\n{line.format(flags)}vmx flags\t: avx_vnni\n\n" * 2
    reason = find_16_bit_sums(text)
    assert (reason is None) == PROCESSORS[flags], reason


@pytest.mark.parametrize("text", ["", "processor\t: 0\nisa\t: rv64imafdcv\n", "vmx flags\t: avx_vnni\n"])
def test_unknown_processor_is_refused(text: str) -> None:
    assert "its instructions are unknown" in str(find_16_bit_sums(text))


def test_each_processor_of_a_machine_counts() -> None:
    for pair in itertools.product(PROCESSORS, repeat=2):
        text = "\n".join(f"flags : {flags}" for flags in pair)
        assert (find_16_bit_sums(text) is None) == all(PROCESSORS[flags] for flags in pair), pair


@pytest.fixture
def without_vnni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {HASWELL}\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")


@pytest.fixture
def eight_bits(model: Path, tmp_path: Path) -> Path:
    """Return an exported model whose card says int8 with weights of 8 bits."""
    card = OnnxModel.load(model).card.model_copy(update={"precision": "int8", "weight_bits": 8})
    return with_card(model, card, tmp_path / "model-int8.onnx")


def test_every_command_refuses_8_bits_without_vnni(
    without_vnni: None, eight_bits: Path, phantoms: Path, shard_folder: Path, tmp_path: Path, capsys
) -> None:
    commands = [
        ["predict", eight_bits, phantoms, "--out", tmp_path / "out"],
        ["predict", eight_bits, phantoms, "--out", tmp_path / "out", "--autotune"],
        ["evaluate", eight_bits, shard_folder, "--out", tmp_path / "report"],
    ]
    if importlib.util.find_spec("openvino"):
        commands.append([*commands[0], "--provider", "openvino"])
    if importlib.util.find_spec("streamlit"):
        commands.append(["page", eight_bits])
    for command in commands:
        laws.refusal(
            capsys,
            command,
            f"{eight_bits}: weights of 8 bits would overflow on this processor (limit: 7 bits; it has no VNNI)",
            "Export it again with --weight-bits 7.",
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="limit: 7 bits"):
        load(eight_bits)


@pytest.mark.parametrize("provider", ["cuda", "TensorRT", "CUDAExecutionProvider"])
def test_gpu_needs_no_vnni(without_vnni: None, provider: str) -> None:
    check_weight_bits(8, "a file", "", provider=provider)
    with pytest.raises(UserError, match="a file: weights of 8 bits"):
        check_weight_bits(8, "a file", "", provider="XnnpackExecutionProvider")


def test_7_bits_and_other_precisions_run_without_vnni(without_vnni: None, model: Path, tmp_path: Path) -> None:
    card = OnnxModel.load(model).card
    assert card.weight_bits is None
    for changes in ({"precision": "int8", "weight_bits": 7}, {"precision": "int8"}):  # the latter as in older files
        OnnxModel.load(with_card(model, card.model_copy(update=changes), tmp_path / "model.onnx"))

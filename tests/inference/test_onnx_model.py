"""Test OnnxModel and autotune: equal logits in every session configuration, refused providers, the tuning cache."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.models import S, card_of, noise, with_card

from mura_dist.core.errors import RunError, UserError, install_remedy
from mura_dist.inference import autotune, engine, engine_onnxruntime, engine_openvino
from mura_dist.inference.engine import OUTPUTS, PROVIDERS, SessionConfig
from mura_dist.inference.onnx_model import OnnxModel

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the openvino extra is not installed"
)
BOTH = ["cpu", pytest.param("openvino", marks=needs_openvino)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("batch_size", "streams", "threads"),
    [(1, 1, 5), (1, 3, 2), (2, 2, 1), (2, 3, 5), (7, 1, 2), (7, 2, 5), (7, 3, 1), (16, 1, 1), (16, 2, 2)],
)
def test_outputs_identical_across_session_configs(model: Path, batch_size: int, streams: int, threads: int) -> None:
    images = noise(23)
    expected = OnnxModel.load(model, session_config=SessionConfig(threads=1, streams=1)).outputs(images)
    loaded = OnnxModel.load(model, session_config=SessionConfig(batch_size, streams, threads))
    batches = (images[at : at + batch_size] for at in range(0, len(images), batch_size))
    actual = [np.concatenate(parts) for parts in zip(*loaded.stream(batches, OUTPUTS), strict=True)]
    for output, reference in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(output, reference)


@pytest.mark.parametrize("provider", BOTH)
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_stream_keeps_batch_order(model: Path, provider: str, streams: int) -> None:
    loaded, images = OnnxModel.load(model, provider, SessionConfig(streams=streams)), noise(40)
    sizes = [1, 5, 2, 9, 3, 20]
    starts = np.cumsum([0, *sizes[:-1]])
    batches = [images[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    actual = [logit for (logit,) in loaded.stream(batches)]
    assert [len(logit) for logit in actual] == sizes
    np.testing.assert_allclose(np.concatenate(actual), OnnxModel.load(model).logits(images), atol=1e-4)
    assert list(loaded.stream([])) == []


def test_stream_reads_few_batches_ahead(model: Path) -> None:
    num_read = 0

    def batches():
        nonlocal num_read
        for _ in range(20):
            num_read += 1
            yield noise(1)

    stream = OnnxModel.load(model, session_config=SessionConfig(streams=2)).stream(batches())
    next(stream)
    assert num_read <= 4
    stream.close()


def test_failed_batch_raises_run_error(model: Path) -> None:
    with pytest.raises(RunError, match=r"failed on a batch of 1 .*image.*smaller --batch-size"):
        list(OnnxModel.load(model, session_config=SessionConfig(streams=2)).stream([noise(1), noise(1, size=S + 1)]))


@needs_openvino
def test_openvino_agrees_and_loads_no_telemetry(model: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from mura_dist.inference.onnx_model import OnnxModel
path, images = Path(sys.argv[1]), np.random.default_rng(1).integers(0, 256, (9, 1, 64, 64), dtype=np.uint8)
one, two = OnnxModel.load(path), OnnxModel.load(path, "OpenVINO")
for a, b in zip(one.outputs(images), two.outputs(images), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
assert one.card == two.card and two.provider == "OpenVINO CPU"
unwanted = ("openvino_telemetry", "torch")
print([name for name, module in sys.modules.items() if module and name.partition(".")[0] in unwanted])
"""
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.nightly(part="training")
@needs_openvino
def test_openvino_compiles_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = noise(5), tmp_path / "cache/mura-dist/openvino"
    expected = OnnxModel.load(model, "openvino", SessionConfig(streams=1)).logits(images)
    (blob,) = cache.iterdir()
    content = blob.read_bytes()
    monkeypatch.setattr(engine_openvino, "_read_model", None)  # a second compilation would fail
    hit = OnnxModel.load(model, "openvino", SessionConfig(streams=2, threads=2))
    assert hit.engine.compiled.get_property("NUM_STREAMS") == 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(hit.logits(images), expected)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for corrupt in (b"", b"no model", content[:middle], flipped):
        blob.write_bytes(corrupt)
        np.testing.assert_array_equal(OnnxModel.load(model, "openvino").logits(images), expected)
        assert len(blob.read_bytes()) == len(content)  # written again


@needs_openvino
@pytest.mark.parametrize("folder", ["read-only", "a file", "no home"])
def test_openvino_needs_no_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    if folder == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")  # not writable, even for root
    elif folder == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: Path("~nobody-here").expanduser())  # as for a user without a home
    np.testing.assert_allclose(
        OnnxModel.load(model, "openvino").logits(noise(2)), OnnxModel.load(model).logits(noise(2)), atol=1e-4
    )


@needs_openvino
def test_concurrent_first_openvino_batches_do_not_deadlock(model: Path) -> None:
    """Two threads of a fresh process once held the lock that the other thread needed."""
    code = """
import sys
from pathlib import Path
import numpy as np
from mura_dist.inference.engine import SessionConfig
from mura_dist.inference.onnx_model import OnnxModel
images = np.zeros((4, 1, 64, 64), np.uint8)
print(len(list(OnnxModel.load(Path(sys.argv[1]), "openvino", SessionConfig(streams=4)).stream([images] * 20))))
"""
    for _ in range(8):
        done = subprocess.run(
            [sys.executable, "-c", code, model], capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stdout.strip() == "20"


@pytest.mark.parametrize("uses_package", [True, False])
def test_onnx_runtime_starts_no_telemetry(model: Path, tmp_path: Path, uses_package: bool) -> None:
    """Its telemetry creates a temporary file. Without the package the file exists, with it there is none."""
    code = (
        "from pathlib import Path; from mura_dist.inference.onnx_model import OnnxModel; OnnxModel.load(Path({0!r}))"
        if uses_package
        else "import onnxruntime; onnxruntime.InferenceSession({0!r})"
    )
    disabling_variables = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")  # each of them disables telemetry
    env = {name: value for name, value in os.environ.items() if name not in disabling_variables} | {
        "TMPDIR": str(tmp_path)
    }
    # The proxy refuses all connections, so that the control sends nothing either.
    env |= dict.fromkeys(("https_proxy", "HTTPS_PROXY", "http_proxy", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    subprocess.run([sys.executable, "-c", code.format(str(model))], check=True, env=env, timeout=120)
    leftovers = [path.name for path in tmp_path.iterdir() if path.name != "cache"]
    if uses_package:
        assert leftovers == []
    elif not leftovers:
        pytest.skip("this build of ONNX Runtime writes no such file")


def test_missing_openvino_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=re.escape(install_remedy("openvino"))):
        OnnxModel.load(model, "openvino")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_unavailable_gpu_provider_is_refused(model: Path, provider: str) -> None:
    available = engine_onnxruntime.import_onnxruntime().get_available_providers()
    if PROVIDERS[provider] not in available:
        with pytest.raises(UserError, match=r"computes on CPUs only. pip uninstall onnxruntime, .*'mura-dist\[cuda\]'"):
            OnnxModel.load(model, provider)
        return
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    with pytest.raises(
        UserError, match=r"--provider \w+: \w+ does not start: (lib\S+) cannot be opened\. To fix it, "
    ) as refused:
        OnnxModel.load(model, provider)
    assert str(refused.value).endswith(", or give --provider cpu.")


def test_mistyped_provider_has_a_suggestion(model: Path) -> None:
    with pytest.raises(UserError, match=r"--provider cdua \(did you mean cuda\?\)"):
        OnnxModel.load(model, "cdua")


def test_bf16_is_refused_without_device_support(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bf16.onnx"
    with_card(model, card_of().model_copy(update={"precision": "bf16"}), path)
    with pytest.raises(UserError, match="bf16"):
        OnnxModel.load(path)
    if importlib.util.find_spec("openvino") is not None and not engine_openvino.supports_bf16():
        with pytest.raises(UserError, match="no instructions"):
            OnnxModel.load(path, "openvino")


@needs_openvino
def test_openvino_refuses_invalid_models(model: Path, tmp_path: Path) -> None:
    import onnx

    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UserError, match="not an ONNX model"):
        OnnxModel.load(tmp_path / "text.onnx", "openvino")
    without_metadata = onnx.load(model)
    del without_metadata.metadata_props[:]
    (tmp_path / "bare.onnx").write_bytes(without_metadata.SerializeToString())
    with pytest.raises(UserError, match="mura-dist export"):
        OnnxModel.load(tmp_path / "bare.onnx", "openvino")


def test_local_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SessionConfig().resolved(on_cpu=True)
    assert config.threads == engine.num_processors()
    assert engine.pipelined_config(3).streams == min(2, engine.num_processors())
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 4 * engine.num_processors(),
        "LOCAL_WORLD_SIZE": 4 * engine.num_processors(),
    }.items():
        monkeypatch.setenv(name, str(value))
    assert SessionConfig().resolved(on_cpu=True).threads == 1
    assert engine.pipelined_config(3) == SessionConfig(3, 1, 1)
    assert SessionConfig(3, 1, 7).resolved(on_cpu=True) == SessionConfig(3, 1, 7)


# ---- tuning


@pytest.mark.parametrize("provider", BOTH)
def test_fastest_config_is_measured_and_cached(
    model: Path, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_SECONDS", 0.01)
    assert autotune.load_tuned_config(OnnxModel.load(model, provider)) is None
    lines: list[str] = []
    best = autotune.tune(model, provider, lines.append)
    configs = list(autotune.candidates(model, provider))
    assert len(lines) == len(configs) == len(set(configs))
    assert best in configs
    assert (
        autotune.describe(best) in lines[0] or float(lines[0].split()[0]) >= 0
    )  # sorted by the median of further runs
    assert autotune.load_tuned_config(OnnxModel.load(model, provider)) == best
    cache = json.loads((tmp_path / "cache" / "mura-dist" / autotune.FILE).read_bytes())
    [entry] = cache.values()
    assert len(entry["measured"]) == len(configs)
    assert str(model) not in json.dumps(cache)


@pytest.mark.parametrize(("provider", "streams"), [("cuda", {1, 2, 3}), ("tensorrt", {1})])
def test_tensorrt_candidates_have_one_stream(provider: str, streams: set[int]) -> None:
    """The runs of a TensorRT session are sequential."""
    default_config = SessionConfig(64, 2, 8)
    configs = list(autotune.candidate_configs(default_config, PROVIDERS[provider], 320))
    assert default_config not in configs
    assert {config.streams for config in configs} == streams
    assert {config.batch_size for config in configs} == {16, 32, 64, 128}


def test_tuned_config_depends_on_model_and_machine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_SECONDS", 0.01)
    autotune.tune(model, "cpu")
    other_model = tmp_path / "other.onnx"
    with_card(model, card_of().model_copy(update={"checkpoint": "another"}), other_model)
    assert autotune.load_tuned_config(OnnxModel.load(other_model)) is None
    assert autotune.load_tuned_config(OnnxModel.load(model)) is not None
    monkeypatch.setattr(autotune, "num_processors", lambda: 99)
    assert autotune.load_tuned_config(OnnxModel.load(model)) is None


def test_tuning_is_used_when_the_cache_is_not_writable(
    model: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(autotune, "_SECONDS", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    lines: list[str] = []
    assert autotune.tune(model, "cpu", lines.append).batch_size
    assert lines[-1].startswith(
        "warning: not cached for later runs: /dev/null/cache/mura-dist: not a directory. Name another folder with XDG_CACHE_HOME="
    )
    request.getfixturevalue("homeless")
    assert autotune.tune(model, "cpu", lines.append).batch_size
    assert lines[-1].startswith("warning: not cached for later runs: HOME is not set")
    assert autotune.load_tuned_config(OnnxModel.load(model)) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "null"])
def test_corrupt_tuning_cache_is_ignored(
    model: Path, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "_SECONDS", 0.01)
    path = tmp_path / "cache" / "mura-dist" / autotune.FILE
    path.parent.mkdir(parents=True)
    path.write_text(content)
    loaded = OnnxModel.load(model)
    assert autotune.load_tuned_config(loaded) is None
    path.write_text(json.dumps({autotune._cache_key(loaded): {"tuning": {"batch_size": "many", "colour": 3}}}))
    assert autotune.load_tuned_config(loaded) is None
    path.write_text(
        json.dumps({autotune._cache_key(loaded): {"tuning": {"batch_size": -5, "streams": 1, "threads": 1}}})
    )
    assert autotune.load_tuned_config(loaded) is None
    assert autotune.tune(model, "cpu") == autotune.load_tuned_config(loaded)

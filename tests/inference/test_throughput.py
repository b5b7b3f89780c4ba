"""Test the throughput summary: whether decoding or computing limits a prediction."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mura_dist.cli.main import main
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
from mura_dist.inference.predict import PredictOptions, predict
from mura_dist.inference.throughput import BusyTime, Throughput


def test_stage_with_less_waiting_is_the_limit() -> None:
    throughput = Throughput(
        num_processes=2, num_files=110, num_radiographs=100, reading_s=16.0, computing_s=2.0, elapsed_s=10.0
    )
    assert throughput.summary() == {
        "limited_by": "decoding",
        "decoding": {"files_per_s": 13.75, "waiting_s": 2.0, "num_processes": 2},
        "computing": {"radiographs_per_s": 50.0, "waiting_s": 8.0},
    }
    throughput.computing_s = 9.5
    assert throughput.summary()["limited_by"] == "computing"  # type: ignore[index]


def test_no_limit_without_computation() -> None:
    assert Throughput().summary() is None
    assert Throughput(num_files=3, reading_s=1.0, elapsed_s=2.0).summary() is None


def test_concurrent_busy_time_counts_once() -> None:
    busy = BusyTime()

    def work() -> None:
        with busy:
            time.sleep(0.2)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = busy.seconds
    assert 0.2 <= first < 0.5
    time.sleep(0.05)  # no thread is busy
    work()
    assert 0.2 <= busy.seconds - first < 0.4


def draw_radiographs(folder: Path, number: int, size: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(1)
    for index in range(number):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(
            folder / f"{index}.png", compress_level=1
        )
    return folder


def test_large_files_are_limited_by_decoding(model: Path, tmp_path: Path) -> None:
    summary = predict(model, draw_radiographs(tmp_path / "in", 8, 2500), tmp_path / "out", PredictOptions(workers=1))
    assert summary
    throughput = summary["throughput"]
    assert throughput["limited_by"] == "decoding"
    assert throughput["decoding"]["files_per_s"] < throughput["computing"]["radiographs_per_s"]
    assert throughput["decoding"]["waiting_s"] < throughput["computing"]["waiting_s"]
    assert json.loads((tmp_path / "out" / "predict.json").read_bytes())["throughput"] == throughput


def test_slow_model_is_limited_by_computing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = OnnxRuntime.run

    def slow(self: OnnxRuntime, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        time.sleep(0.3)
        return run(self, image, outputs)

    monkeypatch.setattr(OnnxRuntime, "run", slow)
    command = [
        "predict",
        str(model),
        str(draw_radiographs(tmp_path / "in", 16, 64)),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main(command) == 0
    throughput = json.loads((tmp_path / "out" / "predict.json").read_bytes())["throughput"]
    assert throughput["limited_by"] == "computing"
    assert throughput["computing"]["radiographs_per_s"] < 30
    assert "limited by computing: " in capsys.readouterr().out
    before = (tmp_path / "out" / "predict.json").read_bytes()
    assert main(command) == 0  # finished: no new measurement
    assert (tmp_path / "out" / "predict.json").read_bytes() == before


def test_command_without_radiographs_prints_no_limit(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("none")
    assert main(["predict", str(model), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert json.loads((tmp_path / "out" / "predict.json").read_bytes())["throughput"] is None
    assert "limited by" not in capsys.readouterr().out

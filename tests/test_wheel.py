"""Test the wheel in an empty environment: the base names the extras for prediction; the extra cpu predicts without torch."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.commands import ROOT, run

POSTCARD = """\
import sys
from pathlib import Path

import mura_dist

model_file, folder, out = sys.argv[1:]
model = mura_dist.load(model_file)
files = sorted(Path(folder).rglob("*.png"))
print(model.predict(files[0]).probability)
tables = mura_dist.predict_directory(folder, model=model_file, out=out)
assert len(tables.predictions) == len(files)
assert mura_dist.read_radiograph(files[0], size=320).shape == (320, 320)
labels = tables.studies[["study"]].assign(label=tables.studies["study"].str.endswith("positive").astype(int))
print(mura_dist.evaluate_predictions(tables.studies[["study", "probability"]], labels)["overall"]["auroc"])
assert "torch" not in sys.modules
for name in ("data_loader", "load_network"):
    try:
        getattr(mura_dist, name)
    except ImportError as error:
        print(str(error).partition(", which")[0])
"""


def call(*arguments: object, cwd: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.nightly(part="system")
def test_wheel_with_extra_cpu_predicts_and_evaluates(
    phantoms: Path, halved: Path, untrained: Path, tmp_path: Path
) -> None:
    model = untrained / "model.onnx"
    call(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    [wheel] = (tmp_path / "dist").glob("*.whl")
    assert "mura_dist/py.typed" in zipfile.ZipFile(wheel).namelist()
    python = tmp_path / "venv" / "bin" / "python"
    pins = tmp_path / "constraints.txt"  # without hashes, since pip would refuse the wheel, which has none
    pins.write_text("\n".join(re.findall(r"^\S+==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)))
    install = (python, "-m", "pip", "install", "--quiet", "--constraint", pins)
    call(*install, wheel)
    command = tmp_path / "venv" / "bin" / "mura-dist"
    arguments = ("predict", model, phantoms / "valid", "--out", tmp_path / "base")
    refused = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    [line] = refused.stderr.splitlines()
    assert "pip install '.[cpu]' or pip install '.[cuda]' in the checkout" in line

    call(*install, f"{wheel}[cpu]")
    installed = call(python, "-m", "pip", "list", "--format", "freeze").lower()
    assert not any(
        f"\n{name}" in f"\n{installed}"
        for name in ("torch", "opencv", "matplotlib", "onnx==", "onnxruntime-gpu", "deepspeed", "nvidia")
    )
    call(command, *arguments, cwd=tmp_path)
    assert run("mura-dist", "predict", model, phantoms / "valid", "--out", tmp_path / "full", cold=True).returncode == 0
    for table in ("predictions.csv", "studies.csv", "failures.csv"):
        assert (tmp_path / "base" / table).read_bytes() == (tmp_path / "full" / table).read_bytes()
    (tmp_path / "postcard.py").write_text(POSTCARD)
    lines = call(python, "postcard.py", model, phantoms / "valid", tmp_path / "frames", cwd=tmp_path).splitlines()
    assert all(0 < float(line) < 1 for line in lines[:2])
    assert lines[2:] == ["mura_dist.data_loader needs torch", "mura_dist.load_network needs torch"]
    call(command, "phantoms", tmp_path / "drawn", "--studies", "12", "--size", "96")
    call(command, "shards", tmp_path / "drawn", tmp_path / "shards", "--size", "48")
    call(command, "verify", tmp_path / "shards")
    call(command, "describe", tmp_path / "shards", "--out", tmp_path / "page.html")
    call(command, "evaluate", model, halved, "--out", tmp_path / "evaluated", "--quiet")
    full = run("mura-dist", "evaluate", model, halved, "--out", tmp_path / "evaluated-full", "--quiet", cold=True)
    assert full.returncode == 0, full.stderr
    for name in ("metrics.json", "predictions.csv", "studies.csv"):
        assert (tmp_path / "evaluated" / name).read_bytes() == (tmp_path / "evaluated-full" / name).read_bytes()
    refused = subprocess.run([command, "train", "shards=a", "run=b"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "pip install '.[train]' in the checkout" in refused.stderr

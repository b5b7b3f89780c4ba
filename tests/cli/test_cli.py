"""Test the command line: complete help, exit statuses, and a one-line error for each invalid request."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import laws
from helpers.commands import ROOT, SHORT, TINY

from mura_dist import __version__
from mura_dist.cli.main import DONE, FAILED, INVALID, cli, main

COMMANDS = (
    *("phantoms", "shards", "verify", "describe", "train", "ensemble", "evaluate", "score", "export", "predict"),
    "page",
    "bench",
)


def test_commands_are_the_documented_ones() -> None:
    assert set(cli.commands) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_parameter(command: str, capsys) -> None:
    assert main([command, "--help"]) == DONE
    text = capsys.readouterr().out
    for parameter in cli.commands[command].params:
        stdout = parameter.opts[-1] if parameter.opts[-1].startswith("--") else parameter.human_readable_name
        assert getattr(parameter, "hidden", False) or stdout in text
        assert not stdout.startswith("--") or parameter.help
    assert "Usage: mura-dist" in text
    assert len(text.splitlines()[2].strip()) > 20  # what it does


def test_help_of_train_lists_every_setting(capsys) -> None:
    from mura_dist.core.config import Settings

    assert main(["train", "--help"]) == DONE
    text = capsys.readouterr().out
    assert all(re.search(rf"^  +{name} ", text, re.MULTILINE) for name in Settings.model_fields)


def test_version_option_prints_the_version(capsys) -> None:
    assert main(["--version"]) == DONE
    assert __version__ in capsys.readouterr().out


def test_missing_command_lists_the_commands(capsys) -> None:
    assert main([]) == INVALID
    assert "phantoms" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(reference_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one epoch with a checkpoint."""
    return Path(shutil.copytree(reference_run(1, *SHORT), tmp_path_factory.mktemp("cli") / "run"))


INVALID_REQUESTS = {
    "a mistyped command": (["shrads"], ["shrads", "did you mean shards?"]),
    "a mistyped option": (
        ["shards", "a", "b", "--sise", "3"],
        ["no option --sise (did you mean --size?). See mura-dist shards --help."],
    ),
    "an invalid number": (["shards", "a", "b", "--size", "big"], ["--size", "big"]),
    "a missing argument": (["predict", "a"], ["FILE_OR_FOLDER...", "mura-dist predict --help"]),
    "a missing folder": (["shards", "{tmp}/none", "{tmp}/out"], ["none: no such folder"]),
    "no such list": (["evaluate", "{tmp}/none.json", "{shards}"], ["none.json: no such file"]),
    "not MURA's layout": (["shards", "{tmp}/flat", "{tmp}/out"], ["not in MURA's layout", "imageN.png"]),
    "no shards": (["verify", "{tmp}/flat"], ["holds no shards", "mura-dist shards"]),
    "shards of another version": (["verify", "{tmp}/future"], ["format 99", "reads format 1"]),
    "training on shards of another version": (["train", "shards={tmp}/future", "run={tmp}/r"], ["format 99"]),
    "an unknown setting": (["train", "shards=a", "run=b", "epoch=3"], ["'epoch'", "did you mean epochs?"]),
    "a setting as an option": (["train", "a.toml", "--epochs", "3"], ["a.toml: no such recipe"]),
    "a setting as an option of this recipe": (
        ["train", "{demo}", "--lr", "3e-4", "--epochs=3", "batch_size=8"],
        [
            "command line: '--lr 3e-4' is not key=value (write learning_rate=3e-4); ",
            "'--epochs=3' is not key=value (write epochs=3); ",
            "unknown setting 'batch_size' (did you mean global_batch or micro_batch?)",
        ],
    ),
    "a value below 0": (
        ["train", "{demo}", "--epochs", "-3", "--wd", "-.5", "--quiet"],
        [
            "command line: '--epochs -3' is not key=value (write epochs=-3); ",
            "'--wd -.5' is not key=value (write weight_decay=-.5)",
            "epochs=-3: input should be greater than or equal to 0",
        ],
    ),
    "an option before the recipe": (["train", "--lr", "3e-4", "{demo}"], ["(write learning_rate=3e-4)"]),
    "a switch before the recipe": (["train", "--amp", "{demo}"], ["'--amp' is not key=value", "(write precision=...)"]),
    "a setting without =": (["train", "{demo}", "epochs", "3"], ["'epochs 3' is not", "(write epochs=3)"]),
    "a setting with blanks": (["train", "{demo}", "epochs", "=", "3"], ["(write epochs=3). See"]),
    "a mistyped option of train": (["train", "{demo}", "--quite"], ["no option --quite (did you mean --quiet?)"]),
    "an option like no setting": (["train", "{demo}", "--zzz"], ["no option --zzz. See mura-dist train --help."]),
    "two recipes": (["train", "{demo}", "other.toml"], ["'other.toml' is a second recipe (give one)"]),
    "nothing to train": (["train"], ["settings 'shards' and 'run' are missing (add shards=...", "run=..."]),
    "a mistyped value of an option": (
        ["predict", "m.onnx", "{tmp}", "--out", "{tmp}/p", "--study-by", "flie"],
        ["--study-by 'flie' (did you mean file?): must be one of auto, folder, file"],
    ),
    "a URL for a file": (
        ["page", "s3://bucket/model.onnx"],
        ["MODEL.onnx s3://bucket/model.onnx: must be a path of this machine, not a URL. Copy it to this machine"],
    ),
    "a URL to predict": (
        ["predict", "m.onnx", "s3://b/x", "--out", "{tmp}/p"],
        ["s3://b/x: predict reads only files of"],
    ),
    "nothing to predict": (
        ["predict", "m.onnx", "{tmp}/none", "--out", "{tmp}/p"],
        ["none: no such file or folder"],
    ),
    "no recipe": (["train", "{tmp}/none.toml"], ["no such recipe"]),
    "a recipe that is no TOML": (["train", "{tmp}/bad.toml"], ["is not TOML"]),
    "an empty split": (
        ["evaluate", "{run}", "{shards}", "--split", "test"],
        ["'test'", "is empty", "train, tune, valid"],
    ),
    "an unknown split": (["evaluate", "{run}", "{shards}", "--split", "vald"], ["'vald'", "did you mean valid?"]),
    "no such run": (["evaluate", "{tmp}/none", "{shards}"], ["is not a run"]),
    "no such checkpoint": (
        ["evaluate", "{run}", "{shards}", "--checkpoint", "step-9999"],
        ["step-9999", "best, last, step-"],
    ),
    "ONNX without --out": (["evaluate", "{tmp}/other.onnx", "{shards}"], ["--out"]),
    "a foreign ONNX file": (
        ["predict", "{tmp}/other.onnx", "{tmp}/flat", "--out", "{tmp}/p"],
        ["was not exported by mura-dist"],
    ),
    "evaluation of a foreign ONNX file": (
        ["evaluate", "{tmp}/other.onnx", "{shards}", "--out", "{tmp}/e"],
        ["was not exported by mura-dist"],
    ),
    "a model that is not ONNX": (["predict", "{tmp}/bad.toml", "{tmp}/flat", "--out", "{tmp}/p"], ["bad.toml"]),
    "no model": (["predict", "{tmp}/none.onnx", "{tmp}/flat", "--out", "{tmp}/p"], ["none.onnx"]),
    "nothing to export": (["export", "{tmp}/flat"], ["is not a run"]),
    "too few phantoms": (["phantoms", "{tmp}/ph", "--studies", "1"], ["1"]),
    "nothing to describe": (["describe", "{tmp}/none"], ["none"]),
    "an unknown benchmark": (["bench", "pipelin"], ["pipelin", "did you mean pipeline?"]),
}


@pytest.fixture(scope="module")
def request_paths(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path, trained: Path) -> dict[str, Path]:
    from onnx import TensorProto, helper, save

    folder = tmp_path_factory.mktemp("wrong")
    (folder / "flat").mkdir()
    (folder / "flat" / "image1.png").write_bytes(b"")
    (folder / "bad.toml").write_text("epochs: 3")
    shutil.copytree(shard_folder, folder / "future")
    index = json.loads((folder / "future" / "index.json").read_bytes())
    (folder / "future" / "index.json").write_text(json.dumps(index | {"format": 99}))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", 1, [1])]
    )
    save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), folder / "other.onnx")
    demo = ROOT / "launch" / "recipes" / "demo.toml"
    return {"tmp": folder, "run": trained, "shards": shard_folder, "demo": demo}


@pytest.mark.parametrize("what", INVALID_REQUESTS)
def test_invalid_request_is_a_one_line_error(what: str, request_paths: dict[str, Path], capsys) -> None:
    arguments, texts = INVALID_REQUESTS[what]
    laws.refusal(capsys, [word.format(**request_paths) for word in arguments], *texts)


def test_invalid_request_changes_no_file(
    request_paths: dict[str, Path], trained: Path, shard_folder: Path, capsys
) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    laws.refusal(capsys, ["train", *TINY, f"shards={shard_folder}", f"run={trained}", "seed=9"], "seed=9")
    laws.refusal(capsys, ["evaluate", trained, shard_folder, "--split", "test"], "is empty")
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_verify_fails_on_a_missing_shard(shard_folder: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(shard_folder, tmp_path / "bad")
    (tmp_path / "bad" / "valid-000000.tar").unlink()
    assert main(["verify", str(tmp_path / "bad")]) == FAILED
    out, err = capsys.readouterr()
    assert "valid-000000.tar: missing" in out
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_evaluation_of_a_run_and_of_its_exported_model_agree(
    trained: Path, shard_folder: Path, tmp_path: Path, capsys
) -> None:
    """The torch metrics equal those of the exported ONNX file."""
    import pandas as pd

    assert main(["evaluate", str(trained), str(shard_folder), "--quiet"]) == DONE
    table = capsys.readouterr().out
    assert "kappa" in table
    assert "AUROC" in table
    assert (
        main(["export", str(trained), "--out", str(tmp_path / "m.onnx"), "--triton", str(tmp_path / "triton")]) == DONE
    )
    assert (tmp_path / "triton" / "mura_dist" / "1" / "model.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert main(["evaluate", str(tmp_path / "m.onnx"), str(shard_folder), "--out", str(tmp_path / "e")]) == DONE
    runs, onnxs = (
        pd.read_csv(folder / "predictions.csv").set_index("path")["logit"] for folder in (trained, tmp_path / "e")
    )
    laws.same_metrics(runs.to_dict(), onnxs.to_dict())
    reference, repeated = (json.loads((folder / "metrics.json").read_bytes()) for folder in (trained, tmp_path / "e"))
    assert reference["overall"]["num_studies"] == repeated["overall"]["num_studies"] > 0
    assert reference["selected_on"] == "tune"
    assert reference["note"] is None


def test_evaluation_on_the_selection_split_is_marked(trained: Path, shard_folder: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(trained), str(shard_folder), "--split", "tune", "--out", str(tmp_path)]) == DONE
    stamp = "optimistic: this split chose the model"
    assert json.loads((tmp_path / "metrics.json").read_bytes())["note"] == stamp
    assert stamp in (tmp_path / "report.html").read_text()


def test_out_of_memory_is_a_one_line_error(tmp_path: Path) -> None:
    """torch cannot be loaded into 1 GB of address space. Only the text of its error says so."""
    command = f"ulimit -v 1000000; exec {sys.executable} -m mura_dist train shards=none run={tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == FAILED
    assert re.fullmatch(
        r"mura-dist: out of memory \(.*\)\. Free some or raise the limit \(ulimit -v\), .*\n", done.stderr
    )

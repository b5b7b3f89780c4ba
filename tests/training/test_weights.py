"""`load_network`: the torch module of a run's checkpoint or of a model list, as a Python script loads it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mura_dist.core import config
from mura_dist.core.errors import UserError
from mura_dist.models.densenet import DenseNet, build
from mura_dist.models.ensemble import Ensemble
from mura_dist.models.model_list import ModelList
from mura_dist.training import ensemble
from mura_dist.training.checkpoint import write
from mura_dist.training.run import RECIPE
from mura_dist.training.weights import load_network

LOSSES = {1: 0.3, 2: 0.1, 3: 0.2}  # by step: step 2 is the best, step 3 the last


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of three evaluated checkpoints, whose networks differ by their seed."""
    folder = tmp_path / "run"
    for step, loss in LOSSES.items():
        weights = build("tiny", seed=step).state_dict()
        write(folder / "checkpoints", {"step": step, "select_loss": loss}, {"model": weights}, {"m": torch.zeros(3)})
    settings = config.Settings(shards="shards", run=str(folder), architecture="tiny")
    (folder / RECIPE).write_text(config.to_toml(settings))
    return folder


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 2), ("last", 3), ("step-1", 1)])
def test_network_has_the_weights_of_the_checkpoint(run_folder: Path, checkpoint: str, step: int) -> None:
    network = load_network(run_folder, checkpoint)
    assert isinstance(network, DenseNet)
    assert not any(module.training for module in network.modules())
    expected = build("tiny", seed=step).state_dict()
    for name, tensor in network.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected[name]), name
    with torch.inference_mode():
        logit, activation_map = network(torch.zeros(2, 1, 64, 64, dtype=torch.uint8))
    assert logit.shape == (2,)
    assert torch.allclose(activation_map.mean(dim=(1, 2)), logit)


def test_default_checkpoint_is_best(run_folder: Path) -> None:
    network, best = load_network(str(run_folder)), load_network(run_folder, "best")
    assert all(map(torch.equal, network.state_dict().values(), best.state_dict().values()))


def test_model_list_gives_an_ensemble(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"size": 64, "manifest_sha256": "0" * 64}
    monkeypatch.setattr(ensemble.Run, "data", lambda run: data)
    ensemble.select_members([run_folder], tmp_path / "two.json", top=2)
    members = ModelList.load(tmp_path / "two.json").members
    assert [member.checkpoint for member in members] == ["step-00000002", "step-00000003"]
    network = load_network(tmp_path / "two.json")
    assert isinstance(network, Ensemble)
    assert not network.training
    for module, step in zip(network.networks, (2, 3), strict=True):
        assert torch.equal(module.classifier.weight, build("tiny", seed=step).classifier.weight)


def test_wrong_arguments_raise_user_errors(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        load_network(tmp_path / "missing")
    with pytest.raises(UserError, match="has best, last, step-00000001"):
        load_network(run_folder, "step-9")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=r"Load an ONNX file with mura_dist\.load\.$"):
        load_network(tmp_path / "model.onnx")


def test_import_needs_no_deepspeed() -> None:
    script = "import sys, mura_dist.training.weights; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

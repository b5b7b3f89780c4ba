"""densenet.py, loss.py, schedule.py: torchvision's network, the paper's loss, the plateau."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mura_dist.core.config import Settings
from mura_dist.core.errors import Refusal
from mura_dist.data.loaders.loader import Targets
from mura_dist.models import densenet
from mura_dist.training import schedule
from mura_dist.training.loss import weighted_bce
from mura_dist.training.schedule import LossScale, Plateau
from mura_dist.training.state import State
from mura_dist.training.validation import Scores, weighted_loss

SETTINGS = Settings(shards="s", run="r", learning_rate=1e-4, plateau_patience=1)


def test_it_is_torchvisions_densenet169() -> None:
    ours = densenet.build("densenet169", seed=3).eval()
    theirs = torchvision.models.densenet169(num_classes=1).eval()
    theirs.load_state_dict(ours.state_dict())  # key by key
    image = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (densenet.IMAGENET_MEAN, densenet.IMAGENET_DEVIATION))
    with torch.inference_mode():
        logit, activation_map = ours(image)
        wanted = theirs((image.expand(-1, 3, -1, -1) / 255 - mean) / deviation)[:, 0]
    torch.testing.assert_close(logit, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(activation_map.mean(dim=(1, 2)), logit)
    assert activation_map.shape == (2, 2, 2)


def test_the_seed_decides_the_weights() -> None:
    a, b, c = (densenet.build("tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_the_head_starts_at_the_base_rate() -> None:
    assert torch.sigmoid(densenet.build("tiny", base_rate=0.25).classifier.bias).item() == pytest.approx(0.25)


def pretrained(tmp_path: Path, change, suffix: str = ".pth") -> Path:
    """A file as ImageNet training leaves it: 1,000 classes."""
    growth, blocks, stem = densenet.ARCHITECTURES["tiny"]
    network = torchvision.models.DenseNet(growth, blocks, stem)
    state = change({key: torch.full_like(value, 0.5) for key, value in network.state_dict().items()})
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path


def old_keys(state: dict) -> dict:
    """`denselayer1.norm1.weight` was `denselayer1.norm.1.weight` in 2017."""
    return {k.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1").replace("conv2", "conv.2"): v
            for k, v in state.items() if not k.endswith("num_batches_tracked")}  # fmt: skip


@pytest.mark.parametrize(("change", "suffix"), [(dict, ".pth"), (old_keys, ".pth"), (dict, ".safetensors")])
def test_pretrained_weights_fill_the_whole_backbone(tmp_path: Path, change, suffix: str) -> None:
    network = densenet.build("tiny")
    head = network.classifier.weight.clone()
    densenet.load_pretrained(network, pretrained(tmp_path, change, suffix))
    for key, value in network.state_dict().items():
        if not key.startswith("classifier.") and value.is_floating_point():
            assert (value == 0.5).all(), key
    assert torch.equal(network.classifier.weight, head)


def test_pretrained_weights_that_do_not_fill_it_are_refused(tmp_path: Path) -> None:
    network = densenet.build("tiny")
    before = {key: value.clone() for key, value in network.state_dict().items()}

    def lacking(state: dict) -> dict:
        return {key: value for key, value in state.items() if "denseblock3" not in key}

    with pytest.raises(Refusal, match=r"fills \d+ of \d+ backbone tensors.*denseblock3"):
        densenet.load_pretrained(network, pretrained(tmp_path, lacking))
    with pytest.raises(Refusal, match="no such file"):
        densenet.load_pretrained(network, tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    with pytest.raises(Refusal, match="not a file of tensors"):
        densenet.load_pretrained(network, tmp_path / "bad.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


DIGESTS = {"densenet121": "a639ec97", "densenet169": "b2777c0a"}  # in the names of torchvision's files


def imagenet_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> Path:
    """Where torch.hub would keep torchvision's file; and no way out, so that nothing is fetched."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder / "hub" / "checkpoints" / f"{architecture}-{DIGESTS[architecture]}.pth"


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("densenet121", old_keys), pytest.param("densenet169", dict, marks=pytest.mark.nightly(part="training"))],
)
def test_imagenet_is_torchvisions_file(tmp_path: Path, monkeypatch, architecture: str, change) -> None:
    path = imagenet_cache(tmp_path, monkeypatch, architecture)
    path.parent.mkdir(parents=True)
    published = getattr(torchvision.models, architecture)()  # 1,000 classes
    torch.save(change(published.state_dict()), path)
    network = densenet.build(architecture, seed=5)
    densenet.load_pretrained(network, "imagenet")
    for key, value in network.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(value, published.state_dict()[key]), key


def test_imagenet_without_a_file_or_a_network_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = imagenet_cache(tmp_path, monkeypatch, "densenet169")
    with pytest.raises(Refusal, match=r"cannot fetch densenet169-\w+\.pth .* give pretrained=FILE") as refusal:
        densenet.load_pretrained(densenet.build("densenet169"), "imagenet")
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not path.exists()
    with pytest.raises(Refusal, match=r"no such weights of architecture=tiny, only of densenet121, densenet169"):
        densenet.load_pretrained(densenet.build("tiny"), "imagenet")


def test_the_transition_pools_first_and_the_keys_are_torchvisions() -> None:
    ours, theirs = densenet.build("densenet169"), torchvision.models.densenet169(num_classes=1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.features.transition2.named_children()] == ["norm", "relu", "pool", "conv"]


def test_the_loss_is_the_papers() -> None:
    """FIELD: HAND has w1 .732275, w0 .267725; loss(y=1, p=.9) = .077153, loss(y=0, p=.9) = .616460."""
    logit = torch.tensor([math.log(9), math.log(9)], dtype=torch.float64).float()
    label, weight = torch.tensor([1.0, 0.0]), torch.tensor([0.732275, 0.267725])
    assert weighted_bce(logit[:1], label[:1], weight[:1]).item() == pytest.approx(0.077153, abs=1e-6)
    assert weighted_bce(logit[1:], label[1:], weight[1:]).item() == pytest.approx(0.616460, abs=1e-6)
    assert weighted_bce(logit, label, weight).item() == pytest.approx(0.693613, abs=2e-6)
    targets = Targets(label.numpy(), weight.numpy())
    found = Scores.of(np.array([0, 1]), logit.numpy(), np.ones(2, bool))
    assert weighted_loss(found, targets) == pytest.approx(0.693613 / 2, abs=1e-6)


def test_the_loss_bears_any_logit() -> None:
    logit = torch.tensor([1e4, -1e4, 0.0])
    assert torch.isfinite(weighted_bce(logit, torch.tensor([0.0, 1.0, 1.0]), torch.ones(3)))
    found = Scores.of(np.arange(3), logit.numpy(), np.ones(3, bool))
    assert np.isfinite(weighted_loss(found, Targets(np.ones(3, np.float32), np.ones(3, np.float32))))


def trajectory(losses: list[float]) -> list[float]:
    plateau, rates = Plateau(), []
    for loss in losses:
        plateau = plateau.after(loss, SETTINGS)
        rates.append(schedule.learning_rate(SETTINGS, plateau, step=10))
    return rates


def test_the_plateau_is_torchs() -> None:
    losses = [1.0, 0.9, 0.95, 0.91, 0.89, 0.9, 0.9, 0.9, 0.9, 0.5, 0.49999, 0.51, 0.4]
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=1, threshold=1e-4)
    wanted = []
    for loss in losses:
        torchs.step(loss)
        wanted.append(optimiser.param_groups[0]["lr"])
    assert trajectory(losses) == pytest.approx(wanted)
    assert len(set(wanted)) > 2  # it did drop, more than once


def test_a_loss_that_is_not_finite_drives_nothing() -> None:
    plateau = Plateau(best=0.5, bad_epochs=1)
    for loss in (math.nan, math.inf):
        assert plateau.after(loss, SETTINGS) == plateau


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", 4), ("linear", 16)])
def test_the_learning_rate_follows_the_global_batch(rule: str, factor: float) -> None:
    """launch/recipes/mura-8gpu.toml: 1e-4 meant for 8, at 128."""
    chosen = {"lr_scaling": rule, "global_batch": 128, "reference_batch": 8}
    settings = SETTINGS.model_copy(update=chosen)
    assert schedule.learning_rate(settings, Plateau(), 0) == pytest.approx(1e-4 * factor)


def test_an_fp16_scale_finds_its_place() -> None:
    """Halved by each overflow down to 1, doubled after GROWTH_STEPS without one; never moved where nothing is scaled."""
    half = SETTINGS.model_copy(update={"precision": "fp16"})
    scale = LossScale.of(half)
    assert scale.value == 2.0**16
    seen = [scale := scale.after(False, half) for _ in range(20)]
    assert [one.value for one in seen] == [max(1.0, 2.0**n) for n in range(15, -5, -1)]
    for _ in range(schedule.GROWTH_STEPS - 1):
        scale = scale.after(True, half)
    assert scale.value == 1
    assert (scale.after(False, half).good_steps, scale.after(True, half)) == (0, LossScale(2.0, 0))
    for precision in ("bf16", "fp32"):
        other = SETTINGS.model_copy(update={"precision": precision})
        assert LossScale.of(other).after(True, other) == LossScale.of(other).after(False, other) == LossScale(1.0, 0)


def test_an_overflow_is_held_against_a_run_only_where_the_scale_cannot_shrink() -> None:
    state = State(loss_scale=LossScale(4.0))
    for value, in_row in ((4.0, 0), (2.0, 0), (1.0, 1), (1.0, 2)):
        state.loss_scale = LossScale(value)
        state.left_out()
        assert state.skipped_in_row == in_row
    assert (state.skipped_steps, state.step) == (4, 4)
    state.took(0.5)
    assert (state.skipped_in_row, state.train_loss_sum, state.taken_steps) == (0, 0.5, 1)


def test_warm_up_is_linear_and_ends() -> None:
    settings = SETTINGS.model_copy(update={"warmup_steps": 4})
    rates = [schedule.learning_rate(settings, Plateau(drops=1), step) for step in range(6)]
    assert rates == pytest.approx([2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5, 1e-5])

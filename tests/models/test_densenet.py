"""Test DenseNet against torchvision: logits, initial weights, pretrained weights."""

import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from mura_dist.core.errors import UserError
from mura_dist.models import densenet


def test_logits_equal_torchvision_densenet169() -> None:
    model = densenet.build("densenet169", seed=3).eval()
    torchvision_model = torchvision.models.densenet169(num_classes=1).eval()
    torchvision_model.load_state_dict(model.state_dict())  # key by key
    image = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    published = torchvision.models.DenseNet169_Weights.IMAGENET1K_V1.transforms()  # the normalization of its weights
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (published.mean, published.std))
    with torch.inference_mode():
        logit, activation_map = model(image)
        expected = torchvision_model((image.expand(-1, 3, -1, -1) / 255 - mean) / deviation)[:, 0]
    torch.testing.assert_close(logit, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(activation_map.mean(dim=(1, 2)), logit)
    assert activation_map.shape == (2, 2, 2)


def test_weights_depend_on_the_seed() -> None:
    a, b, c = (densenet.build("tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_head_starts_at_the_base_rate() -> None:
    assert torch.sigmoid(densenet.build("tiny", base_rate=0.25).classifier.bias).item() == pytest.approx(0.25)


def pretrained(tmp_path: Path, change, suffix: str = ".pth") -> Path:
    """Write a file of ImageNet weights with 1,000 classes, and return its path."""
    growth, blocks, stem = densenet.ARCHITECTURES["tiny"]
    network = torchvision.models.DenseNet(growth, blocks, stem)
    state = change({key: torch.full_like(value, 0.5) for key, value in network.state_dict().items()})
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path


def old_keys(state: dict) -> dict:
    """Return the state with keys of 2017, such as `denselayer1.norm.1.weight`."""
    return {k.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1").replace("conv2", "conv.2"): v
            for k, v in state.items() if not k.endswith("num_batches_tracked")}  # fmt: skip


@pytest.mark.parametrize(("change", "suffix"), [(dict, ".pth"), (old_keys, ".pth"), (dict, ".safetensors")])
def test_pretrained_weights_fill_the_backbone(tmp_path: Path, change, suffix: str) -> None:
    network = densenet.build("tiny")
    head = network.classifier.weight.clone()
    densenet.load_pretrained(network, pretrained(tmp_path, change, suffix))
    for key, value in network.state_dict().items():
        if not key.startswith("classifier.") and value.is_floating_point():
            assert (value == 0.5).all(), key
    assert torch.equal(network.classifier.weight, head)


def test_incomplete_pretrained_weights_are_refused(tmp_path: Path) -> None:
    network = densenet.build("tiny")
    before = {key: value.clone() for key, value in network.state_dict().items()}

    def drop_key(state: dict) -> dict:
        return {key: value for key, value in state.items() if "denseblock3" not in key}

    with pytest.raises(UserError, match=r"fills \d+ of \d+ backbone tensors.*denseblock3"):
        densenet.load_pretrained(network, pretrained(tmp_path, drop_key))
    with pytest.raises(UserError, match="no such file"):
        densenet.load_pretrained(network, tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"<html>")
    with pytest.raises(UserError, match="not a file of tensors"):
        densenet.load_pretrained(network, tmp_path / "bad.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


DIGESTS = {"densenet121": "a639ec97", "densenet169": "b2777c0a"}  # in the names of torchvision's files


def imagenet_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> Path:
    """Direct torch.hub to a folder, block downloads, and return the path of the cached weights."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # otherwise it would keep these proxies for later tests
    return folder / "hub" / "checkpoints" / f"{architecture}-{DIGESTS[architecture]}.pth"


@pytest.mark.parametrize(
    ("architecture", "change"),
    [("densenet121", old_keys), pytest.param("densenet169", dict, marks=pytest.mark.nightly(part="training"))],
)
def test_imagenet_uses_the_cached_file(tmp_path: Path, monkeypatch, architecture: str, change) -> None:
    path = imagenet_cache(tmp_path, monkeypatch, architecture)
    path.parent.mkdir(parents=True)
    published = getattr(torchvision.models, architecture)()  # 1,000 classes
    torch.save(change(published.state_dict()), path)
    network = densenet.build(architecture, seed=5)
    densenet.load_pretrained(network, "imagenet")
    for key, value in network.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(value, published.state_dict()[key]), key


def test_imagenet_without_cache_or_network_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = imagenet_cache(tmp_path, monkeypatch, "densenet169")
    with pytest.raises(UserError, match=r"cannot download densenet169-\w+\.pth .* or set pretrained=FILE") as refusal:
        densenet.load_pretrained(densenet.build("densenet169"), "imagenet")
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not path.exists()
    with pytest.raises(UserError, match=r"no ImageNet weights of architecture=tiny, only of densenet121, densenet169"):
        densenet.load_pretrained(densenet.build("tiny"), "imagenet")


def test_transition_pools_first_with_torchvision_keys() -> None:
    model, torchvision_model = densenet.build("densenet169"), torchvision.models.densenet169(num_classes=1)
    assert list(model.state_dict()) == list(torchvision_model.state_dict())
    assert [name for name, _ in model.features.transition2.named_children()] == ["norm", "relu", "pool", "conv"]

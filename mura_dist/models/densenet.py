"""Define the network: uint8 in, logit out.

    image (B, 1, S, S) uint8 -> gray / 255, ImageNet mean and standard deviation -> torchvision's DenseNet -> 1x1 convolution
    -> activation_map (B, h, w) -> mean over its cells -> logit (B,)

Normalization is part of the network, so that training, evaluation and the exported file use the same. torchvision's linear
head is applied as a 1x1 convolution before the average pool. The two commute, so the logit is the same, and the class activation
map (Zhou et al. 2016, arXiv 1512.04150) costs nothing. Keys and shapes of the parameters are torchvision's.
"""

import math
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.densenet import DenseNet as TorchvisionDenseNet
from torchvision.models.densenet import DenseNet121_Weights, DenseNet169_Weights

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.models.dense_block import dense_block, stem

# growth rate, layers of the four blocks, width of the stem. `tiny` is for tests: 1/100 of the cost.
ARCHITECTURES: dict[str, tuple[int, tuple[int, int, int, int], int]] = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "tiny": (4, (1, 2, 2, 1), 8),
}
IMAGENET = "imagenet"  # as a value of `pretrained`
IMAGENET_FILES = {"densenet121": DenseNet121_Weights, "densenet169": DenseNet169_Weights}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DenseNet(TorchvisionDenseNet):
    """torchvision's DenseNet with normalization, one logit, and the class activation map as a second output."""

    def __init__(self, architecture: str) -> None:
        growth, blocks, width = ARCHITECTURES[architecture]
        super().__init__(growth_rate=growth, block_config=blocks, num_init_features=width, num_classes=1)
        self.architecture = architecture
        # Not persistent: checkpoints have torchvision's keys.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255), persistent=False)

        for number in (1, 2, 3):  # a mean over cells and a 1x1 convolution commute, and pooling first is cheaper
            transition = self.features.get_submodule(f"transition{number}")
            transition.add_module("conv", transition._modules.pop("conv"))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map image (B, 1, S, S) uint8 to logit (B,) float32 and activation_map (B, h, w) float32."""
        gray = image.to(self.mean.dtype)  # (B, 1, S, S)
        x = (gray - self.mean) * self.scale  # (B, 3, S, S)
        cells = self._cells_in_training(x) if self.training and _uses_dense_block(x.device.type) else self._cells(x)
        activation_map = cells[:, 0].to(self.mean.dtype)  # (B, h, w)
        return activation_map.mean(dim=(1, 2)), activation_map

    def _cells(self, x: Tensor) -> Tensor:
        """Map x (B, 3, S, S) to cells (B, 1, h, w), whose mean is the logit."""
        features = F.relu(self.features(x.to(self.classifier.weight.dtype)))  # (B, C, h, w); fp16 where exported so
        return F.conv2d(features, self.classifier.weight[:, :, None, None], self.classifier.bias)

    def _cells_in_training(self, x: Tensor) -> Tensor:
        """Compute the same with dense_block, which includes the norm, relu, pool and 1x1 convolution after a block."""
        features = self.features
        x = stem(features.conv0(x), features.norm0)
        for number in (1, 2, 3):
            block, transition = getattr(features, f"denseblock{number}"), getattr(features, f"transition{number}")
            x = dense_block(x, [*block.values()], transition.norm, transition.conv.weight, None, pool=True)
        head = self.classifier
        return dense_block(x, [*features.denseblock4.values()], features.norm5, head.weight, head.bias, pool=False)


def _uses_dense_block(device: str) -> bool:
    """Return whether dense_block.py computes a training step.

    torch.compile and torch.export need plain layers. The range of float16 is too small for dense_block.py's products of weights
    and slopes.
    """
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return not half and not torch.compiler.is_compiling()


def build(architecture: str, *, seed: int = 0, base_rate: float = 0.5) -> DenseNet:
    """Build a newly initialized network whose head predicts `base_rate`, the share of abnormal radiographs."""
    torch.manual_seed(seed)
    model = DenseNet(architecture)
    torch.nn.init.constant_(model.classifier.bias, math.log(base_rate / (1 - base_rate)))
    return model


def to_torchvision_key(key: str) -> str:
    """Return torchvision's key for that of a DenseNet file of 2017: `norm.1` in a dense layer becomes `norm1`."""
    head, _, tail = key.rpartition("denselayer")
    for module in ("norm", "relu", "conv"):
        tail = tail.replace(f".{module}.1.", f".{module}1.").replace(f".{module}.2.", f".{module}2.")
    return f"{head}denselayer{tail}" if head else key


def fetch_imagenet_file(architecture: str) -> Path:
    """Return torchvision's ImageNet file of an architecture, downloaded into torch.hub's folder if it is not there.

    Only one process at a time may call it: rank 0 before the others.

    Raises:
        UserError: torchvision has no such file, or it can neither be found nor downloaded.
    """
    if architecture not in IMAGENET_FILES:
        raise UserError(
            f"pretrained={IMAGENET}: torchvision has no ImageNet weights of architecture={architecture}, only of "
            f"{', '.join(IMAGENET_FILES)}. Set pretrained=FILE, or pretrained= for none."
        )
    url = IMAGENET_FILES[architecture].IMAGENET1K_V1.url
    path = files.expand_user(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as error:  # no network, or a wrong digest
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"pretrained={IMAGENET}: cannot download {path.name} ({reason}), and {path} is missing. Put the file there, "
                "or set pretrained=FILE."
            ) from error
    return path


def load_pretrained(model: DenseNet, path: Path | str) -> None:
    """Load the complete backbone from an ImageNet checkpoint. The classifier, of 1,000 classes there, is not loaded.

    Args:
        model: the network to fill.
        path: a file (torchvision's `.pth`, or `.safetensors`), or "imagenet" for torchvision's file of the architecture.

    Raises:
        UserError: a tensor is missing or has another shape. A partly loaded backbone would stay random unnoticed.
    """
    path = fetch_imagenet_file(model.architecture) if str(path) == IMAGENET else Path(path)
    state = {to_torchvision_key(key): value for key, value in _read_tensors(path).items()}
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier.")}
    # Files older than PyTorch 0.4 lack the counters, which have no effect while momentum is a number.
    bad = [
        key
        for key, value in expected.items()
        if not key.endswith("num_batches_tracked") and (key not in state or state[key].shape != value.shape)
    ]
    if bad:
        raise UserError(
            f"pretrained={path} fills {len(expected) - len(bad)} of {len(expected)} backbone tensors; all are needed "
            f"(missing or of another shape: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}). "
            "Set the file of the same architecture, or pretrained= for none."
        )
    model.load_state_dict({key: state[key] for key in expected if key in state}, strict=False)


def _read_tensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"pretrained={path}: no such file. Set torchvision's densenet169 file, or pretrained= for none."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types, and all mean the same to the user
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"pretrained={path} is not a file of tensors ({reason}). Set torchvision's .pth file."
        ) from error

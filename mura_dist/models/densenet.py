"""The network: uint8 in, logit out.

    image (B, 1, S, S) uint8 -> grey / 255, ImageNet mean and deviation -> torchvision's DenseNet -> 1x1 convolution
    -> activation_map (B, h, w) -> mean over its cells -> logit (B,)

Normalisation lives here so that training, evaluation and the exported file cannot disagree about it. The linear head of
torchvision is applied as a 1x1 convolution *before* the average pool: the two commute, so the logit is the same and the
class activation map (arXiv 1512.04150) comes free. Keys and shapes of the parameters are torchvision's own.
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

# growth rate, layers of the four blocks, width of the stem. `tiny` is the same class at 1/100 of the cost, for tests.
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
    """torchvision's DenseNet with one logit, its normalisation, and the class activation map as a second output."""

    def __init__(self, architecture: str) -> None:
        growth, blocks, width = ARCHITECTURES[architecture]
        super().__init__(growth_rate=growth, block_config=blocks, num_init_features=width, num_classes=1)
        self.architecture = architecture
        # Not persistent: the checkpoint stays torchvision's, key by key.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255), persistent=False)

        for number in (1, 2, 3):  # a mean over cells and a 1x1 convolution commute: the pool comes first
            transition = self.features.get_submodule(f"transition{number}")
            transition.add_module("conv", transition._modules.pop("conv"))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 1, S, S) uint8 -> logit (B,) float32, activation_map (B, h, w) float32."""
        grey = image.to(self.mean.dtype)  # (B, 1, S, S)
        x = (grey - self.mean) * self.scale  # (B, 3, S, S)
        cells = self._cells_in_training(x) if self.training and _uses_dense_block(x.device.type) else self._cells(x)
        activation_map = cells[:, 0].to(self.mean.dtype)  # (B, h, w)
        return activation_map.mean(dim=(1, 2)), activation_map

    def _cells(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S) -> (B, 1, h, w), whose mean is the logit."""
        features = F.relu(self.features(x.to(self.classifier.weight.dtype)))  # (B, C, h, w); fp16 where exported so
        return F.conv2d(features, self.classifier.weight[:, :, None, None], self.classifier.bias)

    def _cells_in_training(self, x: Tensor) -> Tensor:
        """The same; a block takes in the norm, relu, pool and 1x1 convolution that read it."""
        parts = self.features
        x = stem(parts.conv0(x), parts.norm0)
        for number in (1, 2, 3):
            block, transition = getattr(parts, f"denseblock{number}"), getattr(parts, f"transition{number}")
            x = dense_block(x, [*block.values()], transition.norm, transition.conv.weight, None, pool=True)
        head = self.classifier
        return dense_block(x, [*parts.denseblock4.values()], parts.norm5, head.weight, head.bias, pool=False)


def _uses_dense_block(device: str) -> bool:
    """Whether dense_block.py computes a training step: not for torch.compile and torch.export, which want plain layers; and not
    for float16, whose range does not hold the products of weights and slopes that dense_block.py makes."""
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return not half and not torch.compiler.is_compiling()


def build(architecture: str, *, seed: int = 0, base_rate: float = 0.5) -> DenseNet:
    """A freshly initialised network; the head starts at `base_rate`, so the first loss is the loss of knowing only that."""
    torch.manual_seed(seed)
    model = DenseNet(architecture)
    torch.nn.init.constant_(model.classifier.bias, math.log(base_rate / (1 - base_rate)))
    return model


def to_torchvision_key(key: str) -> str:
    """Published DenseNet files of 2017 say `norm.1`, `conv.2` inside a dense layer where torchvision says `norm1`, `conv2`."""
    head, _, rest = key.rpartition("denselayer")
    for part in ("norm", "relu", "conv"):
        rest = rest.replace(f".{part}.1.", f".{part}1.").replace(f".{part}.2.", f".{part}2.")
    return f"{head}denselayer{rest}" if head else key


def fetch_imagenet_file(architecture: str) -> Path:
    """torchvision's own ImageNet file of this architecture, from torch.hub's folder or else from the network.

    One process at a time: the first rank calls it before the others. Raises UserError where there is no such file, or neither
    a cached one nor a way to it.
    """
    if architecture not in IMAGENET_FILES:
        raise UserError(
            f"pretrained={IMAGENET}: torchvision has no such weights of architecture={architecture}, only of "
            f"{', '.join(IMAGENET_FILES)}; give pretrained=FILE, or pretrained= for none"
        )
    url = IMAGENET_FILES[architecture].IMAGENET1K_V1.url
    path = files.expand_user(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as error:  # no network; not the file that was asked for
            reason = str(error).splitlines()[0][:120]
            raise UserError(
                f"pretrained={IMAGENET}: cannot fetch {path.name} ({reason}) and there is no {path}; put the file there, or "
                "give pretrained=FILE"
            ) from error
    return path


def load_pretrained(model: DenseNet, path: Path | str) -> None:
    """Fill the whole backbone from an ImageNet checkpoint (torchvision's `.pth`, or `.safetensors`); never part of it.

    path: a file, or "imagenet" for torchvision's own of the model's architecture, which is fetched where it is not cached.
    The classifier is left alone: ImageNet's has 1,000 classes. Raises UserError naming what is missing or misshapen: loading
    what happens to fit (`strict=False`) once left 92 % of a popular MURA model random.
    """
    path = fetch_imagenet_file(model.architecture) if str(path) == IMAGENET else Path(path)
    state = {to_torchvision_key(key): value for key, value in _read_tensors(path).items()}
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier.")}
    # Files older than PyTorch 0.4 lack the counters; they influence nothing while momentum is a number.
    bad = [
        key
        for key, value in wanted.items()
        if not key.endswith("num_batches_tracked") and (key not in state or state[key].shape != value.shape)
    ]
    if bad:
        raise UserError(
            f"pretrained={path} fills {len(wanted) - len(bad)} of {len(wanted)} backbone tensors, all are needed "
            f"(missing or of another shape: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}); "
            "give the file of the same architecture, or pretrained= for none"
        )
    model.load_state_dict({key: state[key] for key in wanted if key in state}, strict=False)


def _read_tensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"pretrained={path}: no such file; give torchvision's densenet169 file, or pretrained= for none"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds; all of them mean the same to the user
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"pretrained={path} is not a file of tensors ({reason}); give torchvision's .pth") from error

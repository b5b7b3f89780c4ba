"""Statistics of the float network, from which the int8 grids and the rounding of weights follow.

DenseNet, images uint8 (N, 1, S, S) -> collect_statistics -> {tensor: ChannelStatistics}
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mura_dist.models.densenet import DenseNet

BATCH = 16
_SAMPLES_PER_IMAGE = 16  # kernel positions that enter a covariance


@dataclass
class ChannelStatistics:
    """Statistics of one tensor (B, C, h, w) over many images.

    Attributes:
        low: Minimum of each channel, (C,) float64.
        high: Maximum of each channel, (C,) float64.
        mean: Mean of each channel, (C,) float64.
        covariance: Of what a k x k kernel reads, (C k k, C k k) float32; None for a tensor that no rounded kernel reads.
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray | None = None


class _Collector:
    """An accumulator of range and mean of named tensors (B, C, h, w), and of second moments of what kernels read."""

    def __init__(self) -> None:
        self.batches: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]] = {}
        self.moments: dict[str, _Moments] = {}
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, name: str, x: Tensor, kernel: int = 0) -> Tensor:
        """Add a batch and return it. `kernel` is the size of the convolution that reads x; 0 if none is rounded."""
        reductions = (x.amin((0, 2, 3)), x.amax((0, 2, 3)), x.mean((0, 2, 3), dtype=torch.float64))
        low, high, mean = (values.double().numpy() for values in reductions)
        self.batches.setdefault(name, []).append((low, high, mean, len(x)))
        if kernel:
            self._add_moments(name, x, kernel)
        return x

    def _add_moments(self, name: str, x: Tensor, kernel: int) -> None:
        batch, _, height, width = x.shape
        num_positions = batch * height * width
        positions = torch.randperm(num_positions, generator=self.generator)[: _SAMPLES_PER_IMAGE * batch]
        image, row, column = positions // (height * width), positions // width % height, positions % width
        padded = F.pad(x, [kernel // 2] * 4)
        taps = [
            padded[image, :, row + down, column + right] for down in range(kernel) for right in range(kernel)
        ]  # k k of (P, C)
        inputs = torch.stack(taps, dim=2).flatten(1)  # (P, C k k)
        if name not in self.moments:
            self.moments[name] = _Moments(inputs.mean(0))
        self.moments[name].add(inputs)

    def statistics(self) -> dict[str, ChannelStatistics]:
        return {
            name: ChannelStatistics(
                np.min([low for low, *_ in batches], axis=0),
                np.max([high for _, high, *_ in batches], axis=0),
                np.average([mean for _, _, mean, _ in batches], axis=0, weights=[size for *_, size in batches]),
                self.moments.pop(name).covariance() if name in self.moments else None,
            )
            for name, batches in self.batches.items()
        }


class _Moments:
    """Second moments of rows (P, K) about `center`, which is close to their mean.

    Sums of plain squares in float32 would lose a channel that varies by a millionth of its mean.
    """

    def __init__(self, center: Tensor) -> None:
        self.center, self.num_rows = center, 0
        self.total, self.products = torch.zeros_like(center), torch.zeros(len(center), len(center))

    def add(self, rows: Tensor) -> None:
        rows = rows - self.center
        self.products.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.num_rows += len(rows)

    def covariance(self) -> np.ndarray:
        mean = self.total / self.num_rows
        covariance: np.ndarray = self.products.div_(self.num_rows).sub_(torch.outer(mean, mean)).numpy()
        return covariance


@torch.no_grad()
def collect_statistics(network: DenseNet, images: np.ndarray) -> dict[str, ChannelStatistics]:
    """Run the float network and return the statistics of every tensor that gets a grid.

    Args:
        network: In eval mode, on the CPU, fp32.
        images: uint8 (N, 1, S, S).
    """
    collect, features = _Collector(), network.features
    for batch in torch.from_numpy(images).split(BATCH):
        x = (batch.float() - network.mean) * network.scale  # (B, 3, S, S)
        x = collect("stem", features.pool0(F.relu(features.norm0(features.conv0(x)))))
        for number in (1, 2, 3, 4):
            outputs = [x]
            for name, layer in features.get_submodule(f"denseblock{number}").named_children():
                y = collect(f"{number}.{name}.in", F.relu(layer.norm1(torch.cat(outputs, 1))), 1)
                y = collect(f"{number}.{name}.middle", F.relu(layer.norm2(layer.conv1(y))), 3)
                outputs.append(collect(f"{number}.{name}.out", layer.conv2(y)))
            if number < 4:
                transition = features.get_submodule(f"transition{number}")
                y = collect(f"{number}.in", F.avg_pool2d(F.relu(transition.norm(torch.cat(outputs, 1))), 2), 1)
                x = collect(f"{number}.out", transition.conv(y))
    return collect.statistics()

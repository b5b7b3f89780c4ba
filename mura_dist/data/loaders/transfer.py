"""Send what a micro-batch needs to the device, so that the host never waits for the device.

    rows, mask on the host -> one pinned transfer -> labels and weights looked up on the device

A copy from pageable memory waits for all that its stream has to do; a copy from pinned memory does not. torch keeps pinned
memory until the copy has been made, and then uses it again.
"""

import numpy as np
import torch
from torch import Tensor


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return `array` as a tensor on the device: its own memory on a CPU, on CUDA a copy that is made in stream order."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class DeviceTargets:
    """Label and weight of every row, in the device's memory."""

    def __init__(self, label: np.ndarray, weight: np.ndarray, device: torch.device) -> None:
        """Copy label and weight, float32 (num_rows,) each, to the device."""
        self._both = send(np.stack([label, weight]), device)  # (2, num_rows) float32
        self._device = device

    def look_up(self, rows: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return label, weight float32, row int64 and mask bool, (B,) each: what Batch has besides its image.

        No step of it depends on a value on the device: a boolean index would, and the host would wait for it.
        """
        row, index, real = send(np.stack([rows, np.maximum(rows, 0), mask]), self._device)  # (3, B) int64
        is_real = real.bool()
        label, weight = self._both.index_select(1, index) * is_real  # (2, B)
        return label, weight, row, is_real

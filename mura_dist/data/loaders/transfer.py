"""Transfer a micro-batch to the device without the host waiting for it.

    rows, mask on the host -> one pinned transfer -> labels and weights looked up on the device

A copy from pageable memory waits for all work on its stream, and a copy from pinned memory does not. torch reuses pinned memory
after the copy.
"""

import numpy as np
import torch
from torch import Tensor


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return `array` as a tensor on the device: on a CPU a view, on CUDA an asynchronous copy."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class DeviceTargets:
    """Label and weight of every row in the device's memory."""

    def __init__(self, label: np.ndarray, weight: np.ndarray, device: torch.device) -> None:
        """Copy label and weight, float32 (num_rows,) each, to the device."""
        self._both = send(np.stack([label, weight]), device)  # (2, num_rows) float32
        self._device = device

    def look_up(self, rows: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return label and weight, float32, row, int64, and mask, bool, (B,) each: the fields of Batch besides its image.

        No operation depends on a value on the device, as a boolean index would, so that the host does not wait.
        """
        row, index, real = send(np.stack([rows, np.maximum(rows, 0), mask]), self._device)  # (3, B) int64
        is_real = real.bool()
        label, weight = self._both.index_select(1, index) * is_real  # (2, B)
        return label, weight, row, is_real

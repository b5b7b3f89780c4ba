"""transfer.py: what is looked up on the device, by operations that no host waits for."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mura_dist.data.loaders.transfer import DeviceTargets

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """The operations that ran, by name, and the dtypes of the indices among their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_labels_and_weights_are_looked_up_by_row_without_a_wait() -> None:
    """Padding (row -1) and damaged rows (their row, masked) weigh nothing; the shapes depend on no value."""
    rng = np.random.default_rng(0)
    label, weight = rng.integers(0, 2, 50).astype(np.float32), rng.random(50).astype(np.float32)
    rows, mask = np.array([7, -1, 49, 0, 3]), np.array([True, False, True, True, False])
    targets = DeviceTargets(label, weight, CPU)
    with Operations() as operations:
        result = targets.look_up(rows, mask)
    assert [tensor.dtype for tensor in result] == [torch.float32, torch.float32, torch.int64, torch.bool]
    expected = (np.where(mask, label[rows], 0), np.where(mask, weight[rows], 0), rows, mask)
    for tensor, array in zip(result, expected, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "index", "index_put_", "is_nonzero", "item"}
    assert operations.names
    assert not waiting & set(operations.names), operations.names
    assert operations.names.count("index_select") == 1, "one look-up for labels and weights"

"""Augmented batches as an endless stream, of which each work consumes 16.

build(load) -> Epochs: returns the batches of the next epoch, uint8 (B, 1, S, S) -> chained -> 16 batches per work
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from mura_dist.bench.clock import Work
from mura_dist.bench.workload import Load

Epochs = Callable[[], Iterable[Any]]
"""Returns the batches of the next epoch, each a tensor uint8 (B, 1, S, S) on the device."""

_NUM_BATCHES = 16  # per work; more than any queue holds, so that the first work of a turn empties it


def endless(epochs: Epochs) -> Iterator[Any]:
    """Yield the batches of all epochs without end."""
    return chain.from_iterable(epochs() for _ in iter(int, 1))


def stream(build: Callable[[Load], Epochs], load: Load) -> Work:
    """Return the work of a stream."""
    batches = endless(build(load))
    return lambda out: count(load, islice(batches, _NUM_BATCHES))


def count(load: Load, batches: Iterable[Any]) -> int:
    """Return the number of images once they are on the device. Check their type and shape."""
    import torch

    number = 0
    for batch in batches:
        assert batch.dtype == torch.uint8, batch.dtype
        assert batch.shape == (load.batch, 1, load.size, load.size), batch.shape
        number += len(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return number


def device() -> Any:
    """Return the first GPU, or the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

"""Augmented batches as an endless stream, of which a work takes the next few: the same for every contender.

build(load) -> Epochs: call it for the batches of one more epoch, uint8 (B, 1, S, S) -> chained -> 16 batches a work
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from mura_dist.bench.clock import Work
from mura_dist.bench.workload import Load

Epochs = Callable[[], Iterable[Any]]
"""The batches of one more epoch, each a tensor uint8 (B, 1, S, S) on the device."""

_BATCHES = 16  # a work; more than anyone's queues hold, so that the first of a turn empties them


def endless(epochs: Epochs) -> Iterator[Any]:
    return chain.from_iterable(epochs() for _ in iter(int, 1))


def stream(build: Callable[[Load], Epochs], load: Load) -> Work:
    """The work of a contender that streams."""
    batches = endless(build(load))
    return lambda out: count(load, islice(batches, _BATCHES))


def count(load: Load, batches: Iterable[Any]) -> int:
    """How many images, once all of them are on the device; the same kind of them from every contender."""
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
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

"""Shared fixtures of the training tests."""

from collections.abc import Iterator

import pytest

from mura_dist.distributed import process_group
from mura_dist.distributed.process_group import World


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """The process group of one rank, in this process."""
    with process_group.join(30) as world:
        yield world

"""Test that a process keeps the memory it frees. Each case is a process of its own, because the setting holds until its end."""

import resource
import subprocess
import sys

import pytest

MIB = 1 << 20
CYCLES = """
import ctypes, resource
import numpy as np
from mura_dist.distributed.host_memory import keep_freed_memory

{call}

def faults_of_a_cycle():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [np.ones(100_000_000, np.uint8) for _ in range(2)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_cycle()
print(faults_of_a_cycle())
"""


def page_faults(call: str, **options: object) -> int:
    """Return the page faults of allocating and freeing 200 MB three times, after a first round."""
    command = [sys.executable, "-c", CYCLES.format(call=call)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, **options)
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_allocated_again_without_page_faults() -> None:
    assert page_faults("") > 1000
    assert page_faults("keep_freed_memory()") < 50
    assert page_faults("assert keep_freed_memory() is keep_freed_memory()") < 50


def test_limited_addresses_are_no_error() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2000 * MIB, 2000 * MIB))

    assert page_faults("assert not keep_freed_memory()", preexec_fn=limit) < 50

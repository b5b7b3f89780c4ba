"""Test errors.py: classification of errors as I/O faults of the machine and as out of memory."""

import errno

import pytest

from mura_dist.core.errors import is_io_fault, is_out_of_memory

MACHINE = (
    "EIO",
    "ESTALE",
    "ENOTCONN",
    "ENXIO",
    "EMFILE",
    "ENFILE",
    "ENOMEM",
    "ETIMEDOUT",
    "EREMOTEIO",
    "ENODEV",
    "EAGAIN",
)
FILE = ("ENOENT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EINVAL", "ENOSPC")


@pytest.mark.parametrize("name", MACHINE)
def test_errors_of_disk_network_and_process_are_io_faults(name: str) -> None:
    assert is_io_fault(OSError(getattr(errno, name), "said by the system"))


@pytest.mark.parametrize("name", FILE)
def test_errors_of_a_file_or_its_name_are_no_io_faults(name: str) -> None:
    assert not is_io_fault(OSError(getattr(errno, name), "said by the system"))


def test_errors_without_errno_are_classified_by_class() -> None:
    """fsspec's stores raise such errors."""
    assert is_io_fault(TimeoutError())
    assert is_io_fault(ConnectionResetError("by peer"))
    assert not is_io_fault(OSError("image file is truncated"))
    assert not is_io_fault(FileNotFoundError("bucket/key"))
    assert not is_io_fault(ValueError("embedded null byte"))


def test_out_of_memory_is_detected_in_messages_of_libraries() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    assert is_out_of_memory(ImportError("libx.so: failed to map segment from shared object"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ImportError("libx.so: cannot open shared object file"))

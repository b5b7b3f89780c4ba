"""Keep freed memory in the process, in huge pages: a training step on a CPU allocates the same gigabyte again and again.

By default glibc returns each large block to the system when it is freed. At the next allocation the system maps it anew, page
by page of 4 KiB, and fills each page with zeros.
"""

import ctypes
import functools
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt
_HUGE_PAGES = 14  # MADV_HUGEPAGE
_HUGE_PAGE_BYTES = 2 << 20
_MAX_BYTES = 8 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory from now on, and let the first gigabytes of the heap use huge pages. The second call does nothing.

    The process keeps its peak of memory until it ends. It reserves addresses, not memory.

    Returns:
        Whether huge pages are in use: False without glibc, without transparent huge pages, or if addresses are limited.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    assert libc is not None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt(_MMAP_MAX, 0)  # every block comes from the heap ...
    libc.mallopt(_TRIM_THRESHOLD, -1)  # ... whose end stays where it is
    size = min(_MAX_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
    block = libc.malloc(size)
    if not block:
        return False
    start = -(-block // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    length = (block + size - start) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    advised = libc.madvise(start, length, _HUGE_PAGES) == 0
    libc.free(block)  # it becomes the free end of the heap, from which the next blocks are cut
    return advised

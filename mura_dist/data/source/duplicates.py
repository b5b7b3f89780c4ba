"""Find files that are identical byte for byte, reading as little as possible.

group by size -> by 4 KiB from the middle -> by SHA-256 of the content; groups of one file are dropped at each step
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mura_dist.core import storage
from mura_dist.core.errors import is_io_fault
from mura_dist.core.storage import RemoteStorage, Storage
from mura_dist.data import mura

_SAMPLE_BYTES = 4096  # compared first for files of one size
_CHUNK_BYTES = 8 << 20
_FILES_PER_TASK = 32  # scheduling costs as much as reading one sample
_NUM_THREADS = {True: 16, False: 4}  # by whether the storage is remote, where reads mostly wait


def find_pairs(folder: Storage, sizes: dict[str, int], paths: list[str]) -> list[tuple[str, str]]:
    """Find pairs of identical files.

    The first of identical files in a split represents the others of its split. The representative of the first split also pairs
    with each file of other splits. Empty and unreadable files are skipped.

    Args:
        folder: Storage of the files.
        sizes: Bytes of each file, by path.
        paths: Paths to compare.
    """

    def middle(path: str) -> Hashable:
        return folder.read_range(path, max(0, (sizes[path] - _SAMPLE_BYTES) // 2), _SAMPLE_BYTES)

    def content(path: str) -> Hashable:
        digest = hashlib.sha256()
        size = sizes[path]
        for start in range(0, size if size > _SAMPLE_BYTES else 0, _CHUNK_BYTES):
            digest.update(folder.read_range(path, start, min(_CHUNK_BYTES, size - start)))
        return digest.digest()

    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        by_size[sizes[path]].append(path)
    groups = [group for size, group in by_size.items() if size and len(group) > 1]
    threads = _NUM_THREADS[isinstance(folder, RemoteStorage)]
    groups = _regroup(_regroup(groups, middle, threads), content, threads)
    return sorted(pair for group in groups for pair in pair_copies(group))


def _regroup(groups: list[list[str]], key: Callable[[str], Hashable], threads: int) -> list[list[str]]:
    """Split each group by `key`. Drop unreadable files, and groups of one."""
    members = [(number, path) for number, group in enumerate(groups) for path in group]
    subgroups: dict[Hashable, list[str]] = defaultdict(list)
    tasks = [members[start : start + _FILES_PER_TASK] for start in range(0, len(members), _FILES_PER_TASK)]
    with ThreadPoolExecutor(threads, "duplicates") as pool:
        keys = pool.map(lambda task: [_key_or_none(key, path) for _, path in task], tasks)
        for (number, path), value in zip(members, itertools.chain.from_iterable(keys), strict=True):
            if value is not None:
                subgroups[number, value].append(path)
    return [group for group in subgroups.values() if len(group) > 1]


def _key_or_none(key: Callable[[str], Hashable], path: str) -> Hashable:
    try:
        return storage.with_retries(lambda: key(path))
    except OSError as error:  # the conversion reports unreadable files
        if is_io_fault(error):
            raise
        return None


def pair_copies(equal: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of `find_pairs` for files that are all identical."""
    splits: dict[str, list[str]] = defaultdict(list)
    for path in sorted(equal):
        splits[path.partition("/")[0]].append(path)
    for paths in splits.values():
        yield from ((paths[0], copy) for copy in paths[1:])
    first, *remaining = (splits[split] for split in mura.SPLITS if split in splits)
    yield from ((first[0], copy) for paths in remaining for copy in paths)


def connected_groups(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of names that pairs connect directly or through others, each sorted and of two or more."""
    group_of: dict[str, list[str]] = {}
    for pair in pairs:
        first, second = (group_of.setdefault(name, [name]) for name in pair)
        if first is not second:
            small, large = sorted((first, second), key=len)
            large += small
            group_of |= dict.fromkeys(small, large)
    groups = {id(group): sorted(group) for group in group_of.values() if len(group) > 1}
    return sorted(groups.values())

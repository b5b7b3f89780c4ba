"""Files that are byte for byte the same, found by reading as little as that takes.

size -> 4 KiB from the middle -> SHA-256 of the whole; whoever is alone at one step is not looked at in the next
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

_PART_BYTES = 4096  # of files of one size; where these differ, no more is read
_PIECE_BYTES = 8 << 20
_AT_ONCE = 32  # files a thread takes: handing out costs as much as looking into one
_READING_THREADS = {True: 16, False: 4}  # by whether the place is remote: a store is waited for most of the time


def find_pairs(place: Storage, sizes: dict[str, int], paths: list[str]) -> list[tuple[str, str]]:
    """Pairs of byte-identical files among `paths`; `sizes` in bytes, by path.

    Of equals, the first of a split stands for it: the others of that split are told as its copies, and so is, across splits,
    each one of another split. Empty files have nothing to compare, unreadable ones neither.
    """

    def middle(path: str) -> Hashable:
        return place.read_range(path, max(0, (sizes[path] - _PART_BYTES) // 2), _PART_BYTES)

    def whole(path: str) -> Hashable:
        digest = hashlib.sha256()
        size = sizes[path]
        for start in range(0, size if size > _PART_BYTES else 0, _PIECE_BYTES):
            digest.update(place.read_range(path, start, min(_PIECE_BYTES, size - start)))
        return digest.digest()

    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        by_size[sizes[path]].append(path)
    groups = [group for size, group in by_size.items() if size and len(group) > 1]
    threads = _READING_THREADS[isinstance(place, RemoteStorage)]
    groups = _alike(_alike(groups, middle, threads), whole, threads)
    return sorted(pair for group in groups for pair in pair_copies(group))


def _alike(groups: list[list[str]], key: Callable[[str], Hashable], threads: int) -> list[list[str]]:
    """Each group cut into those of one key; who is left alone, or cannot be read, is dropped."""
    members = [(number, path) for number, group in enumerate(groups) for path in group]
    parts: dict[Hashable, list[str]] = defaultdict(list)
    hands = [members[start : start + _AT_ONCE] for start in range(0, len(members), _AT_ONCE)]
    with ThreadPoolExecutor(threads, "duplicates") as pool:
        keys = pool.map(lambda hand: [_or_none(key, path) for _, path in hand], hands)
        for (number, path), found in zip(members, itertools.chain.from_iterable(keys), strict=True):
            if found is not None:
                parts[number, found].append(path)
    return [part for part in parts.values() if len(part) > 1]


def _or_none(key: Callable[[str], Hashable], path: str) -> Hashable:
    try:
        return storage.with_retries(lambda: key(path))
    except OSError as error:  # the conversion tells what cannot be opened
        if is_io_fault(error):
            raise
        return None


def pair_copies(equal: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs, as `find_pairs` has them, of files that are all the same."""
    splits: dict[str, list[str]] = defaultdict(list)
    for path in sorted(equal):
        splits[path.partition("/")[0]].append(path)
    for paths in splits.values():
        yield from ((paths[0], copy) for copy in paths[1:])
    first, *others = (splits[split] for split in mura.SPLITS if split in splits)
    yield from ((first[0], copy) for paths in others for copy in paths)


def connected_groups(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the names that pairs connect, directly or through others, each group sorted and of two or more."""
    group_of: dict[str, list[str]] = {}
    for pair in pairs:
        first, second = (group_of.setdefault(name, [name]) for name in pair)
        if first is not second:
            small, large = sorted((first, second), key=len)
            large += small
            group_of |= dict.fromkeys(small, large)
    groups = {id(group): sorted(group) for group in group_of.values() if len(group) > 1}
    return sorted(groups.values())

"""Test the file list: every file once, sorted by the bytes of its path, each folder once, in bounded memory."""

import contextlib
import hashlib
import itertools
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mura_dist.core import files
from mura_dist.inference import file_list, scratch_db
from mura_dist.inference.file_list import FileList, ListedFile


@pytest.fixture
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table") / "walk.sqlite"


def files_of(listing: FileList) -> list[ListedFile]:
    return list(itertools.chain.from_iterable(listing.chunks(range(listing.num_chunks))))


def paths(directory: Path, table: Path, exclude: Path | None = None) -> list[str]:
    with files.scratch(table) as database:
        return [file.path for file in files_of(file_list.list_files(directory, database, exclude=exclude))]


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))


NAMES = [
    *("b.png", "a b", "a/b", "a.png", "a-b", "A/a", "deep/er/and/deeper/x", "line\nfeed", "carriage\rreturn", "tab\t"),
    *("ü", "手/手.png", "骨", "\U0001f9b4/x", "%41", "?x#y", "..x", ".hidden/x", "z/" * 40 + "z", "x" * 255),
]


@pytest.mark.parametrize("size", [1, 2, 7, len(NAMES), 256])
def test_every_file_once_sorted_by_path_bytes(tmp_path: Path, table: Path, size: int) -> None:
    make(tmp_path, *NAMES)
    counts: list[int] = []
    listing = file_list.list_files(tmp_path, table, chunk_size=size, progress=counts.append)
    assert counts == sorted(counts)
    assert (listing.num_files, listing.num_chunks, counts[-1]) == (len(NAMES), -(-len(NAMES) // size), len(NAMES))
    files_in_list = files_of(listing)
    assert [file.path for file in files_in_list] == sorted(NAMES, key=os.fsencode)
    for file in files_in_list:
        status = os.stat(tmp_path / file.path)
        assert (file.num_bytes, file.mtime_ns, file.failure) == (status.st_size, status.st_mtime_ns, None)
    lines = (os.fsencode(file.path) + f"\0{file.num_bytes} {file.mtime_ns} None\n".encode() for file in files_in_list)
    assert listing.digest == hashlib.sha256(b"".join(lines)).hexdigest()
    last = listing.num_chunks - 1
    assert [len(chunk) for chunk in listing.chunks([last, 0])] == [len(NAMES) - last * size, min(size, len(NAMES))]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps names that are not UTF-8")
def test_file_names_that_are_not_utf8(tmp_path: Path, table: Path) -> None:
    names = [os.fsdecode(name) for name in (b"\xff/\xfe", b"r\xf6ntgen", b"\xc3\xbc", b"\xed\xa0\x80")]
    make(tmp_path, *names)
    assert paths(tmp_path, table) == sorted(names, key=os.fsencode)


def test_mtime_outside_int64_is_read(tmp_path: Path, table: Path) -> None:
    make(tmp_path, "future", "past")
    with contextlib.suppress(OSError):  # the file system does not store such a time
        os.utime(tmp_path / "future", ns=(0, (1 << 63) + (1 << 60)))
    os.utime(tmp_path / "past", ns=(0, -1))
    listing = {file.path: file.mtime_ns for file in files_of(file_list.list_files(tmp_path, table))}
    assert listing == {name: os.stat(tmp_path / name).st_mtime_ns for name in ("future", "past")}


def test_symlinked_folder_is_listed_once(tmp_path: Path, table: Path) -> None:
    """Its path is the real one where that lies in the directory, else the link of the smallest depth."""
    root, outer = tmp_path / "in", tmp_path / "outer"
    make(root, "a/real.png", "z/deep/real.png")
    make(outer, "far.png", "sub/farther.png")
    links = {
        "0": root / "a",  # listed by its real path
        "a/up": root,  # a loop
        "a/out": outer,
        "b": outer,  # at less depth than a/out
        "c": outer / "sub",  # listed through b
        "z/deep/self": root / "z" / "deep",
        "broken": tmp_path / "nowhere",
        "itself": root / "itself",
        "file.png": root / "a" / "real.png",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (outer / "back").symlink_to(root)
    (outer / "sub" / "loop").symlink_to(outer)
    listing = {file.path: file.failure for file in files_of(file_list.list_files(root, table))}
    good = ["a/real.png", "b/far.png", "b/sub/farther.png", "file.png", "z/deep/real.png"]
    assert {path for path, failure in listing.items() if failure is None} == set(good)
    assert {path: failure[0] for path, failure in listing.items() if failure} == {
        "broken": "unreadable",
        "itself": "unreadable",
    }


def test_excluded_folder_is_skipped_also_through_links(tmp_path: Path, table: Path) -> None:
    make(tmp_path, "a", "out/predictions.csv", "out/.parts/0")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert paths(tmp_path, table, tmp_path / "out") == ["a"]
    assert paths(tmp_path, table, tmp_path / "none") == ["a", "out/.parts/0", "out/predictions.csv"]


@contextlib.contextmanager
def unprivileged_user() -> Iterator[None]:
    """Run the block as a user whom permissions restrict."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_unreadable_folder_is_a_failure(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "in/a.png", "in/half/b.png")
    (tmp_path / "in" / "locked").mkdir(mode=0o000)
    (tmp_path / "in" / "half").chmod(0o444)  # may be listed, not entered
    for folder in (tmp_path, tmp_path / "in"):
        folder.chmod(0o755)
    table.parent.chmod(0o777)
    monkeypatch.chdir(tmp_path / "in")  # other users cannot enter the parent folders
    with open(table, "wb"), unprivileged_user():
        folder = os.open(".", os.O_RDONLY)
        os.close(folder)
        rows = list(_walk_rows(Path(".")))
    assert sorted(rows) == [
        (b"a.png", None),
        (b"half/b.png", "cannot be opened: permission denied"),
        (b"locked", "a folder that cannot be listed: permission denied"),
    ]


def _walk_rows(directory: Path) -> Iterator[tuple[bytes, str | None]]:
    """Yield the rows of a walk from a database in memory, since the parent folders are not accessible."""
    table = sqlite3.connect(":memory:", isolation_level=None)
    table.executescript(file_list._SCHEMA)
    file_list._fill(table, directory, ("",), lambda num: None, lambda path: path)
    yield from table.execute("SELECT path, reason FROM file")


def test_full_database_raises_no_space_error(tmp_path: Path) -> None:
    def fill() -> None:
        with scratch_db.create(tmp_path / "t", "CREATE TABLE t (x BLOB);") as table:
            table.execute("PRAGMA max_page_count = 4")
            table.execute("INSERT INTO t VALUES (zeroblob(100000))")

    with pytest.raises(OSError, match="No space left on device"):
        fill()


WALK = """
import json, sys
from pathlib import Path
from mura_dist.inference import file_list
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
listing = file_list.list_files(Path(sys.argv[1]), Path(sys.argv[2]))
num = sum(len(chunk) for chunk in listing.chunks(range(listing.num_chunks)))
print(json.dumps([before, peak(), listing.num_files, num]))
"""


@pytest.mark.nightly(part="files")
@pytest.mark.parametrize("shape", ["flat", "tree"])
def test_memory_is_bounded_for_200_000_files(tmp_path: Path, table: Path, shape: str) -> None:
    """The walk used 16 MiB above the imports, most of it SQLite's cache. A list of `File` uses 104 MiB."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells the peak of this process alone")
    for number in range(200_000 if shape == "flat" else 400):
        if shape == "flat":
            os.close(os.open(f"{tmp_path}/{number:07d} a name of some length.png", os.O_CREAT))
        else:
            (tmp_path / f"{number}").mkdir()
            for index in range(500):
                os.close(os.open(f"{tmp_path}/{number}/{index}", os.O_CREAT))
    done = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path), str(table)], capture_output=True, text=True, check=True
    )
    before, after, num_files, num = json.loads(done.stdout)
    assert num_files == num == 200_000
    assert after - before < 30, (before, after)

"""file_list.py: every file once, in the order of its path's bytes, each folder once, in bounded memory."""

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


def listed(listing: FileList) -> list[ListedFile]:
    return list(itertools.chain.from_iterable(listing.chunks(range(listing.num_chunks))))


def paths(directory: Path, table: Path, exclude: Path | None = None) -> list[str]:
    with files.scratch(table) as database:
        return [file.path for file in listed(file_list.list_files(directory, database, exclude=exclude))]


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))


NAMES = [
    *("b.png", "a b", "a/b", "a.png", "a-b", "A/a", "deep/er/and/deeper/x", "line\nfeed", "carriage\rreturn", "tab\t"),
    *("ü", "手/手.png", "骨", "\U0001f9b4/x", "%41", "?x#y", "..x", ".hidden/x", "z/" * 40 + "z", "x" * 255),
]


@pytest.mark.parametrize("size", [1, 2, 7, len(NAMES), 256])
def test_every_file_once_in_the_order_of_its_bytes(tmp_path: Path, table: Path, size: int) -> None:
    make(tmp_path, *NAMES)
    counts: list[int] = []
    listing = file_list.list_files(tmp_path, table, chunk_size=size, progress=counts.append)
    assert counts == sorted(counts)
    assert (listing.num_files, listing.num_chunks, counts[-1]) == (len(NAMES), -(-len(NAMES) // size), len(NAMES))
    files_in_list = listed(listing)
    assert [file.path for file in files_in_list] == sorted(NAMES, key=os.fsencode)
    for file in files_in_list:
        status = os.stat(tmp_path / file.path)
        assert (file.num_bytes, file.mtime_ns, file.failure) == (status.st_size, status.st_mtime_ns, None)
    lines = (os.fsencode(file.path) + f"\0{file.num_bytes} {file.mtime_ns} None\n".encode() for file in files_in_list)
    assert listing.digest == hashlib.sha256(b"".join(lines)).hexdigest()
    last = listing.num_chunks - 1
    assert [len(chunk) for chunk in listing.chunks([last, 0])] == [len(NAMES) - last * size, min(size, len(NAMES))]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps names that are not UTF-8")
def test_names_that_are_not_utf8(tmp_path: Path, table: Path) -> None:
    names = [os.fsdecode(name) for name in (b"\xff/\xfe", b"r\xf6ntgen", b"\xc3\xbc", b"\xed\xa0\x80")]
    make(tmp_path, *names)
    assert paths(tmp_path, table) == sorted(names, key=os.fsencode)


def test_times_beyond_what_a_database_counts(tmp_path: Path, table: Path) -> None:
    make(tmp_path, "future", "past")
    with contextlib.suppress(OSError):  # a disk that keeps no such time
        os.utime(tmp_path / "future", ns=(0, (1 << 63) + (1 << 60)))
    os.utime(tmp_path / "past", ns=(0, -1))
    listing = {file.path: file.mtime_ns for file in listed(file_list.list_files(tmp_path, table))}
    assert listing == {name: os.stat(tmp_path / name).st_mtime_ns for name in ("future", "past")}


def test_links(tmp_path: Path, table: Path) -> None:
    """Each folder once, by its real path where it has one below the directory, else by the link of the least depth."""
    root, outer = tmp_path / "in", tmp_path / "outer"
    make(root, "a/real.png", "z/deep/real.png")
    make(outer, "far.png", "sub/farther.png")
    links = {
        "0": root / "a",  # a real folder, entered as what it is
        "a/up": root,  # a loop
        "a/out": outer,
        "b": outer,  # at less depth than a/out
        "c": outer / "sub",  # has been entered by way of b
        "z/deep/self": root / "z" / "deep",
        "broken": tmp_path / "nowhere",
        "itself": root / "itself",
        "file.png": root / "a" / "real.png",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (outer / "back").symlink_to(root)
    (outer / "sub" / "loop").symlink_to(outer)
    listing = {file.path: file.failure for file in listed(file_list.list_files(root, table))}
    good = ["a/real.png", "b/far.png", "b/sub/farther.png", "file.png", "z/deep/real.png"]
    assert {path for path, failure in listing.items() if failure is None} == set(good)
    assert {path: failure[0] for path, failure in listing.items() if failure} == {
        "broken": "unreadable",
        "itself": "unreadable",
    }


def test_a_folder_is_left_out_however_it_is_reached(tmp_path: Path, table: Path) -> None:
    make(tmp_path, "a", "out/predictions.csv", "out/.parts/0")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert paths(tmp_path, table, tmp_path / "out") == ["a"]
    assert paths(tmp_path, table, tmp_path / "none") == ["a", "out/.parts/0", "out/predictions.csv"]


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user whom permissions hold back."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_a_folder_that_cannot_be_listed_is_a_failure(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "in/a.png", "in/half/b.png")
    (tmp_path / "in" / "locked").mkdir(mode=0o000)
    (tmp_path / "in" / "half").chmod(0o444)  # may be listed, not entered
    for folder in (tmp_path, tmp_path / "in"):
        folder.chmod(0o755)
    table.parent.chmod(0o777)
    monkeypatch.chdir(tmp_path / "in")  # the folders above are closed to others
    with open(table, "wb"), nobody():
        folder = os.open(".", os.O_RDONLY)
        os.close(folder)
        rows = list(_looked_into(Path(".")))
    assert sorted(rows) == [
        (b"a.png", None),
        (b"half/b.png", "cannot be opened: permission denied"),
        (b"locked", "a folder that cannot be listed: permission denied"),
    ]


def _looked_into(directory: Path) -> Iterator[tuple[bytes, str | None]]:
    """What a walk writes down, without its file: the folders above that are closed as well."""
    table = sqlite3.connect(":memory:", isolation_level=None)
    table.executescript(file_list._SCHEMA)
    file_list._fill(table, directory, ("",), lambda num: None, lambda path: path)
    yield from table.execute("SELECT path, reason FROM file")


def test_a_full_disk_is_said_as_the_system_says_it(tmp_path: Path) -> None:
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
found = file_list.list_files(Path(sys.argv[1]), Path(sys.argv[2]))
num = sum(len(chunk) for chunk in found.chunks(range(found.num_chunks)))
print(json.dumps([before, peak(), found.num_files, num]))
"""


@pytest.mark.nightly(part="files")
@pytest.mark.parametrize("shape", ["flat", "tree"])
def test_200_000_files_take_no_more_memory_than_a_cache(tmp_path: Path, table: Path, shape: str) -> None:
    """Measured: 16 MiB above the imports, most of them SQLite's cache; a list of `File` takes 104."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells the peak of this process alone")
    for number in range(200_000 if shape == "flat" else 400):
        if shape == "flat":
            os.close(os.open(f"{tmp_path}/{number:07d} a name of some length.png", os.O_CREAT))
        else:
            (tmp_path / f"{number}").mkdir()
            for each in range(500):
                os.close(os.open(f"{tmp_path}/{number}/{each}", os.O_CREAT))
    done = subprocess.run(
        [sys.executable, "-c", WALK, str(tmp_path), str(table)], capture_output=True, text=True, check=True
    )
    before, after, num_files, num = json.loads(done.stdout)
    assert num_files == num == 200_000
    assert after - before < 30, (before, after)

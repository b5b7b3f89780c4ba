"""Files are whole or absent, under names that nobody can guess."""

import os
import signal
import tracemalloc
from pathlib import Path

import pytest

from mura_dist.core import files
from mura_dist.core.errors import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="processes that fork, links and modes are POSIX")


def killed_inside(path: Path, write: str) -> None:
    """Leave what a process leaves that is killed in the block of `write`."""
    if (child := os.fork()) == 0:
        with getattr(files, write)(path) as file:
            if not isinstance(file, Path):
                file.write(b"half")
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_two_writers_of_one_name_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_names_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(8):
        with files.replacing(tmp_path / "a"):
            names |= set(os.listdir(tmp_path)) - {"a"}
    assert len(names) == 8


@posix
def test_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a name has been guessed: it is refused, and the file behind the link stays."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda length: "0" * 2 * length)
    victim, path = tmp_path / "victim", tmp_path / "folder" / "a"
    victim.write_bytes(b"intact")
    for write in (files.replacing, files.creating, files.scratch):
        with write(path):
            [name] = [entry for entry in path.parent.iterdir() if entry.name.startswith(".")]
        name.symlink_to(victim)
        with pytest.raises(FileExistsError), write(path):
            raise AssertionError("a link was followed")
        assert name.is_symlink(), "it is not ours to remove"
        name.unlink()
        path.unlink(missing_ok=True)
    assert victim.read_bytes() == b"intact"


@posix
@pytest.mark.parametrize("write", ["replacing", "creating", "scratch"])
def test_what_a_killed_writer_leaves_is_deleted_and_a_living_ones_is_not(write: str, tmp_path: Path) -> None:
    killed_inside(tmp_path / "a", write)
    assert len(os.listdir(tmp_path)) == 1
    with files.replacing(tmp_path / "alive") as living:
        killed_inside(tmp_path / "a", write)  # this process has looked before; the child, which writes, looks again
        files.sweep.cache_clear()
        files.write_bytes(tmp_path / "b", b"")
        living.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == ["alive", "b"]
    assert (tmp_path / "alive").read_bytes() == b"whole"


def test_another_machines_file_is_stale_when_it_is_old(tmp_path: Path) -> None:
    """Nobody here can tell whether its writer lives: only that a scratch file may well be read for days."""
    ages_days = {".a.0123abcd-0123456789abcdef.partial": 2, ".b.0123abcd-0123456789abcdef.partial": 0.5}
    ages_days |= {".c.0123abcd-0123456789abcdef.scratch": 2, ".d.0123abcd-0123456789abcdef.scratch": 31}
    foreign = {".e.partial": 99, ".git": 99, "f.0123abcd-0123456789abcdef.partial": 99}
    for name, days in (ages_days | foreign).items():
        (tmp_path / name).write_bytes(b"")
        then = os.stat(tmp_path).st_mtime - days * 86400
        os.utime(tmp_path / name, (then, then))
    files.sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == {*list(ages_days)[1:3], *foreign}


def test_a_file_whose_name_is_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    files.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


@posix
def test_permissions_hold_from_the_first_byte(tmp_path: Path) -> None:
    for mode, umask in (
        (files.PRIVATE, 0o000),
        (files.PRIVATE, 0o277),
        (files.BY_UMASK, 0o022),
        (files.BY_UMASK, 0o077),
    ):
        before = os.umask(umask)
        try:
            with files.replacing(tmp_path / "a", mode=mode) as file:
                unfinished = os.fstat(file.fileno()).st_mode & 0o777
        finally:
            os.umask(before)
        expected = mode if mode == files.PRIVATE else mode & ~umask
        assert (unfinished, (tmp_path / "a").stat().st_mode & 0o777) == (expected, expected)


def test_a_folder_of_the_user_is_named_or_below_home_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / ".cache"
    assert files.expand_user("~/a") == tmp_path / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.user_folder("XDG_CACHE_HOME", ".cache") == Path("/elsewhere")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_variables_that_name_one_are_said(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"HOME is not set and the system does not know this user.*XDG_CACHE_HOME=FOLDER"
    ):
        files.user_folder("XDG_CACHE_HOME", ".cache")
    with pytest.raises(UserError, match="~/a: the home directory of ~ is unknown"):
        files.expand_user("~/a")
    assert files.expand_user(str(tmp_path)) == tmp_path


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_what_is_private_is_its_owners_alone_and_nothing_else_is(umask: int, tmp_path: Path) -> None:
    before, modes = os.umask(umask), {}
    try:
        files_of = {"out": tmp_path / "out/deep/a", "beside": tmp_path / "beside/a", "like it": tmp_path / "outer/a"}
        with files.private(tmp_path / "out"), files.private(tmp_path / "out"):
            pass
        with files.private(tmp_path / "out"):
            for name, path in files_of.items():
                if umask != 0o777 or name == "out":  # nobody could write into the others then
                    files.write_bytes(path, b"a")
                    modes[name] = path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777
            with files.scratch(tmp_path / "out/b") as name:
                assert name.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
        files.write_bytes(tmp_path / "out/later", b"")
        assert (tmp_path / "out/later").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)
    assert modes.pop("out") == (0o700, 0o600)
    assert set(modes.values()) <= {(0o777 & ~umask, 0o666 & ~umask)}


@posix
def test_a_folder_that_was_there_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o755)
    with files.private(tmp_path / "out"):
        files.write_bytes(tmp_path / "out/a", b"a")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out/a")] == [0o755, 0o600]


def test_reading_json_takes_memory_for_the_file_alone(tmp_path: Path) -> None:
    """And a file that never ends is a damaged one."""
    files.write_json(tmp_path / "a.json", {"a": 1})
    tracemalloc.start()
    try:
        assert files.read_json(tmp_path / "a.json", remedy="") == {"a": 1}
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match="is invalid"):
        files.read_json(Path("/dev/zero"), remedy="delete it")

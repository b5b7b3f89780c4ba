"""Test files.py: files are complete or absent, under temporary names that nobody can guess, with the right permissions."""

import os
import signal
import tracemalloc
from pathlib import Path

import pytest

from mura_dist.core import files
from mura_dist.core.errors import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="processes that fork, links and modes are POSIX")


def killed_inside(path: Path, write: str) -> None:
    """Leave the files of a process that is killed inside the block of `write`."""
    if (child := os.fork()) == 0:
        with getattr(files, write)(path) as file:
            if not isinstance(file, Path):
                file.write(b"half")
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_concurrent_writers_of_one_file_are_independent(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_temporary_names_are_random(tmp_path: Path) -> None:
    names = set()
    for _ in range(8):
        with files.replacing(tmp_path / "a"):
            names |= set(os.listdir(tmp_path)) - {"a"}
    assert len(names) == 8


@posix
def test_symlink_at_a_guessed_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is refused, and the target of the link is unchanged."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda length: "0" * 2 * length)
    victim, path = tmp_path / "victim", tmp_path / "folder" / "a"
    victim.write_bytes(b"intact")
    for write in (files.replacing, files.creating, files.scratch):
        with write(path):
            [name] = [entry for entry in path.parent.iterdir() if entry.name.startswith(".")]
        name.symlink_to(victim)
        with pytest.raises(FileExistsError), write(path):
            raise AssertionError("a link was followed")
        assert name.is_symlink(), "a foreign link is not removed"
        name.unlink()
        path.unlink(missing_ok=True)
    assert victim.read_bytes() == b"intact"


@posix
@pytest.mark.parametrize("write", ["replacing", "creating", "scratch"])
def test_files_of_a_killed_writer_are_deleted_and_of_a_live_one_are_not(write: str, tmp_path: Path) -> None:
    killed_inside(tmp_path / "a", write)
    assert len(os.listdir(tmp_path)) == 1
    with files.replacing(tmp_path / "alive") as live_file:
        killed_inside(tmp_path / "a", write)  # this process has swept before; the child sweeps again
        files.sweep.cache_clear()
        files.write_bytes(tmp_path / "b", b"")
        live_file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == ["alive", "b"]
    assert (tmp_path / "alive").read_bytes() == b"whole"


def test_file_of_another_machine_is_stale_by_age(tmp_path: Path) -> None:
    """Its writer cannot be checked from this machine. A scratch file may be read for days."""
    ages_days = {".a.0123abcd-0123456789abcdef.partial": 2, ".b.0123abcd-0123456789abcdef.partial": 0.5}
    ages_days |= {".c.0123abcd-0123456789abcdef.scratch": 2, ".d.0123abcd-0123456789abcdef.scratch": 31}
    foreign = {".e.partial": 99, ".git": 99, "f.0123abcd-0123456789abcdef.partial": 99}
    for name, days in (ages_days | foreign).items():
        (tmp_path / name).write_bytes(b"")
        then = os.stat(tmp_path).st_mtime - days * 86400
        os.utime(tmp_path / name, (then, then))
    files.sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == {*list(ages_days)[1:3], *foreign}


def test_file_name_of_maximum_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    files.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"


@posix
def test_permissions_are_set_before_the_first_byte(tmp_path: Path) -> None:
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


def test_user_folder_is_from_the_variable_or_below_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.user_folder("XDG_CACHE_HOME", ".cache") == tmp_path / ".cache"
    assert files.expand_user("~/a") == tmp_path / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert files.user_folder("XDG_CACHE_HOME", ".cache") == Path("/elsewhere")


@pytest.mark.usefixtures("homeless")
def test_missing_home_is_refused_with_the_variable_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"HOME is not set and the system does not know this user.*XDG_CACHE_HOME=FOLDER"
    ):
        files.user_folder("XDG_CACHE_HOME", ".cache")
    with pytest.raises(UserError, match="~/a: the home directory of ~ is unknown"):
        files.expand_user("~/a")
    assert files.expand_user(str(tmp_path)) == tmp_path


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_only_private_folders_are_restricted_to_their_owner(umask: int, tmp_path: Path) -> None:
    before, modes = os.umask(umask), {}
    try:
        files_of = {"out": tmp_path / "out/deep/a", "beside": tmp_path / "beside/a", "like it": tmp_path / "outer/a"}
        with files.private(tmp_path / "out"), files.private(tmp_path / "out"):
            pass
        with files.private(tmp_path / "out"):
            for name, path in files_of.items():
                if umask != 0o777 or name == "out":  # with this umask the others are not writable
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
def test_existing_folder_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o755)
    with files.private(tmp_path / "out"):
        files.write_bytes(tmp_path / "out/a", b"a")
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "out", tmp_path / "out/a")] == [0o755, 0o600]


def test_reading_json_allocates_the_size_of_the_file(tmp_path: Path) -> None:
    """An endless file is invalid."""
    files.write_json(tmp_path / "a.json", {"a": 1})
    tracemalloc.start()
    try:
        assert files.read_json(tmp_path / "a.json", remedy="") == {"a": 1}
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match="is invalid"):
        files.read_json(Path("/dev/zero"), remedy="delete it")

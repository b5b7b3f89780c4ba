"""Test storage.py and cache.py: a folder behaves equally on disk, in memory and on an S3 server (moto on this machine)."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import laws
from helpers.cache import Cache
from helpers.commands import run
from helpers.mirrors import open_mirrored

from mura_dist.core import storage
from mura_dist.core.errors import RunError, UserError
from mura_dist.core.storage import Storage
from mura_dist.data.shards import cache
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards
from mura_dist.data.shards.verify import verify

FILES = {"a.txt": b"alpha", "deep/er/b.bin": bytes(range(256)) * 40, "deep/c": b""}


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return storage.open_storage(tmp_path / "folder")
    if request.param == "memory":
        return storage.open_storage(f"memory://{tmp_path.name}")
    return storage.open_storage(f"{request.getfixturevalue('s3')}/{tmp_path.name}")


def test_folder_operations_are_equal_for_all_stores(folder: Storage, tmp_path: Path) -> None:
    assert folder.names() == set()
    for name, data in FILES.items():
        folder.write(name, data)
    assert folder.is_folder()
    assert dict(folder.files()) == {name: len(data) for name, data in FILES.items()}
    assert folder.names() == {"a.txt", "deep"}
    assert folder.child("deep").names() == {"er", "c"}
    assert [folder.exists(name) for name in ("a.txt", "deep/er/b.bin", "none", "deep")] == [True, True, False, False]
    assert folder.read_range("deep/er/b.bin", 250, 10) == FILES["deep/er/b.bin"][250:260]
    *contents, missing = folder.read_many([*FILES, "none"])
    assert contents == list(FILES.values())
    assert isinstance(missing, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        folder.read("none")
    folder.copy_to("a.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"alpha"
    folder.remove("a.txt")
    folder.remove("a.txt")
    assert not folder.exists("a.txt")
    again = pickle.loads(pickle.dumps(folder))
    assert str(again) == str(folder)
    if "memory" not in str(folder):
        assert again.read("deep/er/b.bin") == FILES["deep/er/b.bin"]


def test_interrupted_write_keeps_the_old_file(folder: Storage) -> None:
    folder.write("x", b"old")

    def write_interrupted() -> None:
        with folder.writing("x") as file:
            file.write(b"half of the n")
            raise RuntimeError("broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        write_interrupted()
    assert folder.read("x") == b"old"
    assert folder.names() == {"x"}


def test_hidden_folders_are_skipped(tmp_path: Path) -> None:
    for name in (".hidden/x", "a/x", "a/.y", "a/.hidden/x"):
        storage.open_storage(tmp_path).write(name, b"1")
    (tmp_path / ".link").symlink_to("a")
    (tmp_path / "a" / "link").symlink_to("x")
    (tmp_path / "a" / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "a" / "itself").symlink_to("itself")
    files = [("a/.y", 1), ("a/itself", 0), ("a/link", 1), ("a/nowhere", 0), ("a/x", 1)]
    assert sorted(storage.open_storage(tmp_path).files()) == files


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    """Real folders come first, then the link of the least depth. Repeated targets are reported, and loops end."""
    for name in ("in/real/x", "out/b/x", "out/b/deep/y", "out/c/z"):
        storage.open_storage(tmp_path).write(name, b"1")
    links = {
        "in/again": "real",
        "in/b": "../out/b",
        "in/real/c": "../../out/c",
        "in/whole": "../out",  # contains b, listed already, and c, whose other link is deeper
        "out/b/loop": "..",
        "out/c/up": "../../in",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    repeated: list[tuple[str, str]] = []
    files = sorted(name for name, _ in storage.open_storage(tmp_path / "in").files(repeated))
    assert files == ["b/deep/y", "b/x", "real/x", "whole/c/z"]
    assert sorted(repeated) == [
        ("again", "real"),
        ("b/loop", "whole"),
        ("real/c", "whole/c"),
        ("whole/b", "b"),
        ("whole/c/up", ""),
    ]


@pytest.mark.parametrize(
    ("url", "parts"),
    [("nonsense://x/y", ("nonsense://x/y", "a URL that fsspec supports")), ("gs://x/y", ("gs://x/y", "not installed"))],
)
def test_unsupported_url_is_refused(url: str, parts: tuple[str, ...], tmp_path: Path, capsys) -> None:
    laws.refusal(capsys, ["shards", url, tmp_path / "out"], *parts)
    laws.refusal(capsys, ["shards", tmp_path, url], *parts)


@pytest.mark.slow
def test_unreachable_store_is_a_one_line_error(s3: str, tmp_path: Path) -> None:
    done = run("mura-dist", "shards", f"{s3}-which-is-not/x", tmp_path / "out", "--quiet")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = run("mura-dist", "shards", f"{s3}/x", tmp_path / "out", "--quiet", env=env)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "s3://bucket/x" in done.stderr


@pytest.fixture(scope="module")
def converted_shards(cache: Cache, phantoms: Path) -> Path:
    return cache.path("shards-48", lambda folder: convert(phantoms, folder, size=48, workers=2))


def upload(source: Path, target: Storage) -> None:
    for name, _ in storage.open_storage(source).files():
        target.write(name, (source / name).read_bytes())


@pytest.mark.parametrize(
    "direction",
    [
        "to",
        pytest.param("both", marks=pytest.mark.slow),
        pytest.param("from", marks=pytest.mark.nightly(part="files")),
    ],
)
def test_conversion_from_and_to_a_url_gives_identical_bytes(
    direction: str, folder: Storage, phantoms: Path, converted_shards: Path, tmp_path: Path
) -> None:
    source, out = phantoms, tmp_path / "out"
    if direction != "to":
        upload(phantoms, folder.child("source"))
        source = f"{folder}/source"
    if direction != "from":
        out = f"{folder}/out"
    convert(
        source if "://" in str(source) else Path(source), out if "://" in str(out) else Path(out), size=48, workers=2
    )
    converted = tmp_path / "made"
    converted.mkdir()
    for name in storage.open_storage(out).names():
        storage.open_storage(out).copy_to(name, converted / name)
    laws.same_bytes(converted_shards, converted, leave_out=("conversion.json",))
    assert list(verify(out)) == []


def test_conversion_to_a_url_resumes(s3: str, phantoms: Path, converted_shards: Path, tmp_path: Path) -> None:
    out = storage.open_storage(f"{s3}/{tmp_path.name}/out")
    convert(phantoms, str(out), size=48, workers=2)
    for name in ("index.json", "valid-000000.json", "valid-000000.tar"):
        out.remove(name)
    size = (converted_shards / "train-000000.tar").stat().st_size
    out.write("train-000000.tar", b"not to be made again: its size is right".ljust(size))
    out.write("tune-000000.tar", b"to be made again: its size is not the mark's")
    convert(phantoms, str(out), size=48, workers=1)
    for name in ("valid-000000.tar", "tune-000000.tar"):
        assert out.read(name) == (converted_shards / name).read_bytes()
    assert out.read("train-000000.tar").startswith(b"not to be")
    with pytest.raises(RunError, match=r"train-000000\.tar differs from its SHA-256 in index\.json \(2 attempts\)"):
        Shards.open(str(out), mirror=tmp_path / "mirror")


def test_remote_shards_are_mirrored_once(s3: str, converted_shards: Path, tmp_path: Path) -> None:
    remote = storage.open_storage(f"{s3}/{tmp_path.name}")
    upload(converted_shards, remote)
    opened, local = Shards.open(str(remote), mirror=tmp_path / "mirror"), Shards.open(converted_shards)
    for row in local.rows("valid").tolist():
        np.testing.assert_array_equal(opened.read_pixels(row), local.read_pixels(row))
    for name in remote.names():
        remote.remove(name) if name.endswith(".tar") else None
    again = Shards.open(str(remote), mirror=tmp_path / "mirror")
    assert again.folder == opened.folder, "copied once"
    assert verify(again.folder) is not None
    assert list(verify(again.folder)) == []


@pytest.mark.slow
def test_one_process_of_a_node_copies_for_all_others(converted_shards: Path, tmp_path: Path) -> None:
    """Three processes open a local folder at once. There is one complete copy."""
    context = multiprocessing.get_context("spawn")
    opened = context.Queue()
    ranks = [
        context.Process(target=open_mirrored, args=(converted_shards, tmp_path / "mirror", opened)) for _ in range(3)
    ]
    for rank in ranks:
        rank.start()
    folders = {opened.get(timeout=60) for _ in ranks}
    for rank in ranks:
        rank.join()
    assert len(folders) == 1
    [folder] = (tmp_path / "mirror").iterdir()
    assert not [path for path in folder.iterdir() if path.name.endswith(".partial")]
    assert {path.name for path in folder.glob("*.tar")} == {path.name for path in converted_shards.glob("*.tar")}


def test_interrupted_mirror_is_completed(converted_shards: Path, tmp_path: Path) -> None:
    folder = cache.local_folder(converted_shards, tmp_path / "mirror")
    (folder / "index.json").unlink()
    (folder / "train-000000.tar").unlink()
    (folder / ".train-000000.tar.partial").write_bytes(b"half")
    modified_ns = (folder / "valid-000000.tar").stat().st_mtime_ns
    assert cache.local_folder(converted_shards, tmp_path / "mirror") == folder
    assert list(verify(folder)) == []
    assert (folder / "valid-000000.tar").stat().st_mtime_ns == modified_ns


def test_mirror_without_free_space_is_refused_before_copying(converted_shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "huge"
    shutil.copytree(converted_shards, source)
    index = json.loads((source / "index.json").read_bytes())
    index["splits"]["train"]["shards"][0]["bytes"] = 10**16
    (source / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"needs 1[0-9.]+ GB \(.* GB are free\)\. Free space, or name another disk with mirror="
    ):
        cache.local_folder(source, tmp_path / "mirror")
    assert not list((tmp_path / "mirror").rglob("*.tar"))


def test_url_without_valid_shards_is_refused(tmp_path: Path) -> None:
    remote = storage.open_storage(f"memory://{tmp_path.name}")
    with pytest.raises(UserError, match=r"memory://.*holds no shards \(no index\.json\)\. Make them with"):
        Shards.open(str(remote))
    remote.write("conversion.json", b"{}")
    with pytest.raises(UserError, match=r"the conversion is not finished\. Run the same"):
        Shards.open(str(remote))
    remote.write("index.json", b"{")
    with pytest.raises(UserError, match=r"index\.json is corrupt"):
        Shards.open(str(remote))

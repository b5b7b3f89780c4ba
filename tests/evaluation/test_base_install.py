"""Test `evaluate MODEL.onnx` on the base install, without torch: files identical to those of the full install."""

import json
import zlib
from pathlib import Path

import pytest
from helpers.base_install import BaseInstall
from helpers.commands import stderr_lines

from mura_dist.cli.main import DONE, INVALID, main
from mura_dist.core import storage
from mura_dist.data.loaders import opencv, sampler
from mura_dist.data.shards.codec import SUFFIX
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation import results

ABSENT = (
    "torch",
    "torchvision",
    "cv2",
    "nvidia",
    "deepspeed",
    "matplotlib",
    "onnx",
    "onnxscript",
    "webdataset",
    "safetensors",
)
EVALUATE = ("-m", "mura_dist", "evaluate")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    return BaseInstall(tmp_path_factory.mktemp("base"), "cpu", "remote")


@pytest.fixture(scope="module", params=sorted(SUFFIX))
def encoded(request: pytest.FixtureRequest, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / request.param
    convert(phantoms, folder, size=64, workers=2, encoding=request.param)
    return folder


UNEQUAL = ("report.html", "report.json", results.STAMP)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of an evaluation without the report, measured seconds and the stamp, which has versions."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    content = {name: path.read_bytes() for name, path in paths.items() if name not in UNEQUAL}
    content["gallery.json"] = json.dumps({**json.loads(content["gallery.json"]), "seconds": 0}).encode()
    return content


def svg_plots(report: Path) -> list[str]:
    return [path.partition("</svg>")[0] for path in report.read_text().split("<svg")[1:]]


def test_packages_of_other_extras_are_absent(base: BaseInstall) -> None:
    code = f"from importlib.util import find_spec; print([name for name in {ABSENT} if find_spec(name)])"
    assert base.run("-c", code).stdout == "[]\n"


def test_base_and_full_install_write_identical_files(
    base: BaseInstall, encoded: Path, model: Path, tmp_path: Path
) -> None:
    result = base.run(*EVALUATE, model, encoded, "--out", tmp_path / "base", "--quiet")
    assert (result.returncode, stderr_lines(result)) == (DONE, [])
    assert main(["evaluate", str(model), str(encoded), "--out", str(tmp_path / "full"), "--quiet"]) == DONE
    base_files, full_files = files_of(tmp_path / "base"), files_of(tmp_path / "full")
    assert {"metrics.json", "predictions.csv", "studies.csv", "gallery.html", "gallery.json"} <= base_files.keys()
    assert any(name.startswith("gallery/") for name in base_files)
    assert [name for name in full_files if base_files.get(name) != full_files[name]] == []
    assert base_files.keys() == full_files.keys()
    base_plots = svg_plots(tmp_path / "base" / "report.html")
    assert len(base_plots) > 3
    assert base_plots == svg_plots(tmp_path / "full" / "report.html")


def test_base_install_decodes_the_training_loaders_pixels(base: BaseInstall, encoded: Path) -> None:
    """The test compares the CRC-32 of each radiograph's pixels."""
    code = (
        "import sys, zlib; from pathlib import Path; from mura_dist.data.shards.reader import Shards; "
        "shards = Shards.open(Path(sys.argv[1])); "
        "print([zlib.crc32(shards.read_pixels(int(row)).tobytes()) for row in shards.rows('valid')])"
    )
    shards = Shards.open(encoded)
    [micro] = sampler.evaluation_micro_batches(
        rows := shards.rows("valid"), micro_batch=len(rows), rank=0, world_size=1
    )
    batch = opencv.load(shards, micro).pixels.numpy()
    assert json.loads(base.run("-c", code, encoded).stdout) == [zlib.crc32(pixels.tobytes()) for pixels in batch]


def test_shards_are_read_from_a_url(
    base: BaseInstall, s3: str, shard_folder: Path, model: Path, tmp_path: Path
) -> None:
    store = storage.open_storage(f"{s3}/shards")
    for path in shard_folder.iterdir():
        store.write(path.name, path.read_bytes())
    mirror = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = base.run(
        *EVALUATE, model, f"{s3}/shards", "--out", tmp_path / "url", "--no-gallery", "--quiet", env=mirror
    )
    assert (result.returncode, stderr_lines(result)) == (DONE, [])
    assert (
        main(["evaluate", str(model), str(shard_folder), "--out", str(tmp_path / "here"), "--no-gallery", "--quiet"])
        == DONE
    )
    assert (tmp_path / "url" / "metrics.json").read_bytes() == (tmp_path / "here" / "metrics.json").read_bytes()


def test_only_rank_0_evaluates_an_onnx_file(base: BaseInstall, shard_folder: Path, model: Path, tmp_path: Path) -> None:
    arguments = (*EVALUATE, model, shard_folder, "--no-gallery", "--out")
    first, second = (
        base.run(*arguments, tmp_path / str(rank), env={"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)})
        for rank in range(2)
    )
    assert (first.returncode, second.returncode) == (DONE, DONE)
    assert "an ONNX file is evaluated by one process; 1 of 2 ranks are idle" in " ".join(first.stderr.split())
    assert (tmp_path / "0" / "report.html").is_file()
    assert (second.stdout, stderr_lines(second)) == ("", [])
    assert not (tmp_path / "1").exists()


def test_evaluating_a_run_without_torch_names_the_extra(base: BaseInstall, shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'shards = "{shard_folder}"\nrun = "{tmp_path}"\n')
    result = base.run(*EVALUATE, tmp_path, shard_folder, "--out", tmp_path / "out")
    assert result.returncode == INVALID
    [line] = stderr_lines(result)
    assert line.startswith("mura-dist: this command needs torch, which is not installed. Run ")

"""Test bench: every benchmark at a size of seconds, the clock on contenders of known speed, the loaders, and refused requests."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import contenders as toys
from helpers import laws
from helpers.commands import run as command
from PIL import Image

from mura_dist.bench import clock, encodings, footprint, peers, pipeline, plots, ranks, runner, workload
from mura_dist.bench.clock import Contender
from mura_dist.bench.footprint import Loader
from mura_dist.bench.training import activation_bytes
from mura_dist.bench.workload import Load, Options
from mura_dist.core.errors import RunError, UserError
from mura_dist.data import mura, radiograph
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards
from mura_dist.data.source.scan import scan
from mura_dist.distributed import processes

NUM_CONTENDERS = {"shards": (1, 1), "pipeline": (4, 6 - len(peers.missing())), "encodings": (6, 0), "predict": (6, 3)}
NUM_CONTENDERS |= {"train": (2, 3), "ranks": (2, 2)}
MORE = {
    "shards": {"ceiling"},
    "predict": {"ceilings"},
    "pipeline": {"start"},
    "encodings": {"encodings"},
    "train": {"activations"},
}
STARTED = [pipeline.CPU, pipeline.DALI, peers.FILES, peers.TAR, peers.READER]
GROWTH = ("growth_mib", "growth_percent", "growth_of_process_percent")
S = 64


def load_of(folder: Path, scratch: Path, paths: list[str], *, workers: int = 2) -> Load:
    return Load(folder, scratch, paths, len(paths), S, workers, 8, "tiny")


@pytest.fixture
def empty_load(tmp_path: Path) -> Load:
    return load_of(tmp_path, tmp_path, [], workers=1)


@pytest.fixture(scope="module")
def small(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a load of 24 radiographs, with their raw shards and the tar of their bytes for `pipeline`."""
    options = Options(data=phantoms)
    load = workload.prepare(options, tmp_path_factory.mktemp("small"), size=S, number=24)
    convert(load.folder, load.scratch / "shards", size=S, workers=1)
    pipeline._pack(load, load.scratch / "files.tar")
    return load


def spreads(measured: Any) -> Iterator[dict[str, float]]:
    if isinstance(measured, dict) and set(measured) == {"median", "min", "max"}:
        yield measured
    elif isinstance(measured, dict | list):
        for value in measured.values() if isinstance(measured, dict) else measured:
            yield from spreads(value)


def check(measured: dict[str, Any], what: str) -> None:
    """Assert what `run` documents: the keys, the contenders, and finite numbers, positive except for changes of memory."""
    keys = {"what", "command", "hardware", "versions", "workload", "rounds", "contenders", "ratios"}
    assert set(measured) == keys | MORE.get(what, set())
    assert (measured["what"], measured["rounds"], measured["workload"]["radiographs"]) == (what, 1, 24)
    assert measured["command"].startswith(f"mura-dist bench {what} --data ")
    own, peer_results = ([c["name"] for c in measured["contenders"] if c["ours"] is side] for side in (True, False))
    assert (len(own), len(peer_results)) == NUM_CONTENDERS[what]
    alike: Callable[[str], Any] = {  # comparable contenders only: ranks of one precision, pixels with pixels
        "ranks": lambda name: name[-4:],
        "predict": lambda name: name.startswith("pixels"),
    }.get(what, lambda name: None)
    pairs = [(a, b) for b, a in itertools.product(peer_results, own) if alike(a) == alike(b)]
    if what == "predict":  # each file also with itself
        pairs += [(a, a.replace("mura-dist predict, files to tables", "pixels, our file")) for a in own[:3]]
    assert list(measured["ratios"]) == [f"{a} / {b}" for a, b in pairs]
    rates = [*(row["images_per_s"] for row in measured["contenders"]), *measured["ratios"].values()]
    assert all(spread["min"] > 0 for spread in rates)
    assert all(s["min"] <= s["median"] <= s["max"] and all(map(math.isfinite, s.values())) for s in spreads(measured))
    min_images = {"train": 8, "ranks": 16}.get(what, 24)
    assert all(row["num_images"] >= min_images for row in measured["contenders"])
    text = runner.table(measured)
    assert all(name in text for name in (*own, *peer_results, *measured["ratios"]))
    titles = [panel.title for panel in plots.panels(measured)]
    assert len(set(titles)) == len(titles) >= 2


def options_of(data: Path, **values: Any) -> Options:
    defaults: dict[str, Any] = {"size": S, "radiographs": 24, "rounds": 1, "seconds": 0, "architecture": "tiny"}
    return Options(data=data, **defaults | values)


def measure(what: str, options: Options, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    lines: list[str] = []
    measured = runner.run(what, lines.append, options)
    assert sum(line.startswith("round 1 of 1: ") for line in lines) == sum(NUM_CONTENDERS[what])
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    check(measured, what)
    assert not list(scratch.glob("mura-dist-*"))  # no temporary folder remains
    return measured


@pytest.mark.nightly(part="training")
@pytest.mark.parametrize("what", ["predict", "train", "ranks"])
def test_benchmark_gives_the_documented_numbers(
    what: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure(what, options_of(phantoms), tmp_path, monkeypatch)
    assert all(row["tried"] == {} for row in measured["contenders"])
    if what == "predict":
        for row in measured["ceilings"]:
            assert min(row["decode_ms"], row["gate_ms"], row["model_ms"]) > 0
            whole_ms = row["decode_ms"] + row["gate_ms"] + row["model_ms"]
            assert row["ceiling"] == pytest.approx(row["model_ms"] / whole_ms)
            assert row["share"] == pytest.approx(row["ratio"] / row["ceiling"])
        assert len(measured["ceilings"]) == 3
        assert "ceiling of a prediction" in runner.table(measured)
    if what == "train":
        activations = {row["network"]: row["mb_per_radiograph"] for row in measured["activations"]}
        assert activations["mura-dist"] < activations["torchvision, memory_efficient"] < activations["torchvision"]
        assert "activations for the backward pass" in runner.table(measured)


@pytest.mark.nightly(part="training")
def test_pipeline_measures_rates_and_the_cost_of_a_start(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WORKER_COUNTS", (1, 2))
    measured = measure("pipeline", options_of(phantoms), tmp_path, monkeypatch)
    for row in measured["contenders"]:
        assert set(row["tried"]) == (set() if row["ours"] else {"1", "2"}), row["name"]
        assert row["workers"] == 2 if row["ours"] else row["tried"][str(row["workers"])] == max(row["tried"].values())
    first, second = list(measured["ratios"])[:2]  # the second ratio compares like with like
    assert (first, second) == (f"{pipeline.CPU} / {peers.FILES}", f"{pipeline.ORIGINAL} / {peers.FILES}")
    assert [row["name"] for row in measured["start"]] == STARTED
    for row in measured["start"]:
        assert 0.05 < row["first_batch_s"]["median"] < 120
        assert row["private_mib"]["median"] > 0
        assert row["imports_mib"]["median"] > 20
        assert row["rss_mib"]["median"] >= row["private_mib"]["median"] or not row["ours"]
        assert all((row[key] is not None) == row["ours"] for key in GROWTH)
        assert (row["num_processes"], row["images_an_epoch"]) == (1, 24)
    text = runner.table(measured)
    assert text.count("workers") >= 2
    assert all(word in text for word in ("first batch, s", "private", "page cache", "growth"))


@pytest.mark.nightly(part="training")
def test_encodings_measures_the_change_of_the_probability(
    phantoms: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    measured = measure("encodings", options_of(phantoms, size=None, model=model), tmp_path, monkeypatch)
    assert measured["workload"]["size_px"] == S  # the model's
    raw, png, jpeg = measured["encodings"]
    assert [row["encoding"] for row in (raw, png, jpeg)] == ["raw", "png", "jpeg"]
    assert raw["bytes_per_radiograph"] == 128 + S * S  # .npy: a header, and the pixels as they are
    assert 0 < jpeg["bytes_per_radiograph"] < png["bytes_per_radiograph"] < raw["bytes_per_radiograph"]
    for row in (raw, png):  # without loss
        assert row["probability_change"] == {"largest": 0, "mean": 0, "num_radiographs": 24}
    assert 0 < jpeg["probability_change"]["mean"] < jpeg["probability_change"]["largest"] < 0.5
    for row in (raw, png, jpeg):
        assert row["conversion_radiographs_per_s"]["min"] > 0
        assert row["loading_images_per_s"]["min"] > 0
        assert (row["loading_gpu_images_per_s"] is not None) == torch.cuda.is_available()
    text = runner.table(measured)
    assert "largest" in text
    for row in measured["encodings"]:
        row["probability_change"] = None
    assert "not measured (give --model MODEL.onnx)" in runner.table(measured)


def test_probability_change_equals_the_difference_of_model_outputs(small: Load, model: Path, tmp_path: Path) -> None:
    from mura_dist.inference.onnx_model import OnnxModel

    load = load_of(small.folder, tmp_path, small.paths)
    for encoding in ("raw", "png", "jpeg"):
        convert(load.folder, tmp_path / encoding, size=S, encoding=encoding, workers=1)
    changes = encodings._probability_changes(load, model, lambda line: None)
    logits, opened = OnnxModel.load(model).logits, {name: Shards.open(tmp_path / name) for name in ("png", "jpeg")}

    def probability(name: str, row: int) -> float:
        return 1 / (1 + math.exp(-logits(opened[name].read_pixels(row)[None, None])[0]))

    expected = [abs(probability("jpeg", row) - probability("png", row)) for row in range(24)]
    assert changes["jpeg"] == pytest.approx(
        {"largest": max(expected), "mean": np.mean(expected), "num_radiographs": 24}
    )


@pytest.mark.slow
def test_command_prints_only_json_on_stdout_and_draws_a_plot(phantoms: Path, tmp_path: Path) -> None:
    sizes = ("--size", S, "--radiographs", 24, "--rounds", 1)
    picture = tmp_path / "bench.png"
    done = command("mura-dist", "bench", "shards", "--data", phantoms, *sizes, "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    check(measured, "shards")
    assert "round 1 of 1: decode and resize only: " in done.stderr
    ceiling, (own, bare) = measured["ceiling"], (row["images_per_s"]["median"] for row in measured["contenders"])
    assert len(ceiling["parts"]) == 7
    assert all(value > 0 for value in ceiling["parts"].values())
    whole_s = sum(value for key, value in ceiling["parts"].items() if key.endswith("_s"))
    assert ceiling["images_per_s"] < 24 / whole_s < bare  # 24 radiographs
    assert ceiling["ratio"] == pytest.approx(own / ceiling["images_per_s"])
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("L").getcolors()) > 20  # bars, letters
    assert [path.name for path in tmp_path.iterdir()] == ["bench.png"]


# ---- the clock


def play(contenders: list[Contender], load: Load, rounds: int, seconds: float, log: Any = print) -> dict[str, Any]:
    return clock.play(contenders, load, rounds=rounds, seconds=seconds, log=log)


def test_contenders_are_timed_in_turns(empty_load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    contenders = [
        Contender("quick", partial(toys.sleeper, 0.01), is_own=True),
        Contender("slow", partial(toys.sleeper, 0.1)),
    ]
    lines: list[str] = []
    measured = play(contenders, empty_load, 3, 0.15, lines.append)
    quick, slow = measured["contenders"]
    assert quick["images_per_s"]["max"] <= 100  # a sleep may last longer, so only upper bounds hold
    assert slow["images_per_s"]["max"] <= 10
    assert 3 <= slow["num_images"] <= 3 * 2  # two items fill 0.15 s, one on a busy machine; the warm-up is not counted
    assert (
        1 < measured["ratios"]["quick / slow"]["median"] <= quick["images_per_s"]["max"] / slow["images_per_s"]["min"]
    )
    assert [line.split(": ")[1] for line in lines] == ["quick", "slow"] * 3
    out, err = capfd.readouterr()
    assert "talks" not in out
    assert "talks" in err  # stdout is for the result


def test_peer_uses_its_fastest_number_of_workers(empty_load: Load) -> None:
    pauses = {1: 0.1, 2: 0.005, 4: 0.05}
    peer = Contender("peer", partial(toys.by_workers, pauses), worker_counts=(1, 2, 4))
    lines: list[str] = []
    measured = play(
        [Contender("own", partial(toys.sleeper, 0.01), is_own=True), peer], empty_load, 1, 0.2, lines.append
    )
    own, peer_results = measured["contenders"]
    assert (own["workers"], own["tried"]) == (1, {})
    assert peer_results["workers"] == 2
    assert set(peer_results["tried"]) == {"1", "2", "4"}
    assert all(peer_results["tried"][str(count)] <= 1 / pause for count, pause in pauses.items())
    assert peer_results["images_per_s"]["median"] > 1 / pauses[4]  # the rounds use the chosen number of workers
    assert "workers of peer: 2; images/s with 1: " in lines[0]


def test_items_queued_before_a_turn_are_not_counted(empty_load: Load) -> None:
    neighbor = Contender("neighbor", partial(toys.sleeper, 0.8), is_own=True)
    for is_stream, max_rate in ((True, 1 / 0.05), (False, math.inf)):
        measured = play([neighbor, Contender("queue", toys.queue, is_stream=is_stream)], empty_load, 2, 0.0)
        rates = measured["contenders"][1]["images_per_s"]
        assert rates["max"] <= max_rate
        assert is_stream or rates["min"] > 1 / 0.05  # otherwise only the queued items are measured


def test_failed_contender_is_an_error(empty_load: Load) -> None:
    with pytest.raises(RunError, match="a contender's process died"):
        play([Contender("dies", toys.exiting_contender)], empty_load, 1, 0)
    with pytest.raises(UserError, match="a contender's own words"):
        play([Contender("quarrels", toys.failing_contender)], empty_load, 1, 0)


# ---- the loaders


@pytest.mark.parametrize(
    "name",
    [
        *("cpu", "dali", "resident", "originals", peers.SHARDS),
        *(pytest.param(peer, marks=pytest.mark.nightly(part="training")) for peer in (*peers.IMPORTS, *peers.OPTIONAL)),
    ],
)
def test_loaders_augment_the_same_radiographs(name: str, small: Load) -> None:
    """Batches have 8 images, an epoch has many different ones, and the mean brightness of the center is that of the files."""
    folder = small.scratch / "shards"
    own: dict[str, Any] = {kind: partial(pipeline.batches, folder, kind) for kind in ("cpu", "dali", "resident")}
    own |= {"originals": partial(pipeline.originals, small.scratch / "files.tar")}
    if name in peers.missing():
        pytest.skip(f"{peers.missing()[name]} is not installed: it comes with the extra `peers`")
    if name == peers.CHUNKS:
        peers.write_chunks(small, small.scratch / "chunks")
    build = (own | pipeline._peers(small))[name]
    with processes.start_workers(1) as pool:  # as in bench: a loader that forks may end the process that created it
        batches = pool.submit(toys.batches, build, small, 3).result()
    assert all(batch.shape == (8, 1, S, S) and batch.dtype == np.uint8 for batch in batches)
    images = np.concatenate(batches)
    assert len(images) >= 3 * 24
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 0.9 * len(images)  # a new rotation each time
    files = np.stack([radiograph.read(small.folder / path, S) for path in small.paths])
    middle = (slice(None), slice(S // 4, -S // 4), slice(S // 4, -S // 4))  # stays in view under any rotation
    assert images[:, 0][middle].mean() == pytest.approx(files[middle].mean(), rel=0.1)
    turned_dark = (images[:, 0, :2, :2] == 0).all(axis=(1, 2)).mean() - (files[:, :2, :2] == 0).all(axis=(1, 2)).mean()
    assert turned_dark >= 0  # corners rotated in from outside are filled with 0


def test_tar_of_original_bytes_matches_its_index(small: Load) -> None:
    tar, lines = (small.scratch / f"files.{suffix}" for suffix in ("tar", "idx"))
    data, (header, *rest) = tar.read_bytes(), lines.read_text().splitlines()
    assert header == f"v1.2 {len(small.paths)}"
    for line, path in zip(rest, small.paths, strict=True):
        _, offset, size, _ = line.split()
        assert data[int(offset) : int(offset) + int(size)] == (small.folder / path).read_bytes()


def test_file_that_opencv_cannot_decode_is_named(small: Load, tmp_path: Path) -> None:
    folder, name = tmp_path / "radiographs", small.paths[0]
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"no image at all")
    load = Load(folder, tmp_path, [name] * 8, 8, S, 1, 8, "tiny")
    pipeline._pack(load, tmp_path / "files.tar")
    with pytest.raises(RunError, match=r"image.*: OpenCV cannot decode it\. Remove it from --data\."):
        list(pipeline.originals(tmp_path / "files.tar", load)())


# ---- start and memory


@pytest.mark.slow
def test_memory_and_its_growth_are_measured(empty_load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    loader = Loader(
        "hoarder", partial(toys.growing_loader, 4), ("torch", "helpers.contenders"), 16, grows=True, is_own=True
    )
    (row,) = footprint.measure([loader], [empty_load], 2, print)
    assert (row["name"], row["num_processes"], row["images_an_epoch"]) == ("hoarder", 2, 16)
    assert 8 <= row["private_mib"]["median"] < 8 + 16  # two batches an epoch, 4 MiB each
    assert 9 * 8 <= row["growth_mib"]["median"] < 9 * 8 + 16
    assert row["growth_percent"]["median"] == pytest.approx(
        100 * row["growth_mib"]["median"] / row["private_mib"]["median"], rel=0.2
    )
    assert 0 < row["growth_of_process_percent"]["median"] < row["growth_percent"]["median"]
    assert row["rss_mib"]["median"] >= row["private_mib"]["median"] * 0.9


@pytest.mark.slow
def test_failed_loader_is_an_error(empty_load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    loader = Loader("the failing loader", partial(pipeline.batches, empty_load.folder, "cpu"), ("torch",), 8)
    with pytest.raises(RunError, match="the process of the failing loader exited with status 1"):
        footprint.measure([loader], [empty_load], 1, print)
    assert "holds no shards" in capfd.readouterr().err


def test_measuring_process_imports_no_heavy_package() -> None:
    """Its imports would add to the measured start of the contenders."""
    texts = "import sys; import mura_dist.bench.footprint, mura_dist.bench.peers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", texts], capture_output=True, text=True, check=True)
    heavy = {"numpy", "pandas", "pydantic", "torch", "PIL", "cv2", "nvidia", "webdataset", "matplotlib", "deepspeed"}
    assert not heavy & set(done.stdout.split())


# ---- the workload


@pytest.mark.parametrize("number", [16, 500])
def test_workload_has_the_requested_number_of_radiographs(number: int, phantoms: Path, tmp_path: Path) -> None:
    total = len(scan(phantoms).manifest.frame)
    assert 16 < total < 500 < 5 * total
    load = workload.prepare(Options(data=phantoms), tmp_path, size=S, number=number)
    scanned = scan(load.folder)
    assert sorted(scanned.manifest.frame["path"]) == sorted(load.paths)
    assert len(set(load.paths)) == number
    assert set(scanned.manifest.frame["split"]) == {"train", "valid"}
    # Copies belong to new patients of the same split. Some views of a study may be missing.
    assert set(scanned.defects) <= {"gap in image numbers"}
    assert load.num_files == min(number, total)
    assert len({(load.folder / path).resolve() for path in load.paths[: load.num_files]}) == load.num_files
    assert all(mura.parse(path).label == mura.parse(str((load.folder / path).resolve())).label for path in load.paths)


def test_files_that_not_every_contender_reads_are_skipped(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)
    broken, renamed, *_ = (source / path for path in scan(source).manifest.frame["path"])
    broken.write_bytes(broken.read_bytes()[:200])
    renamed.rename(renamed.with_suffix(".dcm"))
    load = workload.prepare(Options(data=source), tmp_path, size=S, number=1000)
    used = {(load.folder / path).resolve() for path in load.paths}
    assert len(load.paths) == 1000
    assert broken not in used
    assert renamed.with_suffix(".dcm") not in used
    for path in source.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of its files is a valid PNG or JPEG\. Give a folder"):
        workload.prepare(Options(data=source), tmp_path / "again", size=S, number=48)


@pytest.mark.parametrize("what", ["shards", "pipeline"])
def test_default_workload_of_real_radiographs_is_3000(what: str, tmp_path: Path) -> None:
    assert runner._size_and_number(what, Options(data=tmp_path)) == (320, 3000)
    assert runner._size_and_number(what, Options())[1] < 3000
    assert runner._size_and_number(what, Options(data=tmp_path, radiographs=99, size=64)) == (64, 99)


# ---- plots and refusals


def test_plot_shows_every_number(tmp_path: Path) -> None:
    def spread(middle: float) -> dict[str, float]:
        return {"median": middle, "min": middle / 2, "max": 2 * middle}

    measured = {
        "what": "pipeline",
        "hardware": {"processor": "a processor", "processors": 2, "device": "cpu", "load_before": 0.1},
        "workload": {"radiographs": 24, "size_px": 64, "batch": 8},
        "rounds": 3,
        "contenders": [
            {"name": "mine", "ours": True, "images_per_s": spread(1800), "workers": 2, "tried": {}},
            {"name": "yours", "ours": False, "images_per_s": spread(100), "workers": 4, "tried": {"1": 90, "4": 100}},
        ],
        "ratios": {"mine / yours": spread(18)},
        "start": [{"name": "mine", "ours": True, "first_batch_s": spread(2), "private_mib": spread(30)}],
    }
    rates, ratios, first_batch, memory = plots.panels(measured)
    assert [bar.name for bar in rates.bars] == ["mine", "yours (4 workers)"]
    assert [(bar.value["median"], bar.is_own) for bar in rates.bars] == [(1800, True), (100, False)]
    assert (ratios.bars[0].value, ratios.is_ratio) == (spread(18), True)
    assert (first_batch.bars[0].value, memory.bars[0].value) == (spread(2), spread(30))
    assert plots._format_value(spread(18), times=True) == "18 x (9 to 36)"
    assert plots._format_value({"median": 4205, "min": 4205, "max": 4205}, times=False) == "4,205"
    plots.draw(measured, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        colors = {color[:3] for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x1F, 0x6F, 0x8B), (0xB8, 0xB8, 0xB8)} <= colors  # a bar of each side


def test_invalid_requests_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whats = "shards, pipeline, encodings, train, ranks, predict"
    laws.refusal(capsys, ["bench", "trian"], "'trian'", "did you mean train?", whats)
    laws.refusal(capsys, ["bench", "shards", "--rounds", 0], "--rounds", "0 is not in the range x>=1")
    laws.refusal(capsys, ["bench", "shards", "--data", tmp_path / "none"], "none: no such folder", "Give the folder")
    laws.refusal(capsys, ["bench", "shards", "--batch", 0], "--batch", "0 is not in the range x>=1")
    texts = ("--batch 17", "at most the number of radiographs (16)", "Increase --radiographs")
    laws.refusal(capsys, ["bench", "pipeline", "--radiographs", 16, "--batch", 17], *texts)


def test_unsuitable_model_is_refused(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    arguments = ["bench", "encodings", "--model", model.with_name("none.onnx")]
    laws.refusal(capsys, arguments, "none.onnx: no such file", "Give the model.onnx that `mura-dist export` wrote")
    arguments[-1] = model
    texts = (f"--size {S + 1}", f"takes {S} px", "Omit --size")
    laws.refusal(capsys, [*arguments, "--size", S + 1], *texts)
    texts = ("--model", "bench pipeline has no --model, only bench encodings has. Omit it.")
    laws.refusal(capsys, ["bench", "pipeline", "--model", model], *texts)


def test_unwritable_plot_is_refused_before_measuring(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, texts in {
        "plot.svg": ("plot.svg", "the plot is a PNG", "a name that ends in .png."),
        "none/plot.png": ("does not exist", "Give a file in an existing folder."),
        "folder.png": ("it is a folder", "Give a file in an existing folder."),
    }.items():
        laws.refusal(capsys, ["bench", "shards", "--plot", tmp_path / name], f"--plot {tmp_path / name}", *texts)


def test_activation_bytes_exclude_the_weights() -> None:
    linear, image = torch.nn.Linear(100, 1, bias=False), torch.ones(3, 100, requires_grad=True)
    assert activation_bytes(linear, image) == 3 * 100 * 4


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 8])
def test_two_ranks_need_a_gpu_each(num_gpus: int) -> None:
    """NCCL refuses two ranks on one GPU, one of them after minutes. On a CPU they share it."""
    if num_gpus == 1:
        with pytest.raises(UserError, match=r"2 ranks need a GPU each, and 1 is visible.*CUDA_VISIBLE_DEVICES"):
            ranks.check_devices(num_gpus)
    else:
        ranks.check_devices(num_gpus)

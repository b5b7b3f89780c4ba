"""Properties that several tests check over a grid, one function each."""

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mura_dist.cli.main import INVALID, main
from mura_dist.data.loaders import sampler
from mura_dist.data.shards.reader import Shards, read_index


def once(rows: np.ndarray, micros_of_ranks: Sequence[Sequence[sampler.MicroBatch]], *, dropped: int = 0) -> None:
    """Assert that over all ranks each of `rows` occurs once, except for `dropped`, with equally many micro-batches a rank."""
    assert len({len(micros) for micros in micros_of_ranks}) == 1
    trained_rows = np.concatenate([micro.rows[micro.mask] for micros in micros_of_ranks for micro in micros])
    assert len(trained_rows) == len(rows) - dropped
    assert len(np.unique(trained_rows)) == len(trained_rows)
    assert np.isin(trained_rows, rows).all()


def same_order(a: Sequence[sampler.MicroBatch], b: Sequence[sampler.MicroBatch]) -> None:
    """Assert that two lists of micro-batches are equal bit for bit: rows, angles, flips and masks."""
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        for name in ("rows", "angles", "flips", "mask"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def same_metrics(a: dict[int, float], b: dict[int, float], threshold: float = 0.5) -> None:
    """Assert that logits by row agree within 1e-4, and calls too unless a logit is that near the threshold."""
    assert a.keys() == b.keys()
    x, y = np.array(list(a.values())), np.array([b[row] for row in a])
    np.testing.assert_allclose(x, y, atol=1e-4, rtol=0)
    cut = np.log(threshold / (1 - threshold))
    near = np.abs(x - cut) <= 1e-4
    np.testing.assert_array_equal((x > cut)[~near], (y > cut)[~near])


def same_bytes(a: Path, b: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Assert that two folders contain the same files with the same bytes, except for `leave_out`."""

    def contents(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in leave_out)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    contents_a, contents_b = contents(a), contents(b)
    assert contents_a.keys() == contents_b.keys()
    assert [name for name in contents_a if contents_a[name] != contents_b[name]] == []


def torn_write(work: Callable[[int], int], check: Callable[[], None], moments: Sequence[int]) -> None:
    """Kill the work at each of `moments` (the number of a write), run it again, and `check` the complete new state.

    `work(moment)` runs the work in a process that is killed at that write (0: never) and returns the exit status.
    """
    for moment in moments:
        assert work(moment) == -9, f"write {moment} was never reached"
        assert work(0) == 0
        check()


def refusal(capsys, arguments: Sequence[object], *texts: str) -> str:
    """Assert that a command line is refused: status 2 and one line on stderr with all of `texts`. Return the line."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (INVALID, ""), (status, out, err)
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    missing = [word for word in texts if not re.search(re.escape(word), err)]
    assert not missing, (missing, err)
    return err


def self_describing(path: Path, *, kind: str, secrets: Sequence[str]) -> dict[str, Any]:
    """Assert that an evaluated ONNX file describes itself to plain ONNX Runtime and JSON and contains none of `secrets`.

    `kind` is what the model was trained on, phantoms or radiographs. Returns the card.
    """
    session = onnxruntime.InferenceSession(path.read_bytes())
    metadata = session.get_modelmeta()
    card = json.loads(metadata.custom_metadata_map["mura_dist"])
    size, types = card["size"], card["study_types"]
    [image], [logit, activation_map] = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(uint8)", ["batch", 1, size, size])
    assert (logit.name, logit.type, logit.shape) == ("logit", "tensor(float)", ["batch"])
    assert (activation_map.name, activation_map.type) == ("activation_map", "tensor(float)")
    assert activation_map.shape[0] == "batch"
    assert all(isinstance(cells, int) for cells in activation_map.shape[1:])

    assert card["resize"] == "Pillow bilinear, antialiased, aspect not kept"
    assert types
    assert card["thresholds"].keys() <= set(types)
    assert card["thresholds"]
    assert all(0 <= cut <= 1 for cut in card["thresholds"].values())
    assert card["operating_point"]
    calibration = card["calibration"]
    assert calibration["fitted_on"] == "tune" or calibration["reason"]
    assert calibration["by_study_type"].keys() == (set(types) if calibration["fitted_on"] else set())
    for fitted in calibration["by_study_type"].values():
        for name, value in (("calibration", fitted["slope"]), ("band", fitted["band"])):
            assert value is not None or fitted["reasons"][name]
        assert fitted["band"] is None or 0 <= fitted["band"]["low"] <= fitted["band"]["high"] <= 1
    assert card["metrics"]["split"] == "valid"
    for group in (card["metrics"]["overall"], *card["metrics"]["by_study_type"].values()):
        for metric in ("kappa", "auroc", "sensitivity", "specificity"):
            value, low, high = (group[f"{metric}{end}"] for end in ("", "_low", "_high"))
            assert value is not None or group["reasons"][metric]
            assert (low is not None and low <= value <= high) or group["reasons"][f"{metric}_low"]
    trained_on = card["trained_on"]
    assert trained_on["kind"] == kind
    assert trained_on["num_radiographs"] == trained_on["splits"]["train"] > 0
    assert trained_on["manifest_sha256"] == card["metrics"]["manifest_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", trained_on["manifest_sha256"])
    assert "not a medical device" in card["terms"]
    assert "MURA's research-use agreement" in card["licence"]
    assert re.match(r"\d+\.\d+", card["version"])
    assert card["opset"] == 18
    assert {"architecture", "epochs", "seed", "learning_rate", "global_batch"} <= card["recipe"].keys()
    assert card["checkpoint"]

    assert (metadata.producer_name, metadata.graph_name) == ("mura-dist", "mura_dist")
    assert card["terms"][1:] in metadata.description
    assert ("drawn phantoms, no radiographs" in metadata.description) == (kind == "phantoms")
    data = path.read_bytes()
    assert [secret for secret in secrets if secret.encode() in data] == []
    return card


def damage(shards: Shards, row: int) -> str:
    """Flip a bit in the pixels of a row's sample and return the name of its tar."""
    for name in shards.tar_names():
        for image, *_ in read_index((shards.folder / name).with_suffix(".idx")):
            if image.row == row:
                with open(shards.folder / name, "r+b") as file:
                    file.seek(image.offset + image.size // 2)
                    byte = file.read(1)[0]
                    file.seek(image.offset + image.size // 2)
                    file.write(bytes([byte ^ 1]))
                return name
    raise AssertionError(f"row {row} has no sample")


class Markup(HTMLParser):
    """Parser that fails where tags do not nest, and collects elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def local_only(path: Path) -> Markup:
    """Assert that a page with radiographs says LOCAL ONLY in its first lines, title and banner, and loads no resource.

    Its only links lead to existing pages of the same gallery.
    """
    text = path.read_text(encoding="utf-8")
    assert "LOCAL ONLY" in "".join(text.splitlines()[:2]), text[:200]
    assert re.search(r"<title>LOCAL ONLY", text)
    assert re.search(r'<p class="banner"[^>]*>LOCAL ONLY', text)
    assert not re.search(r"https?:|<script|url\(|@import|<link", text)
    page = Markup(text)
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.elements:
        for key in ("src", "href"):
            where = values.get(key)
            if where is None or re.match("data:image/(png|jpeg);base64,", where) or where.removeprefix("#") in ids:
                continue
            assert tag == "a", where
            assert re.fullmatch(r"(\.\./)?gallery\.html|(gallery/)?page-\d+\.html", where), where
            assert (path.parent / where).is_file(), where
        assert tag != "img" or values.get("alt")
        assert tag != "svg" or values.get("aria-label")
    return page


def holds_no_radiograph(path: Path) -> None:
    """Assert that a page that may leave the machine has no picture except drawn lines."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"<img|<image|data:image|<canvas|<object|<embed", text)
    assert "LOCAL ONLY" not in re.sub(r"gallery[^<]*LOCAL ONLY[^<]*", "", text)

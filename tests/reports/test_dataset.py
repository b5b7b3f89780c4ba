"""Test describe: the JSON next to its page, and the contact sheet (optional, stratified, seeded, LOCAL ONLY)."""

import base64
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import laws
from helpers.commands import run
from helpers.markup import check_names_are_text, renamed_shards
from PIL import Image

from mura_dist.cli.main import DONE, main
from mura_dist.data import mura
from mura_dist.data.radiograph import UnreadableFileError
from mura_dist.data.shards.reader import Shards
from mura_dist.reports import contact_sheet, dataset


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_describe_writes_page_and_json(kind: str, phantoms: Path, shard_folder: Path, tmp_path: Path) -> None:
    description = dataset.describe(phantoms if kind == "folder" else shard_folder, tmp_path / "a.b.html")
    numbers = json.loads((tmp_path / "a.b.json").read_bytes())
    assert numbers == description | {"terms": mura.TERMS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.html", "a.b.json"]  # no contact sheet by default
    laws.holds_no_radiograph(tmp_path / "a.b.html")
    assert "This page holds no radiograph." in (tmp_path / "a.b.html").read_text()


def test_counts_and_views_match_manifest(shard_folder: Path, tmp_path: Path) -> None:
    frame = Shards.open(shard_folder).manifest.frame
    description = dataset.describe(shard_folder, tmp_path / "d.html")
    views = Counter(frame["study"])
    types = dict(zip(frame["study"], frame["study_type"], strict=True))
    for name, statistics in description["views_by_study_type"].items():
        num_views = [views[study] for study in views if types[study] == name]
        assert (statistics["num_studies"], statistics["most"]) == (len(num_views), max(num_views))
        assert statistics["mean"] == pytest.approx(np.mean(num_views))
    assert set(description["views_by_study_type"]) == set(types.values())
    for line in description["by_study_type"]:
        of_type = frame[(frame["split"] == line["split"]) & (frame["study_type"] == line["study_type"])]
        for label, name in enumerate(("normal", "abnormal")):
            of_label = of_type[of_type["label"] == label]
            assert line[f"{name}_radiographs"] == len(of_label)
            assert line[f"{name}_studies"] == of_label["study"].nunique()


def test_defects_have_examples(phantoms: Path, tmp_path: Path) -> None:
    for number in range(5):
        study_folder = tmp_path / "data" / "train" / "XR_HAND" / f"patient0000{number}" / "study1_negative"
        study_folder.mkdir(parents=True)
        Image.new("L", (40, 50), 30 + number).save(study_folder / "image1.png")
        (study_folder / "._image1.png").write_bytes(b"\0\5\x16\7")
    description = dataset.describe(tmp_path / "data", tmp_path / "d.html")
    assert description["defects"]["not a radiograph"] == 5
    examples = description["defect_examples"]["not a radiograph"]
    assert examples == [f"train/XR_HAND/patient0000{number}/study1_negative/._image1.png" for number in range(3)]
    text = (tmp_path / "d.html").read_text()
    assert examples[0] in text
    assert "and 2 more" in text


def sheet_images(path: Path) -> list[tuple[str, np.ndarray]]:
    """Return alternative text and pixels of each radiograph on the sheet."""
    images = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', path.read_text())
    return [(alt, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))) for data, alt in images]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_contact_sheet_content(kind: str, phantoms: Path, shard_folder: Path, tmp_path: Path, capsys) -> None:
    folder = phantoms if kind == "folder" else shard_folder
    out = tmp_path / "d.html"
    assert main(["describe", str(folder), "--out", str(out), "--contact-sheet"]) == DONE
    output = capsys.readouterr().out
    sheet = tmp_path / "d-contact-sheet.html"
    assert f"contact sheet (LOCAL ONLY, contains radiographs): {sheet}" in output
    assert f"numbers: {tmp_path / 'd.json'}" in output
    page = laws.local_only(sheet)
    laws.holds_no_radiograph(out)
    assert "computer drawings" in page.text
    frame = Shards.open(shard_folder).manifest.frame
    studies = frame.drop_duplicates("study").groupby(["study_type", "label"]).size()
    counts = Counter(re.match(r"(\w+), (\w+),", alt).groups() for alt, _ in sheet_images(sheet))
    assert counts == {
        (mura.display_name(study_type), ("normal", "abnormal")[label]): min(num, contact_sheet.NUM)
        for (study_type, label), num in studies.items()
    }
    assert all(max(pixels.shape) <= contact_sheet.SIDE_PX for _, pixels in sheet_images(sheet))
    assert len({pixels.tobytes() for _, pixels in sheet_images(sheet)}) > 20


def test_contact_sheet_depends_on_seed_only(shard_folder: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 0, 1):
        dataset.describe(shard_folder, tmp_path / "d.html", with_contact_sheet=True, seed=seed)
        texts.append((tmp_path / "d-contact-sheet.html").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_select_thumbnails_one_per_study_and_counts_skipped() -> None:
    """Each thumbnail equals the pixels of its row, and each row is of another study."""
    frame = pd.DataFrame(
        [("train", "XR_HIP", f"p{i // 3}", f"s{i // 3}", i % 3, 1, f"f{i}") for i in range(60)],
        columns=["split", "study_type", "patient", "study", "view", "label", "path"],
    )
    corrupt_rows = {row for row in frame.index if row // 3 < 15}  # all views of 15 of the 20 studies

    def pixels(row: int) -> np.ndarray:
        if row in corrupt_rows:
            raise UnreadableFileError("unreadable", "torn")
        return np.full((400, 200), row, np.uint8)

    thumbnails, num_skipped = contact_sheet.select_thumbnails(frame, pixels, 4, seed=5)
    assert len({thumbnail.row // 3 for thumbnail in thumbnails}) == len(thumbnails) == 4
    assert all(
        thumbnail.pixels.shape == (160, 80) and (thumbnail.pixels == thumbnail.row).all() for thumbnail in thumbnails
    )
    assert 0 < num_skipped <= 15
    all_readable, all_skipped = contact_sheet.select_thumbnails(frame, pixels, 99, seed=5)
    assert (len(all_readable), all_skipped) == (5, 15)
    text = contact_sheet.page("t", frame, pixels, drawings=False, num=99)
    assert "abnormal: 5 of 20 studies; 15 could not be read" in text
    assert "drawings" not in text


def test_contact_sheet_skips_corrupt_samples(shard_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shard_folder, tmp_path / "s")
    frame = Shards.open(tmp_path / "s").manifest.frame
    [study_type, label] = frame.loc[0, ["study_type", "label"]]
    rows = frame.index[(frame["study_type"] == study_type) & (frame["label"] == label)]
    for row in rows[1:]:
        laws.damage(Shards.open(tmp_path / "s"), row)
    dataset.describe(tmp_path / "s", tmp_path / "d.html", with_contact_sheet=True)
    alts = [alt for alt, _ in sheet_images(tmp_path / "d-contact-sheet.html")]
    name = ("normal", "abnormal")[label]
    assert sum(alt.startswith(f"{mura.display_name(study_type)}, {name}") for alt in alts) <= 1
    assert "could not be read" in (tmp_path / "d-contact-sheet.html").read_text()


def test_describe_rejects_invalid_out(shard_folder: Path, tmp_path: Path, capsys) -> None:
    laws.refusal(
        capsys, ["describe", shard_folder, "--out", tmp_path / "d.json"], "d.json", "reserved for the numbers", "d.html"
    )
    laws.refusal(
        capsys, ["describe", shard_folder, "--out", tmp_path], f"--out {tmp_path}", "is a folder", "Name a page"
    )
    assert list(tmp_path.iterdir()) == []


def test_describe_imports_no_torch(shard_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mura_dist.reports.dataset import describe; "
        f"describe(Path({str(shard_folder)!r}), Path({str(tmp_path / 'd.html')!r}), with_contact_sheet=True); "
        "print([n for n in ('torch', 'matplotlib', 'cv2', 'onnx') if n in sys.modules])"
    )
    assert run("python", "-c", code).stdout.strip() == "[]"


def test_data_set_names_are_escaped(shard_folder: Path, tmp_path: Path) -> None:
    def write(rename: Callable[[str], str], out: Path) -> list[Path]:
        shards = renamed_shards(shard_folder, out / "shards", rename)
        dataset.describe(shards, out / "page.html", with_contact_sheet=True)
        return [out / "page.html", dataset.contact_sheet_path(out / "page.html")]

    check_names_are_text(write, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("arguments", [(), ("--shared",)])
def test_pages_are_readable_by_owner_only_by_default(
    arguments: tuple[str, ...], shard_folder: Path, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        command = ["describe", str(shard_folder), "--contact-sheet", "--out", str(tmp_path / "a.html"), *arguments]
        assert main(command) == DONE
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644 if arguments else 0o600}

"""duplicate_policy.py: what is dropped from train, who stays together when tune is cut, and that shards record it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import laws
from helpers.ranks import DIFFERS, LAUNCHERS, start_rank
from PIL import Image

from mura_dist.core.errors import RunError, UserError
from mura_dist.data.manifest import Manifest, cut_tune
from mura_dist.data.shards import convert as conversion
from mura_dist.data.shards.convert import convert
from mura_dist.data.source import duplicates
from mura_dist.data.source import report as audit
from mura_dist.data.source.duplicate_policy import apply_policy, check_policy
from mura_dist.data.source.scan import Scan, scan


def view(split: str, patient: int, image: int = 1, study: int = 1) -> str:
    return f"{split}/XR_HAND/patient{patient:05d}/study{study}_{('negative', 'positive')[patient % 2]}/image{image}.png"


def data_set(root: Path, contents: dict[str, str]) -> Path:
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return root


CONTENTS = {
    view("train", 1): "of valid",
    view("train", 1, 2): "own",
    view("train", 2): "of valid",  # all that this patient has
    view("train", 3): "twice in train",
    view("train", 4): "twice in train",
    view("train", 4, 2): "of three",
    view("train", 5): "of three",
    view("train", 6): "of three",
    view("train", 7): "of test",
    view("train", 7, 1, 2): "more",
    view("valid", 11): "of valid",
    view("valid", 12): "of valid",
    view("test", 21): "of test",
}


@pytest.fixture
def scanned(tmp_path: Path) -> Scan:
    return scan(data_set(tmp_path / "set", CONTENTS))


def test_keep_changes_nothing(scanned: Scan) -> None:
    assert apply_policy(scanned, "keep") is scanned
    assert scanned.resolution.policy == "keep"


def test_drop_train_drops_each_copy_of_another_split(scanned: Scan) -> None:
    resolved = apply_policy(scanned, "drop-train")
    dropped = (
        (view("train", 1), view("valid", 11)),
        (view("train", 2), view("valid", 11)),
        (view("train", 7), view("test", 21)),
    )
    assert resolved.resolution.dropped == dropped
    paths = resolved.manifest.frame["path"].tolist()
    assert sorted(paths) == sorted(CONTENTS.keys() - {path for path, _ in dropped})
    assert resolved.manifest.rows("train").tolist() == list(range(7))
    assert resolved.sizes.keys() == set(paths)
    assert resolved.defects.keys() == {"duplicate within a split"}
    pairs = [(view("train", 3), view("train", 4)), (view("valid", 11), view("valid", 12))]
    pairs += [(view("train", 4, 2), view("train", n)) for n in (5, 6)]
    assert resolved.duplicates == sorted(pairs)
    assert resolved.duplicates == duplicates.find_pairs(
        conversion.storage.open_storage(resolved.root), resolved.sizes, list(resolved.sizes)
    ), "as a scan of what is left has it"


def test_a_report_counts_what_is_dropped(scanned: Scan) -> None:
    resolved = apply_policy(scanned, "drop-train")
    report = audit.report(resolved, resolved.manifest, ())
    assert report["duplicates"] == {
        "policy": "drop-train",
        "dropped_from_train": [f"{path} = {copy}" for path, copy in resolved.resolution.dropped],
        "num_studies": 3,
        "num_studies_without_radiographs": 2,
        "patients_kept_together": [],
    }
    lines = audit.text(report).splitlines()
    what = "3 radiographs of 3 studies, 2 of which have no other"
    assert f"duplicates dropped from train (--duplicates drop-train): {what}" in lines
    assert not any(line.startswith("duplicate across splits") for line in lines)


def test_group_names_the_patients_that_duplicates_connect(scanned: Scan) -> None:
    resolved = apply_policy(scanned, "group")
    groups = ((1, 2), (3, 4, 5, 6))
    assert resolved.resolution.groups == tuple(tuple(f"patient{n:05d}" for n in group) for group in groups)
    assert (resolved.manifest, resolved.defects) == (scanned.manifest, scanned.defects)
    report = audit.report(resolved, resolved.manifest, ())
    assert report["duplicates"]["patients_kept_together"] == [list(group) for group in resolved.resolution.groups]
    assert "patients kept together (--duplicates group): 6 of train in 2 groups" in audit.text(report).splitlines()


def test_keep_is_said(scanned: Scan) -> None:
    report = audit.report(scanned, scanned.manifest, ())
    [line] = [line for line in audit.text(report).splitlines() if line.startswith("duplicates kept")]
    assert line.startswith(
        "duplicates kept (--duplicates keep); drop-train drops train's copies of valid's, group keeps "
    )
    del report["duplicates"]  # as an earlier version wrote it
    assert line in audit.text(report).splitlines()


def test_a_train_of_nothing_but_copies_is_refused(tmp_path: Path) -> None:
    root = data_set(tmp_path, {view("train", n): "same" for n in (1, 2)} | {view("valid", 3): "same"})
    with pytest.raises(UserError) as refusal:
        apply_policy(scan(root), "drop-train")
    assert str(refusal.value) == (
        f"--duplicates drop-train: all 2 radiographs of train are copies of radiographs in another split "
        f"(first: {view('train', 1)} = {view('valid', 3)}). Give another train, or --duplicates keep."
    )
    with pytest.raises(
        UserError, match=r"--duplicates 'drop': must be one of keep, drop-train, group\. The default is keep"
    ):
        check_policy("drop")


# ---- the cut of tune


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_group_parts_no_duplicates(fraction: float) -> None:
    """Of drawn patients and drawn duplicates, whatever the seed; tune has the patients it is to have, about."""
    rng = np.random.default_rng(0)
    paths = {n: view("train", n) for n in range(400)}
    manifest = Manifest.from_radiographs(
        radiograph for path in paths.values() if (radiograph := conversion.mura.parse(path))
    )
    sizes = dict.fromkeys(paths.values(), 1)
    parted = 0
    for seed in range(5):
        pairs = [(paths[int(a)], paths[int(b)]) for a, b in np.sort(rng.permutation(400)[:80].reshape(-1, 2))]
        pairs += [(paths[0], paths[n]) for n in range(200, 240)]  # a black picture that 41 patients have
        complete = Scan(Path("x"), manifest, {}, False, {}, [], sorted(set(pairs)), sizes)
        cut = cut_tune(manifest, fraction, seed, apply_policy(complete, "group").resolution.groups).frame
        split = dict(zip(cut["path"], cut["split"], strict=True))
        assert [pair for pair in pairs if split[pair[0]] != split[pair[1]]] == []
        assert abs((cut["split"] == "tune").sum() - 400 * fraction) <= 41 * fraction + 12
        assert split[paths[0]] == "train", "a group larger than 1/fraction"
        alone = cut_tune(manifest, fraction, seed).frame
        split = dict(zip(alone["path"], alone["split"], strict=True))
        parted += sum(split[a] != split[b] for a, b in pairs)
    assert parted > 0


def test_connected_names_are_those_of_a_graph() -> None:
    rng = np.random.default_rng(1)
    for num_pairs in (0, 1, 5, 20, 60):
        pairs = [(f"{a:02d}", f"{b:02d}") for a, b in rng.integers(0, 40, (num_pairs, 2)).tolist()]
        reach = np.eye(40, dtype=bool)
        for a, b in pairs:
            reach[int(a), int(b)] = reach[int(b), int(a)] = True
        for _ in range(6):
            reach = reach @ reach
        groups = {tuple(f"{n:02d}" for n in np.flatnonzero(row)) for row in reach}
        assert duplicates.connected_groups(pairs) == sorted(list(group) for group in groups if len(group) > 1)


# ---- shards


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CONTENTS, drawn."""
    root = tmp_path_factory.mktemp("pictures")
    for path, content in CONTENTS.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(list(content.encode())).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(root / path)
    return root


@pytest.mark.parametrize("policy", [pytest.param("keep", marks=pytest.mark.slow), "drop-train", "group"])
def test_shards_do_not_depend_on_workers_and_ranks(
    policy: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "SAMPLES_PER_SHARD", 3)
    monkeypatch.setattr(conversion, "SILENCE_S", 0.1)
    options: dict[str, Any] = {"size": 32, "tune": 0.3, "duplicates": policy}
    index = convert(pictures, tmp_path / "alone", workers=1, **options)
    assert index is not None
    report = json.loads((tmp_path / "alone" / "report.json").read_bytes())
    assert report["duplicates"]["policy"] == policy
    assert bool(report["duplicates_of_train_in_tune"]) is (policy != "group")
    assert ("duplicate across splits" in index["defects"]) is (policy != "drop-train")
    assert index["manifest"]["num_rows"] == len(CONTENTS) - 3 * (policy == "drop-train")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):  # the second comes when all is done, and has the same plan
        monkeypatch.setenv("RANK", rank)
        convert(pictures, tmp_path / "shared", workers=2, **options)
    laws.same_bytes(tmp_path / "alone", tmp_path / "shared", leave_out=DIFFERS)


@pytest.mark.slow
def test_ranks_that_share_a_conversion_drop_the_same(pictures: Path, tmp_path: Path) -> None:
    convert(pictures, tmp_path / "alone", size=32, workers=1, duplicates="drop-train")
    script = tmp_path / "shards.py"
    script.write_text("from mura_dist.cli.main import main\nif __name__ == '__main__':\n    main()\n")
    argv = (
        "shards",
        pictures,
        tmp_path / "shared",
        "--size",
        32,
        "--workers",
        1,
        "--quiet",
        "--duplicates",
        "drop-train",
    )
    ranks = [start_rank(script, LAUNCHERS["Slurm"](rank, 2), *argv) for rank in (1, 0)]
    output = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], output
    laws.same_bytes(tmp_path / "alone", tmp_path / "shared", leave_out=DIFFERS)


def test_another_choice_is_refused_into_the_same_folder(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    index = convert(pictures, out, size=32, workers=1)
    argv = ["shards", pictures, out, "--size", "32", "--workers", "1", "--quiet", "--duplicates"]
    for policy in ("drop-train", "group"):
        differs = f"holds shards with duplicates=keep, this conversion has duplicates={policy}"
        laws.refusal(capsys, [*argv, policy], differs, "Give another folder")
    laws.refusal(
        capsys,
        [*argv, "drop"],
        "--duplicates 'drop' (did you mean drop-train?): must be one of keep, drop-train, group",
    )
    for name in ("conversion.json", "report.json"):  # as an earlier version wrote them
        actual = json.loads((out / name).read_bytes())
        del (actual["plan"] if name == "conversion.json" else actual)["duplicates"]
        (out / name).write_text(json.dumps(actual))
    assert convert(pictures, out, size=32, workers=1) == index
    laws.refusal(capsys, [*argv, "group"], "duplicates=keep, this conversion has duplicates=group")


def test_strict_takes_what_is_dropped_for_mended(tmp_path: Path) -> None:
    root = data_set(tmp_path / "set", {view("train", n): str(n % 3) for n in (1, 2)} | {view("valid", 4): "1"})
    with pytest.raises(RunError, match="--strict: duplicate across splits: 1 "):
        convert(root, tmp_path / "out", size=32, workers=1, strict=True)
    with pytest.raises(RunError, match="--strict: 2 files cannot be read"):  # they are texts: the scan was passed
        convert(root, tmp_path / "out", size=32, workers=1, strict=True, duplicates="drop-train")

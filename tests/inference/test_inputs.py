"""Test the inputs of a prediction: folders, files, or several of both, and the folder that paths are relative to."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import laws
from helpers.commands import torchrun
from PIL import Image

from mura_dist.cli.main import DONE, main
from mura_dist.core.errors import UserError
from mura_dist.inference import file_list
from mura_dist.inference.inputs import Inputs
from mura_dist.inference.predict import predict


@pytest.fixture
def source_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create six files on three levels, two of them with one name, and make their folder the working directory."""
    names = ("a.png", "b.png", "x/a.png", "x/y/c.png", "x/y/d.png", "z/a.png")
    for number, name in enumerate(names):
        path = tmp_path / "ward" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path / "ward")
    return tmp_path / "ward"


def relative_paths(inputs: Inputs, database: Path) -> set[str]:
    return set(file_list.list_files(inputs.directory, database, members=inputs.members).printable_paths())


CASES = {
    ("a.png",): (".", {"a.png"}),
    ("x/y/c.png",): ("x/y", {"c.png"}),
    ("a.png", "b.png"): (".", {"a.png", "b.png"}),
    ("a.png", "x"): (".", {"a.png", "x/a.png", "x/y/c.png", "x/y/d.png"}),
    ("x/a.png", "z/a.png"): (".", {"x/a.png", "z/a.png"}),
    ("x/y/d.png", "x/a.png"): ("x", {"y/d.png", "a.png"}),
    ("x/y", "z"): (".", {"x/y/c.png", "x/y/d.png", "z/a.png"}),
    ("x", "x/y", "x/y/c.png"): ("x", {"a.png", "y/c.png", "y/d.png"}),
    ("x", "x"): ("x", {"a.png", "y/c.png", "y/d.png"}),
    ("x/../a.png", "./a.png"): (".", {"a.png"}),
    (".", "x/a.png"): (".", {"a.png", "b.png", "x/a.png", "x/y/c.png", "x/y/d.png", "z/a.png"}),
}


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_paths_are_relative_to_the_deepest_common_folder(
    arguments: tuple[str, ...], source_folder: Path, tmp_path: Path
) -> None:
    """Each file occurs once, for all orders and forms of the arguments."""
    folder, paths = CASES[arguments]
    for number, ordered in enumerate(itertools.permutations(arguments)):
        inputs = Inputs.parse([Path(word) for word in ordered])
        assert inputs.directory.samefile(source_folder / folder)
        assert relative_paths(inputs, tmp_path / f"list{number}") == paths
        absolute = Inputs.parse([source_folder / word for word in ordered])
        assert relative_paths(absolute, tmp_path / f"absolute{number}") == paths


def test_single_folder_keeps_its_spelling(source_folder: Path) -> None:
    assert Inputs.parse([Path("x/../x")]) == Inputs(Path("x/../x"), ("",))


def test_parent_of_a_link_is_resolved_as_the_system_does(source_folder: Path, tmp_path: Path) -> None:
    """ward/x/y/.. through a link from outside is ward/x, not the folder of the link."""
    (tmp_path / "link").symlink_to(source_folder / "x" / "y")
    inputs = Inputs.parse([tmp_path / "link" / ".." / "a.png", source_folder / "b.png"])
    assert relative_paths(inputs, tmp_path / "list") == {"x/a.png", "b.png"}


def test_links_keep_their_own_names(source_folder: Path, tmp_path: Path) -> None:
    (source_folder / "link.png").symlink_to("a.png")
    (source_folder / "linked").symlink_to("x/y")
    inputs = Inputs.parse([Path("link.png"), Path("linked")])
    assert relative_paths(inputs, tmp_path / "list") == {"link.png", "linked/c.png", "linked/d.png"}


def test_missing_and_remote_inputs_are_refused(source_folder: Path) -> None:
    cases = {
        ("no.png",): r"^no\.png: no such file or folder\. Give radiographs, or folders of them\.$",
        ("a.png", "1.png", "2.png", "3.png", "4.png"): r"^1\.png, 2\.png, 3\.png and 1 more: no such file or folder",
        (
            "s3://key:secret@bucket/a.png",
        ): r"^s3://\*\*\*@bucket/a\.png: predict reads only files of this machine\. Copy",
    }
    for arguments, text in cases.items():
        with pytest.raises(UserError, match=text):
            Inputs.parse(arguments)


def logits_by_path(out: Path, name: str = "predictions") -> dict[str, float]:
    return pd.read_csv(out / f"{name}.csv").set_index("path")["logit"].to_dict()


def test_several_inputs_give_one_prediction(model: Path, source_folder: Path, tmp_path: Path, capsys) -> None:
    """The logits equal those of the complete folder. Order and spelling of the inputs do not change the run."""
    all_inputs = tmp_path / "whole"
    predict(model, source_folder, all_inputs)
    out, arguments = tmp_path / "some", ["b.png", "x/y", "z/a.png"]
    assert main(["predict", str(model), *arguments, "--out", str(out), "--overlays"]) == DONE
    paths = {"b.png", "x/y/c.png", "x/y/d.png", "z/a.png"}
    assert logits_by_path(out) == {path: logit for path, logit in logits_by_path(all_inputs).items() if path in paths}
    assert {path.relative_to(out / "overlays").as_posix() for path in out.rglob("*.png")} == {
        f"{path}.png" for path in paths
    }
    before = (out / "predict.json").read_bytes()
    same_inputs = [str(source_folder / word) for word in reversed(arguments)]
    assert main(["predict", str(model), *same_inputs, "--out", str(out), "--overlays"]) == DONE
    assert (out / "predict.json").read_bytes() == before
    capsys.readouterr()
    line = laws.refusal(
        capsys, ["predict", model, *arguments, "a.png", "--out", out, "--overlays"], "holds a run with num_files=4"
    )
    assert "this one has num_files=5" in line


def test_input_that_is_no_image_is_a_failure(model: Path, source_folder: Path, tmp_path: Path) -> None:
    (source_folder / "note.txt").write_text("x")
    summary = predict(model, ["note.txt", "a.png"], tmp_path / "out")
    assert summary is not None
    assert (summary["num_radiographs"], summary["failures_by_code"]) == (1, {"not_image": 1})
    assert list(pd.read_csv(tmp_path / "out" / "failures.csv")["path"]) == ["note.txt"]


def test_output_next_to_input_files_is_allowed(model: Path, source_folder: Path) -> None:
    """OUT is refused where it is itself an input folder."""
    predict(model, ["a.png", "b.png"], Path("."))
    assert set(logits_by_path(source_folder)) == {"a.png", "b.png"}
    with pytest.raises(UserError, match=r"^--out x is one of the inputs. Give another folder.$"):
        predict(model, ["a.png", "x"], Path("x"))
    with pytest.raises(UserError, match=r"^--out \. is the directory of radiographs itself. Give another folder.$"):
        predict(model, [".", "x/a.png"], Path("."))  # holds a prediction and the radiographs


@pytest.mark.parametrize("arguments", [("a.png", "b.png", "x", "z"), ("a.png",), ("x",)], ids=" ".join)
def test_output_folder_among_the_inputs_is_skipped(
    arguments: tuple[str, ...], model: Path, source_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second `predict M * --out predictions` resumes or finds the run finished, with the same bytes."""
    out = Path("predictions")
    assert main(["predict", str(model), *arguments, "--out", str(out)]) == DONE
    contents = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for spelling in ("predictions", "./predictions/", str(source_folder / "predictions")):
        assert main(["predict", str(model), *arguments, spelling, "--out", str(out)]) == DONE
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == contents
    laws.refusal(capsys, ["predict", model, out, "--out", out], "is the directory of radiographs itself")


def test_unfinished_prediction_resumes_with_output_among_inputs(model: Path, source_folder: Path) -> None:
    out, arguments = Path("predictions"), ["a.png", "b.png"]
    predict(model, arguments, out)
    (out / ".parts").mkdir()
    plan = json.loads((out / "predict.json").read_text())["plan"]
    (out / ".parts" / "plan.json").write_text(json.dumps(plan))
    (out / "predict.json").unlink()  # not finished
    predict(model, [*arguments, "predictions"], out)
    assert set(logits_by_path(out)) == set(arguments)


def test_files_of_one_study_keep_the_study_name(model: Path, phantoms: Path, tmp_path: Path) -> None:
    views = sorted(next(phantoms.rglob("valid/*/*/study1*")).iterdir())
    predict(model, views, tmp_path / "out")
    studies = pd.read_csv(tmp_path / "out" / "studies.csv")
    assert list(studies["study"]) == [views[0].parent.relative_to(phantoms).as_posix()]
    assert list(studies["num_views"]) == [len(views)]


@pytest.mark.usefixtures("own_site_key")
def test_key_table_maps_pseudonyms_of_several_inputs(model: Path, source_folder: Path, tmp_path: Path) -> None:
    """KEYTABLE may lie next to input files, but not in an input folder."""
    arguments = ["predict", str(model), "a.png", "x", "--out", str(tmp_path / "out"), "--pseudonyms"]
    assert main([*arguments, "x/keys.csv"]) == 2
    assert main([*arguments, "keys.csv"]) == DONE
    keys = pd.read_csv(source_folder / "keys.csv").set_index("pseudonym")["path"]
    assert {keys[name] for name in logits_by_path(tmp_path / "out")} == {"a.png", "x/a.png", "x/y/c.png", "x/y/d.png"}
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.*"))
    assert "a.png" not in text


@pytest.mark.slow
def test_tables_of_three_ranks_identical_for_several_inputs(model: Path, source_folder: Path, tmp_path: Path) -> None:
    arguments = ["a.png", "x", "z/a.png"]
    predict(model, arguments, tmp_path / "one")
    done = torchrun(3, "mura_dist.predict", model, *arguments, "--out", tmp_path / "three", cwd=source_folder)
    assert done.returncode == 0, done.stderr
    for name in ("predictions.csv", "studies.csv", "failures.csv"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    plans = [json.loads((tmp_path / name / "predict.json").read_bytes())["plan"] for name in ("one", "three")]
    assert plans[0] == plans[1]

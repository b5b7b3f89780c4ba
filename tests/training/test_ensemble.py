"""Test ensembles: the formula, the selection of members, and one model from list to predictions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import laws
from helpers.cache import Cache
from helpers.commands import torchrun, train

from mura_dist.cli.main import DONE, main
from mura_dist.core.errors import RunError, UserError
from mura_dist.data.shards.reader import Shards
from mura_dist.inference.export import onnx
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.models import model_list
from mura_dist.models.card import Card, EnsembleMember, TrainedOn
from mura_dist.models.densenet import build
from mura_dist.models.ensemble import Ensemble, mean_probability_logit
from mura_dist.models.model_list import ModelList
from mura_dist.training.weights import ModelWeights

S = 64
TOP = 4  # of three checkpoints a run: no run alone can fill it
EXTREMES = (-100.0, -30.0, -5.0, -1.0, 0.0, 1e-3, 2.0, 17.0, 100.0)


def log_odds_of_mean(logits: np.ndarray) -> np.ndarray:
    """Return the logit of the mean probability in float64, (K, ...) -> (...)."""
    z = np.asarray(logits, np.float64)
    return np.log((1 / (1 + np.exp(-z))).mean(axis=0)) - np.log((1 / (1 + np.exp(z))).mean(axis=0))


def noise(number: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (number, 1, S, S), dtype=np.uint8))


def tiny(seed: int, bias: float = 0.0) -> torch.nn.Module:
    """Return a small network whose BatchNorm has seen data, so that its output depends on the image."""
    network = build("tiny", seed=seed)
    with torch.no_grad():
        network(noise(8))
        network.classifier.bias += bias
    return network.eval()


def card_of(num_members: int) -> Card:
    members = [
        EnsembleMember(
            run="run", checkpoint=f"step-{number:08d}", architecture="tiny", select_loss=0.5, sha256=f"{number:064x}"
        )
        for number in range(num_members)
    ]
    return Card(
        size=S,
        study_types=["XR_HAND"],
        trained_on=TrainedOn(kind="phantoms", manifest_sha256="0" * 64, num_radiographs=9),
        selected_on="tune",
        recipe={},
        checkpoint=model_list.format_title(members) if members else "step-00000001",
        members=members,
    )


# ---- the formula


@pytest.mark.parametrize("num_members", [2, 3, 5])
def test_ensemble_logit_is_that_of_the_mean_probability(num_members: int) -> None:
    grid = np.stack(np.meshgrid(*[EXTREMES] * num_members)).reshape(num_members, -1)
    logit = mean_probability_logit(torch.from_numpy(grid.astype(np.float32))).numpy()
    assert logit.dtype == np.float32
    np.testing.assert_allclose(logit, log_odds_of_mean(grid), rtol=1e-5, atol=1e-5)


def test_ensemble_of_one_is_bit_identical_to_its_member() -> None:
    member, images = tiny(1), noise(3)
    with torch.inference_mode():
        for predicted, expected in zip(Ensemble([member]).eval()(images), member(images), strict=True):
            assert torch.equal(predicted, expected)


def test_ensemble_of_different_architectures() -> None:
    networks = [tiny(1, bias=1.0), build("densenet121", seed=2).eval()]
    images = noise(2)
    with torch.inference_mode():
        logit, cells = Ensemble(networks).eval()(images)
        outputs = [network(images) for network in networks]
    expected = log_odds_of_mean(np.stack([each.numpy() for each, _ in outputs]))
    np.testing.assert_allclose(logit.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(cells.numpy(), np.mean([each.numpy() for _, each in outputs], axis=0), atol=1e-5)


# ---- the file


EXTREME = [(-100.0, 100.0), (100.0, 100.0), (-100.0, -100.0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "biases",
    [
        (-2.0, 3.0),
        EXTREME[0],
        *(pytest.param(each, marks=pytest.mark.nightly(part="training")) for each in EXTREME[1:]),
    ],
)
def test_exported_ensemble_averages_probabilities(tmp_path: Path, biases: tuple[float, ...]) -> None:
    networks = [tiny(seed, bias) for seed, bias in enumerate(biases)]
    report = onnx.export(Ensemble(networks).eval(), card_of(2), tmp_path / "two.onnx")
    assert report.max_logit_difference <= 1e-4
    images = noise(3)
    with torch.inference_mode():
        expected = log_odds_of_mean(np.stack([network(images)[0].numpy() for network in networks]))
    np.testing.assert_allclose(
        OnnxModel.load(tmp_path / "two.onnx").logits(images.numpy()), expected, rtol=1e-5, atol=1e-4
    )
    assert [path.name for path in tmp_path.iterdir()] == ["two.onnx"]
    model = OnnxModel.load(tmp_path / "two.onnx")
    for number in (*range(10), 64):
        logit, cells = model.outputs(noise(number).numpy())
        assert (logit.shape, cells.shape[0]) == ((number,), number)


@pytest.mark.slow
def test_export_checks_the_map_mean_of_a_single_checkpoint_only(tmp_path: Path) -> None:
    pair = Ensemble([tiny(0, -2.0), tiny(1, 3.0)]).eval()
    with pytest.raises(RunError, match=r"^mean of activation_map of the exported model"):
        onnx.export(pair, card_of(0), tmp_path / "none.onnx")
    assert not list(tmp_path.iterdir())


def test_ensemble_over_2_gib_is_refused(tmp_path: Path) -> None:
    wide = torch.nn.Linear(2**15, 2**14, bias=False, device="meta")  # 2 GiB that nobody has to hold
    with pytest.raises(UserError, match=r"^ensemble of 2: .*2\.15 GB \(limit .*: 2\.15 GB\)\. Give fewer.*--top"):
        onnx.export(Ensemble([wide]).eval(), card_of(2), tmp_path / "wide.onnx")


# ---- two runs, one model


@pytest.fixture(scope="module")
def runs(cache: Cache, shard_folder: Path) -> list[Path]:
    """Two runs with three evaluated checkpoints each, a list of both, its report on valid and its ONNX file."""

    def make(parent: Path) -> None:
        for seed in (0, 1):
            result = train(1, shard_folder, parent / f"seed{seed}", f"seed={seed}", "epochs=3", "keep_best=3")
            assert result.returncode == 0, result.stderr
        path = write_list([parent / "seed0", parent / "seed1"], parent / "four.json")
        assert main(["evaluate", str(path), str(shard_folder), "--quiet"]) == DONE
        assert main(["export", str(path), "--triton", str(parent / "triton")]) == DONE

    parent = cache.path("ensemble", make)
    return [parent / "seed0", parent / "seed1"]


def write_list(runs: list[Path], out: Path, top: int = TOP) -> Path:
    assert main(["ensemble", *map(str, runs), "--out", str(out), "--top", str(top)]) == DONE
    return out


@pytest.fixture(scope="module")
def list_path(runs: list[Path]) -> Path:
    return runs[0].parent / "four.json"


@pytest.fixture
def run_copies(runs: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of the two runs that a test may change."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in runs]


def state_losses(folder: Path) -> dict[tuple[str, str], float]:
    states = {path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("checkpoints/step-*/state.json")}
    return {
        (folder.name, name): state["select_loss"] for name, state in states.items() if state["select_loss"] is not None
    }


def test_members_have_the_lowest_losses(list_path: Path, runs: list[Path]) -> None:
    losses = state_losses(runs[0]) | state_losses(runs[1])
    assert len(losses) >= 6
    members = [(member.run, member.checkpoint) for member in ModelList.load(list_path).members]
    assert members == sorted(losses, key=losses.__getitem__)[:TOP]
    assert {name for name, _ in members} == {"seed0", "seed1"}


def test_ensemble_prints_its_members(runs: list[Path], tmp_path: Path, capsys) -> None:
    out = write_list(runs, tmp_path / "list.json", top=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: 2 members by their loss on tune"
    for line, member in zip(lines[1:], ModelList.load(out).members, strict=True):
        assert line.split() == [f"{member.select_loss:.6f}", "tiny", member.run, member.checkpoint]


def test_order_of_runs_does_not_matter(list_path: Path, runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(list_path.parent, tmp_path / "copy")
    again = write_list([tmp_path / "copy" / folder.name for folder in runs[::-1]], tmp_path / "copy" / "reversed.json")
    assert again.read_bytes() == list_path.read_bytes()


def test_list_can_be_moved_with_its_runs(list_path: Path, run_copies: list[Path], tmp_path: Path) -> None:
    moved = Path(shutil.copy(list_path, tmp_path / "four.json"))
    assert str(tmp_path) not in moved.read_text()
    assert [checkpoint.folder.parent.parent.parent for checkpoint in ModelWeights.from_list(moved).checkpoints] == [
        tmp_path
    ] * TOP
    inside = write_list(run_copies[:1], run_copies[0] / "own.json", top=2)  # a run named "." from there
    assert ModelWeights.from_list(inside).name.startswith("ensemble of 2: seed0 step-")


def logits_of(folder: Path) -> dict[str, float]:
    return pd.read_csv(folder / "predictions.csv").set_index("path")["logit"].to_dict()


@pytest.fixture(scope="module")
def evaluated(list_path: Path) -> Path:
    """The list's folder with its report on valid."""
    return list_path.with_suffix("")


@pytest.fixture(scope="module")
def exported(list_path: Path) -> Path:
    """The list's ONNX file, exported after the evaluation."""
    return list_path.with_suffix(".onnx")


def test_evaluation_averages_member_probabilities(evaluated: Path, list_path: Path, shard_folder: Path) -> None:
    shards, each = Shards.open(shard_folder), []
    rows = shards.rows("valid")
    images = torch.from_numpy(np.stack([shards.read_pixels(int(row)) for row in rows])[:, None])
    for member in ModelList.load(list_path).members:
        network = ModelWeights.from_run(list_path.parent / member.run, member.checkpoint).load_model()
        with torch.inference_mode():
            each.append(network(images)[0].numpy())
    assert np.ptp(each, axis=0).max() > 1e-2  # members that agree would hide the formula
    paths = shards.manifest.frame.loc[rows, "path"]
    laws.same_metrics(logits_of(evaluated), dict(zip(paths, log_odds_of_mean(np.stack(each)).tolist(), strict=True)))


def test_metrics_do_not_depend_on_ranks(evaluated: Path, list_path: Path, shard_folder: Path, tmp_path: Path) -> None:
    result = torchrun(2, "mura_dist", "evaluate", list_path, shard_folder, "--out", tmp_path / "two", "--quiet")
    assert result.returncode == 0, result.stderr
    laws.same_metrics(logits_of(evaluated), logits_of(tmp_path / "two"))


def test_report_names_the_members(evaluated: Path, list_path: Path) -> None:
    metrics = json.loads((evaluated / "metrics.json").read_bytes())
    assert metrics["checkpoint"].startswith("ensemble of 4: seed")
    assert metrics["selected_on"] == "tune"
    assert metrics["note"] is None
    assert [EnsembleMember(**member) for member in metrics["members"]] == model_list.strip_run_folders(
        list_path, ModelList.load(list_path).members
    )
    assert metrics["checkpoint"] in (evaluated / "report.html").read_text()


def test_report_on_the_selecting_split_has_a_note(list_path: Path, shard_folder: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", list_path, shard_folder, "--split", "tune", "--out", tmp_path, "--quiet"]
    assert main([str(word) for word in arguments]) == DONE
    assert json.loads((tmp_path / "metrics.json").read_bytes())["note"] == "optimistic: this split chose the model"


def test_exported_ensemble_describes_itself(exported: Path, list_path: Path, evaluated: Path) -> None:
    assert (list_path.parent / "triton" / "mura_dist" / "1" / "model.onnx").read_bytes() == exported.read_bytes()
    card, chosen_members = OnnxModel.load(list_path).card, ModelList.load(list_path).members
    assert model_list.have_same_weights(card.members, chosen_members)
    assert card.metrics == json.loads((evaluated / "metrics.json").read_bytes())
    assert card.thresholds
    card_fields = laws.self_describing(
        exported, kind="phantoms", secrets=[str(list_path.parent), str(Path.home()) + "/"]
    )
    assert len(card_fields["members"]) == TOP
    assert card.recipe["seed"] == [int(member.run.removeprefix("seed")) for member in chosen_members]
    assert card.recipe["architecture"] == "tiny"


def test_predictions_equal_the_evaluation(
    exported: Path, evaluated: Path, list_path: Path, phantoms: Path, tmp_path: Path
) -> None:
    assert exported.is_file()
    assert main(["predict", str(list_path), str(phantoms / "valid"), "--out", str(tmp_path), "--quiet"]) == DONE
    predicted, expected = pd.read_csv(tmp_path / "studies.csv"), pd.read_csv(evaluated / "studies.csv")
    both = expected.merge(predicted, on="study", suffixes=("_evaluated", "_predicted"))
    assert len(both) == len(predicted) == len(expected) > 0
    np.testing.assert_allclose(both["probability_evaluated"], both["probability_predicted"], atol=1e-4)
    assert both["call_predicted"].isna().all()  # of drawings
    called = both.dropna(subset=["threshold_predicted"])
    assert len(called) > 0
    calls = called["probability_predicted"] > called["threshold_predicted"]
    assert (called["call_evaluated"] == calls).all()


@pytest.mark.slow
def test_metrics_of_another_model_set_no_threshold(
    list_path: Path, evaluated: Path, run_copies: list[Path], tmp_path: Path, capsys
) -> None:
    """A retrained run has the same name but other digests."""
    path = write_list(run_copies, tmp_path / list_path.name)
    metrics = json.loads((evaluated / "metrics.json").read_bytes())
    metrics["weights_sha256"][-1] = "f" * 64
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert main(["export", str(path)]) == DONE
    assert f"mura-dist evaluate {path} SHARDS" in capsys.readouterr().out
    card = OnnxModel.load(path).card
    assert (card.checkpoint, card.thresholds) == (metrics["checkpoint"], {})


# ---- refusals


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def another_size(first: Path, second: Path) -> None:
    edit_json(second / "data.json", size=65)


def another_manifest(first: Path, second: Path) -> None:
    edit_json(second / "data.json", manifest_sha256="f" * 64)


def another_selection(first: Path, second: Path) -> None:
    recipe = second / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('select_on = "tune"', 'select_on = "valid"'))


def no_run(first: Path, second: Path) -> None:
    (second / "recipe.toml").unlink()


def the_same_weights(first: Path, second: Path) -> None:
    shutil.rmtree(second)
    shutil.copytree(first, second)


def never_evaluated(first: Path, second: Path) -> None:
    for folder in (first, second):
        for path in folder.glob("checkpoints/*/state.json"):
            edit_json(path, select_loss=None)


def untouched(first: Path, second: Path) -> None:
    assert first.is_dir()
    assert second.is_dir()


REFUSED: dict[str, tuple[Callable[[Path, Path], None], list[str], list[str]]] = {
    "size": (another_size, [], ["seed1 has radiographs of size 65,", "seed0 64.", "the same shards"]),
    "manifest": (another_manifest, [], ["seed1 has a manifest of digest ffffffffffff,", "the same shards"]),
    "split": (another_selection, [], ["seed1 has checkpoints selected on valid,", "seed0 tune.", "the same select_on"]),
    "no run": (no_run, [], ["seed1 is not a run"]),
    "copy": (the_same_weights, [], ["hold the same weights, which would count twice. Remove one of the runs"]),
    "twice": (untouched, ["{tmp}/seed0/../seed0"], ["seed0 is given twice. Give each run once"]),
    "too few": (untouched, ["--top", "9"], ["--top 9:", "seed0", "only 6 ", "Give --top 6, or train with keep_best=9"]),
    "none at all": (never_evaluated, [], ["--top 4:", "none can be chosen", ". Train with keep_best=4"]),
    "no member": (untouched, ["--top", "0"], ["--top 0 is less than 1. The paper's ensemble has 5"]),
    "not JSON's name": (untouched, ["--out", "{tmp}/list.txt"], ["list.txt must end in .json"]),
    "a folder": (untouched, ["--out", "{tmp}/folder.json"], ["folder.json is a folder. Give a file"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_incompatible_runs_are_refused(what: str, run_copies: list[Path], tmp_path: Path, capsys) -> None:
    harm, arguments, says = REFUSED[what]
    harm(*run_copies)
    (tmp_path / "folder.json").mkdir()
    options = ["--top", TOP, "--out", tmp_path / "list.json", *(word.format(tmp=tmp_path) for word in arguments)]
    laws.refusal(capsys, ["ensemble", *run_copies, *options], *says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "seed0", "seed1"]


def test_corrupt_members_are_skipped(run_copies: list[Path], tmp_path: Path, capsys) -> None:
    before = ModelList.load(write_list(run_copies, tmp_path / "list.json")).members
    harmed = tmp_path / before[0].run / "checkpoints" / before[0].checkpoint / "model.safetensors"
    harmed.write_bytes(harmed.read_bytes()[:-1])
    capsys.readouterr()
    after = ModelList.load(write_list(run_copies, tmp_path / "list.json")).members
    assert after[: TOP - 1] == before[1:]
    assert "model.safetensors is corrupt" in " ".join(capsys.readouterr().err.split())


def remove_member(first: Path, second: Path) -> None:
    shutil.rmtree(first)


def corrupt_member(first: Path, second: Path) -> None:
    (first / "model.safetensors").write_bytes(b"")


def replace_member(first: Path, second: Path) -> None:
    shutil.rmtree(first)
    shutil.copytree(second, first)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (remove_member, "is missing"),
        (corrupt_member, "model.safetensors is corrupt or missing"),
        (replace_member, "has changed"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_changed_member_is_refused(
    command: str, harm, says: str, run_copies: list[Path], tmp_path: Path, shard_folder: Path, capsys
) -> None:
    path = write_list(run_copies, tmp_path / "list.json")
    first, *_, last = (
        tmp_path / member.run / "checkpoints" / member.checkpoint for member in ModelList.load(path).members
    )
    harm(first, last)
    arguments = [shard_folder] if command == "evaluate" else []
    laws.refusal(capsys, [command, path, *arguments], "list.json", str(first), says, "mura-dist ensemble")


NO_LISTS = {
    "gone": (None, ["no such file", "mura-dist ensemble"]),
    "no JSON": ("{", ["is not a model list", "Expecting"]),
    "no text": (b"\xff\xfe\xff", ["is not a model list"]),
    "another JSON": ('{"overall": {}}', ["is not a model list (members: Field required)"]),
    "no object": ("[1]", ["is not a model list (content: "]),
    "no members": (
        '{"members": [], "select_on": "tune", "size": 64, "manifest_sha256": ""}',
        ["is not a model list (members: "],
    ),
    "of the future": ('{"format": 99}', ["format 99", "reads up to 1", "Update mura-dist"]),
}


@pytest.mark.parametrize("what", NO_LISTS)
@pytest.mark.parametrize("command", ["evaluate", "export", "predict"])
def test_invalid_model_list_is_refused(command: str, what: str, shard_folder: Path, tmp_path: Path, capsys) -> None:
    content, says = NO_LISTS[what]
    path = tmp_path / "list.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = {"evaluate": [shard_folder], "export": [], "predict": [tmp_path, "--out", tmp_path / "out"]}
    laws.refusal(capsys, [command, path, *arguments[command]], "list.json", *says)


@pytest.mark.slow
def test_list_without_onnx_file_is_refused_by_predict(runs: list[Path], phantoms: Path, tmp_path: Path, capsys) -> None:
    path = write_list(runs, tmp_path / "list.json")
    arguments = ["predict", path, phantoms / "valid", "--out", tmp_path / "out"]
    remedy = f"Export it first: mura-dist export {path}"
    laws.refusal(capsys, arguments, "list.json is a list of checkpoints, and", "list.onnx does not exist", remedy)
    (tmp_path / "list.onnx").write_bytes(onnx.build_onnx(Ensemble([tiny(0), tiny(1)]).eval(), card_of(2)))
    laws.refusal(capsys, arguments, "list.json lists other members than", "list.onnx holds (ensemble of 2", remedy)


def test_other_wrong_arguments_are_refused(list_path: Path, runs: list[Path], shard_folder: Path, capsys) -> None:
    why = "is a list of checkpoints. Omit --checkpoint"
    laws.refusal(capsys, ["evaluate", list_path, shard_folder, "--checkpoint", "last"], "--checkpoint last", why)
    laws.refusal(capsys, ["export", list_path, "--checkpoint", "step-6"], "--checkpoint step-6", why)
    laws.refusal(
        capsys, ["evaluate", list_path, shard_folder, "--out", runs[0]], "seed0 is a run", "Pass another folder"
    )
    laws.refusal(capsys, ["ensemble", "--out", "list.json"], "RUN", "mura-dist ensemble --help")


def test_help_names_all_options(capsys) -> None:
    assert main(["ensemble", "--help"]) == DONE
    text = " ".join(capsys.readouterr().out.split())
    for word in ("RUN [RUN ...]", "--out FILE.json", "--top INTEGER", "default: 5", "keep_best=N", "select_on"):
        assert word in text, word
    for command, word in (("evaluate", "RUN_OR_LIST_OR_ONNX"), ("export", "RUN_OR_LIST"), ("predict", "NAME.json")):
        assert main([command, "--help"]) == DONE
        assert word in capsys.readouterr().out

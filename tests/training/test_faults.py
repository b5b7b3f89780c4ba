"""Test failures of a step, a rank, a setting or the disk: logged, counted, raised on all ranks, no checkpoint lost."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import commands, laws
from helpers.commands import ROOT, TINY, run, torchrun, warm_python
from helpers.read_faults import ReadFaults
from helpers.runs import equal, tensors

from mura_dist.core import config
from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError
from mura_dist.data.loaders import sampler
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import process_group
from mura_dist.training import checkpoint, deepspeed_config, metrics_log, start
from mura_dist.training.run import Run

FAULTY = ROOT / "tests/helpers/faulty_train.py"
NUM_MICRO_BATCHES = 6  # of a step: a global batch of 12, two radiographs each


def train(
    ranks: int, fault: str, rank: int, call: str, shards: Path, folder: Path, *arguments: str, leave_s: float = 0
):
    """Train as helpers.commands.train does, with a fault at some calls of a rank's training forward."""
    settings = (*TINY, "micro_batch=2", f"shards={shards}", f"run={folder}", *arguments, "--quiet")
    environment = {"FAULT": fault, "FAULT_RANK": str(rank), "FAULT_CALL": call, "FAULT_LEAVE_S": str(leave_s)}
    launch = [warm_python()] if ranks == 1 else ["torchrun", "--standalone", "--nproc-per-node", ranks]
    return run(*launch, FAULTY, "train", *settings, env=environment, timeout_s=120)


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("mura-dist:")]


def rows_of_micro_batches(shards: Path, step: int) -> list[list[int]]:
    """Return the rows of each micro-batch of a step of the first epoch, over all ranks."""
    epoch = sampler.epoch_permutation(Shards.open(shards).rows("train"), 0, 0, rotate_deg=30.0, flip=True)
    sizes = {"global_batch": 12, "micro_batch": 2, "rank": 0, "world_size": 1}
    return [micro.rows.tolist() for micro in sampler.step_micro_batches(epoch, step, **sizes)]


@pytest.mark.slow
def test_precision_auto_is_refused_on_differing_processors(shard_folder: Path, tmp_path: Path) -> None:
    """One rank supports bf16, the other does not. One line says so, and nothing is written."""
    result = train(2, "bf16", 1, "0", shard_folder, tmp_path / "run", "precision=auto")
    [line] = error_lines(result.stderr)
    assert "on rank 0 and differs on rank 1" in line
    assert "precision=fp32" in line
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("computed", [True, False])
def test_precision_auto_is_resolved_once_per_run(shard_folder: Path, tmp_path: Path, computed: bool) -> None:
    """The recipe records it. On another processor the run resumes with it, and another precision is refused."""
    folder, expected = tmp_path / "run", "bf16" if computed else "fp32"
    first = train(1, "bf16", 0 if computed else 1, "0", shard_folder, folder, "precision=auto", "epochs=1")
    assert first.returncode == 0, first.stderr
    assert Run.load(folder).settings.precision == expected
    again = train(1, "bf16", 1 if computed else 0, "0", shard_folder, folder, "precision=auto", "epochs=2")
    assert again.returncode == 0, again.stderr
    assert Run.load(folder).settings.precision == expected
    fp16 = train(1, "bf16", 0, "0", shard_folder, folder, "precision=fp16", "epochs=2")
    assert f"started with precision='{expected}'" in fp16.stderr


@pytest.mark.parametrize(("precision", "computed"), [("bf16", False), ("bf16", True), ("fp32", False)])
def test_bf16_without_instructions_logs_a_warning(precision: str, computed: bool, monkeypatch) -> None:
    """A run that began on another processor resumes, with a warning that it is slow."""
    monkeypatch.setattr(process_group, "supports_bf16", lambda: computed)
    settings = config.check({"shards": "s", "run": "r", "precision": precision}, "test")
    assert ("warning" in start._bf16_warning(settings)) == (precision == "bf16" and not computed)


@pytest.mark.parametrize(
    ("text", "computed"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_supports_bf16_reads_cpuinfo(tmp_path: Path, text: str, computed: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text(text)
    assert process_group.supports_bf16(tmp_path / "cpuinfo") == computed
    assert not process_group.supports_bf16(tmp_path / "none")


NOT_FINITE = [
    (2, "nan", "loss"),
    pytest.param(1, "gradient", "gradient", marks=pytest.mark.slow),
    pytest.param(1, "nan", "loss", marks=pytest.mark.nightly(part="training")),
    pytest.param(2, "gradient", "gradient", marks=pytest.mark.nightly(part="training")),
]


@pytest.mark.parametrize(("ranks", "fault", "what"), NOT_FINITE)
def test_nonfinite_step_is_skipped_and_logged(
    shard_folder: Path, tmp_path: Path, ranks: int, fault: str, what: str
) -> None:
    """One micro-batch of the last rank fails in step 3. Its line has step and rows, and the run finishes."""
    each = NUM_MICRO_BATCHES // ranks
    result = train(ranks, fault, ranks - 1, str(2 * each + 2), shard_folder, tmp_path / "run", "epochs=1")
    assert result.returncode == 0, result.stderr
    lines = metrics_log.read(tmp_path / "run" / "metrics.jsonl")
    [skip] = [line for line in lines if line["kind"] == "skip"]
    number = (ranks - 1) * each + 1
    micros = rows_of_micro_batches(shard_folder, 2)
    assert (skip["step"], skip["what"]) == (3, what)
    assert skip["rows"] == (micros[number] if what == "loss" else [row for micro in micros for row in micro])
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["skipped_steps"] for line in epochs] == [0, 1]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert (losses[2] is None) == (what == "loss")
    assert None not in losses[3:]
    applied = [*losses[:2], *losses[3:]]
    assert epochs[1]["train_loss"] == pytest.approx(sum(applied) / len(applied), rel=1e-9), (
        "over the steps that were taken"
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.nightly(part="training"))])
def test_nonfinite_evaluation_has_no_effect(shard_folder: Path, tmp_path: Path, ranks: int) -> None:
    """It changes neither plateau nor best checkpoint nor early stop, and the run continues."""
    micros = -(-len(Shards.open(shard_folder).rows("tune")) // 2)
    each = -(-micros // ranks)
    arguments = ("epochs=4", "plateau_patience=0", "plateau_threshold=0.9", "early_stop=3", "keep_checkpoints=9")
    result = train(ranks, "evaluation", ranks - 1, str(2 * each + 1), shard_folder, tmp_path / "run", *arguments)
    assert result.returncode == 0, result.stderr
    epochs = [line for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["tune_loss"] is None for line in epochs] == [False, False, True, False, False]
    assert (epochs[2]["tune_kappa"], epochs[2]["tune_auroc"]) == (None, None)
    assert [line["learning_rate"] for line in epochs] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-5])
    states = [checkpoint.read(folder).state for folder in checkpoint.list_folders(tmp_path / "run" / "checkpoints")]
    assert [state["step"] for state in states] == [0, 8, 16, 24, 32]
    assert (states[2]["plateau"], states[2]["stale_epochs"]) == (states[1]["plateau"], states[1]["stale_epochs"])
    assert states[2]["select_loss"] is None
    assert checkpoint.select(tmp_path / "run" / "checkpoints", "best").step != 16


def test_too_many_consecutive_skips_stop_the_run(shard_folder: Path, tmp_path: Path) -> None:
    """The run stops in the second epoch, and the first epoch's checkpoint stays intact."""
    calls = ",".join(str(call) for call in range(9 * 3 + 1, 13 * 3 + 1))
    result = train(2, "nan", 1, calls, shard_folder, tmp_path / "run", "skip_limit=3")
    assert result.returncode == 1
    [line] = error_lines(result.stderr)
    assert "the loss was NaN or infinite in 3 consecutive steps (skip_limit=3), last in step 12 (rows " in line
    assert "skip_limit=3" in line
    assert "lower learning_rate" in line
    assert "]: Traceback" not in result.stderr, "torchrun has one of its own"
    status = Run.load(tmp_path / "run").status()
    assert status["state"] == "failed"
    assert "step 12" in status["reason"]
    last = checkpoint.select(tmp_path / "run" / "checkpoints", "last")
    assert last.step == 8
    assert last.state["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), pytest.param(("zero_stage=1",), marks=pytest.mark.nightly(part="training"))])
def test_out_of_memory_on_one_rank_stops_all(shard_folder: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = train(2, "memory", 1, "31", shard_folder, tmp_path / "run", *arguments)
    assert result.returncode == 1
    [line] = error_lines(result.stderr)
    for word in ("out of memory on rank 1", "micro_batch=2", "changes BatchNorm", "run=NEW"):
        assert word in line
    assert "CUDA out of memory" not in result.stderr
    assert checkpoint.select(tmp_path / "run" / "checkpoints", "last").step == 8
    again = commands.train(1, shard_folder, tmp_path / "run", "micro_batch=2", *arguments)
    assert again.returncode == 0, again.stderr


def corrupt(shards: Path, split: str) -> None:
    """Change every byte of the split's tars."""
    for tar in shards.glob(f"{split}-*.tar"):
        tar.write_bytes(bytes(byte ^ 1 for byte in tar.read_bytes()))


@pytest.mark.parametrize("split", ["train", pytest.param("tune", marks=pytest.mark.slow)])
def test_run_with_corrupt_shards_fails_and_resumes_after_repair(
    split: str, reference_run: Callable[..., Path], shard_folder: Path, tmp_path: Path
) -> None:
    """The resumed run is bit-identical to one with intact shards."""
    shards, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shard_folder, shards)
    corrupt(shards, split)
    result = commands.train(2, shards, folder)
    assert result.returncode == 1
    [line] = error_lines(result.stderr)
    number, most = len(Shards.open(shards).rows(split)), 2 if split == "train" else 1
    corrupted = 12 if split == "train" else number
    assert (
        f"{corrupted} of {number} {split} samples are corrupt, the limit is {most} (max_corrupt_samples=0.01)" in line
    )
    assert re.search(rf"the first is row \d+ \(.*image\d.png\) in {split}-000000.tar\. `mura-dist verify", line)
    assert Run.load(folder).status()["state"] == "failed"
    assert f"{split} samples are corrupt" in Run.load(folder).status()["reason"]
    assert not (folder / "model.onnx").exists()
    for tar in shards.glob("*.tar"):
        shutil.copy(shard_folder / tar.name, tar)
    assert commands.train(2, shards, folder).returncode == 0
    assert equal(tensors(folder, 8), tensors(reference_run(2), 8))


@pytest.mark.slow
def test_steps_without_samples_are_skipped_until_skip_limit(shard_folder: Path, tmp_path: Path) -> None:
    """No weight, statistic or moment changes, although any number of samples may be corrupt."""
    shards, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shard_folder, shards)
    corrupt(shards, "train")
    arguments = ("max_corrupt_samples=1", "skip_limit=9")
    result = commands.train(2, shards, folder, *arguments)
    assert result.returncode == 1
    [line] = error_lines(result.stderr)
    assert "stopped: every sample is corrupt in 9 consecutive steps (skip_limit=9), last in step 9 (rows " in line
    assert line.endswith("Convert the shards again.")
    skips = [line for line in metrics_log.read(folder / "metrics.jsonl") if line["kind"] == "skip"]
    assert [(line["step"], line["what"], len(line["rows"])) for line in skips] == [
        (n, "samples", 12) for n in range(1, 10)
    ]
    before, after = tensors(folder, 0), tensors(folder, 8)
    assert equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "skip"), [(2, 40), (None, 40), (None, 3)])
def test_persistent_disk_error_stops_all_ranks_with_the_same_message(
    times: int | None,
    skip: int,
    read_faults: Callable[..., ReadFaults],
    reference_run: Callable[..., Path],
    shard_folder: Path,
    tmp_path: Path,
) -> None:
    """In an evaluation and in a step. No sample counts as corrupt, and the resumed run is bit-identical."""
    shards, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shard_folder, shards)
    split = "train" if skip > 10 else "tune"
    faults = read_faults(f"{shards}/{split}-000000.tar", skip=skip, times=times)
    arguments = (*TINY, f"shards={shards}", f"run={folder}", "--quiet")
    result = torchrun(2, "mura_dist.train", *arguments, env=faults.environment, cold=True)
    if times is None:
        assert result.returncode == 1, result.stderr
        [line] = error_lines(result.stderr)
        assert re.search(
            rf"rank \d.*: {shards}/{split}-000000.tar cannot be read in 4 attempts: input/output error", line
        )
        status = Run.load(folder).status()
        assert status["state"] == "failed"
        assert "input/output error" in status["reason"]
        result = commands.train(2, shards, folder)
    assert result.returncode == 0, result.stderr
    assert "damaged" not in result.stderr
    assert equal(tensors(folder, 16), tensors(reference_run(2), 16))


@pytest.mark.parametrize("leave_s", [0, 3])
def test_failing_rank_stops_all_with_one_line_each(shard_folder: Path, tmp_path: Path, leave_s: float) -> None:
    """This also holds if torchrun's SIGTERM arrives while the ranks exit."""
    result = train(2, "error", 1, "10", shard_folder, tmp_path / "run", leave_s=leave_s)
    assert result.returncode == 1
    assert "a fault of the test" in result.stderr
    lost = [line for line in error_lines(result.stderr) if "lost another rank" in line]
    assert all("rank 0" in line for line in lost)
    assert "[rank0]: Traceback" not in result.stderr
    assert "[rank1]: Traceback" in result.stderr, "an error nobody foresaw keeps its traceback"
    assert Run.load(tmp_path / "run").status()["state"] in ("failed", "stopped")


def test_ranks_with_different_settings_are_refused(shard_folder: Path, tmp_path: Path) -> None:
    """A second machine has another recipe: the weights would agree, the radiographs would not."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "from mura_dist.cli.main import entry\n"
        "if __name__ == '__main__':\n"
        "    entry([*sys.argv[1:], *(['rotate_deg=5'] if os.environ['RANK'] == '1' else [])])\n"
    )
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "--quiet")
    result = run("torchrun", "--standalone", "--nproc-per-node", 2, script, "train", *arguments)
    assert result.returncode == 1, "torchrun's"
    [line] = error_lines(result.stderr)
    assert "rank 1 was started with other settings or other shards than rank 0" in line
    assert "exitcode  : 2" in result.stderr
    assert not (tmp_path / "run" / "recipe.toml").exists()


def settings(**values: object) -> Settings:
    return config.check(
        {"shards": "s", "run": "r", "global_batch": 32, "clip_norm": 1.0, "precision": "bf16", **values}, "test"
    )


AGREES = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": "auto"}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 0, "reduce_scatter": False},
    "wall_clock_breakdown": True,
    "comms_logger": {"enabled": True, "verbose": False},
}


def test_agreeing_deepspeed_file_is_merged(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AGREES))
    merged = deepspeed_config.build_config(settings(deepspeed=str(path)), 2, num_weights=10)
    assert merged["wall_clock_breakdown"] is True
    assert merged["comms_logger"] == {"enabled": True, "verbose": False}
    assert merged["zero_optimization"] == {
        "stage": 0,
        "reduce_bucket_size": 10,
        "contiguous_gradients": False,
        "reduce_scatter": False,
    }
    assert merged["gradient_accumulation_steps"] == 2
    assert not {"optimizer", "bf16", "train_batch_size"} & merged.keys(), "ours to do"
    assert merged["gradient_clipping"] == 0, "ours to do: DeepSpeed's default is 1"
    assert merged["communication_data_type"] == "bf16"
    assert "communication_data_type" not in deepspeed_config.build_config(settings(), 1, num_weights=10), (
        "nothing travels"
    )
    path.write_text('{"communication_data_type": "fp32"}')
    merged_fp32 = deepspeed_config.build_config(settings(deepspeed=str(path)), 2, num_weights=10)
    assert merged_fp32["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train_batch_size": 64}, ["train_batch_size = 64", "global_batch=32"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "clip_norm=1.0"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled = true", "precision=bf16"]),
        ({"optimizer": {"type": "Lamb"}}, ['optimizer.type = "Lamb"', "optimizer=adam"]),
        ({"optimizer": {"params": {"lr": 1.0}}}, ["optimizer.params.lr = 1.0", "learning_rate=0.0001"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "zero_stage=0"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer", "is not supported"],
        ),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "belongs to the recipe"]),
        ({"wall_clock_breakdwn": True}, ["wall_clock_breakdwn", "did you mean wall_clock_breakdown"]),
    ],
)
def test_contradicting_deepspeed_file_is_refused(tmp_path: Path, values: dict[str, object], says: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as refused:
        deepspeed_config.build_config(settings(deepspeed=str(path)), 2, num_weights=10)
    for word in (*says, str(path)):
        assert word in str(refused.value)


def test_deepspeed_file_is_checked_before_anything_is_written(shard_folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "ds.json"
    arguments = ["train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", f"deepspeed={path}"]
    laws.refusal(capsys, arguments, "ds.json", "No such file", "deepspeed= for none")
    path.write_text("{")
    laws.refusal(capsys, arguments, "ds.json", "is not JSON")
    path.write_text("[]")
    laws.refusal(capsys, arguments, "no JSON object")
    path.write_text('{"train_batch_size": 5}')
    laws.refusal(capsys, arguments, "train_batch_size = 5", "global_batch=12")
    assert not (tmp_path / "run").exists()


def test_run_with_a_deepspeed_file(shard_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"prescale_gradients": true, "train_batch_size": 12}')
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=1", f"deepspeed={path}", "--quiet")
    assert run("mura-dist", "train", *arguments).returncode == 0
    assert json.loads((tmp_path / "run" / "deepspeed.json").read_text())["prescale_gradients"] is True
    path.write_text('{"prescale_gradients": false}')
    refused = run("mura-dist", "train", *arguments, "epochs=2")
    assert refused.returncode == 2
    assert "prescale_gradients" in refused.stderr

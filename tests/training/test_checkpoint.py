"""Test checkpoints on disk: atomic writes, checks, selection, pruning and the background writer."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mura_dist.core.errors import UserError
from mura_dist.training import checkpoint
from mura_dist.training.checkpoint_writer import BackgroundWriter


def write(parent: Path, step: int, loss: float | None = None) -> Path:
    weights = {"w": torch.full((4,), float(step))}
    return checkpoint.write(parent, {"step": step, "select_loss": loss}, {"model": weights}, {"m": torch.zeros(3)})


@pytest.fixture
def checkpoints_folder(tmp_path: Path) -> Path:
    for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        write(tmp_path / "checkpoints", step, loss)
    return tmp_path / "checkpoints"


def test_corrupt_newest_checkpoint_is_skipped(checkpoints_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints_folder, folder)
    newest = checkpoint.list_folders(folder)[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    (checkpoint.list_folders(folder)[0] / "state.json").write_text("{")  # an old one, that nobody takes
    assert (
        checkpoint.best_folder(checkpoint.list_folders(folder)).name
        == checkpoint.best_folder(checkpoint.list_folders(checkpoints_folder)).name
    )
    messages: list[str] = []
    latest = checkpoint.find_latest(folder, messages.append)
    assert latest is not None
    assert latest.folder == checkpoint.list_folders(folder)[-1], "the damaged one is out of the way"
    assert "model.safetensors is corrupt" in messages[0]
    assert (folder / ".step-00000003.damaged" / "model.safetensors").exists(), "and not lost"
    write(folder, 4)
    checkpoint.prune(folder, keep=1)
    assert (folder / ".step-00000003.damaged").is_dir()
    assert checkpoint.read(checkpoint.list_folders(folder)[-1]).step == 4
    for path in checkpoint.list_folders(folder):
        (path / "state.json").write_text("{")
    present = [path.name for path in checkpoint.list_folders(folder)]
    with pytest.raises(UserError, match=f"none of the {len(present)} checkpoints"):
        checkpoint.find_latest(folder)
    assert [path.name for path in checkpoint.list_folders(folder)] == present, "nothing sound: nothing is moved"


@pytest.mark.parametrize("moment", range(1, 5))
def test_rewriting_a_step_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Law of the torn write: after a kill between any two renames or deletions, `find_latest` finds one complete checkpoint."""
    write(tmp_path, 5, 0.5)
    partial, calls = ready(tmp_path, 5, 0.25), 0

    def counted(work: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise KeyboardInterrupt  # as a kill: nothing after it happens
            return work(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", counted(os.replace))
        patch.setattr(checkpoint.shutil, "rmtree", counted(shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            checkpoint._publish(partial, tmp_path / "step-00000005")
    latest = checkpoint.find_latest(tmp_path)
    assert latest is not None
    assert latest.step == 5
    assert latest.state["select_loss"] in (0.5, 0.25)
    assert calls >= moment
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def ready(parent: Path, step: int, loss: float) -> Path:
    """Write a complete checkpoint that lacks its last rename."""
    partial = parent / f".step-{step:08d}.partial"
    os.replace(write(parent / "elsewhere", step, loss), partial)
    shutil.rmtree(parent / "elsewhere")
    return partial


def test_files_follow_the_umask_and_a_full_disk_raises_os_error(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1
    with pytest.raises(OSError, match="No space left"):
        checkpoint._write_tensors(Path("/dev/full"), {"w": torch.ones(1 << 16)})


def test_prune_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    for step, loss in enumerate([None, 0.5, 0.2, 0.4, 0.3, None]):
        write(tmp_path, step, loss)
    (tmp_path / ".step-00000009.partial").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]
    assert checkpoint.select(tmp_path, "best").step == 2
    assert checkpoint.select(tmp_path, "last").step == 5


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_optimizer_shares_concatenate_to_the_whole_state(tmp_path: Path, shares: int) -> None:
    vector = torch.arange(12.0)
    checkpoint.begin_partial(tmp_path, 7)
    for rank, chunk in enumerate(vector.chunk(shares)):
        own: dict[str, Tensor] = {"moment": chunk.clone(), "step": torch.tensor(7.0)}
        checkpoint.write_optimizer_share(tmp_path, 7, own, rank=rank, num_shares=shares)
    folder = checkpoint.complete_partial(tmp_path, {"step": 7, "select_loss": None}, {"model": {"w": torch.ones(2)}})
    read = checkpoint.read(folder)
    assert torch.equal(read.optimizer_state()["moment"], vector)
    assert read.optimizer_state()["step"] == 7
    assert read.training_state() == {}


@pytest.mark.parametrize("spoil", ["mark", "mark_text", "state", "model", "format", "missing", "unlisted"])
def test_read_names_the_invalid_checkpoint(checkpoints_folder: Path, spoil: str) -> None:
    folder = checkpoints_folder / "step-00000003"
    mark, state = folder / checkpoint.MARK, folder / "state.json"
    if spoil == "mark":
        mark.unlink()
    elif spoil == "mark_text":
        mark.write_text("[]")
    elif spoil == "state":
        state.write_text(state.read_text().replace("0.2", "0.1"))
    elif spoil == "model":
        os.truncate(folder / "model.safetensors", 10)
    elif spoil == "format":
        state.write_text(json.dumps({"step": 3, "format": 1}))
        digests = json.loads(mark.read_text()) | {"state.json": checkpoint.sha256(state)}
        mark.write_text(json.dumps(digests))
    elif spoil == "missing":
        (folder / "model.safetensors").unlink()
    elif spoil == "unlisted":
        digests = json.loads(mark.read_text())
        mark.write_text(json.dumps({"state.json": digests["state.json"]}))
    with pytest.raises(ValueError, match=r"step-00000003"):
        checkpoint.read(folder)
    messages: list[str] = []
    latest = checkpoint.find_latest(checkpoints_folder, messages.append)
    assert latest is not None
    assert latest.step == 2
    assert messages or spoil == "mark", "without the mark it is no checkpoint at all"


def test_background_failure_is_raised_by_the_next_call(tmp_path: Path) -> None:
    writer = BackgroundWriter()
    done: list[int] = []

    def fail() -> None:
        raise OSError("the disk is full")

    writer.submit(lambda: done.append(1))
    writer.submit(fail)
    with pytest.raises(OSError, match="disk is full"):
        writer.submit(lambda: done.append(2))
    writer.submit(lambda: done.append(3))
    writer.flush()
    writer.close()
    assert done == [1, 3]

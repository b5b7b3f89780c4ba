"""A run is a folder with one writer.

    runs/NAME/recipe.toml        every setting as it runs           status.json     running, stopped, done, failed
              data.json          which shards it learns from        environment.json   versions and machine
              metrics.jsonl, tensorboard/, curves.png   metrics_log.py  checkpoints/    checkpoint.py
              lock               lock.py: the one writer; a second one waits for it, then is refused
              mlflow.json, mlflow.lock   mlflow_reader.py, where the run is sent to a server

Opening decides: a new run, one to go on with, one that is finished, or another one (UserError naming the key).
"""

import contextlib
import errno
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr

from mura_dist import __version__
from mura_dist.core import config, files
from mura_dist.core.config import Settings
from mura_dist.core.errors import StopRequestedError, UserError, mask_url
from mura_dist.data.folder_kind import RECIPE, find_output_kinds
from mura_dist.data.shards.codec import MAX_SIZE_PX
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import lock

_PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "opencv-python-headless",
)


class _Data(BaseModel):
    """The part of data.json that is read."""

    manifest_sha256: StrictStr
    size: Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE_PX)]
    encoding: StrictStr
    holds: Literal["phantoms", "radiographs"]
    splits: dict[str, Annotated[int, Field(strict=True, ge=0)]]
    study_types: list[StrictStr]


@dataclass(frozen=True)
class Run:
    """A run's folder and the settings it runs with."""

    folder: Path
    settings: Settings

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """An existing run, to evaluate or export. UserError where `folder` is none."""
        path = folder / RECIPE
        if not path.is_file():
            raise UserError(f"{folder} is not a run (no {RECIPE}); give the folder that run= named")
        return cls(folder, config.load(path))

    def recipe_value(self, key: str, otherwise: Any) -> Any:
        """A setting as the run's recipe has it; `otherwise` where it has not begun."""
        path = self.folder / RECIPE
        return config.read_recipe(path).get(key, otherwise) if path.is_file() else otherwise

    def data(self) -> dict[str, Any]:
        """data.json's content: which shards the run learns from. Raises UserError where it is missing or damaged."""
        return files.read_json(self.folder / "data.json", _Data, remedy="restore it, or train again with run=NEW")

    def status(self) -> dict[str, Any]:
        """status.json's content; empty where there is none yet."""
        try:
            return files.parse_json((self.folder / "status.json").read_bytes(), dict[str, Any])
        except (OSError, ValueError):
            return {}

    def write_status(self, state: str, **facts: Any) -> None:
        facts = {key: mask_url(value) if isinstance(value, str) else value for key, value in facts.items()}
        files.write_json(self.folder / "status.json", {"state": state, "time": time.strftime("%FT%T%z"), **facts})

    def check(self, shards: Shards) -> None:
        """UserError where the folder holds another run: other shards, or a setting that may not change."""
        if "run" not in find_output_kinds(self.folder):
            if self.folder.exists() and not _is_ours(self.folder):
                raise UserError(f"run={self.folder} exists and is no run; give run=NEW")
            return
        before = config.read_recipe(self.folder / RECIPE)
        for key, value in config.identity(self.settings).items():
            if before.get(key, value) != value:
                raise UserError(
                    f"run={self.folder} was started with {key}={before[key]!r}, now it says {key}={value!r}; "
                    "set it back, or give run=NEW for another run"
                )
        data = self.data()
        for key, value in _data(shards).items():
            if data[key] != value:
                raise UserError(
                    f"run={self.folder} learns from shards with {key}={data[key]}, {shards.folder} has {key}={value}; "
                    "give those shards, or run=NEW"
                )

    def check_deepspeed(self, theirs: dict[str, Any]) -> None:
        """UserError where what a user's DeepSpeed file adds is not what it was."""
        path = self.folder / "deepspeed.json"
        again = "restore it, or give run=NEW"
        before = files.read_json(path, dict[str, Any], remedy=again) if path.is_file() else {}
        if "run" not in find_output_kinds(self.folder) or before == theirs:
            return
        key = next(key for key in sorted(before.keys() | theirs.keys()) if before.get(key) != theirs.get(key))
        raise UserError(
            f"run={self.folder} was started with {key} = {json.dumps(before.get(key))} of a DeepSpeed file, deepspeed="
            f"{self.settings.deepspeed} says {json.dumps(theirs.get(key))}; set it back, or give run=NEW for another run"
        )

    def describe(self, shards: Shards, deepspeed: dict[str, Any], **facts: Any) -> None:
        """Write what this run is, as it starts or goes on; `deepspeed`: what a user's DeepSpeed file adds."""
        if deepspeed:
            files.write_json(self.folder / "deepspeed.json", deepspeed)
        files.write_json(self.folder / "data.json", _data(shards))
        files.write_json(self.folder / "environment.json", {**environment(), **facts})
        files.write_text(self.folder / RECIPE, config.to_toml(self.settings))  # last: it makes the folder a run

    def _make(self) -> None:
        """UserError where there can be no such folder, or nothing can be written into it."""
        why = "read-only, or another user's"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.access(self.folder, os.W_OK | os.X_OK):
                return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            why = error.strerror or str(error)
        raise UserError(f"run={self.folder} cannot be written ({why}); make it so, or give run= on a disk that can be")

    @contextlib.contextmanager
    def writing(self, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold the lock; leave status.json saying how the block ended.

        Where another writer lives, wait up to `lock_wait_s` for it to end; then UserError. One on another host, whose heart stands
        still, is waited for until it counts as dead. `stop`, when set, ends the wait: StopRequestedError.
        """
        self._make()
        options = lock.LockOptions(
            f"run={self.folder}", "give run=NEW", self.settings.lock_wait_s, lock.UNVERIFIED_WAIT_S
        )
        with lock.acquire(self.folder / "lock", options, stop or threading.Event()):
            try:
                yield
            except UserError:  # nothing was done: what the folder says stays true
                raise
            except (StopRequestedError, KeyboardInterrupt) as stopped:
                self.write_status("stopped", reason=str(stopped) or "interrupted; the same command goes on")
                raise
            except BaseException as error:
                with contextlib.suppress(OSError):  # the disk may be what failed
                    self.write_status("failed", reason=f"{type(error).__name__}: {error}")
                raise


def _is_ours(folder: Path) -> bool:
    """An empty folder, or a run killed before its recipe was written."""
    begun = {"lock", "status.json", "data.json", "environment.json", "deepspeed.json"}
    return folder.is_dir() and all(path.name in begun or path.name.startswith(".") for path in folder.iterdir())


def _data(shards: Shards) -> dict[str, Any]:
    index = shards.index
    return {
        "manifest_sha256": index["manifest"]["sha256"],
        "size": index["size"],
        "encoding": index["encoding"],
        "holds": index["holds"],
        "splits": {name: part["num_radiographs"] for name, part in index["splits"].items()},
        "study_types": sorted(shards.manifest.frame.loc[shards.rows("train"), "study_type"].unique().tolist()),
    }


def environment() -> dict[str, Any]:
    """Versions and machine, for a claim to be checked against."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "mura_dist": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "num_processors": os.cpu_count(),
    }
